"""The client of bandits: it pulls its own objective, and sends means or nothing at all.

It answers

    train.pull       with cells: pulls each of them and replies with their means (a phase of Fed-PNE
                     and PF-PNE); without: searches on alone, and replies with no array
    train.eliminate  says which cells may hold its optimum, given the mean over the clients
    train            trains the model that is frozen afterwards; train.freeze: keeps it

A message is a phase, and all its pulls are made by a few calls. Where the objective's maximum is
known the replies' metrics tell the regret: that is the instrument of a simulation and no part of
any method, and a real deployment has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from fedsim.bandits.axes import Axis, Floats
from fedsim.bandits.cells import ROOT, CellTree
from fedsim.bandits.hct import HCT
from fedsim.bandits.learners import PNE, TPE, Learner, RandomSearch, cell_means, import_optuna
from fedsim.bandits.objectives import (
    Objective,
    Program,
    PythonFunction,
    Synthetic,
    import_function,
    pull,
)
from fedsim.bandits.personalise import Personalisation, PersonaliseParams, fit
from fedsim.bandits.rules import (
    Confidence,
    best_cell,
    global_survivors,
    intersected,
    local_survivors,
    spread,
)
from fedsim.clients.base import Batch, Config, DirectClient, Reply
from fedsim.data import FederatedData
from fedsim.data.sets.bandit_objectives import BanditObjectives, read_row
from fedsim.errors import Params, Problem, ScenarioError
from fedsim.messages import Arrays
from fedsim.models import NoModel

HOPELESS = 20
"""Pulls after which a client that has never had a good one is given up."""

Numbers = dict[str, np.ndarray[Any, Any]]
Axes = Annotated[tuple[Axis, ...], Field(min_length=1, max_length=20)]


class SyntheticParams(Params):
    """The function that the client's row describes, of data: bandit_objectives."""

    name: Literal["synthetic"] = "synthetic"


class _WithAxes(Params):
    """A black box whose search space the scenario says."""

    axes: Axes = Field(description="The search space: one entry for each input.")

    @field_validator("axes")
    @classmethod
    def _names_differ(cls, axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
        if len({axis.name for axis in axes}) < len(axes):
            raise ValueError("axes must have different names")
        return axes


class FunctionParams(_WithAxes):
    """A Python function of yours, called as function(point, shard).

    point is a dict of the axes' values; shard has the client's rows as tensors (x, y, weight). If
    the function has a parameter rng it gets a NumPy generator. It returns a number to maximise,
    noisy or not.
    """

    name: Literal["function"] = "function"
    path: str = Field(description="Import path of the function, package.module:function.")
    arguments: dict[str, Any] = Field(default={}, description="Further keyword arguments.")


class ProgramParams(_WithAxes):
    """A program that is run for each pull: JSON on standard input, JSON on standard output.

    It reads {"point": {axis: value}, "client": number, "seed": number} and writes a number, or
    {"value": number}.
    """

    name: Literal["program"] = "program"
    command: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="The program and its arguments, as a list; no shell is involved."
    )
    timeout: float = Field(60.0, gt=0, description="Seconds after which a pull has failed, > 0.")


ObjectiveParams = SyntheticParams | FunctionParams | ProgramParams | PersonaliseParams


class BanditParams(Params):
    """A client that maximises a black box of its own."""

    name: Literal["bandit"] = "bandit"
    objective: Annotated[ObjectiveParams, Field(discriminator="name")] = Field(
        SyntheticParams(), description="What each client maximises, and over which box."
    )
    retries: int = Field(
        1,
        ge=0,
        description="How often a pull that fails (an exception, no finite number, a timeout) is "
        "repeated, ≥ 0. Then it counts as a pull and is left out of every mean.",
    )


