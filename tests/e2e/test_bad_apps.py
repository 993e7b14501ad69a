"""`fedsim run --app`: what is refused, what fails, and apps that do what few do."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from fedsim import RunStore
from fedsim.apps import prepare
from fedsim.cli.guard import execute
from tests.e2e.conftest import Command
from tests.e2e.test_apps import APPS, NUMPY, SKLEARN, value

# Wrong input


def test_every_mistake_is_told_at_once_and_nothing_is_written(fedsim: Command) -> None:
    done = fedsim("run", "--app", SKLEARN, "--nodes", 0, "--set", "model.local-epoch=1",
                  "--set", "num-server-rounds=2.5", "--set", "crash-in-round")  # fmt: skip
    assert done.status == 2
    assert "--set model.local-epoch: the app's run config has no such key" in done.err
    assert "Did you mean model.local-epochs?" in done.err
    assert "There are: num-server-rounds, failing-partition, crash-in-round, model.pen" in done.err
    assert "--set num-server-rounds: must be a whole number such as 3 (got '2.5')" in done.err
    assert "--set crash-in-round: must have the form key=value" in done.err
    assert "--nodes: must be a whole number ≥ 1 (got 0)" in done.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--app", NUMPY, "--set", "learning-rate=nan"],
            "--set learning-rate: must be a number such as 0.1 (got 'nan')",
        ),
        (
            ["--app", NUMPY, "--set", f"num-server-rounds={2**63}"],
            "--set num-server-rounds: must be a whole number such as 3",
        ),
        (["--app", NUMPY, "--seeds", 2**64], "--seeds: must be whole numbers from 0 to"),
        (["x.yaml", "--app", NUMPY], "x.yaml is a scenario"),
        (["--app", NUMPY, "--engine", "ray"], "runs on the engine inline, not on ray"),
        (["x.yaml", "--nodes", "3"], "--nodes goes with --app"),
        ([], "there is nothing to run"),
        (["--app", "nowhere"], "there is no such folder"),
        (["--app", APPS], "there is no pyproject.toml in it"),
        (["--app", APPS / "numpy_app" / "numpyapp" / "task.py"], "task.py: is a file. --app takes"),
        (
            ["--app", "mine.yaml"],
            "is a file. --app takes the folder of a Flower app; a scenario is"
            " run by: fedsim run mine.yaml",
        ),
        (
            [NUMPY],
            f"is a folder, not a scenario file. A Flower app is run by: fedsim run --app {NUMPY}",
        ),
        (["--app", NUMPY, "--set", "standardise=yes"], "standardise: must be true or false"),
        (["--app", NUMPY, "--seeds", "a"], "is not a list of whole numbers"),
    ],
)
def test_what_does_not_go_together_is_refused(
    fedsim: Command, arguments: list[object], words: str
) -> None:
    Path("mine.yaml").write_text("name: mine\n")
    done = fedsim("run", *arguments)
    assert done.status == 2
    assert words.strip() in " ".join(done.err.replace("│", " ").split())


def test_a_boolean_is_true_in_toml_and_in_python(fedsim: Command) -> None:
    for text, meant in (("true", True), ("True", True), ("false", False), ("False", False)):
        (spec,) = prepare(NUMPY, [f"standardise={text}"])
        assert spec.scenario.run_config["standardise"] is meant


def make_app(folder: Path, server: str, client: str, package: str = "same") -> Path:
    """Writes an app of two modules and returns its folder."""
    (folder / package).mkdir(parents=True)
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "{folder.name}"\nversion = "1"\n[tool.flwr.app]\npublisher = "me"\n'
        f'[tool.flwr.app.components]\nserverapp = "{package}.server:app"\n'
        f'clientapp = "{package}.client:app"\n'
    )
    (folder / package / "__init__.py").write_text("")
    (folder / package / "server.py").write_text(server)
    (folder / package / "client.py").write_text(client)
    return folder


CLIENT = """
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()
@app.query()
def query(message, context):
    message.content["config"]["seen"] = 1
    metrics = MetricRecord({"answer": ANSWER})
    return Message(RecordDict({"m": metrics}), reply_to=message)
"""
SERVER = """
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    for _ in range(2):
        content = RecordDict({"config": ConfigRecord()})
        nodes = grid.get_node_ids()
        list(grid.send_and_receive([Message(content, n, "query") for n in nodes]))
