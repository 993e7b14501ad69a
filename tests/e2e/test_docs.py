"""The documentation does what it says: its files are written and its commands are run.

A fenced block whose first line is a comment with a file's name is that file, `NAME, continued`
appends to it, and the lines of a bash block are commands. Everything happens in an empty folder, in
the order of the page.
"""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from fedsim import RunStore, Scenario
from tests.e2e.conftest import Command, Result

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
WALKTHROUGHS = (
    "getting-started.md",
    "bring-your-own-data.md",
    "bring-your-own-model.md",
    "flower.md",
    "adding-a-method.md",
    "speed.md",
    "large-populations.md",
    "methods/pfpne.md",
    "asynchronous.md",
    "resuming.md",
    "robustness.md",
)
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"# ([\w-]+\.(?:yaml|py))(, continued)?\n")

QUICK = {  # What takes long is only checked.
    "fedsim run sweep.yaml --seeds 0,1": "fedsim check sweep.yaml --seeds 0,1",
    "fedsim run mine.yaml --set partition.alpha=10 --set rounds=10 --seeds 0,1": (
        "fedsim check mine.yaml --set partition.alpha=10 --set rounds=10 --seeds 0,1"
    ),
    "fedsim demo": f"fedsim check {ROOT / 'fedsim' / 'demo.yaml'}",
}
LONG = "fedsim run scenarios/"


class Page:
    """A page that is followed in the current folder; `results` are those of its commands."""

    def __init__(self, path: Path, fedsim: Command) -> None:
        self.text = path.read_text(encoding="utf-8")
        self.fedsim = fedsim
        self.results: dict[str, Result] = {}

    def follow(self) -> None:
        """Writes every file and runs every command of the page."""
        for language, body in FENCE.findall(self.text):
            if language == "bash":
                for line in body.splitlines():
                    self._run(line)
            elif language in ("yaml", "python"):
                self._write(body)
            else:
                assert language in ("text", "toml"), f"what is a {language} block?"

    def _write(self, body: str) -> None:
        named = NAME.match(body)
        assert named, f"a block that nobody runs:\n{body}"
        path = Path(named[1])
        text = body[named.end() :]
        path.write_text(path.read_text() + text if named[2] else text)
        if path.suffix == ".py" and path.stem in sys.modules:
            del sys.modules[path.stem]  # of another test's folder

    def _run(self, line: str) -> None:
        words = shlex.split(line, comments=True)
        while words and words[0] == "PYTHONPATH=.":
            words = words[1:]
        if not words or words[0] in ("make", "pip", "git", "cd"):
            return
        if words[0] == "python":
            runpy.run_path(words[1])
            return
        if words[0] == "pytest":
            done = subprocess.run(
                [sys.executable, "-m", *words], capture_output=True, text=True,
                env={**os.environ, "PYTHONPATH": "."},
            )  # fmt: skip
            assert done.returncode == 0, done.stdout
            self.results[shlex.join(words)] = Result(0, done.stdout, done.stderr)
            return
        if words[0] == "cp":
            shutil.copy(*words[1:])
            return
        assert words[0] == "fedsim", f"a command that nobody runs: {line}"
        shown = shlex.join(words)
        if shown.startswith(LONG):
            assert (ROOT / words[2]).is_file()
            return
        words = shlex.split(QUICK.get(shown, shown))
        if words[1] == "run":
            words.append("--no-report")
        result = self.fedsim(*words[1:])
        assert result.status == 0, f"{line}\n{result.out}{result.err}"
        self.results[shown] = result


Follow = Callable[[Path], Page]


@pytest.fixture
def follow(fedsim: Command, monkeypatch: pytest.MonkeyPatch) -> Iterator[Follow]:
    """Follows a page in an empty folder from which modules can be imported."""
    monkeypatch.syspath_prepend(Path.cwd())
    before = set(sys.modules)

    def at(path: Path) -> Page:
        page = Page(path, fedsim)
        page.follow()
        return page

    yield at
    for name in set(sys.modules) - before:
        if Path(f"{name}.py").is_file():
            del sys.modules[name]


def final(name: str) -> dict[str, float]:
    """Returns the last metrics of the newest run of a scenario."""
    store = RunStore()
    runs = store.list()
    newest = runs[runs["scenario"] == name].iloc[-1]
    metrics: dict[str, float] = store.open(newest["id"]).summary["metrics"]
    return metrics


def test_getting_started(follow: Follow, fedsim: Command) -> None:
    page = follow(DOCS / "getting-started.md")
    runs = RunStore().list()
    assert len(runs[runs["scenario"] == "first"]) == 1 + 1 + 2  # a copy has the name, too
    assert "12 runs" in page.results["fedsim run sweep.yaml --seeds 0,1"].out
    assert Path("first-data.png").is_file()
    assert "R-hat is above" in page.results["fedsim show latest"].out
    assert Path("first.csv").read_text().startswith("round,split,name,value")
    assert final("posterior")["test.accuracy"] > 0.8
    (shown,) = (body for language, body in FENCE.findall(page.text) if language == "text")
    command, _, printed = shown.partition("\n")
    result = fedsim(*shlex.split(command.removeprefix("$ fedsim")))
    assert (result.status, result.err) == (2, printed)


