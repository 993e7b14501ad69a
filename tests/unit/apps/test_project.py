"""Reading an app's pyproject.toml and the overrides of its run config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import flatten_dict, parse_config_args

from fedsim._flower import DEFAULT_NODES
from fedsim.apps.project import override, read
from fedsim.errors import ScenarioError

HEAD = """
[project]
name = "an-app"
version = "0.1"
[tool.flwr.app]
publisher = "me"
[tool.flwr.app.components]
serverapp = "an.server:app"
clientapp = "an.client:deep.app"
"""


def project(folder: Path, text: str) -> Any:
    (folder / "pyproject.toml").write_text(text)
    return read(folder)


def test_a_run_config_is_flattened_as_flower_does(tmp_path: Path) -> None:
    text = HEAD + (
        '[tool.flwr.app.config]\nlr = 0.1\nname = "x"\nflag = true\n'
        "[tool.flwr.app.config.model]\nwidth = 3\nopt.beta = 0.9\n"
    )
    found = project(tmp_path, text)
    raw = {"lr": 0.1, "name": "x", "flag": True, "model": {"width": 3, "opt": {"beta": 0.9}}}
    assert dict(found.config) == flatten_dict(raw)
    assert (found.name, found.version, found.publisher) == ("an-app", "0.1", "me")
    assert (found.serverapp, found.clientapp) == ("an.server:app", "an.client:deep.app")
    assert read(tmp_path / "pyproject.toml") == found


@pytest.mark.parametrize(
    ("table", "nodes"),
    [
        ("", DEFAULT_NODES),
        ("[tool.flwr.federations.sim]\noptions.num-supernodes = 7", 7),
        (
            '[tool.flwr.federations]\ndefault = "b"\n'
            "[tool.flwr.federations.a]\noptions.num-supernodes = 7\n"
            "[tool.flwr.federations.b]\noptions.num-supernodes = 8\n",
            8,
        ),
        (
            '[tool.flwr.federations]\ndefault = "remote"\n'
            '[tool.flwr.federations.remote]\naddress = "127.0.0.1:9093"\n'
            "[tool.flwr.federations.sim]\noptions.num-supernodes = 9\n",
            9,
        ),
    ],
)
def test_the_app_says_how_many_nodes(tmp_path: Path, table: str, nodes: int) -> None:
    assert project(tmp_path, HEAD + table).nodes == nodes


def test_every_mistake_in_the_file_is_found(tmp_path: Path) -> None:
    text = (
        '[tool.flwr.app.components]\nserverapp = "no_object"\n'
        "[tool.flwr.app.config]\nlist = [1]\ndeep.date = 2020-01-01\n"
        "[tool.flwr.federations.x]\noptions.num-supernodes = 0\n"
    )
    with pytest.raises(ScenarioError) as raised:
        project(tmp_path, text)
    fields = [problem.field for problem in raised.value.problems]
    assert fields == [
        "tool.flwr.app.components.serverapp",
        "tool.flwr.app.components.clientapp",
        "tool.flwr.app.config.list",
        "tool.flwr.app.config.deep.date",
        "tool.flwr.federations: options.num-supernodes",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[project]\nname = 'x'\n", "[tool.flwr.app]: is missing"),
        ("[tool.flwr.app.components]\nagentapp = 'a:b'\n", "agent apps do not run here"),
        ("name = ", "is not TOML"),
        ("tool = 3\n", "[tool.flwr.app]: is missing"),
    ],
)
def test_what_is_no_app_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ScenarioError, match=words.replace("[", r"\[")):
        project(tmp_path, text)


CONFIG = {"n": 3, "lr": 0.1, "flag": False, "name": "x", "model.width": 8}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n=5", 5),
        ("n = 1_000", 1000),
        ("lr=2", 2.0),
        ("lr=1e-3", 1e-3),
        ("flag=true", True),
        ("name=fedprox", "fedprox"),
        ("name='a b'", "a b"),
        ("name=5", "5"),
        ("name=a=b", "a=b"),
        ("model.width=16", 16),
    ],
)
def test_values_have_the_type_of_their_default(text: str, expected: object) -> None:
    (found,) = override(CONFIG, [text]).values()
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("text", ["n=5", "lr=0.5", "flag=true", 'name="y"', "model.width=16"])
def test_what_flower_reads_is_read_alike(text: str) -> None:
    assert override(CONFIG, [text]) == parse_config_args([text])


@pytest.mark.parametrize("text", ["n=0.5", "n=true", "n=", "lr=a", "lr=true", "flag=1", "flag=yes"])
def test_values_of_another_type_are_refused(text: str) -> None:
    with pytest.raises(ScenarioError, match="must be"):
        override(CONFIG, [text])


def test_the_last_of_equal_keys_wins() -> None:
    assert override(CONFIG, ["n=1", "n=2"]) == {"n": 2}
