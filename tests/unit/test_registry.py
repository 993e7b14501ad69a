"""Components by name and by import path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedsim import registry
from fedsim.clients.base import Client, DirectClient
from fedsim.errors import Params, UserError
from fedsim.strategies.base import Strategy


def test_ours_are_registered() -> None:
    assert {"fedavg", "fa-hmc", "fa-ld"} <= set(registry.names("strategies"))
    assert {"sgd", "fa-hmc"} <= set(registry.names("clients"))
    assert registry.names("strategies") == sorted(registry.names("strategies"))


@pytest.mark.parametrize("name", registry.names("strategies"))
def test_a_strategy_names_its_parameters_and_its_client(name: str) -> None:
    kind = registry.load("strategies", name)
    assert issubclass(kind, Strategy)
    assert kind.Params.model_fields["name"].default == name
    assert kind.client in registry.names("clients")
    client = registry.load("clients", kind.client)
    assert kind.sends <= client.honours
    assert client.requires <= kind.sends | {"seed", "server-round"}


@pytest.mark.parametrize("name", registry.names("clients"))
def test_a_client_names_its_parameters(name: str) -> None:
    kind = registry.load("clients", name)
    assert issubclass(kind, Client | DirectClient)
    assert kind.Params.model_fields["name"].default == name
    assert kind.requires <= kind.honours


@pytest.mark.parametrize("kind", ["strategies", "clients"])
def test_every_parameter_is_described(kind: str) -> None:
    for params in registry.params_of(kind).values():
        assert issubclass(params, Params)
        for name, field in params.model_fields.items():
            assert name == "name" or field.description


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"no strategies named 'fedavgg'; there are .*fedavg"):
        registry.load("strategies", "fedavgg")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("json", "not an import path"),
        (":loads", "not an import path"),
        ("json:", "not an import path"),
        ("no_such_module_anywhere:x", "cannot import 'no_such_module_anywhere'"),
        ("json:nothing", "has no attribute 'nothing'"),
        ("json:decoder.nothing", "has no attribute 'decoder.nothing'"),
    ],
)
def test_import_paths_that_lead_nowhere(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.import_path(path)


def test_import_paths() -> None:
    import json

    assert registry.import_path("json:loads") is json.loads
    assert registry.import_path("json:decoder.JSONDecoder") is json.JSONDecoder


def test_a_module_that_fails_is_reported_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module_of_a_user.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="ZeroDivisionError: division by zero"):
        registry.import_path("broken_module_of_a_user:x")
    assert "broken_module_of_a_user" not in sys.modules
