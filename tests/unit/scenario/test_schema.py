"""The JSON Schema and the Markdown reference, both made from the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from jsonschema import Draft202012Validator

from fedsim.errors import Params, ScenarioError
from fedsim.scenario import Scenario
from fedsim.scenario.components import SECTIONS
from fedsim.scenario.loader import parse, read
from fedsim.scenario.parse import from_document
from fedsim.scenario.reference import scenario_reference, type_words
from tests.unit.scenario.fakes import COMPONENTS
from tests.unit.scenario.test_bad_input import changed
from tests.unit.scenario.test_overrides import TEXT

SHIPPED = sorted((Path(__file__).parents[3] / "scenarios").glob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = Scenario.json_schema(COMPONENTS)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        changed(),
        changed(seeds="[1, 2]", client="sgd", strategy="fedavg"),
        changed(seed="1", strategy="my.package:Method"),
        changed(strategy="{name: 'my.package:Method', params: {a: 1}}"),
        changed(early_stopping="{metric: test/nll}", engine="{chunk: 3, threads: null}"),
        changed(compare="{a: {strategy: {step_size: 1}}, b: {strategy: fedavg, client: null}}"),
        changed(grid="{strategy.step_size: [1, 2], partition: [iid]}"),
    ],
)
def test_good_scenarios_fit_the_schema(validator: Draft202012Validator, text: str) -> None:
    assert [error.message for error in validator.iter_errors(parse(text).data)] == []


@pytest.mark.parametrize(
    "sections",
    [
        {"rounds": "0"},
        {"rounds": "x"},
        {"sed": "1"},
        {"strategy": "{name: fa-hmx, step_size: 1}"},
        {"strategy": "{name: fa-hmc, step_size: 0}"},
        {"strategy": "{name: fa-hmc, step_size: 1, fraction: 1}"},
        {"strategy": "{step_size: 1}"},
        {"strategy": "fa-hmc"},
        {"strategy": "null"},
        {"data": "{name: iid}"},
        {"engine": "{device: gpu}"},
        {"evaluate": "{splits: [tets]}"},
        {"seeds": "[]"},
        {"client": "{name: sgd, optimizer: {name: adam, momentum: 0.5}}"},
        {"compare": "{a: {seeds: [1]}}"},
        {"compare": "{a: {round: 1}}"},
        {"grid": "{strategy.step_size: []}"},
        {"seed": "1", "seeds": "[1]"},
    ],
)
def test_the_schema_refuses_what_fedsim_refuses(
    validator: Draft202012Validator, sections: dict[str, str]
) -> None:
    document = parse(changed(**sections))
    assert not validator.is_valid(document.data)
    with pytest.raises(ScenarioError):
        from_document(document, [], COMPONENTS)


def test_what_is_resolved_fits_the_schema(validator: Draft202012Validator) -> None:
    resolved = from_document(parse(TEXT), [], COMPONENTS).resolved()
    assert [error.message for error in validator.iter_errors(resolved)] == []


def test_descriptions_defaults_and_constant_names_are_in_the_schema() -> None:
    schema = Scenario.json_schema(COMPONENTS)
    definition = schema["$defs"]["FAHMC"]
    assert definition["properties"]["name"]["const"] == "fa-hmc"
    assert definition["required"] == ["name", "step_size"]
    assert definition["properties"]["step_size"]["description"] == "Step size η, > 0."
    assert definition["properties"]["leapfrog_steps"]["default"] == 10
    assert "Params" not in schema["$defs"]


def test_components_of_one_class_name_stay_apart() -> None:
    def params(field: str) -> type[Params]:
        namespace: dict[str, Any] = {
            "__annotations__": {"name": Literal["x"], field: int},
            "__module__": f"module_{field}",
        }
        return type("Params", (Params,), namespace)

    mixed = COMPONENTS.__class__(
        **{**vars(COMPONENTS), "strategy": {"x": params("a")}, "client": {"x": params("b")}}
    )
    validator = Draft202012Validator(Scenario.json_schema(mixed))
    good = parse(changed(strategy="{name: x, a: 1}", client="{name: x, b: 1}")).data
    assert validator.is_valid(good)
    assert not validator.is_valid({**good, "client": {"name": "x", "a": 1}})


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_scenarios_are_valid_and_fit_the_schema(path: Path) -> None:
    Scenario.load(path).expand()
    validator = Draft202012Validator(Scenario.json_schema())
    assert [error.message for error in validator.iter_errors(read(path).data)] == []


def test_the_reference_names_every_field() -> None:
    text = scenario_reference(COMPONENTS)
    for name in Scenario.model_fields:
        assert f"| `{name}` |" in text
    for params in SECTIONS.values():
        for name, field in params.model_fields.items():
            assert field.description
            assert name == "name" or f"| `{name}` |" in text
    assert "| `step_size` | number | required | > 0 | Step size η, > 0. |" in text
    assert "### strategy: fa-hmc" in text
    assert "#### sgd, `optimizer`: adam" in text
    assert "| `threads` | whole number or empty | empty | >= 1 and <= 4096 |" in text


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int | None, "whole number or empty"),
        (tuple[int, ...], "list of whole numbers"),
        (tuple[float, float], "list of 2: number, number"),
        (Literal["a", "b"], "`a` or `b`"),
        (dict[str, float], "mapping of text to number"),
        (list[str], "list of text"),
        (int | Literal["auto"], "whole number or `auto`"),
        (Path, "path"),
    ],
)
def test_types_in_words(annotation: Any, words: str) -> None:
    assert type_words(annotation) == words
