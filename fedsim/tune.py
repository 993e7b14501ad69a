"""Measures how a run's clients are computed fastest: path, chunk and threads.

Candidates run the scenario's own rounds in turn, so that a machine that slows down slows down all
of them; two are compared by the median of the ratios of their turns. The slower half is given up
again and again (successive halving), so that the time goes to those that are close.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import torch
from flwr.clientapp import ClientApp

from fedsim._flower import quiet as silence_flower
from fedsim.clients.base import DirectClient
from fedsim.errors import RunFailed, UserError
from fedsim.grids.execution import Path
from fedsim.server.loop import RoundLoop
from fedsim.server.recorder import Nowhere
from fedsim.setup import Setup, build_strategy, prepare

NOISE = 0.05
"""A smaller gain changes nothing."""

HOPELESS = 3.0
"""A path so many times slower than the other is not looked at further."""

MAX_CANDIDATES = 16
"""At once: each keeps traces and gathered rows."""

MAX_FLOATS = 2**27
"""Floats of parameters, gradients and the optimiser's state that a chunk may hold."""

FIRST_TURNS = 3
"""Turns before the first half is given up; the next stage has twice as many, and so on."""

MAX_TURNS = 60
TURN_SECONDS = 0.05
"""A turn has as many rounds as take this long, and at least one."""

Told = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """One way to compute. chunk: clients in one mapped call; 0 for the engine's own choice."""

    path: Path
    chunk: int
    threads: int

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        if self.path == "one_by_one":
            return f"one_by_one, {threads}"
        return f"mapped, chunk {self.chunk or 'auto'}, {threads}"


@dataclass
class Measured:
    """A candidate's turns, in seconds a round; problem: why there are no more of them."""

    candidate: Candidate
    seconds: list[float] = field(default_factory=list)
    problem: str = ""

    @property
    def milliseconds(self) -> float:
        """Median of a round; NaN without a turn."""
        return 1000 * median(self.seconds) if self.seconds else math.nan

    def ratio(self, other: Measured) -> float:
        """Median ratio to the other's turns of the same numbers; NaN without a turn."""
        pairs = list(zip(self.seconds, other.seconds, strict=False))
        return median(a / b for a, b in pairs) if pairs else math.nan


@dataclass(frozen=True)
class Result:
    """What was measured of one run.

    automatic: what the engine does by itself. written: what the scenario says. best: what it should
    say, `written` if nothing is faster. block: clients of the largest block of the engine's own
    choice, 0 where it maps nothing.
    """

    automatic: Candidate
    written: Candidate
    best: Candidate
    measured: dict[Candidate, Measured]
    block: int


# What to try, and what wins


def candidates(
    automatic: Candidate, paths: Iterable[Path], block: int, cohort: int, largest: int
) -> list[Candidate]:
    """Returns what to measure, the nearest to the automatic choice first, at most MAX_CANDIDATES.

    paths: those to look at. block, cohort: clients of the engine's own largest block, and of a
    round; 0 if nothing is mapped. largest: clients that a chunk may hold.
    """
    chunks = {0: 0.0}
    for factor in (0.25, 0.5, 2, 4) if block else ():
        chunk = min(max(round(block * factor), 1), cohort, max(largest, 1))
        if chunk != block:
            chunks.setdefault(chunk, abs(math.log2(chunk / block)))
    found = []
    for threads in _ladder(automatic.threads):
        away = math.log2(automatic.threads / threads)
        for path in paths:
            sizes = chunks if path == "mapped" else {0: 0.0}
            found += [(away + far, Candidate(path, chunk, threads)) for chunk, far in sizes.items()]
    found.sort(key=lambda pair: pair[0])
    return [candidate for _, candidate in found[:MAX_CANDIDATES]]


def _ladder(largest: int) -> list[int]:
    """Returns 1, 2, 4, … and the largest."""
    return sorted({2**i for i in range(largest.bit_length())} | {largest})


