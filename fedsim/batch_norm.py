"""What a scenario cannot do with a model that has batch norm layers, found before the run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from flwr.serverapp import strategy as flower

from fedsim.clients.base import Client
from fedsim.errors import Problem
from fedsim.strategies.fedbuff import FedBuff
from fedsim.strategies.flower import unwrapped

if TYPE_CHECKING:
    from fedsim.setup import Setup

# Their results are not between what the clients sent: they overshoot, or add noise.
_OVERSHOOTING = (
    FedBuff,
    flower.FedAdagrad,
    flower.FedAdam,
    flower.FedAvgM,
    flower.FedYogi,
    flower.DifferentialPrivacyServerSideAdaptiveClipping,
    flower.DifferentialPrivacyServerSideFixedClipping,
    flower.DifferentialPrivacyClientSideAdaptiveClipping,
    flower.DifferentialPrivacyClientSideFixedClipping,
)


def objections(setup: Setup) -> Iterator[Problem]:
    """Yields why the model's batch norm layers do not go with the scenario's other sections."""
    client, model = setup.client, setup.model
    if not isinstance(client, Client):
        return
    if not model.batch_norms:
        if getattr(client.params, "batch_norm", "averaged") == "local":
            yield Problem("client.batch_norm", "the model has no batch norm layer", "local")
        return
    layer = model.batch_norms[0]
    if not client.trains_batch_norm:
        yield Problem(
            "model",
            f"batch norm layer {layer!r} mixes the examples of a batch, so that the loss of one"
            " example, and a posterior with it, is not defined; the client"
            f" {getattr(client.params, 'name', type(client).__name__)} cannot train it",
            hint="Use GroupNorm or LayerNorm",
        )
        return
    if client.local:
        yield from _local(setup)
    elif model.statistics:
        yield from _averaged(setup, layer)


def _local(setup: Setup) -> Iterator[Problem]:
    """The server has no complete model."""
    data, evaluate = setup.data, setup.scenario.evaluate
    given = {"validation": data.validation, "test": data.test, "ood": data.ood}
    splits = [s for s in evaluate.splits if (rows := given[s]) is not None and len(rows)]
    if evaluate.server_every and splits:
        yield Problem(
            "evaluate.server_every",
            f"the server cannot evaluate on {', '.join(splits)}: batch norm layers stay with the"
            " clients (client.batch_norm: local)",
            evaluate.server_every,
            hint="Set evaluate: {server_every: 0, clients_every: 1}",
        )


def _averaged(setup: Setup, layer: str) -> Iterator[Problem]:
    """Running variances must stay positive."""
    for part in unwrapped(setup.strategy):
        if isinstance(part, _OVERSHOOTING):
            yield Problem(
                "strategy",
                f"{type(part).__name__} would move the running variances of batch norm layer"
                f" {layer!r} as if they were parameters, so that they may become negative",
                hint="Use GroupNorm or LayerNorm, client.batch_norm: local, or FedAvg",
            )
