"""How a metric is read: which direction is better, how it is written, what it is called."""

from __future__ import annotations

import math
import re

HIGHER_IS_BETTER = frozenset(
    {"accuracy", "auroc", "r2", "ess", "ess_bulk", "ess_tail", "clients_per_second", "f1"}
)
LOWER_IS_BETTER = frozenset(
    {"nll", "brier", "ece", "rmse", "loss", "gaussian_nll", "train_loss", "rhat", "mcse", "w1",
     "w2", "seconds", "simulated_seconds", "bytes", "bytes_up", "bytes_down", "gradients",
     "dropped", "late", "regret", "simple_regret"}
)  # fmt: skip
_TITLES = {
    "nll": "NLL (nats)", "ece": "ECE", "rmse": "RMSE", "auroc": "OOD AUROC", "r2": "R²",
    "brier": "Brier (sum)", "accuracy": "Accuracy", "gaussian_nll": "Gaussian NLL (nats)",
    "regret": "Cumulative regret", "simple_regret": "Simple regret",
}  # fmt: skip
NO_BREAK = "\N{NO-BREAK SPACE}"
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def direction(metric: str) -> int:
    """Returns +1 if more is better, −1 if less is, 0 if that is not known.

    A variant belongs to the metric it starts with: "ece_15", "accuracy@mean".
    """
    base = metric.rsplit("/", 1)[-1].lower()
    while base:
        if base in HIGHER_IS_BETTER:
            return 1
        if base in LOWER_IS_BETTER:
            return -1
        base = re.sub(r"(^|[_@.-])[^_@.-]*$", "", base)
    return 0


def arrow(metric: str) -> str:
    """Returns "↑" where more is better, "↓" where less is, "" where that is not known."""
    return {1: "↑", -1: "↓", 0: ""}[direction(metric)]


def title(metric: str) -> str:
    """Returns how a metric is called in a heading: "nll" → "NLL (nats)"."""
    return _TITLES.get(metric, metric.replace("_", " "))


def heading(metric: str, named: bool = False) -> str:
    """Returns the heading of "name" or "split/name": title and arrow, the split where `named`."""
    split, _, name = metric.rpartition("/")
    words = [f"{split}:" if named and split not in ("", "ood") else "", title(name), arrow(name)]
    return " ".join(word for word in words if word)


def number(value: float, sd: float | None = None) -> str:
    """Returns `value`, or "value ± sd", with the digits that carry information.

    The standard deviation gets one significant digit, two where the first is a 1, and decides the
    decimals of the value; a value alone gets four decimals below 10, and fewer above. The space
    after ± does not break, so that a narrow table breaks before it.
    """
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if sd is None or not math.isfinite(sd):
        return _signed(value, _decimals(value))
    if sd == 0:
        return f"{_signed(value, _decimals(value))} ±{NO_BREAK}0"
    exponent = math.floor(math.log10(sd))
    leading = sd / 10.0**exponent
    places = min(max((1 if leading < 1.95 else 0) - exponent, 0), 6)
    return f"{_signed(value, places)} ±{NO_BREAK}{sd:.{places}f}"


def quantity(value: float, unit: str = "") -> str:
    """Returns a count or size with an SI prefix: 12_345_678, "B" → "12.3 MB"."""
    if not math.isfinite(value):
        return number(value)
    for factor, prefix in _UNITS:
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}".strip()
    return f"{value:.3g} {unit}".strip()


def duration(seconds: float) -> str:
    """Returns "41.2 s", "3 min 05 s" or "2 h 10 min"."""
    if not math.isfinite(seconds):
        return number(seconds)
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _decimals(value: float) -> int:
    size = abs(value)
    if 0 < size < 1e-3:
        return 3 - math.floor(math.log10(size))
    return 4 if size < 10 else 2 if size < 1000 else 0


def _signed(value: float, places: int) -> str:
    return f"{value:.{places}f}".replace("-", "−")
