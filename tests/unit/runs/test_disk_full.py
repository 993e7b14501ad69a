"""No room left: a sentence that names the path, nothing half written, and the run goes on later."""

import errno
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from fedsim.errors import RunFailed, UserError
from fedsim.runs import RunStore, RunWriter, checkpoint, draws, files, lines, writer
from tests.unit.runs.helpers import Spec, query
from tests.unit.runs.walk import create, train


class Disk:
    """Lets so many bytes through, then says ENOSPC, after half of the last piece has arrived."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, descriptor: int, data: memoryview | bytes) -> int:
        if len(data) <= self.room:
            self.room -= len(data)
            return os.write(descriptor, data)
        if self.room:
            written = os.write(descriptor, bytes(data)[: self.room])
            self.room = 0
            return written
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def disk(monkeypatch) -> Disk:
    found = Disk(2**40)
    monkeypatch.setattr(files, "write_some", found.write)
    monkeypatch.setattr(lines, "write_some", found.write)
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.0)
    return found


def test_atomic_files_keep_the_old_content(tmp_path, disk):
    path = tmp_path / "summary.json"
    files.write_bytes(path, b"old content")
    disk.room = 5
    with pytest.raises(RunFailed, match=f"the disk is full: cannot write {path}"):
        files.write_bytes(path, b"new content")
    assert path.read_bytes() == b"old content"
    assert [each.name for each in tmp_path.iterdir()] == ["summary.json"]


def test_lines_are_never_torn_and_wait_for_room(tmp_path, disk):
    file = lines.LinesFile(tmp_path / "metrics.jsonl")
    file.append('{"round": 1}')
    file.flush()
    disk.room = 7
    file.append('{"round": 2}')
    with pytest.raises(RunFailed, match=r"disk is full: cannot write .*metrics\.jsonl"):
        file.flush()
    assert file.path.read_text() == '{"round": 1}\n'
    disk.room = 100
    file.flush()
    assert file.path.read_text() == '{"round": 1}\n{"round": 2}\n'
    file.close()


def test_a_checkpoint_without_room_leaves_the_one_before(tmp_path, disk):
    checkpoint.save(tmp_path, 1, {"x": torch.arange(100.0)}, {})
    for room in (0, 10, 300, 600):
        disk.room = room
        with pytest.raises(RunFailed, match=r"disk is full: cannot write .*round-000002"):
            checkpoint.save(tmp_path, 2, {"x": torch.arange(100.0)}, {})
        assert [each.name for each in (tmp_path / "checkpoints").iterdir()] == ["round-000001"]
    assert checkpoint.newest(tmp_path, lambda *reason: None).round == 1


def test_draws_without_room_wait(tmp_path, disk):
    collected = draws.DrawWriter(tmp_path)
    collected.add(1, {"w": torch.ones(2, 3)})
    disk.room = 20
    with pytest.raises(RunFailed, match="disk is full"):
        collected.flush()
    disk.room = 10_000
    collected.flush()
    assert draws.read(tmp_path)["w"].shape == (2, 1, 3)


def test_full_at_any_byte_of_a_run_and_resumed(tmp_path, disk):
    rounds = 5
    plain = RunStore(tmp_path / "plain")
    run = create(plain, rounds)
    train(run, rounds)
    expected = plain.open(run.id)
    step = 997  # bytes; coprime to the sizes of what is written
    for room in range(0, 1_000_000, step):
        store = RunStore(tmp_path / str(room))
        disk.room = room
        started: list[RunWriter] = []
        try:
            started.append(create(store, rounds))
            with started[0] as run:
                train(run, rounds)
        except RunFailed as error:
            assert "the disk is full: cannot write" in str(error)  # noqa: PT017
        enough = disk.room > 0
        disk.room = 2**40
        if not started:
            assert list(store.root.glob("2*")) == [], "nothing is left of a run that never began"
            continue
        if store.open("latest").status != "finished":
            train(store.resume("latest"), rounds)
        run = store.open("latest")
        assert run.status == "finished"
        assert run.metrics.equals(expected.metrics)
        assert run.draws()["w"].tobytes() == expected.draws()["w"].tobytes()
        if enough:
            break
    assert room > 5 * step


def test_sqlite_without_room_says_so_and_rolls_back(store):
    run = store.create(Spec())
    pages = run._index.execute("PRAGMA page_count").fetchone()[0]
    run._index.execute(f"PRAGMA max_page_count = {pages + 2}")
    for round in range(500):
        run.log_metrics(round, "test", {"nll": 0.5})
    with pytest.raises(RunFailed, match=r"disk is full: cannot write .*fedsim\.sqlite"):
        run.flush()
    assert query(store.root, "SELECT count(*) FROM metrics") == [(0,)]
    run.close()
    with store.resume(run.id) as again:
        again.finish()
    assert len(store.open(run.id).metrics) == 500
    assert query(store.root, "SELECT count(*) FROM metrics") == [(500,)]
    assert query(store.root, "PRAGMA integrity_check") == [("ok",)]


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_really_full_disk(small_disk: Path, monkeypatch):
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.0)
    store = RunStore(small_disk)
    run = store.create(Spec())
    ballast = small_disk / "ballast"
    last = -1

    def fill() -> None:
        nonlocal last
        with run:
            for round in range(10_000):
                run.log_metrics(round, "test", {"nll": round / 7})
                run.save_checkpoint(round, {"x": torch.full((500,), float(round))}, {})
                last = round
                # Takes what it can get: the run must meet the full disk, not this line.
                with suppress(OSError), open(ballast, "ab", buffering=0) as file:
                    file.write(b"x" * 8000)

    with pytest.raises(RunFailed, match=f"cannot write {small_disk}"):
        fill()
    assert last > 0
    ballast.unlink()
    with store.resume(run.id) as again:
        round, tensors, _ = again.load_checkpoint()
        assert round == last
        assert torch.equal(tensors["x"], torch.full((500,), float(last)))
        again.truncate_after(round)
        again.finish()
    expected = [each / 7 for each in range(last + 1)]
    assert store.open(run.id).metrics["value"].tolist() == expected


def test_an_unwritable_folder_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"runs cannot be written to .*file/runs .*FEDSIM_RUNS"):
        RunStore(tmp_path / "file" / "runs").create(Spec())
