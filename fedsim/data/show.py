"""Who holds what, to look at: a table for the terminal and a picture for the disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.data.describe import (
    class_counts,
    class_names,
    describe,
    listed,
    spaced,
    summary,
    targets_of,
)
from fedsim.data.examples import FederatedData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

MAX_BARS = 60
MAX_COLUMNS = 2000
MAX_CLASSES_SHOWN = 12
INK, MUTED, GRID, BLUE = "#222222", "#666666", "#dddddd", "#3b6ea8"
STYLE: Any = {
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "fedsim",
}


def show_table(data: FederatedData, max_clients: int = 50) -> Table:
    """Returns a Rich table with one line per client, the first `max_clients` of them."""
    from rich.table import Table

    clients = np.arange(min(data.clients, max_clients))
    frame = describe(data, clients)
    if len(frame.columns) > 4 + MAX_CLASSES_SHOWN:
        counts = class_counts(data, clients)
        frame = frame.iloc[:, :4].assign(classes=(counts > 0).sum(axis=1))
    if data.holdouts is None:
        frame = frame.drop(columns="holdout")
    if data.train.weight is None:
        frame = frame.drop(columns="weight")
    table = Table(title=summary(data), title_justify="left")
    for name in frame.columns:
        table.add_column(str(name), justify="right")
    for row in frame.itertuples(index=False):
        table.add_row(
            *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row)
        )
    if data.clients > max_clients:
        table.caption = f"… and {data.clients - max_clients:,} more clients"
    return table


def plot_partition(data: FederatedData, path: Path | str) -> list[Path]:
    """Draws who holds what; returns the paths of the PNG and the SVG that it wrote.

    path: where to, with or without a suffix; both files are written next to each other, whole or
    not at all. Classes: stacked bars of class counts, or for many clients one column of shades
    per client. Real targets: a box per client. No target: bars of row counts.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        if data.info.target == "class" and data.clients <= MAX_BARS:
            _stacked_bars(axes, data)
        elif data.info.target == "class":
            _shades(figure, axes, data)
        elif data.info.target == "real" and data.clients <= MAX_BARS:
            _boxes(axes, data)
        else:
            _sizes(axes, data)
        _title(axes, data)
        base = Path(path)
        if base.suffix in (".png", ".svg"):
            base = base.with_suffix("")
        files = [base.with_name(base.name + suffix) for suffix in (".png", ".svg")]
        for file in files:
            _save(figure, file)
    return files


def class_colours(count: int) -> list[Any]:
    """Returns a colour per class: ten distinguishable ones, more along a colour map."""
    import matplotlib as mpl

    if count <= 10:
        return [mpl.colormaps["tab10"](i) for i in range(count)]
    return list(mpl.colormaps["turbo"](np.linspace(0.03, 0.97, count)))


def _stacked_bars(axes: Axes, data: FederatedData) -> None:
    counts, names = class_counts(data), class_names(data)
    base = np.zeros(len(counts))
    for label, colour in enumerate(class_colours(len(names))):
        axes.bar(
            np.arange(len(counts)),
            counts[:, label],
            bottom=base,
            width=0.85,
            color=colour,
            edgecolor="white",
            linewidth=0.4,
            label=names[label],
        )
        base = base + counts[:, label]
    axes.set_ylabel("training rows")
    _whole_numbers(axes)
    _client_axis(axes, len(counts))
    axes.margins(x=0.01)
    if len(names) <= 20:
        # Reversed, so that the legend reads in the order in which the bars are stacked.
        axes.legend(
            title="class",
            frameon=False,
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            reverse=True,
            ncols=1 if len(names) <= 12 else 2,
        )


def _shades(figure: Figure, axes: Axes, data: FederatedData) -> None:
    from matplotlib.colors import LogNorm

    largest_first = np.argsort(-data.shards.sizes, kind="stable")
    shown = largest_first[spaced(data.clients, len(listed(data, MAX_COLUMNS)))]
    counts, names = class_counts(data, shown), class_names(data)
    image = axes.imshow(
        np.ma.masked_equal(counts.T, 0),
        aspect="auto",
        cmap="YlGnBu",
        norm=LogNorm(vmin=0.8, vmax=max(float(counts.max()), 2.0)),
        interpolation="nearest",
        origin="lower",
    )
    axes.set_xlabel(f"client, the largest first{_of(len(shown), data.clients)}")
    axes.set_ylabel("class")
    if len(names) <= 20:
        axes.set_yticks(np.arange(len(names)), names)
    bar = figure.colorbar(image, ax=axes, label="training rows (white: none)", pad=0.01)
    bar.ax.yaxis.set_major_formatter("{x:g}")


def _boxes(axes: Axes, data: FederatedData) -> None:
    y, _, owner = targets_of(data, np.arange(data.clients))
    targets = [y[owner == client].reshape(-1) for client in range(data.clients)]
    axes.boxplot(
        targets,
        positions=np.arange(len(targets)),
        widths=0.6,
        patch_artist=True,
        flierprops={"marker": ".", "markersize": 3, "markeredgecolor": MUTED},
        medianprops={"color": INK},
        boxprops={"facecolor": "#c9d9ec", "edgecolor": BLUE},
        whiskerprops={"color": BLUE},
        capprops={"color": BLUE},
    )
    for client, size in enumerate(data.shards.sizes):
        axes.annotate(
            str(size),
            (client, 1.0),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="top",
            color=MUTED,
            fontsize=7,
        )
    axes.margins(y=0.12)
    axes.set_ylabel("target (number of rows on top)")
    _client_axis(axes, len(targets))


def _sizes(axes: Axes, data: FederatedData) -> None:
    sizes = data.shards.sizes
    many = len(sizes) > MAX_BARS
    if many:
        sizes = np.sort(sizes)[::-1][spaced(len(sizes), MAX_COLUMNS)]
    axes.bar(np.arange(len(sizes)), sizes, width=1.0 if many else 0.85, color=BLUE)
    axes.set_ylabel("training rows")
    _whole_numbers(axes)
    axes.margins(x=0.01)
    if many:
        axes.set_xlabel(f"client, the largest first{_of(len(sizes), data.clients)}")
    else:
        _client_axis(axes, len(sizes))


def _of(shown: int, clients: int) -> str:
    return f" ({shown:,} of {clients:,}, evenly spaced)" if shown < clients else ""


def _client_axis(axes: Axes, clients: int) -> None:
    step = 1 if clients <= 30 else 5
    axes.set_xticks(np.arange(0, clients, step))
    axes.set_xlabel("client")
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _title(axes: Axes, data: FederatedData) -> None:
    axes.set_title(
        f"{data.info.name}: {data.shards.total:,} training rows on {data.clients:,} clients",
        loc="left",
        fontweight="bold",
    )


def _save(figure: Figure, path: Path) -> None:
    """Writes the figure to a temporary file beside `path` and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    try:
        figure.savefig(temporary, dpi=160, metadata=metadata)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
