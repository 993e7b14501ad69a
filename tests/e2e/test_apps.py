"""`fedsim run --app`: Flower apps as their users write them, and what is left of their runs."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedsim import RunStore
from fedsim._flower import Run as FlowerRun
from fedsim._flower import set_identity, set_message_id
from fedsim.apps import prepare
from fedsim.apps.plan import components
from tests.e2e.conftest import Command

APPS = Path(__file__).parents[1] / "apps"
NUMPY, TORCH, SKLEARN = APPS / "numpy_app", APPS / "torch_app", APPS / "sklearn_app"


def value(run: Any, round: int, split: str, name: str) -> float:
    """Returns the one value of a metric."""
    rows = run.metrics.query("round == @round and split == @split and name == @name")
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


# NumPy: every number by hand


def by_hand(nodes: int, rounds: int, lr: float, steps: int) -> list[np.ndarray]:
    """Returns the weights after each round of FedAvg on the app's data, the first ones too."""
    true = np.array([1.0, -2.0, 0.5])
    weights = [np.zeros(3)]
    data = []
    for partition in range(nodes):
        rng = np.random.default_rng(100 + partition)
        x = rng.normal(size=(20 + 10 * partition, 3))
        data.append((x, x @ true + 0.1 * rng.normal(size=len(x))))
    for _ in range(rounds):
        total, new = sum(len(x) for x, _ in data), np.zeros(3)
        for x, y in data:
            local = weights[-1]
            for _ in range(steps):
                local = local - lr * x.T @ (x @ local - y) / len(x)
            new += local * len(x) / total
        weights.append(new)
    return weights


def test_an_app_gives_what_federated_averaging_gives_by_hand(fedsim: Command) -> None:
    done = fedsim("run", "--app", NUMPY, "--set", "learning-rate=0.1", "--no-report")
    assert done.status == 0, done.err
    run = RunStore().open("latest")
    expected = by_hand(nodes=5, rounds=4, lr=0.1, steps=3)
    (arrays,) = run.parameters().values()
    np.testing.assert_allclose(arrays, expected[-1], rtol=1e-12)
    for server_round, weights in enumerate(expected):
        distance = np.linalg.norm(weights - np.array([1.0, -2.0, 0.5]))
        assert value(run, server_round, "test", "distance") == pytest.approx(distance, rel=1e-12)
    assert run.status == "finished"
    assert run.record.rounds == 4
    assert run.scenario["app"]["path"] == str(NUMPY)
    assert run.scenario["app"]["version"] == "1.2.0"
    assert run.scenario["nodes"] == 5  # options.num-supernodes
    assert run.scenario["run_config"]["learning-rate"] == 0.1
    assert run.scenario["run_config"]["standardise"] is False
    assert run.record.settings == {"learning-rate": 0.1}


def test_metrics_of_nodes_rounds_and_costs_are_recorded(fedsim: Command) -> None:
    assert fedsim("run", "--app", NUMPY, "--nodes", 4, "-q", "--no-report").status == 0
    run = RunStore().open("latest")
    clients = run.client_metrics
    rows = clients.query("split == 'query' and name == 'rows'")
    assert dict(zip(rows["partition"], rows["value"], strict=True)) == {0: 20, 1: 30, 2: 40, 3: 50}
    assert set(rows["round"]) == {1}
    assert len(clients.query("split == 'query' and name == 'corners.1'")) == 4
    # the node's state is kept from message to message, of whatever type
    for server_round in (1, 2, 3, 4):
        mine = clients.query("split == 'train' and round == @server_round")
        assert set(mine.query("name == 'seen'")["value"]) == {server_round}
        assert set(mine.query("name == 'told'")["value"]) == {7}
        assert set(mine.query("name == 'round'")["value"]) == {server_round}
        losses = mine.query("name == 'train_loss'").set_index("partition")["value"]
        sizes = mine.query("name == 'num-examples'").set_index("partition")["value"]
        mean = float((losses * sizes).sum() / sizes.sum())
        assert value(run, server_round, "train", "train_loss") == pytest.approx(mean)
        assert value(run, server_round, "client", "eval_loss") > 0
        assert len(clients.query("split == 'client' and round == @server_round")) == 2 * 2
    # 4 nodes train and 2 evaluate, three float64 each
    assert value(run, 2, "system", "bytes_up") == 4 * 3 * 8
    assert value(run, 2, "system", "bytes_down") == (4 + 2) * 3 * 8
    assert value(run, 4, "system", "total_bytes_down") == 4 * (4 + 2) * 3 * 8
    assert value(run, 2, "system", "dropped") == 0
    assert run.summary["totals"]["messages"] == 4 + 4 * 6


