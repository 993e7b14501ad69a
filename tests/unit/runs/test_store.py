"""Creating, finding, listing and rebuilding runs."""

import json
import os
import shutil
import sqlite3
from dataclasses import dataclass
from typing import Any

import pytest

from fedsim.errors import RunFailed, UserError
from fedsim.runs import DIED, RunStore, database
from tests.unit.runs.helpers import Scenario, Spec, indexed_metrics, query


def finished(store, seed=0, name="Two moons", value=0.5):
    with store.create(Spec(seed=seed, scenario=Scenario(name=name))) as writer:
        writer.log_metrics(1, "test", {"accuracy": value / 2})
        writer.log_metrics(2, "test", {"accuracy": value})
        writer.log_metrics(2, "train", {"loss": 1.0})
        writer.finish()
    return writer.id


def test_ids_are_readable_and_never_collide(store):
    ids = [finished(store, seed=3) for _ in range(3)]
    assert len(set(ids)) == 3
    date, clock, name = ids[0].split("-", 2)
    assert (len(date), len(clock), name) == (8, 6, "two-moons-fedavg-s3")
    same_second = [each for each in ids[1:] if each.startswith(ids[0])]
    assert [each.removeprefix(ids[0]) for each in same_second] in ([], ["-2"], ["-2", "-3"])


def test_a_name_becomes_a_safe_folder(store):
    run = store.create(Spec(group="", scenario=Scenario(name="../Ünïcode / * " + "x" * 200)))
    run.finish()
    assert run.path.parent == store.root
    assert len(run.id) < 80
    assert set(run.id) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_list_shows_status_rounds_and_the_newest_metrics(store):
    first = finished(store, seed=1, value=0.75)
    with store.create(Spec(seed=2, settings={"lr": 0.1})) as writer:
        writer.finish("interrupted")
    died = store.create(Spec(seed=3))
    died.close()
    going = store.create(Spec(seed=4))
    frame = store.list().set_index("id")
    assert frame.index.tolist() == [first, writer.id, died.id, going.id]
    assert frame["status"].tolist() == ["finished", "interrupted", DIED, "running"]
    assert frame["last_round"].tolist() == [2, -1, -1, -1]
    assert frame["seed"].tolist() == [1, 2, 3, 4]
    assert frame["rounds"].tolist() == [10] * 4
    assert frame.loc[first, "scenario"] == "Two moons"
    assert frame.loc[first, "test.accuracy"] == 0.75
    assert "train.loss" not in frame
    assert frame["started"].is_monotonic_increasing
    assert 0 < frame.loc[first, "seconds"] < 60
    going.finish("failed")
    assert store.list()["status"].tolist()[-1] == "failed"


