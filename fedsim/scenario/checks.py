"""The checks that need several sections at once.

Each check is a function of the validated scenario that yields its mistakes; a new one is added to
CHECKS. Nothing here loads data or builds a model: that is found out when they are built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedsim.scenario.model import Scenario
from fedsim.scenario.problems import Mistake

SERVER_SPLITS = ("validation", "test", "ood")


def early_stopping_is_measured(scenario: Scenario) -> Iterator[Mistake]:
    """The metric that ends a run must be measured during it."""
    if scenario.early_stopping is None:
        return
    path = ("early_stopping", "metric")
    metric = scenario.early_stopping.metric
    split = metric.partition("/")[0]
    evaluate = scenario.evaluate
    if split in SERVER_SPLITS and evaluate.server_every == 0:
        hint = "Set evaluate.server_every to 1 or more"
        yield Mistake(path, "is never measured: the server does not evaluate", metric, hint)
    elif split in SERVER_SPLITS and split not in evaluate.splits:
        hint = f"Add {split} to evaluate.splits"
        yield Mistake(path, f"is never measured: split {split} is not evaluated", metric, hint)
    elif split == "client" and evaluate.clients_every == 0:
        hint = "Set evaluate.clients_every to 1 or more"
        yield Mistake(path, "is never measured: the clients do not evaluate", metric, hint)
    elif split == "ood" and getattr(scenario.data, "ood", None) == "none":
        yield Mistake(path, "is never measured: the data has no ood split", metric, "Set data.ood")


def clients_hold_rows_to_evaluate(scenario: Scenario) -> Iterator[Mistake]:
    """Clients evaluate on rows they hold out, so a partition must hold some out."""
    partition = scenario.partition
    given = getattr(partition, "name", None) == "given"  # the data may hold out rows by themselves
    holdout = getattr(partition, "holdout", None)
    if scenario.evaluate.clients_every > 0 and holdout == 0 and not given:
        message = "asks clients to evaluate, but they hold out no rows"
        hint = "Set partition.holdout above 0, or evaluate.clients_every to 0"
        yield Mistake(("evaluate", "clients_every"), message, hint=hint)


def model_and_task_belong_together(scenario: Scenario) -> Iterator[Mistake]:
    """Where a method needs neither, one of them alone means nothing."""
    if (scenario.model is None) != (scenario.task is None):
        given, missing = ("task", "model") if scenario.model is None else ("model", "task")
        yield Mistake((missing,), f"is missing beside {given}", hint="Give both, or neither")


def clusters_are_for_ray(scenario: Scenario) -> Iterator[Mistake]:
    """What is said of a cluster, or needs one, must not be ignored on the engine inline."""
    engine = scenario.engine
    if engine.name == "ray":
        return
    hint = "Set engine.name to ray, or leave it out"
    for key in ("address", "workers", "client_resources"):
        value = getattr(engine, key)
        if value != type(engine).model_fields[key].get_default(call_default_factory=True):
            yield Mistake(("engine", key), "is for the engine ray", value, hint)
    if scenario.deadline is not None:
        message = "needs the engine ray: nothing can be ended in this process"
        yield Mistake(("deadline",), message, scenario.deadline, hint)


CHECKS: tuple[Callable[[Scenario], Iterator[Mistake]], ...] = (
    early_stopping_is_measured,
    clients_hold_rows_to_evaluate,
    model_and_task_belong_together,
    clusters_are_for_ray,
)


def mistakes(scenario: Scenario) -> list[Mistake]:
    """Returns what every check finds."""
    return [mistake for check in CHECKS for mistake in check(scenario)]