class Bandit(DirectClient):
    """Pulls, eliminates and searches; see the module."""

    Params = BanditParams
    params: BanditParams
    honours = frozenset({"arity", "nu1", "rho", "c", "log-term", "min-pulls"})
    requires = frozenset({"arity", "log-term"})

    def axes(self, data: FederatedData) -> tuple[Axis, ...]:
        """Returns the box that is searched; raises ScenarioError if the objective cannot be had."""
        objective = self.params.objective
        try:
            if isinstance(objective, PersonaliseParams):
                self._check_personalise(data)
                return objective.box()
            if isinstance(objective, SyntheticParams):
                if data.info.name != BanditObjectives.model_fields["name"].default:
                    raise ValueError("is for data: bandit_objectives; name what is to be maximised")
                return read_row(data.train.x[0].astype(np.float64))[0].axes
        except ValueError as error:
            reason = str(error).removeprefix("1 validation error for Axis\n")
            raise ScenarioError([Problem("client.objective", reason, objective.name)]) from error
        if isinstance(objective, FunctionParams):
            import_function(objective.path, objective.arguments)
        return objective.axes

    @property
    def personalises(self) -> bool:
        """Whether what is tuned is the personalisation of a model."""
        return isinstance(self.params.objective, PersonaliseParams)

    def _check_personalise(self, data: FederatedData) -> None:
        if isinstance(self.model, NoModel) or self.task.probabilities is None:
            raise ValueError("needs a model and a task of classes, which it personalises")
        if self.model.batch_norms:
            raise ValueError("takes no model with batch norm; use GroupNorm or LayerNorm")
        if int(data.shards.sizes.min()) < 2:
            raise ValueError("needs two training rows at every client; set partition.min_size: 2")

    def check_method(self, method: str) -> None:
        """Raises UserError if a way to search alone lacks what it needs."""
        if method == "tpe":
            import_optuna()

    def train(
        self,
        message_type: str,
        records: dict[str, Arrays],
        config: Config,
        shard: Batch,
        client_state: Arrays,
        rng: np.random.Generator,
    ) -> tuple[Reply, Arrays]:
        """Answers one message; see the module."""
        if message_type == "train":
            return self._train_model(records["arrays"], shard), client_state
        if message_type == "train.freeze":
            frozen = {f"frozen/{name}": value for name, value in records["arrays"].items()}
            return Reply({}, {"num-examples": torch.tensor(len(shard.y))}), client_state | frozen
        objective = self._objective(shard, client_state, config)
        if isinstance(objective, Personalisation) and not _part(client_state, "frozen/"):
            raise ValueError("this client never got the trained model: it missed train.freeze")
        site = Site(objective, client_state, config)
        if message_type == "train.eliminate":
            found = site.eliminate(_array(records["mean"]["mean"]))
        elif "cells" in records:
            found = site.pull_cells(_array(records["cells"]["cells"]), self.params.retries, rng)
        else:
            found = site.search(self.params.retries, rng)
        site.settle()
        return Reply(found, site.metrics()), site.state()

    def score(
        self,
        records: dict[str, Arrays],
        config: Config,
        shard: Batch,
        held: Batch,
        client_state: Arrays,
        rng: np.random.Generator,
    ) -> dict[str, float]:
        """Returns the recommended point; where a model is personalised, how that does on `held`."""
        objective = self._objective(shard, client_state, config)
        point = Site(objective, client_state, config).recommended()
        found = {axis.name: float(x) for axis, x in zip(objective.axes, point, strict=True)}
        if isinstance(objective, Personalisation):
            found = objective.test(point, held) | found
        return found

    def _objective(self, shard: Batch, client_state: Arrays, config: Config) -> Objective:
        params = self.params.objective
        if isinstance(params, SyntheticParams):
            return Synthetic(*read_row(_array(shard.x[0]).astype(np.float64)))
        if isinstance(params, FunctionParams):
            function = import_function(params.path, params.arguments)
            return PythonFunction(function, params.axes, shard, params.arguments)
        if isinstance(params, ProgramParams):
            client = int(config["partition-id"])
            return Program(params.command, params.axes, params.timeout, client)
        frozen = _part(client_state, "frozen/")
        if not frozen:
            frozen = self.model.initial()  # before anything was frozen: as the model starts
        return Personalisation(params, self.model, self.task, frozen, shard)

    def _train_model(self, arrays: Arrays, shard: Batch) -> Reply:
        params = self.params.objective
        if not isinstance(params, PersonaliseParams):
            raise ValueError("only the objective personalise trains a model")
        rows, lr = (shard.x, shard.y, shard.weight), torch.tensor(params.train_lr)
        none = torch.tensor(0.0)
        new = fit(self.model, self.task, arrays, rows, lr, none, params.train_steps)
        detached = {name: value.detach() for name, value in new.items()}
        with torch.no_grad():
            loss = self.task.loss(self.model.apply(arrays, shard.x), shard.y).mean()
        return Reply(
            {"arrays": detached}, {"num-examples": torch.tensor(len(shard.y)), "loss": loss}
        )


