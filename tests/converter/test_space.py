"""The composed space and its exploration, with latencies that the test sets by the operators in a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lathe.benchmarks.measure import Effort
from onnx_lathe.benchmarks.result import Interval, Measurement
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.converter.compile import build as build_module
from onnx_lathe.converter.compile import race as race_module
from onnx_lathe.converter.compile import search as search_module
from onnx_lathe.converter.compile import whole as whole_module
from onnx_lathe.converter.compile.build import build
from onnx_lathe.converter.compile.forms import Axis, Candidate, compose, variants
from onnx_lathe.converter.compile.front import front
from onnx_lathe.converter.compile.search import search
from onnx_lathe.converter.compile.space import AXES, VISITED, first_forms
from onnx_lathe.converter.compile.task import Found, Parts, Task, Tried
from onnx_lathe.converter.progress import silent
from onnx_lathe.passes import registry
from onnx_lathe.passes.request import Request
from onnx_lathe.passes.run import Applied
from onnx_lathe.runtime.errors import InputError, MeasurementError
from onnx_lathe.runtime.samples import Samples
from tests import graphs
from tests.benchmarks.test_limits import PEAKS
from tests.converter.test_search import measuring

SKIPPING = """
skipping (float[batch, tokens, 64] x) => (float[batch, tokens, 64] y)
<float[64, 64] a, float[64, 64] b, float[64] scale, float[64] shift>
{
  [first] f = MatMul (x, a)
  [add] s = Add (f, x)
  [norm] n = LayerNormalization (s, scale, shift)
  [second] y = MatMul (n, b)
}
"""
FEW = tuple(axis for axis in AXES if axis.name in ("widen", "cleanup", "repair", "slices", "skips", "precision"))
"""The axes of the tests: what else there is may gain by the same operators."""
SPEEDS = {"DynamicQuantizeLinear": 2.0, "QuantizeLinear": 1.5, "Reshape": 1.25}
"""How many times as fast an operator in the graph makes it, in the tests' world."""


def samples(count: int, seed: int) -> Samples:
    x = np.random.default_rng(seed).standard_normal((count, 8, 64)).astype(np.float32)
    return Samples(({"x": x},))


def by_operators(subjects: Sequence[Subject], effort: Effort, on_progress: object = None) -> Measurement:
    """Tell that each operator of `SPEEDS` that a model has makes it faster."""
    speeds: dict[str, float] = {}
    for subject in subjects:
        present = {node.op_type for node in onnx.load(subject.arguments["model"]).graph.node}
        speeds[subject.name] = math.prod(speed for operator, speed in SPEEDS.items() if operator in present)
    first = speeds[subjects[0].name]
    speeds = {name: speed / first for name, speed in speeds.items()}
    return measuring(speeds)(subjects, effort, on_progress)


