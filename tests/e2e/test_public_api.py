"""The Python API: what `import fedsim` offers, and that it costs nothing until it is used."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
import pytest

import fedsim
from tests.e2e.scenarios import SMALL, THREE

HEAVY = ("torch", "flwr", "pandas", "pydantic", "matplotlib", "sklearn", "scipy", "numpy")


def modules_after(code: str) -> set[str]:
    """Returns which of the heavy packages a new process has imported after running `code`."""
    asked = f"{code}\nimport sys; print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    found: set[str] = set(_words(done.stderr.strip().splitlines()[-1]))
    return found


def _words(text: str) -> list[str]:
    """Returns the words of a printed list."""
    return [word.strip("' ") for word in text.strip("[]").split(",") if word.strip()]


def test_import_and_help_load_nothing_heavy() -> None:
    assert modules_after("import fedsim") == set()
    code = "from fedsim.cli.guard import execute; assert execute(['--help']) == 0"
    assert modules_after(code) == set()
    assert modules_after("import fedsim; fedsim.FedsimError") == {"pydantic"}


def test_every_public_name_is_there() -> None:
    for name in fedsim.__all__:
        assert getattr(fedsim, name) is not None
    assert set(fedsim.__all__) <= set(dir(fedsim))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fedsim.nonsense


def test_run_returns_a_run_with_a_data_frame(
    tmp_path: object, capfd: pytest.CaptureFixture[str]
) -> None:
    import yaml

    scenario = fedsim.Scenario.from_dict(yaml.safe_load(SMALL))
    finished = fedsim.run(scenario, out=str(tmp_path))
    assert isinstance(finished.metrics, pd.DataFrame)
    last = finished.metrics.query("split == 'test' and name == 'accuracy'")["value"].iloc[-1]
    assert finished.summary["metrics"]["test.accuracy"] == last
    assert capfd.readouterr() == ("", "")
    several = fedsim.Scenario.from_dict(yaml.safe_load(THREE))
    with pytest.raises(fedsim.UserError, match="is 3 runs"):
        fedsim.run(several, out=str(tmp_path))
