"""Gives a strategy the state that a checkpoint holds, if it is the checkpoint of such a run.

A run is resumed with the code that is there then. If that has changed since the run began, another
strategy or other shapes of parameters would fail far from the cause, or, worse, would not fail.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.serverapp.strategy import Strategy as FlowerStrategy
from torch import Tensor

from fedsim.errors import UserError
from fedsim.messages import Arrays
from fedsim.strategies.flower import load_strategy_state, resumable, unwrapped

PARTS = ("round", "totals", "best", "order", "strategies", "strategy")


def restore_strategy(
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, Any],
    strategy: FlowerStrategy,
    arrays: Arrays,
) -> None:
    """Loads the strategy's state; raises UserError if the run cannot go on from the checkpoint.

    tensors, plain: what `RoundLoop.save` saved. arrays: the parameters of round 0, as the scenario
    makes them now.
    """
    if unknown := [type(part).__name__ for part in unwrapped(strategy) if not resumable(part)]:
        raise UserError(
            f"strategy {unknown[0]} cannot be resumed: it has no state_dict() and"
            " load_state_dict(); add them, or start anew"
        )
    problem = _misfit(tensors, plain, strategy, arrays)
    if problem is None:
        try:
            load_strategy_state(strategy, _part(tensors, "strategy"), plain["strategy"])
        except Exception as error:  # whatever a strategy raises at a state that is not its own
            reason = f"{type(error).__name__}: {error}"
            problem = f"strategy {names_of(strategy)[0]} does not take its state ({reason})"
    if problem is not None:
        raise UserError(
            f"the run cannot go on from its checkpoint: {problem}. The code has changed since the"
            " run began: go back to that code, or start the run anew"
        )


def names_of(strategy: FlowerStrategy) -> list[str]:
    """Returns the class of the strategy and of those it wraps, from the outside in."""
    return [type(part).__qualname__ for part in unwrapped(strategy)]


def _misfit(
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, Any],
    strategy: FlowerStrategy,
    arrays: Arrays,
) -> str | None:
    if missing := [part for part in PARTS if part not in plain]:
        return f"it lacks {', '.join(missing)}"
    then, now = plain["strategies"], names_of(strategy)
    if then != now:
        return f"it is of the strategy {_chain(then)}, and the run now has {_chain(now)}"
    saved = _part(tensors, "arrays")
    if set(saved) != set(arrays):
        different = sorted(set(saved) ^ set(arrays))
        return f"it and the model differ in the arrays {', '.join(different[:5])}"
    for name, value in arrays.items():
        if _form(saved[name]) != _form(value):
            return f"{name!r} is {_form(saved[name])} there, and {_form(value)} in the model now"
    return None


def _part(tensors: Mapping[str, Tensor], part: str) -> Arrays:
    prefix = f"{part}/"
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _chain(names: list[str]) -> str:
    return " around ".join(names)
