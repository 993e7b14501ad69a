"""Rows that the server sets aside before they are partitioned: stratified, keyed by the seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedsim.data.base import Source, SplitParams
from fedsim.data.examples import Array, Examples
from fedsim.data.partition import Rows
from fedsim.errors import UserError
from fedsim.random import generator


def split(source: Source, params: SplitParams, seed: int) -> Source:
    """Returns the source with `rows`, `test_fraction` and `validation_fraction` applied.

    Raises UserError if no row would remain to train on.
    """
    if params.test_fraction + params.validation_fraction >= 1.0:
        raise UserError(
            f"data: test_fraction {params.test_fraction:g} and validation_fraction "
            f"{params.validation_fraction:g} leave no rows to train on; their sum must be below 1"
        )
    strata = _strata(source)
    rows = np.arange(len(source.examples))
    if params.rows is not None:
        if params.rows > len(rows):
            raise UserError(
                f"data.rows: {params.rows} rows and {source.info.name!r} has {len(rows)}; use at "
                f"most {len(rows)}"
            )
        rows = stratified(strata, params.rows, generator(seed, "data.rows"))
    total = len(rows)
    validation, test = source.validation, source.test
    if params.test_fraction > 0.0:
        count = round(params.test_fraction * total)
        taken = rows[stratified(strata[rows], count, generator(seed, "data.test"))]
        rows = np.setdiff1d(rows, taken)
        test = _some(source.examples, taken, "test_fraction", total)
    if params.validation_fraction > 0.0:
        count = round(params.validation_fraction * total)
        taken = rows[stratified(strata[rows], count, generator(seed, "data.validation"))]
        rows = np.setdiff1d(rows, taken)
        validation = _some(source.examples, taken, "validation_fraction", total)
    if not len(rows):
        raise UserError("data: the test and validation sets leave no rows to train on")
    examples = source.examples.take(rows)
    return replace(source, examples=examples, validation=validation, test=test, strata=strata[rows])


def stratified(strata: Array, count: int, rng: np.random.Generator) -> Rows:
    """Returns `count` sorted random indices with each stratum's share as near as possible.

    Rows are shuffled within their stratum; of a stratum of size m the j-th row is given the
    place (j + ½) / m, shifted at random by less than a row, and the `count` smallest places win.
    """
    shuffled = rng.permutation(len(strata))
    order = shuffled[np.argsort(strata[shuffled], kind="stable")]
    _, starts, sizes = np.unique(strata[order], return_index=True, return_counts=True)
    within = np.arange(len(strata)) - np.repeat(starts, sizes)
    # One shift per stratum: who of many small strata gives a row is random, not the first ones.
    shift = np.repeat(rng.random(len(sizes)), sizes)
    places = (within + shift) / np.repeat(sizes, sizes)
    return np.sort(order[np.argsort(places, kind="stable")[:count]]).astype(np.int64)


def _strata(source: Source) -> Array:
    if source.strata is not None:
        return source.strata
    if source.info.target == "class":
        return source.examples.y
    return np.zeros(len(source.examples), dtype=np.int64)


def _some(examples: Examples, rows: Rows, field: str, total: int) -> Examples:
    if not len(rows):
        raise UserError(f"data.{field}: its share of {total} rows is less than one row; raise it")
    return examples.take(rows)
