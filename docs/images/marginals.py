"""Draws marginals.svg from the runs of scenarios/fahmc_logreg.yaml.

fedsim run scenarios/fahmc_logreg.yaml
python docs/images/marginals.py RUN_ID RUN_ID RUN_ID
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from fedsim import RunStore
from fedsim.reference import flat_draws
from fedsim.report import plots

HERE = Path(__file__).parent


def main(run_ids: list[str]) -> None:
    """Writes the picture beside this file; the runs lie in $FEDSIM_RUNS or runs."""
    runs = [RunStore().open(run_id) for run_id in run_ids]
    with np.load(runs[0].artifact("reference.npz"), allow_pickle=False) as file:
        reference = file["draws"]
    names = [*runs[0].scenario["data"]["features"], "intercept"]
    figure = plots.posterior_marginals(
        {run.record.label: flat_draws(run.draws())[0] for run in runs},
        reference.reshape(-1, reference.shape[-1]),
        names,
        reference_label="NUTS on the pooled data",
    )
    (HERE / "marginals.svg").write_bytes(plots.to_svg(figure))


if __name__ == "__main__":
    main(sys.argv[1:])
