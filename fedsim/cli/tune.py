"""The command `fedsim tune`: measures how a scenario is computed fastest, and writes it there."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsim.cli import options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fedsim.scenario import RunSpec
    from fedsim.tune import Candidate, Result

MARK = "chosen by fedsim tune"
DEFAULTS: dict[str, str | int | None] = {"path": "auto", "chunk": None, "threads": None}
"""The fields of `engine` that are tuned, and what leaves them to the engine."""

PLAIN_SECONDS = 2.0  # between two lines of progress, at least

Change = tuple[tuple[str, ...], dict[str, str | int | None]]
"""The path of an engine section in the file, and what is written into it."""


def tune(
    scenario: options.ScenarioFile,
    overrides: options.Overrides = None,
    seconds: Annotated[
        float,
        typer.Option("--seconds", min=1, metavar="S", help="Time for measuring, about."),
    ] = 60,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print: the file stays as it is.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Measure which path, chunk and threads are fastest here, and write them into the scenario.

    Training rounds are timed, on the scenario's data; nothing else of a run happens. Entries of
    compare that compute differently are measured one after the other.
    """
    from fedsim.cli.output import console, print_json, progress_console, results_alone
    from fedsim.runner import check_specs
    from fedsim.scenario import Scenario

    file = Path(scenario)
    if not math.isfinite(seconds):
        raise typer.BadParameter(f"{seconds} is no number of seconds", param_hint="--seconds")
    _refuse_own_fields(overrides or [])
    loaded = Scenario.load(file, overrides or [])
    _refuse_grid(loaded.grid)
    specs = _one_of_each_entry(loaded.expand())
    with results_alone():
        check_specs(specs)
    arms = [spec.arm for spec in specs]
    if not dry_run:
        _check_writable(file, arms)
    with results_alone():
        results = _measured(specs, seconds, progress_console(quiet=False))
    changes = changes_of(_engines(file, arms), results)
    comment = f"{MARK} on {_machine()}"
    if changes and not dry_run:
        rewrite(file, changes, comment)
    if as_json:
        print_json(_document(file, results, changes, dry_run))
        return
    _print(file, results, changes, dry_run, bool(overrides), console())


# What is measured


def _refuse_own_fields(overrides: Sequence[str]) -> None:
    from fedsim.errors import UserError

    own = {"engine", *(f"engine.{name}" for name in DEFAULTS)}
    given = [text for text in overrides if text.partition("=")[0].strip() in own]
    if given:
        raise UserError(
            "\n".join(
                f"--set {text}: path, chunk and threads are what tune chooses" for text in given
            )
        )


def _refuse_grid(grid: Mapping[str, object]) -> None:
    from fedsim.errors import UserError

    own = [name for name in ("engine", *(f"engine.{name}" for name in DEFAULTS)) if name in grid]
    if own:
        raise UserError(
            "the scenario's grid compares ways to compute by itself, so there is none to write:"
            f" take {own[0]} out of it, or --set grid={{}} --dry-run"
        )


def _one_of_each_entry(specs: Sequence[RunSpec]) -> list[RunSpec]:
    """Returns the first run of each entry of compare: its first grid point and seed."""
    return list({spec.arm: spec for spec in reversed(specs)}.values())[::-1]


def _measured(specs: Sequence[RunSpec], seconds: float, to: Console) -> dict[str, Result | str]:
    """Returns what was measured of each entry, or why nothing was; equal ones are measured once."""
    from fedsim import tune as tuning
    from fedsim.errors import RunFailed, UserError
    from fedsim.setup import prepare

    alike: dict[str, list[RunSpec]] = {}
    for spec in specs:
        alike.setdefault(_computation(spec), []).append(spec)
    found: dict[str, Result | str] = {}
    ends = time.monotonic() + seconds
    with _progress(to) as told:
        for number, same in enumerate(alike.values()):
            share = (ends - time.monotonic()) / (len(alike) - number)
            result: Result | str
            try:
                setup = prepare(same[0].scenario)
                result = tuning.tune(setup, share, partial(_named, told, same[0].group))
            except (UserError, RunFailed) as error:
                if len(alike) == 1:
                    raise
                result = str(error)
            found |= {spec.arm: result for spec in same}
    if all(isinstance(result, str) for result in found.values()):
        raise UserError("\n".join(f"{arm}: {why}" for arm, why in found.items()))
    return {spec.arm: found[spec.arm] for spec in specs}


def _computation(spec: RunSpec) -> str:
    """Returns what decides how a run computes; entries that share it are measured once."""
    import json

    sections = ("data", "partition", "model", "task", "strategy", "client", "engine")
    resolved = spec.scenario.resolved()
    return json.dumps([resolved[name] for name in sections])


