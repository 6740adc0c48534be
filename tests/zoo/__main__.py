"""`make zoo`: every pass over every architecture; each result is a line of out/zoo/results.jsonl, and a rerun goes on.

A pass either keeps its oracle or refuses with a reason; anything else is a failure, and the exit status says so. Names
of architectures as arguments restrict the run.
"""

import json
import sys
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from onnx_lathe.passes import registry
from onnx_lathe.passes.run import apply
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Samples
from tests.zoo.architectures import ARCHITECTURES, Feeds

FOLDER = Path("out/zoo")
RESULTS = FOLDER / "results.jsonl"
FORMS = (
    "cleanup",
    "keep-skip-apart",
    "prune{ratio=0.3}",
    "quantize-dynamic",
    "quantize-static",
    "quantize-dynamic{weight_exponent=-8}",
    "sparsify",
    "cleanup,prune{ratio=0.3},quantize-static",
    "quantize-weights{bits=8,block=32}",
    "quantize-weights{bits=4,block=16,method=hqq}",
    "quantize-weights{bits=4,block=16,method=gptq}",
    "cleanup,equalize,quantize-static{per_channel=false}",
    "cleanup,smooth,quantize-dynamic",
    "cleanup,correct-biases,quantize-static{ranges=percentile}",
    "cleanup,round-weights{iterations=20},quantize-static{ranges=mse}",
    "push-slices",
    "flatten-tokens",
    "drop-padding",
    "gelu{form=fast}",
    "fuse-normalization{form=skip}",
    "merge-projections",
    "move-transposes",
    "optimize-onnxscript",
    "optimize-onnxruntime",
    "cleanup,fold-masks,fuse-attention{form=packed}",
    "cleanup,fold-masks,push-slices,fuse-attention{form=standard},keep-skip-apart,quantize-dynamic",
)


def exported(name: str) -> tuple[Path, Samples]:
    """Return the model of an architecture with a batch of inputs, exported once."""
    path, feeds = FOLDER / f"{name}.onnx", FOLDER / f"{name}.npz"
    if not path.exists():
        torch.manual_seed(0)
        network, inputs = ARCHITECTURES[name].build().eval(), ARCHITECTURES[name].feeds()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.normal_(0.0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        _export(network, inputs, path)
        np.savez(feeds, **{key: value.numpy() for key, value in inputs.items()})
    with np.load(feeds) as arrays:
        return path, Samples(({key: arrays[key] for key in arrays.files},), source=name)


def _export(network: torch.nn.Module, inputs: Feeds, path: Path) -> None:
    """Export with dynamic batch and sequence, or, where torch finds them constrained, with the shapes of ``inputs``."""
    part = path.with_suffix(".part")
    dims = {key: {0: "batch", **({1: "seq"} if value.dtype == torch.long else {})} for key, value in inputs.items()}
    for shapes in (dims, None):
        try:
            torch.onnx.export(
                network,
                (),
                part,
                kwargs=inputs,
                input_names=list(inputs),
                dynamic_shapes=shapes,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError:
            if shapes is None:
                raise
        else:
            break
    part.rename(path)


def judge(name: str, form: str) -> dict[str, str]:
    """Apply a form to an architecture and say what came of it."""
    try:
        model, samples = exported(name)
        applied = apply(model, registry.parse(form), FOLDER / "applied" / "model.onnx", samples=samples)
    except UnsupportedModelError as error:
        return {"outcome": "refused", "detail": str(error)}
    except Exception:  # noqa: BLE001 - the zoo reports every kind of failure and goes on
        return {"outcome": "FAILED", "detail": traceback.format_exc()}
    changed = [step.request for step in applied if step.changed]
    worst = [f"{check.measured:.3g} {check.unit}" for step in applied for check in step.checks]
    return {"outcome": "applied" if changed else "nothing to do", "detail": ", ".join(worst)}


def main(names: list[str]) -> int:
    """Run what has not been run, print the counts and every failure, and return the exit status."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    done = {(row["architecture"], row["form"]): row for row in map(json.loads, lines)}
    wanted = [(name, form) for name in names for form in FORMS]
    with RESULTS.open("a") as file:
        for name, form in track([case for case in wanted if case not in done], "zoo"):
            row = {"architecture": name, "form": form, **judge(name, form)}
            done[name, form] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
    rows = [done[case] for case in wanted]
    for form in FORMS:
        print(form, dict(Counter(row["outcome"] for row in rows if row["form"] == form)))
    failed = [row for row in rows if row["outcome"] == "FAILED"]
    for row in failed:
        print(f"\n{row['architecture']}: {row['form']}\n{row['detail']}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(ARCHITECTURES)))
