"""Gives a run's results to other tools, in formats that those read."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from fedsim.errors import UserError
from fedsim.runs.files import disk_errors, write_bytes
from fedsim.runs.reader import Run
from fedsim.runs.record import APP_LOG
from fedsim.runs.writer import PARAMETERS

if TYPE_CHECKING:
    import pandas as pd

Format = Literal["csv", "parquet", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)
_COPIES = (
    "scenario.yaml",
    "summary.json",
    "environment.json",
    "engine.json",
    APP_LOG,
    PARAMETERS,
)


def export(run: Run, target: Path, format: Format | None = None) -> list[Path]:
    """Writes the results of `run` and returns the files written.

    Args:
      run: finished or not.
      target: a file (its name ends in .csv, .parquet or .json): the metrics alone; or a folder:
        metrics, per-client metrics and events in `format`, copies of the scenario, summary,
        environment, final parameters (.safetensors) and all artifacts. Existing files of the same
        names are replaced.
      format: of the tables; by default as the file's name says, for a folder "csv".
        Floats are written so that they read back exactly. In JSON, NaN and infinities are null.

    Raises:
      UserError: an unknown format, or Parquet without pyarrow; nothing is written.
      RunFailed: the disk is full or unwritable.
    """
    target = Path(target)
    suffix = target.suffix.removeprefix(".").lower()
    is_file = suffix in FORMATS and not target.is_dir()
    chosen = format or (suffix if is_file else "csv")
    if chosen not in FORMATS:
        raise UserError(f"there is no export format {chosen!r}; there are {', '.join(FORMATS)}")
    if chosen == "parquet":
        _need_pyarrow()
    if is_file:
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        return [_write(target, run.metrics, chosen)]
    with disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
    tables = {"metrics": run.metrics, "client_metrics": run.client_metrics, "events": run.events}
    written = [
        _write(target / f"{name}.{chosen}", table, chosen)
        for name, table in tables.items()
        if len(table) or name == "metrics"
    ]
    sources = {name: run.path / name for name in _COPIES}
    sources |= {f"artifacts/{name}": run.artifact(name) for name in run.artifacts()}
    for name, source in sources.items():
        if source.exists():
            with disk_errors(target / name):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target / name)
            written.append(target / name)
    return written


def _write(path: Path, table: pd.DataFrame, format: str) -> Path:
    if format == "csv":
        data = table.to_csv(index=False).encode()
    elif format == "json":
        data = _json(table)
    else:
        data = _parquet(table)
    write_bytes(path, data)
    return path


def _json(table: pd.DataFrame) -> bytes:
    """Returns a list of objects; pandas' own `to_json` would cut floats to ten digits."""
    objects = [
        {str(name): _strict(value) for name, value in row.items()}
        for row in table.astype(object).to_dict("records")
    ]
    return (json.dumps(objects, indent=1) + "\n").encode()


def _strict(value: object) -> object:
    """Returns a value as strict JSON can hold it: no NaN, no infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_strict(item) for item in value]
    if isinstance(value, dict):
        return {name: _strict(item) for name, item in value.items()}
    return value


def _parquet(table: pd.DataFrame) -> bytes:
    # A field of events may hold lists, or different types in different rows: as JSON text.
    mixed = [str(name) for name in table.columns if table[name].dtype == object]
    texts = {name: [json.dumps(_strict(value)) for value in table[name]] for name in mixed}
    ready = table.assign(**texts)
    buffer = io.BytesIO()
    ready.to_parquet(buffer, index=False)
    return buffer.getvalue()


def _need_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UserError(
            "Parquet needs pyarrow: pip install 'fedsim-fl[data]', or export as csv"
        ) from None
