"""Who takes part in which workload, and how much faster than each fedsim has to be.

fedsim is the first side: its time is what the others' are divided by.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from tests.benchmarks.batched import BmmLoop, VmapLoop
from tests.benchmarks.engine import Fedsim
from tests.benchmarks.harness import Entry
from tests.benchmarks.loops import EchoLoop, SequentialLoop, ThreadedLoop
from tests.benchmarks.remote import ROOT, Remote, child
from tests.benchmarks.sampling import FedsimChains, SequentialHMC, VmapHMC
from tests.benchmarks.session import Session, Task
from tests.benchmarks.workloads import COHORTS, POPULATIONS, Workload

TRAINING = ("W1", "W2")
ECHOES = ("W3-1k", "W3-1M")
COHORT = tuple(workload.name for workload in COHORTS)
POPULATION = tuple(workload.name for workload in POPULATIONS)

PEERS = Path(os.environ.get("FEDSIM_BENCH_VENV", ROOT / ".venv-bench")) / "bin" / "python"
"""The Python of the peers' environment, which `make bench` creates."""

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Side:
    """A contestant.

    key: its name in --sides. name: as shown in the tables. workloads: names. setup: starts a
    session, untimed. asked: by workload, how many times its time fedsim's has to go into, at
    least. group: of several sides with one group's name the fastest counts. share: of a task's
    rounds a repetition, for slow sides; one at least. needs: the distribution in the peers'
    environment that the side cannot do without. alone: always in a process of its own.
    """

    key: str
    name: str
    workloads: tuple[str, ...]
    setup: Callable[[Any], Session]
    asked: Mapping[str, float] = field(default_factory=dict)
    group: str = ""
    share: float = 1.0
    needs: str = ""
    alone: bool = False

    def entry(self, task: Task, apart: bool = False) -> Entry:
        """Returns the side as the harness takes it; apart: in a process of its own in any case."""
        setup = partial(child, self.key) if (apart or self.alone) and not self.needs else self.setup
        rounds = max(1, round(self.share * task.rounds))
        return Entry(self.key, self.name, task, partial(setup, task), rounds)

    def missing(self) -> str:
        """Returns why the side cannot take part here, or nothing."""
        if not self.needs or self.needs in peer_versions():
            return ""
        if not PEERS.exists():
            return f"there is no {PEERS.parents[1].name}, which `make bench` creates"
        return f"{self.needs} is not installed in {PEERS.parents[1].name}"


def peer(module: str, *launcher: str, pause: bool = False) -> Callable[[Workload], Session]:
    """Returns a setup that runs tests.benchmarks.peers.MODULE in the peers' environment."""

    def setup(workload: Workload) -> Session:
        command = [str(PEERS), *launcher, "-m", f"tests.benchmarks.peers.{module}", workload.name]
        return Remote(workload, command, QUIET, pause)

    return setup


@cache
def peer_versions() -> Mapping[str, str]:
    """Returns the versions of what is compared in the peers' environment, by distribution."""
    if not PEERS.exists():
        return {}
    code = (
        "import importlib.metadata as m\n"
        "for d in m.distributions():\n"
        "    print(d.metadata['Name'].lower(), d.version)"
    )
    listed = subprocess.run([PEERS, "-c", code], capture_output=True, text=True, check=True)
    versions = dict(line.split() for line in listed.stdout.splitlines())
    return {name: versions[name] for name in ("flwr", "ray", "pfl", "torch") if name in versions}


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")

SIDES: Sequence[Side] = (
    Side("fedsim", "fedsim", (*TRAINING, *ECHOES, *COHORT, *POPULATION), Fedsim),
    Side(
        "flower",
        "Flower's own simulation",
        (*TRAINING, *ECHOES, *COHORT, *POPULATION[:3]),
        peer("flower", pause=True),
        {"W1": 100, "W2": 2, "W3-1k": 200, "W3-1M": 40},
        share=0.0,
        needs="ray",
    ),
    Side(
        "pfl",
        "pfl, 1 process",
        (*TRAINING, *ECHOES, *COHORT, *POPULATION),
        peer("pfl_sgd"),
        {"W1": 10, "W2": 1.3, "W3-1k": 5, "W3-1M": 3},
        group="pfl",
        needs="pfl",
    ),
    Side(
        "pfl-2",
        "pfl, torchrun with 2 processes",
        (*TRAINING, *ECHOES),
        peer("pfl_sgd", *TORCHRUN),
        {"W1": 10, "W2": 1.3, "W3-1k": 5, "W3-1M": 3},
        group="pfl",
        needs="pfl",
    ),
    Side("sequential", "sequential torch loop", (*TRAINING, *COHORT, *POPULATION), SequentialLoop),
    Side("vmap", "torch.func vmap loop", ("W1", *COHORT, *POPULATION), VmapLoop),
    Side("bmm", "hand-written bmm loop", ("W1", *COHORT, *POPULATION), BmmLoop, {"W1": 0.6}),
    Side("threads", "channels-last torch loop in 2 threads", ("W2",), ThreadedLoop, {"W2": 0.9}),
    Side("bare", "bare loop", ECHOES, EchoLoop),
    Side(
        "ray",
        "fedsim, engine ray with 2 workers",
        ("W2", *ECHOES),
        partial(Fedsim, engine={"name": "ray", "workers": 2}),
        alone=True,
    ),
    Side(
        "fedsim-flower",
        "fedsim with Flower's FedAvg",
        POPULATION,
        partial(Fedsim, strategy="FedAvg"),
    ),
)

SAMPLERS: Sequence[Side] = (
    Side("fedsim", "fedsim", ("fa-hmc",), FedsimChains),
    Side(
        "one-by-one",
        "fedsim, engine.path: one_by_one",
        ("fa-hmc",),
        partial(FedsimChains, path="one_by_one"),
        share=0.25,
    ),
    Side("sequential", "sequential torch loop", ("fa-hmc",), SequentialHMC, share=0.25),
    Side("vmap", "torch.func vmap loop", ("fa-hmc",), VmapHMC),
)

KEYS = tuple(dict.fromkeys(side.key for side in (*SIDES, *SAMPLERS)))

BLAZEFL = "blazefl 3: it asks for Python 3.14 and pfl for less than 3.13."
"""Why a peer that one would look for is not among the sides."""
