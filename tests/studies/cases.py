"""What the study of compile shows: networks, the shapes they run at, and which rivals stand beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.samples import Samples

_TRANSFORMER = ("ort-dynamic", "ort-optimizer-dynamic", "nncf-openvino")
_CONVOLUTION = ("ort-static", "nncf-openvino")
_MORE = ("nncf", "olive", "onnxsim")
_MORE_TRANSFORMER = (*_MORE, "optimum")


@dataclass(frozen=True)
class Network:
    """A network of the study.

    Attributes:
        name: Of its file, without the suffix.
        data: The set that it is calibrated and judged on, a key of `tests.studies.networks.SETS`.
        kind: What rivals are told that it is, with heads and width, as `rival_compilers.Kind` reads it; "" where there
            are convolutions.
        metric: What it is judged by.
        old_exporter: Whether it is exported by TorchScript, as most files on the web are.
    """

    name: str
    data: str
    kind: str = ""
    metric: str = "mean_cosine"
    old_exporter: bool = False


_MINILM, _BASE = "bert:12:384", "bert:12:768"
NETWORKS = {
    network.name: network
    for network in (
        Network("minilm", "text-64", _MINILM),
        Network("minilm-ts", "text-64", _MINILM, old_exporter=True),
        Network("minilm-sentences", "sentences", _MINILM),
        Network("sst2-encoder", "sentiment", _MINILM, metric="accuracy"),
        Network("bert-base", "text-32", _BASE),
        Network("gpt2", "tokens", "gpt2:12:768"),
        Network("vit-s", "images", "vit:6:384"),
        Network("resnet50", "images"),
        Network("mobilenetv2", "images"),
    )
}


@dataclass(frozen=True)
class Case:
    """A network at a shape.

    Attributes:
        network: A key of `NETWORKS`.
        dims: What `compile` is told to be fast at; without sizes it is batches of the data as they come.
        goal: Times plain onnxruntime in fp32, to reach on the CPU provider.
        provider_goal: The same with onnxruntime's OpenVINO provider; None where that is not tried.
        full: Whether every rival is there, and torch.compile; else onnxruntime's tools and OpenVINO with NNCF.
    """

    network: str
    dims: Mapping[str, int]
    goal: float
    provider_goal: float | None = None
    full: bool = False

    @property
    def title(self) -> str:
        """The case in words, and its key in the file of results."""
        return f"{self.network}, {' x '.join(map(str, self.dims.values())) or 'batches as they come'}"

    @property
    def tools(self) -> Sequence[str]:
        """The rivals' tools."""
        few, more = (_TRANSFORMER, _MORE_TRANSFORMER) if NETWORKS[self.network].kind else (_CONVOLUTION, _MORE)
        return (*few, *more) if self.full else few


def _text(batch: int, seq: int) -> Mapping[str, int]:
    return {"batch": batch, "seq": seq}


CASES = (
    Case("minilm", _text(8, 128), 3.0, 3.4, full=True),
    Case("minilm", _text(1, 128), 3.0),
    Case("minilm", _text(1, 32), 3.2),
    Case("minilm-ts", _text(8, 128), 3.0),
    Case("minilm-sentences", {}, 4.0),
    Case("sst2-encoder", {}, 4.0),
    Case("bert-base", _text(1, 128), 3.0),
    Case("bert-base", _text(8, 128), 3.0),
    Case("vit-s", {"batch": 1}, 2.8, full=True),
    Case("resnet50", {"batch": 1}, 3.1, 3.4, full=True),
    Case("mobilenetv2", {"batch": 1}, 2.3),
    Case("gpt2", _text(1, 128), 2.5),
)


@dataclass(frozen=True)
class Places:
    """Where things are.

    Attributes:
        folder: For what is made here.
        data: The parquet files of images and sentences.
        models: The trained networks.
        rivals: Folders ``tools``, ``olive``, ``optimum`` and ``provider``, each a virtual environment; what would run
            in one that is not there is left out.
    """

    folder: Path
    data: Path
    models: Path
    rivals: Path

    def interpreter(self, name: str) -> Path:
        """Return the Python of a virtual environment."""
        return self.rivals / name / "bin" / "python"

    def site(self, name: str) -> Path | None:
        """Return the packages of a virtual environment, where it is there."""
        return next((self.rivals / name).glob("lib/python*/site-packages"), None)

    def model(self, network: str) -> Path:
        """Return where a network lies."""
        return self.folder / f"{network}.onnx"


def part_folder(places: Places, network: Network, part: str) -> Path:
    """Return where the batches of a part lie."""
    return places.folder / "data" / network.data / part


def load(places: Places, network: Network, part: str) -> Samples:
    """Return a part of a network's data."""
    files = sorted(part_folder(places, network, part).glob("*.npz"))
    loaded = [tensors.load_npz(file) for file in files]
    labels = [arrays.pop("label") for arrays in map(dict, loaded) if "label" in arrays]
    batches = tuple({key: values for key, values in arrays.items() if key != "label"} for arrays in loaded)
    return Samples(batches, np.concatenate(labels) if labels else None, f"{network.data}/{part}")