def _named(told: Callable[[str], None], label: str, words: str) -> None:
    told(f"{label}: {words}")


@contextmanager
def _progress(to: Console) -> Iterator[Callable[[str], None]]:
    """Shows the newest line: redrawn in a terminal, else printed every now and then."""
    if to.is_terminal:
        with to.status("", refresh_per_second=4) as status:
            yield lambda words: status.update(words)
        return
    shown = -PLAIN_SECONDS

    def line(words: str) -> None:
        nonlocal shown
        if time.monotonic() - shown >= PLAIN_SECONDS:
            shown = time.monotonic()
            to.print(words, markup=False, highlight=False, soft_wrap=True)

    yield line


# What is written


def changes_of(
    engines: Mapping[str | None, Mapping[str, Any]], results: Mapping[str, Result | str]
) -> list[Change]:
    """Returns what to write so that every entry gets its best.

    engines: the engine sections as written, of the file (None) and of each entry. One section at
    the top serves all entries if they agree; else each entry gets its own.
    """
    good = {arm: result for arm, result in results.items() if not isinstance(result, str)}
    changed = {arm: result for arm, result in good.items() if result.best != result.written}
    top = {name for name in DEFAULTS if engines[None].get(name) is not None}
    own = {arm: {name for name in DEFAULTS if name in engines[arm]} for arm in changed}
    if not changed:
        return []
    first = next(iter(changed.values()))
    agree = len(changed) == len(good) and all(r.best == first.best for r in changed.values())
    if agree and not any(own.values()):
        return [(("engine",), _fields(first, top))]
    return [
        (("compare", arm, "engine"), _fields(result, top | own[arm]))
        for arm, result in changed.items()
    ]


def _fields(result: Result, pinned: set[str]) -> dict[str, str | int | None]:
    """Returns the fields to write; `pinned`: those that say something now."""
    best = result.best
    fields: dict[str, str | int | None] = dict(DEFAULTS)
    if best != result.automatic:
        fields = {"path": best.path, "chunk": best.chunk or None, "threads": best.threads}
    return {k: v for k, v in fields.items() if v != DEFAULTS[k] or k in pinned}


def _engines(file: Path, arms: Sequence[str]) -> dict[str | None, Mapping[str, Any]]:
    """Returns the engine sections as written, of the file (None) and of each entry of compare."""
    from fedsim.scenario.loader import read

    data = read(file).data
    found: dict[str | None, Mapping[str, Any]] = {None: data.get("engine") or {}}
    compare = data.get("compare") or {}
    return found | {arm: (compare.get(arm) or {}).get("engine") or {} for arm in arms}


def rewrite(file: Path, changes: Sequence[Change], comment: str) -> None:
    """Writes the changes into the scenario file, which is complete at any moment."""
    from fedsim.errors import UserError
    from fedsim.runs.files import write_bytes

    target = file.resolve()
    try:
        changed = _rewritten(target, changes, comment)
    except ValueError as error:
        wanted = "\n".join(f"  {'.'.join(path)}: {_shown(values)}" for path, values in changes)
        raise UserError(f"{file} was left as it is ({error}); write into it\n{wanted}") from None
    mode = target.stat().st_mode
    write_bytes(target, changed)
    os.chmod(target, mode)


def _rewritten(file: Path, changes: Sequence[Change], comment: str) -> bytes:
    from fedsim.scenario.rewrite import put

    text = file.read_bytes().decode("utf-8")  # its line ends, too, stay as they are
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    text = text.removeprefix(mark)
    for path, values in changes:
        text = put(text, path, values, comment, MARK)
    return (mark + text).encode()


def _check_writable(file: Path, arms: Sequence[str]) -> None:
    """Raises UserError before anything is measured if nothing could be written."""
    from fedsim.errors import UserError

    target = file.resolve()
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"{file} cannot be replaced in its folder; --dry-run only prints")
    # Replacing a file asks nobody whether it may be written.
    if not (os.access(target, os.W_OK) and target.stat().st_mode & 0o222):
        raise UserError(f"{file} is read-only; --dry-run only prints")
    anything: dict[str, str | int | None] = {"path": "mapped", "chunk": 1, "threads": 1}
    paths = [("engine",), *(("compare", arm, "engine") for arm in arms if arm)]
    for path in paths:
        try:
            _rewritten(file, [(path, anything)], MARK)
        except ValueError as error:
            raise UserError(
                f"{file}: {'.'.join(path)} cannot be written into it ({error}); --dry-run only"
                " prints"
            ) from None