"""


def test_an_app_may_go_into_another_folder(fedsim: Command, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    chdir = "import os\nos.chdir('elsewhere' if os.path.isdir('elsewhere') else '.')\n"
    for name, answer in (("good", "1"), ("bad", "1 / 0")):
        make_app(tmp_path / name, SERVER, chdir + CLIENT.replace("ANSWER", answer))
    done = fedsim("run", "--app", "good")
    assert done.status == 0, done.err
    assert f"  runs/{RunStore().ids()[0]}\n" in done.out
    failed = fedsim("run", "--app", "bad", "--no-report")
    assert failed.status == 1
    assert failed.err.rstrip().endswith(f"in runs/{RunStore().open('latest').id}")
    assert Path.cwd() == tmp_path
    assert {RunStore().open(each).status for each in RunStore().ids()} == {"failed", "finished"}
    assert not list(Path("elsewhere").iterdir())


def test_a_group_that_is_no_round_is_none(fedsim: Command, tmp_path: Path) -> None:
    groups = """groups = iter(["3", "1795532744775688915", "7" * 39, "9"])
"""
    server = SERVER.replace("app = Server", f"{groups}app = Server").replace("range(2)", "range(4)")
    server = server.replace('"query")', '"query", group_id=group)').replace(
        "        content =", "        group = next(groups)\n        content ="
    )
    make_app(tmp_path / "grouped", server, CLIENT.replace("ANSWER", "1"))
    assert fedsim("run", "--app", "grouped", "--no-report").status == 0
    run = RunStore().open("latest")
    # those with a time and a UUID are the next after the round before
    assert list(run.metrics.query("name == 'messages'")["round"]) == [3, 4, 5, 9]
    assert "grouped" in fedsim("runs").out


def test_two_apps_with_the_same_package_name_are_two(fedsim: Command, tmp_path: Path) -> None:
    for name, answer in (("one", 1), ("two", 2)):
        make_app(tmp_path / name, SERVER, CLIENT.replace("ANSWER", str(answer)))
    for name, answer in (("one", 1), ("two", 2), ("one", 1)):
        assert fedsim("run", "--app", name, "--no-report").status == 0
        run = RunStore().open("latest")
        # no strategy and no round number: a round is what each node is asked once
        assert value(run, 1, "query", "answer") == value(run, 2, "query", "answer") == answer
        assert len(run.client_metrics) == 2 * 2
        shutil.rmtree("runs")
    assert "same" not in sys.modules
    assert not {str(tmp_path / "one"), str(tmp_path / "two")} & set(sys.path)


LEGACY_CLIENT = """
from flwr.client import ClientApp, NumPyClient
class Flower(NumPyClient):
    def fit(self, parameters, config):
        return parameters, 1, {}
def client_fn(context):
    return Flower().to_client()
app = ClientApp(client_fn=client_fn)
"""
LEGACY_SERVER = """
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
def server_fn(context):
    return ServerAppComponents(strategy=FedAvg(), config=ServerConfig(num_rounds=1))
app = ServerApp(server_fn=server_fn)
"""


def test_apps_of_the_former_api_are_refused(fedsim: Command, tmp_path: Path) -> None:
    make_app(tmp_path / "old", LEGACY_SERVER, LEGACY_CLIENT)
    done = fedsim("run", "--app", "old")
    assert done.status == 2
    assert "is built from a client_fn (NumPyClient, Client)" in done.err
    assert "functions under @app.train()" in done.err
    assert "is built from a server_fn" in done.err
    assert "@app.main()" in done.err
    assert not Path("runs").exists()


def test_an_app_that_cannot_be_imported_says_where(fedsim: Command, tmp_path: Path) -> None:
    make_app(tmp_path / "broken", SERVER + "\nimport nowhere_to_be_found\n", "app = 3\n")
    done = fedsim("run", "--app", "broken")
    assert done.status == 2
    assert "No module named 'nowhere_to_be_found'" in done.err
    assert "server.py, line 12" in done.err
    assert "must be a ClientApp, not a int" in done.err


def test_waiting_for_nodes_that_never_come_fails(
    fedsim: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.apps.grid.PATIENCE_SECONDS", 0.0)
    server = SERVER.replace(
        "    for _ in", "    while len(grid.get_node_ids()) < 9: pass\n    for _ in"
    )
    make_app(tmp_path / "waiting", server, CLIENT.replace("ANSWER", "1"))
    done = fedsim("run", "--app", "waiting", "--no-report")
    assert done.status == 1
    assert "it seems to wait for more than the 2 that there are" in done.err
    assert fedsim("run", "--app", "waiting", "--nodes", 9, "--no-report").status == 0


LOUD = """
import subprocess
subprocess.run(["echo", "imported"])
print("and printed")
"""


def test_what_an_apps_programs_print_leaves_standard_output_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    server = SERVER + "    subprocess.run(['echo', 'served'])\n"
    client = CLIENT.replace("ANSWER", "subprocess.run(['echo', 'answered']).returncode")
    make_app(tmp_path / "loud", LOUD + server, "import subprocess\n" + client)
    assert execute(["run", "--app", "loud", "--json", "--no-report", "--out", "runs"]) == 0
    out, err = capfd.readouterr()
    (run,) = json.loads(out)["runs"]
    assert run["status"] == "finished"
    for word in ("imported", "and printed", "served", "answered"):
        assert word in err


NAN_SERVER = """
import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
app = ServerApp()
@app.main()
def main(grid, context):
    FedAvg(fraction_evaluate=0.0).start(grid, ArrayRecord([np.ones(2), np.ones(1)]), num_rounds=3)
