"""Reads one run from its folder; needs nothing else, so that a folder can be moved and shared."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from fedsim.errors import UserError
from fedsim.runs import draws, exact, lock, record, rows, tensors
from fedsim.runs.writer import PARAMETERS

if TYPE_CHECKING:
    import pandas as pd


class Run:
    """One execution of a scenario with one seed, as its folder holds it.

    A run that is still going can be read; it shows what was committed last.

    Attributes:
      path: the run's folder.
      record: id, scenario name, label, group, seed, settings, planned rounds, times.
    """

    def __init__(self, path: Path) -> None:
        """Opens the run in folder `path`; raises UserError if it is none."""
        self.path = Path(path)
        self.record = record.Record.load(self.path)

    @property
    def id(self) -> str:
        """The run's id."""
        return self.record.id

    @property
    def status(self) -> str:
        """ "running", "finished", "failed", "interrupted", "died (resumable)"; of an app "died"."""
        return status_of(self.path, record.Record.load(self.path).status)

    @cached_property
    def scenario(self) -> dict[str, Any]:
        """The resolved scenario."""
        return _scenario(self.path)

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, processor and git state the run was started with."""
        return self._json("environment.json")

    @property
    def engine(self) -> dict[str, Any]:
        """The recorded execution plan; empty if none was recorded."""
        return self._json("engine.json")

    @property
    def summary(self) -> dict[str, Any]:
        """status, round, seconds, metrics ("split.name" → last value) and more; empty before."""
        return self._json("summary.json")

    @property
    def metrics(self) -> pd.DataFrame:
        """Columns round (int64), split, name (str), value (float64), in the order logged."""
        return _frame(rows.read_metrics(self.path), ("round", "split", "name", "value"))

    @property
    def client_metrics(self) -> pd.DataFrame:
        """Columns round, split, partition, name, value, in the order logged."""
        columns = ("round", "split", "partition", "name", "value")
        return _frame(rows.read_client_metrics(self.path), columns)

    @property
    def events(self) -> pd.DataFrame:
        """Columns time, kind, round (NaN where none) and every field that an event has."""
        import pandas as pd

        found = list(rows.read_events(self.path))
        names = dict.fromkeys(("time", "kind", "round"))
        for event in found:
            names.update(dict.fromkeys(event))
        return pd.DataFrame(found, columns=list(names))

    @property
    def draw_rounds(self) -> np.ndarray:
        """The rounds of the draws, int64 (draws,)."""
        return draws.read_rounds(self.path)

    def draws(self) -> dict[str, np.ndarray]:
        """Returns posterior draws by name, (chains, draws, *shape); bfloat16 comes as float32."""
        return draws.read(self.path)

    def parameters(self) -> dict[str, np.ndarray]:
        """Returns the final parameters by name; raises UserError if the run has none (yet)."""
        try:
            return tensors.read_numpy(self.path / PARAMETERS)
        except FileNotFoundError:
            raise UserError(f"run {self.id} has no final parameters: it is {self.status}") from None
        except ValueError as error:
            raise UserError(f"{self.path / PARAMETERS} is damaged: {error}") from error

    def artifacts(self) -> list[str]:
        """Returns the names of all artifacts, sorted."""
        folder = self.path / "artifacts"
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def artifact(self, name: str) -> Path:
        """Returns the path of an artifact; raises UserError naming those that exist."""
        if name not in self.artifacts():
            there = ", ".join(self.artifacts()) or "none"
            raise UserError(f"run {self.id} has no artifact {name!r}; there are: {there}")
        return self.path / "artifacts" / name

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.status})"

    def _json(self, name: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = exact.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            return {}
        return found


def status_of(folder: Path, status: str) -> str:
    """Returns the status to show: a "running" run without a living process died."""
    if status == "running" and not lock.is_held(folder):
        return record.APP_DIED if _is_of_app(folder) else record.DIED
    return status


def _is_of_app(folder: Path) -> bool:
    try:
        return "app" in _scenario(folder)
    except (OSError, yaml.YAMLError, TypeError):  # a damaged run is for the commands that read it
        return False


def _scenario(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "scenario.yaml").read_text())
    return found


def _frame(found: list[Any], columns: tuple[str, ...]) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame(found, columns=list(columns))
    types = {"round": "int64", "partition": "int64", "value": "float64"}
    return frame.astype({name: types[name] for name in columns if name in types})
