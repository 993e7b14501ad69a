"""What a writer logs is what a reader and the index show, and truncation undoes it exactly."""

import math
import time

import numpy as np
import pytest
import torch

from fedsim.errors import UserError
from fedsim.runs import DIED, draws
from tests.unit.runs.helpers import Spec, indexed_metrics, query


def test_metrics_come_back_in_order_with_their_types_and_bits(store):
    with store.create(Spec()) as writer:
        writer.log_metrics(0, "test", {"nll": 0.1 + 0.2, "accuracy": math.nan})
        writer.log_metrics(1, "train", {"loss": np.float32(0.1), "steps": 3})
        writer.log_metrics(1, "test", {"nll": math.inf, "accuracy": torch.tensor(0.5)})
        writer.finish()
    frame = store.open(writer.id).metrics
    assert [str(kind) for kind in frame.dtypes[["round", "value"]]] == ["int64", "float64"]
    assert frame.drop(columns="value").to_numpy().tolist() == [
        [0, "test", "nll"],
        [0, "test", "accuracy"],
        [1, "train", "loss"],
        [1, "train", "steps"],
        [1, "test", "nll"],
        [1, "test", "accuracy"],
    ]
    expected = [0.1 + 0.2, math.nan, float(np.float32(0.1)), 3.0, math.inf, 0.5]
    np.testing.assert_array_equal(frame["value"], expected)


def test_the_index_holds_the_same_as_the_folder(store):
    with store.create(Spec()) as writer:
        for round in range(5):
            writer.log_metrics(round, "test", {"nll": 1 / (round + 3), "kl": math.nan})
            writer.log_client_metrics(round, "client", [4, 7], {"acc": [0.25, math.nan]})
            writer.event("reply_dropped", round, partition=4, reason="NaN")
        writer.flush()
        run = store.open(writer.id)
        expected = {
            (int(round), split, name, None if math.isnan(value) else value)
            for round, split, name, value in run.metrics.itertuples(index=False)
        }
        assert len(expected) == 10
        assert indexed_metrics(store.root, writer.id) == expected
        clients = query(store.root, "SELECT round, partition, value FROM client_metrics")
        assert sorted(clients, key=lambda row: row[:2]) == [
            row for round in range(5) for row in ((round, 4, 0.25), (round, 7, None))
        ]
        assert run.client_metrics["partition"].tolist() == [4, 7] * 5
        assert query(store.root, "SELECT count(*) FROM events WHERE kind = 'reply_dropped'") == [
            (5,)
        ]


def test_a_value_logged_twice_is_replaced(store):
    with store.create(Spec()) as writer:
        writer.log_metrics(1, "test", {"a": 1, "b": 2})
        writer.log_metrics(1, "test", {"a": 3})
        writer.flush()
    assert store.open(writer.id).metrics["value"].tolist() == [3, 2]
    assert indexed_metrics(store.root, writer.id) == {(1, "test", "a", 3), (1, "test", "b", 2)}


def test_mismatched_client_metrics_are_refused(store):
    with store.create(Spec()) as writer, pytest.raises(ValueError, match="2 values for 3"):
        writer.log_client_metrics(1, "client", [1, 2, 3], {"a": [1.0, 2.0]})


def test_events_keep_their_fields(store):
    with store.create(Spec()) as writer:
        writer.event("early_stop", 3, metric="test.nll", best=0.5, chain=[1, 2])
        writer.finish()
    event = store.open(writer.id).events.set_index("kind").loc["early_stop"]
    assert (event["round"], event["metric"], event["best"]) == (3, "test.nll", 0.5)
    assert event["chain"] == [1, 2]


def test_draws_come_back_chains_first_over_several_files(store):
    values = torch.randn(7, 3, 2, dtype=torch.float64)  # draws, chains, parameters
    with store.create(Spec()) as writer:
        for index in range(7):
            writer.save_draw(10 + index, {"w": values[index], "b": values[index, :, 0].bfloat16()})
            if index in (2, 3):
                writer.save_checkpoint(10 + index, {}, {})
        writer.finish()
    run = store.open(writer.id)
    assert run.draw_rounds.tolist() == list(range(10, 17))
    found = run.draws()
    assert list(found) == ["w", "b"]
    np.testing.assert_array_equal(found["w"], values.transpose(0, 1).numpy())
    np.testing.assert_array_equal(
        found["b"], values[:, :, 0].bfloat16().float().transpose(0, 1).numpy()
    )
    assert len(draws.files(run.path)) == 3


def test_a_draw_that_does_not_fit_is_refused(store):
    with store.create(Spec()) as writer:
        writer.save_draw(1, {"w": torch.zeros(2, 3)})
        with pytest.raises(ValueError, match="round 2 has"):
            writer.save_draw(2, {"w": torch.zeros(2, 4)})
        with pytest.raises(ValueError, match="after that of round 1"):
            writer.save_draw(1, {"w": torch.zeros(2, 3)})


def test_many_draws_do_not_wait_in_memory(store, monkeypatch):
    monkeypatch.setattr(draws, "MAX_WAITING", 100)
    with store.create(Spec()) as writer:
        for round in range(10):
            writer.save_draw(round, {"w": torch.full((1, 10), float(round))})
        writer.finish()
    run = store.open(writer.id)
    assert len(draws.files(run.path)) == 4
    assert run.draws()["w"][0, :, 0].tolist() == list(range(10))


