"""The loop between edits: what it writes, what it says, and that it writes nothing that is wrong."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pydantic.dataclasses import dataclass

from onnx_lathe.passes import files, registry
from onnx_lathe.passes.cleanup.cleanup import Cleanup
from onnx_lathe.passes.oracle import Tolerance
from onnx_lathe.passes.prune.request import Prune
from onnx_lathe.passes.quantize import numeric, streamed
from onnx_lathe.passes.quantize.dynamic import QuantizeDynamic
from onnx_lathe.passes.quantize.static import QuantizeStatic
from onnx_lathe.passes.request import Request, SelfPlanned
from onnx_lathe.passes.run import apply
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.errors import OracleError, OutputError, UnsupportedModelError
from onnx_lathe.runtime.samples import Array
from onnx_lathe.runtime.session import Session
from tests import graphs


@dataclass(frozen=True)
class Spoil(SelfPlanned):
    """A pass with a defect: it doubles a weight and calls that exact."""

    name: ClassVar[str] = "spoil"
    tolerance: ClassVar[Tolerance] = Tolerance("it claims to change nothing")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        value = model.graph.initializers["w5"]
        assert value.const_value is not None
        value.const_value = ir.tensor(2 * value.const_value.numpy(), name="w5")
        return ir.passes.PassResult(model, modified=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return graphs.save(graphs.build(graphs.RESIDUAL), tmp_path / "source.onnx")


def test_passes_run_in_order_and_say_what_they_did(source: Path, tmp_path: Path) -> None:
    started: list[str] = []
    output = tmp_path / "out" / "model.onnx"
    done = apply(source, [Cleanup(), Prune(), Cleanup()], output, on_start=started.append)
    assert started == ["cleanup", "prune", "cleanup"]
    assert [step.request for step in done] == started
    assert [step.changed for step in done] == [True, True, False]
    assert [len(step.checks) for step in done] == [1, 1, 0]
    assert all(check.passed for step in done for check in step.checks)
    assert [group["kept"] for group in done[1].plan["groups"]] == [48]
    assert "stem" in [refusal.node for refusal in done[1].refused]
    weights = {tensor.name: list(tensor.dims) for tensor in onnx.load(output).graph.initializer}
    assert weights["w3"] == [48, 32, 3, 3]
    assert [path.name for path in output.parent.iterdir()] == ["model.onnx"]


def test_without_a_change_the_model_is_written_as_it_was(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "clean.onnx"
    apply(source, [Cleanup()], output)
    (done,) = apply(output, [Cleanup()], tmp_path / "again.onnx")
    assert (done.changed, done.checks) == (False, ())
    assert (tmp_path / "again.onnx").read_bytes() == output.read_bytes()


def test_a_model_may_be_replaced_by_what_becomes_of_it(source: Path) -> None:
    apply(source, [Prune()], source)
    assert {tensor.name: tensor.dims[0] for tensor in onnx.load(source).graph.initializer}["w3"] == 48


def test_a_wrong_edit_is_caught_and_nothing_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "PASSES", {**registry.PASSES, "spoil": Spoil})
    output = tmp_path / "out" / "model.onnx"
    with pytest.raises(
        OracleError, match=r"spoil on source\.onnx, at logits: got 1 relative error .*at most 0\. This is a defect"
    ):
        apply(source, [Spoil()], output)
    assert list(output.parent.iterdir()) == []
    monkeypatch.setattr(Spoil, "tool", "onnxscript")
    with pytest.raises(OracleError, match="defect of the pass spoil, which runs the optimizer of onnxscript: please"):
        apply(source, [Spoil()], output)


def test_a_refusal_ends_the_run_and_keeps_what_was_there(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "model.onnx"
    output.parent.mkdir()
    output.write_bytes(b"before")
    with pytest.raises(UnsupportedModelError, match="nothing to cut"):
        apply(source, [Cleanup(), Prune(multiple=64)], output)
    assert output.read_bytes() == b"before"
    assert [path.name for path in output.parent.iterdir()] == ["model.onnx"]


def test_samples_reach_the_plan(source: Path, tmp_path: Path) -> None:
    (done,) = apply(source, [Prune()], tmp_path / "model.onnx", samples=graphs.samples_for(source))
    assert [fit["initializer"] for fit in done.plan["reconstructed"]] == ["w5"]
    assert np.isfinite([check.measured for check in done.checks]).all()


@pytest.mark.parametrize(
    ("graph", "request_", "checked"),
    [
        (graphs.PERCEPTRON, QuantizeDynamic(), "3 of 3 integer operators"),
        (graphs.RESIDUAL, QuantizeDynamic(), "integer operators"),
        (graphs.RESIDUAL, QuantizeStatic(), "integer operators"),
    ],
)
def test_of_a_large_model_single_operators_are_run_and_not_the_whole(
    graph: str, request_: Request, checked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = graphs.save(graphs.build(graph), tmp_path / "source.onnx")
    monkeypatch.setattr("onnx_lathe.passes.run.WHOLE_MODEL_BYTES", 0)
    samples = graphs.samples_for(source)
    (done,) = apply(source, [request_], tmp_path / "out.onnx", samples=samples)
    check, stored = done.checks
    assert check.scope.endswith(checked)
    assert check.what == "integer operators against numpy"
    assert 0.0 < check.measured <= 1.0
    assert stored.what == "stored levels against the float values"
    assert 0.3 < stored.measured <= stored.limit


@pytest.mark.parametrize(("large", "large_whole", "count"), [(True, True, 1), (True, False, 0), (False, False, 1)])
def test_a_large_model_is_run_whole_for_an_exact_pass_unless_it_is_judged_elsewhere(
    large: bool, large_whole: bool, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = graphs.save(graphs.build(graphs.CONSTANT_WEIGHT), tmp_path / "source.onnx")
    if large:
        monkeypatch.setattr("onnx_lathe.passes.run.WHOLE_MODEL_BYTES", -1)
    (done,) = apply(source, [Cleanup()], tmp_path / "out.onnx", large_whole=large_whole)
    assert done.changed
    assert len(done.checks) == count


SQUARE = """
square (float[N, 24] x) => (float[N, 24] y) <float[24, 24] w, float[24, 24] v>
{ h = Gemm <transB = 1> (x, w) y = MatMul (h, v) }
"""


@pytest.mark.parametrize("request_", [QuantizeDynamic(), QuantizeStatic()])
def test_square_weights_are_compared_the_right_way_round(request_: Request, tmp_path: Path) -> None:
    source = graphs.save(graphs.build(SQUARE), tmp_path / "source.onnx")
    (done,) = apply(source, [request_], tmp_path / "out.onnx", samples=graphs.samples_for(source))
    assert all(check.passed for check in done.checks)


@pytest.mark.parametrize("request_", [QuantizeDynamic(), QuantizeStatic()])
@pytest.mark.parametrize("graph", [graphs.PERCEPTRON, graphs.RESIDUAL])
def test_levels_that_do_not_stand_for_the_weights_are_found(
    graph: str, request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = graphs.save(graphs.build(graph), tmp_path / "source.onnx")
    right = streamed.quantized_rows

    def wrong(*given: Any, **more: Any) -> Iterator[Array]:
        for part in right(*given, **more):
            levels = part.copy()
            levels.reshape(-1)[0] ^= 1
            yield levels

    monkeypatch.setattr(streamed, "quantized_rows", wrong)
    with pytest.raises(OracleError, match=r"got 1(\.\d+)? steps \(stored levels|got 0\.\d+ steps \(stored levels"):
        apply(source, [request_], tmp_path / "out.onnx", samples=graphs.samples_for(source))


def test_a_wrong_operator_of_a_large_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = graphs.save(graphs.build(graphs.PERCEPTRON), tmp_path / "source.onnx")
    monkeypatch.setattr("onnx_lathe.passes.run.WHOLE_MODEL_BYTES", 0)

    def unlike_onnx(values: Array) -> tuple[Array, np.float32, np.uint8]:
        return values.astype(np.uint8), np.float32(1.0), np.uint8(0)

    monkeypatch.setattr(numeric, "dynamic_quantize", unlike_onnx)
    with pytest.raises(OracleError, match=r"quantize-dynamic on source\.onnx, at .* steps \(integer operators against"):
        apply(source, [QuantizeDynamic()], tmp_path / "out.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["source.onnx"]


def test_weights_beside_the_graph_move_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "EXTERNAL_ABOVE_BYTES", 0)
    monkeypatch.setattr(files, "INLINE_BELOW_BYTES", 16)
    source = graphs.save(graphs.build(graphs.PERCEPTRON), tmp_path / "source.onnx")
    output = tmp_path / "out" / "small.onnx"
    apply(source, [Cleanup(), QuantizeDynamic()], output)
    assert sorted(file.name for file in output.parent.iterdir()) == ["small.onnx", "small.onnx.data"]
    Session(output).run(tensors.first_batch(source, graphs.samples_for(source), 2))


def test_a_full_disk_is_said_and_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ir, "save", full)
    output = tmp_path / "out" / "model.onnx"
    with pytest.raises(OutputError, match=r"model\.onnx: got no room for it \(No space left on device\).*Free some"):
        apply(source, [Cleanup()], output)
    assert list(output.parent.iterdir()) == []
