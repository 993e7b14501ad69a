"""Whether chains agree and how many independent draws they are worth: R-hat, ESS, MCSE per scalar.

The definitions are ArviZ's: Vehtari, Gelman, Simpson, Carpenter, Bürkner, "Rank-normalization,
folding, and localization: an improved R-hat", Bayesian Analysis 2021.

ArviZ loops over scalars, about 2 ms each; the 7,850 weights of a softmax regression would take
15 s. Above `limit` scalars the diagnosed ones are therefore a deterministic subset: one half are
those with the largest split R-hat, which is cheap and computed for all of them, the other half
are evenly spaced over the rest.

None of this can see a bias that all chains share: see `fedsim.metrics.distances`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsim.metrics import _arviz

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]

LIMIT = 2000
RHAT_GOOD = 1.01
ESS_GOOD_PER_CHAIN = 100
MIN_DRAWS = 4
MIN_CHAINS = 2
CHUNK = 256  # scalars at a time: bounds the float64 copies, not the result


@dataclass(frozen=True)
class Diagnostics:
    """Convergence figures of the diagnosed scalars; every array is (k,), aligned with `names`.

    names: "weight[3, 14]", … — the diagnosed scalars, all of them finite and varying.
    rhat ≥ 1; ess_bulk, ess_tail in draws; mcse_mean, mcse_sd, mean, sd in the parameter's unit.
    total: scalars in the posterior. constant, nonfinite: those that cannot be diagnosed because
    they never move, or hold a NaN or an infinity. split_rhat_max: over all that can be, NaN if
    none. With fewer than 2 chains or 4 draws a chain R-hat, ESS and MCSE are NaN.
    """

    chains: int
    draws: int
    total: int
    names: tuple[str, ...]
    rhat: Floats
    ess_bulk: Floats
    ess_tail: Floats
    mcse_mean: Floats
    mcse_sd: Floats
    mean: Floats
    sd: Floats
    constant: tuple[str, ...]
    nonfinite: tuple[str, ...]
    split_rhat_max: float
    rhat_good: float = RHAT_GOOD

    @property
    def candidates(self) -> int:
        """Scalars that vary and are finite: those that could be diagnosed."""
        return self.total - len(self.constant) - len(self.nonfinite)

    @property
    def converged(self) -> bool:
        """Whether every diagnosed scalar has R-hat ≤ `rhat_good` and ESS ≥ 100 a chain."""
        return bool(self.names) and not self.nonfinite and not self._slow().any()

    def worst(self, n: int = 10) -> pd.DataFrame:
        """Returns the `n` rows of `frame()` with the largest R-hat, NaN first."""
        return (
            self.frame()
            .sort_values("rhat", ascending=False, na_position="first", kind="stable")
            .head(n)
        )

    def frame(self) -> pd.DataFrame:
        """Returns one row per diagnosed scalar, indexed by its name."""
        import pandas as pd

        columns = ("rhat", "ess_bulk", "ess_tail", "mcse_mean", "mcse_sd", "mean", "sd")
        data = {column: getattr(self, column) for column in columns}
        return pd.DataFrame(data, index=pd.Index(self.names, name="parameter"))

    def summary(self) -> dict[str, float]:
        """Returns the worst figures and the counts, for a metrics table or a summary file."""
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = self.mcse_mean / self.sd
        return {
            "rhat_max": _worst(self.rhat, np.max),
            "rhat_median": _worst(self.rhat, np.median),
            "ess_bulk_min": _worst(self.ess_bulk, np.min),
            "ess_bulk_median": _worst(self.ess_bulk, np.median),
            "ess_tail_min": _worst(self.ess_tail, np.min),
            "mcse_mean_max_sd": _worst(relative, np.max),
            "rhat_above_limit": float((self.rhat > self.rhat_good).sum()),
            "scalars": float(self.total),
            "scalars_diagnosed": float(len(self.names)),
            "constant": float(len(self.constant)),
            "nonfinite": float(len(self.nonfinite)),
        }

    def flags(self) -> list[str]:
        """Returns a sentence for everything that has not converged or cannot be judged."""
        return list(self._problems())

    def _slow(self) -> NDArray[np.bool_]:
        """Which scalars fail; a NaN figure fails."""
        enough = ESS_GOOD_PER_CHAIN * self.chains
        good = (self.rhat <= self.rhat_good) & (self.ess_bulk >= enough) & (self.ess_tail >= enough)
        return ~good

    def _problems(self) -> Iterator[str]:
        k = len(self.names)
        if self.nonfinite:
            yield (
                f"{len(self.nonfinite)} of {self.total} scalars hold NaN or infinity: the "
                f"sampler diverged ({_some(self.nonfinite)})."
            )
        if self.constant:
            yield (
                f"{len(self.constant)} of {self.total} scalars never move, so R-hat and ESS do "
                f"not exist for them ({_some(self.constant)})."
            )
        if self.chains < MIN_CHAINS or self.draws < MIN_DRAWS:
            yield f"{self.chains} chain(s) of {self.draws} draws are too few for R-hat and ESS."
            return
        if self.chains < 4:
            yield f"Only {self.chains} chains: R-hat wants at least 4."
        high = self.rhat > self.rhat_good
        if high.any():
            at = int(np.argmax(np.where(high, self.rhat, -np.inf)))
            yield (
                f"R-hat is above {self.rhat_good:g} in {high.sum()} of {k} scalars (largest "
                f"{self.rhat[at]:.4g}, {self.names[at]})."
            )
        enough = ESS_GOOD_PER_CHAIN * self.chains
        for label, ess in (("Bulk", self.ess_bulk), ("Tail", self.ess_tail)):
            low = ess < enough
            if low.any():
                at = int(np.argmin(np.where(low, ess, np.inf)))
                yield (
                    f"{label} ESS is below {enough} (100 a chain) in {low.sum()} of {k} "
                    f"scalars (smallest {ess[at]:.3g}, {self.names[at]})."
                )


def diagnostics(
    draws: Mapping[str, NDArray[Any]],
    limit: int | None = LIMIT,
    rhat_good: float = RHAT_GOOD,
) -> Diagnostics:
    """Returns R-hat, ESS and MCSE of a posterior.

    draws: name → (chains, draws, *shape), the same chains and draws under every name.
    limit: at most so many scalars are diagnosed (None: all); which ones, see the module.
    rhat_good: R-hat above it is called not converged.
    Raises ValueError where shapes disagree, UserError where ArviZ is not installed.
    """
    chains, length = _common_shape(draws)
    flat = [values.reshape(chains, length, -1) for values in draws.values()]
    names = [name for key, values in draws.items() for name in scalar_names(key, values.shape[2:])]
    screen = [_screen(values) for values in flat]
    finite, varies, split = (np.concatenate(part) for part in zip(*screen, strict=True))
    usable = np.flatnonzero(finite & varies)
    chosen = _subset(usable, split[usable], limit)
    found = _diagnose(flat, chosen, chains, length)
    return Diagnostics(
        chains=chains,
        draws=length,
        total=len(names),
        names=tuple(names[i] for i in chosen),
        constant=tuple(names[i] for i in np.flatnonzero(finite & ~varies)),
        nonfinite=tuple(names[i] for i in np.flatnonzero(~finite)),
        split_rhat_max=_worst(split[usable], np.max),
        rhat_good=rhat_good,
        **found,
    )


def split_rhat(draws: NDArray[Any]) -> Floats:
    """Returns the plain split R-hat of (chains, draws ≥ 4, k) draws, (k,): a cheap screen.

    Gelman et al., Bayesian Data Analysis, 3rd ed., section 11.4. Chains that stand still at
    different places give inf.
    """
    half = draws.shape[1] // 2
    # An odd draw in the middle is left out, as ArviZ does.
    parts = np.concatenate([draws[:, :half], draws[:, -half:]]).astype(np.float64)
    within = parts.var(1, ddof=1).mean(0)
    between = parts.mean(1).var(0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.sqrt((half - 1) / half + between / within), dtype=np.float64)


def scalar_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """Returns "w[0, 0]", "w[0, 1]", … in C order; the bare name for a scalar."""
    if not shape:
        return [name]
    return [f"{name}[{', '.join(map(str, index))}]" for index in np.ndindex(*shape)]


def _common_shape(draws: Mapping[str, NDArray[Any]]) -> tuple[int, int]:
    shapes = {name: np.shape(values) for name, values in draws.items()}
    leading = {shape[:2] for shape in shapes.values()}
    if len(leading) != 1 or any(len(shape) < 2 or 0 in shape for shape in shapes.values()):
        raise ValueError(f"draws must be non-empty and (chains, draws, *shape), got {shapes}")
    chains, length = leading.pop()
    return chains, length


def _screen(values: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.bool_], Floats]:
    """Returns per scalar: is it finite, does it vary, its split R-hat (NaN if it cannot be)."""
    k = values.shape[2]
    finite, varies, split = np.zeros(k, bool), np.zeros(k, bool), np.full(k, np.nan)
    for start in range(0, k, CHUNK):
        part = slice(start, start + CHUNK)
        chunk = values[:, :, part]
        finite[part] = np.isfinite(chunk).all((0, 1))
        varies[part] = (chunk != chunk[:1, :1]).any((0, 1))
        if values.shape[1] >= MIN_DRAWS:
            with np.errstate(all="ignore"):
                split[part] = split_rhat(chunk)
    return finite, varies, split


def _subset(usable: NDArray[np.intp], split: Floats, limit: int | None) -> NDArray[np.intp]:
    if limit is None or len(usable) <= limit:
        return usable
    order = np.argsort(-np.nan_to_num(split, nan=np.inf), kind="stable")
    worst, rest = order[: limit // 2], np.sort(order[limit // 2 :])
    spaced = rest[np.linspace(0, len(rest) - 1, limit - len(worst)).round().astype(np.intp)]
    return np.sort(usable[np.concatenate([worst, spaced])])


def _diagnose(
    flat: list[NDArray[Any]], chosen: NDArray[np.intp], chains: int, length: int
) -> dict[str, Floats]:
    keys = ("rhat", "ess_bulk", "ess_tail", "mcse_mean", "mcse_sd", "mean", "sd")
    found = {key: np.full(len(chosen), np.nan) for key in keys}
    enough = chains >= MIN_CHAINS and length >= MIN_DRAWS
    compute = _arviz.diagnostic_functions() if enough and len(chosen) else None
    done = 0
    for chunk in _chunks(flat, chosen):
        part = slice(done, done + chunk.shape[2])
        found["mean"][part] = chunk.mean((0, 1))
        if chains * length > 1:
            found["sd"][part] = chunk.std((0, 1), ddof=1)
        if compute is not None:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore", RuntimeWarning)  # chains that stand still
                figures = compute(chunk)
            for key, values in figures.items():
                found[key][part] = values
        done += chunk.shape[2]
    return found


def _chunks(flat: list[NDArray[Any]], chosen: NDArray[np.intp]) -> Iterator[Floats]:
    """Yields the chosen scalars in order as float64 (chains, draws, ≤ CHUNK)."""
    start = 0
    for values in flat:
        stop = start + values.shape[2]
        own = chosen[(chosen >= start) & (chosen < stop)] - start
        for first in range(0, len(own), CHUNK):
            yield values[:, :, own[first : first + CHUNK]].astype(np.float64)
        start = stop


def _worst(values: Floats, reduce: Callable[[Floats], Any]) -> float:
    """Reduces what is not NaN; NaN where nothing is left."""
    known = values[~np.isnan(values)]
    return float(reduce(known)) if len(known) else float("nan")


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
