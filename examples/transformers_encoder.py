"""Compile an encoder of transformers: `python examples/transformers_encoder.py FOLDER TEXT.txt OUT [SECONDS]`.

FOLDER is what `save_pretrained` wrote for a model and its tokenizer (pip install "onnx-lathe[cpu,train,zoo]"); nothing
is downloaded. TEXT.txt has a sentence on each line, such as the model will meet. OUT/bundle gets the fastest form that
keeps its embeddings, after SECONDS of measuring, and the last line compares it with torch.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

import onnx_lathe

MAX_TOKENS, BATCH = 128, 8


class SentenceEncoder(torch.nn.Module):
    """Ids and mask ``int64 [batch, sequence]`` to the mean of the tokens' vectors, ``float32 [batch, hidden]``."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        # The eager attention is plain products and a softmax, which the passes know.
        self.encoder = AutoModel.from_pretrained(folder, attn_implementation="eager", local_files_only=True)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[:, :, None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


def tokenize(tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> dict[str, np.ndarray]:
    """Return the two inputs, padded to the longest sentence."""
    tokens = tokenizer(sentences, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="np")
    return {name: np.asarray(tokens[name], np.int64) for name in ("input_ids", "attention_mask")}


def export(encoder: SentenceEncoder, arrays: dict[str, np.ndarray], path: Path) -> None:
    """Write the encoder as ONNX for batches of any size and sentences of any length."""
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    torch.onnx.export(
        encoder,
        tuple(torch.from_numpy(array[:2]) for array in arrays.values()),
        path,
        dynamo=True,
        external_data=False,
        opset_version=20,
        input_names=list(arrays),
        output_names=["sentence_embedding"],
        dynamic_shapes=({0: batch, 1: sequence}, {0: batch, 1: sequence}),
    )


def main(folder: Path, text: Path, output: Path, seconds: float = 60.0) -> None:
    output.mkdir(parents=True, exist_ok=True)
    encoder = SentenceEncoder(folder).eval()
    sentences = [line for line in text.read_text().splitlines() if line.strip()]
    arrays = tokenize(AutoTokenizer.from_pretrained(folder, local_files_only=True), sentences)
    export(encoder, arrays, output / "model.onnx")
    compiled = onnx_lathe.compile(
        output / "model.onnx",
        output / "bundle",
        data=onnx_lathe.Samples((arrays,), source=str(text)),
        dims=[{"batch": BATCH, "sequence": arrays["input_ids"].shape[1]}],
        metric="mean_cosine",
        time_budget=seconds,
    )
    print(f"{compiled.report.status}: {compiled.found.reason}")

    batch = {name: array[:BATCH] for name, array in arrays.items()}
    found = onnx_lathe.Session(output / "bundle").run(batch)["sentence_embedding"]
    with torch.inference_mode():
        wanted = encoder(**{name: torch.from_numpy(array) for name, array in batch.items()}).numpy()
    cosines = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    print(f"cosine with torch: {cosines.min():.4f} at worst, of {len(cosines)} sentences")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *map(float, sys.argv[4:]))
