"""From a validated scenario to the objects of one run; everything wrong is found here, before it.

Nothing is written and nothing is computed on the clients, so `fedsim check` calls it, too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedsim import batch_norm, reference, registry
from fedsim.clients.base import Client, DirectClient
from fedsim.data import FederatedData, Partition, build_data
from fedsim.errors import Params, Problem, ScenarioError, UserError
from fedsim.fitting import check_stopping, check_target, check_task
from fedsim.grids.clock import SimulatedClock, Work, examples_of
from fedsim.grids.cohort import Cohorts
from fedsim.grids.execution import Execution, choose_path
from fedsim.grids.inline import InlineGrid
from fedsim.grids.memory import keep_freed_memory
from fedsim.grids.room import device_memory
from fedsim.grids.shards import Shards
from fedsim.messages import Arrays
from fedsim.models import (
    FunctionalModel,
    NoModel,
    Task,
    build_model,
    build_task,
    no_task,
)
from fedsim.random import integer
from fedsim.scenario import Scenario
from fedsim.scenario.components import COMPONENTS, Imported
from fedsim.scenario.sections import EngineParams
from fedsim.server import faults, stragglers
from fedsim.server.faults import FaultyGrid
from fedsim.server.recorder import Recorder
from fedsim.server.state import LoopConfig, Stopping
from fedsim.strategies.base import Strategy
from fedsim.strategies.flower import DEFAULT_CLIENT, build_flower, flower_params, objections

KEPT_DATA = 4
"""Data sets kept in memory for the scenario's next runs."""


@dataclass(frozen=True)
class Setup:
    """One run, ready to start. arrays: the parameters of round 0."""

    scenario: Scenario
    seed: int
    data: FederatedData
    model: FunctionalModel
    task: Task
    strategy: FlowerStrategy
    client: Client | DirectClient | ClientApp
    arrays: Arrays
    execution: Execution

    @property
    def chains(self) -> int:
        """The leading axis of the parameters; 0 for none."""
        return self.strategy.chains if isinstance(self.strategy, Strategy) else 0

    def grid(self) -> InlineGrid:
        """Returns the engine over this run's clients."""
        torch.set_num_threads(1)  # of each operation; parallelism is over clients
        keep_freed_memory()
        engine, dtype = self.scenario.engine, getattr(torch, self.execution.dtype)
        nodes = len(self.data.shards)
        if engine.name == "ray":
            return self._on_ray()
        if isinstance(self.client, ClientApp):
            return InlineGrid(self.client, nodes, seed=self.seed)
        shards = Shards(self.data, dtype, torch.device(self.execution.device))
        budget = engine.state_budget_mb * 2**20
        cohorts = Cohorts(self.client, shards, self.execution, self.seed, budget)
        return InlineGrid(cohorts, nodes, seed=self.seed)

    def connect(self) -> int:
        """Connects to the cluster that the engine needs; returns how many workers there will be.

        0 for an engine without one. Raises UserError with what is wrong: call it before anything
        is written.
        """
        return connect(self.scenario)

    def _on_ray(self) -> InlineGrid:
        """Returns the engine over clients that are computed by a cluster's workers."""
        from fedsim.grids.ray_apps import RayAppNodes
        from fedsim.grids.ray_cohorts import RayCohorts
        from fedsim.grids.ray_grid import RayGrid

        engine, deadline = self.scenario.engine, self.scenario.deadline
        workers, needs = self.connect(), engine.client_resources
        grows = engine.workers is None
        nodes = len(self.data.shards)
        if isinstance(self.client, ClientApp):
            apps = RayAppNodes(self.client, nodes, self.seed, workers, needs, deadline, grows=grows)
            return InlineGrid(apps, nodes, seed=self.seed)
        shards = Shards(self.data, getattr(torch, self.execution.dtype))
        budget = engine.state_budget_mb * 2**20
        cohorts = RayCohorts(
            self.client,
            self.data,
            shards,
            self.execution,
            self.seed,
            budget,
            workers,
            needs,
            deadline,
            grows,
        )
        first_come = asynchronous(self.strategy) or self.scenario.over_sampling > 1
        if first_come and self.scenario.clock is None:
            return RayGrid(cohorts, nodes, seed=self.seed)
        return InlineGrid(cohorts, nodes, seed=self.seed)

    def with_faults(self, grid: Grid, recorder: Recorder) -> Grid:
        """Returns the grid whose replies go wrong as the scenario's section `faults` says."""
        params = self.scenario.faults
        if params is None:
            return grid
        return FaultyGrid(grid, params, len(self.data.shards), self.seed, recorder)

    def loop_config(self) -> LoopConfig:
        """Returns what the round loop needs of the scenario."""
        s = self.scenario
        stopping = None
        if s.early_stopping is not None:
            split, _, name = s.early_stopping.metric.partition("/")
            e = s.early_stopping
            stopping = Stopping(split, name, e.mode, e.patience, e.min_delta, e.restore_best)
        return LoopConfig(
            rounds=s.rounds,
            seed=self.seed,
            server_every=s.evaluate.server_every,
            clients_every=s.evaluate.clients_every,
            on_bad_reply=s.on_bad_reply,
            quorum=s.quorum,
            stopping=stopping,
            checkpoint_rounds=s.checkpoint.every_rounds,
            checkpoint_seconds=s.checkpoint.every_seconds,
            keep=s.checkpoint.keep,
            keep_every=s.checkpoint.keep_every,
            save_draws=s.posterior.save_draws != "none",
            clock=self.clock(),
            over_sampling=s.over_sampling,
        )

    def clock(self) -> SimulatedClock | None:
        """Returns the clock on which the clients take their time; None if none is simulated."""
        c = self.scenario.clock
        if c is None:
            return None
        return SimulatedClock(
            self.seed,
            _work(self.client, Partition.of(self.data.shards)),
            seconds=c.seconds,
            seconds_per_example=c.seconds_per_example,
            latency=c.latency,
            bandwidth=None if c.megabytes_per_second is None else c.megabytes_per_second * 1e6,
            sigma=c.sigma if c.speeds == "lognormal" else 0.0,
            jitter=c.jitter,
            deadline=c.deadline,
        )

    def plan(self) -> dict[str, Any]:
        """Returns the execution plan that is recorded in the run."""
        return {
            "engine": self.scenario.engine.name,
            **asdict(self.execution),
            "clients": len(self.data.shards),
            "parameters": self.model.num_parameters,
            "chains": self.chains,
            "ood": self.data.info.ood,
        }


