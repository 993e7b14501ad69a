"""The sections of a scenario that are not components: engine, evaluation, checkpoints and so on."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedsim.errors import Params

Split = Literal["validation", "test", "ood"]

ENGINES = {
    "inline": "One process, vectorised cohorts, nothing serialised.",
    "ray": "The same cohorts, divided among the workers of a Ray cluster, with the same results.",
}

# A list of the file becomes a tuple: the sections are frozen, their items stay strictly typed.
Splits = Annotated[tuple[Split, ...], Field(strict=False)]
Partitions = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]


class ClientResources(Params):
    """What one worker of a cluster takes; fractions let several share a CPU or GPU."""

    cpus: float = Field(default=1.0, ge=0, le=4096, description="CPUs of a worker.")
    gpus: float = Field(
        default=0.0,
        ge=0,
        le=64,
        description="GPUs of a worker, such as 0.25 for four workers on one; with any, clients "
        "compute on it.",
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.cpus and not self.gpus:
            raise ValueError("a worker needs CPUs or GPUs: cpus and gpus cannot both be 0")
        return self


class EngineParams(Params):
    """Where and how the clients' work is computed."""

    name: Literal["inline", "ray"] = Field(
        default="inline",
        description="The engine. inline: one process, vectorised cohorts. ray: the same cohorts, "
        "divided among the workers of a Ray cluster, with the same results.",
    )
    address: str | None = Field(
        default=None,
        pattern=r"^(auto|[^\s:/]+:\d+|ray://[^\s:/]+:\d+)$",
        description="ray: the cluster's address, HOST:PORT, or auto for the one of this machine; "
        "empty: Ray is started on this machine for the run.",
    )
    workers: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="ray: worker processes; empty: as many as the cluster has room for. Results "
        "do not depend on it.",
    )
    client_resources: ClientResources = Field(
        default_factory=ClientResources, description="ray: what each worker takes of the cluster."
    )
    object_store_mb: int = Field(
        default=1000,
        ge=100,
        description="ray, without an address: memory that Ray's processes share on this machine, "
        "in MB.",
    )
    path: Literal["auto", "mapped", "one_by_one"] = Field(
        default="auto",
        description="`mapped` computes many clients in one call, `one_by_one` each on its own; "
        "`auto` decides from the shapes and writes the choice into the resolved run.",
    )
    chunk: int | None = Field(
        default=None,
        ge=1,
        description="Clients in one mapped call; empty: decided from the shapes. Another value "
        "adds in another order, so that the last bits of results change.",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="CPU threads; empty: decided from the machine. Results do not depend on it.",
    )
    dtype: Literal["float32", "float64"] = Field(
        default="float32", description="Floating-point type of parameters and features."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        default="auto",
        description="Where clients compute; `auto` takes an accelerator if there is one.",
    )
    trace: bool = Field(
        default=True,
        description="Trace and simplify a client's step (faster); false runs it eagerly.",
    )
    state_budget_mb: int = Field(
        default=1024,
        ge=1,
        description="Memory for what clients keep between rounds, in MiB; beyond it the states of "
        "the clients asked least recently go to a temporary file, in the folder TMPDIR names.",
    )


OF_CLUSTER = frozenset({"address", "workers"})
"""The fields of EngineParams that say which cluster the engine ray uses, and how much of it."""

MOVABLE = OF_CLUSTER | {"name", "threads", "state_budget_mb", "object_store_mb"}
"""The fields of EngineParams that change no number: a stored run may go on with others of them."""


class EvaluateParams(Params):
    """How often the global model is evaluated, and on what."""

    server_every: int = Field(
        default=1, ge=0, description="Rounds between evaluations on the server's splits; 0: never."
    )
    clients_every: int = Field(
        default=0,
        ge=0,
        description="Rounds between evaluations on the clients' held-out rows, or on the rows they "
        "train on where none are held out; 0: never.",
    )
    batch_size: int = Field(default=1024, ge=1, description="Examples in one forward pass.")
    splits: Splits = Field(
        default=("validation", "test", "ood"),
        description="The server's splits that are evaluated; those the data lacks are skipped.",
    )


class EarlyStopping(Params):
    """Ends a run when a metric has not improved for a number of its evaluations."""

    metric: str = Field(
        default="validation/nll",
        pattern=r"^(train|client|validation|test|ood)/[A-Za-z0-9_.@-]+$",
        description="What is watched, as split/name; the split is one of train, client, "
        "validation, test, ood.",
    )
    mode: Literal["min", "max"] = Field(
        default="min", description="Whether less or more is better."
    )
    patience: int = Field(
        default=10, ge=1, description="Evaluations without improvement before the end."
    )
    min_delta: float = Field(
        default=0.0, ge=0, description="Smallest change that is an improvement."
    )
    restore_best: bool = Field(
        default=True,
        description="End with the parameters of the best evaluation, not of the last one.",
    )


