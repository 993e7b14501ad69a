"""Watches Flower's strategies at work, without a change to the app that uses them.

`Strategy.start` has no callbacks. For the time of a run it, and every `start` that overrides it, is
wrapped: what a strategy aggregates and what the server evaluates is recorded round by round.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy

from fedsim.apps.record import Recorder

SERVER_SPLIT = "test"
"""Split of what an app's evaluate_fn returns."""

_HISTORIES = {
    "train_metrics_clientapp": "train",
    "evaluate_metrics_clientapp": "client",
    "evaluate_metrics_serverapp": SERVER_SPLIT,
}


@contextmanager
def watched(recorder: Recorder) -> Iterator[None]:
    """Tells `recorder` of every Strategy.start inside the block."""
    before = [(kind, vars(kind)["start"]) for kind in _kinds(Strategy) if "start" in vars(kind)]
    try:
        for kind, start in before:
            kind.start = _watch(start, recorder)
        yield
    finally:
        for kind, start in before:
            kind.start = start


def _kinds(kind: type[Any]) -> Iterator[type[Any]]:
    yield kind
    for derived in kind.__subclasses__():
        yield from _kinds(derived)


def _watch(start: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    signature = inspect.signature(start)

    @functools.wraps(start)
    def watched_start(self: Strategy, *args: Any, **kwargs: Any) -> Any:
        try:
            call = signature.bind(self, *args, **kwargs)
        except TypeError:
            return start(self, *args, **kwargs)  # raises what the app should see
        call.apply_defaults()
        if callable(evaluate := call.arguments.get("evaluate_fn")):
            call.arguments["evaluate_fn"] = _evaluating(evaluate, recorder)
        rounds = call.arguments.get("num_rounds")
        recorder.started(type(self).__name__, rounds if isinstance(rounds, int) else None)
        try:
            with _methods(self, recorder):
                result = start(*call.args, **call.kwargs)
            _take(result, recorder)
            return result
        finally:
            recorder.ended()

    return watched_start


def _evaluating(evaluate: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    @functools.wraps(evaluate)
    def watched_evaluate(server_round: int, *args: Any, **kwargs: Any) -> Any:
        metrics = evaluate(server_round, *args, **kwargs)
        recorder.aggregated(server_round, SERVER_SPLIT, metrics)
        return metrics

    return watched_evaluate


@contextmanager
def _methods(strategy: Strategy, recorder: Recorder) -> Iterator[None]:
    """Replaces, in this object alone, the methods that a round calls."""
    own = vars(strategy)
    names = ("configure_train", "aggregate_train", "aggregate_evaluate")
    before = {name: own[name] for name in names if name in own}

    def train(server_round: int, *args: Any, **kwargs: Any) -> Any:
        result = inner["aggregate_train"](server_round, *args, **kwargs)
        if isinstance(result, tuple) and len(result) == 2:
            if isinstance(result[0], ArrayRecord):
                recorder.arrays = result[0]
            recorder.aggregated(server_round, "train", result[1])
        return result

    def evaluate(server_round: int, *args: Any, **kwargs: Any) -> Any:
        metrics = inner["aggregate_evaluate"](server_round, *args, **kwargs)
        recorder.aggregated(server_round, "client", metrics)
        return metrics

    def configure(server_round: int, *args: Any, **kwargs: Any) -> Any:
        recorder.enter(server_round)
        return inner["configure_train"](server_round, *args, **kwargs)

    inner = {name: getattr(strategy, name) for name in names}
    own.update(zip(names, (configure, train, evaluate), strict=True))
    try:
        yield
    finally:
        for name in names:
            own.pop(name, None)
        own.update(before)


def _take(result: object, recorder: Recorder) -> None:
    """Takes the result of a start: its arrays, and what a start of the app's own did not tell."""
    arrays = getattr(result, "arrays", None)
    if isinstance(arrays, ArrayRecord) and arrays:
        recorder.arrays = arrays
    for history, split in _HISTORIES.items():
        for server_round, metrics in dict(getattr(result, history, None) or {}).items():
            recorder.missed(server_round, split, metrics)
