"""What we rely on in the installed Flower: its internals, its apps and its own loop."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import arrays_size_mod
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam, FedAvg
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedsim import _flower
from fedsim.grids.inline import InlineGrid
from fedsim.grids.nodes import node_of, partition_of
from fedsim.messages import to_tensors
from fedsim.server.loop import RoundLoop
from fedsim.server.state import LoopConfig
from fedsim.strategies import fedavg as ours
from tests.engines.toys import (
    CLASSES,
    FEATURES,
    Memory,
    cohorts,
    distance,
    federation,
    functional,
    grid_of,
    same_bits,
    sgd,
)

ROOT = Path(__file__).parents[2]


# What is not Flower's public API


def test_the_supported_version_is_installed() -> None:
    major, minor, *_ = version("flwr").split(".")
    assert (int(major), int(minor)) in {(1, 41), (1, 42)}


@pytest.mark.parametrize("name", _flower.__all__)
def test_every_internal_import_exists(name: str) -> None:
    assert getattr(_flower, name) is not None


def test_internals_are_imported_in_one_place() -> None:
    public = re.compile(r"flwr(\.app|\.clientapp|\.serverapp(\.strategy)?)?")
    for folder in ("fedsim", "clients", "server", "strategies"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name == "_flower.py":
                continue
            for module in re.findall(r"^\s*(?:from|import) (flwr[\w.]*)", path.read_text(), re.M):
                assert public.fullmatch(module), f"{path}: {module}"


def test_messages_can_be_made_and_answered_after_the_identity_is_set() -> None:
    _flower.set_identity(7)
    message = Message(RecordDict(), 5, "train")
    assert message.metadata.run_id == 7
    assert message.metadata.src_node_id == _flower.SUPERLINK_NODE_ID == 1
    assert message.metadata.dst_node_id == 5
    _flower.set_message_id(message, "abc")
    assert message.metadata.message_id == "abc"
    reply = Message(RecordDict(), reply_to=message)
    assert reply.metadata.reply_to_message_id == "abc"
    assert reply.metadata.src_node_id == 5
    assert reply.metadata.message_type == "train"
    failed = Message(Error(1, "oh"), reply_to=message)
    assert failed.has_error()
    assert failed.error.reason == "oh"
    assert Array(torch.ones(1)).stype == _flower.SType.NUMPY


def test_telemetry_is_off_however_flower_is_imported() -> None:
    """Any module of fedsim imports the package first, which is what sets it."""
    code = (
        "import fedsim\nfrom flwr.supercore import telemetry\n"
        "print(telemetry.FLWR_TELEMETRY_ENABLED)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.strip() == "0"


# A Flower app on our engine


DATA = federation()


def rows_of(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    partition = int(context.node_config["partition-id"])
    assert context.node_config["num-partitions"] == len(DATA.shards)
    rows = DATA.shards[partition]
    return torch.from_numpy(DATA.train.x[rows]).float(), torch.from_numpy(DATA.train.y[rows])


def net() -> torch.nn.Linear:
    return torch.nn.Linear(FEATURES, CLASSES)


def make_app() -> ClientApp:
    """Returns a ClientApp as Flower's users write them; it knows nothing of fedsim."""
    app = ClientApp()

    @app.train(mods=[arrays_size_mod])
    def train(message: Message, context: Context) -> Message:
        model = net()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
        x, y = rows_of(context)
        lr = float(context.run_config["lr"])  # type: ignore[arg-type]
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        for _ in range(int(message.content["config"].get("steps", 2))):  # type: ignore[union-attr, call-overload]
            keep = torch.rand(len(x)) < 0.9  # torch's global generator
            keep[random.randrange(len(x))] = True  # Python's
            keep[np.random.randint(len(x))] = True  # noqa: NPY002
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[keep]), y[keep]).backward()
            optimizer.step()
        asked = context.state.metric_records.get("asked", MetricRecord({"times": 0}))
        context.state["asked"] = MetricRecord({"times": int(asked["times"]) + 1})  # type: ignore[arg-type]
        bias = Array(model.bias.detach().numpy())
        context.state["personal/bias"] = ArrayRecord({"layer/bias": bias})
        context.state["notes"] = ConfigRecord({"raw": b"\x00\xff", "words": ["a", "b"], "n": 1.5})
        metrics = MetricRecord({"num-examples": len(x), "asked": context.state["asked"]["times"]})  # type: ignore[dict-item]
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content=content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        model = net()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
        x, y = rows_of(context)
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model(x), y)
        metrics = MetricRecord({"num-examples": len(x), "loss": float(loss)})
        return Message(content=RecordDict({"metrics": metrics}), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise ValueError("not me")
        message.content["config"]["mine"] = 1  # type: ignore[index]
        return Message(content=message.content, reply_to=message)

    @app.query("nothing")
    def nothing(message: Message, context: Context) -> Message:
        return None  # type: ignore[return-value]

    return app


def app_grid() -> InlineGrid:
    return InlineGrid(make_app(), 5, seed=3, run_config={"lr": 0.5})


def first_arrays() -> ArrayRecord:
    torch.manual_seed(0)
    return ArrayRecord(net().state_dict())


def test_flowers_own_loop_runs_unmodified() -> None:
    losses: dict[int, float] = {}

    def central(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model = net()
        model.load_state_dict(arrays.to_torch_state_dict())
        x, y = torch.from_numpy(DATA.train.x).float(), torch.from_numpy(DATA.train.y)
        with torch.no_grad():
            losses[server_round] = float(torch.nn.functional.cross_entropy(model(x), y))
        return MetricRecord({"loss": losses[server_round]})

    result = FedAvg().start(
        app_grid(), first_arrays(), num_rounds=4, evaluate_fn=central,
        train_config=ConfigRecord({"steps": 3}),
    )  # fmt: skip
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3, 4]
    assert result.train_metrics_clientapp[4]["asked"] == 4  # state is kept between rounds
    by_clients = result.evaluate_metrics_clientapp
    assert by_clients[4]["loss"] < by_clients[1]["loss"]  # type: ignore[operator]
    assert losses[4] < losses[0]


def test_a_server_app_runs_with_our_grid() -> None:
    app = ServerApp()
    results = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAdam(eta=0.1)
        results.append(strategy.start(grid, first_arrays(), num_rounds=2))

    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    app(app_grid(), context)
    assert sorted(results[0].train_metrics_clientapp) == [1, 2]


def test_flowers_loop_runs_on_our_own_clients() -> None:
    client = sgd(functional(), batch_size=8)
    made = cohorts(client, federation())
    arrays = ArrayRecord({k: Array(v.numpy()) for k, v in client.model.initial().items()})
    result = FedAvg().start(grid_of(made), arrays, num_rounds=3)
    by_clients = result.evaluate_metrics_clientapp
    assert by_clients[3]["loss"] < by_clients[1]["loss"]  # type: ignore[operator]
    # our loop with our own FedAvg, on the same seed, ends where Flower's does
    loop = RoundLoop(
        ours.FedAvg(ours.FedAvgParams()), grid_of(made), client.model.initial(),
        LoopConfig(rounds=3, seed=0, server_every=0, checkpoint_rounds=0), Memory(),
    )  # fmt: skip
    assert distance(to_tensors(result.arrays), loop.run().arrays) < 1e-12


def app_loop(rounds: int, grid: InlineGrid | None = None) -> tuple[RoundLoop, Memory]:
    memory = Memory()
    config = LoopConfig(rounds=rounds, seed=0, clients_every=1, checkpoint_rounds=1)
    strategy: FlowerStrategy = FedAvg(fraction_train=0.7)
    arrays = to_tensors(first_arrays())
    return RoundLoop(strategy, grid or app_grid(), arrays, config, memory), memory


def test_an_app_gives_the_same_run_twice_whatever_the_global_generators_hold() -> None:
    results = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        random.seed(noise)
        np.random.seed(noise)  # noqa: NPY002
        made, _ = app_loop(3)
        results.append(made.run().arrays)
    assert same_bits(*results)


def test_an_app_leaves_the_global_generators_as_they_were() -> None:
    made, _ = app_loop(2)
    torch.manual_seed(5)
    random.seed(5)
    expected = (torch.rand(1), random.random())
    torch.manual_seed(5)
    random.seed(5)
    made.run()
    assert (torch.rand(1), random.random()) == expected


def test_an_app_resumes_to_the_same_bits_with_its_state() -> None:
    whole, memory = app_loop(4)
    expected = whole.run().arrays
    resumed, rest = app_loop(4)
    resumed.load(*memory.checkpoints[2])
    assert same_bits(resumed.run().arrays, expected)
    for server_round in (3, 4):
        for split in ("train", "client"):
            assert rest.metrics[server_round, split] == memory.metrics[server_round, split]
    for (server_round, _), values in memory.metrics.items():
        if server_round == 4 and "asked" in values:
            assert 1 < values["asked"] <= 4


def test_state_of_every_kind_comes_back() -> None:
    grid = app_grid()
    message = Message(RecordDict({"arrays": first_arrays(), "config": ConfigRecord()}), 4, "train")
    grid.send_and_receive([message])
    tensors, plain = grid.state_dict()
    from fedsim.runs import exact

    other = app_grid()
    other.load_state_dict(tensors, exact.loads(exact.dumps(plain)))
    before, after = grid._apps.context(4).state, other._apps.context(4).state
    assert list(before) == list(after) == ["asked", "personal/bias", "notes"]
    assert dict(after["notes"]) == {"raw": b"\x00\xff", "words": ["a", "b"], "n": 1.5}
    assert dict(after["asked"]) == {"times": 1}
    kept = after.array_records["personal/bias"]["layer/bias"].numpy()
    np.testing.assert_array_equal(kept, before.array_records["personal/bias"]["layer/bias"].numpy())


# The Grid


def test_nodes_are_ordered_and_belong_to_partitions() -> None:
    grid = app_grid()
    nodes = list(grid.get_node_ids())
    assert nodes == sorted(nodes)
    assert [partition_of(n) for n in nodes] == [0, 1, 2, 3, 4]
    assert [node_of(partition_of(n)) for n in nodes] == nodes
    assert [node.node_id for node in grid.get_nodes()] == nodes
    assert grid.run.run_id == 1


def ask(grid: InlineGrid, nodes: list[int], kind: str = "query", **config: Any) -> Any:
    content = RecordDict({"config": ConfigRecord(config)})
    return [Message(content, node, kind) for node in nodes]


def test_push_and_pull_answer_each_message_once() -> None:
    grid = app_grid()
    ids = list(grid.push_messages(ask(grid, [2, 4])))
    assert len(set(ids)) == 2
    first = list(grid.pull_messages(ids[:1]))
    assert [m.metadata.src_node_id for m in first] == [2]
    assert [m.metadata.reply_to_message_id for m in first] == ids[:1]
    rest = list(grid.pull_messages(ids))
    assert [m.metadata.reply_to_message_id for m in rest] == ids[1:]
    assert list(grid.pull_messages(ids)) == []


def test_what_a_client_raises_becomes_an_error_reply() -> None:
    grid = app_grid()
    ok, raised, unknown = grid.send_and_receive(ask(grid, [2, 3, 77]))
    assert ok.has_content()
    assert raised.error.reason == "ValueError: not me"
    assert unknown.error.reason == "no such node"
    (none,) = grid.send_and_receive(ask(grid, [2], "query.nothing"))
    assert "returned a NoneType, not a Message" in none.error.reason
    (unheard,) = grid.send_and_receive(ask(grid, [2], "query.unheard"))
    assert "No query function registered with name 'unheard'" in unheard.error.reason


def test_a_client_changes_its_own_copy_of_the_message() -> None:
    grid = app_grid()
    messages = ask(grid, [2, 4], note="x")
    replies = list(grid.send_and_receive(messages))
    assert [dict(r.content["config"]) for r in replies] == [{"note": "x", "mine": 1}] * 2
    assert dict(messages[0].content["config"]) == {"note": "x"}


def test_a_node_asked_twice_answers_twice() -> None:
    client = sgd(functional(), batch_size=8)
    engine_grid = grid_of(cohorts(client, federation()))
    content = RecordDict({
        "arrays": ArrayRecord({k: Array(v.numpy()) for k, v in client.model.initial().items()}),
        "config": ConfigRecord({"server-round": 1}),
    })  # fmt: skip
    messages = [Message(content, node, "train") for node in (3, 2, 3)]
    ids = list(engine_grid.push_messages(messages))
    replies = list(engine_grid.pull_messages(ids))
    assert sorted(r.metadata.reply_to_message_id for r in replies) == sorted(ids)
    assert sorted(r.metadata.src_node_id for r in replies) == [2, 3, 3]


def test_two_contents_at_once_go_to_their_own_nodes() -> None:
    client = sgd(functional(), batch_size=8)
    engine_grid = grid_of(cohorts(client, federation()))
    messages = []
    for node, factor in ((2, 0.0), (3, 1.0), (4, 0.0)):
        arrays = {k: Array((v * factor).numpy()) for k, v in client.model.initial().items()}
        content = RecordDict({"arrays": ArrayRecord(arrays), "config": ConfigRecord()})
        messages.append(Message(content, node, "evaluate"))
    losses = {
        r.metadata.src_node_id: r.content.metric_records["metrics"]["loss"]
        for r in engine_grid.send_and_receive(messages)
    }
    assert losses[2] == pytest.approx(np.log(CLASSES))
    assert losses[4] == pytest.approx(np.log(CLASSES))
    assert losses[3] != pytest.approx(np.log(CLASSES), rel=1e-3)
