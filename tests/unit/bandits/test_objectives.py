"""Black boxes: functions and programs, and what happens when they fail."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.bandits.axes import Axis
from fedsim.bandits.objectives import Program, PythonFunction, import_function, pull
from fedsim.clients.base import Batch
from fedsim.errors import UserError

AXES = (Axis(name="dose", low=0.0, high=10.0), Axis(name="k", low=1, high=3, scale="integer"))
POINTS = np.array([[1.5, 2.0], [9.0, 3.0]])
SHARD = Batch(torch.tensor([[1.0], [2.0]]), torch.zeros(2), torch.ones(2), torch.ones(()))


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def score(point: dict[str, float], shard: Batch, *, factor: float = 1.0) -> float:
    assert isinstance(point["k"], int)
    return factor * (point["dose"] + float(shard.x.sum()))


def test_a_function_gets_point_and_shard() -> None:
    made = PythonFunction(score, AXES, SHARD, {"factor": 2.0})
    assert pull(made, POINTS, rng(), 0).values.tolist() == [9.0, 24.0]


@pytest.mark.parametrize(
    ("path", "arguments", "reason"),
    [
        ("tests.unit.bandits.test_objectives:nothing", {}, "no attribute"),
        ("tests.unit.bandits.test_objectives:AXES", {}, "not a function"),
        ("tests.unit.bandits.test_objectives:score", {"facto": 1.0}, "facto"),
        ("tests.unit.bandits.test_objectives:rng", {}, "function\\(point, shard"),
    ],
)
def test_functions_that_cannot_be_called_are_refused(
    path: str, arguments: dict[str, float], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        import_function(path, arguments)


def program(tmp_path: Path, body: str, timeout: float = 20.0) -> Program:
    """Returns the objective that runs a Python script."""
    file = tmp_path / "score.py"
    file.write_text(f"import json, sys\nasked = json.load(sys.stdin)\n{body}\n")
    return Program([sys.executable, "-S", str(file)], AXES, timeout, client=4)


def test_a_program_reads_and_writes_json(tmp_path: Path) -> None:
    made = program(
        tmp_path, "p = asked['point']; json.dump({'value': p['dose'] * 10 + p['k'] + "
        "asked['client'] / 10}, sys.stdout)"
    )  # fmt: skip
    assert pull(made, POINTS, rng(), 0).values.tolist() == [17.4, 93.4]
    assert pull(program(tmp_path, "print(0.5)"), POINTS[:1], rng(), 0).values.tolist() == [0.5]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("sys.exit('no drug left')", "exit status 1; it said no drug left"),
        ("print('much')", "JSONDecodeError"),
        ("print('NaN')", "it returned nan"),
        ("print('{}')", "KeyError"),
    ],
)
def test_programs_that_fail(tmp_path: Path, body: str, reason: str) -> None:
    found = pull(program(tmp_path, body), POINTS[:1], rng(), 0)
    assert np.isnan(found.values).all()
    assert found.failed == 1
    assert reason in found.reason


def test_a_program_that_does_not_answer_is_ended_with_what_it_started(tmp_path: Path) -> None:
    body = "import subprocess; subprocess.run(['sleep', '60'])"
    began = time.monotonic()
    found = pull(program(tmp_path, body, timeout=0.5), POINTS[:1], rng(), 0)
    assert time.monotonic() - began < 10
    assert "no answer within 0.5 s" in found.reason


def test_a_program_that_says_too_much_is_ended() -> None:
    """Not after its timeout, with all that it has said in memory."""
    began = time.monotonic()
    found = pull(Program(["yes"], AXES, 20.0, client=0), POINTS[:1], rng(), 0)
    assert time.monotonic() - began < 10
    assert found.failed == 1
    assert "has said more than" in found.reason


def test_a_program_need_not_read() -> None:
    made = Program(["sh", "-c", "exec 0<&-; echo 0.25"], AXES, 20.0, client=0)
    assert pull(made, POINTS, rng(), 0).values.tolist() == [0.25, 0.25]


def test_a_function_that_exits_has_failed() -> None:
    def exits(point: dict[str, float], shard: Batch) -> float:
        sys.exit("no licence")

    found = pull(PythonFunction(exits, AXES, SHARD, {}), POINTS, rng(), 0)
    assert found.failed == 2
    assert found.reason == "SystemExit: no licence"


def test_only_failed_pulls_are_repeated(tmp_path: Path) -> None:
    seen: list[float] = []

    def shaky(point: dict[str, float], shard: Batch) -> float:
        seen.append(point["dose"])
        if point["dose"] > 5 and seen.count(point["dose"]) < 3:
            raise OSError("busy")
        return 1.0

    made = PythonFunction(shaky, AXES, SHARD, {})
    found = pull(made, POINTS, rng(), 1)
    assert found.failed == 1
    assert "busy" in found.reason
    found = pull(made, POINTS, rng(), 1)
    assert found.failed == 0
    assert seen == [1.5, 9.0, 9.0, 1.5, 9.0]
