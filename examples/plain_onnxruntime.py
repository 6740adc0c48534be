"""Run a bundle without onnx-lathe: `python examples/plain_onnxruntime.py BUNDLE X.npz Y.npz`.

Needs onnxruntime and numpy only. X.npz holds an array for each input by its name; Y.npz gets one for each output.
"""

import sys
import tomllib
from pathlib import Path

import numpy as np
import onnxruntime

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "openvino": "OpenVINOExecutionProvider"}


def start(bundle: Path) -> onnxruntime.InferenceSession:
    """Return a session as the bundle was measured; session.toml says where and with how many threads."""
    wanted = tomllib.loads((bundle / "session.toml").read_text())
    options = onnxruntime.SessionOptions()
    # Without the key the bundle takes all cores; 0 lets onnxruntime count them (it sees no cgroup quota).
    options.intra_op_num_threads = wanted.get("threads", 0)
    return onnxruntime.InferenceSession(bundle / "model.onnx", options, providers=[PROVIDERS[wanted["provider"]]])


def main(bundle: Path, inputs: Path, outputs: Path) -> None:
    session = start(bundle)
    with np.load(inputs) as arrays:
        results = session.run(None, {each.name: arrays[each.name] for each in session.get_inputs()})
    named = dict(zip((each.name for each in session.get_outputs()), results, strict=True))
    np.savez(outputs, **named)
    for name, values in named.items():
        print(f"{name}: {values.dtype} {list(values.shape)}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