def test_what_an_app_prints_leaves_standard_output_alone(fedsim: Command) -> None:
    done = fedsim("run", "--app", NUMPY, "--json", "--no-report")
    (run,) = json.loads(done.out)["runs"]
    assert run["status"] == "finished"
    assert run["scenario"] == "numpyapp"
    assert "rows: 200" in done.err
    assert "Starting FedAvg strategy" not in done.err
    log = (Path(run["path"]) / "app.log").read_text()
    assert "Starting FedAvg strategy" in log


def test_the_commands_about_runs_know_a_run_of_an_app(fedsim: Command) -> None:
    for rate in (0.1, 0.2):
        fedsim("run", "--app", NUMPY, "--set", f"learning-rate={rate}", "-q")
    first, second = RunStore().ids()
    assert (Path("runs") / first / "report.html").stat().st_size > 10_000
    listed = fedsim("runs")
    assert listed.status == 0
    assert "4/4" in listed.out
    assert "distance" in fedsim("show", first).out
    compared = fedsim("compare", first, second)
    assert compared.status == 0
    assert "distance" in compared.out
    assert "learning-rate=0.1" in compared.out
    assert fedsim("export", first, "--to", "out").status == 0
    names = {path.name for path in Path("out").iterdir()}
    assert {"metrics.csv", "client_metrics.csv", "scenario.yaml", "parameters.safetensors"} <= names
    resumed = fedsim("resume", first)
    assert resumed.status == 2
    assert "Flower app, which cannot be resumed" in resumed.err
    again = f"fedsim run --app {NUMPY} --nodes 5 --set learning-rate=0.1 --seeds 0"
    assert again in resumed.err


def test_another_number_of_nodes_is_not_another_seed(fedsim: Command) -> None:
    fedsim("run", "--app", NUMPY, "-q", "--no-report", "--seeds", "0")
    fedsim("run", "--app", NUMPY, "-q", "--no-report", "--seeds", "1", "--nodes", 3)
    first, second = sorted(RunStore().ids(), key=lambda run_id: run_id[-1])
    assert "nodes" not in first
    shown = fedsim("show", second).out
    assert "numpyapp nodes=3, seed 1" in shown
    assert "Flower app, 3 nodes" in shown
    compared = fedsim("compare", first, second).out
    assert "numpyapp nodes=3" in compared
    assert "±" not in compared.partition("\n")[2]


# PyTorch: strategies of the app's own, mods, actions, seeds


def test_mods_actions_lifespans_and_two_strategies(fedsim: Command) -> None:
    done = fedsim("run", "--app", TORCH, "--nodes", 6, "--no-report")
    assert done.status == 0, done.err
    run = RunStore().open("latest")
    clients = run.client_metrics
    assert set(clients.query("split == 'train' and name == 'stamp'")["value"]) == {1.0}
    drawn = clients.query("split == 'train.warm_up' and name == 'drawn'")
    assert sorted(drawn["partition"]) == [0, 1, 2, 3, 4, 5]
    assert drawn["value"].nunique() == 6
    assert value(run, 1, "train.warm_up", "drawn") == pytest.approx(drawn["value"].mean())
    assert value(run, 3, "test", "accuracy") > 0.9
    assert len(clients.query("split == 'train' and round == 1 and name == 'train_loss'")) == 3
    # FedAdam's only round, after the three of the first strategy and its own round 0
    assert set(clients.query("split == 'client'")["round"]) == {1, 2, 3, 5}
    starts = run.events.query("kind == 'strategy_started'")
    assert list(starts["strategy"]) == ["Decaying", "FedAdam"]
    assert run.record.rounds == 5
    assert run.parameters()["hidden.weight"].shape == (32, 64)


@pytest.mark.parametrize("option", [[], ["--seeds", "3"]])
def test_the_same_seed_gives_the_same_run(fedsim: Command, option: list[str]) -> None:
    for _ in range(2):
        assert fedsim("run", "--app", TORCH, "--nodes", 3, "-q", "--no-report", *option).status == 0
    first, second = (RunStore().open(each) for each in RunStore().ids())
    for name, array in first.parameters().items():
        np.testing.assert_array_equal(array, second.parameters()[name])
    pd_columns = ["round", "split", "partition", "name", "value"]
    assert first.client_metrics[pd_columns].equals(second.client_metrics[pd_columns])
    assert first.record.seed == (3 if option else 0)


def test_seeds_are_runs_of_their_own(fedsim: Command) -> None:
    done = fedsim("run", "--app", TORCH, "--nodes", 2, "--seeds", "0,1", "-q", "--no-report",
                  "--set", "fraction-train=1.0", "--set", "num-server-rounds=1")  # fmt: skip
    assert done.status == 0, done.err
    first, second = (RunStore().open(each) for each in RunStore().ids())
    assert [first.record.seed, second.record.seed] == [0, 1]
    a, b = (run.parameters()["out.weight"] for run in (first, second))
    assert not np.array_equal(a, b)


