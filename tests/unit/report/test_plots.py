from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from fedsim.metrics import diagnostics, reliability
from fedsim.report import plots
from fedsim.report.compare import compare
from fedsim.report.series import Series, curves_of
from fedsim.report.style import COLOURS, to_png, to_svg
from tests.unit.report.fakes import FINAL, chains, fake_runs, marginals, predictions

NAMES = [f"β{i}" for i in range(8)]


def curves() -> Figure:
    return plots.metric_curves(
        {c: curves_of(fake_runs(), c, "bytes") for c in ("test/nll",)}, "bytes"
    )


def diagrams() -> Figure:
    return plots.reliability_diagram({k: reliability(*predictions(1.3, 200)) for k in FINAL})


def ood() -> Figure:
    rng = np.random.default_rng(0)
    return plots.ood_histogram({"A": (rng.random(50), 1 + rng.random(60))}, "entropy")


def traces() -> Figure:
    return plots.trace_plot({"w[0]": chains(1, draws=60)[..., 0]})


def spread() -> Figure:
    return plots.diagnostics_plot({"A": diagnostics({"w": chains(9, draws=60)})})


def small_multiples() -> Figure:
    draws, reference = marginals(8, 200)
    return plots.posterior_marginals(draws, reference, NAMES, title="Posterior")


def bars() -> Figure:
    return plots.comparison_bars(compare(fake_runs()))


def shards() -> Figure:
    return plots.partition_plot(
        np.random.default_rng(0).integers(0, 50, (300, 10)), list("abcdefghij")
    )


ALL = [curves, diagrams, ood, traces, spread, small_multiples, bars, shards]


@pytest.mark.parametrize("draw", ALL)
def test_the_same_data_give_the_same_bytes(draw: Callable[[], Figure]) -> None:
    first, second = draw(), draw()
    assert to_png(first) == to_png(second)
    svg = to_svg(first)
    assert svg == to_svg(second)
    assert b"<svg" in svg
    assert b"<dc:date>" not in svg


def test_no_global_state_is_touched() -> None:
    before = dict(matplotlib.rcParams)
    bars()
    assert dict(matplotlib.rcParams) == before


def texts(fig: Figure) -> list[str]:
    return [
        text
        for ax in fig.axes
        for text in [*(t.get_text() for t in ax.texts), ax.get_title(loc="left")]
    ]


def test_the_figures_say_what_they_show() -> None:
    assert any(text.startswith("AUROC 1.000") for text in texts(ood()))
    assert any(text.startswith("ECE ") for text in texts(diagrams()))
    assert "β7" in texts(small_multiples())
    assert "Accuracy ↑" in texts(bars())
    assert "Client, of 300 (evenly spaced ones shown)" in [ax.get_xlabel() for ax in shards().axes]


def test_the_ece_drawn_is_the_ece_computed() -> None:
    from fedsim.metrics import ece

    p, y = predictions(1.5)
    shown = texts(plots.reliability_diagram({"A": reliability(p, y, 10)}))
    assert f"ECE {ece(p, y, 10):.3f}\n10 bins" in shown


def test_the_band_is_the_mean_and_one_sample_sd() -> None:
    y = np.array([[1.0, 2.0], [3.0, 6.0]])
    fig = plots.metric_curves({"nll": [Series("A", np.array([1.0, 2.0]), y)]})
    ax = fig.axes[0]
    assert np.allclose(ax.lines[0].get_ydata(), [2.0, 4.0])
    band = ax.collections[0].get_paths()[0].vertices
    sd = np.std(y, axis=0, ddof=1)
    assert np.isclose(band[:, 1].max(), 4 + sd[1])
    assert np.isclose(band[:, 1].min(), 2 - sd[0])


def test_a_label_keeps_its_colour_in_every_figure() -> None:
    fig = plots.reliability_diagram({"B": reliability(*predictions(1.0, 300))}, order=["A", "B"])
    assert COLOURS[1] in [line.get_color() for line in fig.axes[0].lines]


def test_a_curve_that_becomes_nan_says_where() -> None:
    y = np.array([[1.0, 0.5, np.nan, np.nan]])
    fig = plots.metric_curves({"nll": [Series("A", np.arange(1.0, 5.0), y)]})
    assert any(text == "NaN" for text in texts(fig))
    to_png(fig)


def test_what_cannot_be_drawn_does_not_crash() -> None:
    one = np.array([[0.5]])
    constant = {"A": np.ones((50, 1)), "B": np.full((50, 1), np.nan)}
    nan = np.full((4, 3), np.nan)
    for fig in (
        plots.metric_curves({}),
        plots.metric_curves({"nll": [Series("A", np.array([1.0]), one)]}),
        plots.metric_curves({"nll": [Series("A", np.arange(3.0), nan[:1])]}),
        plots.posterior_marginals(
            {"A": constant["A"]}, np.random.default_rng(0).random((50, 1)), ["w"]
        ),
        plots.reliability_diagram({"A": reliability(np.full((3, 2), np.nan), np.zeros(3, int))}),
        plots.ood_histogram({"A": (np.zeros(3), np.zeros(3))}, "entropy"),
        plots.diagnostics_plot(
            {"A": diagnostics({"w": np.arange(4.0)[:, None, None] * np.ones((4, 9, 1))})}
        ),
        plots.partition_plot(np.zeros((1, 1), int)),
        plots.trace_plot({"w": np.ones((1, 1))}),
    ):
        assert to_png(fig).startswith(b"\x89PNG")


def test_hostile_labels_are_drawn_as_text() -> None:
    label = r"$\frac{1}{ \undefined $ <b>" * 3
    fig = plots.metric_curves({"nll": [Series(label, np.arange(3.0), np.ones((1, 3)))]})
    assert to_png(fig)
    assert b"<b>" not in to_svg(fig)


def test_save_writes_both_files_and_replaces_old_ones(tmp_path: Path) -> None:
    path = tmp_path / "new" / "acc.v1"
    for _ in range(2):
        png, svg = plots.save(bars(), path)
    assert (png.name, svg.name) == ("acc.v1.png", "acc.v1.svg")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in path.parent.iterdir()) == ["acc.v1.png", "acc.v1.svg"]


def test_worst_and_typical_names_the_worst_and_the_median() -> None:
    x = chains(5, draws=200)
    found = diagnostics({"w": x})
    picked = plots.worst_and_typical({"w": x}, found, worst=1)
    (worst, middle) = picked
    assert worst.startswith(f"{found.worst(1).index[0]} ")
    assert middle.endswith("the median")
    assert np.array_equal(picked[worst], x[..., 4])
    assert (
        plots.worst_and_typical({"w": np.ones((4, 9, 1))}, diagnostics({"w": np.ones((4, 9, 1))}))
        == {}
    )
