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

from fedsim.bandits.axes import Floats
from fedsim.bandits.cells import ROOT, Cells
from fedsim.bandits.rules import global_survivors
from fedsim.data import FederatedData
from fedsim.errors import Params, Problem, ScenarioError
from fedsim.messages import Replies
from fedsim.strategies.bandit import REPORT, Bandit, PhaseParams, search_exchange
from fedsim.strategies.base import Exchange, ReplySchema


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


class FedPNE(Bandit):
    """Phases of all clients; the server eliminates by the mean and recommends one point to all."""

    Params: ClassVar[type[Params]] = FedPNEParams
    params: PhaseParams

    def __init__(self, params: PhaseParams) -> None:
        super().__init__(params)
        self.depth = 0
        self.cells: Cells = ROOT
        self.best: tuple[int, int] | None = None
        """Depth and cell of the largest mean in the last complete phase."""
        self.mean: Floats = np.zeros(0)
        self.width = 0.0
        self.heard = 0
        """Clients whose means are in the phase's mean."""

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
        self.heard = len(good)
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

    def bind(self, client: Any, data: FederatedData) -> None:
        """Also sees that the budget is enough for a pilot."""
        super().bind(client, data)
        p, pulls = self.params, self.params.pilot_pulls * len(self._pilot)
        if self.delta is None and pulls >= p.budget:
            what = f"makes a pilot of {pulls} pulls, which is all of the budget of {p.budget}"
            hint = "Take fewer, a smaller pilot_depth, or say delta"
            raise ScenarioError([Problem("strategy.pilot_pulls", what, p.pilot_pulls, hint=hint)])

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

    @property
    def apart(self) -> float:
        """How far any client's function may be from the mean of those that were heard.

        Δ where all were. The mean of all but k of the M clients is up to Δ k / (M − k), and never
        more than Δ, from the mean of all.
        """
        assert self.delta is not None
        missing = self.clients - self.heard
        return self.delta * (1 + min(missing / self.heard, 1.0))

    def _send_mean(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        settings = {
            **config, **self.settings(server_round), "depth": self.depth, "width": self.width,
            "delta": self.apart,
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
        kept = stacked.arrays["survivors"]["kept"].any(0).numpy()
        if len(stacked.node_ids) < self.clients:  # whoever has no say keeps what the mean leaves it
            slack = self.confidence.smoothness(self.depth) + 2 * self.apart
            kept |= global_survivors(self.mean, self.width, slack)
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
