"""Live progress of a run: a panel in a terminal, plain lines anywhere else."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 2.0  # between two plain lines, at least
LIVE_PER_SECOND = 4
MAX_METRICS = 4
_BAR = 24  # columns
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


class Progress:
    """Shows how far a run is; `update` is cheap enough to call after every round.

    A terminal gets a line that is redrawn; a file, a pipe, NO_COLOR or `plain=True` get one line
    at most every `PLAIN_SECONDS`, and the last.

    Args:
      total_rounds: how many rounds are planned, ≥ 1.
      title: the run's label.
      console: where to write; standard error by default, so that standard output stays free for
        results (`--json`).
      show: names of the metrics to show; by default the first `MAX_METRICS` that come.
      plain: True for plain lines also in a terminal (`--quiet`).
      run, runs: "run 3/8", when several runs follow one another.
      start: rounds that were complete before (a resumed run), for the time that remains.
      steady: False where rounds differ in length, or the run may end before the last: what remains
        cannot be told then.
    """

    def __init__(
        self,
        total_rounds: int,
        title: str,
        *,
        console: Console | None = None,
        show: Sequence[str] | None = None,
        plain: bool = False,
        run: int = 1,
        runs: int = 1,
        start: int = 0,
        steady: bool = True,
    ) -> None:
        self._total = total_rounds
        self._title = title if runs == 1 else f"run {run}/{runs} {title}"
        self._console = console or Console(stderr=True)
        self._show = show
        self._plain = plain or not self._console.is_terminal or bool(os.environ.get("NO_COLOR"))
        self._start = start
        self._steady = steady
        self._round = start
        self._metrics: Mapping[str, float] = {}
        self._clients_per_second: float | None = None
        self._bytes = 0.0
        self._dropped = 0
        self._late = 0
        self._faults = 0
        self._began = time.monotonic()
        self._shown_at = -math.inf
        self._shown_round = -1
        self._live: Live | None = None

    def plan(self, total_rounds: int) -> None:
        """Takes how many rounds are planned, where that was not known at the start."""
        self._total = total_rounds

    def update(
        self,
        round: int,
        metrics: Mapping[str, float] | None = None,
        system: Mapping[str, float] | None = None,
    ) -> None:
        """Takes the state after a round.

        Args:
          round: rounds that are complete.
          metrics: newest values by name; without it (a round without evaluation) the last stay.
          system: of this round: clients_per_second, bytes_up, bytes_down, dropped, late, faults_…
            (each optional).
        """
        self._round = round
        if metrics:
            self._metrics = metrics
        if system:
            self._clients_per_second = system.get("clients_per_second", self._clients_per_second)
            self._bytes += system.get("bytes_up", 0.0) + system.get("bytes_down", 0.0)
            self._dropped += int(system.get("dropped", 0))
            self._late += int(system.get("late", 0))
            self._faults += int(sum(v for k, v in system.items() if k.startswith("faults_")))
        # In a terminal the Live thread asks for the newest state by itself.
        if self._plain and time.monotonic() - self._shown_at >= PLAIN_SECONDS:
            self._print_line()

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if not self._plain:
            self._live = Live(
                console=self._console,
                get_renderable=self._row,
                refresh_per_second=LIVE_PER_SECOND,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._shown_round != self._round:
            self._print_line()

    def _print_line(self) -> None:
        self._shown_at = time.monotonic()
        self._shown_round = self._round
        line = f"{self._title}: {'  '.join(self._facts())}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _row(self) -> Table:
        row = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self._total, completed=self._round, width=_BAR)
        facts = Text("  ".join(self._facts()), overflow="ellipsis", no_wrap=True)
        row.add_row(Text(self._title, style="bold", no_wrap=True), bar, facts)
        return row

    def _facts(self) -> list[str]:
        facts = [f"round {self._round}/{self._total}"]
        names = list(self._metrics)[:MAX_METRICS] if self._show is None else self._show
        facts += [f"{name} {self._metrics[name]:.4g}" for name in names if name in self._metrics]
        if self._clients_per_second is not None:
            facts.append(f"{self._clients_per_second:,.0f} clients/s")
        if self._bytes:
            facts.append(bytes_text(self._bytes))
        if self._dropped:
            facts.append(f"{self._dropped} dropped")
        if self._late:
            facts.append(f"{self._late} late")
        if self._faults:
            facts.append(f"{self._faults} faults")
        facts.append(self._time())
        return facts

    def _time(self) -> str:
        elapsed = time.monotonic() - self._began
        done = self._round - self._start
        left = self._total - self._round
        if done <= 0 or left <= 0 or not self._steady:
            return f"{time_text(elapsed)} elapsed"
        return f"{time_text(elapsed / done * left)} left"


def bytes_text(count: float) -> str:
    """Returns a number of bytes with a decimal unit: 1500 → "1.5 kB"."""
    power = 0
    while count >= 999.5 and power + 1 < len(_UNITS):
        count /= 1000
        power += 1
    return f"{count:.3g} {_UNITS[power]}"


def time_text(seconds: float) -> str:
    """Returns a duration: 75 → "1:15", 3700 → "1:01:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
