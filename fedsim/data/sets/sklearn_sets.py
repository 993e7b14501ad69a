"""Data sets `digits` and `breast_cancer`, which scikit-learn ships (BSD-3)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from fedsim.data.base import ImageParams, Scale, Source, TableParams
from fedsim.data.examples import DataInfo, Examples
from fedsim.errors import UserError


class Digits(ImageParams):
    """1,797 handwritten digits of 8 × 8 grey values 0..16, ten classes: x is (1, 8, 8).

    scikit-learn's `load_digits`, the test set of UCI's Optical Recognition of Handwritten Digits.
    """

    name: Literal["digits"] = "digits"
    ood: Literal["none", "corrupted", "auto"] = Field(
        "none",
        description="Out-of-distribution set: corrupted makes one of the test images, by noise, "
        "inversion, shuffled tiles and blur; auto is the same here.",
    )

    def load(self, seed: int) -> Source:
        """See DataParams.load."""
        table = np.loadtxt(_shipped("digits.csv.gz"), delimiter=",")
        x, y = table[:, :-1], table[:, -1]
        images = x.reshape(-1, 1, 8, 8).astype(self.dtype)
        info = DataInfo(self.name, (1, 8, 8), 10, "class", None, tuple(map(str, range(10))))
        return Source(info, Examples(images, y.astype(np.int64)), value_range=(0.0, 16.0))


def _shipped(name: str) -> Path:
    """Returns a file that scikit-learn ships; importing its loader takes as long as torch."""
    spec = find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "datasets" / "data" / name


class BreastCancer(TableParams):
    """569 tumours with 30 real features, classes malignant and benign: x is (30,).

    scikit-learn's `load_breast_cancer`, UCI's Breast Cancer Wisconsin (Diagnostic).
    """

    name: Literal["breast_cancer"] = "breast_cancer"
    scale: Scale = Field(
        "standardise",
        description="standardise: minus the mean, divided by the standard deviation of each "
        "feature over the training rows. unit: training minimum and maximum become 0 and 1. "
        "none: as measured.",
    )
    features: list[str] | None = Field(
        None,
        min_length=1,
        description="Names of the features to keep, in this order, such as mean texture; empty "
        "keeps all 30.",
    )

    def load(self, seed: int) -> Source:
        """See DataParams.load."""
        from sklearn.datasets import load_breast_cancer

        bunch = load_breast_cancer()
        known = [str(name) for name in bunch.feature_names]
        kept = known if self.features is None else self.features
        unknown = [name for name in kept if name not in known]
        if unknown:
            raise UserError(
                f"data.features: breast_cancer has no feature {unknown[0]!r}; there are"
                f" {', '.join(known)}"
            )
        x = bunch.data[:, [known.index(name) for name in kept]].astype(self.dtype)
        classes = tuple(str(name) for name in bunch.target_names)
        info = DataInfo(self.name, (len(kept),), 2, "class", tuple(kept), classes)
        return Source(info, Examples(x, bunch.target.astype(np.int64)))
