"""A provider that refuses the original: its answers and times are then the CPU's, and forms run on the provider."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lathe.benchmarks.measure import Effort
from onnx_lathe.benchmarks.result import Measurement
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.converter.compile import certify, home
from onnx_lathe.converter.compile import compile as module
from onnx_lathe.converter.compile import race as race_module
from onnx_lathe.converter.compile import search as search_module
from onnx_lathe.converter.compile.compile import compile
from onnx_lathe.converter.compile.space import first_forms
from onnx_lathe.runtime.bundle import open_bundle
from onnx_lathe.runtime.errors import ProviderError
from onnx_lathe.runtime.samples import Samples
from onnx_lathe.runtime.session import Session
from tests import graphs
from tests.benchmarks.test_limits import PEAKS
from tests.converter.test_compile import Everything
from tests.converter.test_search import measuring

COPYING = """
copying (float[batch, 4] x) => (float[batch, 2] y) <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
  [product] h = MatMul (x, w)
  [copy] same = Identity (h)
  [relu] y = Relu (same)
}
"""
SAMPLES = Samples(({"x": np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)},))


class Picky(Session):
    """A session whose provider "other" takes every operator but one, and computes as the CPU does."""

    refused = "Identity"

    def __init__(self, model: str | Path, *, provider: str | None = None, threads: int | None = None, **_: Any) -> None:
        super().__init__(model, provider="cpu", threads=threads)
        lost = [node.name for node in onnx.load(self.path).graph.node if node.op_type == self.refused]
        if provider == "other" and lost:
            raise ProviderError(
                f"{self.path.name}: provider 'other'",
                got=f"{len(lost)} nodes that it did not take: {lost[0]} ({self.refused})",
                expected="every node on it",
                mend="Choose another.",
            )


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return graphs.write(tmp_path / "copying.onnx", COPYING)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """A world with the provider "other", in which forms are twice as fast; return where each subject was timed."""
    seen: list[dict[str, str]] = []
    doubled = measuring(Everything())

    def measure(subjects: Sequence[Subject], effort: Effort, on_progress: object = None) -> Measurement:
        seen.append({subject.name: subject.arguments["provider"] for subject in subjects})
        return doubled(subjects, effort, on_progress)

    monkeypatch.setattr(race_module, "measure", measure)
    monkeypatch.setattr(search_module, "measure_peaks", lambda threads: PEAKS)
    monkeypatch.setattr(module, "_providers", lambda asked: [asked] if isinstance(asked, str) else list(asked))
    monkeypatch.setattr(module, "first_forms", lambda *given: first_forms(*given)[:2])
    monkeypatch.setattr(module, "VISITED", ())
    monkeypatch.setattr(home.trial, "provider", lambda name: {"placement": {name: 2}, "correct": True})
    for each in (certify, home):
        monkeypatch.setattr(each, "Session", Picky)
    return seen


@pytest.mark.parametrize("data", [SAMPLES, None])
def test_a_form_runs_where_the_original_does_not(
    original: Path, tmp_path: Path, timed: list[dict[str, str]], data: Samples | None
) -> None:
    made = compile(original, tmp_path / "bundle", data=data, max_drop=0.5, provider="other", threads=1)
    assert made.found.winner is not None
    assert 'provider = "other"' in (tmp_path / "bundle" / "session.toml").read_text()
    assert all(where.pop("original") == "cpu" for where in timed)
    assert {provider for where in timed for provider in where.values()} == {"other"}
    told = (
        "Forms run on other; the original does not, and was judged and timed as plain onnxruntime runs it on the CPU. "
        "copying.onnx: provider 'other': got 1 nodes that it did not take: copy (Identity)"
    )
    assert told in (tmp_path / "bundle" / "report.md").read_text()


@pytest.mark.parametrize("data", [SAMPLES, None])
def test_the_original_that_ships_is_opened_where_it_runs(
    original: Path,
    tmp_path: Path,
    timed: list[dict[str, str]],
    data: Samples | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Picky, "refused", "Relu")
    made = compile(original, tmp_path / "bundle", data=data, provider="other", threads=1)
    assert made.report.status == "original kept"
    assert open_bundle(tmp_path / "bundle").provider == "cpu"
    assert made.found.tried
    assert all("1 nodes that it did not take: relu (Relu)" in str(item.refusal) for item in made.found.tried)
    assert [set(where) for where in timed] == [{"original"}]
    both = compile(original, tmp_path / "both", data=data, max_drop=0.5, provider=["other", "cpu"], threads=1)
    assert timed[-1] == {"what ships on other": "cpu", "what ships on cpu": "cpu"}
    assert both.found.winner is not None


def test_the_original_stays_where_it_runs(
    original: Path, tmp_path: Path, timed: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Picky, "refused", "Softmax")
    made = compile(original, tmp_path / "bundle", data=SAMPLES, max_drop=0.5, provider="other", threads=1)
    assert {where["original"] for where in timed} == {"other"}
    assert not made.found.notes


def test_a_provider_that_runs_nothing_is_an_error(
    original: Path, tmp_path: Path, timed: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise ProviderError(name, got="a model of two nodes", expected="none", mend="Leave it.")

    monkeypatch.setattr(home.trial, "provider", fail)
    with pytest.raises(ProviderError, match=r"copying.onnx: provider 'other': got 1 nodes .*: copy \(Identity\)"):
        compile(original, tmp_path / "bundle", provider="other", threads=1)
    assert not timed
