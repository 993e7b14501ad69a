"""The figure of a partition: which client holds how many examples of which class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fedsim.data.describe import spaced
from fedsim.report.style import COLOURS, MUTED, new_figure, plain, styled

MAX_CLIENTS = 120  # more are drawn as evenly spaced ones


@styled
def partition_plot(
    counts: NDArray[np.integer], class_names: Sequence[str] | None = None, clients: int = 0
) -> Figure:
    """Draws the counts (c, classes) as shares of each client, over the clients' sizes.

    clients: how many there are, of whom c evenly spaced ones are counted; 0: c.
    """
    counted, classes = counts.shape
    clients = clients or counted
    rows = spaced(counted, MAX_CLIENTS)
    shown = counts[rows].astype(np.float64)
    size = shown.sum(1)
    share = np.divide(shown, size[:, None], out=np.zeros_like(shown), where=size[:, None] > 0)
    fig = new_figure(8.6, min(1.9 + 0.2 * classes, 6.0))
    top, below = fig.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [1, 2.4]})
    position = np.arange(len(rows))
    top.bar(position, size, 0.8, color=COLOURS[0], lw=0)
    top.set_ylabel("Examples", color=MUTED)
    top.grid(axis="x", visible=False)
    ramp = LinearSegmentedColormap.from_list("share", ["#F6F8FA", "#9CC9E3", COLOURS[0], "#08304F"])
    image = below.imshow(share.T, aspect="auto", cmap=ramp, vmin=0, vmax=1, interpolation="nearest")
    below.set_yticks(range(classes), _classes(classes, class_names))
    below.set_ylabel("Class", color=MUTED)
    few = " (evenly spaced ones shown)" if len(rows) < clients else ""
    below.set_xlabel(f"Client, of {clients:,}{few}", color=MUTED)
    numbers = spaced(clients, counted)[rows]
    ticks = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 20)).round().astype(int))
    below.set_xticks(ticks, [str(numbers[t]) for t in ticks])
    below.grid(visible=False)
    fig.colorbar(image, ax=below, label="Share of the client", pad=0.015)
    return fig


def _classes(classes: int, names: Sequence[str] | None) -> list[str]:
    return [plain(str(name), 14) for name in (names if names else range(classes))]
