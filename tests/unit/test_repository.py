"""What holds for the repository as a whole: layout, packaging, documentation, and house rules."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
METHOD_FOLDERS = ("strategies", "clients", "server")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None,
    reason="not a git checkout",
)


def tracked(*suffixes: str) -> list[Path]:
    """Returns the regular files under version control, without symlinks."""
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    paths = [ROOT / name for name in listing.split("\0") if name]
    return [
        path
        for path in paths
        if path.is_file() and not path.is_symlink() and (not suffixes or path.suffix in suffixes)
    ]


def shipped() -> list[Path]:
    """Returns the Python files that users install."""
    folders = {"fedsim", *METHOD_FOLDERS}
    return [path for path in tracked(".py") if path.relative_to(ROOT).parts[0] in folders]


def ruff(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the linter in the repository, without its cache."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", *arguments]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True)


@pytest.mark.parametrize("name", METHOD_FOLDERS)
def test_method_folders_are_reached_through_relative_symlinks(name: str) -> None:
    link = ROOT / "fedsim" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"
    assert (link / "__init__.py").is_file()


def test_every_python_file_is_linted_exactly_once() -> None:
    shown = Counter(Path(line).resolve() for line in ruff("--show-files").stdout.splitlines())
    assert {path: count for path, count in shown.items() if count > 1} == {}
    assert [path for path in tracked(".py") if path.resolve() not in shown] == []


@pytest.mark.parametrize("name", METHOD_FOLDERS)
@pytest.mark.parametrize("statement", ["import {}", "from {} import base", "import {}.base"])
def test_linter_refuses_imports_past_the_package(name: str, statement: str) -> None:
    past = ruff("--stdin-filename", "fedsim/x.py", "-", stdin=statement.format(name) + "\n")
    through = ruff("--stdin-filename", "fedsim/x.py", "-", stdin=f"import fedsim.{name}.base\n")
    assert "TID251" in past.stdout
    assert "TID251" not in through.stdout


def test_every_file_can_be_read_in_one_sitting() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in tracked(".py")}
    assert {path: length for path, length in lengths.items() if length >= 500} == {}


def test_no_tracked_file_names_a_place_on_somebodys_machine() -> None:
    home = re.compile(r"(?<![\w.~}$/-])/(?:root|home|Users|work)/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in tracked(".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".proto", ".sh", "")
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if home.search(line)
    ]
    assert found == []


def test_no_absolute_symlinks_are_tracked() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "-s"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    links = [line.split("\t")[1] for line in listing.splitlines() if line.startswith("120000")]
    assert len(links) >= len(METHOD_FOLDERS)
    assert [link for link in links if (ROOT / link).readlink().is_absolute()] == []
    assert [link for link in links if not (ROOT / link).exists()] == []


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_documented_make_targets_exist() -> None:
    named = {
        target
        for path in tracked(".md")
        for code in re.findall(r"```.*?```|`[^`\n]+`|(?m:^ {4}.*$)", path.read_text(), re.DOTALL)
        for target in re.findall(r"\bmake ([a-z][a-z-]*)", code)
    }
    assert {"run", "test"} <= named
    assert named - make_targets() == set()


def test_relative_links_lead_somewhere() -> None:
    generated = ROOT / "docs" / "reference"
    links = [
        path.parent / target
        for path in tracked(".md")
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
        if "://" not in target
    ]
    assert len(links) > 3
    assert [link for link in links if generated not in link.parents and not link.exists()] == []


def _calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def dangers(source: str) -> list[str]:
    """Returns what in this Python source could execute data."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        unsafe = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
        found += [name for name in names if name.partition(".")[0] in unsafe]
    for name, call in _calls(tree):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if (
            name in {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system"}
            or (name == "torch.load" and given.get("weights_only") != "True")
            or given.get("allow_pickle") == "True"
            or given.get("shell") == "True"
        ):
            found.append(name)
    return found


# A traced graph becomes a Python function, as torch.fx does it. Its text is made of positions and
# integers; everything else is bound by reference.
GENERATES_CODE = {"fedsim/grids/passes/codegen.py": ["exec"]}


def test_sources_cannot_execute_data() -> None:
    found = {path.relative_to(ROOT).as_posix(): dangers(path.read_text()) for path in shipped()}
    assert len(found) > 10
    assert {path: names for path, names in found.items() if names} == GENERATES_CODE


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import dumps",
        "eval(text)",
        "yaml.load(text, Loader)",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_dangerous_source_is_seen(source: str) -> None:
    assert dangers(source) != []


def requirements() -> list[Requirement]:
    """Returns what pyproject.toml asks for, without fedsim's own extras and the peers'."""
    project = PYPROJECT["project"]
    extras = {k: v for k, v in project["optional-dependencies"].items() if k != "bench"}
    groups = [project["dependencies"], *extras.values()]
    parsed = [Requirement(text) for group in groups for text in group]
    return [requirement for requirement in parsed if requirement.name != project["name"]]


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_constraints_pin_one_version_within_the_range(requirement: Requirement) -> None:
    matching = [pin for pin in pins() if canonical(pin.name) == canonical(requirement.name)]
    assert len(matching) == 1
    (specifier,) = matching[0].specifier
    assert specifier.operator == "=="
    assert requirement.specifier.contains(specifier.version)


@pytest.mark.parametrize("python", ["3.11.9", "3.12.4", "3.13.1"])
def test_one_pin_at_most_applies_on_every_python(python: str) -> None:
    where = dict(default_environment())
    where |= {"python_full_version": python, "python_version": python.rpartition(".")[0]}
    applying = [canonical(p.name) for p in pins() if p.marker is None or p.marker.evaluate(where)]
    assert [name for name, count in Counter(applying).items() if count > 1] == []


def test_the_extra_all_names_every_optional_feature() -> None:
    extras = dict(PYPROJECT["project"]["optional-dependencies"])
    (everything,) = (Requirement(text) for text in extras.pop("all"))
    assert everything.extras == set(extras) - {"bench", "dev", "docs"}
