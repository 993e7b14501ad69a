"""The command, called inside the test's process (a new one takes seconds to import torch)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from fedsim.cli.guard import execute
from fedsim.metrics import diagnostics

SCALARS = 64
"""How many scalars of a posterior the runs of these tests diagnose."""


@dataclass(frozen=True)
class Result:
    """What a call of the command left: its exit status and what it printed."""

    status: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def fedsim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Calls the command in an empty folder; runs go to `runs` in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDSIM_RUNS", raising=False)
    monkeypatch.delenv("FEDSIM_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    # ArviZ takes 4 ms for each scalar: longer than the rounds that drew it.
    monkeypatch.setattr("fedsim.artifacts.diagnostics", partial(diagnostics, limit=SCALARS))

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        status = execute([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return call
