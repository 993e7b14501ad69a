"""The harness: turns, results that must agree, asked ratios, sides in processes of their own."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from tests.benchmarks import processes
from tests.benchmarks.harness import DisagreementError, Entry, Timing, measure
from tests.benchmarks.loops import EchoLoop, SequentialLoop
from tests.benchmarks.remote import Remote, SideError, child
from tests.benchmarks.report import summary, table
from tests.benchmarks.session import Session
from tests.benchmarks.sides import SAMPLERS, SIDES, Side
from tests.benchmarks.tables import TABLES, Report
from tests.benchmarks.workloads import WORKLOADS, Workload

SMALL_MLP = replace(WORKLOADS["W1"], clients=8, cohort=5, rounds=2, warm_up=4)
ECHO = WORKLOADS["W3-1k"]
AFTER_WARM_UP = 49.5 * ECHO.warm_up


def _entry(key: str, task: Workload, start: Callable[[], Session], rounds: int = 1) -> Entry:
    return Entry(key, key, task, start, rounds)


class _Idle(Session):
    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.advanced: list[int] = []

    def advance(self, rounds: int) -> None:
        self.advanced.append(rounds)

    def parameters(self) -> list[Tensor]:
        return [p.detach() for p in self.workload.model().parameters()]


def test_a_side_that_did_not_do_the_work_is_refused() -> None:
    entries = [
        _entry("loop", SMALL_MLP, lambda: SequentialLoop(SMALL_MLP)),
        _entry("idle", SMALL_MLP, lambda: _Idle(SMALL_MLP)),
    ]
    with pytest.raises(DisagreementError, match="idle is at"):
        measure(entries, repetitions=1)


def test_each_side_runs_its_own_number_of_rounds_after_the_common_warm_up() -> None:
    sessions = [_Idle(SMALL_MLP), _Idle(SMALL_MLP)]
    entries = [
        _entry("many", SMALL_MLP, lambda: sessions[0], rounds=3),
        _entry("one", SMALL_MLP, lambda: sessions[1]),
    ]
    timings = measure(entries, repetitions=2)
    assert [session.advanced for session in sessions] == [[4, 3, 3], [4, 1, 1]]
    assert [len(timing.seconds) for timing in timings] == [2, 2]


def test_sides_whose_tasks_differ_need_not_agree() -> None:
    other = replace(ECHO, name="other")
    small = replace(ECHO, cohort=4)
    entries = [
        _entry("all", ECHO, lambda: EchoLoop(ECHO)),
        _entry("few", other, lambda: EchoLoop(small)),
    ]
    results = [timing.result for timing in measure(entries, repetitions=1)]
    assert results == [[AFTER_WARM_UP], [1.5 * ECHO.warm_up]]


SIDES_OF_W1 = (
    Side("fedsim", "fedsim", ("W1",), SequentialLoop),
    Side("a", "one way", ("W1",), SequentialLoop, {"W1": 3}, group="peer"),
    Side("b", "another", ("W1",), SequentialLoop, {"W1": 3}, group="peer"),
    Side("c", "far off", ("W1",), SequentialLoop, {"W1": 100}),
    Side("d", "absent", ("W1",), SequentialLoop, {"W1": 2}),
)


def _timing(key: str, seconds: list[float]) -> Timing:
    name = next(side.name for side in SIDES_OF_W1 if side.key == key)
    return Timing(key, name, "W1", seconds, [1.0])


def test_ratios_are_medians_over_paired_repetitions() -> None:
    slow, fast = _timing("c", [2.0, 4.0, 90.0]), _timing("fedsim", [1.0, 1.0, 30.0])
    assert slow.ratio(fast) == 3.0
    assert slow.median == 4.0


def test_of_a_group_the_fastest_is_what_fedsim_is_held_to() -> None:
    timings = [
        _timing("fedsim", [0.1, 0.1]),
        _timing("a", [0.9, 0.9]),
        _timing("b", [0.4, 0.4]),
        _timing("c", [2.0, 2.0]),
    ]
    text, verdicts = table(WORKLOADS["W1"], timings, SIDES_OF_W1, ["somebody: elsewhere."])
    assert [(v.what, v.found, v.reached) for v in verdicts] == [
        ("another", "4.00×", True),
        ("far off", "20.00×", False),
        ("absent", "–", None),
    ]
    assert "| another | 400.00 | 400.00–400.00 | 4.00 | ≥ 3× | yes | 1.0000 |" in text
    assert "| one way | 900.00 | 900.00–900.00 | 9.00 |  |  | 1.0000 |" in text
    assert "| ≥ 100× | **no** |" in text
    assert text.endswith("Not compared: somebody: elsewhere.")
    assert "| W1 | absent | ≥ 2× | – | not measured |" in summary(verdicts)


def test_a_side_that_failed_has_no_times_and_the_others_keep_theirs() -> None:
    def fail() -> Session:
        raise SideError("no such luck")

    entries = [_entry("c", ECHO, fail), _entry("bare", ECHO, lambda: EchoLoop(ECHO))]
    failed, bare = measure(entries, repetitions=1)
    assert failed.failure == "no such luck"
    assert len(bare.seconds) == 1
    text, _ = table(ECHO, [failed, bare], SIDES_OF_W1)
    assert text.endswith("Not compared: c: it failed.")


def test_a_side_that_failed_leaves_the_table_over_cohorts_to_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timings = [
        _timing("fedsim", [0.1, 0.1]),
        replace(_timing("a", []), failure="no such luck"),
        _timing("c", [0.3, 0.3]),
    ]
    monkeypatch.setattr("tests.benchmarks.tables.measure", lambda entries, repetitions: timings)
    text = TABLES["cohort"](Report(repetitions=2, keys=("fedsim",)))
    assert text.splitlines()[-1] == "| 1,000 | 100.00 | failed | 300.00 (3.00×) |"


def test_a_side_in_another_process_computes_the_same_and_ends() -> None:
    remote, here = child("bare", ECHO), EchoLoop(ECHO)
    family = processes.tree(remote._process.pid)
    try:
        for session in (remote, here):
            session.advance(ECHO.warm_up)
        assert remote.result() == here.result() == [AFTER_WARM_UP]
        if sys.platform == "linux":
            assert 50 < (remote.peak_mb() or 0) < 5000
    finally:
        remote.close()
    assert processes.alive(family) == []


STUBBORN = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print('{"ready": true}', flush=True)
signal.pause()
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="descendants are known on Linux only")
def test_a_side_that_will_not_end_is_ended_with_its_descendants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.benchmarks.remote.GRACE", 0.1)
    monkeypatch.setattr("tests.benchmarks.processes.GRACE", 1.0)
    remote = Remote(ECHO, [sys.executable, "-c", STUBBORN])
    family = processes.tree(remote._process.pid)
    assert len(family) == 2
    remote.close()
    assert processes.alive(family) == []


@pytest.mark.parametrize(
    ("program", "reason"),
    [("raise SystemExit('out of luck')", "out of luck"), ("import time; time.sleep(60)", "0.5 s")],
)
def test_a_side_that_gives_no_answer_says_why(program: str, reason: str) -> None:
    with pytest.raises(SideError, match=reason):
        Remote(ECHO, [sys.executable, "-c", program], patience=0.5)


PRINTING = """
from tests.benchmarks.orders import Orders
orders, done = Orders(), 0
while orders.once_more(lambda: [float(done)]):
    done += 1
    print("no answer")
