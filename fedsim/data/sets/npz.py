"""Data set `npz`: NumPy arrays by path."""

from __future__ import annotations

import zipfile
import zlib
from typing import Literal

import numpy as np
from pydantic import Field

from fedsim.data.base import Dtype, Source, TableParams
from fedsim.data.check import check_examples, infer_info
from fedsim.data.examples import Array, Examples
from fedsim.data.sets.csv_file import existing_file
from fedsim.errors import UserError


class NPZ(TableParams):
    """A file of `np.savez`: features of any shape, targets, and what goes with them.

    A target of integers is a class index, 0..C-1; one of floats is real.
    """

    name: Literal["npz"] = "npz"
    path: str = Field(description="The file; a relative path is relative to the current directory.")
    x: str = Field("x", description="Array (n, …) of features.")
    y: str = Field("y", description="Array (n,) or (n, k) of targets.")
    weight: str | None = Field(None, description="Array (n,) of importance weights ≥ 0.")
    client: str | None = Field(
        None, description="Array (n,) that says whose row it is; partitions call it 'client'."
    )
    test_x: str | None = Field(None, description="Array (m, …) of the test set's features.")
    test_y: str | None = Field(None, description="Array (m,) of the test set's targets.")
    num_classes: int | None = Field(
        None, ge=2, description="Number of classes C; without it the largest class index + 1."
    )
    scale: Literal["none", "unit", "standardise"] = Field(
        "none",
        description="none: features as stored. standardise: minus the mean, divided by the "
        "standard deviation of each feature over the training rows. unit: training minimum and "
        "maximum become 0 and 1.",
    )

    def load(self, seed: int) -> Source:
        """See DataParams.load."""
        arrays = self._read()
        x, y = arrays[self.x], arrays[self.y]
        weight = arrays[self.weight] if self.weight else None
        columns = {"client": arrays[self.client]} if self.client else {}
        examples = check_examples(
            Examples(as_dtype(x, self.dtype), as_target(y, self.dtype), weight, columns), self.path
        )
        info = infer_info(self.name, examples, self.num_classes)
        test = None
        if self.test_x is not None and self.test_y is not None:
            x, y = arrays[self.test_x], arrays[self.test_y]
            test = check_examples(
                Examples(as_dtype(x, self.dtype), as_target(y, self.dtype)), self.path, info
            )
        return Source(info, examples, test=test)

    def _read(self) -> dict[str, Array]:
        if (self.test_x is None) != (self.test_y is None):
            raise UserError("data: test_x and test_y go together; write both or neither")
        file = existing_file(self.path)
        names = (self.x, self.y, self.weight, self.client, self.test_x, self.test_y)
        arrays: dict[str, Array] = {}
        try:
            with np.load(file, allow_pickle=False) as stored:
                if not isinstance(stored, np.lib.npyio.NpzFile):
                    raise UserError(f"data.path: {self.path} is one array; save it with np.savez")
                for name in names:
                    if name is not None and name not in stored.files:
                        raise UserError(
                            f"data.path: {self.path} has no array {name!r}; it has "
                            f"{', '.join(stored.files)}"
                        )
                    if name is not None:
                        arrays[name] = stored[name]
                        if not isinstance(arrays[name], np.ndarray):
                            raise ValueError(f"{name!r} is damaged")
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(
                f"data.path: {self.path} is not a file of plain NumPy arrays (.npz): {error}"
            ) from error
        return arrays


def as_dtype(x: Array, dtype: Dtype) -> Array:
    """Returns numbers in the given floating-point type; other arrays as they are."""
    return x.astype(dtype) if x.dtype.kind in "biuf" else x


def as_target(y: Array, dtype: Dtype) -> Array:
    """Returns integers and booleans as int64 class indices, floats in the given type."""
    return y.astype(np.int64) if y.dtype.kind in "biu" else as_dtype(y, dtype)
