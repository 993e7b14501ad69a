"""Hand-written loops that compute the clients of a round together, for the MLP of W1."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from tests.benchmarks.session import Session
from tests.benchmarks.workloads import Workload


class BatchedLoop(Session):
    """A leading axis of clients on every tensor; `step` is left to the two subclasses.

    threads: intra-op threads, by default one a core.
    """

    def __init__(self, workload: Workload, threads: int | None = None) -> None:
        self.workload = workload
        self.threads = threads or os.cpu_count() or 1
        self.x, self.y = workload.data
        self.model = workload.model()
        self.names = [name for name, _ in self.model.named_parameters()]
        self.current = [p.detach().clone() for p in self.model.parameters()]
        self.round = 0

    def advance(self, rounds: int) -> None:
        """Runs that many more rounds."""
        torch.set_num_threads(self.threads)
        for _ in range(rounds):
            clients = torch.from_numpy(self.workload.chosen(self.round))
            orders = torch.from_numpy(self.workload.orders(self.round))
            with torch.no_grad():
                trained = self._train(clients[:, None], orders)
                self.current = [s.mean(0) for s in trained]
            self.round += 1

    def parameters(self) -> list[Tensor]:
        """Returns the current global parameters."""
        return self.current

    def _train(self, clients: Tensor, orders: Tensor) -> list[Tensor]:
        """Returns the trained parameters of clients (n, 1) with row orders (n, examples)."""
        shards = clients % self.workload.distinct
        x, y = self.x[shards, orders], self.y[shards, orders]
        state = [p.expand(len(clients), *p.shape).clone() for p in self.current]
        size = self.workload.batch
        for first in range(0, y.shape[1], size):
            self.step(state, x[:, first : first + size], y[:, first : first + size])
        return state

    def step(self, state: list[Tensor], x: Tensor, y: Tensor) -> None:
        """Takes one SGD step in place: state tensors (clients, ...), x (clients, batch, ...)."""
        raise NotImplementedError


class VmapLoop(BatchedLoop):
    """torch.func's vmap over the gradient of the module's loss."""

    def __init__(self, workload: Workload, threads: int | None = None) -> None:
        super().__init__(workload, threads)
        self.gradients = vmap(grad(self._loss))

    def step(self, state: list[Tensor], x: Tensor, y: Tensor) -> None:
        """One vectorised gradient, one in-place update."""
        gradients = self.gradients(dict(zip(self.names, state, strict=True)), x, y)
        torch._foreach_add_(state, list(gradients.values()), alpha=-self.workload.lr)

    def _loss(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(self.model, parameters, (x,)), y)


class BmmLoop(BatchedLoop):
    """The MLP's gradient written out in batched matrix products, fused with the update."""

    def step(self, state: list[Tensor], x: Tensor, y: Tensor) -> None:
        """Forward, backward and update without autograd."""
        w1, b1, w2, b2 = state
        lr = self.workload.lr
        hidden = torch.baddbmm(b1.unsqueeze(1), x, w1.mT).relu_()
        delta = torch.baddbmm(b2.unsqueeze(1), hidden, w2.mT).softmax(-1)
        delta.scatter_add_(-1, y.unsqueeze(-1), delta.new_full((), -1.0).expand(*y.shape, 1))
        delta /= y.shape[1]
        back = torch.bmm(delta, w2).mul_(hidden > 0)
        w2.baddbmm_(delta.mT, hidden, alpha=-lr)
        b2.sub_(delta.sum(1), alpha=lr)
        w1.baddbmm_(back.mT, x, alpha=-lr)
        b1.sub_(back.sum(1), alpha=lr)
