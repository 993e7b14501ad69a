"""The round loop: exchanges, evaluation, events, early stop, checkpoints.

Flower's Strategy.start runs the same five methods but cannot resume, report or stop early.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from torch import Tensor

from fedsim.errors import RunFailed
from fedsim.grids.nodes import partition_of
from fedsim.means import surely_finite
from fedsim.messages import (
    Arrays,
    Broadcast,
    Received,
    Reduction,
    Replies,
    nodes_of,
    stack,
    to_record,
    to_tensors,
    trains,
)
from fedsim.random import generator, seeded_globals
from fedsim.server.check import Checked, StackCheck, check_replies, finite
from fedsim.server.evaluation import Evaluator
from fedsim.server.faults import FaultyGrid
from fedsim.server.recorder import Recorder
from fedsim.server.restore import names_of, restore_strategy
from fedsim.server.state import LoopConfig, LoopState, Metrics, Totals
from fedsim.server.stragglers import hear, with_more
from fedsim.server.traffic import bytes_received, bytes_sent, gradients_of
from fedsim.server.waiting import Waiting, tolerated_failures
from fedsim.strategies.base import Exchange, ReplySchema, Strategy
from fedsim.strategies.flower import (
    exchanges_of,
    strategy_state,
    weight_key,
)


class RoundLoop:
    """Runs rounds until the last, an early stop, or a failure.

    Raises RunFailed with the round, the clients and the last good checkpoint.
    """

    def __init__(
        self,
        strategy: FlowerStrategy,
        grid: Grid,
        arrays: Arrays,
        config: LoopConfig,
        recorder: Recorder,
        evaluator: Evaluator | None = None,
        on_round: Callable[[int, Metrics, Metrics], None] | None = None,
    ) -> None:
        """`on_round` is told the round, its newest metrics as "split/name", and its costs."""
        self.strategy, self.grid, self.config = strategy, grid, config
        self.recorder, self.evaluator = recorder, evaluator
        self.on_round = on_round or (lambda round, metrics, system: None)
        self.state = LoopState(arrays)
        self.waiting = Waiting(grid, config.clock)
        self.chains = strategy.chains if isinstance(strategy, Strategy) else 0
        self._record: tuple[Arrays, ArrayRecord] | None = None
        self._saved_round: int | None = None
        self._saved_at = time.monotonic()
        self._began = time.monotonic()

    def run(self) -> LoopState:
        """Runs the remaining rounds; returns the final state, whose arrays are the result."""
        if self.state.round == 0 and self._saved_round is None:
            self._evaluate_server(0)
            self.recorder.end_round(0)
        self._began = time.monotonic() - self.state.totals.seconds
        while not self._over(self.state.round) and not self.state.stopped:
            try:
                self._round(self.state.round + 1)
            except RunFailed as error:
                raise RunFailed(f"{error}{self._last_good()}") from error
            if self._due():
                self.save()
        if self._saved_round != self.state.round:
            self.save()
        stopping = self.config.stopping
        if stopping and stopping.restore_best and self.state.best_arrays is not None:
            self.state.arrays = self.state.best_arrays
            self._evaluate_server(self.state.round)  # so that the last figures are the result's
        return self.state

    def _as_record(self, arrays: Arrays) -> ArrayRecord:
        """Returns the arrays as the record that they came in, if that is at hand."""
        if self._record is None or self._record[0] is not arrays:
            self._record = arrays, to_record(arrays)
        return self._record[1]

    def _finished(self) -> bool:
        return isinstance(self.strategy, Strategy) and self.strategy.finished()

    def _over(self, server_round: int) -> bool:
        """Says whether no round follows this one."""
        return self._finished() or server_round >= self.config.rounds

    def _round(self, server_round: int) -> None:
        state = self.state
        before = Totals(**vars(state.totals))
        record = self._as_record(state.arrays)
        shown: Metrics = {}
        cohort = 0
        measured: set[str] = set()
        for index, exchange in enumerate(exchanges_of(self.strategy, server_round)):
            new, metrics, checked = self._exchange(server_round, index, exchange, record)
            cohort = max(cohort, checked.good + len(checked.failures))
            if checked.good:
                measured.add("train")
            if new is not None:
                record = new
            if metrics is not None:
                shown |= self._log(server_round, "train", _floats(metrics))
        given = to_tensors(record)
        arrays = _like(given, state.arrays, server_round)
        if all(map(operator.is_, arrays.values(), given.values())):  # in one order, too
            self._record = arrays, record
        state.arrays, state.round = arrays, server_round
        self._take_draw(server_round)
        state.totals.seconds = time.monotonic() - self._began
        by_clients = self._evaluate_clients(server_round)
        if by_clients:
            measured.add("client")
            shown |= by_clients
        every = self.config.server_every
        if every and (server_round % every == 0 or self._over(server_round)):
            measured |= {"validation", "test", "ood"}
            shown |= self._evaluate_server(server_round)
        self._maybe_stop(server_round, shown, measured)
        system = self._system(before, cohort)
        self.recorder.log_metrics(server_round, "system", system)
        self.recorder.end_round(server_round)
        self.on_round(server_round, shown, system)

    def _exchange(
        self, server_round: int, index: int, exchange: Exchange, record: ArrayRecord
    ) -> tuple[ArrayRecord | None, MetricRecord | None, Checked]:
        if exchange.wait is None:
            checked = self._ask_all(server_round, index, exchange, record)
        else:
            checked = self._ask_some(server_round, exchange.wait, exchange, record)
        gradients = gradients_of(checked.replies)
        if exchange.by_client and checked.good:
            self._log_clients(server_round, "train", stack(checked.replies))
        with self._seeded(self.config.seed, "aggregate", server_round, index):
            new, metrics = exchange.aggregate(server_round, checked.replies)
        self.state.totals.gradients += gradients
        self.state.totals.simulated_seconds = self.waiting.now
        return new, metrics, checked

    def _ask_all(
        self, server_round: int, index: int, exchange: Exchange, record: ArrayRecord
    ) -> Checked:
        """Returns the replies of everybody who was asked, or of those who came first."""
        config = ConfigRecord({"seed": self.config.seed, "server-round": server_round})
        # Flower's strategies sample nodes and draw noise from global generators
        stream = (self.config.seed, "strategy", server_round, index)
        with self._seeded(*stream):
            messages = exchange.configure(server_round, record, config, self.grid)
            messages = messages if isinstance(messages, Broadcast) else list(messages)
        schema, wait = exchange.schema(record), len(messages)
        turns: Sequence[int] = range(wait)
        if self.config.over_sampling > 1 and trains(exchange.message_type):
            rng = generator(self.config.seed, "over_sampling", server_round)
            nodes = self.grid.get_node_ids()
            messages = with_more(messages, self.config.over_sampling, nodes, rng)
            turns = rng.permutation(len(messages)).tolist()
        if isinstance(messages, Broadcast) and exchange.weights is not None:
            check = StackCheck(schema, record if schema.records is None else None)
            messages.reduction = Reduction(check, exchange.weights)
        self.state.totals.bytes_down += bytes_sent(messages)
        heard = hear(
            self.grid,
            messages,
            wait,
            lambda replies, asked: check_replies(replies, asked, schema, record),
            durations=self.waiting.durations(messages),
            deadline=self.config.clock.deadline if self.config.clock else None,
            turns=turns,
            weights=exchange.weights,
        )
        self.state.totals.bytes_up += heard.bytes_up
        self.state.totals.late += heard.late
        self.waiting.now += heard.seconds
        self._report_failures(server_round, exchange.message_type, heard.checked, wait)
        return heard.checked

    def _ask_some(
        self, server_round: int, wait: int, exchange: Exchange, record: ArrayRecord
    ) -> Checked:
        """Returns the first `wait` good replies to what is under way."""
        config = {"seed": self.config.seed, "server-round": server_round}
        tolerated = tolerated_failures(wait, self.config.quorum)
        if self.config.on_bad_reply == "fail":
            tolerated = 0
        found = self.waiting.collect(server_round, exchange, record, config, wait, tolerated)
        self.state.totals.bytes_down += found.bytes_down
        self.state.totals.bytes_up += found.bytes_up
        failures = sorted(found.failures, key=lambda f: f.node_id)
        checked = Checked(Received(found.pairs), len(found.pairs), failures)
        asked = checked.good + len(failures)
        self._report_failures(server_round, exchange.message_type, checked, asked)
        return checked

    def _seeded(self, seed: int, purpose: str, *ids: int) -> AbstractContextManager[None]:
        """Seeds the global generators for Flower's strategies; ours never touch them."""
        if isinstance(self.strategy, Strategy):
            return nullcontext()
        return seeded_globals(seed, purpose, *ids)

    def _report_failures(
        self, server_round: int, message_type: str, checked: Checked, asked: int
    ) -> None:
        if checked.failures:
            self.state.totals.dropped += len(checked.failures)
            reasons = {f.node_id: f.reason for f in checked.failures[:20]}
            self.recorder.event(
                "bad_replies",
                server_round,
                message_type=message_type,
                count=len(checked.failures),
                nodes={str(node): reason for node, reason in reasons.items()},
            )
            first = checked.failures[0]
            client = f"client {partition_of(first.node_id)} (node {first.node_id})"
            where = f"round {server_round}, {message_type}: {client}: {first.reason}"
            if self.config.on_bad_reply == "fail":
                raise RunFailed(f"{where} (on_bad_reply: fail)")
            if checked.good < self.config.quorum * asked:
                raise RunFailed(
                    f"round {server_round}, {message_type}: {checked.good} of {asked} replies were"
                    f" good, fewer than the quorum of {self.config.quorum:g}; first: {where}"
                )

    def _take_draw(self, server_round: int) -> None:
        strategy = self.strategy
        if not (isinstance(strategy, Strategy) and strategy.is_draw(server_round)):
            return
        self.state.totals.draws += 1
        if self.evaluator is not None:
            self.evaluator.absorb(self.state.arrays)
        if self.config.save_draws:
            self.recorder.save_draw(server_round, self.state.arrays)

    def _evaluate_server(self, server_round: int) -> Metrics:
        shown: Metrics = {}
        if self.evaluator is None or not self.config.server_every:
            return shown
        results = self.evaluator.evaluate(self.state.arrays, bool(self.chains))
        for split, metrics in results.items():
            shown |= self._log(server_round, split, metrics)
        return shown

    def _evaluate_clients(self, server_round: int) -> Metrics:
        every = self.config.clients_every
        if not every or (server_round % every and not self._finished()):
            return {}
        record = to_record(self.state.arrays)  # whoever edits it edits this one
        config = ConfigRecord({"seed": self.config.seed, "server-round": server_round})
        with seeded_globals(self.config.seed, "evaluate", server_round):
            messages = self.strategy.configure_evaluate(server_round, record, config, self.grid)
            messages = messages if isinstance(messages, Broadcast) else list(messages)
        if not len(messages):
            return {}
        replies = self.grid.send_and_receive(messages)
        asked = nodes_of(messages)
        self.state.totals.bytes_down += bytes_sent(messages)
        self.state.totals.bytes_up += bytes_received(replies)
        key = weight_key(self.strategy)
        checked = check_replies(replies, asked, ReplySchema({}, frozenset({key}), key), record)
        self._report_failures(server_round, "evaluate", checked, len(asked))
        self._log_clients(server_round, "client", stack(checked.replies), key)
        metrics = self.strategy.aggregate_evaluate(server_round, checked.replies)
        return {} if metrics is None else self._log(server_round, "client", _floats(metrics))

    def _maybe_stop(self, server_round: int, shown: Metrics, measured: set[str]) -> None:
        """`measured`: the splits that were evaluated this round; patience counts those rounds."""
        stopping, state = self.config.stopping, self.state
        if stopping is None or stopping.split not in measured:
            return
        value = shown.get(f"{stopping.split}/{stopping.name}")
        if value is None:
            raise RunFailed(
                f"round {server_round}: early_stopping watches {stopping.split}/{stopping.name},"
                f" but there are only {', '.join(sorted(shown))}"
            )
        signed = value if stopping.mode == "min" else -value
        first = state.best is None and not math.isnan(signed)
        if first or (state.best is not None and signed < state.best - stopping.min_delta):
            state.best, state.best_round, state.waited = signed, server_round, 0
            state.best_arrays = dict(state.arrays)
            return
        state.waited += 1
        if state.waited >= stopping.patience:
            state.stopped = True
            self.recorder.event("early_stop", server_round, best_round=state.best_round)

    def _system(self, before: Totals, cohort: int) -> Metrics:
        """Returns the round's costs and, as total_*, all costs so far."""
        totals = dict(vars(self.state.totals))
        names = ["bytes_up", "bytes_down", "gradients", "seconds", "dropped"]
        if self.config.clock is None:
            del totals["simulated_seconds"]
        else:
            names.append("simulated_seconds")
        if self.config.over_sampling > 1:
            names.append("late")
        else:
            del totals["late"]
        system = {f"total_{name}": float(value) for name, value in totals.items()}
        for name in names:
            system[name] = float(totals[name] - getattr(before, name))
        system["clients_per_second"] = cohort / max(system["seconds"], 1e-9)
        if isinstance(self.grid, FaultyGrid):
            system |= self.grid.take_counts()
        return system

    def _log_clients(
        self, server_round: int, split: str, stacked: Replies, rows: str | None = None
    ) -> None:
        """Logs single clients' metrics. rows: where this one is 0 the others are left out."""
        found = {name: each for name, each in stacked.metrics.items() if each.ndim == 1}
        metrics = {name: each.cpu().double().numpy() for name, each in found.items()}
        partitions = np.array([partition_of(n) for n in stacked.node_ids], np.int64)
        there = metrics[rows] != 0 if rows in metrics else np.ones(len(partitions), bool)
        for which, names in ((there, list(metrics)), (~there, [str(rows)])):
            if which.any():
                values = {name: metrics[name][which].tolist() for name in names}
                clients = partitions[which].tolist()
                self.recorder.log_client_metrics(server_round, split, clients, values)

    def _log(self, server_round: int, split: str, metrics: Metrics) -> Metrics:
        self.recorder.log_metrics(server_round, split, metrics)
        return {f"{split}/{name}": value for name, value in metrics.items()}

    # Checkpoints

    def _due(self) -> bool:
        c = self.config
        by_rounds = bool(c.checkpoint_rounds) and self.state.round % c.checkpoint_rounds == 0
        waited = time.monotonic() - self._saved_at
        return by_rounds or (c.checkpoint_seconds is not None and waited >= c.checkpoint_seconds)

    def save(self) -> None:
        """Saves what the run continues from after this round."""
        state = self.state
        tensors: dict[str, Tensor] = {f"arrays/{k}": v for k, v in state.arrays.items()}
        tensors |= {f"best/{k}": v for k, v in (state.best_arrays or {}).items()}
        plain: dict[str, Any] = {
            "round": state.round,
            "totals": vars(state.totals),
            "best": [state.best, state.best_round, state.waited, state.stopped],
            "order": list(state.arrays),
            "strategies": names_of(self.strategy),
        }
        parts: dict[str, Any] = {"strategy": strategy_state(self.strategy)}
        if self.waiting.busy:
            parts["waiting"] = self.waiting.state_dict()
        if hasattr(self.grid, "state_dict"):
            parts["grid"] = self.grid.state_dict()
        if self.evaluator is not None:
            parts["evaluator"] = self.evaluator.state_dict()
        for part, (part_tensors, part_plain) in parts.items():
            tensors |= {f"{part}/{k}": v for k, v in part_tensors.items()}
            plain[part] = part_plain
        c = self.config
        self.recorder.save_checkpoint(state.round, tensors, plain, c.keep, c.keep_every)
        self._saved_round, self._saved_at = state.round, time.monotonic()

    def load(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Restores what `save` saved; raises UserError if the strategy or model is another."""
        restore_strategy(tensors, plain, self.strategy, self.state.arrays)
        parts: dict[str, Arrays] = {}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = tensor
        state = self.state
        state.arrays = {name: parts["arrays"][name] for name in plain["order"]}
        state.best_arrays = parts.get("best")
        state.round, state.totals = int(plain["round"]), Totals(**plain["totals"])
        state.best, state.best_round, state.waited, state.stopped = plain["best"]
        if "grid" in plain:
            grid: Any = self.grid
            grid.load_state_dict(parts.get("grid", {}), plain["grid"])
        self.waiting.now = state.totals.simulated_seconds
        if "waiting" in plain:
            self.waiting.load_state_dict(parts.get("waiting", {}), plain["waiting"])
        if self.evaluator is not None:
            self.evaluator.load_state_dict(parts.get("evaluator", {}), plain["evaluator"])
        self._saved_round = state.round

    def _last_good(self) -> str:
        if self._saved_round is None:
            return " (no checkpoint yet)"
        return f" (last good checkpoint: round {self._saved_round})"


def _like(new: Arrays, old: Arrays, server_round: int) -> Arrays:
    """Returns the new parameters in the old ones' dtypes: Flower's FedAdam returns float64.

    Raises RunFailed if they are not finite numbers of the same shapes.
    """
    if {k: v.shape for k, v in new.items()} != {k: v.shape for k, v in old.items()}:
        raise RunFailed(f"round {server_round}: the strategy returned arrays of other shapes")
    bad = [] if surely_finite(new) else [k for k, v in new.items() if not finite(v[None]).all()]
    if bad:
        raise RunFailed(f"round {server_round}: the aggregate of {bad[0]!r} has NaN or Inf")
    return {name: new[name].to(tensor.device, tensor.dtype) for name, tensor in old.items()}


def _floats(metrics: MetricRecord) -> Metrics:
    """Returns the metrics that are one number; gradients are counted in the totals instead."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and name != "gradients"
    }
