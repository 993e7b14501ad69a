import subprocess
import sys

import numpy as np
from rich.console import Console
from rich.table import Table

from fedsim.metrics.posterior import diagnostics
from fedsim.report.tables import comparison_table, cost_table, posterior_table
from tests.unit.report.fakes import FakeRecord, FakeRun, chains, fake_runs, frame


def text(table: Table, width: int = 140) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_comparison_shows_means_arrows_and_marks() -> None:
    shown = text(comparison_table(fake_runs()))
    for part in ("FA-HMC-CV", "FedAvg to", "Accuracy ↑", "NLL (nats) ↓", "OOD AUROC ↑"):
        assert part in shown
    assert "0.0166 ±\u00a00.0008*" in shown
    narrow = text(comparison_table(fake_runs()), 80)
    assert all(len(line) <= 80 for line in narrow.splitlines())


def test_failed_runs_are_named_and_markup_in_a_label_is_text() -> None:
    run = FakeRun(
        "x", FakeRecord("[red]A[/red] [link=x]", 0), frame([(1, "test", "[b]nll", 1.0)]), "failed"
    )
    shown = text(comparison_table([run], ["test/[b]nll"]))
    assert "[red]A[/red] [link=x] (failed)" in shown
    assert "[b]nll" in shown


def test_costs_leave_out_what_was_not_logged() -> None:
    shown = text(cost_table(fake_runs((0,))))
    assert "3.84 M" in shown
    assert "188 MB" in shown
    bare = text(cost_table([FakeRun("x", FakeRecord("A", 0), frame([(1, "test", "nll", 1.0)]))]))
    assert "bytes" not in bare


def test_posterior_table() -> None:
    x = chains(3)
    x[..., 0] = 1.0
    shown = text(
        posterior_table({"FA-HMC": diagnostics({"w": x}), "one": diagnostics({"w": x[:1]})})
    )
    assert "4 × 400" in shown
    assert "2 of 3" in shown
    assert "NaN" in shown  # one chain has no R-hat
    assert np.isfinite(diagnostics({"w": x}).rhat).all()


def test_importing_the_tables_imports_no_plotting() -> None:
    code = "import sys, fedsim.report.tables as t; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
