"""What the commands print: tables on standard output, progress on standard error."""

from __future__ import annotations

import errno
import json
import math
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from fedsim.runs import Run

WRONG_PATH = {
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT,
    errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip
"""Errors of a path that is a bad choice, not of a disk that fails."""

PIPE_WIDTH = 160
"""Columns of a table that is not printed to a terminal, unless $COLUMNS says otherwise."""


def console() -> Console:
    """Returns the console for results."""
    wide = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else PIPE_WIDTH
    return Console(width=wide, highlight=False, soft_wrap=False)


def progress_console(quiet: bool) -> Console:
    """Returns the console for progress."""
    return Console(stderr=True, quiet=quiet)


@contextmanager
def results_alone() -> Iterator[None]:
    """Sends what is printed meanwhile to standard error: standard output is for results.

    What a scenario's or an app's own code prints, that is, and the programs that it starts.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        for stream in (sys.__stdout__, sys.stdout):  # what somebody has printed past us
            if stream is not None:
                stream.flush()
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def written_to(option: str, path: Path, *, folder: bool = True) -> Iterator[None]:
    """Takes an option's path: where nothing can be written there, the input is wrong (UserError).

    A full or failing disk stays what it is. folder: whether the path may be a folder.
    """
    from fedsim.errors import RunFailed, UserError

    if not folder and path.is_dir():
        raise UserError(f"{option} {path}: is a folder; name a file")
    try:
        yield
    except (RunFailed, OSError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in WRONG_PATH:
            raise
        in_the_way = cause.errno in (errno.EEXIST, errno.ENOTDIR)
        reason = "a file is in the way" if in_the_way else cause.strerror
        raise UserError(f"{option} {path}: cannot be written: {reason}") from error


def print_json(document: object) -> None:
    """Prints one strict JSON document: NaN and infinities become null."""
    sys.stdout.write(json.dumps(plain(document), indent=2, allow_nan=False) + "\n")


def plain(value: object) -> object:
    """Returns a value as strict JSON can hold it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | int):
        return value
    return str(value)


def run_document(run: Run) -> dict[str, Any]:
    """Returns what `--json` tells of a run."""
    record, summary = run.record, run.summary
    return {
        "id": run.id,
        "path": str(run.path),
        "scenario": record.name,
        "label": record.label,
        "group": record.group,
        "seed": record.seed,
        "settings": record.settings,
        "status": run.status,
        "started": record.created,
        "rounds": record.rounds,
        "round": summary.get("round"),
        "seconds": summary.get("seconds", record.seconds),
        "metrics": summary.get("metrics", {}),
        "totals": summary.get("totals", {}),
        "posterior": summary.get("posterior"),
        "early_stop": summary.get("early_stop"),
        "notes": summary.get("notes", []),
        "error": summary.get("error"),
    }


def print_tables(runs: Sequence[Run], to: Console) -> None:
    """Prints final metrics and costs of the runs, side by side."""
    from fedsim.report.tables import comparison_table, cost_table
    from fedsim.report.views import views

    seen = views(runs)
    to.print(comparison_table(seen))
    to.print(cost_table(seen))
    for line in (*_convergence(runs), *_notes(runs)):
        to.print(line, markup=False)


def print_places(runs: Sequence[Run], report: Path | None, out: Path | None, to: Console) -> None:
    """Prints where the results are and what can be done with them."""
    from fedsim.runs.record import APP_LOG

    to.print("Results", style="bold")
    for run in runs:
        note = "" if run.status == "finished" else f"  ({run.status})"
        to.print(f"  {run.path}{note}", markup=False, soft_wrap=True)
    logs = [log for run in runs if (log := run.path / APP_LOG).exists()]
    if logs:
        to.print("What the app logged", style="bold")
    for log in logs:
        to.print(f"  {log}", markup=False, soft_wrap=True)
    if report is not None:
        to.print("Report", style="bold")
        to.print(f"  {report}", markup=False, soft_wrap=True)
    to.print("Next", style="bold")
    for words, command in _next(runs, out):
        to.print(f"  {words:22}{command}", markup=False, soft_wrap=True)


def command(*words: str, out: Path | None = None) -> str:
    """Returns a command line that can be pasted into a shell."""
    where = [] if out is None else ["--out", str(out)]
    return shlex.join(["fedsim", *words, *where])


def _next(runs: Sequence[Run], out: Path | None) -> list[tuple[str, str]]:
    ids = [run.id for run in runs]
    lines = [("list all runs", command("runs", out=out))]
    # A Flower app cannot be resumed.
    unfinished = [run for run in runs if run.status != "finished" and "app" not in run.scenario]
    lines += [
        ("continue a failed run", command("resume", run.id, out=out)) for run in unfinished[:1]
    ]
    if len(ids) > 1:
        lines.append(("compare some of them", command("compare", *ids[:2], out=out)))
    lines.append(("look at one", command("show", ids[0], out=out)))
    lines.append(("take the numbers", command("export", ids[0], out=out)))
    return lines


def _notes(runs: Sequence[Run]) -> list[str]:
    """Returns what the runs' strategies have to say of what they found."""
    return [f"{run.record.label}: {note}" for run in runs for note in run.summary.get("notes", ())]


def _convergence(runs: Sequence[Run]) -> list[str]:
    """Returns a line for each sampling run: its R-hat, ESS and distance to a reference."""
    lines = []
    for run in runs:
        posterior = run.summary.get("posterior") or {}
        words = []
        for kind in ("predictive logits", "parameters"):
            found = posterior.get(kind)
            if found:
                note = " (not converged)" if found["flags"] else ""
                words.append(
                    f"{kind}: R-hat ≤ {found['rhat_max']:.3f},"
                    f" bulk ESS ≥ {found['ess_bulk_min']:.0f}{note}"
                )
        reference = posterior.get("reference") or {}
        if "w2_over_sd" in reference:
            words.append(
                f"W2/sd to the {reference['kind']} reference: {reference['w2_over_sd']:.3f}"
            )
        if posterior.get("note"):
            words.append(str(posterior["note"]))
        if words:
            lines.append(f"{run.record.label}: {'; '.join(words)}")
    return lines
