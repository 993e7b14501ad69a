"""The pool of workers over a made-up Ray: who is given up when, and who is blamed for deaths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsim.errors import RunFailed
from fedsim.grids import connection, pool
from fedsim.grids.pool import Late, Pool
from fedsim.scenario.sections import EngineParams

ray = pytest.importorskip("ray")


class Remote:
    """A method of an actor."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call


class Cluster:
    """Ray with a clock of its own: workers take their calls in order.

    A call takes seconds and ends in the first of its outcomes, which a worker that comes to it
    uses up: an Exception is raised, and "dies" kills the worker. starts:
    seconds that each further worker takes until it is ready.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, starts: float = 0.0) -> None:
        self.now, self.starts = 0.0, starts
        self.alive: list[Any] = []
        self.made: list[Any] = []
        self.done: dict[Any, tuple[float, Any]] = {}
        for name in ("wait", "get", "kill", "cluster_resources", "nodes"):
            monkeypatch.setattr(ray, name, getattr(self, name))
        monkeypatch.setattr(pool.time, "monotonic", lambda: self.now)

    def make(self) -> Any:
        cluster = self

        class Handle:
            def __init__(self) -> None:
                self.free = cluster.now + (cluster.starts if cluster.made else 0.0)
                self.dead: float | None = None
                self.calls: list[Any] = []
                self.place = Remote(lambda: cluster.put(self.free, "place"))
                self.work = Remote(self.take)

            def take(self, seconds: float, outcomes: list[Any]) -> object:
                gone = ray.exceptions.ActorDiedError()
                if self.dead is not None:
                    return self.kept(cluster.put(self.dead, gone))
                self.free = max(self.free, cluster.now) + seconds
                outcome = outcomes.pop(0) if len(outcomes) > 1 else outcomes[0]
                if outcome == "dies":
                    self.dead, outcome = self.free, gone
                return self.kept(cluster.put(self.free, outcome))

            def kept(self, reference: object) -> object:
                self.calls.append(reference)
                return reference

        handle = Handle()
        self.made.append(handle)
        self.alive.append(handle)
        return handle

    def put(self, when: float, outcome: Any) -> object:
        reference = object()
        self.done[reference] = when, outcome
        return reference

    def wait(self, references: list[Any], num_returns: int, timeout: float | None) -> Any:
        first = min(self.done[each][0] for each in references)
        self.now = max(self.now, min(first, self.now + (1e9 if timeout is None else timeout)))
        ready = [each for each in references if self.done[each][0] <= self.now][:num_returns]
        return ready, [each for each in references if each not in ready]

    def get(self, reference: Any) -> Any:
        _, outcome = self.done[reference]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def kill(self, handle: Any) -> None:
        if handle in self.alive:
            self.alive.remove(handle)
        for reference in handle.calls:
            if self.done[reference][0] > self.now:
                self.done[reference] = self.now, ray.exceptions.ActorDiedError()

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 6.0}

    def nodes(self) -> list[dict[str, Any]]:
        node = {"Alive": True, "Resources": {"CPU": 3.0}}
        return [node, node, {"Alive": False, "Resources": {"CPU": 3.0}}]


def call(seconds: float, *outcomes: Any) -> pool.Call:
    """Returns a call that ends in the outcomes, one try after the other; the last one stays."""
    left = list(outcomes)
    return lambda handle: handle.work.remote(seconds, left)


def test_a_call_has_all_its_time_on_another_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Pool(Cluster(monkeypatch, starts=8.0).make, 1)
    assert made.run([call(6.0, "dies", "done")], 10.0) == ["done"]
    assert made.lost == 1


def test_a_call_has_all_its_time_after_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Pool(Cluster(monkeypatch).make, 1)
    assert made.run([call(6.0, i) for i in range(5)], 10.0) == [0, 1, 2, 3, 4]


def test_what_hangs_is_given_up_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Pool(Cluster(monkeypatch).make, 1)
    outs = made.run([call(1e6, "never") if i < 7 else call(6.0, i) for i in range(9)], 10.0)
    assert all(isinstance(out, Late) for out in outs[:7])
    assert outs[7:] == [7, 8]
    assert made.lost == 7


def test_who_waits_behind_the_deadly_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Pool(Cluster(monkeypatch).make, 1)
    deadly = [call(1.0, "dies", "dies", "done") for _ in range(4)]
    assert made.run([*deadly, call(1.0, "mine")]) == ["done"] * 4 + ["mine"]
    with pytest.raises(RunFailed, match="5 workers died one after the other over the same clients"):
        made.run([call(1.0, "dies"), call(1.0, "mine")])


def test_a_worker_that_ray_kills_for_its_memory_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Pool(Cluster(monkeypatch).make, 2)
    assert made.run([call(1.0, ray.exceptions.OutOfMemoryError("task"), "done")]) == ["done"]


def test_a_store_that_is_full_for_a_call_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Pool(Cluster(monkeypatch).make, 1)

    def full(handle: Any) -> Any:
        raise ray.exceptions.ObjectStoreFullError("1 GB")

    with pytest.raises(RunFailed, match="object store is full; give it more"):
        made.run([full])


def test_a_pool_that_cannot_start_leaves_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, starts=1e6)
    cluster.made.append(None)  # so that the first one takes as long
    with pytest.raises(RunFailed, match="no worker was ready within 120 s"):
        Pool(cluster.make, 2)
    assert cluster.alive == []


def test_only_what_a_constructor_raises_ends_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the error's text says, that of the user's node in this case."""
    cluster = Cluster(monkeypatch)
    lost = ray.exceptions.ActorDiedError()
    lost.error_msg = "node creation-task-7 died while the actor's creation task ran"
    made = cluster.put

    def put(when: float, outcome: Any) -> object:
        first = outcome == "place" and len(cluster.done) == 0
        return made(when, lost if first else outcome)

    monkeypatch.setattr(cluster, "put", put)
    assert Pool(cluster.make, 1).lost == 1

    error = ray.exceptions.ActorDiedError()
    error._actor_init_failed = True
    error.error_msg = "ValueError: no such model"
    monkeypatch.setattr(cluster, "put", lambda when, outcome: made(when, error))
    with pytest.raises(RunFailed, match="a worker cannot start: ValueError: no such model"):
        Pool(cluster.make, 1)


