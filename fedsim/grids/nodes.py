"""Which node stands for which partition: node ids follow from the partitions and come in order."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

FIRST_NODE_ID = 2
"""Node of partition 0; Flower keeps 1 for the SuperLink."""


def node_of(partition: int) -> int:
    """Returns the node id of a partition."""
    return partition + FIRST_NODE_ID


def partition_of(node_id: int) -> int:
    """Returns the partition of a node id."""
    return node_id - FIRST_NODE_ID


def pick(
    nodes: Sequence[int], busy: Collection[int], count: int, rng: np.random.Generator
) -> list[int]:
    """Returns `count` of the nodes (ascending) that are not busy, or all, in the order of ids."""
    at = np.array(sorted(nodes.index(node) for node in busy if node in nodes), np.int64)
    idle = len(nodes) - len(at)
    if count <= 0 or not idle:
        return []
    if count >= idle:
        taken = np.arange(idle)
    else:
        taken = np.sort(rng.choice(idle, count, replace=False))
    # the i-th idle node: beyond as many busy ones as lie before it
    before = np.searchsorted(at - np.arange(len(at)), taken, side="right")
    return [nodes[int(i)] for i in taken + before]