def connect(scenario: Scenario) -> int:
    """Does what `Setup.connect` does."""
    engine = scenario.engine
    if engine.name != "ray":
        return 0
    from fedsim.grids import connection

    connection.connect(engine, cpus(), _own_modules(scenario))
    return connection.worker_count(engine)


def prepare(scenario: Scenario) -> Setup:
    """Returns the setup of a resolved scenario with one seed.

    Raises UserError (ScenarioError where a section can be named) with what is wrong.
    """
    (seed,) = scenario.seeds
    data = _data(scenario.data, scenario.partition, seed)
    dtype = getattr(torch, scenario.engine.dtype)
    task = no_task() if scenario.task is None else build_task(scenario.task)
    check_target(scenario, data, task)
    strategy = build_strategy(scenario.strategy)
    models = _models(scenario, data, strategy, seed, dtype)
    client = build_client(scenario, strategy, models[0], task)
    found = []
    if not isinstance(client, ClientApp):  # what a Flower app honours cannot be seen from outside
        honours = client.honours | client.metrics
        found = objections(strategy, honours, len(data.shards), client.requires)
        if scenario.model is not None:
            check_task(models[0], task, data)
    if found:
        raise ScenarioError([Problem("strategy", reason) for reason in found])
    if isinstance(strategy, Strategy):
        strategy.bind(client, data)
    setup = Setup(
        scenario=scenario,
        seed=seed,
        data=data,
        model=models[0],
        task=task,
        strategy=strategy,
        client=client,
        arrays=_initial(strategy, models, client, seed),
        execution=_execution(scenario, models[0], client),
    )
    check_stopping(setup)
    problems = list(batch_norm.objections(setup))
    problems += _clock_missing(setup)
    problems += stragglers.objections(
        strategy,
        len(data.shards),
        scenario.over_sampling,
        scenario.clock.deadline if scenario.clock else None,
        _no_clock(setup),
    )
    problems += [Problem("posterior.reference", why) for why in reference.objections(setup)]
    if scenario.faults is not None:
        problems += faults.objections(scenario.faults, len(data.shards))
    if problems:
        raise ScenarioError(problems)
    return setup