"""
NAN_CLIENT = """
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()
@app.train()
def train(message, context):
    first, second = message.content["arrays"].to_numpy_ndarrays()
    now = message.content["config"]["server-round"]
    metrics = MetricRecord({"num-examples": 1, "loss": float("nan") if now > 1 else 0.5,
                            "early": float("inf") if now < 3 else 1.0})
    content = {"arrays": ArrayRecord([first * BY, second]), "metrics": metrics}
    return Message(RecordDict(content), reply_to=message)
"""


@pytest.mark.parametrize("by", ["np.nan", "1.0"])
def test_results_that_are_no_numbers_are_told(fedsim: Command, tmp_path: Path, by: str) -> None:
    make_app(tmp_path / "lost", NAN_SERVER, NAN_CLIENT.replace("BY", by))
    done = fedsim("run", "--app", "lost", "--no-report", "-q")
    assert done.status == 0
    run = RunStore().open("latest")
    expected = ["train/loss is NaN or Inf since round 2"]
    if by == "np.nan":
        expected = ["the final parameters have NaN or Inf, in 1 of 2 arrays", *expected]
    assert run.summary["notes"] == expected
    assert list(run.events.query("kind == 'not_finite'")["what"]) == expected
    assert f"fedsim: run {run.id}: {'; '.join(expected)}\n" in done.err
    assert expected[0] in fedsim("show", "latest").out


def test_the_last_lines_say_where_the_apps_log_is(fedsim: Command) -> None:
    done = fedsim("run", "--app", NUMPY, "--no-report", "--set", "num-server-rounds=1")
    assert f"  runs/{RunStore().ids()[0]}/app.log\n" in done.out


def test_a_run_in_which_no_node_ever_answers_fails(fedsim: Command, tmp_path: Path) -> None:
    make_app(tmp_path / "mute", SERVER, CLIENT.replace("ANSWER", "1 / 0"))
    done = fedsim("run", "--app", "mute", "--no-report")
    assert done.status == 1
    first = "round 1, query: client 0 (node 2): ZeroDivisionError: division by zero"
    assert "no node has answered a message; 4 of 4 messages were answered by an error" in done.err
    assert f"the first in {first}; app.log has the traceback" in done.err
    assert RunStore().open("latest").status == "failed"


def test_a_message_of_a_server_is_its_own_after_it_was_sent(
    fedsim: Command, tmp_path: Path
) -> None:
    server = """
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    assert grid.run.run_id == context.run_id
    assert (grid.run.fab_id, grid.run.fab_version) == ("me/changing", "1")
    content = RecordDict({"config": ConfigRecord({"n": 1})})
    first = grid.push_messages([Message(content, 2, "query.echo", ttl=60.0, group_id="4")])
    content["config"]["n"] = 2
    never = grid.push_messages([Message(content, 2, "query.echo", group_id="4")])
    last = grid.push_messages([Message(content, 2, "query.echo", group_id="5")])
    (reply,) = grid.pull_messages(first)
    assert dict(reply.content["config"]) == {"n": 1, "times": 1}, reply.content
    assert reply.metadata.group_id == "4"
    assert 0 < reply.metadata.ttl <= 60
    assert reply.metadata.message_id
    (reply,) = grid.pull_messages(last)
    assert dict(reply.content["config"]) == {"n": 2, "times": 3}
    assert dict(content["config"]) == {"n": 2}
    (bad,) = grid.send_and_receive([Message(content, 3, "query.leave", group_id="6")])
    assert (bad.error.code, bad.error.reason) == (2, "SystemExit: 5")
    raise SystemExit
"""
    client = """
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()
@app.query("echo")
def echo(message, context):
    kept = context.state.setdefault("config", ConfigRecord({"times": 0}))
    kept["times"] += 1
    message.content["config"]["times"] = kept["times"]
    return Message(message.content, reply_to=message)
@app.query("leave")
def leave(message, context):
    raise SystemExit(5)
"""
    make_app(tmp_path / "changing", server, client)
    done = fedsim("run", "--app", "changing", "--no-report")
    assert done.status == 0, done.err
    run = RunStore().open("latest")
    assert list(run.metrics.query("name == 'messages'")["round"]) == [4, 5, 6]
    assert not (run.path / "parameters.safetensors").exists()


def test_the_help_names_the_options(fedsim: Command) -> None:
    shown = fedsim("run", "--help").out
    assert "--app" in shown
    assert "--nodes" in shown
