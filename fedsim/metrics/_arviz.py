"""The one place that knows which ArviZ is installed: 0.2x, or 1.x (arviz-base and arviz-stats).

Both are heavy to import (seconds), so nothing here imports them before a function is called.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import UserError

Floats = NDArray[np.float64]
Diagnose = Callable[[Floats], dict[str, Floats]]

TAIL = (0.05, 0.95)  # the quantiles whose ESS is "the tail ESS", after Vehtari et al. 2021


def diagnostic_functions() -> Diagnose:
    """Returns draws (chains ≥ 2, draws ≥ 4, k) → rhat, ess_bulk, ess_tail, mcse_*, each (k,)."""
    stats = _import("arviz_stats.base")
    return _modern(stats.array_stats) if stats is not None else _classic(_classic_arviz())


def pack(groups: Mapping[str, Any], attrs: Mapping[str, str]) -> Any:
    """Returns xarray Datasets by group as arviz's InferenceData (0.2x) or a DataTree (1.x)."""
    if _import("arviz_base") is not None:
        import xarray as xr

        tree = xr.DataTree.from_dict({f"/{name}": data for name, data in groups.items()})
        tree.attrs.update(attrs)
        return tree
    return _classic_arviz().InferenceData(attrs=dict(attrs), **groups)


def require() -> None:
    """Raises UserError where no ArviZ is installed."""
    if _import("arviz_base") is None:
        _classic_arviz()


def _modern(stats: Any) -> Diagnose:
    axes = {"chain_axis": 0, "draw_axis": 1}

    def diagnose(draws: Floats) -> dict[str, Floats]:
        return {
            "rhat": stats.rhat(draws, method="rank", **axes),
            "ess_bulk": stats.ess(draws, method="bulk", **axes),
            "ess_tail": stats.ess(draws, method="tail", prob=TAIL, **axes),
            "mcse_mean": stats.mcse(draws, method="mean", **axes),
            "mcse_sd": stats.mcse(draws, method="sd", **axes),
        }

    return diagnose


def _classic(arviz: Any) -> Diagnose:
    def diagnose(draws: Floats) -> dict[str, Floats]:
        data = arviz.convert_to_dataset({"x": draws})
        found = {
            "rhat": arviz.rhat(data, method="rank"),
            "ess_bulk": arviz.ess(data, method="bulk"),
            "ess_tail": arviz.ess(data, method="tail", prob=TAIL),
            "mcse_mean": arviz.mcse(data, method="mean"),
            "mcse_sd": arviz.mcse(data, method="sd"),
        }
        return {name: np.asarray(values["x"], np.float64) for name, values in found.items()}

    return diagnose


def _classic_arviz() -> Any:
    arviz = _import("arviz")
    if arviz is None:
        raise UserError(
            "posterior diagnostics and files need ArviZ, which is not installed: "
            'pip install "fedsim-fl[bayes]"'
        )
    return arviz


def _import(module: str) -> Any | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 0.23 announces 1.0 at every import
            return importlib.import_module(module)
    except ImportError:
        return None
