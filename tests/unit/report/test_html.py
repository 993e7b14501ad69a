import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fedsim.metrics import diagnostics, reliability
from fedsim.report.content import PosteriorResult, ReferenceResult, ReportInput
from fedsim.report.figures import figures, save_figures
from fedsim.report.html import render, write_report
from tests.unit.report.fakes import (
    FINAL,
    FakeRun,
    chains,
    fake_run,
    fake_runs,
    marginals,
    predictions,
)

pytestmark = pytest.mark.xdist_group("page")  # which one worker draws, once

HOSTILE = '<script>alert("1")</script> & "quotes" \'single\''
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that every element is closed in order, and keeps what is needed below."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def report() -> ReportInput:
    x = chains(12, draws=100)
    draws, reference = marginals(8, 300)
    return ReportInput(
        title="fahmc_noniid",
        runs=fake_runs(),
        command="fedsim run scenarios/fahmc_noniid.yaml --seeds 0,1,2",
        scenario_yaml="name: fahmc_noniid\nrounds: 150\n",
        description="20 clients on mnist5k",
        reliability={label: reliability(*predictions(1.2, 200)) for label in FINAL},
        ood={"FA-HMC": (np.linspace(0, 1, 40), np.linspace(0.5, 2, 40))},
        posteriors={
            "FA-HMC-CV": PosteriorResult(diagnostics({"w": x}, limit=6), {"w": x}, "weights")
        },
        reference=ReferenceResult(
            "NUTS on the pooled data", reference, draws, [f"β{i}" for i in range(8)]
        ),
        partition=np.random.default_rng(0).integers(0, 50, (20, 10)),
        notes=["Fashion-MNIST is absent: corrupted digits stand in for it."],
    )


@pytest.fixture(scope="module")
def page(report: ReportInput) -> Page:
    return Page(render(report))


def test_every_section_is_there_and_linked(page: Page) -> None:
    ids = [value for tag, name, value in page.attributes if (tag, name) == ("section", "id")]
    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert ids == ["results", "curves", "calibration", "posterior", "partition", "events", "setup",
                   "reproduce"]  # fmt: skip
    assert links == [f"#{name}" for name in ids]
    assert page.tags.count("h1") == 1


def test_it_needs_no_network_and_no_script(report: ReportInput, page: Page) -> None:
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    sources = [value for _, name, value in page.attributes if name in ("src", "href", "data")]
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in sources)
    text = render(report, [])
    assert not re.search(r"https?://|//[a-z]|url\(|@import", text)


def test_every_image_has_words_for_those_who_cannot_see_it(page: Page) -> None:
    words = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(words) == page.tags.count("img") == page.tags.count("figure") == 10
    assert all(len(value) > 20 for value in words)


def test_the_facts_are_told(page: Page) -> None:
    for part in (
        "12 runs: FA-HMC-CV, FA-HMC, FA-LD, FedAvg to convergence; seeds 0, 1, 2.",
        "Fashion-MNIST is absent",
        "0.0166 ± 0.0008",
        "fedsim run scenarios/fahmc_noniid.yaml --seeds 0,1,2",
        "name: fahmc_noniid rounds: 150",
        "torch 2.13.0",
        "4c993fb2d1",
        "path mapped, chunk 20",
        "reply_dropped",
        "partition: 4, reason: NaN in parameters",
        "R-hat and ESS cannot see the federation bias; reference: NUTS on the pooled data.",
        "What has not converged",
        "6 of 12 scalars were diagnosed",
        "ESS per 10⁶ gradients",
        "15 equal-width bins",
    ):
        assert part in page.text, part


def test_the_rates_divide_by_what_all_chains_had_spent(report: ReportInput, page: Page) -> None:
    """A run counts the gradients of one chain; its bytes are those of all."""
    found = report.posteriors["FA-HMC-CV"].diagnostics
    median = float(np.median(found.ess_bulk))
    gradients, size = 150 * 20 * 20 * 64 * found.chains, 150 * 2 * 20 * 31_400
    expected = f"{median / gradients * 1e6:.3g} {median / size * 1e6:.3g}"
    assert found.chains == 4
    assert expected in page.text


def test_without_a_reference_the_report_says_so(report: ReportInput) -> None:
    text = Page(render(dataclasses.replace(report, reference=None), [])).text
    assert "R-hat and ESS cannot see the federation bias; reference: none was run." in text


def test_text_from_a_scenario_is_escaped_everywhere(report: ReportInput) -> None:
    runs = []
    for seed in (0, 1):
        run = fake_run("FA-HMC", seed)
        run.record.label = run.id = HOSTILE
        run.engine = {"name": HOSTILE}
        run.environment = {"cpu": HOSTILE, "packages": {HOSTILE: HOSTILE}}
        run.events = fake_run("FedAvg to convergence", 0).events.assign(
            reason=HOSTILE, kind=HOSTILE
        )
        run.status = HOSTILE
        runs.append(run)
    x = {HOSTILE: chains(3, draws=50)}
    rng = np.random.default_rng(0)
    drawn = {HOSTILE: rng.random((50, 1))}
    reference = ReferenceResult(HOSTILE, rng.random((50, 1)), drawn, [HOSTILE])
    hostile = ReportInput(
        HOSTILE, runs, HOSTILE, HOSTILE, HOSTILE, ood_score=HOSTILE, reference=reference,
        posteriors={HOSTILE: PosteriorResult(diagnostics(x), x, HOSTILE)}, notes=[HOSTILE],
        reliability={HOSTILE: reliability(*predictions(1.0, 60))},
        ood={HOSTILE: (np.arange(3.0), np.arange(3.0))},
    )  # fmt: skip
    shown = figures(hostile)
    for each in shown:
        vars(each)["png"] = b""  # other tests draw
    page = Page(render(hostile, shown))
    assert "script" not in page.tags
    assert page.text.count('<script>alert("1")</script>') > 15
    known = "lang charset name content http-equiv id href class scope src alt"
    assert {name for _, name, _ in page.attributes} <= set(known.split())


def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    run = FakeRun(
        "r", fake_run("FA-HMC", 0).record, fake_run("FA-HMC", 0).metrics.iloc[:0], "failed"
    )
    bare = ReportInput("t", [run], "c", "y")
    page = Page(render(bare))
    assert "img" not in page.tags
    assert "posterior" not in [v for t, n, v in page.attributes if (t, n) == ("section", "id")]
    assert "Not every run finished: FA-HMC, seed 0: failed." in page.text
    assert "No events" in page.text
    assert Page(render(ReportInput("t", [], "c", "y")))


def test_one_seed_claims_no_best(report: ReportInput) -> None:
    one = render(ReportInput("t", fake_runs((0,)), "c", "y"), [])
    assert "<strong>" not in one
    assert "±" not in Page(one).text.replace("mean ± sample", "")


def test_the_same_input_gives_the_same_bytes_on_disk(tmp_path: Path) -> None:
    report = ReportInput("t", fake_runs((0, 1)), "c", "y", columns=["test/nll"])
    shown = figures(report)
    first = write_report(report, tmp_path / "a" / "report.html", shown)
    second = write_report(report, tmp_path / "b.html")
    assert first.read_bytes() == second.read_bytes()
    names = {path.name for path in save_figures(shown[:2], tmp_path / "figures")}
    assert names == {"comparison.png", "comparison.svg", "curves_rounds.png", "curves_rounds.svg"}
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["report.html"]
