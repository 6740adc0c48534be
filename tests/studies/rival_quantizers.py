"""The rivals' quantizers, each at its documented best, for an interpreter that has them and nothing of ours.

``python rival_quantizers.py TOOL MODEL FOLDER OUTPUT``: FOLDER holds the calibration batches, an ``.npz`` each.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx


def main(tool: str, model: Path, folder: Path, output: Path) -> None:
    """Quantize ``model`` with ``tool`` and write ``output``."""
    batches = [dict(np.load(file)) for file in sorted(folder.glob("*.npz"))]
    name, _, option = tool.partition(":")
    {"ort-static": _ort_static, "ort-dynamic": _ort_dynamic, "nncf": _nncf}[name](model, batches, output, option)


def _prepared(model: Path, folder: str) -> Path:
    """Return the model as onnxruntime's documentation wants it prepared; symbolic shapes fail on dynamo exports."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = Path(folder) / "prepared.onnx"
    quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    return prepared


def _ort_static(model: Path, batches: list[dict], output: Path, method: str) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(batches)

        def get_next(self) -> dict | None:
            return next(self.rest, None)

    with tempfile.TemporaryDirectory() as scratch:
        quantize_static(
            _prepared(model, scratch),
            output,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[method],
        )


def _ort_dynamic(model: Path, batches: list[dict], output: Path, option: str) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    del batches, option
    with tempfile.TemporaryDirectory() as scratch:
        quantize_dynamic(_prepared(model, scratch), output, per_channel=True, weight_type=QuantType.QInt8)


def _nncf(model: Path, batches: list[dict], output: Path, option: str) -> None:
    import nncf

    # As exported it fails on the unused outputs of a BatchNormalization; onnxruntime's preparation removes those.
    with tempfile.TemporaryDirectory() as scratch:
        prepared = onnx.load(_prepared(model, scratch))
    quantized = nncf.quantize(
        prepared,
        nncf.Dataset(batches),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER if option == "transformer" else None,
        subset_size=len(batches),
        fast_bias_correction=False,
    )
    onnx.save(quantized, output)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:5]))
