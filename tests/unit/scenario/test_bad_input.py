# ruff: noqa: E501
"""Wrong scenarios: every mistake at once, in plain English, with its line and a hint."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim.errors import ScenarioError
from fedsim.scenario.loader import parse
from fedsim.scenario.parse import from_document, load
from tests.unit.scenario.fakes import COMPONENTS

GOOD = {
    "rounds": "10",
    "data": "toy",
    "partition": "iid",
    "model": "linear",
    "task": "classification",
    "strategy": "{name: fa-hmc, step_size: 0.1}",
}


def report(text: str) -> list[str]:
    """Returns the problems of a scenario text, one string each, without the file's name."""
    with pytest.raises(ScenarioError) as caught:
        from_document(parse(text), [], COMPONENTS)
    assert caught.value.exit_status == 2
    return str(caught.value).split("\n")


def changed(**sections: str) -> str:
    """Returns a good scenario, one section a line, with some changed; the changed come first."""
    return "".join(f"{key}: {value}\n" for key, value in {**sections, **GOOD, **sections}.items())


def test_the_good_one_is_good() -> None:
    assert from_document(parse(changed()), [], COMPONENTS).rounds == 10


@pytest.mark.parametrize(
    ("section", "value", "expected"),
    [
        # unknown names and keys
        ("strategi", "fedavg", "strategi: unknown key. Did you mean strategy?"),
        (
            "strategy",
            "fa-hcm",
            "strategy: there is no strategy of this name (got 'fa-hcm'). Did you mean fa-hmc?",
        ),
        (
            "strategy",
            "zzz",
            "strategy: there is no strategy of this name (got 'zzz')."
            " Known values of strategy.name: fa-hmc, fedavg",
        ),
        (
            "data",
            "{name: toi, rows: x}",
            "data.name: there is no data of this name (got 'toi'). Did you mean toy?",
        ),
        ("data", "{name: toy, row: 3}", "data.row: unknown key. Did you mean rows?"),
        (
            "model",
            "{name: linear, zzz: 3}",
            "model.zzz: unknown key. Known keys: bias, name",
        ),
        (
            "model",
            "my.package:Net",
            "model: there is no model of this name (got 'my.package:Net')."
            " For one of your own write name: custom and its import path as a parameter",
        ),
        (
            "strategy",
            "{step_size: 1}",
            "strategy.name: is required. Known values of strategy.name: fa-hmc, fedavg",
        ),
        (
            "strategy",
            "{name: 3}",
            "strategy.name: must be text (got 3). Known values of strategy.name: fa-hmc, fedavg",
        ),
        (
            "strategy",
            "[fedavg]",
            "strategy: must be a mapping with a name (got ['fedavg']). Write strategy: followed by name: and its parameters",
        ),
        (
            "strategy",
            "",
            "strategy: must be a mapping with a name. Write strategy: followed by name: and its parameters",
        ),
        # missing
        ("strategy", "fa-hmc", "strategy.step_size: is required. Step size η, > 0"),
        ("data", "csv", "data.path: is required. The file"),
        # types
        (
            "strategy",
            "{name: fa-hmc, step_size: '0.1'}",
            "strategy.step_size: must be a number (got '0.1'). Remove the quotes",
        ),
        (
            "strategy",
            "{name: fa-hmc, step_size: small}",
            "strategy.step_size: must be a number (got 'small'). This is text",
        ),
        (
            "strategy",
            "{name: fa-hmc, step_size: true}",
            "strategy.step_size: must be a number (got True)",
        ),
        (
            "strategy",
            "{name: fa-hmc, step_size: }",
            "strategy.step_size: must be a number; it is empty",
        ),
        (
            "strategy",
            "{name: fa-hmc, step_size: .nan}",
            "strategy.step_size: must be a finite number (got nan)",
        ),
        (
            "strategy",
            "{name: fa-hmc, step_size: .inf}",
            "strategy.step_size: must be a finite number (got inf)",
        ),
        (
            "strategy",
            "{name: fa-hmc, step_size: 1, leapfrog_steps: 1.5}",
            "strategy.leapfrog_steps: must be a whole number (got 1.5)",
        ),
        ("rounds", "1e2", "rounds: must be a whole number (got 100.0). Write 100"),
        ("rounds", "ten", "rounds: must be a whole number (got 'ten'). This is text"),
        ("engine", "{trace: yes}", "engine.trace: must be true or false (got 'yes'). Write true"),
        (
            "engine",
            "{trace: 'off'}",
            "engine.trace: must be true or false (got 'off'). Write false",
        ),
        ("description", "5", "description: must be text (got 5). Put it in quotes"),
        ("engine", "fast", "engine: must be a mapping (key: value) (got 'fast')"),
        ("engine", "[1]", "engine: must be a mapping (key: value) (got [1])"),
        ("model", "{name: mlp, hidden: 3}", "model.hidden: must be a list (got 3)"),
        (
            "model",
            "{name: mlp, hidden: [3, x]}",
            "model.hidden.1: must be a whole number (got 'x'). This is text",
        ),
        # one field of several types
        (
            "strategy",
            "{name: fa-hmc, step_size: 1, burn_in: aut}",
            "strategy.burn_in: must be a whole number or auto (got 'aut'). Did you mean auto?",
        ),
        (
            "strategy",
            "{name: fa-hmc, step_size: 1, betas: [1]}",
            "strategy.betas.1: is required",
        ),
        (
            "strategy",
            "{name: fa-hmc, step_size: 1, betas: [1, 2, 3]}",
            "strategy.betas: must have at most 2 items, has 3 (got [1, 2, 3])",
        ),
        # ranges
        (
            "strategy",
            "{name: fa-hmc, step_size: -0.1}",
            "strategy.step_size: must be > 0 (got -0.1)",
        ),
        ("strategy", "{name: fa-hmc, step_size: 0}", "strategy.step_size: must be > 0 (got 0)"),
        (
            "strategy",
            "{name: fedavg, fraction: 1.5}",
            "strategy.fraction: must be > 0 and <= 1 (got 1.5)",
        ),
        ("rounds", "0", "rounds: must be >= 1 and <= 1000000 (got 0)"),
        ("rounds", "1000001", "rounds: must be >= 1 and <= 1000000 (got 1000001)"),
        ("quorum", "0", "quorum: must be > 0 and <= 1 (got 0)"),
        ("engine", "{threads: 0}", "engine.threads: must be >= 1 and <= 4096 (got 0)"),
        ("name", "''", "name: must have at least 1 character (got '')"),
        (
            "name",
            "a/b",
            "name: has the wrong form (got 'a/b'). Short name without slashes, part of every run's id; the file's if left out",
        ),
        # literals
        (
            "engine",
            "{device: gpu}",
            "engine.device: must be one of auto, cpu, cuda, mps (got 'gpu'). Did you mean cpu?",
        ),
        (
            "on_bad_reply",
            "dorp",
            "on_bad_reply: must be one of drop, fail (got 'dorp'). Did you mean drop?",
        ),
        (
            "evaluate",
            "{splits: [tset]}",
            "evaluate.splits.0: must be one of validation, test, ood (got 'tset'). Did you mean test?",
        ),
        # nested components
        (
            "client",
            "{name: sgd, optimizer: {name: adam, momentum: 1}}",
            "client.optimizer.momentum: unknown key. Known keys: epsilon, name",
        ),
        (
            "client",
            "{name: sgd, optimizer: {name: adam, epsilon: 0}}",
            "client.optimizer.epsilon: must be > 0 (got 0)",
        ),
        (
            "client",
            "{name: sgd, optimizer: {name: sgd, momentum: 1}}",
            "client.optimizer.momentum: must be >= 0 and < 1 (got 1)",
        ),
        (
            "client",
            "{name: sgd, optimizer: {name: adem}}",
            "client.optimizer: name must be one of sgd, adam (got {'name': 'adem'})",
        ),
        (
            "client",
            "{name: sgd, optimizer: {epsilon: 1}}",
            "client.optimizer: must say its name (got {'epsilon': 1})",
        ),
        # seeds
        ("seeds", "[]", "seeds: must have at least 1 item, has 0 (got [])"),
        ("seeds", "[1, 2, 1]", "seeds: must differ from each other (got [1, 2, 1])"),
        ("seeds", "[-1]", "seeds.0: must be >= 0 and <= 9223372036854775807 (got -1)"),
        ("seeds", "5", "seeds: must be a list (got 5)"),
        ("seed", "x", "seed: must be a whole number (got 'x'). This is text"),
        (
            "seed",
            "99999999999999999999",
            "seed: must be >= 0 and <= 9223372036854775807 (got 99999999999999999999)",
        ),
        # early stopping
        (
            "early_stopping",
            "{metric: nll}",
            "early_stopping.metric: has the wrong form (got 'nll'). What is watched, as split/name; the split is one of train, client, validation, test, ood",
        ),
        # compare and grid
        ("compare", "[a]", "compare: must be a mapping (key: value) (got ['a'])"),
        ("compare", "{a: 3}", "compare.a: must be a mapping (key: value) (got 3)"),
        ("compare", "{a: {rounds: 0}}", "compare.a.rounds: must be >= 1 and <= 1000000 (got 0)"),
        ("compare", "{a: {round: 1}}", "compare.a.round: unknown key. Did you mean rounds?"),
        (
            "compare",
            "{a: {strategy: fa-hcm}}",
            "compare.a.strategy: there is no strategy of this name (got 'fa-hcm'). Did you mean fa-hmc?",
        ),
        (
            "compare",
            "{a: {seeds: [1]}}",
            "compare.a.seeds: cannot differ between the entries of compare; give seeds at the top",
        ),
        ("grid", "{strategy.step_size: 0.1}", "grid.strategy.step_size: must be a list (got 0.1)"),
        (
            "grid",
            "{strategy.step_size: []}",
            "grid.strategy.step_size: must have at least 1 item, has 0 (got [])",
        ),
        (
            "grid",
            "{strategy.step_size: [0.1, -1, 0.2]}",
            "grid.strategy.step_size: must be > 0 (got -1)",
        ),
        (
            "grid",
            "{strategy.step_size: [0.1, 0.1]}",
            "grid.strategy.step_size.1: is listed twice (got 0.1)",
        ),
        (
            "grid",
            "{strategy.stepsize: [0.1, 0.2]}",
            "grid.strategy.stepsize: unknown key. Did you mean step_size?",
        ),
        (
            "grid",
            "{stratgy.step_size: [0.1, 0.2]}",
            "grid.stratgy: unknown key. Did you mean strategy?",
        ),
        ("grid", "{rounds.x: [1]}", "grid.rounds.x: cannot be set: rounds has no fields below it"),
        (
            "grid",
            "{seeds: [[1], [2]]}",
            "grid.seeds: cannot be varied by grid; give seeds at the top",
        ),
        ("grid", "{strategy..x: [1]}", "grid.strategy..x: is no field; write section.field"),
        (
            "grid",
            "{strategy.betas.2: [1]}",
            "grid.strategy.betas.2: there is no such item: strategy.betas is a list of 2",
        ),
        # between sections
        (
            "early_stopping",
            "{metric: client/loss}",
            "early_stopping.metric: is never measured: the clients do not evaluate (got 'client/loss'). Set evaluate.clients_every to 1 or more",
        ),
        (
            "early_stopping",
            "{metric: ood/nll}",
            "early_stopping.metric: is never measured: the data has no ood split (got 'ood/nll'). Set data.ood",
        ),
        (
            "evaluate",
            "{clients_every: 5}",
            "evaluate.clients_every: asks clients to evaluate, but they hold out no rows. Set partition.holdout above 0, or evaluate.clients_every to 0",
        ),
    ],
)
def test_one_mistake_is_one_sentence(section: str, value: str, expected: str) -> None:
    assert report(changed(**{section: value})) == [f"1: {expected}"]


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("evaluate: {server_every: 0}", "is never measured: the server does not evaluate"),
        ("evaluate: {splits: [test]}", "is never measured: split validation is not evaluated"),
    ],
)
def test_early_stopping_needs_its_split(extra: str, expected: str) -> None:
    (line,) = report(f"early_stopping: {{patience: 3}}\n{extra}\n{changed()}")
    assert line.startswith(f"1: early_stopping.metric: {expected}")


