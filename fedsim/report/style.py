"""How every figure looks, and how it is saved: the same data give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from fedsim.runs.files import write_bytes

# Okabe and Ito's colours, which people with any colour vision can tell apart; yellow is left out,
# since it cannot be read on white. The dash patterns tell lines apart in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
INK, MUTED, GRID, REFERENCE = "#1F2328", "#6E7781", "#E4E7EB", "#C9CFD6"

DPI = 160
STYLE: Any = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same glyphs on every machine
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "fedsim",
    "path.simplify": True,
}

# Decorates a function that draws: the settings hold inside it and are restored after it.
styled = matplotlib.rc_context(STYLE)


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of that size in inches, without touching pyplot's global state."""
    return Figure(figsize=(width, height), layout="constrained")


def place(label: str, order: Sequence[str], otherwise: int) -> int:
    """Returns which colour a label has: its place in `order`, so that all figures agree."""
    return order.index(label) if label in order else otherwise


def colour(index: int) -> str:
    """Returns the colour of the index-th label."""
    return COLOURS[index % len(COLOURS)]


def dash(index: int) -> Any:
    """Returns the dash pattern of the index-th label."""
    return DASHES[index % len(DASHES)]


def plain(text: str, limit: int = 48) -> str:
    """Returns a user's text as matplotlib shows it literally: "$" starts no formula; cut."""
    short = text if len(text) <= limit else text[: limit - 1] + "…"
    return short.replace("$", r"\$")


def legend(ax: Axes, **options: Any) -> None:
    """Adds a legend if anything has a label."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**options)


@styled
def to_png(fig: Figure, dpi: int = DPI) -> bytes:
    """Returns the figure as PNG bytes, free of dates and versions.

    Fixes the layout that was found: solving it again takes as long as drawing. Not by `savefig`,
    which draws everything twice.
    """
    buffer = io.BytesIO()
    before, fig.dpi = fig.dpi, dpi
    canvas: Any = FigureCanvasAgg(fig)
    canvas.print_png(buffer, metadata={"Software": None})
    fig.dpi = before
    fig.set_layout_engine("none")
    return buffer.getvalue()


@styled
def to_svg(fig: Figure) -> bytes:
    """Returns the figure as SVG bytes, free of dates and random ids."""
    buffer = io.BytesIO()
    before = fig.dpi
    canvas: Any = FigureCanvasSVG(fig)
    canvas.print_svg(buffer, metadata={"Date": None, "Creator": "fedsim"})
    fig.dpi = before
    return buffer.getvalue()


def save(fig: Figure, path: Path, *, png: bytes | None = None) -> tuple[Path, Path]:
    """Writes `path`.png and `path`.svg atomically and returns both; makes the folder.

    path: without suffix. png: what `to_png` returned, if it was drawn already. Raises RunFailed
    if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = path.with_name(path.name + ".png"), path.with_name(path.name + ".svg")
    write_bytes(paths[0], to_png(fig) if png is None else png)
    write_bytes(paths[1], to_svg(fig))
    return paths
