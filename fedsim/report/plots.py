"""Every figure: functions from data to a matplotlib Figure, and `save` (PNG and SVG)."""

from fedsim.report.calibration import ood_histogram, reliability_diagram
from fedsim.report.chains import diagnostics_plot, trace_plot, worst_and_typical
from fedsim.report.curves import comparison_bars, metric_curves
from fedsim.report.marginals import posterior_marginals
from fedsim.report.partition import partition_plot
from fedsim.report.regret import cells_plot, regret_plot
from fedsim.report.style import save, to_png, to_svg

__all__ = [
    "cells_plot",
    "comparison_bars",
    "diagnostics_plot",
    "metric_curves",
    "ood_histogram",
    "partition_plot",
    "posterior_marginals",
    "regret_plot",
    "reliability_diagram",
    "save",
    "to_png",
    "to_svg",
    "trace_plot",
    "worst_and_typical",
]
