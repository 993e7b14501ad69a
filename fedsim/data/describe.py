"""Who holds what, as a table: one row per client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.data.examples import Array, FederatedData
from fedsim.data.partition import Rows

if TYPE_CHECKING:
    import pandas as pd

CLIENT_COLUMNS = ("client", "rows", "holdout", "weight")
"""The columns of `describe` for any data; those of the targets come after them."""

MAX_LISTED, MAX_MADE = 10_000, 100
"""Clients that a table lists at most: of a table's rows, of rows that are made for it."""


def listed(data: FederatedData, most: int | None = None) -> Rows:
    """Returns the clients that a table or picture shows: all, or `most` evenly spaced ones."""
    limit = MAX_LISTED if data.make is None else MAX_MADE
    return spaced(data.clients, min(limit, most or limit))


def spaced(n: int, most: int) -> Rows:
    """Returns 0..n-1, or `most` evenly spaced ones of them with the first and the last."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(np.int64))


def describe(data: FederatedData, clients: Rows | None = None) -> pd.DataFrame:
    """Returns `columns_of` as a DataFrame."""
    import pandas as pd

    return pd.DataFrame(columns_of(data, clients))


def columns_of(data: FederatedData, clients: Rows | None = None) -> dict[str, Array]:
    """Returns what is to be said of each client, or of each of `clients`, by column.

    Columns: client (0..N-1), rows (that it trains on), holdout (that it evaluates on), weight
    (sum of its training rows' importance weights), and for classes one column of row counts per
    class, by name; for real targets target_mean and target_sd (NaN without rows).
    """
    clients = np.arange(data.clients) if clients is None else clients
    y, weights, owner = targets_of(data, clients)
    sizes = data.shards.sizes[clients]
    n = len(clients)
    table: dict[str, Array] = {
        "client": clients,
        "rows": sizes,
        "holdout": np.zeros(n, np.int64) if data.holdouts is None else data.holdouts.sizes[clients],
        "weight": np.bincount(owner, weights, n),
    }
    if data.info.target == "class":
        counts = _counts(y, owner, n, data.info.num_classes or 0)
        for label, name in enumerate(class_names(data)):
            table[name if name not in table else f"class {name}"] = counts[:, label]
    elif data.info.target == "real":
        targets = y.reshape(len(owner), -1).astype(np.float64)
        with np.errstate(invalid="ignore"):  # NaN without rows
            mean = np.bincount(owner, targets.mean(1), n) / sizes
            spread = ((targets - mean[owner, None]) ** 2).mean(1)
            table["target_mean"] = mean
            table["target_sd"] = np.sqrt(np.bincount(owner, spread, n) / sizes)
    return table


def targets_of(data: FederatedData, clients: Rows) -> tuple[Array, Array, Rows]:
    """Returns the clients' training rows as y (n, ...), weights (n,) and places in `clients`."""
    if data.make is None:
        shards = data.shards.take(clients)
        weights = np.ones(shards.total)
        if data.train.weight is not None:
            weights = data.train.weights()[shards.rows]
        return data.train.y[shards.rows], weights, shards.owners()
    made = [data.make(int(client)) for client in clients]
    owner = np.repeat(np.arange(len(made)), [len(m) for m in made])
    return np.concatenate([m.y for m in made]), np.concatenate([m.weights() for m in made]), owner


def class_counts(data: FederatedData, clients: Rows | None = None) -> Array:
    """Returns (clients, classes) int64: how many training rows of each class a client has."""
    clients = np.arange(data.clients) if clients is None else clients
    y, _, owner = targets_of(data, clients)
    return _counts(y, owner, len(clients), data.info.num_classes or 0)


def _counts(y: Rows, owner: Rows, clients: int, classes: int) -> Array:
    flat = np.bincount(owner * classes + y, minlength=clients * classes)
    return flat.reshape(clients, classes)


def class_names(data: FederatedData) -> tuple[str, ...]:
    """Returns the names of the classes, their indices where they have none."""
    return data.info.class_names or tuple(map(str, range(data.info.num_classes or 0)))


def statistics(data: FederatedData) -> dict[str, Any]:
    """Returns what a run notes of its data: clients, rows, and how many rows the clients have."""
    sizes = data.shards.sizes
    quantiles = np.quantile(sizes, [0.0, 0.25, 0.5, 0.75, 1.0])
    names = ("smallest", "lower_quartile", "median", "upper_quartile", "largest")
    return {
        "clients": data.clients,
        "rows": data.shards.total,
        "rows_per_client": dict(zip(names, quantiles.tolist(), strict=True)),
    }


def summary(data: FederatedData) -> str:
    """Returns one line: the data set, its sizes, and which out-of-distribution set was built."""
    info = data.info
    sizes = data.shards.sizes
    shape = " × ".join(map(str, info.input_shape))
    spread = f"{sizes.min()} to {sizes.max()} rows (median {np.median(sizes):g})"
    if sizes.min() == sizes.max():
        spread = "1 row each" if sizes.max() == 1 else f"{sizes.max()} rows each"
    parts = [
        f"{info.name}: {sizes.sum():,} training rows of {shape} features",
        f"{len(sizes):,} clients of {spread}",
    ]
    if data.holdouts is not None:
        parts.append(f"{data.holdouts.total:,} held out by clients")
    for name, part in (("validation", data.validation), ("test", data.test)):
        if part is not None:
            parts.append(f"{len(part):,} {name} rows")
    if data.ood is not None:
        parts.append(f"{len(data.ood):,} out-of-distribution rows ({info.ood})")
    return ", ".join(parts)
