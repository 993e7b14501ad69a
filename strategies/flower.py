"""Flower's own strategies in a scenario: their parameters, what their clients must do, their state.

`strategy: {name: FedAdam, eta: 0.01}` names any class of flwr.serverapp.strategy; a DP wrapper
nests the strategy it wraps. Their state for checkpoints is read from the attributes listed here,
because Flower's strategies cannot be saved.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp import strategy as flower
from pydantic import Field, SerializeAsAny, create_model, field_validator
from torch import Tensor

from fedsim.errors import Params, UserError
from fedsim.messages import Arrays, to_tensors
from fedsim.strategies.base import Exchange, ReplySchema, Strategy, sample_size

DEFAULT_CLIENT = "sgd"
"""Serves a strategy of Flower's when the scenario names no client."""

# Attributes that change from round to round, by the class that introduces them.
_STATE: dict[type, tuple[str, ...]] = {
    flower.FedAdagrad: ("m_t", "v_t"),
    flower.FedAdam: ("m_t", "v_t"),
    flower.FedYogi: ("m_t", "v_t"),
    flower.FedAvgM: ("momentum_vector", "current_arrays"),
    flower.DifferentialPrivacyServerSideAdaptiveClipping: ("clipping_norm",),
    flower.DifferentialPrivacyClientSideAdaptiveClipping: ("clipping_norm",),
}

# What a client has to do for a strategy: a setting it honours or a metric it reports, and why.
_DEMANDS: dict[str, tuple[str, str]] = {
    "FedProx": ("proximal-mu", "only sends proximal-mu; the client must add the proximal term"),
    "QFedAvg": (
        "initial-train-loss",
        "needs each client's loss at the received parameters; the mean loss along the local steps"
        " is not that",
    ),
    "DifferentialPrivacyClientSideFixedClipping": (
        "clipping_norm",
        "only sends the norm; the client must clip its update (Flower's fixedclipping_mod)",
    ),
    "DifferentialPrivacyClientSideAdaptiveClipping": (
        "clipping_norm",
        "only sends the norm; the client must clip its update and report whether it did"
        " (Flower's adaptiveclipping_mod)",
    ),
    "FedXgbBagging": ("xgboost", "exchanges XGBoost trees as bytes, not a model's parameters"),
    "FedXgbCyclic": ("xgboost", "exchanges XGBoost trees as bytes, not a model's parameters"),
}

_SCALARS = (int, float, str, bool)


def flower_classes() -> dict[str, type[flower.Strategy]]:
    """Returns Flower's concrete strategies by class name."""
    found = {}
    for name in flower.__all__:
        kind = getattr(flower, name)
        concrete = inspect.isclass(kind) and not inspect.isabstract(kind)
        if concrete and issubclass(kind, flower.Strategy):
            found[name] = kind
    return found


class _FlowerParams(Params):
    """Base of the parameters of Flower's strategies."""

    @field_validator("strategy", mode="before", check_fields=False)
    @classmethod
    def _parse_nested(cls, value: object) -> object:
        return parse_flower(value) if isinstance(value, (str, Mapping)) else value


@cache
def flower_params() -> dict[str, type[Params]]:
    """Returns a parameter model for each of Flower's strategies, made from its signature.

    Parameters that are functions or objects cannot be written in YAML and are left out; a required
    strategy (of a DP wrapper) becomes a nested section.
    """
    return {name: _model(name, kind) for name, kind in flower_classes().items()}


def _model(name: str, kind: type[flower.Strategy]) -> type[Params]:
    fields: dict[str, Any] = {"name": (Literal[name], name)}
    hints = typing.get_type_hints(kind.__init__)
    for parameter in list(inspect.signature(kind.__init__).parameters.values())[1:]:
        hint = hints.get(parameter.name, Any)
        doc = f"{name}'s {parameter.name}; see Flower's documentation of it."
        required = parameter.default is inspect.Parameter.empty
        if parameter.name == "strategy":
            fields["strategy"] = (SerializeAsAny[Params], Field(description="What is wrapped."))
        elif _plain(hint):
            default = ... if required else parameter.default
            fields[parameter.name] = (hint, Field(default, description=doc))
    model = create_model(f"{name}Params", __base__=_FlowerParams, **fields)
    model.__doc__ = f"Flower's {name}."
    return model


def _plain(hint: Any) -> bool:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return all(arg is type(None) or arg in _SCALARS for arg in typing.get_args(hint))
    return hint in _SCALARS


