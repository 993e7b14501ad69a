"""Checkpoints come back bit for bit, and a damaged one never does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.errors import UserError
from fedsim.runs import RunStore, checkpoint, files, lines
from tests.unit.runs.helpers import Spec

INTS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def newest(run: Path) -> tuple[checkpoint.Checkpoint | None, list[int]]:
    skipped: list[int] = []
    return checkpoint.newest(run, lambda round, reason: skipped.append(round)), skipped


@pytest.mark.parametrize("dtype", list(INTS))
def test_every_float_bit_pattern_survives_nan_payloads_too(tmp_path, dtype):
    width = torch.finfo(dtype).bits
    if width == 16:
        pattern = np.arange(2**16, dtype=np.uint16).view(np.int16)
    else:
        high = {32: np.int32, 64: np.int64}[width]
        limits = np.iinfo(high)
        pattern = np.random.default_rng(1).integers(limits.min, limits.max, 50_000, dtype=high)
    tensor = torch.from_numpy(pattern).view(dtype)
    assert tensor.isnan().any()
    checkpoint.save(tmp_path, 3, {"x": tensor}, None)
    found, skipped = newest(tmp_path)
    assert skipped == []
    assert found.tensors["x"].dtype == dtype
    assert bits(found.tensors["x"]) == bits(tensor)


def test_shapes_dtypes_views_and_order_survive(tmp_path):
    shared = torch.arange(12.0)
    tensors = {
        "zero_d": torch.tensor(1.5, dtype=torch.bfloat16),
        "empty": torch.empty((0, 3), dtype=torch.float64),
        "bool": torch.tensor([True, False]),
        "int": torch.tensor([[2**62]], dtype=torch.int64),
        "byte": torch.tensor([255], dtype=torch.uint8),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "view": shared[3:5],
        "tied": shared,
        "tied_again": shared,
        "gradient": torch.ones(2, requires_grad=True),
        "a_first_in_the_alphabet": torch.zeros(1),
    }
    checkpoint.save(tmp_path, 0, tensors, {})
    found, _ = newest(tmp_path)
    assert list(found.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype, name
        assert found.tensors[name].shape == tensor.shape, name
        assert torch.equal(found.tensors[name], tensor.detach()), name


def test_no_tensors_at_all_is_a_checkpoint(tmp_path):
    checkpoint.save(tmp_path, 1, {}, {"arms": [1]})
    found, _ = newest(tmp_path)
    assert (found.tensors, found.state) == ({}, {"arms": [1]})


def test_state_comes_back_exactly(tmp_path):
    state = {"x": 0.1, "big": 3**100, "nan": float("nan"), "text": 'a", "state": {"é\n'}
    checkpoint.save(tmp_path, 7, {"x": torch.zeros(1)}, state, seconds=1.25)
    found, _ = newest(tmp_path)
    assert (found.round, found.seconds) == (7, 1.25)
    assert np.isnan(found.state.pop("nan"))
    del state["nan"]
    assert found.state == state


def test_only_the_newest_stay(tmp_path):
    for round in (1, 2, 9, 10, 11):
        checkpoint.save(tmp_path, round, {}, round, keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["round-000010", "round-000011"]


def test_the_first_of_every_so_many_rounds_stays_too(tmp_path):
    for round in range(3, 50, 4):  # 3, 7, 11 … 47: no multiple of ten
        checkpoint.save(tmp_path, round, {}, round, keep=2, keep_every=10)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"round-{n:06d}" for n in (11, 23, 31, 43, 47)]
    assert newest(tmp_path)[0].state == 47


@given(
    rounds=st.lists(st.integers(0, 300), min_size=1, max_size=40, unique=True).map(sorted),
    keep=st.integers(1, 4),
    every=st.integers(0, 60),
)
def test_pruning_as_it_goes_leaves_what_pruning_at_the_end_would(rounds, keep, every):
    there: set[int] = set()
    for round in rounds:
        there = checkpoint.kept([*there, round], keep, every)
    assert there == checkpoint.kept(rounds, keep, every)
    assert there >= set(rounds[-keep:])
    others = there - set(rounds[-keep:])
    if every:
        assert {r // every for r in rounds} - {0} == {r // every for r in there} - {0}
        assert len({r // every for r in others}) == len(others)
    else:
        assert not others


def test_a_checkpoint_costs_the_same_after_many_rounds(tmp_path, monkeypatch):
    """Bytes written by the 3rd and by the 399th checkpoint of a run that logs and draws."""
    written: list[int] = []
    real = files.write_some

    def counting(descriptor, data):
        written[-1] += len(data)
        return real(descriptor, data)

    monkeypatch.setattr(files, "write_some", counting)
    monkeypatch.setattr(lines, "write_some", counting)
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: None)
    written.append(0)
    with RunStore(tmp_path).create(Spec()) as run:
        for round in range(1, 401):
            run.log_metrics(round, "test", {"nll": round / 7})
            run.save_draw(round, {"w": torch.ones(1, 10)})
            written.append(0)
            run.save_checkpoint(round, {"w": torch.ones(5000)}, {"round": round}, keep_every=100)
        run.finish()
    assert written[3] > 20_000
    assert abs(written[399] - written[3]) < 100  # digits of the numbers


def test_a_round_saved_twice_is_the_second(tmp_path):
    checkpoint.save(tmp_path, 1, {}, "first")
    checkpoint.save(tmp_path, 1, {}, "second")
    assert newest(tmp_path)[0].state == "second"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize("name", ["arrays.safetensors", "state.json"])
def test_a_flipped_or_missing_byte_anywhere_falls_back_to_the_checkpoint_before(tmp_path, name):
    checkpoint.save(tmp_path, 1, {"x": torch.arange(3.0)}, {"step": 1})
    checkpoint.save(tmp_path, 2, {"x": torch.arange(3.0) + 1}, {"step": 2.5})
    path = tmp_path / "checkpoints" / "round-000002" / name
    good = path.read_bytes()
    state, tensor = {"step": 2.5}, torch.arange(3.0) + 1
    for place in range(len(good)):
        for bad in (good[:place], good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]):
            path.write_bytes(bad)
            try:
                found, skipped = newest(tmp_path)
            except UserError:  # the flipped bit is in the version: refused, which is safe
                assert b'"format"' in bad
                continue
            if skipped:
                assert (found.round, skipped) == (1, [2])
            else:  # a flip that changes no value, such as in the order of names' white space
                assert found.state == state
                assert all(torch.equal(value, tensor) for value in found.tensors.values())
    path.unlink()
    assert newest(tmp_path)[1] == [2]


def test_none_when_there_is_none_and_refused_when_all_are_damaged(tmp_path):
    assert newest(tmp_path) == (None, [])
    (tmp_path / "checkpoints" / "round-000004").mkdir(parents=True)
    checkpoint.save(tmp_path, 2, {}, {})
    assert newest(tmp_path)[1] == [4]
    (tmp_path / "checkpoints" / "round-000002" / "arrays.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint of run .* \(round 4: .*; round 2: .*anew"):
        newest(tmp_path)


@pytest.mark.parametrize(
    ("version", "sentence"),
    [(checkpoint.FORMAT + 1, r"newer fedsim .*upgrade"), (0, r"older fedsim .*start anew")],
)
def test_an_unknown_format_is_refused_in_a_sentence(tmp_path, version, sentence):
    path = checkpoint.save(tmp_path, 5, {}, {})
    checkpoint.save(tmp_path, 4, {}, {})
    manifest = json.loads((path / "state.json").read_text())
    manifest["format"] = version
    (path / "state.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=sentence):
        newest(tmp_path)


def test_leftovers_of_a_killed_save_are_ignored(tmp_path):
    checkpoint.save(tmp_path, 1, {}, {})
    left = tmp_path / "checkpoints" / ".tmp-round-000002.999"
    left.mkdir()
    (left / "state.json").write_text("{")
    assert newest(tmp_path)[0].round == 1


def test_unsupported_dtype_is_named(tmp_path):
    with pytest.raises(TypeError, match="'phase' is complex128"):
        checkpoint.save(tmp_path, 1, {"phase": torch.zeros(1, dtype=torch.complex128)}, {})
    assert newest(tmp_path) == (None, [])