def halving(
    turns: Mapping[Candidate, Callable[[], float]],
    keep: Sequence[Candidate],
    time_left: Callable[[], bool],
    told: Told = lambda words: None,
) -> dict[Candidate, Measured]:
    """Returns the turns of each candidate, most of them of the fastest.

    turns: run some rounds and return the seconds of one; what raises RunFailed is given up. keep:
    those that are not given up for being slow; the first that works is what others are compared
    with.
    """
    measured = {candidate: Measured(candidate) for candidate in turns}
    alive, stage, done = list(turns), FIRST_TURNS, 0
    while stage and len(alive) > 1:
        for number in range(stage):
            told(f"{len(alive)} candidates, turn {number + 1} of {stage}")
            for candidate in alive if number % 2 == 0 else alive[::-1]:
                if not time_left():
                    return measured
                _take_turn(measured[candidate], turns[candidate])
        done += stage
        stage = min(2 * stage, MAX_TURNS - done)
        alive = _better_half([c for c in alive if not measured[c].problem], keep, measured)
    return measured


def _take_turn(found: Measured, turn: Callable[[], float]) -> None:
    if not found.problem:
        try:
            found.seconds.append(turn())
        except RunFailed as error:
            found.problem = str(error)


def _better_half(
    working: Sequence[Candidate],
    keep: Sequence[Candidate],
    measured: Mapping[Candidate, Measured],
) -> list[Candidate]:
    kept = [c for c in keep if c in working]
    base = measured[(kept or working)[0]] if working else None
    others = [c for c in working if c not in kept]
    others.sort(key=lambda c: measured[c].ratio(base) if base else 0.0)
    return kept + others[: max(math.ceil(len(working) / 2) - len(kept), 1)]


def winner(measured: Mapping[Candidate, Measured], keep: Sequence[Candidate]) -> Candidate:
    """Returns the fastest candidate, but `keep[0]` if none beats it by more than the noise.

    If that one does not work, the next of `keep` stands for it, then any that does. A single turn
    is chance: who wins needs two, beside two of the other's.
    """
    working = [c for c in (*keep, *measured) if c in measured and not measured[c].problem]
    if not working:
        return keep[0]
    base = measured[working[0]]
    enough = [c for c in working if min(len(measured[c].seconds), len(base.seconds)) > 1]
    ratios = {c: measured[c].ratio(base) for c in enough}
    best = min(ratios, key=ratios.__getitem__, default=working[0])
    return best if ratios.get(best, 1.0) < 1 - NOISE else working[0]


# Measuring


def tune(setup: Setup, seconds: float, told: Told = lambda words: None) -> Result:
    """Measures the run's training rounds for about `seconds` and writes nothing.

    told: is given a line about what is measured next. Raises UserError if there is nothing to
    choose, RunFailed if the rounds fail however they are computed.
    """
    if isinstance(setup.client, ClientApp):
        raise UserError("a Flower ClientApp is called message by message: there is nothing to tune")
    if isinstance(setup.client, DirectClient):
        kind = type(setup.client).__name__
        raise UserError(
            f"client {kind} has no steps that could be mapped: there is nothing to tune"
        )
    silence_flower()
    threads, ends = torch.get_num_threads(), time.monotonic() + seconds
    race = _Race(setup, lambda: ends - time.monotonic(), told)
    try:
        return race.run()
    finally:
        race.close()
        torch.set_num_threads(threads)


