"""A client's inputs are its own: independent of its block, of chunking and of other chains."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fedsim.clients.base import Batching, Noise, Plan
from fedsim.grids.lanes import Block, Stream, rounded
from fedsim.grids.shards import Shards
from tests.engines.toys import RAGGED, federation

STREAM = Stream(3, 2, "train")
LIKE = {"arrays": {"w": (2, 3), "b": (2,)}}
NOISE = {
    "private": Noise(like="arrays"),
    "shared": Noise(like="arrays", shared=True, every=2),
    "uniform": Noise({"u": (2,), "v": (3, 1)}, distribution="uniform", per_example=True),
}
BATCHINGS = [Batching("epochs", 4), Batching("sampled", 5), Batching("full"), Batching("none")]


def make(
    batching: Batching, partitions: list[int], chains: int = 0, chain: int | None = None
) -> Block:
    shards = Shards(federation(weighted=True), torch.float64)
    plans = [
        Plan(
            steps=4,
            batching=batching,
            minibatches_per_step=1 if batching.kind == "full" else 2,
            init_minibatches=1,
            noise=NOISE if batching.kind != "none" else {"private": NOISE["private"]},
            scalars={"rate": np.arange(4) + 0.5 * p, "constant": float(p)},
            chains=chains,
        )
        for p in partitions
    ]
    return Block(plans, partitions, shards, STREAM, LIKE, chain)


def inputs(block: Block, step: int) -> Any:
    """Returns everything that a step gets, leading with the block's clients."""
    count = len(block.plans)
    noise = block.noise(step, count)
    shared = noise.pop("shared", {})
    chains = max(block.chains, 1)
    lead = (count, chains) if block.chains else (count,)
    spread = tree_map(lambda t: t.expand(*lead, *t.shape[1 if block.chains else 0 :]), shared)
    batches, scalars = block.batches(step, count), block.scalars(step, count)
    return block.init_batches(), batches, noise, spread, scalars


def trimmed(tree: Any, index: int, rows: int) -> list[Tensor]:
    """Returns one client's tensors; an axis as wide as the block's largest client is cut."""
    widest = max(RAGGED)
    found = []
    for leaf in tree_leaves(tree):
        own = leaf[index]
        for axis, length in enumerate(own.shape):
            if length == widest:
                own = own.narrow(axis, 0, rows)
        found.append(own)
    return found


@pytest.mark.parametrize("batching", BATCHINGS, ids=lambda b: b.kind)
@pytest.mark.parametrize("chains", [0, 3])
def test_inputs_do_not_depend_on_the_block(batching: Batching, chains: int) -> None:
    together = make(batching, [2, 0, 4, 1], chains)
    for step in range(4):
        everything = inputs(together, step)
        for index, partition in enumerate([2, 0, 4, 1]):
            alone = make(batching, [partition], chains)
            for before in range(step):
                alone.noise(before, 1)  # noise drawn every second step stays until it is due
            expected = inputs(alone, step)
            rows = RAGGED[partition] if batching.kind == "full" else max(RAGGED)
            got = trimmed(everything, index, rows)
            want = trimmed(expected, 0, rows)
            assert len(got) == len(want)
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("batching", BATCHINGS[:2], ids=lambda b: b.kind)
def test_a_chain_alone_gets_what_it_gets_in_company(batching: Batching) -> None:
    together, alone = make(batching, [2, 0], 3), make(batching, [2, 0], 3, chain=1)
    for step in range(4):
        for a, b in zip(
            tree_leaves((together.batches(step, 2), together.noise(step, 2)["private"])),
            tree_leaves((alone.batches(step, 2), alone.noise(step, 2)["private"])),
            strict=True,
        ):
            assert torch.equal(a[:, 1], b[:, 0])


def test_chain_zero_is_the_run_without_chains() -> None:
    with_chains, without = make(BATCHINGS[0], [2], 2), make(BATCHINGS[0], [2], 0)
    assert torch.equal(with_chains.batches(1, 1)[0].x[:, 0], without.batches(1, 1)[0].x)
    own, plain = with_chains.noise(0, 1), without.noise(0, 1)
    assert torch.equal(own["private"]["w"][:, 0], plain["private"]["w"])
    assert torch.equal(own["shared"]["w"][0], plain["shared"]["w"])


