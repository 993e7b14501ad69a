"""A small set of components, so that these tests do not depend on the real ones."""

from typing import Annotated, Literal

from pydantic import Field

from fedsim.errors import Params
from fedsim.scenario import Components


class ToyData(Params):
    """Examples out of nowhere."""

    name: Literal["toy"] = "toy"
    rows: int = Field(default=100, ge=1, description="Number of rows.")
    ood: Literal["none", "corrupted"] = "none"


class FileData(Params):
    """Examples out of a file."""

    name: Literal["csv"] = "csv"
    path: str = Field(description="The file.")


class IID(Params):
    """Uniform at random."""

    name: Literal["iid"] = "iid"
    clients: int = Field(default=10, ge=1, description="Number of clients.")
    holdout: float = Field(default=0.0, ge=0, lt=1, description="Share held out, in [0, 1).")


class Dirichlet(Params):
    """Label skew."""

    name: Literal["dirichlet"] = "dirichlet"
    clients: int = Field(default=10, ge=1)
    alpha: float = Field(gt=0, description="Concentration, > 0.")


class Linear(Params):
    """A linear map."""

    name: Literal["linear"] = "linear"
    bias: bool = True


class MLP(Params):
    """Layers."""

    name: Literal["mlp"] = "mlp"
    hidden: tuple[int, ...] = (64,)
    kind: Literal["relu", "tanh"] = "relu"


class Classification(Params):
    """Classes."""

    name: Literal["classification"] = "classification"


class FedAvg(Params):
    """Weighted averages."""

    name: Literal["fedavg"]
    fraction: float = Field(default=1.0, gt=0, le=1, description="Share of the clients, in (0, 1].")


class FAHMC(Params):
    """Hamiltonian Monte Carlo."""

    name: Literal["fa-hmc"] = "fa-hmc"
    step_size: float = Field(gt=0, description="Step size η, > 0.")
    leapfrog_steps: int = Field(default=10, ge=1, description="K.")
    burn_in: int | Literal["auto"] = Field(
        default="auto", description="Rounds before the first draw."
    )
    betas: tuple[float, float] = (0.9, 0.99)


class SGDOptimizer(Params):
    """Plain steps."""

    name: Literal["sgd"] = "sgd"
    momentum: float = Field(default=0.0, ge=0, lt=1)


class AdamOptimizer(Params):
    """Adaptive steps."""

    name: Literal["adam"] = "adam"
    epsilon: float = Field(default=1e-8, gt=0)


class SGD(Params):
    """Local SGD."""

    name: Literal["sgd"] = "sgd"
    lr: float = Field(default=0.1, gt=0, description="Learning rate, > 0.")
    optimizer: Annotated[SGDOptimizer | AdamOptimizer, Field(discriminator="name")] = SGDOptimizer()


class OwnMethod:
    """What a user's package would hold."""

    Params = FAHMC


class BareMethod:
    """A user's class without a parameter model."""


COMPONENTS = Components(
    data={"toy": ToyData, "csv": FileData},
    partition={"iid": IID, "dirichlet": Dirichlet},
    model={"linear": Linear, "mlp": MLP, "custom": MLP},
    task={"classification": Classification},
    strategy={"fedavg": FedAvg, "fa-hmc": FAHMC},
    client={"sgd": SGD},
)
