"""What every data set's parameters have in common, and what its loader returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from fedsim.data.examples import Array, DataInfo, Examples, FederatedData
from fedsim.errors import Params

Truth = Callable[[Examples], Mapping[str, Array]]
Scale = Literal["none", "unit", "standardise"]
Dtype = Literal["float32", "float64"]


@dataclass(frozen=True)
class Source:
    """A loaded data set, not yet split.

    examples: all rows that may be split and partitioned.
    validation, test: rows that the data set itself sets aside, or None.
    strata: (n,) integers; a split takes the same share of each, None means one stratum.
    value_range: what `scale: unit` maps to 0..1, where the data set fixes it (images).
    truth: computes what is known of the answer from the rows that the clients train on.
    """

    info: DataInfo
    examples: Examples
    validation: Examples | None = None
    test: Examples | None = None
    strata: Array | None = None
    value_range: tuple[float, float] | None = None
    truth: Truth | None = None


class DataParams(Params):
    """Base of every data set's parameters."""

    name: str
    seed: int | None = Field(
        None,
        description="Seed of everything random about the data (generation, splits); without it "
        "the run's seed. Set it to keep the data fixed while the run's seed varies.",
    )
    dtype: Dtype = Field("float32", description="Floating-point type of features and real targets.")

    def load(self, seed: int) -> Source:
        """Returns the data set, not yet split; raises UserError where it cannot be had."""
        raise NotImplementedError

    def build(self, seed: int) -> Source | FederatedData:
        """Returns what `load` does, or, where the data says who holds what, all of it."""
        return self.load(seed)


class SplitParams(DataParams):
    """Base of data sets whose rows the server may set aside before they are partitioned."""

    test_fraction: float = Field(
        0.2,
        ge=0.0,
        lt=1.0,
        description="Share of the rows that the server holds as the test set, in [0, 1), drawn "
        "before partitioning and stratified by class. 0: the data set's own test rows where it "
        "has them, else no test set.",
    )
    validation_fraction: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Share of the rows that the server holds as the validation set, in [0, 1), "
        "drawn before partitioning and stratified by class. 0: the data set's own validation rows "
        "where it has them, else no validation set.",
    )
    rows: int | None = Field(
        None,
        ge=2,
        description="Keep a stratified random sample of this many rows, drawn before anything "
        "else; without it all rows are used.",
    )
    allow_missing_classes: bool = Field(
        False,
        description="Go on although no client holds a training row of some class. Otherwise "
        "such a scenario is refused: no client could learn the class.",
    )


class TableParams(SplitParams):
    """Base of data sets with one row of features per example."""

    scale: Scale = Field(
        "standardise",
        description="none: features as they are. standardise: minus the mean, divided by the "
        "standard deviation of each feature over the training rows of all clients. unit: the "
        "training rows' smallest and largest value of each feature become 0 and 1.",
    )


class ImageParams(SplitParams):
    """Base of image sets: features are (channels, height, width), or flat."""

    scale: Scale = Field(
        "unit",
        description="unit: grey values as 0..1. standardise: minus the mean and divided by the "
        "standard deviation of all training pixels together. none: grey values as stored.",
    )
    flatten: bool = Field(
        False,
        description="Give each image as one vector of channels × height × width features, for "
        "models that take no images.",
    )
    ood: str
