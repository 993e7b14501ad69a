"""Who holds what, as a table: one row per client."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedsim.data.examples import Array, FederatedData

if TYPE_CHECKING:
    import pandas as pd

CLIENT_COLUMNS = ("client", "rows", "holdout", "weight")
"""The columns of `describe` for any data; those of the targets come after them."""


def describe(data: FederatedData) -> pd.DataFrame:
    """Returns a DataFrame with one row per client.

    Columns: client (0..N-1), rows (that it trains on), holdout (that it evaluates on), weight
    (sum of its training rows' importance weights), and for classes one column of row counts per
    class, by name; for real targets target_mean and target_sd (NaN without rows).
    """
    import pandas as pd

    weights = data.train.weights()
    held = data.holdouts or tuple(np.zeros(0, np.int64) for _ in data.shards)
    table: dict[str, Array] = {
        "client": np.arange(data.clients),
        "rows": np.array([len(rows) for rows in data.shards]),
        "holdout": np.array([len(rows) for rows in held]),
        "weight": np.array([weights[rows].sum() for rows in data.shards]),
    }
    if data.info.target == "class":
        counts = class_counts(data)
        for label, name in enumerate(class_names(data)):
            table[name if name not in table else f"class {name}"] = counts[:, label]
    elif data.info.target == "real":
        targets = [data.train.y[rows].astype(np.float64) for rows in data.shards]
        table["target_mean"] = np.array([y.mean() if len(y) else np.nan for y in targets])
        table["target_sd"] = np.array([y.std() if len(y) else np.nan for y in targets])
    return pd.DataFrame(table)


def class_counts(data: FederatedData) -> Array:
    """Returns (clients, classes) int64: how many training rows of each class a client has."""
    classes = data.info.num_classes or 0
    return np.stack([np.bincount(data.train.y[rows], minlength=classes) for rows in data.shards])


def class_names(data: FederatedData) -> tuple[str, ...]:
    """Returns the names of the classes, their indices where they have none."""
    return data.info.class_names or tuple(map(str, range(data.info.num_classes or 0)))


def summary(data: FederatedData) -> str:
    """Returns one line: the data set, its sizes, and which out-of-distribution set was built."""
    info = data.info
    sizes = np.array([len(rows) for rows in data.shards])
    shape = " × ".join(map(str, info.input_shape))
    spread = f"{sizes.min()} to {sizes.max()} rows (median {np.median(sizes):g})"
    if sizes.min() == sizes.max():
        spread = "1 row each" if sizes.max() == 1 else f"{sizes.max()} rows each"
    parts = [
        f"{info.name}: {sizes.sum():,} training rows of {shape} features",
        f"{len(sizes)} clients of {spread}",
    ]
    if data.holdouts is not None:
        parts.append(f"{sum(map(len, data.holdouts)):,} held out by clients")
    for name, part in (("validation", data.validation), ("test", data.test)):
        if part is not None:
            parts.append(f"{len(part):,} {name} rows")
    if data.ood is not None:
        parts.append(f"{len(data.ood):,} out-of-distribution rows ({info.ood})")
    return ", ".join(parts)
