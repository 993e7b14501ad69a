"""Federated X-armed bandits: Fed-PNE, and its personalised form PF-PNE.

Fed-PNE: Li, Song, Honorio, "Federated X-armed Bandit" (arXiv 2205.15268). PF-PNE: the same authors,
"Personalized Federated X-armed Bandit", AISTATS 2024 (arXiv 2310.16323). Only the abstracts were at
hand: phases, widths, both eliminations, the change to the second stage and the recommendation are
reconstructed. What was found by us, and why it is sound, stands in fedsim/bandits/rules.py.

M clients share a tree of cells over a box; client m maximises a noisy black box f_m of its own, and
‖f_m − mean f‖ ≤ Δ. A phase at depth h, while ν1 ρ^h ≥ κ Δ:

    server  → the numbers of the cells K, and ⌈τ_h / M⌉
    clients → the means of as many pulls at each cell's centre
    server  → g, the mean of the means
    clients → which cells may hold their own optimum; K becomes the children of their union

Afterwards each client goes on alone, and nothing is sent. Fed-PNE has no second stage and no Δ: the
server drops cells by g, and recommends one point to all. The parameters are no model's: a run of a
bandit has none, or those of a model that is trained first, frozen, and then tuned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from pydantic import Field
from torch import Tensor

from fedsim.bandits.axes import Floats
from fedsim.bandits.cells import CELLS_FILE, ROOT, Cells, CellTree
from fedsim.bandits.rules import Confidence, global_survivors, log_term
from fedsim.data import FederatedData
from fedsim.errors import Params, UserError
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


class FedPNEParams(PhaseParams):
    """Fed-PNE: one optimum, of the mean of the clients' functions, for all."""

    name: Literal["fed-pne"] = "fed-pne"