def parse_flower(value: str | Mapping[str, Any]) -> Params:
    """Returns the parameters of a nested strategy; raises ValueError with what is wrong."""
    section = {"name": value} if isinstance(value, str) else dict(value)
    name = section.get("name")
    if name not in flower_params():
        raise ValueError(
            f"must name one of Flower's strategies ({', '.join(flower_params())}), not {name!r}"
        )
    return flower_params()[str(name)](**section)


def build_flower(params: Params) -> flower.Strategy:
    """Returns Flower's strategy; raises UserError if its constructor refuses the parameters."""
    arguments = {name: getattr(params, name) for name in type(params).model_fields}
    kind = flower_classes()[arguments.pop("name")]
    if isinstance(arguments.get("strategy"), Params):
        arguments["strategy"] = build_flower(arguments["strategy"])
    try:
        return kind(**arguments)
    except (ValueError, TypeError) as error:
        raise UserError(f"strategy {kind.__name__}: {error}") from error


def objections(
    strategy: flower.Strategy,
    honours: frozenset[str],
    num_nodes: int,
    requires: frozenset[str] = frozenset(),
) -> list[str]:
    """Returns why the strategy cannot be served by a client that honours `honours`.

    requires: the message settings that the client cannot do without.
    """
    found = []
    sent = strategy.sends if isinstance(strategy, Strategy) else frozenset()
    if lacking := sorted(requires - sent):
        found.append(
            f"{type(strategy).__name__} does not send {', '.join(lacking)}, which the client needs"
        )
    if isinstance(strategy, Strategy):
        missing = sorted(strategy.sends - honours)
        if missing:
            found.append(f"the client does not honour {', '.join(missing)}")
        return found + strategy.objections(num_nodes)
    if (key := weight_key(strategy)) not in honours | {"num-examples"}:
        found.append(f"the client does not report {key} (weighted_by_key)")
    for part in unwrapped(strategy):
        name = type(part).__name__
        for parent in type(part).__mro__:
            demand = _DEMANDS.get(parent.__name__)
            if demand and demand[0] not in honours:
                found.append(f"{name} {demand[1]}; the chosen client does not")
                break
        found += _too_few_nodes(part, num_nodes)
    return found


def _too_few_nodes(strategy: flower.Strategy, num_nodes: int) -> list[str]:
    """Returns why the federation is too small: Flower would wait forever, or never aggregate."""
    name, found = type(strategy).__name__, []
    sampled, needed = 0, int(getattr(strategy, "min_available_nodes", 0))
    for phase in ("train", "evaluate"):
        fraction = float(getattr(strategy, f"fraction_{phase}", 0.0))
        if not 0 <= fraction <= 1:
            found.append(f"{name}.fraction_{phase} must be in [0, 1], not {fraction:g}")
            continue
        size = _sample_size(strategy, phase, num_nodes)
        sampled = size if phase == "train" else sampled
        needed = max(needed, size)
    if needed > num_nodes:
        found.append(
            f"{name} waits for {needed} nodes (min_available_nodes, min_train_nodes,"
            f" min_evaluate_nodes), but there are {num_nodes} clients"
        )
    malicious = int(getattr(strategy, "num_malicious_nodes", 0))
    if isinstance(strategy, flower.Bulyan) and sampled < 4 * malicious + 3:
        found.append(
            f"Bulyan against {malicious} malicious nodes needs 4·{malicious} + 3 ="
            f" {4 * malicious + 3} replies a round, but {sampled} nodes are sampled"
        )
    return found


def _sample_size(strategy: flower.Strategy, phase: str, num_nodes: int) -> int:
    """Returns how many nodes a strategy of Flower's samples for `train` or `evaluate`."""
    fraction = float(getattr(strategy, f"fraction_{phase}", 0.0))
    least = int(getattr(strategy, f"min_{phase}_nodes", 0))
    return max(int(num_nodes * fraction), least) if fraction else 0


def cohort_size(strategy: flower.Strategy, num_nodes: int) -> int | None:
    """Returns how many nodes train each round; None where the strategy has a way of its own."""
    if isinstance(strategy, Strategy):
        kind = type(strategy)
        own = (kind.configure_train, kind.sample) != (Strategy.configure_train, Strategy.sample)
        return None if own else sample_size(strategy.common.fraction_train, num_nodes)
    inner = unwrapped(strategy)[-1]
    return _sample_size(inner, "train", num_nodes) if hasattr(inner, "fraction_train") else None