def _machine() -> str:
    import torch

    from fedsim.runs.environment import describe

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else describe()["cpu"]
    return f"{' '.join(str(name).split())}, torch {torch.__version__}"


# What is printed


def _print(
    file: Path,
    results: Mapping[str, Result | str],
    changes: Sequence[Change],
    dry_run: bool,
    overridden: bool,
    to: Console,
) -> None:
    for result in {id(found): found for found in results.values()}.values():
        arms = ", ".join(arm for arm, found in results.items() if found is result)
        if isinstance(result, str):
            to.print(f"{arms}: not measured: {result}", markup=False, soft_wrap=True)
        else:
            to.print(_table(arms, result))
            to.print(_verdict(result), markup=False, soft_wrap=True)
    for path, values in changes:
        where = f"{file}: {'.'.join(path)}: {_shown(values)}"
        words = f"would write into {where}" if dry_run else f"written into {where}"
        to.print(words, markup=False, soft_wrap=True)
    if not changes:
        to.print("nothing is written", markup=False)
        return
    if overridden:
        to.print("(measured with --set, which the file does not say)", markup=False)
    to.print(
        "Another path or chunk adds in another order: results differ in their last bits from those"
        " of earlier runs.",
        markup=False,
        soft_wrap=True,
    )


def _table(title: str, result: Result) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1), title=title or None, title_justify="left")
    table.add_column("candidate")
    for name in ("ms a round", "× automatic", "turns"):
        table.add_column(name, justify="right")
    table.add_column("")
    base = result.measured.get(result.automatic)
    rows = sorted(result.measured.values(), key=lambda m: (not m.seconds, m.milliseconds))
    for m in rows:
        ratio = m.ratio(base) if base is not None else float("nan")
        table.add_row(
            str(m.candidate),
            f"{m.milliseconds:.3g}" if m.seconds else "–",
            f"{ratio:.2f}" if ratio == ratio else "–",
            str(len(m.seconds)),
            _notes(result, m.candidate),
            style="bold" if m.candidate == result.best else None,
        )
    return table


def _notes(result: Result, candidate: Candidate) -> str:
    measured = result.measured[candidate]
    notes = [
        words
        for words, there in (
            ("chosen", candidate == result.best),
            ("automatic", candidate == result.automatic),
            ("in the file", candidate == result.written != result.automatic),
            ("no time", not measured.seconds and not measured.problem),
        )
        if there
    ]
    if measured.problem:
        notes.append(measured.problem.partition("\n")[0])
    return ", ".join(notes)


def _verdict(result: Result) -> str:
    """Returns the outcome in a sentence."""
    from fedsim.tune import NOISE

    block = f" of {result.block} clients" if result.automatic.path == "mapped" else ""
    automatic = f"the automatic choice ({result.automatic}{', blocks' + block if block else ''})"
    was = (
        automatic
        if result.written == result.automatic
        else f"what the file says ({result.written})"
    )
    if result.best == result.written:
        missed = sum(len(m.seconds) < 2 and not m.problem for m in result.measured.values())
        others = [c for c in result.measured if c not in (result.written, result.automatic)]
        if others and not any(result.measured[c].seconds for c in others) and missed:
            return f"there was no time for anything beside {was}: it stays; --seconds gives more"
        more = f"; {missed} found too little time, --seconds gives more" if missed else ""
        return f"nothing beats {was} by more than {NOISE:.0%}: it stays{more}"
    best = automatic if result.best == result.automatic else str(result.best)
    return f"chosen: {best}, instead of {was}"


def _shown(values: Mapping[str, object]) -> str:
    return "{" + ", ".join(f"{k}: {'null' if v is None else v}" for k, v in values.items()) + "}"


def _document(
    file: Path, results: Mapping[str, Result | str], changes: Sequence[Change], dry_run: bool
) -> dict[str, Any]:
    runs: list[dict[str, Any]] = []
    for arm, result in results.items():
        if isinstance(result, str):
            runs.append({"entry": arm, "problem": result})
            continue
        base = result.measured.get(result.automatic)
        runs.append(
            {
                "entry": arm,
                "automatic": asdict(result.automatic),
                "written": asdict(result.written),
                "best": asdict(result.best),
                "block": result.block,
                "candidates": [
                    {
                        **asdict(c),
                        "milliseconds": m.milliseconds,
                        "ratio": m.ratio(base) if base is not None else None,
                        "turns": len(m.seconds),
                        "problem": m.problem or None,
                    }
                    for c, m in result.measured.items()
                ],
            }
        )
    return {
        "scenario": str(file),
        "changes": [{"field": ".".join(path), "values": values} for path, values in changes],
        "written": bool(changes) and not dry_run,
        "runs": runs,
    }
