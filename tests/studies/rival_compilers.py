"""The rivals' ways from an ``.onnx`` to a fast model, each at its documented best, for interpreters that have nothing
of ours: one that has onnxruntime, NNCF, OpenVINO and onnxsim, or Olive, or Optimum.

``python rival_compilers.py TOOL MODEL FOLDER OUTPUT KIND``: FOLDER holds the calibration batches, an ``.npz`` each;
KIND is "bert", "vit" or "gpt2" with its heads and width, such as "bert:12:384", or nothing for convolutions.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx


class Kind:
    """What tools want to be told of a transformer: its type, attention heads and width."""

    def __init__(self, text: str) -> None:
        self.type, heads, hidden = (*text.split(":"), "0", "0")[:3]
        self.heads, self.hidden = int(heads), int(hidden)


def main(tool: str, model: Path, folder: Path, output: Path, kind: Kind) -> None:
    """Make ``output`` of ``model`` with ``tool``."""
    batches = [dict(np.load(file)) for file in sorted(folder.glob("*.npz"))]
    for batch in batches:
        batch.pop("label", None)
    TOOLS[tool](model, batches, output, kind)


def _prepared(model: Path, folder: Path) -> Path:
    """Return the model as onnxruntime's documentation wants it prepared; symbolic shapes fail on dynamo exports."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = folder / "prepared.onnx"
    quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    return prepared


