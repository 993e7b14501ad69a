"""The user's cache folder, for data that takes long to parse."""

from __future__ import annotations

import os
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np

from fedsim.data.examples import Array


def cache_folder() -> Path:
    """Returns $FEDSIM_CACHE, else $XDG_CACHE_HOME/fedsim, else ~/.cache/fedsim."""
    if folder := os.environ.get("FEDSIM_CACHE"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "fedsim"


def read_cached(name: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Array] | None:
    """Returns the cached arrays; None if there are none, or none of the right shapes."""
    path = cache_folder() / name
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in shapes}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if path.exists():
            warnings.warn(f"{path} is unreadable and is made again: {error}", stacklevel=2)
        return None
    if any(arrays[key].shape != shape for key, shape in shapes.items()):
        return None
    return arrays


def write_cached(name: str, arrays: dict[str, Array]) -> None:
    """Stores arrays under `name`, whole or not at all; warns if the folder cannot be written."""
    path = cache_folder() / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            try:
                np.savez_compressed(file, allow_pickle=False, **arrays)
                file.close()
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"not cached in {path.parent}: {error}", stacklevel=2)
