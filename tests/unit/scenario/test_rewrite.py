"""Changing a few values leaves every other character of a scenario as it was."""

from __future__ import annotations

import difflib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.scenario.loader import parse
from fedsim.scenario.rewrite import Value, put

VALUES: dict[str, Value] = {"path": "mapped", "chunk": 16, "threads": 2}
WORDS = "chosen by a test, today"
MARK = "chosen by a test"
FLOW = "engine: {path: mapped, chunk: 16, threads: 2}"

TEXTS = {
    "missing, at the end": ("a: 1  # x\n", f"a: 1  # x\n# {WORDS}\n{FLOW}\n"),
    "missing, no line end": ("a: 1", f"a: 1\n# {WORDS}\n{FLOW}\n"),
    "missing, Windows line ends": ("a: 1\r\n", f"a: 1\r\n# {WORDS}\r\n{FLOW}\r\n"),
    "before a last comment": ("a: [1,\n 2]\n# end\n", f"a: [1,\n 2]\n# {WORDS}\n{FLOW}\n# end\n"),
    "behind a block of text": ("a: >\n  b\n  c\n", f"a: >\n  b\n  c\n# {WORDS}\n{FLOW}\n"),
    "empty": ("engine:  # later\nz: 1\n", f"# {WORDS}\n{FLOW}  # later\nz: 1\n"),
    "null": ("engine: ~\nz: 1\n", f"# {WORDS}\n{FLOW}\nz: 1\n"),
    "flow": (
        "engine: {dtype: float64, chunk: 3}  # c\nz: 1\n",
        f"# {WORDS}\nengine: {{dtype: float64, chunk: 16, path: mapped, threads: 2}}  # c\nz: 1\n",
    ),
    "empty flow": ("engine: {}\nz: 1\n", f"# {WORDS}\n{FLOW}\nz: 1\n"),
    "block": (
        "engine:\n  chunk: 3   # was\n  dtype: 'float64'\n\n# of z\nz: 1\n",
        f"# {WORDS}\nengine:\n  chunk: 16   # was\n  dtype: 'float64'\n"
        "  path: mapped\n  threads: 2\n\n# of z\nz: 1\n",
    ),
    "empty value": (
        "engine:\n  chunk:\n  path: auto\n  threads: null\n",
        f"# {WORDS}\nengine:\n  chunk: 16\n  path: mapped\n  threads: 2\n",
    ),
    "an earlier choice": (
        f"# mine\n# {MARK}, yesterday\nengine: {{chunk: 3, path: auto, threads: 1}}\n",
        f"# mine\n# {WORDS}\nengine: {{chunk: 16, path: mapped, threads: 2}}\n",
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_section_is_written_and_nothing_else_changes(name: str) -> None:
    before, after = TEXTS[name]
    assert put(before, ("engine",), VALUES, WORDS, MARK) == after


ENTRIES = {
    "block": (
        "compare:\n  A: {}\n  B:\n    s: {x: 1,\n      y: 2}  # e\n  C: {r: 2}\nz: 1\n",
        "B",
        f"compare:\n  A: {{}}\n  B:\n    s: {{x: 1,\n      y: 2}}  # e\n    # {WORDS}\n    {FLOW}\n"
        "  C: {r: 2}\nz: 1\n",
    ),
    "empty": (
        "compare:\n  A: {}\n  C: {r: 2}\n",
        "A",
        f"compare:\n  # {WORDS}\n  A: {{{FLOW}}}\n  C: {{r: 2}}\n",
    ),
    "flow with a last comma": (
        "compare:\n  A: {}\n  C: {r: 2,}\n",
        "C",
        f"compare:\n  A: {{}}\n  # {WORDS}\n  C: {{r: 2, {FLOW},}}\n",
    ),
    "all in one line": (
        "compare: {A: {}, 'T=5': {x: {y: \"a b\"}}}\n",
        "T=5",
        f"# {WORDS}\ncompare: {{A: {{}}, 'T=5': {{x: {{y: \"a b\"}}, {FLOW}}}}}\n",
    ),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_of_compare_gets_a_section(name: str) -> None:
    before, entry, after = ENTRIES[name]
    assert put(before, ("compare", entry, "engine"), VALUES, WORDS, MARK) == after


def test_null_leaves_the_choice_to_the_engine() -> None:
    changed = put("engine: {chunk: 3}\n", ("engine",), {"chunk": None}, WORDS, MARK)
    assert parse(changed).data == {"engine": {"chunk": None}}


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ('{"a": 1}', ("engine",)),
        ("- a\n", ("engine",)),
        ("a: 1\n", ("compare", "A", "engine")),
        ("compare: {A: }\n", ("compare", "A", "engine")),
        ('{a: "x"}\n', ("engine",)),
        ('compare: {A: {t: "x\n  y", engine: {}}}\n', ("compare", "A", "engine")),
    ],
)
def test_what_cannot_be_changed_in_place_is_refused(text: str, path: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        put(text, path, VALUES, WORDS, MARK)


LINES = st.sampled_from(
    [
        "a: 1",
        "b: {x: [1, 2], y: 'q # r'}  # note",
        "c:\n  d: 1\n  e:\n    - 1\n    - {f: 2}",
        "g: >-\n  some\n\n  text",
        "h: |+\n  kept\n\n",
        'i: "two\n  lines"',
        "j:",
        "# a comment",
        "",
    ]
)
SECTION = st.sampled_from(
    ["", "engine:", "engine: {}", "engine: {chunk: 3}", "engine:\n  # in it\n  threads: 1"]
)


@settings(max_examples=200)
@given(st.lists(LINES, unique=True, max_size=6), SECTION, st.lists(LINES, unique=True, max_size=3))
def test_any_file_keeps_its_lines(before: list[str], section: str, after: list[str]) -> None:
    lines = [*before, section, *(line for line in after if line not in before)]
    text = "".join(f"{line}\n" for line in lines)
    data = parse("z: 1\n" + text).data
    changed = put("z: 1\n" + text, ("engine",), VALUES, WORDS, MARK)
    engine = {**(data.get("engine") or {}), **VALUES}
    assert parse(changed).data == {**data, "engine": engine}
    removed = [
        line[2:]
        for line in difflib.ndiff(("z: 1\n" + text).splitlines(), changed.splitlines())
        if line.startswith("- ")
    ]
    assert all("engine:" in line or "threads:" in line for line in removed)
