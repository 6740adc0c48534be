"""Mixed precision within a search: which layers stay float, and when it is tried at all."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest

from onnx_lathe.benchmarks.report.sensitivity import LayerCost
from onnx_lathe.benchmarks.result import Certificate, Interval
from onnx_lathe.converter.compile import mixed
from onnx_lathe.converter.compile.certify import Judge
from onnx_lathe.converter.compile.forms import Candidate
from onnx_lathe.converter.compile.task import Parts, Task, Tried
from onnx_lathe.converter.progress import silent
from onnx_lathe.converter.sensitivity import Sensitivity
from onnx_lathe.passes.registry import parse
from onnx_lathe.passes.run import apply
from onnx_lathe.runtime.samples import Samples
from tests import graphs

CHAIN = """
chain (float[N, 16] x) => (float[N, 3] y)
<float[16, 64] a, float[64, 64] b, float[64, 3] c>
{
  [first] h = MatMul (x, a)
  [second] g = MatMul (h, b)
  [third] y = MatMul (g, c)
}
"""
BUDGET = 0.01
POINT = Interval(0.9, 0.9, 0.9)
CERTIFICATE = Certificate("accuracy", POINT, POINT, 0.2, 0.3, BUDGET, 100, None, 20, 0, "as the test says")


def float_layers(path: Path) -> set[str]:
    """The names of the products whose weight is stored in float."""
    graph = onnx.load(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    return {node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights}


class Strict:
    """A judge to whom a model is good enough when the layers that it wants float are."""

    def __init__(self, samples: Samples, wanted: set[str]) -> None:
        self.samples, self.metric, self.wanted = samples, "accuracy", wanted
        self.judged: list[set[str]] = []

    def outputs(self, model: Path) -> Mapping[str, Any]:
        self.judged.append(float_layers(model))
        return {}

    def certificate(self, outputs: Mapping[str, Any]) -> Certificate:
        del outputs
        return replace(CERTIFICATE, drop=0.0 if self.wanted <= self.judged[-1] else 0.2)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    x = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32)
    samples = Samples(({"x": x},), np.zeros(40, np.int64))
    return Task(
        original=graphs.save(graphs.build(CHAIN), tmp_path / "chain.onnx"),
        candidates=(),
        parts=Parts(samples, samples, samples),
        metric=None,
        max_drop=BUDGET,
        dims=({},),
        provider="cpu",
        threads=1,
        time_budget=1.0,
        folder=tmp_path / "work",
    )


def mixtures(task: Task, judge: Strict, passes: str = "quantize-dynamic", drop: float = 0.2) -> list[Candidate]:
    """The mixed forms of one form that lost ``drop``."""
    lossy = Tried(Candidate(passes, task.original, passes), certificate=replace(CERTIFICATE, drop=drop))
    return mixed.mixed_candidates(task, [lossy], cast(Judge, judge), silent)


def samples_of(task: Task) -> Samples:
    assert task.parts is not None
    return task.parts.select


@pytest.mark.parametrize("passes", ["quantize-dynamic", "cleanup,quantize-static{ranges=mse}"])
@pytest.mark.parametrize(("needed", "kept"), [("second", {"second"}), ("third", {"second", "third"})])
def test_the_first_layers_stay_float_up_to_the_one_that_must(
    passes: str, needed: str, kept: set[str], task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = [LayerCost(name, "MatMul", 20.0) for name in ("second", "third", "first")]

    def sensitivity(*given: object, **more: object) -> Sensitivity:
        del given, more
        return Sensitivity("m", "p", 40, tuple(order))

    monkeypatch.setattr(mixed, "sensitivity", sensitivity)
    judge = Strict(samples_of(task), {needed})
    (found,) = mixtures(task, judge, passes)
    apply(task.original, parse(found.passes), tmp_path / "mixed.onnx", samples=judge.samples)
    assert float_layers(tmp_path / "mixed.onnx") == kept
    assert found.passes.startswith(passes.rstrip("}"))


def test_what_no_mixture_mends_gives_no_candidate(task: Task) -> None:
    judge = Strict(samples_of(task), {"first", "second", "third"})
    assert mixtures(task, judge) == []
    # None float, then by halves; all three float is the float model.
    assert len(judge.judged) == 3


def test_a_kind_with_a_form_that_keeps_its_accuracy_is_not_mixed(task: Task) -> None:
    judge = Strict(samples_of(task), set())
    assert mixtures(task, judge, drop=0.005) == []
    assert mixtures(task, judge, passes="cleanup") == []
    assert mixtures(replace(task, parts=None), judge) == []
    assert judge.judged == []


def test_a_mixture_is_searched_once(task: Task) -> None:
    judge = Strict(samples_of(task), {"second"})
    first = mixtures(task, judge)
    seen = len(judge.judged)
    assert mixtures(task, judge) == first
    assert len(judge.judged) == seen
