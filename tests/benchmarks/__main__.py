"""Runs the comparison and prints it: `python -m tests.benchmarks [TABLE ...]`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from tests.benchmarks.harness import DisagreementError
from tests.benchmarks.report import HEAD, machine, summary
from tests.benchmarks.sides import KEYS, peer_versions
from tests.benchmarks.tables import TABLES, Report


def main() -> int:
    """Returns 1 if the sides of a table did not compute the same thing."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    report = Report(arguments.repetitions, arguments.sides)
    where = machine(peer_versions())
    print(where, flush=True)
    parts: list[str] = []
    failed = False
    for name in arguments.tables or TABLES:
        began = time.monotonic()
        try:
            parts.append(TABLES[name](report))
        except DisagreementError as error:
            parts.append(f"### {name}\n\nThe sides disagree, so there are no times: {error}")
            failed = True
        print(f"\n{parts[-1]}\n\n({time.monotonic() - began:.0f} s)", flush=True)
    if report.verdicts:
        parts.insert(0, summary(report.verdicts) + "\n\n## Tables")
        print(f"\n{summary(report.verdicts)}")
    if arguments.out:
        text = "\n\n".join([HEAD, where, *parts]) + "\n"
        beside = arguments.out.with_name(arguments.out.name + ".part")
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, arguments.out)
    return int(failed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--repetitions", type=int, default=15, help="per side, default 15")
    parser.add_argument("--sides", default="", help=f"only these, of {','.join(KEYS)}")
    parser.add_argument("--out", type=Path, help="also write the page to this file")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.tables) - set(TABLES)):
        parser.error(f"no table named {', '.join(unknown)}; there are {', '.join(TABLES)}")
    arguments.sides = [key for key in arguments.sides.split(",") if key]
    if unknown := sorted(set(arguments.sides) - set(KEYS)):
        parser.error(f"no side named {', '.join(unknown)}; there are {', '.join(KEYS)}")
    if arguments.repetitions < 1:
        parser.error("--repetitions must be at least 1")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
