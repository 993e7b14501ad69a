"""What a run leaves behind: folders with metrics, checkpoints, draws and artifacts, and an index.

runs/
  fedsim.sqlite                 the index over all runs (see database.py)
  20260102-153000-digits-s0/
    run.json                    identity and status      (record.py)
    scenario.yaml               the resolved scenario
    environment.json            versions, processor, git (environment.py)
    engine.json                 the recorded execution plan
    metrics.jsonl, client_metrics.jsonl, events.jsonl    (rows.py)
    checkpoints/round-000123/   arrays.safetensors and state.json (checkpoint.py)
    draws/                      posterior draws          (draws.py)
    artifacts/                  reports, plots, NetCDF …
    parameters.safetensors      the final parameters
    summary.json                the result
    lock                        held by the process that writes the run (lock.py)
"""

from fedsim.runs.reader import Run
from fedsim.runs.record import DIED
from fedsim.runs.store import RunStore
from fedsim.runs.writer import RunWriter

__all__ = ["DIED", "Run", "RunStore", "RunWriter"]
