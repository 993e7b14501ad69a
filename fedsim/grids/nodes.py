"""Which node stands for which partition: node ids follow from the partitions and come in order."""

from __future__ import annotations

FIRST_NODE_ID = 2
"""Node of partition 0; Flower keeps 1 for the SuperLink."""


def node_of(partition: int) -> int:
    """Returns the node id of a partition."""
    return partition + FIRST_NODE_ID


def partition_of(node_id: int) -> int:
    """Returns the partition of a node id."""
    return node_id - FIRST_NODE_ID
