"""What progress shows, where, and what it costs."""

import io
import math
import re
import time

import pytest
from rich.console import Console

from fedsim.runs import progress
from fedsim.runs.progress import Progress, bytes_text, time_text

SYSTEM = {"clients_per_second": 1234.6, "bytes_up": 1e6, "bytes_down": 5e5, "dropped": 1}


@pytest.fixture(autouse=True)
def _colours(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def plain_console() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=60), file


def test_plain_lines_say_everything_and_are_not_wrapped():
    console, file = plain_console()
    with Progress(10, "fa-hmc [seed 0]", console=console, run=3, runs=8) as shown:
        shown.update(1, {"test.accuracy": 0.912345, "test.nll": 0.25}, SYSTEM)
        shown.update(10, None, SYSTEM)
    first, last = file.getvalue().splitlines()
    assert first.startswith(
        "run 3/8 fa-hmc [seed 0]: round 1/10  test.accuracy 0.9123  test.nll 0.25  "
        "1,235 clients/s  1.5 MB  1 dropped  "
    )
    assert re.search(r"\d+:\d\d left$", first)
    assert "round 10/10  test.accuracy 0.9123" in last
    assert "3 MB  2 dropped" in last
    assert last.endswith("elapsed")


def test_plain_lines_are_rare_and_the_last_round_is_always_there(monkeypatch):
    console, file = plain_console()
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Progress(100, "x", console=console) as shown:
        for round in range(1, 100):
            now += 0.1
            shown.update(round)
    rounds = [int(found) for found in re.findall(r"round (\d+)/100", file.getvalue())]
    assert rounds == [1, 21, 41, 61, 81, 99]


def test_the_time_that_remains_counts_only_this_sitting(monkeypatch):
    console, file = plain_console()
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Progress(100, "x", console=console, start=90) as shown:
        now = 10.0
        shown.update(95)
    assert "0:10 left" in file.getvalue()


def test_an_interrupted_run_leaves_its_last_line():
    console, file = plain_console()

    def interrupted() -> None:
        with Progress(9, "x", console=console) as shown:
            shown.update(1)
            shown.update(2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "round 2/9" in file.getvalue().splitlines()[-1]


def test_chosen_metrics_only_and_nan_is_shown():
    console, file = plain_console()
    with Progress(1, "x", console=console, show=["b", "absent"]) as shown:
        shown.update(1, {"a": 1.0, "b": math.nan})
    assert "b nan" in file.getvalue()
    assert " a 1" not in file.getvalue()


def test_a_terminal_gets_a_live_line():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    with Progress(10, "fedavg", console=console) as shown:
        shown.update(5, {"test.accuracy": 0.5}, SYSTEM)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert "\x1b[" in file.getvalue()
    assert "round 5/10  test.accuracy 0.5  1,235 clients/s  1.5 MB  1 dropped" in text
    assert "━" in text


@pytest.mark.parametrize("way", ["NO_COLOR", "plain"])
def test_no_color_and_quiet_mean_plain_lines_also_in_a_terminal(monkeypatch, way):
    if way == "NO_COLOR":
        monkeypatch.setenv("NO_COLOR", "1")
    file = io.StringIO()
    console = Console(file=file, force_terminal=True)
    with Progress(10, "x", console=console, plain=way == "plain") as shown:
        shown.update(10)
    assert file.getvalue().startswith("x: round 10/10")
    assert "\x1b" not in file.getvalue()


def test_standard_output_stays_free(capfd):
    with Progress(1, "x") as shown:
        shown.update(1)
    out, err = capfd.readouterr()
    assert out == ""
    assert "x: round 1/1" in err


@pytest.mark.parametrize("steady", [True, False])
def test_what_remains_is_told_only_where_rounds_are_alike(steady):
    file = io.StringIO()
    with Progress(10, "x", console=Console(file=file), steady=steady) as shown:
        shown.update(5)
    assert (" left" in file.getvalue()) is steady
    assert (" elapsed" in file.getvalue()) is not steady


@pytest.mark.parametrize("terminal", [True, False])
def test_ten_thousand_rounds_cost_little(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal)
    metrics = {"test.accuracy": 0.5, "test.nll": 0.7}
    with Progress(10_000, "x", console=console) as shown:
        start = time.thread_time()  # whatever else the machine does
        for round in range(10_000):
            shown.update(round, metrics, SYSTEM)
        seconds = time.thread_time() - start
    assert seconds / 10_000 < 50e-6


def test_units():
    assert [bytes_text(count) for count in (0, 999, 1500, 2.5e9, 1e18)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.5 GB",
        "1e+03 PB",
    ]
    assert bytes_text(999_700) == "1 MB"
    assert [time_text(seconds) for seconds in (0, 59.6, 75, 3700)] == [
        "0:00",
        "1:00",
        "1:15",
        "1:01:40",
    ]
