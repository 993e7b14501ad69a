"""The YAML reader: lines of fields, YAML 1.2 scalars, and what it refuses."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest
import yaml

from fedsim.errors import ScenarioError
from fedsim.scenario.loader import MAX_BYTES, parse, parse_value, read, scalar

TEXT = """\
# a comment
name: x

strategy:
  name: fa-hmc   # the method
  betas:
    - 0.9
    - 0.99
engine: {threads: 2,
         chunk: 8}
"""


def test_every_field_knows_its_line() -> None:
    document = parse(TEXT)
    assert document.data == {
        "name": "x",
        "strategy": {"name": "fa-hmc", "betas": [0.9, 0.99]},
        "engine": {"threads": 2, "chunk": 8},
    }
    lines = {path: origin.line for path, origin in document.sources.origins.items() if path}
    assert lines == {
        ("name",): 2,
        ("strategy",): 4,
        ("strategy", "name"): 5,
        ("strategy", "betas"): 6,
        ("strategy", "betas", 0): 7,
        ("strategy", "betas", 1): 8,
        ("engine",): 9,
        ("engine", "threads"): 9,
        ("engine", "chunk"): 10,
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-1.5e+2", -150.0),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-3", -3),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-31", "2024-01-31"),
        ("yes", "yes"),
        ("on", "on"),
        ("Off", "Off"),
        ("n", "n"),
        ("True", True),
        ("false", False),
        ("~", None),
        ("null", None),
        ("", None),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("nan", "nan"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    got = scalar(text)
    assert got == value
    assert type(got) is type(value)


def test_quotes_make_text_and_keys_are_text() -> None:
    assert parse("'on': \"1\"\non2: '1e3'\n12: |\n  5\n").data == {
        "on": "1",
        "on2": "1e3",
        "12": "5\n",
    }


def test_escapes_of_json_and_no_control_characters_in_messages() -> None:
    assert parse('a: "\\ud83d\\ude00"').data == {"a": "\N{GRINNING FACE}"}
    document = parse('"\\e[31m\\n": &x 1')
    (mistake,) = document.mistakes
    assert document.sources.problem(mistake).field == "\\x1b[31m\\n"


def test_not_a_number_is_read() -> None:
    assert math.isnan(parse_value(".nan"))


def test_agrees_with_pyyaml_where_yaml_1_1_and_1_2_do() -> None:
    text = (
        "a: [1, 2.5, x, {b: null}]\nc:\n- - 1\n  - [2]\n-\n- d: true\n  e: >\n    folded\n    text"
    )
    assert parse(text).data == yaml.safe_load(text)


BOMB = "a: &a [x, x]\n" + "".join(
    f"{c}: &{c} [*{p}, *{p}, *{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", None, "is empty"),
        ("# only a comment\n", None, "is empty"),
        ("- a\n- b\n", 1, "must be a mapping (section: value) at the top"),
        ("\njust text\n", 2, "must be a mapping (section: value) at the top"),
        ("a: 1\n---\nb: 2\n", 2, "holds more than one YAML document (---)"),
        ("a:\n\tb: 1\n", 2, "a tab where YAML allows only spaces; indent with spaces"),
        ("a:\n  b: 1\n\tc: 2\n", 3, "a tab where YAML allows only spaces; indent with spaces"),
        ("a: [1,\nb: 2\n", 3, "is not valid YAML"),
        ("a: 'x\n", 2, "is not valid YAML"),
        ("a: 1\n  b: 2\n", 2, "is not valid YAML"),
        ("a: 1\nb: \x07\n", 2, "holds a character that YAML does not allow"),
        ("[a, b]: 1\n", 1, "a key must be plain text, not a list or a mapping"),
        ("a: 1\n? {b: 1}\n: 2\n", 2, "a key must be plain text, not a list or a mapping"),
        ('a: 1\nb: "\\ud800"\n', 2, "holds half of a surrogate pair"),
        ("a: &x 1\n*x : 2\n", 2, "an alias (*) cannot be a key"),
        ("a: " + "[" * 40 + "]" * 40, 1, "is nested deeper than 32 levels"),
    ],
)
def test_unreadable_text_is_refused_with_its_line(
    text: str, line: int | None, message: str
) -> None:
    with pytest.raises(ScenarioError) as caught:
        parse(text, "s.yaml")
    (problem,) = caught.value.problems
    assert problem.message.startswith(message)
    assert (problem.file, problem.line) == ("s.yaml", line)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "a: 1\nb: 2\na: 3\n",
            [("a", 1, "is given twice, in line 1 and in line 3")],
        ),
        (
            "s:\n  x: 1\n  x: {y: 2}\n  x: [3]\n",
            [
                ("s.x", 2, "is given twice, in line 2 and in line 3"),
                ("s.x", 2, "is given twice, in line 2 and in line 4"),
            ],
        ),
        (
            "a: 1\nb: !!python/object/apply:os.system ['true']\n",
            [("b", 2, "tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed")],
        ),
        ("a: !mine {b: 1}\n", [("a", 1, "tag '!mine' is not allowed")]),
        ("a: !!str 5\n", [("a", 1, "tag 'tag:yaml.org,2002:str' is not allowed")]),
        ("!x a: 1\n", [("a", 1, "tag '!x' is not allowed")]),
        (
            "a: &x 1\nb: *x\n",
            [("a", 1, "anchor &x is not allowed"), ("b", 2, "alias *x is not allowed")],
        ),
        (
            "a: &x {b: 1}\nc:\n  <<: *x\n",
            [("a", 1, "anchor &x is not allowed"), ("c.<<", 3, "alias *x is not allowed")],
        ),
    ],
)
def test_what_leaves_the_rest_readable_is_collected(
    text: str, expected: list[tuple[str, int, str]]
) -> None:
    document = parse(text)
    problems = [document.sources.problem(mistake) for mistake in document.mistakes]
    assert [(p.field, p.line, p.message) for p in problems] == expected


def test_the_first_of_two_values_counts_and_the_second_leaves_no_trace() -> None:
    document = parse("a: {b: 1}\na: {b: 2, c: 3}\nd: 4\n")
    assert document.data == {"a": {"b": 1}, "d": 4}
    assert document.sources.origin(("a", "b")).line == 1


def test_an_alias_bomb_costs_nothing() -> None:
    start = time.thread_time()
    document = parse(BOMB)
    assert len(document.mistakes) == 9 + 8 * 3
    assert time.thread_time() - start < 1


def test_tags_run_nothing(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    parse(f"a: !!python/object/apply:pathlib.Path.touch [{touched}]\n")
    assert not touched.exists()


def test_files_that_are_no_scenario_are_refused(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("a: 1\nname: Zürich\n".encode("latin-1"))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, message in (
        (tmp_path / "none.yaml", "does not exist"),
        (tmp_path, "is a folder, not a scenario file"),
        (fifo, "is not a regular file"),
        (latin, "is not UTF-8 text"),
        (latin / "below", "cannot be read"),
        (tmp_path / "a\0b", "is no path"),
    ):
        with pytest.raises(ScenarioError, match=message):
            read(path)
    with pytest.raises(ScenarioError, match=r"latin\.yaml:2: "):
        read(latin)


def test_200_mb_are_refused_without_reading_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = tmp_path / "large.yaml"
    with large.open("wb") as stream:
        stream.truncate(200_000_000)  # sparse: costs no disk
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("the file was opened"))
    with pytest.raises(ScenarioError, match=r"is 190\.7 MiB large; a scenario has at most 1 MiB"):
        read(large)


def test_a_file_of_exactly_the_limit_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    head = b"\xef\xbb\xbfname: x\n#"
    file.write_bytes(head + b" " * (MAX_BYTES - len(head)))
    assert read(file).data == {"name": "x"}
    file.write_bytes(head + b" " * (MAX_BYTES - len(head) + 1))
    with pytest.raises(ScenarioError, match="at most 1 MiB"):
        read(file)


def test_values_of_overrides() -> None:
    assert parse_value("0.05") == 0.05
    assert parse_value("[1, {a: b}]") == [1, {"a": "b"}]
    assert parse_value("") is None
    for text in ("{", "!!str x", "a: 1\n--- 2", "&x 1"):
        with pytest.raises(ScenarioError):
            parse_value(text)
