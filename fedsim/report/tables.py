"""Tables for the terminal, by rich. Light: imported by the commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedsim.report import sense
from fedsim.report.compare import Cell, compare
from fedsim.report.runlike import RunLike

if TYPE_CHECKING:
    from fedsim.metrics.posterior import Diagnostics


def comparison_table(runs: Sequence[RunLike], columns: Sequence[str] | None = None) -> Table:
    """Returns the final metrics of `runs`, a row per label, mean ± sd over its seeds.

    Best values are bold with a star, as far as the seeds can tell (`fedsim.report.compare.BEST`).
    A label whose runs did not all finish says so.
    """
    comparison = compare(runs, columns)
    table = _table("Final metrics, mean ± sd over seeds")
    table.add_column("seeds", justify="right")
    splits = {column.split("/", 1)[0] for column in comparison.columns} - {"ood"}
    for column in comparison.columns:
        heading = sense.heading(column, named=len(splits) > 1)
        table.add_column(escape(heading), justify="right")
    for row in comparison.rows:
        bad = sorted({status for status in row.statuses if status != "finished"})
        name = Text(row.label)
        if bad:
            name.append(f" ({', '.join(bad)})", style="bold red")
        cells = [_cell(row.cells[column]) for column in comparison.columns]
        table.add_row(name, str(len(row.seeds)), *cells)
    return table


def cost_table(runs: Sequence[RunLike]) -> Table:
    """Returns what one run of each label had cost, averaged over its seeds."""
    rows = compare(runs, ()).rows
    table = _table("Cost of one run, mean over seeds")
    axes = [axis for axis in _WRITE if any(axis in row.costs for row in rows)]
    for axis in axes:
        table.add_column(axis, justify="right")
    for row in rows:
        spent = [_WRITE[axis](row.costs[axis]) if axis in row.costs else "–" for axis in axes]
        table.add_row(Text(row.label), *spent)
    return table


def posterior_table(found: Mapping[str, Diagnostics]) -> Table:
    """Returns R-hat, ESS and MCSE of each label's posterior, and how much was diagnosed."""
    table = _table("Posterior diagnostics")
    for name in ("chains × draws", "largest R-hat ↓", "least bulk ESS ↑", "least tail ESS ↑",
                 "largest MCSE / sd ↓", "diagnosed", "constant", "NaN"):  # fmt: skip
        table.add_column(name, justify="right")
    for label, d in found.items():
        s = d.summary()
        table.add_row(
            Text(label),
            f"{d.chains} × {d.draws}",
            Text(sense.number(s["rhat_max"]), style="" if d.converged else "bold red"),
            sense.quantity(s["ess_bulk_min"]),
            sense.quantity(s["ess_tail_min"]),
            sense.number(s["mcse_mean_max_sd"]),
            f"{len(d.names)} of {d.total}",
            str(len(d.constant)),
            str(len(d.nonfinite)),
        )
    return table


def _table(title: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1)
    )
    table.add_column("", overflow="fold")
    return table


def _cell(cell: Cell) -> Text:
    return Text(f"{cell}*", style="bold") if cell.best else Text(str(cell))


def _rounds(value: float) -> str:
    return f"{value:.0f}"


def _bytes(value: float) -> str:
    return sense.quantity(value, "B")


_WRITE = {
    "rounds": _rounds,
    "gradients": sense.quantity,
    "bytes": _bytes,
    "seconds": sense.duration,
}