def _models(
    scenario: Scenario, data: FederatedData, strategy: FlowerStrategy, seed: int, dtype: torch.dtype
) -> list[FunctionalModel]:
    """Returns the model as each chain starts it; one without parameters if there is no model."""
    if scenario.model is None:
        return [NoModel()]
    seeds = [seed, *(integer(seed, "chain", q) for q in range(1, _chains(strategy)))]
    return [build_model(scenario.model, data.info, each, dtype) for each in seeds]


_built: dict[tuple[str, str, int], FederatedData] = {}


def _data(data: Params, partition: Params, seed: int) -> FederatedData:
    """Returns the data, built once for the runs of one call that share it."""
    key = (data.model_dump_json(), partition.model_dump_json(), seed)
    if key not in _built:
        while len(_built) >= KEPT_DATA:
            _built.pop(next(iter(_built)))
        _built[key] = build_data(data, partition, seed)
    return _built[key]


def forget_data() -> None:
    """Builds data anew from here on: files may have changed since an earlier call."""
    _built.clear()


def _clock_missing(setup: Setup) -> list[Problem]:
    """Returns why a strategy that does not wait for everybody cannot do without a clock."""
    why = _no_clock(setup)
    if not asynchronous(setup.strategy) or why is None:
        return []
    what = f"is required: the strategy updates with the replies that come first, and {why}"
    return [Problem("clock", what, hint="Write clock: {} for clients of log-normal speeds")]


def _no_clock(setup: Setup) -> str | None:
    """Returns why no reply comes before the others; None if one does, by whichever clock."""
    if setup.scenario.clock is not None:
        return None
    if setup.scenario.engine.name != "ray":
        return "the engine inline answers all messages at once"
    if isinstance(setup.client, ClientApp):
        return "Flower's ClientApps answer together"
    return None  # clients take as long as they take


def asynchronous(strategy: FlowerStrategy) -> bool:
    """Says whether the strategy goes on before everybody has replied."""
    return isinstance(strategy, Strategy) and any(
        exchange.wait is not None for exchange in strategy.exchanges(1)
    )


def _work(client: Client | DirectClient | ClientApp, shards: Partition) -> Work:
    """Returns what says how many examples a client processes on a message.

    They are those that a client of ours plans; for others, its rows.
    """

    def work(message_type: str, config: Mapping[str, Any], partition: int) -> float:
        rows = int(shards.sizes[partition])
        if not isinstance(client, Client):
            return rows
        action = message_type.partition(".")[2]
        acting = client.action(action) if action else client
        try:
            return rows if acting is None else examples_of(acting.plan(rows, config), rows)
        except Exception:  # of a user's client; the engine plans the same and says what is wrong
            return rows

    return work


def _chains(strategy: FlowerStrategy) -> int:
    return strategy.chains if isinstance(strategy, Strategy) else 0


def build_strategy(params: Params) -> FlowerStrategy:
    """Returns the strategy: ours, Flower's, or the user's by import path."""
    if isinstance(params, Imported):
        made = _construct(params)
        if not isinstance(made, FlowerStrategy):
            raise UserError(
                f"strategy {params.name} is a {type(made).__name__}, not a Flower Strategy"
            )
        return made
    name = str(getattr(params, "name", ""))
    if name in flower_params():
        return build_flower(params)
    return registry.load("strategies", name)(params)  # type: ignore[no-any-return]


