"""What a client maximises: a synthetic function, a function of the user's, or a program.

One pull is one noisy evaluation. A pull that raises, returns no finite number or takes too long has
failed: it is repeated a given number of times, then counted and left out of every mean.
"""

from __future__ import annotations

import inspect
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fedsim.bandits.axes import Axis, Floats
from fedsim.bandits.functions import Tilted
from fedsim.clients.base import Batch
from fedsim.errors import UserError
from fedsim.registry import import_path

MOST_SAID = 1 << 20
"""Bytes of output after which a program has failed: nothing else bounds what is kept of it."""


class Objective(Protocol):
    """A black box on the client; `axes` is its box, `best` its maximum where that is known."""

    axes: tuple[Axis, ...]
    best: float | None

    def pull(self, points: Floats, rng: np.random.Generator) -> tuple[Floats, str]:
        """Returns one noisy value for each of the points (n, d), NaN where it failed, and why."""

    def value(self, points: Floats) -> Floats:
        """Returns the values (n,) without noise; only where `best` is known."""


@dataclass(frozen=True)
class Pulled:
    """values (n,): NaN where every attempt failed. failed: how many did. reason: of the last."""

    values: Floats
    failed: int
    reason: str


def pull(objective: Objective, points: Floats, rng: np.random.Generator, retries: int) -> Pulled:
    """Pulls each of the points (n, d) once, and those that fail up to `retries` times more."""
    values, reason = objective.pull(points, rng)
    for _ in range(retries):
        again = np.flatnonzero(~np.isfinite(values))
        if not len(again):
            break
        repeated, why = objective.pull(points[again], rng)
        values[again], reason = repeated, why or reason
    bad = ~np.isfinite(values)
    return Pulled(np.where(bad, np.nan, values), int(bad.sum()), reason)


class Synthetic:
    """A known function with Gaussian noise, all pulls at once."""

    def __init__(self, function: Tilted, noise: float, optimum: Floats) -> None:
        """noise: standard deviation σ of a pull. optimum: a maximiser (d,)."""
        self.function, self.noise = function, noise
        self.axes = function.axes
        self.best: float | None = float(function.value(optimum[None])[0])

    def pull(self, points: Floats, rng: np.random.Generator) -> tuple[Floats, str]:
        """See Objective."""
        values = self.function.value(points)
        return values + self.noise * rng.standard_normal(len(points)), ""

    def value(self, points: Floats) -> Floats:
        """See Objective."""
        return self.function.value(points)


class _OneByOne:
    """A black box that takes one point at a time and whose maximum nobody knows."""

    best: float | None = None

    def __init__(self, axes: Sequence[Axis]) -> None:
        self.axes = tuple(axes)

    def pull(self, points: Floats, rng: np.random.Generator) -> tuple[Floats, str]:
        """See Objective."""
        values, reason = np.full(len(points), np.nan), ""
        for i, point in enumerate(points):
            try:
                values[i] = float(self.evaluate(self.named(point), rng))
                if not np.isfinite(values[i]):
                    reason = f"it returned {values[i]}"
            except (Exception, SystemExit) as error:  # a black box may raise anything
                reason = f"{type(error).__name__}: {error}"
        return values, reason

    def value(self, points: Floats) -> Floats:
        """See Objective."""
        raise NotImplementedError

    def evaluate(self, point: dict[str, float], rng: np.random.Generator) -> float:
        """Returns one noisy value."""
        raise NotImplementedError

    def named(self, point: Floats) -> dict[str, float]:
        """Returns the coordinates by the axes' names; whole numbers on integer axes."""
        return {
            axis.name: int(x) if axis.scale == "integer" else float(x)
            for axis, x in zip(self.axes, point, strict=True)
        }


class PythonFunction(_OneByOne):
    """A function of the user's."""

    def __init__(
        self, function: Callable[..., Any], axes: Sequence[Axis], shard: Batch,
        arguments: Mapping[str, Any],
    ) -> None:  # fmt: skip
        super().__init__(axes)
        self.function, self.shard, self.arguments = function, shard, dict(arguments)
        self.takes_rng = "rng" in inspect.signature(function).parameters

    def evaluate(self, point: dict[str, float], rng: np.random.Generator) -> float:
        """Calls the function."""
        more = {"rng": rng} if self.takes_rng else {}
        return float(self.function(point, self.shard, **more, **self.arguments))


def import_function(path: str, arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """Returns the function at an import path; raises UserError if it cannot be called as it is."""
    function = import_path(path)
    if not callable(function):
        raise UserError(f"client.objective: {path} is a {type(function).__name__}, not a function")
    try:
        signature = inspect.signature(function)
        given = dict.fromkeys(arguments)
        if "rng" in signature.parameters:
            given["rng"] = None
        signature.bind(None, None, **given)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"client.objective: {path}: {error}; it is called as function(point, shard, …) with"
            " `arguments` as keywords, and with rng if it has a parameter of that name"
        ) from error
    return function  # type: ignore[no-any-return]


class Program(_OneByOne):
    """A program that reads one JSON document and writes another.

    Standard input: {"point": {axis: value, …}, "client": number, "seed": number}. Standard output:
    a number, or {"value": number}. An exit status other than 0 is a failed pull, and so is no
    answer within `timeout` seconds: the program is ended then, with what it has started.
    """

    def __init__(
        self, command: Sequence[str], axes: Sequence[Axis], timeout: float, client: int
    ) -> None:
        super().__init__(axes)
        self.command, self.timeout, self.client = list(command), timeout, client

    def evaluate(self, point: dict[str, float], rng: np.random.Generator) -> float:
        """Runs the program once."""
        seed = int(rng.integers(2**31))
        asked = json.dumps({"point": point, "client": self.client, "seed": seed})
        with tempfile.TemporaryFile() as file:
            file.write(asked.encode())
            file.seek(0)
            with subprocess.Popen(
                self.command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True,
            ) as process:  # fmt: skip
                try:
                    out, err = _said(process, self.timeout)
                except BaseException:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    raise
        if process.returncode:
            said = err.strip().splitlines()[-1:] or ["nothing"]
            raise RuntimeError(f"exit status {process.returncode}; it said {said[0]}")
        answer = json.loads(out)
        return float(answer["value"] if isinstance(answer, dict) else answer)


def _said(process: subprocess.Popen[bytes], timeout: float) -> tuple[str, str]:
    """Returns what a program has said on standard output and standard error, once it has ended.

    Raises TimeoutError, and ValueError for more than MOST_SAID bytes.
    """
    end = time.monotonic() + timeout
    assert process.stdout is not None
    assert process.stderr is not None
    said = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    with selectors.DefaultSelector() as selector:
        for stream in said:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(end - time.monotonic(), 0))
            if time.monotonic() >= end:
                raise TimeoutError(f"no answer within {timeout:g} s")
            for key, _ in ready:
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fd)
                said[key.fd] += chunk
                if len(said[key.fd]) > MOST_SAID:
                    raise ValueError(f"it has said more than {MOST_SAID} bytes")
    try:
        process.wait(max(end - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"no answer within {timeout:g} s") from None
    out, err = said.values()
    return out.decode(), err.decode(errors="replace")
