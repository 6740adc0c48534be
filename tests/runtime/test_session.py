import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from onnx_lathe.benchmarks.subject import Start
from onnx_lathe.runtime import session, tensors
from onnx_lathe.runtime.bundle import write_bundle
from onnx_lathe.runtime.errors import InputError, ModelFileError, ProviderError, TensorError, UnsupportedModelError
from onnx_lathe.runtime.placement import shape_nodes
from onnx_lathe.runtime.session import Session
from tests.graphs import LINEAR, parse, write

PAIR = """
pair (float[batch, 2] a, float[batch, 2] b) => (float[batch, 2] total, float[batch, 2] gap) {
  total = Add(a, b)
  gap = Sub(a, b)
}
"""


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    return write(tmp_path / "linear.onnx", LINEAR)


def test_a_model_runs_and_says_what_it_needs(linear: Path) -> None:
    opened = Session(linear, threads=1)
    (x,), (y,) = opened.inputs, opened.outputs
    assert (x.name, x.dtype, x.shape) == ("x", np.float32, ("batch", 4))
    assert (y.name, y.dtype, y.shape) == ("y", np.float32, ("batch", 2))
    assert (opened.provider, opened.threads, opened.warning) == ("cpu", 1, None)
    result = opened.run({"x": np.ones((3, 4), np.float32)})
    np.testing.assert_array_equal(result["y"], np.tile([16.5, 19.5], (3, 1)))


def test_outputs_are_chosen_by_name_and_in_any_order(tmp_path: Path) -> None:
    opened = Session(write(tmp_path / "pair.onnx", PAIR))
    feeds = {"a": np.full((1, 2), 3, np.float32), "b": np.full((1, 2), 1, np.float32)}
    assert list(opened.run(feeds)) == ["total", "gap"]
    assert list(opened.run(feeds, ["gap"])) == ["gap"]
    assert opened.run(feeds, ["gap", "total"])["total"][0, 0] == 4
    with pytest.raises(
        TensorError, match=r"output 'gapp': got an unknown output, expected one of total, gap. Did you mean 'gap'"
    ):
        opened.run(feeds, ["gapp"])


def test_placement_is_what_onnxruntime_assigned(linear: Path) -> None:
    assert Session(linear, optimize=False).placement() == {"product": "cpu", "sum": "cpu"}


def test_nodes_without_a_name_are_told_apart(tmp_path: Path) -> None:
    text = "g (float[2] x) => (float[2] y) { a = Abs(x) [n] b = Neg(a) y = Exp(b) }"
    opened = Session(write(tmp_path / "m.onnx", text), optimize=False)
    assert opened.placement() == {"Abs_0": "cpu", "n": "cpu", "Exp_2": "cpu"}


def test_a_provider_that_takes_no_node_is_refused_unless_allowed(linear: Path) -> None:
    # The Azure provider is in every build for CPUs and takes only its own operators.
    if "azure" not in session.providers.available():
        pytest.skip("this build of onnxruntime has no provider that leaves nodes to the CPU")
    with pytest.raises(
        ProviderError, match=r"provider 'azure': got \d nodes that it did not take: .*, expected every node"
    ):
        Session(linear, provider="azure")
    opened = Session(linear, provider="azure", allow_fallback=True)
    assert set(opened.placement().values()) == {"cpu"}


def test_a_provider_that_does_not_load_is_refused(linear: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.providers, "resolve", lambda provider: "CUDAExecutionProvider")
    monkeypatch.setattr(session.providers, "load_libraries", lambda provider: None)
    create = session.create
    monkeypatch.setattr(
        session, "create", lambda path, provider, options, *memory: create(path, "CPUExecutionProvider", options)
    )
    with pytest.raises(
        ProviderError, match=r"'cuda': got a session on cpu: .*could not load.*, expected a session on cuda"
    ):
        Session(linear, provider="cuda", allow_fallback=False)


