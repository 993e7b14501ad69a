"""The round loop with nothing left to do, with replies that the grid loses, with empty clients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedsim.data import Partition
from fedsim.messages import Failure, Replies
from tests.engines.toys import federation, same_bits
from tests.unit.server.test_loop import loop


def test_a_run_that_had_ended_does_nothing_when_resumed() -> None:
    made, memory = loop(rounds=3)
    expected = made.run()
    again, rest = loop(rounds=3)
    again.load(*memory.checkpoints[3])
    assert same_bits(again.run().arrays, expected.arrays)
    assert rest.ended == []
    assert rest.checkpoints == {}


def test_failures_of_the_grid_itself_are_counted() -> None:
    def silence(kind: str, server_round: int, replies: Replies) -> Replies:
        if server_round == 1:
            return replies.select([0, 1, 2], [Failure(5, "timed out")])
        return replies

    made, memory = loop(change=silence, rounds=2)
    assert made.run().totals.dropped == 2
    assert memory.events[0][2]["nodes"] == {"5": "timed out", "6": "no reply"}


def test_a_client_without_rows_has_no_loss_but_their_number() -> None:
    data = federation(holdout=3, test=20)
    assert data.holdouts is not None
    rows = [*data.holdouts[:2], np.zeros(0, int), *data.holdouts[3:]]
    made, memory = loop(data=replace(data, holdouts=Partition.of(rows)), rounds=1, clients_every=1)
    made.run()
    (_, having, metrics), (_, without, numbers) = memory.client_metrics
    assert (having, without) == ([0, 1, 3, 4], [2])
    assert numbers == {"num-examples": [0.0]}
    assert metrics["num-examples"] == [3.0] * 4
    mean = sum(metrics["loss"]) / 4
    assert memory.metrics[1, "client"]["loss"] == pytest.approx(mean, rel=1e-12)
