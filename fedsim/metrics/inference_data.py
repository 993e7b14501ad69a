"""Posterior draws in the field's own file format: ArviZ InferenceData as NetCDF."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

import fedsim
from fedsim.metrics import _arviz

NO_METROPOLIS = "no Metropolis correction: biased at every finite step size"

Draws = Mapping[str, ArrayLike]


def to_inference_data(
    posterior: Draws,
    *,
    scenario: str,
    seed: int,
    sample_stats: Draws | None = None,
    posterior_predictive: Draws | None = None,
    observed_data: Draws | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, ArrayLike] | None = None,
    note: str = NO_METROPOLIS,
) -> Any:
    """Returns draws as ArviZ's container: InferenceData (arviz 0.2x) or a DataTree (1.x).

    posterior, sample_stats, posterior_predictive: name → (chains, draws, *shape).
    observed_data: name → (*shape). dims: name → the names of `shape`'s axes ("name_dim_0", … where
    not given). coords: axis name → labels. A "/" in a name becomes ".", since NetCDF forbids it.
    Raises UserError where ArviZ is not installed, ValueError where shapes do not fit.
    """
    _arviz.require()
    attrs = {
        "created_with": f"fedsim {fedsim.__version__}",
        "scenario": scenario,
        "seed": str(seed),
        "note": note,
    }
    sampled = {
        "posterior": posterior,
        "sample_stats": sample_stats,
        "posterior_predictive": posterior_predictive,
    }
    groups = {
        name: _dataset(draws, ("chain", "draw"), dims or {}, coords or {}, attrs)
        for name, draws in sampled.items()
        if draws
    }
    if observed_data:
        groups["observed_data"] = _dataset(observed_data, (), dims or {}, coords or {}, attrs)
    return _arviz.pack(groups, attrs)


def write_inference_data(data: Any, path: Path) -> Path:
    """Writes what `to_inference_data` returned as NetCDF, under a temporary name and renamed.

    `arviz.from_netcdf(path)` opens the file. Returns the path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        data.to_netcdf(temporary, engine="h5netcdf")
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _dataset(
    draws: Draws,
    leading: tuple[str, ...],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, ArrayLike],
    attrs: Mapping[str, str],
) -> Any:
    import xarray as xr

    variables = {}
    for key, raw in draws.items():
        name, values = key.replace("/", "."), np.asarray(raw)
        own = values.ndim - len(leading)
        axes = [f"{name}_dim_{i}" for i in range(own)] if key not in dims else list(dims[key])
        if own < 0 or len(axes) != own:
            raise ValueError(f"{key} of shape {values.shape} does not fit {[*leading, *axes]}")
        variables[name] = xr.DataArray(values, dims=[*leading, *axes])
    found = xr.Dataset(variables, attrs=dict(attrs))
    labels = {axis: np.asarray(values) for axis, values in coords.items() if axis in found.dims}
    ranges = {axis: np.arange(size) for axis, size in found.sizes.items() if axis not in labels}
    return found.assign_coords({**ranges, **labels})
