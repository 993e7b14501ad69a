"""Posterior draws of a run: kept in memory until a checkpoint, then one file for many rounds.

`draws/000101-000150.safetensors` holds, per parameter, a tensor (draws, chains, *shape), and the
rounds of its draws. A draw later than the last checkpoint would be drawn again on resume, so
nothing is lost by waiting; one file per draw would cost a disk sync each.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.errors import UserError
from fedsim.runs import tensors
from fedsim.runs.files import disk_errors, write_bytes

if TYPE_CHECKING:
    import torch

FOLDER = "draws"
MAX_WAITING = 64 * 2**20  # bytes; more than this is written before the next checkpoint


class DrawWriter:
    """Collects the draws of a run in its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER
        self._rounds: list[int] = []
        self._waiting: list[dict[str, torch.Tensor]] = []
        self._bytes = 0
        self._last = -1
        self._shape: dict[str, tuple[Any, ...]] | None = None

    def add(self, round: int, draw: Mapping[str, torch.Tensor]) -> None:
        """Takes one draw, tensors (chains, *shape) by name; copies them.

        Raises:
          ValueError: names, shapes or dtypes differ from the draw before, or the round is not
            later.
        """
        import torch

        taken = {
            name: torch.as_tensor(value).detach().cpu().clone() for name, value in draw.items()
        }
        shape = {name: (value.dtype, *value.shape) for name, value in taken.items()}
        if self._shape not in (None, shape):
            raise ValueError(f"draw of round {round} has {shape}, the ones before {self._shape}")
        if round <= self._last:
            raise ValueError(f"draw of round {round} comes after that of round {self._last}")
        self._shape, self._last = shape, round
        self._rounds.append(round)
        self._waiting.append(taken)
        self._bytes += sum(value.nbytes for value in taken.values())
        if self._bytes > MAX_WAITING:
            self.flush()

    def flush(self) -> None:
        """Writes the waiting draws; raises RunFailed, keeping them, if the disk is full."""
        if not self._waiting:
            return
        _write(self._folder, self._rounds, _stack(self._waiting))
        self._rounds, self._waiting, self._bytes = [], [], 0

    def truncate_after(self, round: int) -> None:
        """Removes the draws of later rounds, waiting or written."""
        import torch

        self._rounds, self._waiting, self._bytes = [], [], 0
        self._last, self._shape = min(self._last, round), None
        for path in files(self._folder.parent):
            first, last = _span(path)
            if last <= round:
                continue
            if first <= round:
                data = path.read_bytes()
                rounds = _rounds(data)
                kept = torch.tensor([number <= round for number in rounds])
                values = {name: value[kept] for name, value in tensors.from_bytes(data).items()}
                _write(self._folder, [number for number in rounds if number <= round], values)
            path.unlink()


def files(run: Path) -> list[Path]:
    """Returns the files of draws, in the order of their rounds."""
    return sorted((run / FOLDER).glob("[0-9]*-*.safetensors"), key=_span)


def read_rounds(run: Path) -> np.ndarray:
    """Returns the rounds of all draws on the disk, int64 (draws,)."""
    rounds = [number for path in files(run) for number in _rounds(path.read_bytes())]
    return np.array(rounds, dtype=np.int64)


def read(run: Path) -> dict[str, np.ndarray]:
    """Returns the draws on the disk by name, each (chains, draws, *shape); empty if there are none.

    Raises UserError if a file is damaged.
    """
    parts: list[dict[str, np.ndarray]] = []
    for path in files(run):
        try:
            parts.append(tensors.read_numpy(path))
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}") from error
    names = list(parts[0]) if parts else []
    return {
        name: np.swapaxes(np.concatenate([part[name] for part in parts]), 0, 1) for name in names
    }


def _stack(draws: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    import torch

    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


def _write(folder: Path, rounds: list[int], values: dict[str, torch.Tensor]) -> None:
    path = folder / f"{rounds[0]:06d}-{rounds[-1]:06d}.safetensors"
    with disk_errors(path):
        folder.mkdir(exist_ok=True)
    write_bytes(path, tensors.to_bytes(values, rounds=rounds))


def _rounds(data: bytes) -> list[int]:
    rounds = tensors.read_meta(data)["rounds"]
    assert isinstance(rounds, list)
    return rounds


def _span(path: Path) -> tuple[int, int]:
    first, _, last = path.stem.partition("-")
    return int(first), int(last)
