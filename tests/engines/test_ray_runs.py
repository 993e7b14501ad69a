"""What a run on Ray gives up, refuses, and says of itself."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsim import run_all
from fedsim.clients.base import Batch, Reply
from fedsim.clients.sgd import SGD
from fedsim.errors import RunFailed, UserError
from fedsim.grids import ray_cohorts
from fedsim.grids.lanes import GATHER_FLOATS
from fedsim.grids.ray_cohorts import RayCohorts
from fedsim.messages import Arrays, make_content
from fedsim.runs import RunWriter
from fedsim.scenario import Scenario
from fedsim.server.loop import RoundLoop
from tests.engines.test_ray import (
    CPUS,
    STRATEGIES,
    Troubled,
    cluster,
    finish,
    on_ray,
    scenario,
    troubled,
)
from tests.engines.toys import Memory, same_bits
from tests.engines.warm import warm

pytest.importorskip("ray")
pytestmark = pytest.mark.xdist_group("ray")
__all__ = ["cluster", "warm"]  # the fixtures, for this module


class EvaluatedAlone(SGD):
    """Each client is evaluated by itself."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.personalised = True


class HungAtEvaluation(EvaluatedAlone):
    """Partition 4 never ends to evaluate."""

    def evaluate(self, records: Any, client_state: Arrays, batch: Batch) -> Any:
        if float(batch.x.flatten()[0]) == 4:
            self.hang()
        return super().evaluate(records, client_state, batch)

    def hang(self) -> None:
        """Lets other threads go on."""
        time.sleep(100)


class FrozenAtEvaluation(HungAtEvaluation):
    """Lets no thread of its process go on."""

    def hang(self) -> None:
        sum(range(10**13))


@pytest.mark.parametrize(
    ("kind", "late"),
    [
        ("HungAtEvaluation", {4}),
        pytest.param("FrozenAtEvaluation", {4, 5, 6}, marks=pytest.mark.slow),
    ],
)
def test_the_deadline_binds_evaluation_too(
    kind: str, late: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who shares a worker with one that lets nothing else go on fails with it."""
    monkeypatch.setattr(ray_cohorts, "GRACE", 1.0)
    setup = troubled(on_ray(2, path="one_by_one"), client={"name": f"{__name__}:{kind}"})
    calm = troubled({"path": "one_by_one"}, client={"name": f"{__name__}:EvaluatedAlone"})
    evaluate = "evaluate", {"arrays": setup.arrays}, {"server-round": 1}
    expected = calm.grid()._clients.run(*evaluate, range(7))  # type: ignore[union-attr]
    cohorts = setup.grid()._clients
    assert isinstance(cohorts, RayCohorts)
    try:
        cohorts.run(*evaluate, [0, 1, 5, 6])  # so that all that is done once is done
        cohorts._deadline = 3.0
        found = cohorts.run(*evaluate, range(7))
        assert cohorts.record()["workers_lost"] == 1
        cohorts._deadline = None
        assert cohorts.run(*evaluate, range(4)).good == [0, 1, 2, 3]
    finally:
        cohorts.close()
    assert found.errors == dict.fromkeys(late, "no answer within 3 s (deadline)")
    assert found.good == [i for i in range(7) if i not in late]
    for name, values in expected.metrics.items():
        assert found.metrics[name].tolist() == values[found.good].tolist()


class Echo(Troubled):
    """Says what it was sent."""

    def train(self, message_type: str, records: Any, *rest: Any) -> Any:
        return Reply(records, {"letters": float(len(message_type))}), {}


@pytest.mark.usefixtures("warm")
def test_messages_of_two_types_with_one_content_are_told_apart() -> None:
    setup = troubled(on_ray(1), kind="Echo", client={"name": f"{__name__}:Echo"})
    cohorts = setup.grid()._clients
    assert isinstance(cohorts, RayCohorts)
    content = make_content({"arrays": setup.arrays}, {"server-round": 1})
    kinds = ["train", "train.again", "train"]
    try:
        numbers = [cohorts.start(content, kind, 0) for kind in kinds]
        found: dict[int, Any] = {}
        while len(found) < len(numbers):
            found |= cohorts.finished()
    finally:
        cohorts.close()
    assert [float(found[n][0].metrics["letters"][0]) for n in numbers] == [5, 11, 5]


class Unbuilt(Troubled):
    """Cannot be built at a worker."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError("not with me")


def test_what_fails_as_a_worker_starts_ends_the_run_at_once() -> None:
    with pytest.raises(RunFailed, match=r"a worker cannot start: .*not with me"):
        troubled(on_ray(1), client={"name": f"{__name__}:Unbuilt"}).grid()


@pytest.mark.usefixtures("warm")
def test_blocks_follow_from_the_memory_of_the_smallest_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = 2 * 4 * GATHER_FLOATS  # which leaves room for one client, tried all the same
    monkeypatch.setattr(ray_cohorts, "least_memory", lambda places, gpus: memory)
    here = scenario("mlp", STRATEGIES["FedAvg"], {"chunk": None})
    there = scenario("mlp", STRATEGIES["FedAvg"], on_ray(2, chunk=None))
    expected, _ = finish(replace(here, execution=replace(here.execution, memory=memory)))
    grid = there.grid()
    try:
        loop = RoundLoop(there.strategy, grid, there.arrays, there.loop_config(), Memory())
        assert same_bits(loop.run().arrays, expected.arrays)
        facts = grid.record()
    finally:
        grid.close()
    assert facts["memory"] == memory
    assert facts["lane_bytes"]["train"] > 0
    assert facts["blocks"]["train"] == [1] * 7


def test_a_later_run_that_the_cluster_cannot_take_is_refused_before_the_first(
    tmp_path: Path,
) -> None:
    plain = troubled(on_ray(1), rounds=1).scenario.resolved()
    plain |= {"seeds": [0], "grid": {"engine.workers": [1, CPUS + 1]}}
    with pytest.raises(UserError, match=rf"workers.*{CPUS + 1}.*: .*has room for {CPUS}"):
        run_all(Scenario.from_dict(plain), out=tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("*/run.json"))


@pytest.mark.usefixtures("warm")
def test_the_dashboard_is_linked_as_a_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = {"dashboard": "http://127.0.0.1:8265", "metrics": ["http://127.0.0.1:1/metrics"]}
    monkeypatch.setattr(ray_cohorts, "links", lambda: pages)
    seen: list[Any] = []
    ends = RunWriter.end_round

    def end_round(self: RunWriter, round: int) -> None:
        seen.append(json.loads((self.path / "engine.json").read_text()))
        ends(self, round)

    monkeypatch.setattr(RunWriter, "end_round", end_round)
    plain = troubled(on_ray(1), rounds=1).scenario.resolved()
    said = io.StringIO()
    run_all(
        Scenario.from_dict(plain), out=tmp_path, quiet=False, console=Console(file=said, width=200)
    )
    assert "toy: Ray's dashboard is at http://127.0.0.1:8265" in said.getvalue()
    assert {key: seen[0][key] for key in pages} == pages
