"""Data sets `digits` and `breast_cancer`, which scikit-learn ships (BSD-3)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedsim.data.base import ImageParams, Scale, Source, TableParams
from fedsim.data.examples import DataInfo, Examples


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
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        images = x.reshape(-1, 1, 8, 8).astype(self.dtype)
        info = DataInfo(self.name, (1, 8, 8), 10, "class", None, tuple(map(str, range(10))))
        return Source(info, Examples(images, y.astype(np.int64)), value_range=(0.0, 16.0))


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

    def load(self, seed: int) -> Source:
        """See DataParams.load."""
        from sklearn.datasets import load_breast_cancer

        bunch = load_breast_cancer()
        info = DataInfo(
            self.name,
            (bunch.data.shape[1],),
            2,
            "class",
            tuple(str(name) for name in bunch.feature_names),
            tuple(str(name) for name in bunch.target_names),
        )
        return Source(info, Examples(bunch.data.astype(self.dtype), bunch.target.astype(np.int64)))