class _Race:
    """The candidates of one run, and the time that is left for them (seconds)."""

    def __init__(self, setup: Setup, left: Callable[[], float], told: Told) -> None:
        self.setup, self.left, self.told = setup, left, told
        self.written = _candidate(setup)
        self.automatic = _candidate(automatic(setup))
        self.trials: dict[Candidate, Trial] = {}

    def run(self) -> Result:
        """Probes both paths, then lets the candidates of those that are worth it compete."""
        probes = {c: self._probe(c) for c in self._paths()}
        good = {c: m.milliseconds / 1000 for c, m in probes.items() if m.seconds}
        if not good:
            raise RunFailed(next(m.problem for m in probes.values() if m.problem))
        quickest = min(good, key=good.__getitem__)
        fastest = good[quickest]
        paths = [c.path for c, seconds in good.items() if seconds <= HOPELESS * fastest]
        blocks = next((b for c in good if (b := self.trials[c].blocks())), [])
        setup, block = self.setup, max(blocks, default=0)
        largest = MAX_FLOATS // (4 * setup.model.num_parameters * max(setup.chains, 1))
        found = candidates(self.automatic, paths, block, sum(blocks), largest)
        keep = list(dict.fromkeys((self.written, self.automatic)))
        # The round that traces, and a few more: what there is no time for is not begun.
        cost = self.trials[quickest].first + 4 * fastest
        affordable = max(int(self.left() / cost), len(keep))
        failed = {c for c, m in probes.items() if not m.seconds}
        wanted = [c for c in dict.fromkeys((*keep, *found)) if c not in failed]
        field = wanted[:affordable]
        rounds = max(int(TURN_SECONDS / fastest), 1)
        measured = halving(
            {c: self._turns(c, rounds) for c in field}, keep, lambda: self.left() > 0, self.told
        )
        measured |= {c: Measured(c) for c in wanted[affordable:]}
        for candidate, probe in probes.items():
            if candidate not in measured or not measured[candidate].seconds:
                measured[candidate] = probe
        return Result(self.automatic, self.written, winner(measured, keep), measured, block)

    def close(self) -> None:
        """Ends the trials' threads."""
        for trial in self.trials.values():
            trial.close()

    def _paths(self) -> list[Candidate]:
        """Returns the automatic choice and, if there is another path, that one."""
        if isinstance(self.setup.client, DirectClient):
            return [self.automatic]
        other: Path = "mapped" if self.automatic.path == "one_by_one" else "one_by_one"
        return [self.automatic, Candidate(other, 0, self.automatic.threads)]

    def _probe(self, candidate: Candidate) -> Measured:
        measured = Measured(candidate)
        if self.trials and self.left() <= 0:
            measured.problem = "no time"
        else:
            self.told(f"probing {candidate}")
            _take_turn(measured, self._turns(candidate, 1))
        return measured

    def _turns(self, candidate: Candidate, rounds: int) -> Callable[[], float]:
        def turn() -> float:
            if candidate not in self.trials:
                self.trials[candidate] = Trial(self.setup, candidate)
                self.trials[candidate].begin()
            return median(self.trials[candidate].advance(rounds))

        return turn


class Trial:
    """A run that computes as a candidate says: training alone, and nothing is kept."""

    def __init__(self, setup: Setup, candidate: Candidate) -> None:
        execution = replace(
            setup.execution,
            path=candidate.path,
            chunk=candidate.chunk,
            threads=candidate.threads,
        )
        # A strategy has a state; trials must not share it.
        strategy = build_strategy(setup.scenario.strategy)
        self._grid = replace(setup, execution=execution, strategy=strategy).grid()
        config = replace(
            setup.loop_config(),
            rounds=0,
            server_every=0,
            clients_every=0,
            stopping=None,
            checkpoint_rounds=0,
            checkpoint_seconds=None,
            save_draws=False,
        )
        self.first = 0.0
        self._seconds: list[float] = []
        self._loop = RoundLoop(
            strategy, self._grid, setup.arrays, config, Nowhere(), on_round=self._note
        )

    def _note(self, round: int, metrics: Mapping[str, float], system: Mapping[str, float]) -> None:
        self._seconds.append(system["seconds"])

    def begin(self) -> None:
        """Runs the first round, which traces and gathers; `first` keeps its seconds."""
        (self.first,) = self.advance(1)

    def advance(self, rounds: int) -> list[float]:
        """Runs so many more rounds; returns the seconds of each."""
        self._seconds = []
        self._loop.config = replace(self._loop.config, rounds=self._loop.state.round + rounds)
        self._loop.run()
        return self._seconds

    def blocks(self) -> list[int]:
        """Returns the clients of each block of a round, [] if nothing was mapped."""
        blocks: dict[str, list[int]] = self._grid.record().get("blocks", {})
        return max(blocks.values(), key=max, default=[])

    def close(self) -> None:
        """Ends its threads."""
        self._grid.close()


def automatic(setup: Setup) -> Setup:
    """Returns the setup as the engine chooses by itself, whatever the scenario says."""
    engine = setup.scenario.engine.model_copy(
        update={"path": "auto", "chunk": None, "threads": None}
    )
    return prepare(setup.scenario.model_copy(update={"engine": engine}))


def _candidate(setup: Setup) -> Candidate:
    execution = setup.execution
    chunk = execution.chunk if execution.path == "mapped" else 0
    return Candidate(execution.path, chunk, execution.threads)