class Handwritten(Grid):
    """The least that a Grid can be: calls the ClientApp with messages as they are."""

    def __init__(self, app: Any, nodes: int, run_config: dict[str, Any]) -> None:
        self.app, self.nodes = app, nodes
        self.contexts = {
            100 + k: Context(1, 100 + k, {"partition-id": k, "num-partitions": nodes}, RecordDict(),
                             run_config)
            for k in range(nodes)
        }  # fmt: skip
        self.set_run(FlowerRun.create_empty(1))

    def set_run(self, run: FlowerRun) -> None:
        self._run = run
        set_identity(run.run_id)

    @property
    def run(self) -> FlowerRun:
        return self._run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = []
        for number, message in enumerate(messages):
            set_message_id(message, str(number))
            node = message.metadata.dst_node_id
            own = RecordDict({
                key: type(record)({k: Array(v.numpy()) for k, v in record.items()})
                if isinstance(record, ArrayRecord) else type(record)(dict(record))
                for key, record in message.content.items()
            })  # fmt: skip
            private = Message(content=own, metadata=message.metadata)  # type: ignore[call-overload]
            replies.append(self.app(private, self.contexts[node]))
        return replies


# scikit-learn: the same as on a hand-written Grid; failures


def test_an_app_ends_where_a_hand_written_grid_takes_it(fedsim: Command) -> None:
    assert fedsim("run", "--app", SKLEARN, "--nodes", 3, "-q", "--no-report").status == 0
    found = list(RunStore().open("latest").parameters().values())
    (spec,) = prepare(SKLEARN)
    with components(spec.project, 0) as (_, client):
        grid = Handwritten(client, 3, dict(spec.scenario.run_config))
        initial = ArrayRecord([np.zeros((1, 30)), np.zeros(1)])
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=1.0)
        expected = strategy.start(grid, initial, num_rounds=3).arrays.to_numpy_ndarrays()
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)
        assert np.abs(mine).max() > 0.1


def test_a_node_that_raises_is_an_error_reply_and_is_counted(fedsim: Command) -> None:
    done = fedsim("run", "--app", SKLEARN, "--nodes", 4, "--no-report",
                  "--set", "failing-partition=2", "--set", "model.local-epochs=1")  # fmt: skip
    assert done.status == 0, done.err
    assert "3 dropped" in done.err
    run = RunStore().open("latest")
    failures = run.events.query("kind == 'bad_replies'")
    assert list(failures["round"]) == [1, 2, 3]
    assert set(failures["count"]) == {1}
    assert failures["nodes"].iloc[0] == {"4": "ValueError: partition 2 has no labels"}
    assert value(run, 3, "system", "total_dropped") == 3
    trained = run.client_metrics.query("split == 'train'")
    assert set(trained["partition"]) == {0, 1, 3}
    # what it had put into its state before it failed is gone, as when Flower runs it
    assert set(run.client_metrics.query("split == 'client'")["partition"]) == {0, 1, 2, 3}
    log = (run.path / "app.log").read_text()
    assert 'raise ValueError(f"partition {part} has no labels")' in log


def test_a_server_app_that_raises_is_a_failed_run(fedsim: Command) -> None:
    done = fedsim("run", "--app", SKLEARN, "--set", "crash-in-round=3", "--no-report")
    assert done.status == 1
    said = [line for line in done.err.splitlines() if line.startswith("fedsim: ")]
    assert len(said) == 1
    assert "the ServerApp failed: RuntimeError: no round 3 (sklearnapp" in said[0]
    assert "server_app.py, line " in said[0]
    run = RunStore().open("latest")
    assert run.status == "failed"
    assert run.metrics.query("split == 'client'")["round"].max() == 2  # kept
    assert value(run, 3, "system", "messages") == 2
    assert "Traceback" in (run.path / "app.log").read_text()
    assert fedsim("runs").status == 0
    resumed = fedsim("resume", "latest")
    assert resumed.status == 2
    assert "cannot be resumed" in resumed.err


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
        (["--app", NUMPY, "--seeds", "a"], "is not a list of whole numbers"),
    ],
)
def test_what_does_not_go_together_is_refused(
    fedsim: Command, arguments: list[object], words: str
) -> None:
    done = fedsim("run", *arguments)
    assert done.status == 2
    assert words in " ".join(done.err.replace("│", " ").split())


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
    assert "waits for more nodes than the 2 that there are" in done.err
    assert fedsim("run", "--app", "waiting", "--nodes", 9, "--no-report").status == 0


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