def skipping_task(folder: Path) -> Task:
    """Return a search for `SKIPPING` over few axes, with data."""
    original = graphs.save(graphs.build(SKIPPING), folder / "skipping.onnx")
    return Task(
        original=original,
        candidates=first_forms(original, with_data=True),
        parts=Parts(samples(32, 1), samples(64, 2), samples(200, 3)),
        metric="mean_cosine",
        max_drop=0.05,
        dims=({"batch": 2, "tokens": 8},),
        provider="cpu",
        threads=1,
        time_budget=1000.0,
        folder=folder / "work",
        axes=FEW,
        visited=("skips", "slices"),
    )


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return skipping_task(tmp_path)


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed here."""
    monkeypatch.setattr(race_module, "measure", by_operators)
    monkeypatch.setattr(search_module, "measure_peaks", lambda threads: PEAKS)


def of(found: Found, name: str) -> Tried:
    return next(item for item in found.tried if item.candidate.name == name)


def test_every_pass_of_the_axes_is_there_and_each_is_visited_once() -> None:
    for axis in AXES:
        for passes in axis.choices(with_data=True):
            registry.parse(passes)
    assert len(set(VISITED)) == len(VISITED)
    assert set(VISITED) <= {axis.name for axis in AXES}


def test_variants_differ_along_one_axis_in_the_order_of_the_passes(tmp_path: Path) -> None:
    axes = (Axis("a", exact=("cleanup",)), Axis("b", lossy=("smooth",), after_integers=True), AXES[-1])
    plain = compose(tmp_path, axes, {"a": "cleanup"})
    assert list(variants(plain, axes, axes[1], with_data=True)) == []
    rounded = compose(tmp_path, axes, {"precision": "quantize-dynamic", "a": "cleanup"})
    assert rounded.passes == "cleanup,quantize-dynamic"
    (smooth,) = variants(rounded, axes, axes[1], with_data=True)
    assert smooth.passes == "cleanup,smooth,quantize-dynamic"
    assert list(variants(rounded, axes, axes[1], with_data=False)) == []
    (without,) = variants(smooth, axes, axes[1], with_data=False)
    assert without == rounded


def test_the_best_precision_comes_first_and_each_axis_is_tried_on_it(task: Task) -> None:
    found = search(task, silent)
    assert found.winner is not None
    passes = found.winner.candidate.passes
    assert "keep-skip-apart" in passes
    assert "quantize-dynamic" in passes
    assert "2.50x" in found.reason
    assert found.winner.against is not None
    assert "keep-skip-apart" not in found.winner.against
    assert found.winner.step is not None
    assert found.winner.step.value == pytest.approx(1.25)
    refused = [item for item in found.tried if "push-slices" in item.candidate.passes]
    assert refused
    assert all(item.refusal for item in refused)
    assert all(item.refusal for item in found.tried if item is not found.winner)


def test_what_forms_begin_with_is_made_once(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    apply = build_module.passes_run.apply

    def counting(source: Path, requests: Sequence[Request], output: Path, **more: Any) -> Sequence[Applied]:
        made.append(f"{source}: {requests}")
        return apply(source, requests, output, **more)

    monkeypatch.setattr(build_module.passes_run, "apply", counting)
    search(task, silent)
    assert len(made) == len(set(made))
    before = len(made)
    again = search(replace(task, folder=task.folder, original_name="original"), silent)
    assert len(made) == before
    assert again.winner is not None


def test_another_output_finds_what_one_made_in_the_same_cache(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = task.folder / "shared"
    first = search(replace(task, cache_folder=cache), silent)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("made anew")

    monkeypatch.setattr(build_module.passes_run, "apply", never)
    monkeypatch.setattr(race_module, "measure", never)
    assert search(replace(task, cache_folder=cache, folder=task.folder / "other"), silent) == first


def test_any_form_can_be_picked_from_the_finished_search(task: Task) -> None:
    found = search(task, silent)
    points = front(task, found.tried)
    assert found.winner in points
    assert found.winner is not None
    best = found.winner.candidate
    other = next(item for item in found.tried if item.speed and item.candidate != best)
    picked = search(replace(task, pick=other.candidate.name), silent)
    assert picked.winner is not None
    assert picked.winner.candidate == other.candidate
    assert picked.reason.endswith("; picked by hand.")
    with pytest.raises(InputError, match="--pick: got 'fastest', which was not tried, expected a form on the front"):
        search(replace(task, pick="fastest"), silent)


def test_a_front_holds_what_nothing_beats_in_both(task: Task) -> None:
    exact = replace(task, parts=None)
    tried = [
        Tried(Candidate(name, task.original, ""), speed=(Interval(speed, speed, speed),))
        for name, speed in (("slow", 0.9), ("fast", 2.0), ("faster", 3.0))
    ]
    assert [item.candidate.name for item in front(exact, tried)] == ["faster"]
    assert front(task, tried) == []


def test_without_data_only_what_computes_the_same_is_tried(task: Task) -> None:
    plain = replace(task, parts=None, metric=None, candidates=first_forms(task.original, with_data=False))
    found = search(plain, silent)
    assert found.winner is not None
    assert found.winner.candidate.passes.endswith("keep-skip-apart")
    assert not any("quantize" in item.candidate.passes for item in found.tried)


def test_a_gain_at_one_shape_that_another_pays_for_is_not_shipped(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def slower_alone(subjects: Sequence[Subject], effort: Effort, on_progress: object = None) -> Measurement:
        alone = next(iter(np.load(subjects[0].arguments["feeds"]).values())).shape[0] == 1
        speeds = {subject.name: 0.8 if alone else 2.0 for subject in subjects}
        return measuring(speeds)(subjects, effort, on_progress)

    monkeypatch.setattr(race_module, "measure", slower_alone)
    both = replace(task, dims=({"batch": 8}, {"batch": 1}), weights=(5.0, 1.0))
    assert search(both, silent).winner is None
    assert search(replace(both, dims=both.dims[:1], weights=()), silent).winner is not None


def test_shapes_count_by_their_weight(task: Task) -> None:
    fast, slow = Interval(4.0, 4.0, 4.0), Interval(1.0, 1.0, 1.0)
    assert task.mean_speed([fast, slow]).value == pytest.approx(2.0)
    assert replace(task, weights=(1.0, 3.0)).mean_speed([fast, slow]).value == pytest.approx(math.sqrt(2.0))


def test_a_form_that_dies_when_it_is_measured_is_refused(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(subjects: Sequence[Subject], effort: Effort, on_progress: object = None) -> Measurement:
        for subject in subjects:
            if subject.name.endswith("quantize-static"):
                raise MeasurementError(subject.name, got="a crash", expected="none", mend="Report it.")
        return by_operators(subjects, effort, on_progress)

    monkeypatch.setattr(race_module, "measure", dying)
    found = search(task, silent)
    assert found.winner is not None
    assert "got a crash" in str(of(found, "cleanup,quantize-static").refusal)


def test_an_interrupted_search_leaves_nothing_half_made_and_goes_on(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    apply = build_module.passes_run.apply

    def interrupted(source: Path, requests: Sequence[Request], output: Path, **more: Any) -> Sequence[Applied]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return apply(source, requests, output, **more)

    monkeypatch.setattr(build_module.passes_run, "apply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(task, silent)
    assert not list(task.cache.folder.glob(".part-*"))
    assert search(task, silent).winner is not None


def test_a_time_that_is_too_short_gives_the_original_or_what_was_found(task: Task) -> None:
    found = search(replace(task, time_budget=1e-3), silent)
    assert found.measurements
    assert any("time budget" in str(item.refusal) for item in found.tried)


def test_a_form_with_other_outputs_is_refused(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = build_module.passes_run.apply

    def fixing(source: Path, requests: Sequence[Request], output: Path, **more: Any) -> Sequence[Applied]:
        applied = apply(source, requests, output, **more)
        model = onnx.load(output)
        model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 2
        onnx.save(model, output)
        return applied

    monkeypatch.setattr(build_module.passes_run, "apply", fixing)
    built = build(task, Candidate("fixed", task.original, "keep-skip-apart"), silent)
    assert built.model is None
    assert built.refusal == (
        "Its output y is float32 [2, 'tokens', 64]; the original's is float32 ['batch', 'tokens', 64]."
    )


NOISY = """
noisy (float[batch, 4] x) => (float[batch, 4] y)
{
  [noise] r = RandomNormalLike (x)
  [sum] y = Add (x, r)
}
"""


def test_a_model_with_random_outputs_is_returned_as_it_is(task: Task, tmp_path: Path) -> None:
    noisy = graphs.save(graphs.build(NOISY), tmp_path / "noisy.onnx")
    found = search(replace(task, original=noisy, parts=None, dims=({},), candidates=first_forms(noisy, False)), silent)
    assert found.winner is None
    assert "The original's output y differs from run to run on the same input: nothing can be judged" in found.reason


def test_a_network_of_equal_blocks_is_compared_on_two_of_them(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = ", ".join(f"float[64, 64] w{number}" for number in range(8))
    body = "\n".join(
        f"  p{number} = MatMul (h{number}, w{number})\n  h{number + 1} = Tanh (p{number})" for number in range(8)
    )
    text = f"deep (float[batch, 64] h0) => (float[batch, 64] h8)\n<{weights}>\n{{\n{body}\n}}"
    deep = graphs.save(graphs.build(text), tmp_path / "deep.onnx")
    x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    data = Samples(({"h0": x},))
    seen: set[int] = set()

    def counting(subjects: Sequence[Subject], effort: Effort, on_progress: object = None) -> Measurement:
        seen.add(len(onnx.load(subjects[0].arguments["model"]).graph.node))
        return by_operators(subjects, effort, on_progress)

    monkeypatch.setattr(race_module, "measure", counting)
    monkeypatch.setattr(whole_module, "FINALISTS", 1)
    found = search(
        replace(task, original=deep, candidates=first_forms(deep, True), parts=Parts(data, data, data), dims=({},)),
        silent,
    )
    assert seen == {4, 16}
    assert found.winner is not None
    assert found.winner.model is not None
    assert sum(node.op_type == "Tanh" for node in onnx.load(found.winner.model).graph.node) == 8
    assert any("with 2 of the blocks that this one repeats, 25 % of its nodes" in note for note in found.notes)


def test_a_mixture_is_compared_on_the_whole_of_a_network_that_repeats(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = range(6)
    body = "".join(
        f"[m{n}] m{n} = MatMul (x{n}, w{n})\n r{n} = Tanh (m{n})\n x{n + 1} = Add (x{n}, r{n})\n" for n in numbers
    )
    text = f"""
    deep (float[batch, tokens, 64] x) => (float[batch, tokens, 64] y)
    <float[64] scale, float[64] shift, {", ".join(f"float[64, 64] w{n}" for n in numbers)}>
    {{
      x0 = Neg (x)
      {body}
      same = Identity (x6)
      s = Add (same, x0)
      y = LayerNormalization (s, scale, shift)
    }}
    """
    original = graphs.save(graphs.build(text), tmp_path / "deep.onnx")
    form = "cleanup,quantize-dynamic{exclude=m0}"
    asked: list[Path] = []

    def mixed(task: Task, *_: object) -> list[Candidate]:
        asked.append(task.original)
        return [Candidate("mixed", task.original, form)]

    monkeypatch.setattr(whole_module, "mixed_candidates", mixed)
    # So little that nothing that rounds may be lost: what the axes gave ships in float.
    deep = replace(task, original=original, candidates=first_forms(original, with_data=True, axes=FEW), max_drop=1e-12)
    found = search(deep, silent)
    assert asked == [original]
    lost = of(found, "mixed").refusal
    assert lost is not None
    assert lost.startswith("It loses")
    assert found.winner is not None
    assert found.winner.candidate.name == "cleanup,keep-skip-apart"
    assert found.winner.certificate is not None