class ClockParams(Params):
    """A simulated clock: clients take as long as their speeds say, and nothing waits in reality.

    A client's time for a message is the network's, plus seconds + seconds_per_example · examples,
    divided by its speed; examples are those in the minibatches that it computes.
    """

    seconds_per_example: float = Field(
        default=0.001,
        ge=0,
        description="Seconds that the median client computes for an example of a minibatch, ≥ 0.",
    )
    seconds: float = Field(
        default=0.0,
        ge=0,
        description="Seconds that the median client needs for a message beside that, ≥ 0.",
    )
    latency: float = Field(
        default=0.0,
        ge=0,
        description="Seconds that a message and its reply are on the way together, ≥ 0.",
    )
    megabytes_per_second: float | None = Field(
        default=None,
        gt=0,
        description="Bandwidth of a client in each direction, in 10^6 bytes a second, > 0; a reply"
        " is taken to be as large as its message. Empty: no limit.",
    )
    speeds: Literal["lognormal", "equal"] = Field(
        default="lognormal",
        description="The clients' speeds, drawn once for the run's seed: log-normal with median 1,"
        " or all 1.",
    )
    sigma: float = Field(
        default=1.0,
        ge=0,
        description="Standard deviation σ of the logarithm of log-normal speeds, ≥ 0.",
    )
    jitter: float = Field(
        default=0.0,
        ge=0,
        description="Standard deviation of the logarithm of a factor that is drawn anew for each"
        " message, ≥ 0.",
    )
    deadline: float | None = Field(
        default=None,
        gt=0,
        description="Seconds on this clock after which an exchange of a synchronous round waits for"
        " no reply, > 0; clients that would take longer count as failed. Empty: it waits for all.",
    )


class CheckpointParams(Params):
    """How often the state of a run is saved, so that it can be resumed."""

    every_rounds: int = Field(
        default=10, ge=0, description="Rounds between checkpoints; 0: not by rounds."
    )
    every_seconds: float | None = Field(
        default=None, gt=0, description="Seconds between checkpoints; empty: not by the clock."
    )
    keep: int = Field(default=2, ge=1, description="Newest checkpoints that are kept.")
    keep_every: int = Field(
        default=0,
        ge=0,
        description="Beside the newest, the first checkpoint of every so many rounds is kept for "
        "good; 0: none.",
    )


class PosteriorParams(Params):
    """What is kept and checked of a method that draws from a posterior."""

    probes: int = Field(
        default=32,
        ge=0,
        description="Examples whose predictive logits are followed for R-hat and ESS.",
    )
    r_hat_threshold: float = Field(
        default=1.01,
        gt=1,
        description="Rank R-hat above which a quantity is flagged as not converged.",
    )
    save_draws: Literal["thinned", "none"] = Field(
        "thinned",
        description="thinned: the draws after burn-in, as the strategy's thinning says; none: only "
        "their predictive averages.",
    )
    reference: Literal["none", "nuts", "closed_form"] = Field(
        default="none", description="The posterior that the draws are compared with."
    )


class Fault(Params):
    """Which replies go wrong: give one of rate, fraction and clients."""

    rate: float | None = Field(
        default=None, gt=0, le=1, description="Probability for each reply, in (0, 1]."
    )
    fraction: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Fraction of the clients, in (0, 1], drawn once, whose replies all go wrong.",
    )
    clients: Partitions | None = Field(
        default=None, min_length=1, description="The clients whose replies all go wrong."
    )

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        if [self.rate, self.fraction, self.clients].count(None) != 2:
            raise ValueError("takes exactly one of rate, fraction and clients")
        return self


class Corrupt(Fault):
    """Replies that are damaged on their way."""

    how: Literal["shape", "bits"] = Field(
        default="shape",
        description="`shape`: the first array of a record loses its last number. `bits`: numbers "
        "have one of their bits flipped; those that stay finite are not noticed.",
    )
    share: float = Field(
        default=0.01,
        gt=0,
        le=1,
        description="With `bits`: the probability for each number, in (0, 1].",
    )


class SignFlip(Fault):
    """Clients that work against the others: what they send is their update, turned round."""

    scale: float = Field(
        default=1.0, gt=0, description="Factor s > 0: x + Δ becomes x − s · Δ, where x was sent."
    )


class FaultsParams(Params):
    """What goes wrong with replies to training messages, on purpose."""

    seed: int | None = Field(
        default=None, ge=0, description="Seed of the faults; empty: that of the run."
    )
    drop: Fault | None = Field(default=None, description="Replies that never arrive.")
    delay: Fault | None = Field(
        default=None, description="Replies that miss their round, and are not used."
    )
    corrupt: Corrupt | None = Field(default=None, description="Replies that arrive damaged.")
    nan: Fault | None = Field(default=None, description="Replies whose arrays are NaN.")
    sign_flip: SignFlip | None = Field(
        default=None, description="Replies of Byzantine clients, which turn their update round."
    )