def log_round(writer, round: int) -> None:
    writer.log_metrics(round, "test", {"nll": 1 / (round + 1)})
    writer.log_client_metrics(round, "client", [0, 1], {"acc": [round / 7, round / 9]})
    writer.event("evaluated", round)
    writer.save_draw(round, {"w": torch.full((2, 3), round / 3)})
    writer.end_round(round)


@pytest.mark.parametrize("last", [0, 3, 4, 9])
def test_truncate_leaves_exactly_what_an_undisturbed_run_had_then(store, last):
    for rounds in (10, last + 1):
        with store.create(Spec()) as writer:
            for round in range(rounds):
                log_round(writer, round)
                if round in (3, 7):
                    writer.save_checkpoint(round, {}, {})
            if rounds == 10:
                long = writer.id
                writer.flush()
                writer.close()
                writer = store.resume(long)
                writer.truncate_after(last)
            writer.finish()
    cut, plain = store.open(long), store.open(writer.id)
    assert cut.metrics.equals(plain.metrics)
    assert cut.client_metrics.equals(plain.client_metrics)
    kept = cut.events.query("kind == 'evaluated'")["round"].tolist()
    assert kept == list(range(last + 1))
    assert indexed_metrics(store.root, cut.id) == indexed_metrics(store.root, plain.id)
    # Draws after the last checkpoint (round 7) had not been written when the run was left.
    assert cut.draw_rounds.tolist() == list(range(min(last, 7) + 1))
    np.testing.assert_array_equal(cut.draws()["w"], plain.draws()["w"][:, : min(last, 7) + 1])


def test_a_resumed_run_continues_draws_metrics_and_seconds(store):
    writer = store.create(Spec())
    log_round(writer, 1)
    writer.save_checkpoint(1, {"w": torch.ones(2)}, {"rng": 2**100})
    log_round(writer, 2)
    writer.flush()
    writer.close()
    assert store.open(writer.id).status == DIED
    writer = store.resume(writer.id)
    round, tensors, state = writer.load_checkpoint()
    assert (round, state) == (1, {"rng": 2**100})
    assert torch.equal(tensors["w"], torch.ones(2))
    writer.truncate_after(round)
    log_round(writer, 2)
    log_round(writer, 3)
    writer.finish()
    run = store.open(writer.id)
    assert run.metrics["round"].tolist() == [1, 2, 3]
    assert run.draw_rounds.tolist() == [1, 2, 3]
    assert run.events["kind"].tolist().count("resumed") == 1
    assert run.summary["round"] == 3


def test_a_damaged_checkpoint_is_skipped_with_an_event(store):
    writer = store.create(Spec())
    for round in (1, 2):
        writer.save_checkpoint(round, {}, round)
    (writer.path / "checkpoints/round-000002/state.json").write_text('{"format"')
    with pytest.warns(RuntimeWarning, match="checkpoint of round 2 .* is skipped"):
        assert writer.load_checkpoint()[0] == 1
    writer.finish("failed")
    event = store.open(writer.id).events.set_index("kind").loc["checkpoint_skipped"]
    assert event["checkpoint"] == 2


def test_parameters_artifacts_engine_and_summary(store):
    with store.create(Spec()) as writer:
        writer.record_engine({"path": "mapped", "chunks": [[0, 10]], "threads": 1})
        writer.artifact_path("plots/curve.svg").write_text("<svg/>")
        with pytest.raises(ValueError, match="outside"):
            writer.artifact_path("../../escape")
        with pytest.raises(UserError, match="no final parameters: it is running"):
            store.open(writer.id).parameters()
        writer.save_parameters({"w": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)})
        writer.log_metrics(4, "test", {"nll": math.nan})
        writer.finish("finished", {"note": "fine"})
    run = store.open(writer.id)
    assert run.engine == {"path": "mapped", "chunks": [[0, 10]], "threads": 1}
    assert run.artifacts() == ["plots/curve.svg"]
    assert run.artifact("plots/curve.svg").read_text() == "<svg/>"
    with pytest.raises(UserError, match=r"'x'; there are: plots/curve.svg"):
        run.artifact("x")
    np.testing.assert_array_equal(run.parameters()["w"], np.array([1.5, -2.0], np.float32))
    assert (run.summary["note"], run.summary["round"]) == ("fine", 4)
    assert math.isnan(run.summary["metrics"]["test.nll"])
    assert run.scenario == {"name": "Two moons", "rounds": 10, "strategy": {"step_size": 1e-05}}
    assert run.environment["packages"]["torch"] == torch.__version__.partition("+")[0] or (
        run.environment["packages"]["torch"] == torch.__version__
    )
    assert run.environment["cpu_capability"] == torch.backends.cpu.get_cpu_capability()


def test_a_slow_round_is_visible_at_its_end(store, monkeypatch):
    monkeypatch.setattr("fedsim.runs.writer.COMMIT_SECONDS", 0.01)
    with store.create(Spec()) as writer:
        time.sleep(0.02)
        writer.log_metrics(1, "test", {"nll": 1.0})
        writer.end_round(1)
        assert store.open(writer.id).metrics["value"].tolist() == [1.0]


def test_logging_a_round_costs_well_under_a_millisecond(store):
    names = [f"metric{index}" for index in range(5)]
    with store.create(Spec()) as writer:
        best = math.inf
        for part in range(5):
            start = time.thread_time()  # whatever else the machine does
            for round in range(part * 400, part * 400 + 400):
                writer.log_metrics(round, "train", dict.fromkeys(names, round / 7))
                writer.log_metrics(round, "system", dict.fromkeys(names, round / 7))
                writer.end_round(round)
            best = min(best, (time.thread_time() - start) / 400)
    assert best < 0.5e-3