class Site:
    """One client's search between two messages: what it knows, and what it does with it."""

    def __init__(self, objective: Objective, client_state: Arrays, config: Config) -> None:
        self.objective, self.config = objective, config
        self._kept = client_state
        self.learned: Numbers = _numbers(_part(client_state, "learner/"))
        self.phase: Numbers = _numbers(_part(client_state, "phase/"))
        own = _numbers(_part(client_state, "site/"))
        self.spent = int(own.get("spent", np.array(0)))
        self.failed = int(own.get("failed", np.array(0)))
        self.regret = float(own.get("regret", np.array(0.0)))
        self.active: int | None = None
        """Cells that may hold the optimum; None where there are no cells."""
        self._pulled: list[Floats] = []

    @property
    def tree(self) -> CellTree:
        """The cells that all clients share."""
        return CellTree(self.objective.axes, int(self.config["arity"]))

    @property
    def confidence(self) -> Confidence:
        """The widths that the message asks for."""
        c = self.config
        return Confidence(*(float(c[name]) for name in ("log-term", "nu1", "rho", "c")))

    @property
    def left(self) -> int:
        """Pulls that the budget still allows."""
        return max(int(self.config["budget"]) - self.spent, 0)

    def pull_cells(
        self, cells: np.ndarray[Any, Any], retries: int, rng: np.random.Generator
    ) -> dict[str, Arrays]:
        """Pulls every cell; returns their means, unless the budget has cut the phase short."""
        depth, pulls = int(self.config["depth"]), int(self.config["pulls"])
        if "best" in self.config:  # what the server recommends for all
            best = np.array([int(self.config["best"])])
            self.learned["best"] = self.tree.centres(int(self.config["best-depth"]), best)[0]
        self.active = int(self._own(depth, cells).sum())
        counts = spread(min(pulls * len(cells), self.left), len(cells))
        points = np.repeat(self.tree.centres(depth, cells), counts, axis=0)
        values = self._pull(points, retries, rng)
        if not self.config["reports"]:
            return {}
        means, good = cell_means(values, counts)
        means = np.where(good > 0, means, 0.0)
        self.phase = {"cells": cells, "means": means, "good": good.astype(np.int32)}
        # a mean of one good pull among failures would be that reward
        enough = good >= min(int(self.config["min-pulls"]), pulls)
        sent = {"mean": np.where(enough, means, 0.0), "good": np.where(enough, good, 0.0)}
        return {"means": _tensors({**sent, "good": sent["good"].astype(np.int32)})}

    def eliminate(self, mean: Floats) -> dict[str, Arrays]:
        """Takes the mean over the clients, g (n,) with NaN where it is unknown.

        Returns which cells of the phase this client keeps.
        """
        if len(self.phase.get("cells", ())) != len(mean):
            raise ValueError("this client has not pulled the cells of the phase")
        depth, confidence = int(self.config["depth"]), self.confidence
        cells, good = self.phase["cells"], self.phase["good"]
        among = self._own(depth, cells)
        own = np.where(good > 0, self.phase["means"], np.nan)
        width, delta = float(self.config["width"]), float(self.config["delta"])
        slack = confidence.smoothness(depth)
        possible = among & global_survivors(mean, width, slack + 2 * delta)
        if possible.any():  # else Δ is too small: the client is left with what it had
            among = possible
        low, high = intersected(mean, width, delta, own, confidence.width(good))
        kept = local_survivors(low, high, slack, among)
        best = best_cell(low, high, among)
        if best is not None:
            self.learned["best"] = self.tree.centres(depth, cells[[best]])[0]
        below = self.tree.children(depth, cells[kept])
        if len(below):
            self.learned |= {"depth": np.array(depth + 1), "cells": below}
        else:  # the tree has no more depth
            self.learned |= {"depth": np.array(depth), "cells": cells[kept]}
        self.phase, self.active = {}, len(self.learned["cells"])
        return {"survivors": {"kept": torch.from_numpy(kept)}}

    def _own(self, depth: int, cells: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Returns which of the cells this client holds.

        All where it has missed a phase, or none of its own is left: its say was not heard.
        """
        if "cells" not in self.learned or int(self.learned["depth"]) != depth:
            return np.ones(len(cells), bool)
        own = np.isin(cells, self.learned["cells"])
        return own if own.any() else np.ones(len(cells), bool)

    def search(self, retries: int, rng: np.random.Generator) -> dict[str, Arrays]:
        """Searches on alone: one phase of PNE, or `pulls` pulls of anything else."""
        learner = self._learner(str(self.config["method"]))
        end = max(self.left - int(self.config["pulls"]), 0)
        while self.left > end:
            limit = self.left if isinstance(learner, PNE) else self.left - end
            points = learner.ask(limit, rng)
            learner.tell(points, self._pull(points, retries, rng))
            if isinstance(learner, PNE):
                break
        self.learned = {name: np.asarray(value) for name, value in learner.state().items()}
        best = learner.recommend()
        if best is not None:
            self.learned["best"] = best
        if isinstance(learner, PNE):
            self.active = len(learner.cells)
        return {}

    def _learner(self, method: str) -> Learner:
        c = self.config
        if method == "pne":
            return PNE(self.tree, self.confidence, int(c["min-pulls"]), self.learned)
        if method == "hct":
            nu1, rho, width, failure = (float(c[n]) for n in ("nu1", "rho", "c", "failure"))
            return HCT(self.tree, nu1, rho, width, failure, self.learned)
        repeats = int(c["repeats"])
        if method == "random":
            return RandomSearch(self.objective.axes, repeats, self.learned)
        return TPE(self.objective.axes, repeats, self.learned)

    def _pull(self, points: Floats, retries: int, rng: np.random.Generator) -> Floats:
        """Pulls, and counts what was pulled and what failed."""
        pulled = pull(self.objective, points, rng, retries)
        self.spent += len(points)
        self.failed += pulled.failed
        self._pulled.append(points)
        if self.failed == self.spent >= HOPELESS:
            raise RuntimeError(f"all {self.spent} pulls so far have failed; last: {pulled.reason}")
        return pulled.values

    def settle(self) -> None:
        """Adds up the regret of what was pulled, where the maximum is known."""
        if self.objective.best is not None and self._pulled:
            values = self.objective.value(np.concatenate(self._pulled))
            self.regret += float((self.objective.best - values).sum())

    def recommended(self) -> Floats:
        """Returns the recommended point (d,): the middle of the box before anything is known."""
        if "best" in self.learned:
            return self.learned["best"]
        middle: Floats = CellTree(self.objective.axes).centres(0, ROOT)[0]
        return middle

    def metrics(self) -> dict[str, Tensor]:
        """Returns what the simulation is told of this client; see the module."""
        found = {"pulls": float(self.spent), "failed": float(self.failed)}
        if self.active is not None:
            found["cells"] = float(self.active)
        if (best := self.objective.best) is not None:
            found["regret"] = self.regret
            at = self.objective.value(self.recommended()[None])
            found["simple_regret"] = best - float(at[0])
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}

    def state(self) -> Arrays:
        """Returns what the client keeps until the next message."""
        site = {"spent": self.spent, "failed": self.failed, "regret": self.regret}
        parts: dict[str, Numbers] = {
            "learner": self.learned,
            "phase": self.phase,
            "site": {name: np.array(value) for name, value in site.items()},
        }
        kept = {f"frozen/{k}": v for k, v in _part(self._kept, "frozen/").items()}
        for part, numbers in parts.items():
            kept |= {f"{part}/{name}": tensor for name, tensor in _tensors(numbers).items()}
        return kept


def _part(state: Arrays, prefix: str) -> Arrays:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = tensor.cpu().numpy()
    return found


def _numbers(arrays: Mapping[str, Tensor]) -> Numbers:
    return {name: _array(tensor) for name, tensor in arrays.items()}


def _tensors(numbers: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
    return {name: torch.from_numpy(np.array(value)) for name, value in numbers.items()}