def test_workers_are_counted_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    Cluster(monkeypatch)
    assert connection.worker_count(EngineParams(name="ray", client_resources={"cpus": 2.0})) == 2  # type: ignore[arg-type]
    assert connection.worker_count(EngineParams(name="ray")) == 6


def test_packages_without_an_init_are_shipped_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for place in ("a", "b", "site-packages"):
        (tmp_path / place / "spaced_for_test").mkdir(parents=True)
        monkeypatch.syspath_prepend(str(tmp_path / place))
    (tmp_path / "a" / "spaced_for_test" / "mine.py").write_text("VALUE = 1\n")
    (tmp_path / "a" / "alone_for_test.py").write_text("VALUE = 1\n")
    modules = ["spaced_for_test.mine", "alone_for_test", "numpy", "__main__", "sys", "not.there"]
    own, *others = connection.shipped(modules)["py_modules"]
    assert Path(own).name == "fedsim"
    expected = ["a/spaced_for_test", "b/spaced_for_test", "a/alone_for_test.py"]
    assert sorted(others) == sorted(str(tmp_path / place) for place in expected)


def test_the_cluster_s_pages_are_linked(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"Alive": True, "NodeManagerAddress": "10.0.0.1", "MetricsExportPort": 8080},
        {"Alive": True, "NodeManagerAddress": "10.0.0.2", "MetricsExportPort": -1},
        {"Alive": False, "NodeManagerAddress": "10.0.0.3", "MetricsExportPort": 8080},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    for dashboard, found in (
        ("", {}),
        (
            "http://127.0.0.1:8265",
            {"dashboard": "http://127.0.0.1:8265", "metrics": ["http://10.0.0.1:8080/metrics"]},
        ),
    ):
        found_it = connection._Connection((), "here", dashboard, frozenset())
        monkeypatch.setattr(connection, "_connection", found_it)
        assert connection.links() == found


def test_there_are_more_workers_where_nodes_join(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, room = Cluster(monkeypatch, starts=3.0), [1]
    made = Pool(cluster.make, 1, lambda: room[0])
    assert made.run([call(1.0, i) for i in range(4)]) == [0, 1, 2, 3]
    assert len(made) == 1
    room[0] = 3
    cluster.now += pool.LOOK_AGAIN
    began = cluster.now
    assert made.run([call(1.0, i) for i in range(4)]) == [0, 1, 2, 3]
    assert cluster.now == began + 4  # nobody waits for those that start
    assert len(made) == 3
    began = cluster.now
    assert made.run([call(1.0, i) for i in range(4)]) == [0, 1, 2, 3]
    assert cluster.now <= began + 2
    room[0] = 1  # a node that is lost takes its workers with it; their places stay
    cluster.now += pool.LOOK_AGAIN
    made.run([call(1.0, 0)])
    assert len(made) == 3


def test_a_worker_whose_replies_have_no_room_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Pool(Cluster(monkeypatch).make, 1)
    full = ray.exceptions.OutOfDiskError("no room")
    raised = ray.exceptions.RayTaskError("train", "Traceback", full).as_instanceof_cause()
    with pytest.raises(RunFailed, match="object store is full, and so is the disk"):
        made.run([call(1.0, raised)])


def test_a_ray_that_does_not_start_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[Any] = []

    def init(*arguments: Any, **settings: Any) -> Any:
        tries.append(settings)
        if len(tries) < 3 or settings["num_cpus"] == 1:
            raise Exception("The current node timed out during startup.")
        return "started"

    monkeypatch.setattr(ray, "init", init)
    assert connection._started_here(num_cpus=2) == "started"
    assert tries == [{"num_cpus": 2, "include_dashboard": False}] * 3
    with pytest.raises(RunFailed, match="Ray does not start on this machine: The current node"):
        connection._started_here(num_cpus=1)
    assert len(tries) == 6


def test_what_nobody_needs_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Pool(Cluster(monkeypatch).make, 4)
    made.ignore(made.submit(call(1e6, "never")))
    raised = ray.exceptions.RayTaskError("train", "Traceback", ValueError("late"))
    deadly, raising = made.submit(call(1.0, "dies")), made.submit(call(1.0, raised))
    done = made.submit(call(1.0, "done"))
    made.ignore(deadly)
    made.ignore(raising)
    assert made.run([call(1.0, i) for i in range(6)]) == [*range(6)]  # none behind the first
    found = made.done()
    assert found.keys() == {deadly, raising, done}
    assert found[done] == "done"
    assert all(isinstance(found[number], pool.Ignored) for number in (deadly, raising))
    assert made.lost == 1
    late = made.submit(call(1.0, "late"))
    assert made.run([call(1.0, "mine")]) == ["mine"]
    made.ignore(late)  # which has come
    assert isinstance(made.done()[late], pool.Ignored)
