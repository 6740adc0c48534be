"""Export a MobileNetV2 and images to judge it on: `python examples/mobilenet.py out/mobilenet`.

The weights are random (nothing is downloaded), so its speed is that of the real one and its answers mean nothing:
agreement with the original is what can be judged. The images are crops of scikit-learn's two photographs. Then:

    lathe compile out/mobilenet/model.onnx --data out/mobilenet/images.npz --metric mean_cosine --max-drop 0.05 \
        --time-budget 60 -o out/mobilenet-int8
"""

import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

SIZE, COUNT = 224, 240


class Classifier(torch.nn.Module):
    """Images ``float32 [batch, 3, 224, 224]`` to logits ``float32 [batch, 1000]``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1000))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network(pixel_values=image).logits


def images() -> np.ndarray:
    """Return crops of 224 x 224 pixels, standardized."""
    photographs = load_sample_images().images
    rng = np.random.default_rng(0)
    crops = []
    for number in range(COUNT):
        photograph = photographs[number % len(photographs)]
        top, left = (rng.integers(0, length - SIZE) for length in photograph.shape[:2])
        crops.append(photograph[top : top + SIZE, left : left + SIZE])
    return ((np.stack(crops).transpose(0, 3, 1, 2) - 127.5) / 127.5).astype(np.float32)


def settle(network: torch.nn.Module, batch: torch.Tensor) -> None:
    """Give BatchNorm the statistics of real images: without them the signal of random weights dies out."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network.train()(batch)
    network.eval()


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    batch = images()
    np.savez(folder / "images.npz", image=batch)
    classifier = Classifier()
    settle(classifier, torch.from_numpy(batch[:32]))
    torch.onnx.export(
        classifier,
        (torch.from_numpy(batch[:2]),),
        folder / "model.onnx",
        dynamo=True,
        external_data=False,
        opset_version=20,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
