"""Checkpoints: folders that appear complete or not at all.

`checkpoints/round-000123/` holds `arrays.safetensors` and `state.json`, with a format version and
checksums of both. The folder is filled under a temporary name, synced and renamed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.errors import UserError
from fedsim.runs import exact, tensors
from fedsim.runs.files import TEMPORARY, disk_errors, sync_folder, write_through

if TYPE_CHECKING:
    import torch

FORMAT = 1
OLDEST = 1  # the first format that is still read
FOLDER = "checkpoints"
_PREFIX = "round-"


@dataclass(frozen=True)
class Checkpoint:
    """What a run continues from.

    Attributes:
      round: the last round that is complete, ≥ 0.
      tensors: by name, on the CPU, bit for bit as they were saved.
      state: the JSON value that was saved.
      seconds: how long the run had taken, all its sittings together.
    """

    round: int
    tensors: dict[str, torch.Tensor]
    state: Any
    seconds: float


class DamagedError(Exception):
    """A checkpoint that is torn or corrupt."""


def save(
    run: Path,
    round: int,
    values: Mapping[str, torch.Tensor],
    state: object,
    *,
    seconds: float = 0.0,
    keep: int = 2,
    keep_every: int = 0,
) -> Path:
    """Writes the checkpoint of `round` and removes those that nobody asked to keep.

    The newest `keep` stay, and the first one of each `keep_every` rounds (0: of none). It costs
    what the state does; how many rounds were run before makes no difference.

    Raises:
      TypeError: a state that is not JSON or a dtype that safetensors lacks.
      RunFailed: the disk is full or unwritable; earlier checkpoints are untouched.
    """
    if round < 0 or keep < 1:
        raise ValueError(f"round {round} must be ≥ 0 and keep {keep} must be ≥ 1")
    arrays = tensors.to_bytes(values)
    body = exact.dumps(state)
    manifest = {
        "format": FORMAT,
        "round": round,
        "seconds": seconds,
        "arrays": _digest(arrays),
        "checksum": _digest(body.encode()),
    }
    # The state's own text is embedded, so that its checksum is over the bytes that are read back.
    text = exact.dumps(manifest)[:-1] + f', "state": {body}}}\n'
    folder = run / FOLDER
    final = folder / f"{_PREFIX}{round:06d}"
    temporary = folder / f"{TEMPORARY}{final.name}.{os.getpid()}"
    with disk_errors(final):
        folder.mkdir(exist_ok=True)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            write_through(temporary / "arrays.safetensors", arrays)
            write_through(temporary / "state.json", text.encode())
            sync_folder(temporary)
            _remove(final)
            os.rename(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(folder)
        there = _rounds(run)
        for old in sorted(set(there) - kept(there, keep, keep_every)):
            _remove(_path(run, old))
    return final


def kept(rounds: Sequence[int], keep: int, keep_every: int) -> set[int]:
    """Returns the rounds whose checkpoints stay: the newest, and the first of each period.

    The first at or after round keep_every, at or after 2 · keep_every, and so on: checkpoints by
    the clock seldom fall on a multiple.
    """
    newest_first = sorted(rounds, reverse=True)
    firsts = {round // keep_every: round for round in newest_first} if keep_every else {}
    return {*newest_first[:keep], *(round for period, round in firsts.items() if period)}


def newest(run: Path, on_invalid: Callable[[int, str], None]) -> Checkpoint | None:
    """Returns the newest valid checkpoint, or None if none was ever written.

    Args:
      run: the run's folder.
      on_invalid: called with the round and the reason of every torn or corrupt one it skips.

    Raises:
      UserError: the newest one is of a format that this fedsim does not read, or all are damaged.
    """
    damaged = []
    for found in _rounds(run):
        try:
            return read(_path(run, found))
        except DamagedError as reason:
            damaged.append(f"round {found}: {reason}")
            on_invalid(found, str(reason))
    if damaged:
        raise UserError(
            f"no checkpoint of run {run.name} can be read ({'; '.join(damaged)}): start it anew"
            f" with fedsim run {run / 'scenario.yaml'}"
        )
    return None


def read(path: Path) -> Checkpoint:
    """Returns the checkpoint in `path`.

    Raises DamagedError if it is torn or corrupt, UserError if its format is not known.
    """
    try:
        text = (path / "state.json").read_text()
        manifest = exact.loads(text)
        _check_format(path, manifest["format"])
        arrays = (path / "arrays.safetensors").read_bytes()
        body = text[text.index(', "state": ') + len(', "state": ') : text.rindex("}")]
        if _digest(arrays) != manifest["arrays"] or _digest(body.encode()) != manifest["checksum"]:
            raise DamagedError("its checksum does not match")
        values = tensors.from_bytes(arrays)
        return Checkpoint(manifest["round"], values, manifest["state"], manifest["seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"it cannot be read: {error}") from error


def _check_format(path: Path, version: int) -> None:
    if version > FORMAT:
        raise UserError(
            f"{path} was written by a newer fedsim (checkpoint format {version}; "
            f"this one reads up to {FORMAT}): upgrade fedsim to resume it"
        )
    if version < OLDEST:
        raise UserError(
            f"{path} was written by an older fedsim (checkpoint format {version}; "
            f"this one reads from {OLDEST} on): resume it with that version, or start anew"
        )


def remove_after(run: Path, round: int) -> None:
    """Removes the checkpoints of later rounds."""
    for found in _rounds(run):
        if found > round:
            _remove(_path(run, found))


def _rounds(run: Path) -> list[int]:
    """Returns the rounds of all checkpoint folders, newest first."""
    numbers = [path.name.removeprefix(_PREFIX) for path in (run / FOLDER).glob(f"{_PREFIX}*")]
    return sorted((int(number) for number in numbers if number.isdigit()), reverse=True)


def _path(run: Path, round: int) -> Path:
    return run / FOLDER / f"{_PREFIX}{round:06d}"


def _remove(path: Path) -> None:
    """Removes a checkpoint so that no reader ever sees half of it."""
    doomed = path.with_name(f"{TEMPORARY}old-{path.name}.{os.getpid()}")
    with suppress(FileNotFoundError):
        os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()
