"""What the server side of all bandits has in common: pretraining, what was sent, and the end.

A bandit exchanges cells and means instead of parameters. The loop's parameters are no model's then,
or those of a model that is trained by federated averaging first, frozen, and tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from pydantic import Field
from torch import Tensor

from fedsim.bandits.axes import Floats
from fedsim.bandits.cells import CELLS_FILE, CellTree
from fedsim.bandits.rules import Confidence, log_term
from fedsim.data import FederatedData
from fedsim.errors import Params, Problem, ScenarioError, UserError
from fedsim.messages import Arrays, Broadcast, Replies, make_content, stack, to_record, to_tensors
from fedsim.strategies.base import (
    Exchange,
    ReplySchema,
    Strategy,
    StrategyParams,
    mean_metrics,
)


class BanditParams(Params):
    """What all searches have in common."""

    needs_model: ClassVar[bool] = False
    default_rounds: ClassVar[int | None] = 1000

    budget: int = Field(ge=1, le=10**9, description="Pulls T of each client, ≥ 1; they end a run.")
    nu1: float = Field(
        1.0,
        gt=0,
        description="Smoothness ν1 > 0: in a client's optimal cell of depth h the centre is at "
        "most ν1 ρ^h below its optimum, in the objective's unit.",
    )
    rho: float = Field(0.5, gt=0, lt=1, description="Smoothness ρ in (0, 1); see nu1.")
    c: float = Field(
        0.1,
        gt=0,
        description="Scale c > 0 of the confidence widths b(n) = c sqrt(L / n): about the standard "
        "deviation of a pull's noise.",
    )
    failure: float = Field(
        0.01, gt=0, lt=1, description="Failure probability δ in (0, 1), in L = log(T M / δ)."
    )
    arity: int = Field(2, ge=2, le=16, description="Parts k that a cell is split into, 2 to 16.")
    pretrain: int = Field(
        0,
        ge=0,
        description="Rounds of federated averaging before the search; then the model is frozen. "
        "For the client's objective personalise.",
    )


class PhaseParams(BanditParams):
    """What searches by phases have in common."""

    min_pulls: int = Field(
        2,
        ge=1,
        description="Fewest pulls n of a cell, ≥ 1. At 1 the mean that is sent may be a single "
        "reward.",
    )


class Bandit(Strategy):
    """Base of the searches: pretraining, then phases until the budget is spent."""

    client = "bandit"
    sends = frozenset({"arity", "nu1", "rho", "c", "log-term", "min-pulls"})
    params: BanditParams

    def __init__(self, params: BanditParams) -> None:
        super().__init__(StrategyParams())
        self.params = params
        self.clients = 0
        self.optima: Floats | None = None
        self.tree = CellTree(())
        self.spent = 0
        """Pulls that each client was asked for in phases of all clients."""
        self.done = False
        self.sent = {"floats_up": 0, "ids_up": 0, "floats_down": 0, "ids_down": 0}
        self._before = dict(self.sent)
        self.history: list[dict[str, Any]] = []
        """The phases of all clients: depth, cells, mean and which cells were kept."""

    def bind(self, client: Any, data: FederatedData) -> None:
        """Takes the search space from the client, and the number of clients."""
        if not hasattr(client, "axes"):
            raise UserError(f"strategy {type(self).__name__} needs the client bandit")
        if self.params.pretrain and not client.personalises:
            what, hint = "is for client.objective: personalise", "Leave it out"
            raise ScenarioError(
                [Problem("strategy.pretrain", what, self.params.pretrain, hint=hint)]
            )
        self.clients, self.optima = data.clients, data.truth.get("optima")
        self.tree = CellTree(client.axes(data), self.params.arity)

    def finished(self) -> bool:
        """Says whether every client has spent its budget."""
        return self.done

    @property
    def confidence(self) -> Confidence:
        """Widths and numbers of pulls; L is over all clients."""
        p = self.params
        return Confidence(log_term(p.budget, self.clients, p.failure), p.nu1, p.rho, p.c)

    def settings(self, server_round: int) -> dict[str, Any]:
        """Returns the search's settings in the messages' words."""
        p, least = self.params, getattr(self.params, "min_pulls", 1)
        return {
            "arity": p.arity, "nu1": p.nu1, "rho": p.rho, "c": p.c, "failure": p.failure,
            "log-term": self.confidence.log_term, "min-pulls": least, "budget": p.budget,
        }  # fmt: skip

    # Rounds

    def exchanges(self, server_round: int) -> Sequence[Exchange]:
        """Returns the exchanges of federated averaging, then those of a phase."""
        self._before = dict(self.sent)
        if server_round <= self.params.pretrain:
            return [self.train_exchange()]
        freeze = [Exchange("train.freeze", self.configure_train, self._ignore, lambda a: SILENT)]
        first = server_round == self.params.pretrain + 1
        return [*(freeze if first and self.has_model else []), *self.phase(server_round)]

    has_model = False

    def phase(self, server_round: int) -> Sequence[Exchange]:
        """Returns the exchanges of a phase of the search."""
        raise NotImplementedError

    def initial(self, arrays: Arrays, seed: int) -> Arrays:
        """Returns the model's parameters, or nothing: a bandit has none of its own."""
        self.has_model = bool(arrays)
        return arrays

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Asks every client how its recommendation does."""
        return self.ask(grid, "evaluate", {**config, **self.settings(server_round)}, {})

    def ask(
        self, grid: Grid, message_type: str, settings: Mapping[str, Any],
        records: Mapping[str, Arrays],
    ) -> Broadcast:  # fmt: skip
        """Returns one message for all clients, and counts what it holds."""
        nodes = list(grid.get_node_ids())
        self._count("down", records, len(nodes))
        return Broadcast(make_content(records, settings), message_type, nodes)

    def take(self, replies: Iterable[Message]) -> Replies:
        """Returns the stacked replies, and counts what they hold."""
        stacked = stack(replies)
        self._count("up", stacked.arrays, 1)
        return stacked

    def _count(self, way: str, records: Mapping[str, Arrays], times: int) -> None:
        for arrays in records.values():
            for tensor in arrays.values():
                kind = "floats" if tensor.is_floating_point() else "ids"
                self.sent[f"{kind}_{way}"] += times * tensor.numel()

    def measured(self, replies: Replies) -> MetricRecord:
        """Returns the means over clients, and what was sent in this round and in all."""
        found: dict[str, Any] = {
            name: float(v.mean()) for name, v in replies.metrics.items() if v.ndim == 1
        }
        for name, total in self.sent.items():
            found[name] = float(total - self._before[name])
            found[f"total_{name}"] = float(total)
        return MetricRecord(found)

    # A model that is trained first, and frozen

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sends the model to all clients: to train it, and at last to keep it."""
        frozen = server_round > self.params.pretrain
        message_type = "train.freeze" if frozen else "train"
        return self.ask(grid, message_type, config, {"arrays": to_tensors(arrays)})

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns the mean of the clients' models, weighted by their examples."""
        stacked = self.take(replies)
        if not stacked.node_ids:
            return None, None
        mean = stacked.mean("arrays", self.weights(stacked))
        return to_record(mean), mean_metrics(stacked)

    def _ignore(self, server_round: int, replies: Iterable[Message]) -> tuple[None, None]:
        return None, None

    # What is kept

    def state_dict(self) -> dict[str, Any]:
        """Returns what the search knows."""
        return {
            "spent": self.spent, "done": self.done, "sent": self.sent, "history": self.history,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores it."""
        self.spent, self.done = int(state["spent"]), bool(state["done"])
        self.sent = {name: int(n) for name, n in state["sent"].items()}
        self.history = [dict(phase) for phase in state["history"]]

    def artifacts(self, states: Callable[[], Mapping[str, Tensor]]) -> dict[str, dict[str, Any]]:
        """Returns bandit.npz.

        names, low, high, scale: (d,) of the axes; arity. depth, cell, mean, kept: (n,), the cells
        of all phases of all clients. client, best: (M,) and (M, d), the recommendations;
        own_client, own_depth, own_cell: (k,), the cells that each client still holds. optima:
        (M, d), where they are known.
        """
        axes = self.tree.axes
        found: dict[str, Any] = {
            "names": np.array([axis.name for axis in axes]),
            "low": np.array([axis.low for axis in axes]),
            "high": np.array([axis.high for axis in axes]),
            "scale": np.array([axis.scale for axis in axes]),
            "arity": np.array(self.params.arity),
        }
        phases = self.history
        found["depth"] = np.repeat([p["depth"] for p in phases], [len(p["cells"]) for p in phases])
        for name, key in (("cell", "cells"), ("mean", "mean"), ("kept", "kept")):
            found[name] = np.concatenate([np.zeros(0), *(np.asarray(p[key]) for p in phases)])
        own: dict[int, dict[str, Any]] = {}
        for key, tensor in states().items():
            client, _, name = key.partition("/")
            own.setdefault(int(client), {})[name] = tensor.numpy()
        clients = sorted(c for c, kept in own.items() if "learner/best" in kept)
        holding = [c for c in clients if "learner/cells" in own[c]]
        cells = [own[c]["learner/cells"] for c in holding]
        sizes = [len(each) for each in cells]
        found |= {
            "client": np.array(clients, np.int64),
            "best": np.array([own[c]["learner/best"] for c in clients]).reshape(-1, len(axes)),
            "own_client": np.repeat(np.array(holding, np.int64), sizes),
            "own_depth": np.repeat([int(own[c]["learner/depth"]) for c in holding], sizes),
            "own_cell": np.concatenate([np.zeros(0, np.int64), *cells]),
        }
        if self.optima is not None:
            found["optima"] = self.optima
        return {CELLS_FILE: found}


SILENT = ReplySchema({}, frozenset())
"""No arrays: metrics alone."""

REPORT = frozenset({"pulls"})


def search_exchange(strategy: Bandit, method: str, pulls: int, repeats: int = 1) -> Exchange:
    """Returns the exchange in which each client searches on alone: nothing is sent but metrics.

    method: pne, hct, random or tpe. pulls: those of a message, except for a phase of PNE.
    """

    def configure(
        server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        own = {"method": method, "pulls": pulls, "repeats": repeats}
        settings = {**config, **strategy.settings(server_round), **own}
        return strategy.ask(grid, "train.pull", settings, {})

    def aggregate(server_round: int, replies: Iterable[Message]) -> tuple[None, Any]:
        stacked = strategy.take(replies)
        if not stacked.node_ids:
            return None, None
        strategy.done = float(stacked.metrics["pulls"].min()) >= strategy.params.budget
        return None, strategy.measured(stacked)

    def schema(arrays: ArrayRecord) -> ReplySchema:
        return ReplySchema({}, REPORT)

    return Exchange("train.pull", configure, aggregate, schema, by_client=True)
