"""The round loop when it has nothing left to do, and when the grid itself loses replies."""

from __future__ import annotations

from fedsim.messages import Failure, Replies
from tests.engines.toys import same_bits
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