@dataclass(frozen=True)
class App(Scenario):
    """A Flower app, as its run is stored."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        return {**super().model_dump(mode=mode), "app": {"name": "mine"}}


def test_an_app_that_died_is_not_called_resumable(store):
    died = store.create(Spec(scenario=App()))
    died.close()
    assert store.list()["status"].tolist() == [store.open(died.id).status] == ["died"]


def test_an_empty_or_absent_folder_lists_nothing_and_is_not_made(store):
    frame = store.list()
    assert len(frame) == 0
    assert {"id", "status", "seed", "started", "seconds"} <= set(frame.columns)
    assert not store.root.exists()
    with pytest.raises(UserError, match="there are no runs in"):
        store.find("latest")


def test_find_by_prefix_latest_and_close_matches(store):
    first = finished(store, name="alpha")
    second = finished(store, name="beta")
    assert store.find(first) == first
    assert store.find(second[: len(second) - 3]) == second
    assert store.find("latest") == second
    with pytest.raises(UserError, match=r"is the beginning of 2 runs: .*alpha.*, .*beta"):
        store.find("2")
    with pytest.raises(UserError, match=rf"no run 'alpha' in .*; close: {first}$"):
        store.find("alpha")
    with pytest.raises(UserError, match=f"close: {first}"):
        store.find(first.replace("alpha", "alhpa"))
    with pytest.raises(UserError, match=r"no run '' in [^;]*$"):
        store.find("")


def test_the_root_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDSIM_RUNS", str(tmp_path / "there"))
    assert RunStore().root == tmp_path / "there"
    monkeypatch.delenv("FEDSIM_RUNS")
    assert str(RunStore().root) == "runs"


def test_a_finished_run_is_not_resumed(store):
    with pytest.raises(UserError, match="is finished: there is nothing to resume"):
        store.resume(finished(store))


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "interrupted"), (RuntimeError("boom"), "failed")]
)
def test_an_exception_marks_the_run_and_lets_it_go(store, error, status):
    with pytest.raises(type(error)), store.create(Spec()) as writer:
        raise error
    run = store.open(writer.id)
    assert (run.status, run.summary["status"]) == (status, status)
    with store.resume(writer.id) as again:
        assert store.open(writer.id).status == "running"
        again.truncate_after(-1)
        assert store.open(writer.id).summary == {}
        again.finish()
    assert store.open(writer.id).status == "finished"


def test_a_deleted_index_is_built_again(store):
    ids = [finished(store, seed=seed, value=seed / 7) for seed in range(3)]
    before, rows = store.list(), indexed_metrics(store.root, ids[2])
    for path in store.root.glob("fedsim.sqlite*"):
        path.unlink()
    assert store.list().equals(before)
    assert indexed_metrics(store.root, ids[2]) == rows
    assert store.rebuild() == 3
    assert store.list().equals(before)


def test_runs_copied_in_and_deleted_are_noticed(store, tmp_path):
    other = RunStore(tmp_path / "other")
    moved = finished(other, seed=9)
    here = finished(store, seed=1)
    shutil.copytree(other.root / moved, store.root / moved)
    assert set(store.list()["id"]) == {here, moved}
    shutil.rmtree(store.root / here)
    assert store.list()["id"].tolist() == [moved]
    assert indexed_metrics(store.root, here) == set()


def test_one_damaged_run_does_not_hide_the_others(store):
    bad, good = finished(store, seed=1), finished(store, seed=2)
    (store.root / bad / "run.json").write_text("{")
    (store.root / "fedsim.sqlite").unlink()
    with pytest.warns(RuntimeWarning, match=r"run\.json is damaged"):
        assert store.list()["id"].tolist() == [good]
    assert store.find("latest") == good
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        store.open(bad)


def test_a_read_only_folder_can_be_listed(store, monkeypatch):
    run_id = finished(store)
    (store.root / "fedsim.sqlite").unlink()
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    assert store.list()["id"].tolist() == [run_id]
    assert not (store.root / "fedsim.sqlite").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("UPDATE schema_version SET version = 99", "newer fedsim .*schema version 99"),
        ("UPDATE schema_version SET version = 0", "older fedsim .*schema version 0"),
        ("DROP TABLE schema_version", "older fedsim .*schema version 0"),
    ],
)
def test_another_schema_version_is_refused_before_anything_is_written(store, change, words):
    finished(store)
    connection = sqlite3.connect(store.root / "fedsim.sqlite")
    connection.execute(change)
    connection.commit()
    connection.close()
    before = sorted(store.root.iterdir())
    for call in (lambda: store.create(Spec()), store.list):
        with pytest.raises(UserError, match=words):
            call()
    assert sorted(store.root.iterdir()) == before


def test_a_file_that_is_no_database_is_refused_in_a_sentence(store):
    store.root.mkdir()
    (store.root / "fedsim.sqlite").write_bytes(b"hello" * 1000)
    with pytest.raises(UserError, match=r"fedsim\.sqlite is damaged .*delete it"):
        store.create(Spec())


def test_a_newer_run_format_is_refused(store):
    run_id = finished(store)
    path = store.root / run_id / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2, "new_field": 1}))
    with pytest.raises(UserError, match=r"newer fedsim .*upgrade"):
        store.open(run_id)


def test_an_index_locked_by_others_does_not_stop_a_run(store, monkeypatch):
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    writer = store.create(Spec())
    other = sqlite3.connect(store.root / "fedsim.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    writer.log_metrics(1, "test", {"nll": 0.5})
    writer.save_checkpoint(1, {}, {})
    with pytest.warns(RuntimeWarning, match=r"is locked by another process.*rebuild"):
        writer.finish()
    with pytest.raises(RunFailed, match="has been locked by another process"):
        store.rebuild()
    other.execute("ROLLBACK")
    other.close()
    assert store.open(writer.id).metrics["value"].tolist() == [0.5]
    assert store.list()["status"].tolist() == ["finished"]
    assert indexed_metrics(store.root, writer.id) == {(1, "test", "nll", 0.5)}


def test_without_wal_it_warns_and_works(store, monkeypatch):
    real = sqlite3.connect

    class NoWal(sqlite3.Connection):
        def execute(self, sql, *rest):
            return super().execute(sql.replace("journal_mode=WAL", "journal_mode=DELETE"), *rest)

    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: real(*a, **k, factory=NoWal))
    with pytest.warns(RuntimeWarning, match="without SQLite's write-ahead log"):
        run_id = finished(store)
    monkeypatch.undo()
    assert query(store.root, "PRAGMA journal_mode") == [("delete",)]
    assert len(indexed_metrics(store.root, run_id)) == 3


def test_a_change_of_environment_is_noted_on_resume(store):
    writer = store.create(Spec())
    writer.close()
    path = writer.path / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cpu_capability": "ANCIENT"}))
    with store.resume(writer.id) as again:
        again.finish()
    event = store.open(writer.id).events.set_index("kind").loc["resumed"]
    assert list(event["changed"]) == ["cpu_capability"]
    assert event["changed"]["cpu_capability"][0] == "ANCIENT"
