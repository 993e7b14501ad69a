"""Hand-written loops that compute one client after the other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.session import Session
from tests.benchmarks.workloads import Integers, Workload


class SequentialLoop(Session):
    """One resident model, reset in place for each client; the mean is a running sum."""

    def __init__(self, workload: Workload) -> None:
        torch.set_num_threads(1)
        self.workload = workload
        self.worker = _Worker(workload)
        self.current = [p.detach().clone() for p in self.worker.parameters]
        self.round = 0

    def advance(self, rounds: int) -> None:
        """Runs that many more rounds."""
        torch.set_num_threads(1)
        for _ in range(rounds):
            chosen, orders = self.workload.chosen(self.round), self.workload.orders(self.round)
            total = self.worker.train(self.current, chosen, orders)
            self.current = [t / self.workload.cohort for t in total]
            self.round += 1

    def parameters(self) -> list[Tensor]:
        """Returns the current global parameters."""
        return self.current


class ThreadedLoop(Session):
    """As above in threads of one intra-op thread each, which share out the clients of a round."""

    def __init__(self, workload: Workload, threads: int = 2) -> None:
        torch.set_num_threads(1)
        self.workload = workload
        self.workers = [_Worker(workload) for _ in range(threads)]
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        self.current = [p.detach().clone() for p in self.workers[0].parameters]
        self.round = 0

    def advance(self, rounds: int) -> None:
        """Runs that many more rounds."""
        torch.set_num_threads(1)
        for _ in range(rounds):
            chosen = np.array_split(self.workload.chosen(self.round), len(self.workers))
            orders = np.array_split(self.workload.orders(self.round), len(self.workers))
            jobs = [
                self.pool.submit(worker.train, self.current, clients, rows)
                for worker, clients, rows in zip(self.workers, chosen, orders, strict=True)
            ]
            totals = [job.result() for job in jobs]
            self.current = [
                torch.stack(parts).sum(0) / self.workload.cohort
                for parts in zip(*totals, strict=True)
            ]
            self.round += 1

    def parameters(self) -> list[Tensor]:
        """Returns the current global parameters."""
        return self.current

    def close(self) -> None:
        """Ends the threads."""
        self.pool.shutdown()


class _Worker:
    """A model that trains clients one after the other; channels-last if there are images."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.x, self.y = workload.data
        self.model: nn.Module = workload.model()
        self.format = torch.contiguous_format
        if self.x.ndim == 5:
            self.format = torch.channels_last
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.parameters: list[Tensor] = list(self.model.parameters())

    def train(self, start: list[Tensor], clients: Integers, orders: Integers) -> list[Tensor]:
        """Returns the sum of the clients' trained parameters."""
        total = [torch.zeros_like(p) for p in self.parameters]
        for client, order in zip(clients, torch.from_numpy(orders), strict=True):
            shard = client % self.workload.distinct
            x, y = self.x[shard], self.y[shard]
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, start)
            for rows in torch.split(order, self.workload.batch):
                batch = x[rows].contiguous(memory_format=self.format)
                loss = F.cross_entropy(self.model(batch), y[rows])
                gradients = torch.autograd.grad(loss, self.parameters)
                with torch.no_grad():
                    torch._foreach_add_(self.parameters, list(gradients), alpha=-self.workload.lr)
            with torch.no_grad():
                torch._foreach_add_(total, self.parameters)
        return total


class EchoLoop(Session):
    """Each client returns the parameters plus its id, as a tensor of its own."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.current = next(workload.model().parameters()).detach().clone()

    def advance(self, rounds: int) -> None:
        """Runs that many more rounds."""
        torch.set_num_threads(1)
        for _ in range(rounds):
            total = torch.zeros_like(self.current)
            for client in range(self.workload.cohort):
                total += self.current + client
            self.current = total / self.workload.cohort

    def parameters(self) -> list[Tensor]:
        """Returns the current global parameters."""
        return [self.current]