def test_only_nodes_that_compute_shapes_may_run_elsewhere() -> None:
    model = parse("""
        g (float[n, m] x) => (float[k] y) {
          [shape] s = Shape(x)
          [one] one = Constant <value = int64[1] {-1}> ()
          [double] d = Mul(s, one)
          [flat] y = Reshape(x, one)
        }
    """)
    assert shape_nodes(model.graph) == {("shape", "Shape"), ("one", "Constant"), ("double", "Mul")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("g (float[2] x) => (float[2] y) { y = Unheard(x) }", "No Op registered for Unheard with domain_version of 20"),
        ("g (float[2] x) => (float[2] y) { y = Relu(absent) }", "Node input 'absent' is not a graph input"),
        ("g (int8[2] x) => (int8[2] y) { y = Softmax(x) }", r"Type 'tensor\(int8\)' of input parameter"),
    ],
)
def test_what_onnxruntime_refuses_is_said_in_short(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    with pytest.raises(ModelFileError, match=rf"m.onnx: got a model that onnxruntime refuses: .*{message}") as caught:
        Session(write(tmp_path / "m.onnx", text))
    assert "ONNXRuntimeError" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_an_opset_from_the_future_is_said_without_source_files(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", LINEAR, '<ir_version: 99, opset_import: ["": 20]>')
    with pytest.raises(
        ModelFileError, match=r"refuses: Unsupported model IR version: 99, max supported IR version: \d+,"
    ):
        Session(path)


def test_a_run_that_fails_inside_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = "g (float[n] x, int64[m] rows) => (float[m] y) { y = Gather(x, rows) }"
    opened = Session(write(tmp_path / "m.onnx", text))
    with pytest.raises(TensorError, match=r"a run that failed: .*idx=30 must be within the inclusive range \[-7,6\]"):
        opened.run({"x": np.zeros(7, np.float32), "rows": np.array([30])})
    assert capfd.readouterr().err == ""


def test_threads_must_be_positive(linear: Path) -> None:
    with pytest.raises(InputError, match="threads: got 0, expected 1 to 1024"):
        Session(linear, threads=0)


def test_only_tensors_go_in(tmp_path: Path) -> None:
    text = "g (seq(float[n]) x) => (float[m] y) { y = ConcatFromSequence <axis = 0> (x) }"
    with pytest.raises(UnsupportedModelError, match="'x': got a sequence, expected a tensor"):
        Session(write(tmp_path / "m.onnx", text))


def test_a_session_serves_many_threads(linear: Path) -> None:
    opened = Session(linear, threads=1)
    answers: dict[int, float] = {}

    def run(value: int) -> None:
        answers[value] = float(opened.run({"x": np.full((1, 4), value, np.float32)})["y"][0, 0])

    threads = [threading.Thread(target=run, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {value: 16.0 * value + 0.5 for value in range(8)}


def test_a_bundle_brings_its_provider_and_threads(linear: Path, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", {"model.onnx": linear}, {}, {"provider": "cpu", "threads": 1})
    opened = Session(folder)
    assert (opened.path, opened.provider, opened.threads, opened.warning) == (folder / "model.onnx", "cpu", 1, None)
    assert Session(folder, threads=2).threads == 2


@pytest.mark.parametrize("start", [session.start, session.start_plain])
def test_both_ways_to_start_a_measurement_run_the_model(linear: Path, tmp_path: Path, start: Start) -> None:
    tensors.save_npz(tmp_path / "x.npz", {"x": np.ones((1, 4), np.float32)})
    call = start(str(linear), str(tmp_path / "x.npz"), "cpu", 1)
    result = call()
    output = result["y"] if isinstance(result, dict) else result[0]
    np.testing.assert_array_equal(output, [[16.5, 19.5]])


def test_importing_a_session_loads_neither_torch_nor_onnxruntime() -> None:
    heavy = ("torch", "onnxruntime", "onnx_ir", "onnxscript", "sklearn", "scipy", "pydantic")
    code = (
        "import sys, onnx_lathe.runtime.session, onnx_lathe.runtime.facts, onnx_lathe.runtime.profile;"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
