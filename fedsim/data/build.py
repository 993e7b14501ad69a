"""From parameters to federated data: load, split, scale, partition, hold out, check."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedsim.data import ood, scale
from fedsim.data.base import DataParams, ImageParams, Source, SplitParams, TableParams
from fedsim.data.examples import DataInfo, Examples, FederatedData
from fedsim.data.partition import Partition
from fedsim.data.partitions.base import PartitionParams, hold_out, rows_by_owner
from fedsim.data.partitions.natural import Given
from fedsim.data.sets.custom import Custom
from fedsim.data.split import split
from fedsim.errors import Params, UserError


def build_data(data: Params, partition: Params, seed: int) -> FederatedData:
    """Returns the data set `data`, divided over clients by `partition`.

    data: one of DATASETS. partition: one of PARTITIONS. seed: the run's seed; the same seed and
    parameters give the same arrays to the bit. Raises UserError where the data cannot be had or
    the partition does not exist, saying what would be right.
    """
    if not isinstance(data, DataParams) or not isinstance(partition, PartitionParams):
        raise TypeError("build_data takes parameters out of DATASETS and PARTITIONS")
    data_seed = seed if data.seed is None else data.seed
    partition_seed = seed if partition.seed is None else partition.seed
    built = data.build(data_seed)
    if isinstance(built, FederatedData):
        return _as_given(built, data, partition)
    source = built
    if isinstance(data, SplitParams):
        source = split(source, data, data_seed)
    odd = None
    if isinstance(data, ImageParams):
        source, odd = _with_ood(source, data, data_seed)
    if isinstance(data, ImageParams | TableParams):
        source, odd = _scaled(source, data, odd)
    shards, holdouts = _partitioned(source, partition, partition_seed)
    if isinstance(data, SplitParams) and not data.allow_missing_classes:
        check_classes(source, shards)
    return FederatedData(
        info=source.info,
        train=source.examples,
        shards=shards,
        holdouts=holdouts,
        validation=source.validation,
        test=source.test,
        ood=odd,
        truth={} if source.truth is None else source.truth(pooled(source.examples, shards)),
    )


def pooled(examples: Examples, shards: Partition) -> Examples:
    """Returns the examples of all clients together, in the order of their rows."""
    assert shards.rows is not None
    return examples.take(np.sort(shards.rows))


def check_classes(source: Source, shards: Partition) -> None:
    """Raises UserError if no client trains on some class that the data declares."""
    if source.info.target != "class" or source.info.num_classes is None or shards.rows is None:
        return
    held = np.bincount(source.examples.y[shards.rows], minlength=source.info.num_classes)
    missing = np.flatnonzero(held == 0)
    if not len(missing):
        return
    names = source.info.class_names
    shown = ", ".join(repr(names[c]) if names else str(c) for c in missing[:10])
    if len(missing) > 10:
        shown += f" and {len(missing) - 10} more"
    raise UserError(
        f"data: no client has a training row of class {shown}, so none can learn it; use more "
        "rows, smaller test_fraction, validation_fraction or holdout, or set "
        "data.allow_missing_classes: true"
    )


def _partitioned(
    source: Source, partition: PartitionParams, seed: int
) -> tuple[Partition, Partition | None]:
    owner, clients = partition.assign(source.examples, source.info, seed)
    shards = rows_by_owner(owner, clients)
    smallest = int(np.argmin(shards.sizes))
    if shards.sizes[smallest] < partition.min_size:
        raise UserError(
            f"partition.min_size: client {smallest} has {shards.sizes[smallest]} rows, less than "
            f"{partition.min_size}; use fewer clients, a smaller min_size or another partition"
        )
    return hold_out(shards, partition.holdout, seed)


def _with_ood(source: Source, params: ImageParams, seed: int) -> tuple[Source, Examples | None]:
    """Returns the source, its info saying which set was built, and the set in grey values."""
    chosen = ood.choose(params.ood, params.name)
    if chosen == "none":
        return source, None
    first = np.arange(min(ood.DEFAULT_COUNT, len(source.examples)))
    like = source.test or source.validation or source.examples.take(first)
    high = source.value_range[1] if source.value_range is not None else 1.0
    built = ood.ood_set(chosen, like, high, seed)
    return replace(source, info=replace(source.info, ood=chosen)), built


def _scaled(
    source: Source, params: ImageParams | TableParams, odd: Examples | None
) -> tuple[Source, Examples | None]:
    """Returns every part scaled by the training rows, and images flat where that is asked."""
    images = isinstance(params, ImageParams)
    shift, factor = scale.affine(source.examples.x, params.scale, source.value_range, not images)
    flat = isinstance(params, ImageParams) and params.flatten

    def transform(part: Examples | None) -> Examples | None:
        if part is None:
            return None
        x = scale.apply(part.x, shift, factor)
        return part.with_x(x.reshape(len(x), -1) if flat else x)

    train = transform(source.examples)
    assert train is not None
    info: DataInfo = replace(source.info, input_shape=tuple(train.x.shape[1:]))
    scaled = replace(
        source,
        info=info,
        examples=train,
        validation=transform(source.validation),
        test=transform(source.test),
    )
    return scaled, transform(odd)


def _as_given(made: FederatedData, data: DataParams, partition: PartitionParams) -> FederatedData:
    whose = data.factory if isinstance(data, Custom) else data.name
    if not isinstance(partition, Given) or partition.holdout > 0.0:
        what = "returns FederatedData" if isinstance(data, Custom) else "has clients of its own"
        raise UserError(
            f"partition: {whose} {what}, which says who holds what and what is held out; use"
            " partition: {name: given} without holdout"
        )
    if partition.clients not in (None, made.clients):
        raise UserError(
            f"partition.clients: {partition.clients} clients and {whose} has {made.clients}; leave"
            " it out"
        )
    smallest = int(made.shards.sizes.min())
    if smallest < partition.min_size:
        raise UserError(
            f"partition.min_size: the smallest client of {whose} has {smallest} rows, less than"
            f" {partition.min_size}"
        )
    if isinstance(data, Custom) and not data.allow_missing_classes:
        check_classes(Source(made.info, made.train), made.shards)
    return made
