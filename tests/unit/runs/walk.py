"""A tiny "training" whose every round depends on all before, so that a loss or repetition shows."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable

import torch

from fedsim.random import generator
from fedsim.runs import RunStore, RunWriter
from tests.unit.runs.helpers import Scenario, Spec


def create(store: RunStore, rounds: int) -> RunWriter:
    return store.create(Spec(scenario=Scenario(name="walk", rounds=rounds)))


def train(run: RunWriter, rounds: int, pause: float = 0.0) -> None:
    """Runs or resumes a random walk with a checkpoint every third round."""
    found = run.load_checkpoint()
    start, weights, total = -1, torch.zeros(50, dtype=torch.float64), 0.1
    if found is not None:
        start, weights, total = found[0], found[1]["weights"], found[2]["total"]
    run.truncate_after(start)
    for round in range(start + 1, rounds):
        time.sleep(pause)
        step = generator(1, "walk", round).normal(size=50)
        weights = 0.9 * weights + torch.from_numpy(step)
        total = total * 1.0001 + float(weights.sum())
        run.log_metrics(round, "test", {"total": total, "norm": float(weights.norm())})
        run.log_client_metrics(round, "client", [0, 1], {"w": weights[:2].tolist()})
        run.event("stepped", round, total=total)
        run.save_draw(round, {"w": weights[None]})
        run.end_round(round)
        if round % 3 == 0:
            run.save_checkpoint(round, {"weights": weights}, {"total": total})
    run.save_parameters({"weights": weights})
    run.finish()


def fork(work: Callable[[], None]) -> int:
    """Runs `work` in a child process that ends without clean-up; returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def exit_code(child: int) -> int:
    """Waits for a child; returns its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
