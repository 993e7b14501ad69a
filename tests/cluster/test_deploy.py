"""The files in deploy/: what can be checked of them without a cloud, a cluster or a builder."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from click.testing import CliRunner

from fedsim import Scenario
from fedsim.cli.app import app
from fedsim.cluster import launcher

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
LAUNCHER = sorted((DEPLOY / "ray").glob("*.yaml"))
MANIFESTS = sorted((DEPLOY / "k8s").glob("*.yaml"))
PINS = dict(
    re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
)


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


@pytest.mark.parametrize("path", LAUNCHER, ids=names(LAUNCHER))
def test_ray_accepts_its_launcher_files(path: Path) -> None:
    """By what `ray up` itself does before it talks to a cloud: defaults, schema, further checks."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    written = yaml.safe_load(path.read_text())
    prepared = prepare_config(written)
    validate_config(prepared)
    for name in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        assert prepared[name] == written[name]
    with pytest.raises(Exception, match="'wrong' was unexpected"):
        validate_config(prepare_config({**written, "wrong": 1}))


@pytest.mark.parametrize("path", LAUNCHER, ids=names(LAUNCHER))
def test_launcher_files_bring_token_wheel_and_bounds(path: Path) -> None:
    assert launcher.check(path) == "fedsim"
    config = yaml.safe_load(path.read_text())
    assert set(config["file_mounts"].values()) == {"~/.ray/auth_token", "dist", "constraints.txt"}
    starts = [
        line
        for name in launcher.STARTS
        for line in config[name]
        if re.search(r"\bray start\b", line)
    ]
    assert len(starts) == 2
    assert all("--object-store-memory=" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "--disable-usage-stats" in starts[0]


@pytest.mark.parametrize("path", LAUNCHER, ids=names(LAUNCHER))
def test_commands_of_launcher_files_are_shell(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    lines = [line for name, value in config.items() if name.endswith("_commands") for line in value]
    assert len(lines) >= 6
    for line in lines:
        done = subprocess.run(["bash", "-n", "-c", line], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), line


def test_the_mode_is_written_once_for_all_shells(tmp_path: Path) -> None:
    """The line that writes ~/.bashrc, run twice, and read by a shell as the launcher opens one."""
    for path in LAUNCHER:
        home = tmp_path / path.stem
        home.mkdir()
        environment = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
        (line,) = (
            line for line in yaml.safe_load(path.read_text())["setup_commands"] if "bashrc" in line
        )
        for _ in range(2):
            subprocess.run(["bash", "-c", line], env=environment, check=True)
        shown = subprocess.run(
            ["bash", "-c", "source ~/.bashrc; echo $RAY_AUTH_MODE $RAY_USAGE_STATS_ENABLED"],
            env=environment, check=True, capture_output=True, text=True,
        )  # fmt: skip
        assert shown.stdout == "token 0\n"
        assert (home / ".bashrc").read_text().count("RAY_AUTH_MODE") == 1


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def of_kind(path: Path, kind: str) -> dict[str, Any]:
    (found,) = (each for each in documents(path) if each["kind"] == kind)
    return found


def clusters() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every cluster that a manifest describes."""
    yield "raycluster.yaml", of_kind(DEPLOY / "k8s/raycluster.yaml", "RayCluster")["spec"]
    job = of_kind(DEPLOY / "k8s/rayjob.yaml", "RayJob")
    yield "rayjob.yaml", job["spec"]["rayClusterSpec"]


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def test_manifests_are_of_the_kinds_that_kuberay_knows() -> None:
    assert names(MANIFESTS) == ["raycluster.yaml", "rayjob.yaml"]
    for path in MANIFESTS:
        for each in documents(path):
            ours = each["kind"].startswith("Ray")
            assert each["apiVersion"] == ("ray.io/v1" if ours else "v1")
            assert re.fullmatch("[a-z][a-z-]*", each["metadata"]["name"])


@pytest.mark.parametrize(
    ("name", "spec"), list(clusters()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_clusters_on_kubernetes(name: str, spec: dict[str, Any]) -> None:
    assert spec["rayVersion"] == PINS["ray"]
    # KubeRay makes the Secret with the token, and RAY_AUTH_MODE and RAY_AUTH_TOKEN from it.
    assert spec["authOptions"] == {"mode": "token"}
    version = re.search(r'^__version__ = "(.*)"', (ROOT / "fedsim/__init__.py").read_text(), re.M)
    assert version
    for group in groups(spec):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == f"fedsim:{version[1]}"
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert set(resources["limits"]) == {"cpu", "memory"}
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        objects = int(group["rayStartParams"]["object-store-memory"])
        assert objects < 0.3 * int(resources["limits"]["memory"].removesuffix("Gi")) * 2**30
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert "env" not in container  # no token in a file under version control
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_claims_and_config_maps_that_pods_name_are_in_the_same_file() -> None:
    for path, (_, spec) in zip(MANIFESTS, clusters(), strict=True):
        defined = {(each["kind"], each["metadata"]["name"]) for each in documents(path)}
        for group in groups(spec):
            for volume in group["template"]["spec"].get("volumes", []):
                if "configMap" in volume:
                    assert ("ConfigMap", volume["configMap"]["name"]) in defined
                else:
                    claim = volume["persistentVolumeClaim"]["claimName"]
                    assert ("PersistentVolumeClaim", claim) in defined


def test_the_job_runs_a_scenario_that_is_there(tmp_path: Path) -> None:
    path = DEPLOY / "k8s/rayjob.yaml"
    spec = of_kind(path, "RayJob")["spec"]
    program, name, *arguments = shlex.split(spec["entrypoint"])
    assert (program, name) == ("fedsim", "run")
    group = typer.main.get_command(app)
    call = group.get_command(None, name).make_context(name, list(arguments))  # type: ignore[attr-defined, arg-type]
    assert call.params["engine"] == "ray"
    (scenario,) = call.params["scenarios"]
    (container,) = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    places = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    text = of_kind(path, "ConfigMap")["data"][Path(scenario).name]
    assert scenario == f"{places['scenario']}/scenario.yaml"
    assert str(call.params["out"]) == places["runs"]
    copy = tmp_path / "scenario.yaml"
    copy.write_text(text)
    (only,) = Scenario.load(copy).expand()
    assert only.scenario.rounds == 40


CONTAINERFILE = DEPLOY / "container" / "Containerfile"


def instructions() -> list[tuple[str, str]]:
    """Returns the Containerfile's instructions and what they are given, without comments."""
    lines = [line for line in CONTAINERFILE.read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (word, rest)
        for word, _, rest in (line.partition(" ") for line in text.splitlines())
        if word
    ]


def test_the_container_file_keeps_the_rules() -> None:
    found = instructions()
    known = {"ARG", "FROM", "ENV", "WORKDIR", "RUN", "COPY", "USER", "CMD"}
    assert {word for word, _ in found} <= known
    bases = [rest.split()[0] for word, rest in found if word == "FROM"]
    assert len(bases) == 2  # what builds stays behind
    assert all(re.search(r":\$\{PYTHON\}-slim-", base) for base in bases)  # never the newest
    users = [rest for word, rest in found if word == "USER"]
    assert users == ["1000"]  # a number, so that Kubernetes can tell that it is not root
    last = [word for word, _ in found]
    assert last.index("USER") > max(i for i, word in enumerate(last) if word in ("RUN", "COPY"))
    for word, rest in found:
        if word == "RUN":
            done = subprocess.run(["bash", "-n", "-c", rest], capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, "")
            assert "sudo" not in rest
        if "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert "rm -rf /var/lib/apt/lists" in rest
    copied = " ".join(rest for word, rest in found if word == "RUN")
    assert '[ray,bayes,data]" "ray[default]"' in copied
    (command,) = (rest for word, rest in found if word == "CMD")
    (program, *words) = yaml.safe_load(command)
    assert program == "fedsim"
    assert CliRunner().invoke(typer.main.get_command(app), words).exit_code == 0


def sources() -> list[str]:
    """Returns what the Containerfile copies from the repository."""
    copies = [rest.split() for word, rest in instructions() if word == "COPY"]
    return [each for words in copies if not words[0].startswith("--from") for each in words[:-1]]


def test_what_the_container_copies_is_there_and_travels() -> None:
    ignore = CONTAINERFILE.with_name("Containerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    assert ignore[1] == "*"
    assert set(sources()) == allowed
    assert [name for name in sources() if not (ROOT / name).exists()] == []


@pytest.mark.slow
def test_what_the_container_copies_makes_a_whole_wheel(tmp_path: Path) -> None:
    """Builds the wheel from those files alone, as the first stage does."""
    for name in sources():
        subprocess.run(["cp", "-R", str(ROOT / name), str(tmp_path / name)], check=True)
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", "dist", "."]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "fedsim/strategies/fedavg.py",
        "fedsim/clients/sgd.py",
        "fedsim/server/loop.py",
    } <= inside
