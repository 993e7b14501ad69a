"""Prints the table of docs/methods/pfpne.md: regret of a client over Δ, for each way to search.

python docs/images/pfpne_table.py [SEEDS] [HCT_SEEDS]      (2 and 2: some minutes)
"""

from __future__ import annotations

import sys
import tempfile

import numpy as np

from fedsim import Scenario, run

BUDGET = 10_000
DELTAS = (0.0, 2**-7, 0.008, 0.05, 0.158, 0.3)
WAYS = {
    "PF-PNE": {"name": "pf-pne"},
    "Fed-PNE": {"name": "fed-pne"},
    "PNE": {"name": "local-search", "method": "pne"},
    "HCT": {"name": "local-search", "method": "hct"},
}


def regrets(way: str, clients: int, delta: float, seeds: int, out: str) -> str:
    """Returns cumulative and simple regret of a client, mean over clients and seeds."""
    found = []
    for seed in range(seeds):
        section = {**WAYS[way], "budget": BUDGET} | ({"delta": delta} if way == "PF-PNE" else {})
        finished = run(
            Scenario.from_dict(
                {
                    "name": "table",
                    "seeds": [seed],
                    "partition": "given",
                    "strategy": section,
                    "data": {"name": "bandit_objectives", "clients": clients, "delta": delta},
                }
            ),
            out=out,
        )
        rows = finished.metrics.query("split == 'train'")
        last = rows[rows["round"] == rows["round"].max()].set_index("name")["value"]
        found.append((last["regret"], last["simple_regret"]))
    total, simple = np.mean(found, axis=0)
    return f"{total:.0f} ({f'{simple:.3f}'.lstrip('0')})"


def main(seeds: int, hct_seeds: int) -> None:
    """Prints the table as Markdown."""
    print("| M | Δ | " + " | ".join(WAYS) + " |\n|" + "---|" * (2 + len(WAYS)))  # noqa: T201
    with tempfile.TemporaryDirectory() as out:
        for clients in (10, 50):
            for delta in DELTAS:
                cells = [
                    regrets(way, clients, delta, hct_seeds if way == "HCT" else seeds, out)
                    if way != "HCT" or clients == 10
                    else ""
                    for way in WAYS
                ]
                shown = f"{delta:.4f}".lstrip("0").rstrip("0") or "0"
                line = f"| {clients} | {'0' if delta == 0 else shown} | " + " | ".join(cells) + " |"
                print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    main(*(int(word) for word in (sys.argv[1:3] + ["2", "2"][len(sys.argv) - 1 :])))
