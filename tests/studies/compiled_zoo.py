"""Compile over many architectures, random weights, a short budget: is none slower, and how much do they gain?

They have the widths of real ones, and few layers: in toys of 64 channels nothing but the overhead of a call is left.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf

from onnx_lathe.benchmarks.measure import Effort, measure
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.runtime import loading, tensors
from onnx_lathe.runtime.samples import Feeds, Samples
from tests.studies.made import MAX_DROP, watched
from tests.studies.networks import export, settle_normalizations

SAMPLES = {"data": 32, "eval_data": 640}
"""Random samples to calibrate with, and to choose and certify on: 300 are the least that certify."""
LENGTH = 128
"""Tokens of a text that is timed."""
JUDGED_LENGTH = 16
"""Tokens of a text that is judged."""
VOCABULARY = 2000
_WIDE = {"hidden_size": 384, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 1536}
_TEXT = {"vocab_size": VOCABULARY, **_WIDE}


@dataclass(frozen=True)
class Architecture:
    """How to build a network.

    Attributes:
        model: Its class in transformers.
        config: That of its config.
        options: Of the config.
        size: Pixels of an image's side; 0 for texts, below zero for so many values of sound.
    """

    model: str
    config: str
    options: Mapping[str, Any]
    size: int = 0

    def build(self) -> torch.nn.Module:
        """Return it with random weights, equal each time."""
        torch.manual_seed(0)
        return getattr(hf, self.model)(getattr(hf, self.config)(**self.options)).eval()

    def feeds(self, count: int, length: int, seed: int) -> Feeds:
        """Return random inputs."""
        rng = np.random.default_rng(seed)
        if self.size > 0:
            # Coarse squares as well as noise: a mean that pools over pixels must not end as the same for all.
            coarse = rng.standard_normal((count, 3, self.size // 16, self.size // 16), np.float32)
            fine = rng.standard_normal((count, 3, self.size, self.size), np.float32)
            return {"pixel_values": np.kron(coarse, np.ones((1, 1, 16, 16), np.float32)) + 0.3 * fine}
        if self.size < 0:
            return {"input_values": rng.standard_normal((count, -self.size), np.float32)}
        ids = rng.integers(5, VOCABULARY, (count, length))
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def _text(name: str, head: str = "ForSequenceClassification", **options: Any) -> Architecture:
    return Architecture(f"{name}{head}", f"{name}Config", {**_TEXT, **options})


def _image(name: str, head: str = "ForImageClassification", size: int = 128, **options: Any) -> Architecture:
    return Architecture(f"{name}{head}", f"{name}Config", options, size)


_PATCHES = {"image_size": 128, "patch_size": 16, **_WIDE}
ARCHITECTURES = {
    "bert": _text("Bert"),
    "roberta": _text("Roberta"),
    "albert": _text("Albert", embedding_size=128),
    "electra": _text("Electra", embedding_size=128),
    "mpnet": _text("MPNet"),
    "modernbert": _text("ModernBert", pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
    "mobilebert": _text("MobileBert", embedding_size=128, intra_bottleneck_size=96, true_hidden_size=96),
    "llama": _text("Llama", "ForCausalLM", num_key_value_heads=2, use_cache=False),
    "distilbert": Architecture(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 384, "n_layers": 3, "n_heads": 6, "hidden_dim": 1536},
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 384, "n_layer": 3, "n_head": 6, "n_positions": 256, "use_cache": False},
    ),
    "t5-encoder": Architecture(
        "T5EncoderModel",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 384,
            "d_kv": 64,
            "d_ff": 1536,
            "num_layers": 3,
            "num_heads": 6,
            "use_cache": False,
            "attn_implementation": "eager",
        },
    ),
    "vit": _image("ViT", **_PATCHES),
    "deit": _image("DeiT", **_PATCHES),
    "beit": _image("Beit", **_PATCHES),
    "clip-vision": _image("CLIPVision", "Model", **_PATCHES),
    "dinov2": _image(
        "Dinov2", size=112, image_size=112, patch_size=14, hidden_size=384, num_hidden_layers=3, num_attention_heads=6
    ),
    "swin": _image(
        "Swin",
        image_size=128,
        patch_size=4,
        embed_dim=96,
        depths=[2, 2],
        num_heads=[3, 6],
        window_size=4,
        attn_implementation="eager",
    ),
    "mobilenetv1": _image("MobileNetV1", image_size=128),
    "mobilenetv2": _image("MobileNetV2", image_size=128),
    "resnet": _image("ResNet", embedding_size=64, hidden_sizes=[128, 256, 512], depths=[2, 2, 2]),
    "regnet": _image("RegNet", embedding_size=32, hidden_sizes=[128, 256, 512], depths=[1, 2, 2], groups_width=64),
    "convnext": _image("ConvNext", hidden_sizes=[96, 192, 384], depths=[2, 2, 2], num_stages=3),
    "efficientnet": _image(
        "EfficientNet", image_size=128, width_coefficient=1.0, depth_coefficient=0.5, hidden_dim=1280
    ),
    "segformer": _image("Segformer", "ForSemanticSegmentation"),
    "mobilevit": _image("MobileViT", image_size=128),
    "levit": _image("Levit", image_size=128),
    "poolformer": _image("PoolFormer", depths=[1, 1, 2, 1]),
    "cvt": _image("Cvt", depth=[1, 2, 4]),
    "wav2vec2": Architecture(
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        {
            "vocab_size": 32,
            "conv_dim": (256, 256, 256, 256),
            "conv_stride": (5, 4, 4, 2),
            "conv_kernel": (10, 8, 4, 4),
            "num_feat_extract_layers": 4,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            **_WIDE,
        },
        -8000,
    ),
}


def run(
    names: Sequence[str], folder: Path, results: Path, search: float, seconds: float, say: Callable[[str], None]
) -> Iterator[Mapping[str, Any]]:
    """Yield what came of each architecture, done now or read from ``results``, a line of JSON each.

    Args:
        names: Keys of `ARCHITECTURES`.
        folder: Where networks and bundles are made.
        results: It goes on from there.
        search: Time budget of a compilation, seconds.
        seconds: To measure the result beside the original in.
        say: Told what is being done.
    """
    lines = results.read_text().splitlines() if results.exists() else []
    done = {row["name"]: row for row in map(json.loads, lines)}
    for name in names:
        if name not in done:
            say(name)
            done[name] = _show(name, folder, search, seconds)
            results.parent.mkdir(parents=True, exist_ok=True)
            with results.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
        yield done[name]


def _show(name: str, folder: Path, search: float, seconds: float) -> dict[str, Any]:
    model = prepare(name, folder)
    dims = {"batch": 1, "seq": LENGTH} if _open_axes(model) == ["batch", "seq"] else {}
    output = folder / name / "ours" / "bundle"
    # What an earlier compilation left, its stages too, would make this one quick.
    shutil.rmtree(output.parent, ignore_errors=True)
    job = {"model": str(model.resolve()), "output": str(output.resolve()), "metric": "mean_cosine"}
    job |= {part: str((folder / name / f"{part}.npz").resolve()) for part in SAMPLES}
    job |= {"max_drop": MAX_DROP, "time_budget": search, "dims": [dims] if dims else []}
    file = folder / name / "job.json"
    file.write_text(json.dumps(job))
    seen = watched([sys.executable, "-m", "tests.studies.compile_one", str(file)])
    row: dict[str, Any] = {
        "name": name,
        "seconds": seen.seconds,
        "peak_bytes": seen.peak_bytes,
        "failure": seen.failure,
    }
    if seen.failure:
        return row
    manifest = json.loads((output / "manifest.json").read_text())
    certificate = manifest.get("certificate") or {}
    row |= {"passes": manifest.get("passes", ""), "reason": manifest.get("reason"), "bound": certificate.get("bound")}
    return row | _beside(model, output / "model.onnx", dims, folder / name, seconds)


def _beside(model: Path, made: Path, dims: Mapping[str, int], folder: Path, seconds: float) -> dict[str, Any]:
    """Return the speed of the result in a plain session, which is the original's where that came out."""
    feeds = folder / "feeds.npz"
    data = Samples((tensors.load_npz(folder / "data.npz"),))
    tensors.save_npz(feeds, tensors.random_feeds(model, dims) if dims else tensors.first_batch(model, data, 1))
    start = "onnx_lathe.runtime.session:start_plain"
    pair = {"original": model, "compiled": made}
    subjects = [Subject(name, start, {"model": str(file), "feeds": str(feeds)}) for name, file in pair.items()]
    found = measure(subjects, Effort(3, 4, 0.03, seconds, most_rounds=200))
    speed = asdict(found.speed("compiled"))
    return {"latency": found.timing("original").p50.value, **{key: speed[key] for key in ("speed", "verdict")}}