def build_client(
    scenario: Scenario, strategy: FlowerStrategy, model: FunctionalModel, task: Task
) -> Client | DirectClient | ClientApp:
    """Returns the client that the scenario names, or the strategy's own."""
    params = scenario.client
    if isinstance(params, Imported):
        found = params.load()
        if isinstance(found, ClientApp):
            return found
        if isinstance(found, type) and issubclass(found, Client | DirectClient):
            own = params.params if isinstance(params.params, Params) else found.Params()
            return found(own, model, task)
        raise UserError(
            f"client {params.name} is neither a fedsim Client class nor a Flower ClientApp"
        )
    name = getattr(strategy, "client", None) or DEFAULT_CLIENT
    if params is not None:
        name = str(getattr(params, "name", ""))
    kind = registry.load("clients", name)
    return kind(params if params is not None else kind.Params(), model, task)  # type: ignore[no-any-return]


def _construct(params: Imported) -> Any:
    found = params.load()
    try:
        if isinstance(params.params, Params):
            return found(params.params)
        return found(**params.params)
    except (TypeError, ValueError) as error:
        raise UserError(f"{params.name}: {error}") from error


def _initial(
    strategy: FlowerStrategy,
    models: list[FunctionalModel],
    client: Client | DirectClient | ClientApp,
    seed: int,
) -> Arrays:
    """Returns the arrays that travel, as the models start."""
    local = client.local if isinstance(client, Client) else frozenset()
    starts = [{k: v for k, v in m.initial().items() if k not in local} for m in models]
    if not isinstance(strategy, Strategy):
        return starts[0]
    if not strategy.chains:
        return strategy.initial(starts[0], seed)
    stacked = {name: torch.stack([start[name] for start in starts]) for name in starts[0]}
    return strategy.initial(stacked, seed)


def _execution(
    scenario: Scenario, model: FunctionalModel, client: Client | DirectClient | ClientApp
) -> Execution:
    engine = scenario.engine
    direct = isinstance(client, DirectClient)
    cpu = direct and engine.device == "auto"  # such clients compute in NumPy
    device = torch.device("cpu" if cpu else _device(engine))
    path, why = choose_path(model, device, engine.path)
    if direct:
        path, why = "one_by_one", "the client is no loop of steps that could be mapped"
    return Execution(
        path=path,
        chunk=engine.chunk or 0,
        threads=engine.threads or (cpus() if engine.name == "inline" else _threads(engine)),
        dtype=engine.dtype,
        device=device.type,
        trace=engine.trace,
        why=why,
        # that of a cluster's workers is known when they are there
        memory=0 if engine.name == "ray" else device_memory(device),
    )


def _own_modules(scenario: Scenario) -> list[str]:
    """Returns the modules that the scenario names by import path."""
    sections = (getattr(scenario, name) for name in COMPONENTS)
    paths = [
        getattr(section, "name" if isinstance(section, Imported) else "factory", "")
        for section in sections
    ]
    return [path.partition(":")[0] for path in paths if path]


def cpus() -> int:
    """Returns the CPUs this process may use; results do not depend on it."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _threads(engine: EngineParams) -> int:
    """Returns the threads of a worker: as many as it has CPUs."""
    return max(int(engine.client_resources.cpus), 1)


def _device(engine: EngineParams) -> str:
    asked, dtype = engine.device, engine.dtype
    if engine.name == "ray":  # the workers' machines may have what this one lacks
        gpus = engine.client_resources.gpus
        if asked == "cuda" and not gpus:
            what, hint = "needs GPUs for the workers", "Set engine.client_resources.gpus"
            raise ScenarioError([Problem("engine.device", what, asked, hint=hint)])
        return ("cuda" if gpus else "cpu") if asked == "auto" else asked
    if asked == "mps" and dtype == "float64":
        what = "Apple's GPUs compute in float32, and engine.dtype is float64"
        hint = "Take engine.device: cpu, or engine.dtype: float32"
        raise ScenarioError([Problem("engine.device", what, asked, hint=hint)])
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available() and dtype != "float64",
    }
    if asked == "auto":
        return next((name for name, there in available.items() if there), "cpu")
    if asked != "cpu" and not available[asked]:
        what, hint = "torch finds no such device on this machine", "Take auto or cpu"
        raise ScenarioError([Problem("engine.device", what, asked, hint=hint)])
    return asked
