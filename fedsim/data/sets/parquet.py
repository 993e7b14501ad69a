"""Data set `parquet`: a Parquet file by path."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fedsim.data.base import Source
from fedsim.data.sets.csv_file import existing_file
from fedsim.data.sets.table import ColumnParams, Table, source_of
from fedsim.errors import UserError


class Parquet(ColumnParams):
    """A Parquet file of numbers, booleans and text. Messages count its rows from 1."""

    name: Literal["parquet"] = "parquet"

    def load(self, seed: int) -> Source:
        """See DataParams.load."""
        file = existing_file(self.path)
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise UserError(
                "data.name: 'parquet' needs pyarrow, which is not installed; "
                "pip install 'fedsim-fl[data]'"
            ) from error
        try:
            frame = pq.read_table(file).to_pandas()
        except Exception as error:  # pyarrow's errors share no base class but Exception
            raise UserError(f"data.path: {self.path} is not a Parquet file: {error}") from error
        if not len(frame):
            raise UserError(f"data.path: {self.path} has no rows")
        columns = {}
        for name in frame.columns:
            values = frame[name]
            if values.dtype.kind in "biuf":
                columns[str(name)] = values.to_numpy()
            else:
                columns[str(name)] = np.where(values.isna(), "", values.astype(str)).astype(str)
        return source_of(Table(self.path, columns, np.arange(1, len(frame) + 1)), self)
