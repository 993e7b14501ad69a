"""What is known of a run besides its numbers: `run.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedsim.errors import UserError
from fedsim.runs import exact
from fedsim.runs.files import write_bytes

FORMAT = 1
NAME = "run.json"
APP_LOG = "app.log"  # of a Flower app's run: Flower's log lines, and all tracebacks

Status = Literal["running", "finished", "failed", "interrupted"]
STATUSES: tuple[Status, ...] = ("running", "finished", "failed", "interrupted")
# Shown for a run that says "running" and whose process is gone; a Flower app has nothing to resume.
DIED, APP_DIED = "died (resumable)", "died"


@dataclass
class Record:
    """Who a run is and how it stands.

    Attributes:
      id: the name of its folder.
      name, label, group, seed, settings: of the scenario's expansion into runs.
      rounds: how many rounds are planned.
      created, started: ISO 8601 in UTC; `started` is of the latest sitting.
      pid, host: of the latest sitting.
      seconds: how long it has taken, all sittings together; None until a sitting ends.
    """

    id: str
    name: str
    label: str
    group: str
    seed: int
    settings: dict[str, Any]
    rounds: int
    created: str
    started: str
    pid: int
    host: str
    status: str = "running"
    seconds: float | None = None
    format: int = field(default=FORMAT)

    def save(self, folder: Path) -> None:
        """Writes `run.json` atomically; raises RunFailed if the disk is full."""
        write_bytes(folder / NAME, exact.dumps(asdict(self), indent=2).encode())

    @classmethod
    def load(cls, folder: Path) -> Record:
        """Reads `run.json`; raises UserError if it is absent, damaged or too new."""
        try:
            found = exact.loads((folder / NAME).read_bytes())
            version = found["format"]
            if version <= FORMAT:
                return cls(**found)
        except FileNotFoundError:
            raise UserError(f"{folder} is not a run: it has no {NAME}") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{folder / NAME} is damaged: {error}") from error
        raise UserError(
            f"{folder} was written by a newer fedsim (run format {version}; this one reads "
            f"up to {FORMAT}): upgrade fedsim"
        )
