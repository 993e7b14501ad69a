"""Evaluates the global model on the server's splits; for a sampler, its posterior predictive."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedsim.grids.shards import Table
from fedsim.messages import Arrays
from fedsim.metrics import classification
from fedsim.models import FunctionalModel, Task

if TYPE_CHECKING:
    from fedsim.data import FederatedData

Floats = np.ndarray[Any, np.dtype[np.float64]]


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

    def absorb(self, arrays: Arrays) -> None:
        """Adds a draw, arrays of (chains, *shape), to the predictive averages."""
        for split, table in self.tables.items():
            mean = self._mean(self._members(arrays, True, table))
            old = self._sums.get(split)
            if old is None:
                self._sums[split] = mean
            else:
                logs = self.task.probabilities is None
                self._sums[split] = torch.logaddexp(old, mean) if logs else old + mean
        self.draws += 1

    def evaluate(self, arrays: Arrays, chains: bool) -> dict[str, dict[str, float]]:
        """Returns metrics by split. Classes: accuracy, nll, brier, ece (15 bins); otherwise the
        loss as nll and the task's metrics. On `ood` only the split's AUROCs against `test`.
        """
        results: dict[str, dict[str, float]] = {}
        predictive: dict[str, Floats] = {}
        for split, table in self.tables.items():
            members = self._members(arrays, chains, table)
            predictive[split] = self._predictive(split, members)
            if split == "ood":
                continue
            results[split] = self._scores(predictive[split], table)
            if self.task.probabilities is None:
                results[split] |= self._task_metrics(arrays, chains, table)
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
        """Returns by split the predictive probabilities p (n, C) and labels y (n,)."""
        if self.task.probabilities is None:
            return {}
        found = {}
        for split, table in self.tables.items():
            members = self._members(arrays, chains, table)
            found[split] = {"p": self._predictive(split, members), "y": table.y.numpy()}
        return found

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
        """Restores them."""
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

    def _members(self, arrays: Arrays, chains: bool, table: Table) -> Tensor:
        """Returns each member's probabilities (Q, n, C), or log-likelihoods of targets (Q, n).

        Logs, because a likelihood underflows where a loss is large.
        """
        members = split_chains(arrays) if chains else [arrays]
        scored = []
        with torch.no_grad():
            for member in members:
                parts = []
                for start in range(0, len(table), self.batch_size):
                    cut = slice(start, start + self.batch_size)
                    outputs = self.model.apply(member, table.x[cut])
                    if self.task.probabilities is not None:
                        parts.append(self.task.probabilities(outputs.double()))
                    else:
                        parts.append(-self.task.loss(outputs, table.y[cut]).double())
                scored.append(torch.cat(parts))
        return torch.stack(scored)

    def _scores(self, predictive: Floats, table: Table) -> dict[str, float]:
        if self.task.probabilities is not None:
            return classification.scores(predictive, table.y.numpy())
        return {"nll": float(-predictive.mean())}

    def _task_metrics(self, arrays: Arrays, chains: bool, table: Table) -> dict[str, float]:
        members = split_chains(arrays) if chains else [arrays]
        sums: dict[str, float] = {}
        with torch.no_grad():
            for member in members:
                outputs = self.model.apply(member, table.x)
                for name, metric in self.task.metrics.items():
                    value = float(metric(outputs, table.y).double().mean())
                    sums[name] = sums.get(name, 0.0) + value / len(members)
        return sums


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
