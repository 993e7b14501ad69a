"""The axes of a search space: linear, logarithmic and integer."""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from fedsim.errors import Params

Floats = NDArray[np.float64]
MAX_INTEGERS = 2**31


class Axis(Params):
    """One input of the objective."""

    name: str = Field(pattern=r"^[A-Za-z_]\w*$", description="What the objective calls it.")
    low: float = Field(description="Smallest value; > 0 on a log axis.")
    high: float = Field(description="Largest value, > low.")
    scale: Literal["linear", "log", "integer"] = Field(
        "linear",
        description="linear: equal differences are equally far apart. log: equal ratios are. "
        "integer: whole numbers, from low to high inclusive.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"axis {self.name}: low must be < high ({self.low:g}, {self.high:g})")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"axis {self.name}: a log axis needs low > 0, not {self.low:g}")
        if self.scale == "integer":
            if not (self.low.is_integer() and self.high.is_integer()):
                raise ValueError(
                    f"axis {self.name}: an integer axis needs whole numbers, not {self.low:g} and"
                    f" {self.high:g}"
                )
            if self.high - self.low >= MAX_INTEGERS:
                raise ValueError(f"axis {self.name}: an integer axis has at most 2^31 values")
        return self

    @property
    def count(self) -> int:
        """The number of values of an integer axis; 0 for the others."""
        return int(self.high - self.low) + 1 if self.scale == "integer" else 0

    def value(self, unit: Floats) -> Floats:
        """Returns the values at positions in [0, 1]; an integer axis has `count` equal steps."""
        if self.scale == "linear":
            return self.low + unit * (self.high - self.low)
        if self.scale == "log":
            span = np.log(self.high) - np.log(self.low)
            found: Floats = np.exp(np.log(self.low) + unit * span)
            return np.clip(found, self.low, self.high)
        return self.low + np.minimum(np.floor(unit * self.count), self.count - 1)

    def unit(self, value: Floats) -> Floats:
        """Returns the positions of values, so that `value` gives them back."""
        if self.scale == "linear":
            return (value - self.low) / (self.high - self.low)
        if self.scale == "log":
            found: Floats = np.log(value / self.low) / np.log(self.high / self.low)
            return found
        return (value - self.low + 0.5) / self.count


def to_values(axes: tuple[Axis, ...], unit: Floats) -> Floats:
    """Returns points (n, d) in the axes' own values for positions (n, d) in [0, 1]."""
    return np.stack([axis.value(unit[:, i]) for i, axis in enumerate(axes)], axis=1)


def to_unit(axes: tuple[Axis, ...], points: Floats) -> Floats:
    """Returns the positions (n, d) in [0, 1] of points (n, d)."""
    return np.stack([axis.unit(points[:, i]) for i, axis in enumerate(axes)], axis=1)