def test_chains_clients_steps_and_rounds_differ() -> None:
    block = make(BATCHINGS[0], [2, 0], 2)
    first, second = block.noise(0, 2)["private"]["w"], block.noise(1, 2)["private"]["w"]
    later = dataclasses.replace(STREAM, server_round=3)
    other = Block(block.plans, [2, 0], block.shards, later, LIKE).noise(0, 2)["private"]["w"]
    drawn = [first[0, 0], first[0, 1], first[1, 0], second[0, 0], other[0, 0]]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert not torch.equal(a, b)


def test_noise_is_kept_between_the_steps_at_which_it_is_due() -> None:
    block = make(BATCHINGS[0], [2, 0])
    drawn = [block.noise(s, 2)["shared"]["w"] for s in range(4)]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[2], drawn[3])
    assert not torch.equal(drawn[1], drawn[2])


def test_padding_has_no_weight_and_the_scale_makes_a_batch_unbiased() -> None:
    block = make(Batching("epochs", 4), [0])  # 7 rows: a batch of 4 and one of 3
    full, short = (block._batch(i, 1) for i in (0, 1))
    assert (full.weight > 0).sum() == 4
    assert (short.weight > 0).sum() == 3
    assert float(full.scale) == 7 / 4
    assert float(short.scale) == 7 / 3


def test_padding_repeats_the_clients_own_row_and_nobody_elses() -> None:
    block = make(Batching("epochs", 4), [0, 1])  # client 1 holds one row
    batch = block._batch(0, 2)
    own = block.held.table.x[block.held.index(np.zeros((2, 1), np.int64))[1]]
    assert torch.equal(batch.x[1], own.expand(4, -1))
    assert batch.weight[1].tolist()[1:] == [0.0, 0.0, 0.0]


def test_scalars_are_each_clients_own() -> None:
    block = make(BATCHINGS[0], [2, 0])
    scalars = block.scalars(3, 2)
    assert scalars["rate"].tolist() == [4.0, 3.0]
    assert scalars["constant"].tolist() == [2.0, 0.0]
    assert scalars["num-examples"].tolist() == [30.0, 7.0]
    assert scalars["partition-id"].tolist() == [2, 0]
    assert scalars["step"].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_has_the_distribution_it_is_named_after(dtype: torch.dtype) -> None:
    plan = Plan(1, Batching("none"), noise={
        "n": Noise({"a": (20_000,)}), "u": Noise({"a": (20_000,)}, distribution="uniform"),
    })  # fmt: skip
    drawn = Block([plan], [0], Shards(federation(), dtype), STREAM, {}).noise(0, 1)
    normal, uniform = drawn["n"]["a"][0], drawn["u"]["a"][0]
    assert normal.dtype == uniform.dtype == dtype
    assert abs(float(normal.mean())) < 5 / 20_000**0.5
    assert abs(float(normal.var()) - 1) < 5 * (2 / 20_000) ** 0.5
    assert 0 <= float(uniform.min()) < float(uniform.max()) < 1
    assert abs(float(uniform.mean()) - 0.5) < 5 / (12 * 20_000) ** 0.5


def test_noise_that_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be shared"):
        Noise({"a": (1,)}, shared=True, per_example=True)
    with pytest.raises(ValueError, match="must be ≥ 1"):
        Noise({"a": (1,)}, every=0)


def test_whole_shards_have_few_widths() -> None:
    widths = [rounded(n) for n in range(1, 5000)]
    assert widths == sorted(widths)
    assert len(set(widths)) < 90
    assert all(n <= w <= n + max(n // 8, 0) for n, w in enumerate(widths, 1))
    assert widths[:15] == list(range(1, 16))


def test_a_clients_number_is_exact_whatever_the_dtype() -> None:
    block = make(BATCHINGS[0], [2, 0])
    block.held = dataclasses.replace(block.held, partitions=np.array([2**24 + 1, 2**31 + 3]))
    assert block._stack_scalars()["partition-id"].tolist() == [2**24 + 1, 2**31 + 3]
