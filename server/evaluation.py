"""Evaluates the global model on the server's splits; for a sampler, its posterior predictive."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import RunFailed, UserError
from fedsim.grids.shards import Table
from fedsim.messages import Arrays
from fedsim.metrics import classification
from fedsim.models import FunctionalModel, Task

if TYPE_CHECKING:
    from fedsim.data import FederatedData

Floats = np.ndarray[Any, np.dtype[np.float64]]


class Scored(NamedTuple):
    """What a split's examples say of Q members of an ensemble.

    members: each one's probabilities (Q, n, C), or log-likelihoods of the targets (Q, n): logs,
    because a likelihood underflows where a loss is large. metrics: the task's, averaged over
    examples and members.
    """

    members: Tensor
    metrics: dict[str, float]


class Evaluator:
    """Scores parameters on validation, test and out-of-distribution examples.

    Parameters with a chain axis are an ensemble: class probabilities (or likelihoods) are averaged
    over its members. A sampler's are averaged over all draws so far, too; beside that predictive
    stand the means over single members, as sample_<metric>.
    """

    def __init__(
        self,
        model: FunctionalModel,
        task: Task,
        data: FederatedData,
        dtype: torch.dtype,
        splits: Sequence[str] = ("validation", "test", "ood"),
        batch_size: int = 1024,
    ) -> None:
        self.model, self.task, self.batch_size = model, task, batch_size
        cpu = torch.device("cpu")
        given = {"validation": data.validation, "test": data.test, "ood": data.ood}
        self.tables = {
            split: Table(examples, dtype, cpu)
            for split in splits
            if (examples := given[split]) is not None and len(examples)
        }
        self.draws = 0
        # by split: summed probabilities (n, C), or the log of the summed likelihoods (n,)
        self._sums: dict[str, Tensor] = {}
        # a draw that was absorbed is often evaluated next
        self._absorbed: tuple[Arrays, dict[str, Scored]] | None = None

    def absorb(self, arrays: Arrays) -> None:
        """Adds a draw, arrays of (chains, *shape), to the predictive averages."""
        scored = self._score(arrays, True)
        for split, (members, _) in scored.items():
            mean = self._mean(members)
            old = self._sums.get(split)
            if old is None:
                self._sums[split] = mean
            else:
                logs = self.task.probabilities is None
                self._sums[split] = torch.logaddexp(old, mean) if logs else old + mean
        self.draws += 1
        self._absorbed = arrays, scored

    def evaluate(self, arrays: Arrays, chains: bool) -> dict[str, dict[str, float]]:
        """Returns metrics by split. Classes: accuracy, nll, brier, ece (15 bins); otherwise the
        loss as nll and the task's metrics. On `ood` only the split's AUROCs against `test`.

        Raises RunFailed if a running variance of a batch norm layer is negative.
        """
        self._refuse_negative_variances(arrays)
        results: dict[str, dict[str, float]] = {}
        predictive: dict[str, Floats] = {}
        for split, (members, metrics) in self._score(arrays, chains).items():
            table = self.tables[split]
            predictive[split] = self._predictive(split, members)
            if split == "ood":
                continue
            results[split] = self._scores(predictive[split], table) | metrics
            if chains:
                single = [self._scores(m.numpy(), table) for m in members]
                results[split] |= {
                    f"sample_{name}": float(np.mean([s[name] for s in single]))
                    for name in single[0]
                }
        if self.task.probabilities is not None and {"ood", "test"} <= set(predictive):
            results["ood"] = ood_scores(predictive["test"], predictive["ood"])
        return results

    def predictions(self, arrays: Arrays, chains: bool) -> dict[str, dict[str, Floats]]:
        """Returns by split the predictive probabilities p (n, C) and labels y (n,).

        None without classes, and none where batch norm layers stay with the clients.
        """
        complete = {*self.model.shapes, *self.model.statistics} <= set(arrays)
        if self.task.probabilities is None or not complete:
            return {}
        return {
            split: {"p": self._predictive(split, members), "y": self.tables[split].y.numpy()}
            for split, (members, _) in self._score(arrays, chains).items()
        }

    def logits(self, arrays: Arrays, split: str, rows: int) -> Floats:
        """Returns the model's outputs (chains, rows, …) for the split's first rows."""
        x = self.tables[split].x[:rows]
        with torch.no_grad():
            outputs = [self.model.apply(member, x) for member in split_chains(arrays)]
        return torch.stack(outputs).double().numpy()

    def state_dict(self) -> tuple[Arrays, dict[str, Any]]:
        """Returns the predictive sums."""
        return dict(self._sums), {"draws": self.draws}

    def load_state_dict(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Restores them; raises UserError if they are of other examples."""
        for split, total in tensors.items():
            rows = len(self.tables[split]) if split in self.tables else 0
            if len(total) != rows:
                raise UserError(
                    f"the run cannot go on from its checkpoint: it has predictions of {len(total)}"
                    f" {split} rows, and the data now has {rows}"
                )
        self._sums, self.draws = dict(tensors), int(plain["draws"])

    def _mean(self, members: Tensor) -> Tensor:
        """Returns the mean over members (Q, n, …) of probabilities, or of exponentiated logs."""
        if self.task.probabilities is not None:
            return members.mean(0)
        return members.logsumexp(0) - math.log(len(members))

    def _predictive(self, split: str, members: Tensor) -> Floats:
        """Returns the average over all draws so far, or over these members if there are none."""
        if not self.draws:
            return self._mean(members).numpy()
        if self.task.probabilities is not None:
            return (self._sums[split] / self.draws).numpy()
        return (self._sums[split] - math.log(self.draws)).numpy()

    def _score(self, arrays: Arrays, chains: bool) -> dict[str, Scored]:
        """Returns what every split says of the arrays, in batches of `batch_size`."""
        if self._absorbed is not None and self._absorbed[0] is arrays:
            return self._absorbed[1]
        self._absorbed = None
        members = split_chains(arrays) if chains else [arrays]
        with torch.no_grad():
            return {split: self._score_table(members, t) for split, t in self.tables.items()}

    def _score_table(self, members: Sequence[Arrays], table: Table) -> Scored:
        task, scored = self.task, []
        probabilities = task.probabilities
        metrics = {} if probabilities is not None else task.metrics  # classes have more of them
        sums = dict.fromkeys(metrics, 0.0)
        for member in members:
            parts = []
            for start in range(0, len(table), self.batch_size):
                cut = slice(start, start + self.batch_size)
                outputs, y = self.model.apply(member, table.x[cut]), table.y[cut]
                if probabilities is not None:
                    parts.append(probabilities(outputs.double()))
                else:
                    parts.append(-task.loss(outputs, y).double())
                for name, metric in metrics.items():
                    sums[name] += float(metric(outputs, y).double().sum())
            scored.append(torch.cat(parts))
        count = len(table) * len(members)
        return Scored(torch.stack(scored), {name: total / count for name, total in sums.items()})

    def _refuse_negative_variances(self, arrays: Arrays) -> None:
        for name in {*self.model.statistics} & {*arrays}:
            if name.endswith(".running_var") and float(arrays[name].min()) < 0:
                raise RunFailed(
                    f"the running variance {name!r} has become negative"
                    f" ({float(arrays[name].min()):.3g}): the strategy must average it as FedAvg"
                    " does, or the model take GroupNorm or LayerNorm"
                )

    def _scores(self, predictive: Floats, table: Table) -> dict[str, float]:
        if self.task.probabilities is not None:
            return classification.scores(predictive, table.y.numpy())
        return {"nll": float(-predictive.mean())}


def metric_names(task: Task, split: str, chains: bool) -> set[str]:
    """Returns the names that `Evaluator.evaluate` gives the metrics of a split."""
    if split == "ood":
        return {"auroc_entropy", "auroc_max_probability"} if task.probabilities else set()
    scores = {"accuracy", "nll", "brier", "ece"} if task.probabilities else {"nll"}
    names = set(scores)
    if chains:
        names |= {f"sample_{name}" for name in scores}
    return names if task.probabilities else names | set(task.metrics)


def split_chains(arrays: Arrays) -> list[Arrays]:
    """Returns each chain's parameters."""
    count = len(next(iter(arrays.values())))
    return [{name: value[q] for name, value in arrays.items()} for q in range(count)]


def ood_scores(p_in: Floats, p_out: Floats) -> dict[str, float]:
    """Returns the AUROC of telling `p_out` from `p_in` (n, C) by entropy and by max probability."""
    return {
        "auroc_entropy": classification.auroc(
            classification.predictive_entropy(p_in), classification.predictive_entropy(p_out)
        ),
        "auroc_max_probability": classification.auroc(
            classification.max_probability_score(p_in),
            classification.max_probability_score(p_out),
        ),
    }
