"""Whatever a file or an option holds, the answer is a Scenario or a ScenarioError."""

from __future__ import annotations

import contextlib
import json
import string
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedsim.errors import ScenarioError
from fedsim.scenario import Scenario
from fedsim.scenario.loader import parse
from fedsim.scenario.parse import from_document
from tests.unit.scenario.fakes import COMPONENTS
from tests.unit.scenario.test_bad_input import MANY
from tests.unit.scenario.test_expand import BASE
from tests.unit.scenario.test_overrides import TEXT

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["fa-hmc", "fedavg", "iid", "toy", "sgd", "adam", "a:b", "1e3"])
)
KEYS = st.sampled_from(
    [*Scenario.model_fields, "seed", "step_size", "optimizer", "strategy.step_size", "0", "a"]
) | st.text(max_size=5)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
# Pieces of YAML's syntax, so that the random text is often nearly well formed.
PIECES = st.sampled_from(
    [
        *"-:?[]{},#&*!|>'\"%@`\t\n ",
        "\n  ",
        ": ",
        "- ",
        "a",
        "1",
        "<<",
        "---",
        "...",
        "!!",
        "&a",
        "*a",
    ]
)


def answer(text: str, *overrides: str) -> None:
    with contextlib.suppress(ScenarioError):
        from_document(parse(text), overrides, COMPONENTS)


@given(st.text() | st.lists(PIECES, max_size=40).map("".join))
def test_random_text(text: str) -> None:
    answer(text)


@given(st.integers(0, len(MANY)), st.integers(0, 8), st.lists(PIECES, max_size=3).map("".join))
def test_scenarios_with_a_damaged_place(start: int, length: int, piece: str) -> None:
    answer(MANY[:start] + piece + MANY[start + length :])


@given(st.dictionaries(KEYS, PLAIN, max_size=4))
def test_random_sections(sections: dict[str, Any]) -> None:
    answer(yaml.safe_dump({**BASE, **sections}, allow_unicode=True))
    with contextlib.suppress(ScenarioError):
        Scenario.from_dict({**BASE, **sections}, COMPONENTS)


@given(
    st.lists(
        st.text(string.printable, max_size=20)
        | st.builds(
            "{}={}".format,
            st.lists(KEYS, min_size=1, max_size=3).map(".".join),
            PLAIN.map(lambda value: yaml.safe_dump(value, default_flow_style=True)),
        ),
        max_size=3,
    )
)
def test_random_overrides(overrides: list[str]) -> None:
    answer(TEXT, *overrides)


@given(PLAIN)
def test_json_is_read_as_json(value: object) -> None:
    """JSON is a part of YAML 1.2: an independent oracle of values, quotes and escapes."""
    text = json.dumps({"x": value})
    if "Infinity" not in text and "NaN" not in text:
        assert parse(text).data == json.loads(text)


@given(st.dictionaries(KEYS, PLAIN, max_size=3))
def test_a_good_scenario_round_trips(sections: dict[str, Any]) -> None:
    try:
        scenario = Scenario.from_dict({**BASE, **sections}, COMPONENTS)
    except ScenarioError:
        return
    assert Scenario.from_dict(scenario.resolved(), COMPONENTS) == scenario
