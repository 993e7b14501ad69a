"""Runs the comparison and prints it: `python -m tests.benchmarks [WORKLOAD ...]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.benchmarks.harness import DisagreementError, measure
from tests.benchmarks.report import machine, table
from tests.benchmarks.sides import SIDES
from tests.benchmarks.workloads import WORKLOADS


def main() -> int:
    """Returns 1 if the sides of a workload did not compute the same thing."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--repetitions", type=int, default=15, help="per side, default 15")
    parser.add_argument("--out", type=Path, help="also write the Markdown to this file")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.workloads) - set(WORKLOADS))
    if unknown:
        parser.error(f"no workload named {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    if arguments.repetitions < 1:
        parser.error("--repetitions must be at least 1")

    parts = [machine()]
    print(parts[0], flush=True)
    for name in arguments.workloads or WORKLOADS:
        sides = [side for side in SIDES if name in side.workloads]
        try:
            parts.append(
                table(WORKLOADS[name], measure(WORKLOADS[name], sides, arguments.repetitions))
            )
        except DisagreementError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"\n{parts[-1]}", flush=True)
    if arguments.out:
        arguments.out.write_text("\n\n".join(parts) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
