"""Ask a served model with tritonclient, unmodified: `python examples/service_client.py HOST:PORT MODEL X.npz [Y.npz]`.

Start the service first, in another shell (`lathe serve --help` has the rest):

    pip install "onnx-lathe[cpu,serve]" "tritonclient[http]"
    lathe serve out/digits

X.npz holds an array for each input by its name; Y.npz gets one for each output, else their shapes are printed. Where
the service has keys, put yours into the environment variable LATHE_KEY. The same client asks Triton, and Ray Serve
behind `lathe deploy`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import np_to_triton_dtype


def main(address: str, model: str, inputs: Path, outputs: Path | None) -> None:
    key = os.environ.get("LATHE_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else None
    tensors: list[triton.InferInput] = []
    with np.load(inputs) as arrays:
        for name, values in arrays.items():
            tensors.append(triton.InferInput(name, values.shape, np_to_triton_dtype(values.dtype)))
            tensors[-1].set_data_from_numpy(values)
    with triton.InferenceServerClient(address) as client:
        answer = client.infer(model, tensors, headers=headers)
    results = {entry["name"]: answer.as_numpy(entry["name"]) for entry in answer.get_response()["outputs"]}
    for name, values in results.items():
        print(f"{name}: {values.dtype} {list(values.shape)}")
    if outputs is not None:
        np.savez(outputs, **results)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]) if len(sys.argv) > 4 else None)
