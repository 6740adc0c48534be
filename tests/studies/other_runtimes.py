"""What the study of compile times: batches in turn, in a plain session, in OpenVINO, and through torch.compile."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnx_lathe.runtime import providers, tensors
from onnx_lathe.runtime.samples import Array, Feeds


def plain(
    model: str, feeds: Sequence[str], threads: int | None = None, provider: str = "cpu", site: str | None = None
) -> Callable[[], object]:
    """Prepare one inference on each of ``feeds`` in a plain session, default options but for the threads.

    Args:
        model: An ``.onnx`` file.
        feeds: ``.npz`` files, a batch each.
        threads: Threads inside an operator; None for all CPUs that the process may use.
        provider: Where to run.
        site: The packages of another interpreter, whose onnxruntime is to be used.
    """
    if site is not None:
        sys.path.insert(0, site)
    # Not by `providers.onnxruntime`, which would not have two of them beside each other.
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or providers.default_threads()
    wanted = {"cpu": providers.CPU, "openvino": "OpenVINOExecutionProvider"}[provider]
    session = onnxruntime.InferenceSession(model, options, providers=[wanted])
    if session.get_providers()[0] != wanted:
        raise RuntimeError(f"onnxruntime runs on {session.get_providers()}, not on {wanted}")
    batches = _batches(feeds)
    return lambda: [session.run(None, batch) for batch in batches]


def plain_runner(model: str, threads: int | None) -> Callable[[Feeds], Mapping[str, Array]]:
    """Return what runs a model in a plain session on one batch, and returns its outputs by name."""
    onnxruntime = providers.onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or providers.default_threads()
    session = onnxruntime.InferenceSession(model, options, providers=[providers.CPU])
    names = [output.name for output in session.get_outputs()]
    wanted = [entry.name for entry in session.get_inputs()]

    def run(batch: Feeds) -> Mapping[str, Array]:
        return dict(zip(names, session.run(None, {name: batch[name] for name in wanted}), strict=True))

    return run


def openvino_runner(model: str, site: str, threads: int | None) -> Callable[[Feeds], Mapping[str, Array]]:
    """Return what runs a model by OpenVINO on one batch, and returns its outputs by name."""
    request = _request(model, site, threads, None)
    names = [min(output.get_names()) for output in request.model_outputs]

    def run(batch: Feeds) -> Mapping[str, Array]:
        found = request.infer(dict(batch), share_inputs=True)
        return {name: np.array(found[number]) for number, name in enumerate(names)}

    return run


def _request(model: str, site: str, threads: int | None, shapes: Feeds | None) -> Any:
    """Return OpenVINO's ``InferRequest``, tuned for latency.

    Args:
        model: An ``.onnx`` file or OpenVINO's own ``.xml``.
        site: The packages of the interpreter that has OpenVINO.
        threads: Of the model; None for all CPUs that the process may use.
        shapes: A batch whose shapes are the only ones; None leaves them open.
    """
    sys.path.append(site)
    openvino: Any = importlib.import_module("openvino")
    core = openvino.Core()
    read = core.read_model(model)
    if shapes is not None:
        read.reshape({name: list(values.shape) for name, values in shapes.items()})
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads or providers.default_threads()}
    return core.compile_model(read, "CPU", options).create_infer_request()


def openvino(model: str, feeds: Sequence[str], site: str, threads: int | None = None) -> Callable[[], object]:
    """Prepare one inference on each of ``feeds`` by OpenVINO, tuned for latency; of one shape where there is one."""
    batches = _batches(feeds)
    request = _request(model, site, threads, batches[0] if len(batches) == 1 else None)
    return lambda: [request.infer(batch, share_inputs=True, share_outputs=True) for batch in batches]


def torch_compiled(network: str, feeds: Sequence[str], threads: int | None = None) -> Callable[[], object]:
    """Prepare one inference on each of ``feeds`` through ``torch.compile``, with its weights frozen."""
    torch: Any = importlib.import_module("torch")
    inductor: Any = importlib.import_module("torch._inductor.config")
    networks: Any = importlib.import_module("tests.studies.networks")
    inductor.freezing = True
    torch.set_num_threads(threads or providers.default_threads())
    compiled = torch.compile(networks.build(network))
    batches = [tuple(torch.from_numpy(values) for values in batch.values()) for batch in _batches(feeds)]

    def run() -> object:
        with torch.inference_mode():
            return [compiled(*batch) for batch in batches]

    # It compiles on its first calls: that is not what is timed.
    run()
    return run


def _batches(feeds: Sequence[str]) -> list[dict[str, Array]]:
    return [tensors.load_npz(Path(file)) for file in feeds]