def prepare(name: str, folder: Path) -> Path:
    """Write an architecture and random data for it, unless they are there, and return the model."""
    architecture, model = ARCHITECTURES[name], folder / f"{name}.onnx"
    (folder / name).mkdir(parents=True, exist_ok=True)
    if not model.exists():
        network = architecture.build()
        seen = {key: torch.from_numpy(value) for key, value in architecture.feeds(8, JUDGED_LENGTH, 9).items()}
        settle_normalizations(network, seen)
        export(network, model, architecture.feeds(2, JUDGED_LENGTH, 0))
    for seed, (part, count) in enumerate(SAMPLES.items(), 1):
        target = folder / name / f"{part}.npz"
        if not target.exists():
            tensors.save_npz(target, architecture.feeds(count, JUDGED_LENGTH, seed))
    return model


def _open_axes(model: Path) -> list[str]:
    """Return the names of the axes of the first input that may have any size; none where torch bound them all."""
    shape = tensors.input_specs(loading.read_graph(model), str(model))[0].shape
    return [axis for axis in shape if isinstance(axis, str)]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the results as Markdown, and beneath them what the issue asks for."""
    lines = [
        "| architecture | form | speed | verdict | bound, points | original | seconds | peak memory |",
        "|---|---|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        took = f"{row['seconds']:.0f} | {row['peak_bytes'] / 1e6:.0f} MB |"
        if row["failure"]:
            lines.append(f"| {row['name']} | failed: {row['failure'].replace('|', '/')} | | | | | {took}")
            continue
        speed = row["speed"]
        bound = "" if row["bound"] is None else f"{100 * row['bound']:.2f}"
        form = f"`{row['passes'].replace('|', ', ')}`" if row["passes"] else "the original"
        shown = f"{speed['value']:.2f}x [{speed['low']:.2f}, {speed['high']:.2f}]"
        cells = (row["name"], form, shown, row["verdict"], bound, f"{1000 * row['latency']:.2f} ms")
        lines.append(f"| {' | '.join(cells)} | {took}")
    made = [row for row in rows if not row["failure"]]
    if made:
        verdicts = Counter(row["verdict"] for row in made)
        median = float(np.median([row["speed"]["value"] for row in made]))
        originals = sum(not row["passes"] for row in made)
        counted = ", ".join(f"{verdict} {count}" for verdict, count in sorted(verdicts.items()))
        lines += [
            "",
            f"{len(made)} of {len(rows)} compiled: {counted}; median {median:.2f}x; the original {originals} times.",
        ]
    return "\n".join(lines)
