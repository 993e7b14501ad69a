"""The command, called inside the test's process (a new one takes seconds to import torch)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedsim.cli.guard import execute


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

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        status = execute([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return call
