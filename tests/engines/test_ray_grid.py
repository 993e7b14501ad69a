"""The Grid of strategies that do not wait, where somebody does wait for everybody."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("ray")

from flwr.app import Message

from fedsim.grids.cohort import Cohorts
from fedsim.grids.inline import InlineGrid
from fedsim.grids.ray_grid import RayGrid
from fedsim.messages import config_of, make_content, to_tensors
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


class Later(Cohorts):
    """Has what was pushed ready when it is asked."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.results: dict[int, Any] = {}

    def start(self, content: Any, message_type: str, partition: int) -> int:
        records = {name: to_tensors(r) for name, r in content.array_records.items()}
        number = len(self.results)
        result = self.run(message_type, records, config_of(content), [partition])
        self.results[number] = result, []  # run has kept the client's state
        return number

    def finished(self) -> dict[int, Any]:
        results, self.results = self.results, {}
        return results


def test_what_is_no_training_is_answered_as_inline_does() -> None:
    """Evaluation, questions and unknown nodes, pushed among messages to train on."""
    made = cohorts(sgd(functional(), lr=0.1), federation())
    later: Any = Later(made.client, made.shards, made.execution, made.seed)
    content = make_content({"arrays": made.client.model.initial()}, {"server-round": 1})
    asked = [(2, "train"), (3, "evaluate"), (4, "query.num_examples"), (99, "train"), (5, "train")]
    answers = []
    for grid in (InlineGrid(made, 5), RayGrid(later, 5)):
        ids = grid.push_messages([Message(content, node, kind) for node, kind in asked])
        replies = {r.metadata.reply_to_message_id: r for r in grid.pull_messages(ids)}
        assert set(replies) == set(ids)
        assert not grid.pull_messages(ids)
        answers.append([told(replies[each]) for each in ids])
    assert answers[1] == answers[0]
    assert answers[0][3] == "no such node"
    assert answers[0][2]["metrics"] == {"num-examples": 30}
    assert "loss" in answers[0][1]["metrics"]


class Busy(Later):
    """One worker; partition 1 is done a while after nobody waits for it any more."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.looks = 0
        self.slow: int | None = None
        self.ignored: list[int] = []

    def start(self, content: Any, message_type: str, partition: int) -> int:
        number = super().start(content, message_type, partition) + 10 * partition
        self.results[number] = self.results.pop(number - 10 * partition)
        if partition == 1:
            self.slow = number
        return number

    def idle(self) -> int:
        return 2 - len(self.results)

    def ignore(self, number: int) -> None:
        self.ignored.append(number)

    def finished(self) -> dict[int, Any]:
        self.looks += self.slow in self.ignored
        held = {n: r for n, r in self.results.items() if n == self.slow and self.looks < 5}
        done = {n: r for n, r in self.results.items() if n not in held}
        self.results = held
        return done


def test_a_round_whose_clients_are_all_forgotten_ones_waits_for_them() -> None:
    made = cohorts(sgd(functional(), lr=0.1), federation())
    busy: Any = Busy(made.client, made.shards, made.execution, made.seed)
    grid = RayGrid(busy, 5)
    content = make_content({"arrays": made.client.model.initial()}, {"server-round": 1})

    def asked(*nodes: int) -> list[Message]:
        return [Message(content, node, "train") for node in nodes]

    came: list[int] = []

    def first(reply: Message) -> bool:
        came.append(reply.metadata.src_node_id)
        return False

    grid.first_come(asked(3, 2), first)  # node 3 is partition 1
    assert came == [2]
    assert busy.ignored == [busy.slow]
    grid.first_come(asked(3), first)
    assert came == [2, 3]


def told(reply: Message) -> Any:
    """Returns a reply's numbers, or why there are none."""
    if reply.has_error():
        return reply.error.reason
    arrays = {
        record: {name: t.tolist() for name, t in to_tensors(r).items()}
        for record, r in reply.content.array_records.items()
    }
    return arrays | {"metrics": dict(reply.content.metric_records["metrics"])}
