"""Partition `pathological`: every client holds rows of exactly k classes."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedsim.data.examples import Array, DataInfo, Examples
from fedsim.data.partition import Rows
from fedsim.data.partitions.base import LabelPartitionParams
from fedsim.errors import UserError
from fedsim.random import generator


class Pathological(LabelPartitionParams):
    """Each client draws k classes; each class is divided equally over the clients that drew it.

    Classes are drawn so that each has as nearly as possible equally many clients. Every row is
    used once.
    """

    name: Literal["pathological"] = "pathological"
    classes_per_client: int = Field(
        2, ge=1, description="Number of classes k of each client, 1 to the number of classes."
    )

    def assign(self, examples: Examples, info: DataInfo, seed: int) -> tuple[Rows, int]:
        """See PartitionParams.assign."""
        self.check_enough_rows(len(examples))
        labels, distinct = self.labels(examples, info)
        self._check_classes(len(distinct))
        rng = generator(seed, "data.partition.pathological")
        chosen = draw_classes(self.clients, self.classes_per_client, len(distinct), rng)
        owner = np.empty(len(labels), dtype=np.int64)
        for label in range(len(distinct)):
            rows = rng.permutation(np.flatnonzero(labels == label))
            takers = rng.permutation(np.flatnonzero(chosen[:, label]))
            if len(takers) > len(rows):
                raise UserError(
                    f"partition.classes_per_client: {len(takers)} clients need rows of class "
                    f"{distinct[label]!s} and there are {len(rows)}; use fewer clients or "
                    "classes_per_client"
                )
            owner[rows] = takers[np.arange(len(rows)) % len(takers)]
        return owner, self.clients

    def _check_classes(self, num_classes: int) -> None:
        if self.classes_per_client > num_classes:
            raise UserError(
                f"partition.classes_per_client: {self.classes_per_client} classes a client and "
                f"the training rows have {num_classes}; use at most {num_classes}"
            )
        if self.clients * self.classes_per_client < num_classes:
            raise UserError(
                f"partition.classes_per_client: {self.clients} clients × "
                f"{self.classes_per_client} classes leave some of the {num_classes} classes "
                f"without a client; use at least {-(-num_classes // self.clients)}"
            )


def draw_classes(clients: int, k: int, num_classes: int, rng: np.random.Generator) -> Array:
    """Returns a (clients, num_classes) mask with k classes a client, evenly used.

    Each client takes the k classes that fewest clients have, ties broken at random.
    """
    chosen = np.zeros((clients, num_classes), dtype=bool)
    uses = np.zeros(num_classes, dtype=np.int64)
    for client in range(clients):
        classes = np.lexsort((rng.random(num_classes), uses))[:k]
        chosen[client, classes] = True
        uses[classes] += 1
    return chosen
