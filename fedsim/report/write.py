"""Writes a report of runs: report.html, and every figure as PNG and SVG."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fedsim.runs.files import disk_errors

if TYPE_CHECKING:
    from fedsim.runs import Run

REPORTS = "reports"
PAGE = "report.html"
PLOTS = "plots"


def report_folder(runs: Sequence[Run]) -> Path:
    """Returns where the report goes: one run's own folder, else a new one in `reports`."""
    if len(runs) == 1:
        return runs[0].path
    names = "-".join(dict.fromkeys(run.record.name for run in runs))
    name = re.sub(r"[^a-z0-9]+", "-", names.lower()).strip("-")[:40]
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    root = runs[0].path.parent / REPORTS
    number, folder = 1, root / stem
    while folder.exists():
        number += 1
        folder = root / f"{stem}-{number}"
    return folder


def write(runs: Sequence[Run], folder: Path, *, command: str, scenario_yaml: str = "") -> Path:
    """Writes `folder`/report.html and `folder`/plots and returns the page's path.

    command: what reproduces the runs. scenario_yaml: the scenario as written; by default the runs'
    resolved ones. Raises RunFailed if the disk is full.
    """
    from fedsim.report.figures import figures, save_figures
    from fedsim.report.gather import gather
    from fedsim.report.html import write_report

    content = gather(runs, command=command, scenario_yaml=scenario_yaml)
    shown = figures(content)
    with disk_errors(folder):
        (folder / PLOTS).mkdir(parents=True, exist_ok=True)
    save_figures(shown, folder / PLOTS)
    return write_report(content, folder / PAGE, shown)
