"""Searches without a federation, to compare with: each client maximises its objective alone.

pne is phased node elimination by one client, as PF-PNE's second stage; hct the high-confidence tree
of Azar, Lazaric, Brunskill, ICML 2014; random draws uniformly; tpe is Optuna's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from fedsim.bandits.rules import Confidence, log_term
from fedsim.data import FederatedData
from fedsim.strategies.bandit import Bandit, PhaseParams, search_exchange
from fedsim.strategies.base import Exchange


class LocalSearchParams(PhaseParams):
    """Each client alone; nothing is sent but what a simulation measures."""

    name: Literal["local-search"] = "local-search"
    method: Literal["pne", "hct", "random", "tpe"] = Field(
        "hct",
        description="pne and hct: trees of cells. random: uniform points. tpe: Optuna's TPE "
        "(pip install 'fedsim-fl[tuning]').",
    )
    pulls_per_round: int | None = Field(
        None,
        ge=1,
        description="Pulls between two reports, ≥ 1; empty: a twentieth of the budget. pne reports "
        "after each phase.",
    )
    repeats: int = Field(
        1, ge=1, description="Pulls that are averaged at each point of random and tpe, ≥ 1."
    )


class LocalSearch(Bandit):
    """Lets every client search on by itself, round after round, until its budget is spent."""

    Params = LocalSearchParams
    params: LocalSearchParams

    def bind(self, client: Any, data: FederatedData) -> None:
        """Also sees that what the method needs is installed."""
        super().bind(client, data)
        client.check_method(self.params.method)

    @property
    def confidence(self) -> Confidence:
        """Widths and numbers of pulls; L is over one client."""
        p = self.params
        return Confidence(log_term(p.budget, 1, p.failure), p.nu1, p.rho, p.c)

    def phase(self, server_round: int) -> Sequence[Exchange]:
        """Returns the one exchange of a round."""
        p = self.params
        pulls = p.pulls_per_round or max(-(-p.budget // 20), 1)
        return [search_exchange(self, p.method, pulls, p.repeats)]