def _quantized_dynamic(model: Path, output: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(model, output, per_channel=True, weight_type=QuantType.QInt8)


def _ort_dynamic(model: Path, batches: list[dict], output: Path, kind: Kind) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        _quantized_dynamic(_prepared(model, Path(scratch)), output)


def _ort_static(model: Path, batches: list[dict], output: Path, kind: Kind) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(batches)

        def get_next(self) -> dict | None:
            return next(self.rest, None)

    with tempfile.TemporaryDirectory() as scratch:
        quantize_static(
            _prepared(model, Path(scratch)),
            output,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def _ort_optimized(model: Path, batches: list[dict], output: Path, kind: Kind) -> None:
    from onnxruntime.transformers.optimizer import optimize_model

    found = optimize_model(str(model), model_type=kind.type, num_heads=kind.heads, hidden_size=kind.hidden)
    found.save_model_to_file(str(output))


def _ort_optimized_dynamic(model: Path, batches: list[dict], output: Path, kind: Kind) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        optimized = Path(scratch) / "optimized.onnx"
        _ort_optimized(model, batches, optimized, kind)
        _quantized_dynamic(optimized, output)


def _nncf_options(rows: list[dict], kind: Kind) -> dict:
    import nncf

    return {
        "preset": nncf.QuantizationPreset.MIXED,
        "model_type": nncf.ModelType.TRANSFORMER if kind.type else None,
        "subset_size": len(rows),
        "fast_bias_correction": True,
    }


def _single(batches: list[dict]) -> list[dict]:
    return [
        {key: values[row : row + 1] for key, values in batch.items()}
        for batch in batches
        for row in range(len(next(iter(batch.values()))))
    ]


def _nncf_onnx(model: Path, batches: list[dict], output: Path, kind: Kind) -> None:
    import nncf

    # As exported it fails on the unused outputs of a BatchNormalization; onnxruntime's preparation removes those.
    with tempfile.TemporaryDirectory() as scratch:
        prepared = onnx.load(_prepared(model, Path(scratch)))
    rows = _single(batches)
    quantized = nncf.quantize(prepared, nncf.Dataset(rows), **_nncf_options(rows, kind))
    onnx.save(quantized, output)


def _nncf_openvino(model: Path, batches: list[dict], output: Path, kind: Kind) -> None:
    import nncf
    import openvino

    read, rows = openvino.Core().read_model(model), _single(batches)
    quantized = nncf.quantize(read, nncf.Dataset(rows), **_nncf_options(rows, kind))
    openvino.save_model(quantized, output, compress_to_fp16=False)


def _onnxsim(model: Path, batches: list[dict], output: Path, kind: Kind) -> None:
    import onnxsim

    simplified, same = onnxsim.simplify(onnx.load(model))
    if not same:
        raise RuntimeError("onnxsim says that what it made computes something else")
    onnx.save(simplified, output)


def _onnxsim_dynamic(model: Path, batches: list[dict], output: Path, kind: Kind) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        simplified = Path(scratch) / "simplified.onnx"
        _onnxsim(model, batches, simplified, kind)
        _ort_dynamic(simplified, batches, output, kind)


def _olive(model: Path, batches: list[dict], output: Path, kind: Kind) -> None:
    """Run its workflow for CPUs: peephole rules, its fusions for transformers, and the quantizer that fits."""
    from olive.data.registry import Registry
    from olive.workflows import run

    class Rows:
        def __init__(self) -> None:
            self.rows = batches

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> tuple[dict, int]:
            return self.rows[index], 0

    Registry.register_dataset("study_rows")(lambda **_: Rows())
    Registry.register_dataloader("study_loader")(lambda dataset, **_: dataset)
    data = {
        "name": "calibration",
        "type": "DataContainer",
        "load_dataset_config": {"type": "study_rows"},
        "pre_process_data_config": {"type": "skip_pre_process"},
        "post_process_data_config": {"type": "skip_post_process"},
        "dataloader_config": {"type": "study_loader"},
    }
    passes = {"peephole": {"type": "OnnxPeepholeOptimizer"}}
    if kind.type:
        told = {"model_type": kind.type, "num_heads": kind.heads, "hidden_size": kind.hidden}
        passes["fusions"] = {"type": "OrtTransformersOptimization", **told}
        passes["quantize"] = {"type": "OnnxDynamicQuantization", "precision": "int8", "per_channel": True}
    else:
        static = {"precision": "int8", "activation_type": "uint8", "per_channel": True, "quant_format": "QDQ"}
        passes["quantize"] = {"type": "OnnxStaticQuantization", "data_config": "calibration", **static}
    with tempfile.TemporaryDirectory() as scratch:
        config = {
            "input_model": {"type": "OnnxModel", "model_path": str(model)},
            "systems": {
                "here": {
                    "type": "LocalSystem",
                    "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
                }
            },
            "data_configs": [data],
            "passes": passes,
            "host": "here",
            "target": "here",
            "cache_dir": str(Path(scratch) / "cache"),
            "output_dir": str(Path(scratch) / "result"),
            "no_artifacts": True,
        }
        run(config)
        made = list((Path(scratch) / "result").rglob("*.onnx"))
        if len(made) != 1:
            raise RuntimeError(f"Olive ended without an error and left {len(made)} models")
        onnx.save(onnx.load(made[0]), output)


def _optimum(model: Path, batches: list[dict], output: Path, kind: Kind) -> None:
    """Optimize and quantize as its guide has it: level O2, then dynamic for AVX512-VNNI."""
    import transformers
    from optimum.onnxruntime import ORTOptimizer, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoOptimizationConfig, AutoQuantizationConfig

    configs = {"bert": transformers.BertConfig, "vit": transformers.ViTConfig, "gpt2": transformers.GPT2Config}
    sizes = {"hidden_size": kind.hidden, "num_attention_heads": kind.heads}
    config = configs[kind.type](**({} if kind.type == "gpt2" else sizes))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shutil.copyfile(model, folder / "model.onnx")
        config.save_pretrained(folder)
        optimizer = ORTOptimizer([folder / "model.onnx"], config)
        optimizer.optimize(AutoOptimizationConfig.O2(), save_dir=folder / "optimized", one_external_file=False)
        optimized = next((folder / "optimized").glob("*.onnx"))
        quantizer = ORTQuantizer(optimized, config)
        dynamic = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
        quantizer.quantize(quantization_config=dynamic, save_dir=folder / "quantized")
        onnx.save(onnx.load(next((folder / "quantized").glob("*.onnx"))), output)


TOOLS = {
    "ort-dynamic": _ort_dynamic,
    "ort-static": _ort_static,
    "ort-optimizer": _ort_optimized,
    "ort-optimizer-dynamic": _ort_optimized_dynamic,
    "nncf": _nncf_onnx,
    "nncf-openvino": _nncf_openvino,
    "onnxsim": _onnxsim,
    "onnxsim-dynamic": _onnxsim_dynamic,
    "olive": _olive,
    "optimum": _optimum,
}


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:5]), Kind(sys.argv[5] if len(sys.argv) > 5 else ""))
