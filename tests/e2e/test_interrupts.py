"""Ctrl-C and SIGTERM end the command within a second, and the run goes on later."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsim import RunStore
from tests.e2e.conftest import Command
from tests.e2e.scenarios import SMALL, write

ROOT = Path(__file__).parents[2]
# Seconds. The command takes less than one where nothing else runs; what it computes, minutes.
AT_ONCE = 10.0

# Thousands of rounds of work for two threads, with checkpoints every few.
LONG = """\
name: long
rounds: 100000
data: {name: digits, test_fraction: 0.2}
partition: {name: iid, clients: 20}
model: {name: mlp, hidden: [256, 256]}
task: classification
strategy: fedavg
client: {name: sgd, epochs: 5}
engine: {threads: 2, path: one_by_one}
checkpoint: {every_rounds: 1}
compare: {one: {}, two: {}}
"""

# Never ends its evaluation before the first round: the main thread is in one torch operation.
STUCK = SMALL.replace(
    "model: softmax",
    "model: {name: custom, factory: 'tests.e2e.models_for_tests:stuck'}",
).replace("rows: 300, test_fraction: 0.2", "test_fraction: 0.5")


def start(*arguments: str) -> subprocess.Popen[str]:
    """Starts the command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.command", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_running(process: subprocess.Popen[str], pattern: str, beside: Path = Path()) -> Path:
    """Waits for a file of a run, and for another file, and returns the run's folder."""
    end = time.monotonic() + 240
    while not (found := list(Path("runs").glob(pattern))) or not beside.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    return Path("runs") / found[0].relative_to("runs").parts[0]


def stop(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, float, str]:
    """Sends a signal; returns the exit status, the seconds it took, and standard error."""
    began = time.monotonic()
    process.send_signal(number)
    status = process.wait(60)
    return status, time.monotonic() - began, process.communicate()[1]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_ends_a_busy_run_at_once_and_it_goes_on_later(
    fedsim: Command, number: signal.Signals, status: int
) -> None:
    write(LONG)
    process = start("run", "scenario.yaml")
    folder = wait_until_running(process, "*/checkpoints/round-000002")
    found, seconds, err = stop(process, number)
    assert found == status, err
    assert seconds < AT_ONCE
    assert f"fedsim resume {folder.name}" in err
    assert "1 more run was not started" in err
    assert "Traceback" not in err
    run = RunStore().open(folder.name)
    assert run.status == "interrupted"
    (listed,) = json.loads(fedsim("runs", "--json").out)
    assert listed["status"] == "interrupted"
    reached = run.metrics["round"].max()
    # The scenario of the stored run is shortened, so that resuming it comes to an end.
    text = (folder / "scenario.yaml").read_text()
    (folder / "scenario.yaml").write_text(text.replace("rounds: 100000", f"rounds: {reached + 2}"))
    again = fedsim("resume", folder.name, "--no-report")
    assert again.status == 0, again.err
    assert f"round {reached + 2}/{reached + 2}" in again.err


def test_interrupt_ends_even_a_single_long_operation(fedsim: Command) -> None:
    write(STUCK)
    process = start("run", "scenario.yaml", "--out", "runs")
    folder = wait_until_running(process, "*/engine.json", Path("stuck"))
    status, seconds, err = stop(process, signal.SIGINT)
    assert status == 130, err
    assert seconds < AT_ONCE
    assert f"fedsim resume {folder.name} --out runs" in err
    assert RunStore().open(folder.name).status == "interrupted"


def wait_for_torch(pid: int) -> None:
    """Returns when the command imports torch: it listens to signals, and no run has begun."""
    maps = Path(f"/proc/{pid}/maps")
    if not maps.exists():  # not Linux
        time.sleep(0.8)
        return
    for _ in range(24000):
        if "libtorch" in maps.read_text():
            return
        time.sleep(0.005)
    raise AssertionError("the command never imported torch")


def test_interrupt_before_the_first_run_writes_nothing(fedsim: Command) -> None:
    write(SMALL)
    process = start("run", "scenario.yaml")
    wait_for_torch(process.pid)
    status, _, err = stop(process, signal.SIGINT)
    assert status == 130, err
    assert "Traceback" not in err
    assert not Path("runs").exists()


def test_output_that_nobody_reads_is_no_error(fedsim: Command) -> None:
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.command", "runs"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=written,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(written)
    assert done.returncode == 141
    assert done.stderr == ""


def test_closed_output_is_no_error(fedsim: Command) -> None:
    command = f"{shlex.quote(sys.executable)} -m tests.e2e.command"
    for words in ("list >&-", "--help >&- 2>&-", "--help <&- >&-"):  # list imports torch
        done = subprocess.run(
            f"{command} {words}",
            shell=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, ""), words


FORKING = """
import multiprocessing, os, signal, sys, time
from fedsim.cli.interrupt import GRACE, Interrupts, note
from pathlib import Path

def handlers(_):
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

with Interrupts():
    note(Path("runs"), waiting=3)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(handlers, range(2))
    # the pool's end has terminated both workers
    time.sleep(3 * GRACE)
assert found == [[signal.default_int_handler, signal.SIG_DFL]] * 2, found
print("done")
"""


def test_the_end_of_a_forked_worker_is_not_the_end_of_the_command(fedsim: Command) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKING],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
