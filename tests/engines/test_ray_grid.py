"""The Grid of strategies that do not wait, where somebody does wait for everybody."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("ray")

from flwr.app import Message

from fedsim.grids.cohort import Cohorts
from fedsim.grids.ray_grid import RayGrid
from fedsim.messages import make_content
from tests.engines.toys import cohorts, federation, functional, sgd


class Slow(Cohorts):
    """Has nothing ready yet of what was pushed."""

    def start(self, *message: Any) -> int:
        return 1

    def finished(self) -> dict[int, Any]:
        return {}


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_everybody_is_waited_for(kind: Any) -> None:
    made = cohorts(sgd(functional(), lr=0.1), federation())
    slow: Any = Slow(made.client, made.shards, made.execution, made.seed)
    grid = RayGrid(slow, 5)
    content = make_content({"arrays": made.client.model.initial()}, {"server-round": 1})
    replies = grid.send_and_receive(kind([Message(content, node, "train") for node in (2, 3)]))
    assert [reply.has_content() for reply in replies] == [True, True]
