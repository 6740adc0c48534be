"""``lathe run``: one model, one file of inputs, one file of outputs."""

from __future__ import annotations

from pathlib import Path

from onnx_lathe.converter.data.files import load_samples
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.samples import Array
from onnx_lathe.runtime.session import Session


def run(
    model: Path,
    input_file: Path,
    output_file: Path,
    *,
    provider: str | None = None,
    threads: int | None = None,
    require_signature: Path | None = None,
    identity: Path | None = None,
) -> dict[str, Array]:
    """Run ``model`` once on the arrays of an ``.npz`` and write its outputs as an ``.npz``.

    Args:
        model: An ``.onnx`` file, a bundle, or an encrypted bundle.
        input_file: Arrays by input name; ``label`` is ignored.
        output_file: Where to write the outputs by name, whole or not at all.
        provider: Where to run; None for what the bundle says, or the CPU.
        threads: Threads of the session; None for what the bundle says, or all allowed cores.
        require_signature: As for `Session`.
        identity: As for `Session`.

    Raises:
        SamplesError: The file holds no inputs, or values that are not finite.
        TensorError: An input has a wrong name, dtype or shape.
    """
    session = Session(model, provider=provider, threads=threads, require_signature=require_signature, identity=identity)
    outputs = session.run(load_samples(input_file).batches[0])
    tensors.save_npz(output_file, outputs)
    return outputs
