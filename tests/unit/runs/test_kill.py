"""kill -9 at any moment: the resumed run equals an undisturbed one, to the bit."""

import os
import signal
import time

import numpy as np
import pytest

from fedsim.errors import UserError
from fedsim.runs import DIED, Run, RunStore, files, lines, writer
from tests.unit.runs.helpers import indexed_metrics, query
from tests.unit.runs.walk import create, exit_code, fork, train

DIED_AT_CALL = 77


@pytest.fixture(autouse=True)
def _commit_often(monkeypatch):
    """Lets kills also fall into commits."""
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.01)


def assert_same(run: Run, expected: Run) -> None:
    assert run.metrics.equals(expected.metrics)
    assert run.client_metrics.equals(expected.client_metrics)
    events, others = (
        each.events.query("kind == 'stepped'")[["round", "total"]].reset_index(drop=True)
        for each in (run, expected)
    )
    assert events.equals(others)
    np.testing.assert_array_equal(run.draw_rounds, expected.draw_rounds)
    np.testing.assert_array_equal(run.draws()["w"], expected.draws()["w"])
    np.testing.assert_array_equal(run.parameters()["weights"], expected.parameters()["weights"])
    rows = indexed_metrics(run.path.parent, run.id)
    assert rows == indexed_metrics(expected.path.parent, expected.id)
    assert len(rows) == len(expected.metrics)
    assert not list(run.path.rglob(".tmp-*"))


def wait_for_run(store: RunStore) -> str:
    deadline = time.monotonic() + 120
    while not store.ids():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return store.ids()[0]


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    assert exit_code(child) == -signal.SIGKILL


def test_killed_at_random_points_and_resumed(store, tmp_path):
    rounds, pause = 120, 0.02  # a busy machine kills late, but not two seconds late
    plain = RunStore(tmp_path / "plain")
    run = create(plain, rounds)
    train(run, rounds)
    expected = plain.open(run.id)
    assert expected.metrics["round"].nunique() == rounds

    child = fork(lambda: train(create(store, rounds), rounds, pause))
    run_id = wait_for_run(store)
    generator = np.random.default_rng(1)
    kills = 0
    for _ in range(8):
        time.sleep(generator.uniform(0.0, 0.15))
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            break
        if exit_code(child) == 0:
            break
        kills += 1
        assert store.open(run_id).status in (DIED, "finished")
        if store.open(run_id).status == "finished":
            break
        if kills < 8:
            child = fork(lambda: train(store.resume(run_id), rounds, pause))
    else:
        train(store.resume(run_id), rounds)
    assert kills >= 2, "the run is too short to be killed"
    assert store.list()["status"].tolist() == ["finished"]
    assert_same(store.open(run_id), expected)


@pytest.mark.parametrize("name", ["write_some", "replace", "rename", "fsync"])
def test_dead_at_every_single_system_call(tmp_path, name):
    """Dies at the 1st, 2nd, 3rd … write, rename or sync of a run, until none is left."""
    rounds = 5
    plain = RunStore(tmp_path / "plain")
    run = create(plain, rounds)
    train(run, rounds)
    expected = plain.open(run.id)
    for count in range(1, 200):
        store = RunStore(tmp_path / str(count))
        code = exit_code(fork(lambda: die_at(store, rounds, name, count)))  # noqa: B023
        assert code in (0, DIED_AT_CALL)
        if not store.ids():  # it died before there was a run: nothing to resume
            continue
        run_id = store.ids()[0]
        if store.open(run_id).status == DIED:
            train(store.resume(run_id), rounds)
        assert store.list()["status"].tolist() == ["finished"]
        assert_same(store.open(run_id), expected)
        if code == 0:
            assert count > 3, "no call was ever hit"
            return
    pytest.fail("it never ran to its end")


def die_at(store: RunStore, rounds: int, name: str, count: int) -> None:
    """Runs until the `count`-th call of `name`, which ends the process halfway through."""
    writer.COMMIT_SECONDS = 0.0
    module = files if name == "write_some" else os
    real = getattr(module, name)
    calls = 0

    def deadly(*arguments):
        nonlocal calls
        calls += 1
        if calls == count:
            if name == "write_some":  # half of the bytes arrive
                os.write(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            os._exit(DIED_AT_CALL)
        return real(*arguments)

    setattr(module, name, deadly)
    if name == "write_some":
        lines.write_some = deadly
    train(create(store, rounds), rounds)


def test_two_processes_cannot_write_the_same_run(store):
    child = fork(lambda: train(create(store, 100_000), 100_000))
    run_id = wait_for_run(store)
    try:
        assert store.open(run_id).status == "running"
        with pytest.raises(UserError, match=f"written by process {child} on "):
            store.resume(run_id)
    finally:
        kill(child)
    with store.resume(run_id) as held, pytest.raises(UserError, match="being written"):
        store.resume(held.id)


def test_processes_write_at_once(store):
    children = [fork(lambda: train(create(store, 60), 60)) for _ in range(3)]
    assert [exit_code(child) for child in children] == [0, 0, 0]
    ids = store.ids()
    assert len(ids) == 3
    for run_id in ids:
        assert_same(store.open(run_id), store.open(ids[0]))
        assert len(indexed_metrics(store.root, run_id)) == 120
    assert query(store.root, "PRAGMA journal_mode") == [("wal",)]
