"""Over-sampling and the clock's deadline through the command: run, shown, refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim import RunStore
from tests.e2e.conftest import Command
from tests.e2e.scenarios import write

HASTY = """\
name: hasty
rounds: 4
data: {name: digits, rows: 300, test_fraction: 0.2}
partition: {name: dirichlet, clients: 10, alpha: 1.0, min_size: 5}
model: softmax
task: classification
clock: {sigma: 1.5, latency: 0.01}
over_sampling: 1.5
checkpoint: {every_rounds: 2}
strategy: {name: fedavg, fraction_train: 0.4}
client: {name: sgd, lr: 0.1}
"""
CLOCK = "clock: {sigma: 1.5, latency: 0.01}\n"
STRATEGY = "strategy: {name: fedavg, fraction_train: 0.4}"
FA_HMC = "strategy: {name: fa-hmc, step_size: 0.01, fraction_train: 0.4}"


def test_late_clients_are_counted_and_shown(fedsim: Command) -> None:
    write(HASTY)
    result = fedsim("run", "scenario.yaml", "--no-report", "--out", "runs")
    assert result.status == 0, result.err
    assert "8 late" in result.err
    run = RunStore("runs").open("latest")
    late = run.metrics.query("name == 'late'")["value"]
    assert late.tolist() == [2.0] * 4
    assert run.metrics.query("name == 'total_late'")["value"].iloc[-1] == 8.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            [(CLOCK, "")],
            "over_sampling: takes the replies that come first, and the engine inline answers all"
            " messages at once (got 1.5). Write clock: {}",
        ),
        (
            [("0.4}", "1.0}")],
            "over_sampling: asks more clients than a round needs, and FedAvg needs all 10 of them"
            " (got 1.5). Set strategy.fraction_train below 1",
        ),
        (
            [(STRATEGY, "strategy: FedAdam")],
            "over_sampling: asks more clients than a round needs, and FedAdam needs all 10 of them",
        ),
        (
            [(STRATEGY, "strategy: {name: fedbuff, buffer_size: 3, concurrency: 5}")],
            "over_sampling: is for synchronous rounds: FedBuff waits for nobody (got 1.5)",
        ),
        (
            [(STRATEGY, FA_HMC), ("client: {name: sgd, lr: 0.1}\n", "")],
            "over_sampling: does not go with FAHMC, which tells its clients beforehand how much"
            " weight those have that will reply (got 1.5)",
        ),
        (
            [
                (STRATEGY, "strategy: {name: fedbuff, buffer_size: 3}"),
                ("over_sampling: 1.5\n", ""),
                ("sigma: 1.5", "deadline: 3"),
            ],
            "clock.deadline: is for synchronous rounds: FedBuff waits for nobody (got 3.0)",
        ),
        ([("over_sampling: 1.5", "over_sampling: 0.5")], "over_sampling: must be "),
        ([("over_sampling: 1.5", "over_sampling: .inf")], "over_sampling: must be "),
        ([("sigma: 1.5", "deadline: 0")], "clock.deadline: must be "),
        (
            [("over_sampling: 1.5", "deadline: 3")],
            "deadline: needs the engine ray: nothing can be ended in this process (got 3.0)",
        ),
    ],
)
def test_what_is_wrong_is_said_before_the_start(
    fedsim: Command, changes: list[tuple[str, str]], said: str
) -> None:
    text = HASTY
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    write(text)
    result = fedsim("run", "scenario.yaml", "--out", "runs")
    assert result.status == 2
    assert said in result.err
    assert not Path("runs").exists() or not list(Path("runs").iterdir())
