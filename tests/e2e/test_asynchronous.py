"""Asynchronous rounds through the command: refused without a clock, resumed to the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedsim import RunStore
from fedsim.runs import RunWriter
from tests.e2e.conftest import Command
from tests.e2e.scenarios import same_bits, write

BUFFERED = """\
name: buffered
rounds: 8
data: {name: digits, rows: 300, test_fraction: 0.2}
partition: {name: dirichlet, clients: 6, alpha: 1.0, min_size: 5, holdout: 0.2}
model: softmax
task: classification
clock: {sigma: 1.5, latency: 0.01, megabytes_per_second: 10, jitter: 0.1}
checkpoint: {every_rounds: 1}
evaluate: {clients_every: 3}
strategy: {name: fedbuff, buffer_size: 3, concurrency: 5}
client: {name: sgd, optimizer: {name: adam}}
"""


def test_killed_after_any_round_and_resumed(
    fedsim: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the folder is what a kill would have left."""
    end_round = RunWriter.end_round

    def copy_then_end(self: RunWriter, round: int) -> None:
        copy = Path(f"killed-{round}") / self.id
        if not copy.exists():
            shutil.copytree(self.path, copy)
        end_round(self, round)

    write(BUFFERED)
    with monkeypatch.context() as patched:
        patched.setattr(RunWriter, "end_round", copy_then_end)
        result = fedsim("run", "scenario.yaml", "-q", "--no-report", "--out", "whole")
    assert result.status == 0, result.err
    store = RunStore("whole")
    (run_id,) = store.ids()
    whole = store.open(run_id)
    for after in (0, 1, 5):
        folder = f"killed-{after}"
        result = fedsim("resume", run_id, "-q", "--no-report", "--out", folder)
        assert result.status == 0, result.err
        same_bits(RunStore(folder).open(run_id), whole)
    late = whole.metrics.query("split == 'train' and name == 'staleness_max'")["value"]
    assert late.max() > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("clock: {", "# clock: {"), "clock: is required: the strategy updates with the replies"),
        (("concurrency: 5", "concurrency: 7"), "keeps 7 clients at work (concurrency), but there"),
        (("buffer_size: 3", "buffer_size: 0"), "strategy.buffer_size: must be"),
        (("sigma: 1.5", "sigma: -1"), "clock.sigma: must be"),
        (("sigma: 1.5", "spread: 1.5"), "clock.spread: "),
    ],
)
def test_what_is_wrong_is_said_before_the_start(
    fedsim: Command, change: tuple[str, str], said: str
) -> None:
    write(BUFFERED.replace(*change))
    result = fedsim("run", "scenario.yaml", "--out", "runs")
    assert result.status == 2
    assert said in result.err
    assert not Path("runs").exists() or not list(Path("runs").iterdir())