"""


def test_what_a_framework_prints_is_no_answer() -> None:
    remote = Remote(ECHO, [sys.executable, "-c", PRINTING])
    try:
        remote.advance(3)
        assert remote.result() == [3.0]
        remote.advance(2)
        assert remote.result() == [5.0]
    finally:
        remote.close()


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
def test_a_paused_side_stands_still_until_its_turn() -> None:
    remote = Remote(ECHO, [sys.executable, "-c", PRINTING], pause=True)
    try:
        remote.advance(1)
        stat = Path(f"/proc/{remote._process.pid}/stat")
        deadline = time.monotonic() + 5
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline
        remote.advance(1)
        assert remote.result() == [2.0]
    finally:
        os.kill(remote._process.pid, signal.SIGCONT)
        remote.close()


def test_every_workload_has_sides_and_every_side_a_workload() -> None:
    used = {name for side in SIDES for name in side.workloads}
    assert used == set(WORKLOADS)
    assert all(set(side.asked) <= set(side.workloads) for side in SIDES)
    assert {name for side in SAMPLERS for name in side.workloads} <= set(TABLES)


def test_peers_that_are_not_installed_are_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tests.benchmarks.sides.PEERS", tmp_path / "bin" / "python")
    monkeypatch.setattr("tests.benchmarks.sides.peer_versions", dict)
    report = Report(repetitions=1, keys=("pfl", "bmm"))
    sides, absent = report.sides(SIDES, "W1")
    assert [side.key for side in sides] == ["bmm"]
    assert absent == [f"pfl, 1 process: there is no {tmp_path.name}, which `make bench` creates."]