class PFPNEParams(PhaseParams):
    """PF-PNE: an optimum for each client, found together as long as they agree."""

    name: Literal["pf-pne"] = "pf-pne"
    delta: float | None = Field(
        None,
        ge=0,
        description="Heterogeneity Δ ≥ 0, a bound of |f_m − mean f|. Too small a one may cost "
        "clients their optimum, too large a one costs pulls. Empty: estimated from a pilot.",
    )
    kappa: float = Field(
        1.0, gt=0, description="Clients go on alone once ν1 ρ^h < κ Δ; κ > 0, at least 1 is meant."
    )
    pilot_depth: int = Field(
        4, ge=0, le=16, description="Depth of the cells that a pilot pulls, where Δ is estimated."
    )
    pilot_pulls: int = Field(
        20,
        ge=2,
        description="Pulls of each of these cells by each client, ≥ 2; part of the budget.",
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
        found = {name: float(v.mean()) for name, v in replies.metrics.items() if v.ndim == 1}
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


class FedPNE(Bandit):
    """Phases of all clients; the server eliminates by the mean and recommends one point to all."""

    Params = FedPNEParams
    params: PhaseParams

    def __init__(self, params: PhaseParams) -> None:
        super().__init__(params)
        self.depth = 0
        self.cells: Cells = ROOT
        self.best: tuple[int, int] | None = None
        """Depth and cell of the largest mean in the last complete phase."""
        self.mean: Floats = np.zeros(0)
        self.width = 0.0

    @property
    def pulls(self) -> int:
        """Pulls of each cell by each client in a phase of this depth."""
        return self.confidence.pulls(self.depth, self.clients, self.params.min_pulls)

    @property
    def complete(self) -> bool:
        """Whether the budget is enough for all of this phase."""
        return self.spent + self.pulls * len(self.cells) <= self.params.budget

    def phase(self, server_round: int) -> Sequence[Exchange]:
        """Returns the one exchange of a phase: cells down, means up."""
        return [self.pull_exchange(self._eliminate)]

    def pull_exchange(self, judge: Callable[[], None], last: bool = True) -> Exchange:
        """Returns the exchange that pulls the cells; `judge` follows if the phase is complete.

        last: whether it ends the round, so that the clients' figures are logged with it.
        """

        def aggregate(server_round: int, replies: Iterable[Message]) -> tuple[None, Any]:
            stacked, complete = self.take(replies), self.complete
            if not stacked.node_ids:
                return None, None
            self.spent += min(self.pulls * len(self.cells), self.params.budget - self.spent)
            if complete:
                self._average(stacked)
                judge()
            else:
                self.done = True
            return None, self.measured(stacked)

        def schema(arrays: ArrayRecord) -> ReplySchema:
            n = (len(self.cells),)
            shapes = {"mean": (n, torch.float64), "good": (n, torch.int32)}
            return ReplySchema({"means": shapes} if self.complete else {}, REPORT)

        return Exchange("train.pull", self._send_cells, aggregate, schema, by_client=last)

    def _send_cells(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        settings = {
            **config, **self.settings(server_round), "depth": self.depth, "pulls": self.pulls,
            "reports": self.complete,
        }  # fmt: skip
        if self.best is not None:
            settings |= {"best-depth": self.best[0], "best": self.best[1]}
        cells = {"cells": {"cells": torch.from_numpy(self.cells)}}
        return self.ask(grid, "train.pull", settings, cells)

    def _average(self, replies: Replies) -> None:
        """Sets g and its width; g is NaN where some client has no good pull."""
        means = replies.arrays["means"]["mean"].numpy()
        good = replies.arrays["means"]["good"].numpy().astype(np.float64)
        judged = (good > 0).all(0)
        self.mean = np.where(judged, means.mean(0), np.nan)
        # the variance of a mean of means is that of len² / Σ 1/n pulls
        with np.errstate(divide="ignore"):
            pulls = len(good) ** 2 / (1 / good[:, judged]).sum(0)
        self.width = float(self.confidence.width(pulls.min(initial=np.inf)))

    def _eliminate(self) -> None:
        kept = global_survivors(self.mean, self.width, self.confidence.smoothness(self.depth))
        if not np.isnan(self.mean).all():
            self.best = self.depth, int(self.cells[np.nanargmax(self.mean)])
        self.split(kept)

    def split(self, kept: np.ndarray[Any, Any]) -> None:
        """Goes on with the children of the cells that were kept."""
        phase = {"depth": self.depth, "cells": self.cells, "mean": self.mean, "kept": kept}
        self.history.append(phase)
        below = self.tree.children(self.depth, self.cells[kept])
        if len(below):
            self.depth, self.cells = self.depth + 1, below
        else:  # the tree has no more depth: the survivors are pulled again
            self.cells = self.cells[kept]

    def state_dict(self) -> dict[str, Any]:
        """Returns what the search knows."""
        best = None if self.best is None else list(self.best)
        return {**super().state_dict(), "depth": self.depth, "cells": self.cells, "best": best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores it."""
        super().load_state_dict(state)
        self.depth, self.cells = int(state["depth"]), np.asarray(state["cells"])
        self.best = None if state["best"] is None else (state["best"][0], state["best"][1])


class PFPNE(FedPNE):
    """Phases of all clients while they agree, then each client alone."""

    Params = PFPNEParams
    params: PFPNEParams

    def __init__(self, params: PFPNEParams) -> None:
        super().__init__(params)
        self.delta = params.delta
        self.floor: float | None = None
        """What noise alone would make of an estimated Δ."""

    @property
    def together(self) -> bool:
        """Whether the next phase is one of all clients: while ν1 ρ^h ≥ κ Δ."""
        smoothness = self.confidence.smoothness(self.depth)
        return self.delta is not None and smoothness >= self.params.kappa * self.delta

    def phase(self, server_round: int) -> Sequence[Exchange]:
        """Returns a pilot where Δ is unknown, a phase of all clients, or one of each alone."""
        if self.delta is None:
            pull = Exchange(
                "train.pull", self._send_pilot, self._estimate, self._pilot_schema, by_client=True
            )
            return [pull]
        if not self.together:
            return [search_exchange(self, "pne", self.params.budget)]
        if not self.complete:
            return [self.pull_exchange(lambda: None)]
        eliminate = Exchange(
            "train.eliminate", self._send_mean, self._unite, self._flags, by_client=True
        )
        return [self.pull_exchange(lambda: None, last=False), eliminate]

    # Elimination

    def _send_mean(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        settings = {
            **config, **self.settings(server_round), "depth": self.depth, "width": self.width,
            "delta": self.delta,
        }  # fmt: skip
        mean = {"mean": {"mean": torch.from_numpy(self.mean)}}
        return self.ask(grid, "train.eliminate", settings, mean)

    def _flags(self, arrays: ArrayRecord) -> ReplySchema:
        kept = {"kept": ((len(self.cells),), torch.bool)}
        return ReplySchema({"survivors": kept}, REPORT)

    def _unite(self, server_round: int, replies: Iterable[Message]) -> tuple[None, Any]:
        stacked = self.take(replies)
        if not stacked.node_ids:
            return None, None
        kept = stacked.arrays["survivors"]["kept"].numpy().any(0)
        self.split(kept)
        return None, self.measured(stacked)

    # The pilot

    @property
    def _pilot(self) -> Cells:
        """The cells of the pilot's depth, in order."""
        cells = ROOT
        for depth in range(self.params.pilot_depth):
            cells = self.tree.children(depth, cells)
        return cells

    def _send_pilot(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        p = self.params
        settings = {
            **config, **self.settings(server_round), "depth": p.pilot_depth,
            "pulls": p.pilot_pulls, "reports": True,
        }  # fmt: skip
        return self.ask(
            grid, "train.pull", settings, {"cells": {"cells": torch.from_numpy(self._pilot)}}
        )

    def _pilot_schema(self, arrays: ArrayRecord) -> ReplySchema:
        n = (len(self._pilot),)
        shapes = {"mean": (n, torch.float64), "good": (n, torch.int32)}
        return ReplySchema({"means": shapes}, REPORT)

    def _estimate(self, server_round: int, replies: Iterable[Message]) -> tuple[None, Any]:
        """Takes for Δ the largest difference between a client's means and their mean.

        Noise makes it larger, which is the safe side.
        """
        stacked = self.take(replies)
        if not stacked.node_ids:
            return None, None
        p = self.params
        self.spent += min(p.pilot_pulls * len(self._pilot), p.budget)
        good = stacked.arrays["means"]["good"].numpy()
        means = np.where(good > 0, stacked.arrays["means"]["mean"].numpy(), np.nan)
        apart = np.abs(means - means.mean(0))
        self.delta = float(np.nanmax(apart)) if not np.isnan(apart).all() else math.inf
        self.floor = p.c * math.sqrt(2 * math.log(2 * apart.size) / p.pilot_pulls)
        return None, self.measured(stacked)

    def measured(self, replies: Replies) -> MetricRecord:
        """Adds Δ where it was estimated."""
        found = super().measured(replies)
        if self.floor is not None and self.delta is not None:
            found["delta"] = self.delta
        return found

    def notes(self) -> list[str]:
        """Says what Δ was estimated to be."""
        if self.floor is None or self.delta is None:
            return []
        return [
            f"Δ was estimated as {self.delta:.3g} from {len(self._pilot)} cells ×"
            f" {self.params.pilot_pulls} pulls; noise alone would give about {self.floor:.2g}"
        ]

    def state_dict(self) -> dict[str, Any]:
        """Returns what the search knows."""
        return {**super().state_dict(), "delta": self.delta, "floor": self.floor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores it."""
        super().load_state_dict(state)
        self.delta, self.floor = state["delta"], state["floor"]


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