def test_bring_your_own_data(follow: Follow) -> None:
    page = follow(DOCS / "bring-your-own-data.md")
    assert "300" in page.results["fedsim data show wards.yaml"].out  # three quarters of 400
    assert final("wards")["test.accuracy"] > 0.6
    assert final("pressure")["test.mse"] < 1.5 * 15**2
    assert final("images")["test.nll"] < 1.5
    assert final("moons")["test.accuracy"] > 0.7
    assert final("hospitals")["test.accuracy"] > 0.7
    assert final("sensors")["test.accuracy"] > 0.9
    assert final("slices")["test.accuracy"] > 0.9


def test_large_populations(follow: Follow) -> None:
    page = follow(DOCS / "large-populations.md")
    assert final("crowd")["test.accuracy"] > 0.2
    shown = page.results["fedsim data show crowd.yaml --clients 5"].out
    assert "200,000 clients" in shown
    assert "and 199,995 more clients" in shown


def test_asynchronous(follow: Follow) -> None:
    follow(DOCS / "asynchronous.md")
    runs = {run.record.label: run.metrics for run in map(RunStore().open, RunStore().ids())}
    seconds = {
        label: metrics.query("name == 'total_simulated_seconds'")["value"].iloc[-1]
        for label, metrics in runs.items()
    }
    assert seconds["FedBuff"] < seconds["FedAvg"] / 2
    assert final("late")["test.accuracy"] > 0.7
    assert seconds["over-sampling"] < 0.8 * seconds["wait for all"]
    assert seconds["deadline"] <= 20 * 1.5 < seconds["wait for all"]
    late = runs["over-sampling"].query("name == 'late'")["value"]
    assert late.tolist() == [3.0] * 20


def test_resuming(follow: Follow) -> None:
    page = follow(DOCS / "resuming.md")
    said = page.results["fedsim run long.yaml --resume auto"].err
    assert "long starts anew" in said  # the first was finished
    folders = {path.name for path in RunStore().open("latest").path.glob("checkpoints/*")}
    assert folders == {f"round-{r:06d}" for r in (10, 20, 25, 30)}


def test_robustness(follow: Follow) -> None:
    follow(DOCS / "robustness.md")
    run = RunStore().open("latest")
    counts = run.metrics[run.metrics["name"].str.startswith("faults_")].groupby("name")["value"]
    assert set(counts.sum().index) == {
        "faults_dropped", "faults_late", "faults_nan", "faults_corrupted", "faults_flipped"
    }  # fmt: skip
    assert (counts.sum() > 0).all()
    assert run.summary["metrics"]["test.accuracy"] > 0.5


def test_bring_your_own_model(follow: Follow) -> None:
    follow(DOCS / "bring-your-own-model.md")
    assert final("focal")["test.top2"] > 0.8
    runs = RunStore().list()
    trained, sampled = runs[runs["scenario"] == "mine"]["id"]
    assert RunStore().open(trained).summary["metrics"]["test.accuracy"] > 0.6
    assert RunStore().open(sampled).draws()["last.bias"].shape == (4, 6, 10)


def test_flower(follow: Follow) -> None:
    follow(DOCS / "flower.md")
    runs = RunStore().list()
    assert list(runs["status"]) == ["finished"] * 6
    assert final("app")["test.accuracy"] > 0.8


def test_speed(follow: Follow) -> None:
    page = follow(DOCS / "speed.md")
    assert "mapped" in page.results["fedsim check quick.yaml"].out
    assert "× automatic" in page.results["fedsim tune quick.yaml --seconds 5 --dry-run"].out
    assert RunStore().open("latest").engine["path"] == "one_by_one"


def test_adding_a_method(follow: Follow) -> None:
    page = follow(DOCS / "adding-a-method.md")
    assert final("median")["test.accuracy"] > 0.5
    assert final("signs")["test.accuracy"] > 0.5
    assert "18 passed" in page.results["pytest -q test_my_median.py"].out
    (entry_points,) = (b for language, b in FENCE.findall(page.text) if language == "toml")
    for group in tomllib.loads(entry_points)["project"]["entry-points"].values():
        for place in group.values():
            module, _, name = place.partition(":")
            assert hasattr(importlib.import_module(module.rpartition(".")[2]), name)


def test_readme(follow: Follow) -> None:
    page = follow(ROOT / "README.md")
    runs = RunStore().list()
    assert list(runs["label"]) == ["FedAvg", "FA-HMC"] * 2
    assert (runs["test.accuracy"][:2] > 0.85).all()
    assert "4 runs" in page.results[next(name for name in QUICK if "alpha=10" in name)].out


def test_pfpne(follow: Follow) -> None:
    follow(DOCS / "methods" / "pfpne.md")
    tilted, dosing = (RunStore().open(i) for i in RunStore().list()["id"])
    last = tilted.metrics.query("name == 'pulls'")["value"].iloc[-1]
    assert last == 1000
    assert "Δ was estimated" in dosing.summary["notes"][0]


def test_every_page_with_commands_is_followed() -> None:
    followed = {DOCS / name for name in WALKTHROUGHS}
    with_commands = {
        path
        for path in DOCS.rglob("*.md")
        if "```bash" in path.read_text() and "reference" not in path.relative_to(DOCS).parts
    }
    assert with_commands == followed


def test_navigation_has_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w/.-]+\.md", text[text.index("nav:") :]))
    generated = {"reference/scenario.md"}
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert listed - generated == pages - generated


def test_scenarios_of_the_repository_are_valid() -> None:
    """Every file in scenarios/ loads and expands; its data is not built."""
    paths = sorted((ROOT / "scenarios").rglob("*.yaml"))
    assert paths
    for path in paths:
        assert Scenario.load(path).expand(), path
        assert yaml.safe_load(path.read_text())["name"]