def unwrapped(strategy: flower.Strategy) -> list[flower.Strategy]:
    """Returns the strategy and those it wraps, from the outside in."""
    chain = [strategy]
    while isinstance(inner := getattr(chain[-1], "strategy", None), flower.Strategy):
        chain.append(inner)
    return chain


def weight_key(strategy: flower.Strategy) -> str:
    """Returns the metric that the strategy weights replies by."""
    return str(getattr(unwrapped(strategy)[-1], "weighted_by_key", "num-examples"))


def exchanges_of(strategy: flower.Strategy, server_round: int) -> Sequence[Exchange]:
    """Returns the exchanges of a round; a strategy of Flower's has one."""
    if isinstance(strategy, Strategy):
        return strategy.exchanges(server_round)
    key = weight_key(strategy)
    schema = ReplySchema(None, frozenset({key}), key)
    return [
        Exchange("train", strategy.configure_train, strategy.aggregate_train, lambda arrays: schema)
    ]


# State. A value becomes a tag (kept as JSON) and tensors.


def strategy_state(strategy: flower.Strategy) -> tuple[Arrays, dict[str, Any]]:
    """Returns the strategy's state as tensors and a JSON-able dict."""
    tensors: Arrays = {}
    plain: dict[str, Any] = {}
    for level, part in enumerate(unwrapped(strategy)):
        for name, value in _state_of(part).items():
            plain[f"{level}.{name}"] = _encode(f"{level}.{name}", value, tensors)
    return tensors, plain


def load_strategy_state(
    strategy: flower.Strategy, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]
) -> None:
    """Restores what `strategy_state` returned.

    Raises UserError for a strategy whose state nobody knows how to save.
    """
    parts = unwrapped(strategy)
    states: dict[int, dict[str, Any]] = {level: {} for level in range(len(parts))}
    for key, tag in plain.items():
        number, _, name = key.partition(".")
        states[int(number)][name] = _decode(key, tag, tensors)
    for level, part in enumerate(parts):
        if hasattr(part, "load_state_dict"):
            if states[level]:
                part.load_state_dict(states[level])
        elif not resumable(part):
            raise UserError(
                f"strategy {type(part).__name__} cannot be resumed: it has no state_dict() and"
                " load_state_dict(); add them, or start anew"
            )
        else:
            for name, value in states[level].items():
                setattr(part, name, value)


def resumable(strategy: flower.Strategy) -> bool:
    """Says whether the strategy's state can be saved: it is ours, known, or saves itself."""
    return hasattr(strategy, "state_dict") or type(strategy) in flower_classes().values()


def _state_of(strategy: flower.Strategy) -> dict[str, Any]:
    if hasattr(strategy, "state_dict"):
        return dict(strategy.state_dict())
    return {name: getattr(strategy, name) for name in _STATE.get(type(strategy), ())}


def _encode(key: str, value: Any, tensors: Arrays) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):  # NumPy turns 0-d results into scalars
        tensors[key] = torch.from_numpy(np.array(value))
        return {"is": "ndarray"}
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"is": "tensor"}
    if isinstance(value, ArrayRecord):
        tensors.update({f"{key}/{name}": t for name, t in to_tensors(value).items()})
        return {"is": "record", "keys": list(value)}
    if isinstance(value, Mapping):
        return {
            "is": "dict",
            "items": {name: _encode(f"{key}/{name}", v, tensors) for name, v in value.items()},
        }
    if isinstance(value, (list, tuple)):
        return {
            "is": "list",
            "items": [_encode(f"{key}/{i}", v, tensors) for i, v in enumerate(value)],
        }
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"is": "value", "value": value}
    raise TypeError(f"strategy state {key!r} is a {type(value).__name__}; save tensors and numbers")


def _decode(key: str, tag: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    kind = tag["is"]
    if kind == "ndarray":
        return tensors[key].numpy()
    if kind == "tensor":
        return tensors[key]
    if kind == "record":
        record = ArrayRecord()
        for name in tag["keys"]:
            record[name] = Array(tensors[f"{key}/{name}"].numpy())
        return record
    if kind == "dict":
        return {name: _decode(f"{key}/{name}", v, tensors) for name, v in tag["items"].items()}
    if kind == "list":
        return [_decode(f"{key}/{i}", v, tensors) for i, v in enumerate(tag["items"])]
    return tag["value"]