def test_everything_missing() -> None:
    assert [line.split(":")[1:3] for line in report("description: nothing else\n")] == [
        [f" {field}", " is required. " + meaning]
        for field, meaning in (
            ("rounds", "Communication rounds"),
            ("data", "The examples"),
            ("partition", "How the examples are spread over the clients"),
            ("model", "The model that is trained"),
            ("task", "The loss and the metrics"),
            ("strategy", "The server's side of the method"),
        )
    ]


MANY = """\
name: many
rounds: ten
rounds: 3
sed: 1

data:
  name: toy
  rows: -5
  colour: blue
partition: dirichlet
model: !!python/name:os.system
task: clasification
strategy:
  name: fa-hmc
  step_size: "0.1"
  betas:
    - 0.9
    - high
engine:
  device: tpu
compare:
  good: {}
  slow:
    strategy:
      step_size: -2
  other:
    strategy: fedavg
    engine:
      chunk: 0
grid:
  strategy.leapfrog_steps:
    - 5
    - 0
"""


def test_every_mistake_at_once_with_exact_lines(tmp_path: Path) -> None:
    file = tmp_path / "many.yaml"
    file.write_text(MANY)
    with pytest.raises(ScenarioError) as caught:
        load(file, [], COMPONENTS)
    assert str(caught.value).replace(f"{file}:", "").split("\n") == [
        "2: rounds: is given twice, in line 2 and in line 3",
        "4: sed: unknown key. Did you mean seeds?",
        "8: data.rows: must be >= 1 (got -5)",
        "9: data.colour: unknown key. Known keys: name, ood, rows",
        "10: partition.alpha: is required. Concentration, > 0",
        "11: model: tag 'tag:yaml.org,2002:python/name:os.system' is not allowed."
        " Write the plain value",
        "12: task: there is no task of this name (got 'clasification')."
        " Did you mean classification?",
        "15: strategy.step_size: must be a number (got '0.1'). Remove the quotes",
        "18: strategy.betas.1: must be a number (got 'high'). This is text",
        "20: engine.device: must be one of auto, cpu, cuda, mps (got 'tpu'). Did you mean cpu?",
        "25: compare.slow.strategy.step_size: must be > 0 (got -2)",
        "29: compare.other.engine.chunk: must be >= 1 (got 0)",
        "32: grid.strategy.leapfrog_steps: unknown key in compare entry other."
        " Known keys: fraction, name",
        "33: grid.strategy.leapfrog_steps: must be >= 1 in compare entry good, slow (got 0)",
    ]


def test_a_file_of_another_kind_does_not_flood_the_terminal() -> None:
    lines = report("".join(f"k{number}: 1\n" for number in range(500)))
    assert len(lines) == 201
    assert lines[6].startswith("1: k0: unknown key")
    assert lines[-1] == "and 306 more mistakes"  # six required sections are missing, too
