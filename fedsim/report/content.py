"""What goes into a report, gathered by whoever ran the scenario."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedsim.bandits.axes import Axis
from fedsim.bandits.cells import CellTree
from fedsim.metrics.classification import Reliability
from fedsim.metrics.posterior import Diagnostics
from fedsim.report.runlike import RunLike

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PosteriorResult:
    """A label's posterior draws (of its first seed) and what the diagnostics say of them.

    draws: name → (chains, draws, *shape), for the traces; empty where they were not kept.
    of: what the scalars are: "weights", "predictive logits of 32 test images".
    """

    diagnostics: Diagnostics
    draws: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)
    of: str = "parameters"


@dataclass(frozen=True)
class ReferenceResult:
    """A posterior known by other means, and the draws that are compared with it.

    name: "NUTS on the pooled data", "closed form". reference: (m, d). draws: label → (n, d), the
    same d scalars. names: d.
    """

    name: str
    reference: Floats
    draws: Mapping[str, Floats]
    names: Sequence[str]


@dataclass(frozen=True)
class CellPicture:
    """The cells of a run, as its artifact bandit.npz holds them; see `Bandit.artifacts`."""

    arrays: Mapping[str, NDArray[np.generic]]

    @property
    def tree(self) -> CellTree:
        """The tree of cells; only their places in the unit box are needed."""
        a = self.arrays
        axes = [
            Axis(name=str(n), low=float(lo), high=float(hi), scale=str(s))  # type: ignore[arg-type]
            for n, lo, hi, s in zip(a["names"], a["low"], a["high"], a["scale"], strict=True)
        ]
        return CellTree(axes, int(a["arity"]))

    @property
    def drawable(self) -> bool:
        """Whether the box has one or two axes and there is a phase to be shown."""
        return len(self.arrays["names"]) in (1, 2) and len(np.unique(self.depths)) > 1

    @property
    def depths(self) -> NDArray[np.generic]:
        """The depths of all cells."""
        return np.concatenate([self.arrays["depth"], self.arrays["own_depth"]])


@dataclass(frozen=True)
class ReportInput:
    """Everything a report shows; a part that is empty or None is left out.

    runs: all labels and seeds. command: what reproduces them. scenario_yaml: the file as given.
    reliability, posteriors, cells (of bandits): by label. ood: label → (scores of known, scores of
    unknown inputs), higher meaning less certain; ood_score says what they are. partition: counts
    (c, classes) of c evenly spaced ones of `clients`, 0 for all. columns: "split/name" of the
    headline metrics, chosen from the runs if None. notes: sentences that a reader must know.
    """

    title: str
    runs: Sequence[RunLike]
    command: str
    scenario_yaml: str
    description: str = ""
    reliability: Mapping[str, Reliability] = field(default_factory=dict)
    ood: Mapping[str, tuple[Floats, Floats]] = field(default_factory=dict)
    ood_score: str = "Predictive entropy (nats)"
    posteriors: Mapping[str, PosteriorResult] = field(default_factory=dict)
    reference: ReferenceResult | None = None
    cells: Mapping[str, CellPicture] = field(default_factory=dict)
    partition: NDArray[np.integer] | None = None
    clients: int = 0
    class_names: Sequence[str] | None = None
    columns: Sequence[str] | None = None
    notes: Sequence[str] = ()
