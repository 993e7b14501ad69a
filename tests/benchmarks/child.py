"""Runs a side of this environment in a process of its own: SIDE WORKLOAD, then `orders`."""

from __future__ import annotations

import sys

from tests.benchmarks.orders import Orders
from tests.benchmarks.sides import SIDES
from tests.benchmarks.workloads import WORKLOADS


def main() -> None:
    """Obeys until its input ends."""
    orders = Orders()
    side, workload = sys.argv[1:3]
    session = next(s for s in SIDES if s.key == side).setup(WORKLOADS[workload])
    while rounds := orders.take(session.result):
        session.advance(rounds)
    session.close()


if __name__ == "__main__":
    main()
