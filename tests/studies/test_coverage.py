"""A small coverage study of fixed seeds: the intervals keep their claims, and a claim that is false is caught."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from onnx_lathe.benchmarks import canary
from onnx_lathe.benchmarks.stats import hodges_lehmann, shift
from onnx_lathe.benchmarks.verdict import compare
from tests.studies import coverage
from tests.studies.__main__ import app
from tests.studies.coverage import QUICK, Effort, Row, row, table
from tests.studies.macro_f1 import CASES, f1_of_cells
from tests.studies.simulated import MACHINES, QUIET, Machine, simulate

Study = Callable[[Effort, np.random.Generator], Iterator[Row]]

SMALL = replace(QUICK, proportions=2_000, intervals=250)


@pytest.mark.parametrize(
    ("study", "rule"),
    [
        (coverage.percentiles, "percentile p99"),
        (coverage.centres, "hodges_lehmann"),
        (coverage.shifts, "shift"),
        (coverage.paired, "certificate, right or wrong"),
    ],
)
def test_every_claim_is_kept(study: Study, rule: str, monkeypatch: pytest.MonkeyPatch):
    # Some of the cases: the whole study has them all.
    monkeypatch.setattr(coverage, "DISCORDANT", coverage.DISCORDANT[2:5])
    monkeypatch.setattr(coverage, "LATENCIES", {name: coverage.LATENCIES[name] for name in ("lognormal", "Pareto 1.5")})
    rows = [each for each in study(SMALL, np.random.default_rng(4)) if each.what == rule]
    claims = [each for each in rows if each.claimed is not None]
    assert claims
    assert [each for each in claims if not each.kept] == []
    # 250 simulations of a claim of 95 % that is kept find less than 88 % once in 100,000.
    assert min(each.found for each in claims) > 0.88


def test_a_claim_that_is_false_is_caught():
    rng = np.random.default_rng(5)

    def covers(narrowed: float, values: np.ndarray) -> bool:
        found = hodges_lehmann(values)
        return abs(found.value) <= narrowed * (found.high - found.low) / 2

    outcomes = [covers(0.7, rng.normal(0.0, 1.0, 12)) for _ in range(400)]
    assert not row("too narrow by a third", "normal", 0.95, outcomes).kept
    assert row("too narrow by a third", "normal", 0.6, outcomes).kept
    assert row("promises nothing", "normal", None, outcomes).kept


@pytest.mark.parametrize(
    ("claimed", "most", "hits", "kept"),
    [
        (0.95, False, 950, True),
        (0.95, False, 930, True),  # P(Binomial(1000, 0.95) <= 930) = 0.4 %
        (0.95, False, 920, False),
        (0.95, False, 1000, True),
        (0.01, True, 0, True),
        (0.01, True, 19, True),
        (0.01, True, 25, False),
    ],
)
def test_a_claim_is_broken_only_where_luck_does_not_explain_it(claimed: float, most: bool, hits: int, kept: bool):
    found = row("rule", "data", claimed, [index < hits for index in range(1000)], most)
    assert found.found == hits / 1000
    assert found.low <= found.found <= found.high
    assert found.kept == kept


def test_the_table_says_what_was_claimed_and_whether_it_was_kept():
    rows = [
        Row("interval", "normal", 0.95, False, 0.5, 0.4, 0.6, 100),
        Row("verdict", "quiet", 0.01, True, 0.0, 0.0, 0.04, 100),
        Row("bootstrap", "skewed", None, False, 0.9, 0.8, 0.95, 100),
    ]
    assert table(rows).splitlines()[2:] == [
        "| interval | normal | at least 95.0% | 50.0% | 40.0% to 60.0% | 100 | **no** |",
        "| verdict | quiet | at most 1.0% | 0.0% | 0.0% to 4.0% | 100 | yes |",
        "| bootstrap | skewed | none | 90.0% | 80.0% to 95.0% | 100 |  |",
    ]


@pytest.mark.parametrize(("arguments", "status"), [([], 1), (["--quick"], 0)])
def test_a_broken_claim_fails_the_study_but_never_a_quick_one(
    arguments: list[str], status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    broken = row("interval", "normal", 0.95, [False] * 100)

    def study(effort: Effort, rng: np.random.Generator) -> Iterator[Row]:
        del effort, rng
        yield broken

    monkeypatch.setattr(coverage, "STUDIES", (study,))
    result = CliRunner().invoke(app, ["coverage", *arguments, "--output", str(tmp_path / "new")])
    assert result.exit_code == status
    assert "**no**" in result.output
    assert json.loads((tmp_path / "new" / "coverage.jsonl").read_text())["kept"] is False
    assert (tmp_path / "new" / "coverage.md").read_text() == table([broken]) + "\n"


def test_simulated_runs_are_what_they_are_said_to_be():
    (a, b), songs = simulate(replace(QUIET, call=0.001, block=0.001, process=0.001), 1.05, np.random.default_rng(6))
    assert np.shape(a.blocks) == np.shape(b.blocks) == (10, 8, 10)
    assert len(songs) == 160
    assert np.median(a.blocks) / np.median(b.blocks) == pytest.approx(1.05, abs=0.005)
    assert canary.drift(songs) < 0.01


def test_the_canary_hears_what_a_machine_does_to_the_blocks():
    drifts = {
        each.name: canary.drift(simulate(each, 1.0, np.random.default_rng(7))[1])
        for each in MACHINES
        if each.slope or each.step
    }
    beyond = {name for name, drift in drifts.items() if drift > canary.MAX_DRIFT}
    assert beyond == {"drifts by 10 %", "10 % slower from the middle on"}
    assert min(drifts.values()) > 0.02


def test_verdicts_on_simulated_machines():
    def judge(machine: Machine, speed: float) -> list[str]:
        return [compare(*simulate(machine, speed, np.random.default_rng(seed)))[0].verdict for seed in range(8)]

    assert judge(QUIET, 1.0) == ["no difference"] * 8
    assert judge(QUIET, 1.05) == ["faster"] * 8
    assert judge(Machine("drifting", slope=0.1), 1.0) == ["inconclusive"] * 8


def test_macro_f1_of_cells_is_that_of_the_samples():
    labels, original, candidate = CASES[1].draw(np.random.default_rng(8), 500)
    cells = np.zeros((5, 5, 5))
    np.add.at(cells, (labels, original, candidate), 1.0)
    metrics = pytest.importorskip("sklearn.metrics")
    wanted = [metrics.f1_score(labels, found, average="macro") for found in (original, candidate)]
    assert f1_of_cells(cells) == pytest.approx(wanted)


def test_three_values_a_side_have_welchs_interval():
    found = shift([1.0, 2.0, 3.0], [0.0, 0.1, 0.2])
    assert found.value == pytest.approx(1.9)
    # Welch's for the means: 1.9, a standard error of 0.58 and 2.04 degrees of freedom.
    assert (found.low, found.high) == pytest.approx((-0.55, 4.35), abs=0.005)
