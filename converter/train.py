"""Training a classifier, and judging it: AdamW, one cycle of the learning rate, resumed if interrupted."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from onnx_lathe.converter.progress import Progress, silent
from onnx_lathe.converter.recipe import TrainingOptions
from onnx_lathe.runtime.errors import ModelFileError, RecipeError, SamplesError, TrainingError
from onnx_lathe.runtime.samples import Array, Feeds, Samples
from onnx_lathe.runtime.staged import staged

Loss = Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor]
"""Of logits ``float32 [n, classes]``, labels ``int64 [n]`` and the network's inputs: a scalar to minimize."""

_EVALUATION_BATCH = 256


@dataclass(frozen=True)
class TrainingCurve:
    """How a training went, one value an epoch.

    Attributes:
        loss: Mean of the training loss over the epoch.
        accuracy: Share of correct answers on the samples that the training was judged on, after the epoch.
    """

    loss: tuple[float, ...]
    accuracy: tuple[float, ...]


def train(
    network: nn.Module,
    samples: Samples,
    evaluate_on: Samples,
    options: TrainingOptions,
    seed: int,
    *,
    loss: Loss | None = None,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> TrainingCurve:
    """Train ``network`` in place; afterwards it is in eval mode.

    AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with the one-cycle learning rate (Smith & Topin 2018,
    arXiv:1708.07120). Batches are drawn anew each epoch, nearly equal in size, none across two shapes. Equal
    arguments give equal weights on one machine with one number of threads, interrupted or not.

    Args:
        network: Takes the inputs of the samples in their order and returns logits ``float [n, classes]``.
        samples: What to train on, with a class for each.
        evaluate_on: What to judge each epoch on.
        options: How to train.
        seed: Of the order of the samples, their augmentation and dropout.
        loss: Instead of cross entropy with label smoothing.
        checkpoint: A file to keep the state in after each epoch, to go on from where there is one; removed at
            the end.
        progress: Told before each batch, and at the end.

    Raises:
        RecipeError: The network does not take the samples, or the options do not fit them.
        SamplesError: There are no class labels, or one lies outside the network's classes.
        TrainingError: The loss is not finite, or the checkpoint belongs to another training.
    """
    for part in (samples, evaluate_on):
        _check_fits(network, part, options)
    loss = loss or _cross_entropy(options.label_smoothing)
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]: torch's overloads lack this one
    groups = _groups(samples)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        steps = sum(_steps(len(labels), options.batch_size) for _, labels in groups)
        state = _State.create(network, options, seed, steps)
        if checkpoint is not None and checkpoint.exists():
            state.restore(checkpoint)
        while len(state.losses) < options.epochs:
            state.losses.append(_epoch(state, groups, loss, options, progress))
            state.accuracies.append(accuracy(network, evaluate_on))
            if checkpoint is not None:
                state.save(checkpoint)
    network.eval()
    progress(options.epochs * steps, options.epochs * steps, f"trained {options.epochs} epochs{_so_far(state)}")
    if checkpoint is not None:
        checkpoint.unlink()
    return TrainingCurve(tuple(state.losses), tuple(state.accuracies))


def predict(network: nn.Module, samples: Samples) -> Array:
    """Return the logits ``float32 [samples, classes]``; the network is in eval mode afterwards."""
    network.eval()
    with torch.inference_mode():
        logits = [network(*to_tensors(batch)).float().numpy() for batch in samples.iter_batches(_EVALUATION_BATCH)]
    return np.concatenate(logits)


def accuracy(network: nn.Module, samples: Samples) -> float:
    """Return the share (0..1) of samples whose largest logit is that of their label.

    Raises:
        SamplesError: There are no class labels.
    """
    return float((predict(network, samples).argmax(axis=1) == _classes(samples)).mean())


def save_weights(network: nn.Module, path: Path) -> None:
    """Write all parameters and buffers as safetensors, whole or not at all."""
    # Cloned, because safetensors refuses tensors that share memory, and strides other than the usual.
    state: dict[str, Tensor] = network.state_dict()
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    with staged(path) as part:
        safetensors.torch.save_file(copies, part)


def load_weights(network: nn.Module, path: Path) -> None:
    """Read what `save_weights` wrote into ``network``.

    Raises:
        ModelFileError: The file is missing, damaged, or holds the weights of another network.
    """
    try:
        network.load_state_dict(safetensors.torch.load_file(path))
    except FileNotFoundError:
        raise ModelFileError(
            str(path), got="no such file", expected="weights (safetensors)", mend="Check the path."
        ) from None
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ModelFileError(
            str(path),
            got=f"a file that does not load ({_summary(error)})",
            expected="the weights of this network",
            mend="Build the network with the options that the weights were trained with.",
        ) from error


def to_tensors(feeds: Feeds) -> tuple[Tensor, ...]:
    """Return the arrays as tensors in their order, images (4-D floats) in channels-last memory.

    Raises:
        SamplesError: An array holds strings.
    """
    for name, array in feeds.items():
        if array.dtype.kind in "OUS":
            raise SamplesError(
                name,
                got="strings",
                expected="numbers, which a network takes",
                mend="Convert the array to numbers.",
            )
    tensors = (torch.from_numpy(np.ascontiguousarray(array)) for array in feeds.values())
    return tuple(tensor.to(memory_format=torch.channels_last) if _is_image(tensor) else tensor for tensor in tensors)


Group = tuple[tuple[Tensor, ...], Tensor]
"""The inputs and labels of all samples of one shape."""


@dataclass
class _State:
    """Everything that a training goes on from: what a checkpoint holds."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    steps: int
    about: str
    losses: list[float] = field(default_factory=list[float])
    accuracies: list[float] = field(default_factory=list[float])

    @classmethod
    def create(cls, network: nn.Module, options: TrainingOptions, seed: int, steps: int) -> _State:
        learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learned, options.learning_rate, weight_decay=options.weight_decay)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, options.learning_rate, total_steps=options.epochs * steps
        )
        about = json.dumps({"seed": seed, "steps": steps, **options.model_dump()}, sort_keys=True)
        return cls(network, optimizer, scheduler, steps, about)

    def save(self, path: Path) -> None:
        content = {
            "about": self.about,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": torch.get_rng_state(),
            "losses": self.losses,
            "accuracies": self.accuracies,
        }
        with staged(path) as part:
            torch.save(content, part)

    def restore(self, path: Path) -> None:
        try:
            content: dict[str, Any] = torch.load(path, weights_only=True)
            if content["about"] != self.about:
                raise ValueError(f"that training had {content['about']}")
            self.network.load_state_dict(content["network"])
        except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise TrainingError(
                str(path),
                got=f"a checkpoint that this training cannot go on from ({_summary(error)})",
                expected=f"one of a training with {self.about}",
                mend="Delete the file to start afresh.",
            ) from error
        self.optimizer.load_state_dict(content["optimizer"])
        self.scheduler.load_state_dict(content["scheduler"])
        torch.set_rng_state(content["random"])
        self.losses, self.accuracies = content["losses"], content["accuracies"]


def _epoch(state: _State, groups: Sequence[Group], loss: Loss, options: TrainingOptions, progress: Progress) -> float:
    """Train one epoch and return the mean loss."""
    number, total = len(state.losses) + 1, 0.0
    text = f"epoch {number} of {options.epochs}" + _so_far(state)
    state.network.train()
    for step, (group, indices) in enumerate(_draw(groups, options.batch_size)):
        progress((number - 1) * state.steps + step, options.epochs * state.steps, text)
        inputs, labels = groups[group]
        inputs = tuple(shifted(tensor[indices], options.shift) for tensor in inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            logits = state.network(*inputs)
        value = loss(logits.float(), labels[indices], inputs)
        if not math.isfinite(value.item()):
            raise TrainingError(
                f"epoch {number}, batch {step + 1}",
                got=f"a loss of {value.item()}",
                expected="a finite loss",
                mend=f"Lower learning_rate (now {options.learning_rate:g})"
                + (", or train in fp32." if options.precision == "bf16" else "."),
            )
        state.optimizer.zero_grad()
        value.backward()
        state.optimizer.step()
        state.scheduler.step()
        total += value.item() * len(indices)
    return total / sum(len(labels) for _, labels in groups)


def shifted(images: Tensor, most: int) -> Tensor:
    """Move each image by up to ``most`` pixels along each axis, at random; its edge fills what that leaves.

    Args:
        images: ``[n, channels, height, width]``.
        most: 0 leaves them as they are.
    """
    if most == 0:
        return images
    count, _, height, width = images.shape
    moves = torch.randint(-most, most + 1, (2, count, 1))
    rows = (torch.arange(height) + moves[0]).clamp(0, height - 1)
    columns = (torch.arange(width) + moves[1]).clamp(0, width - 1)
    samples = torch.arange(count)[:, None, None]
    # Indexing around a slice puts the channels last: [n, height, width, channels].
    return images[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _draw(groups: Sequence[Group], size: int) -> list[tuple[int, Tensor]]:
    """Cut all samples at random into batches: the number of a group, and indices in it."""
    batches = [
        (number, indices)
        for number, (_, labels) in enumerate(groups)
        for indices in torch.randperm(len(labels)).tensor_split(_steps(len(labels), size))
    ]
    return [batches[int(index)] for index in torch.randperm(len(batches))]


def _steps(samples: int, size: int) -> int:
    return math.ceil(samples / size)


def _groups(samples: Samples) -> list[Group]:
    inputs = [to_tensors(batch) for batch in samples.batches]
    labels = np.split(_classes(samples).astype(np.int64), np.cumsum([len(first) for first, *_ in inputs])[:-1])
    return [(tensors, torch.from_numpy(part)) for tensors, part in zip(inputs, labels, strict=True)]


def _cross_entropy(label_smoothing: float) -> Loss:
    return lambda logits, labels, _: functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def _check_fits(network: nn.Module, samples: Samples, options: TrainingOptions) -> None:
    labels = _classes(samples)
    feeds = samples.first(2).batches[0]
    inputs = to_tensors(feeds)
    shapes = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in feeds.items())
    if options.shift and not all(_is_image(tensor) for tensor in inputs):
        raise RecipeError(
            "training.shift",
            got=f"{options.shift} with the inputs {shapes}",
            expected="images, float [n, channels, height, width]",
            mend="Leave shift at 0.",
        )
    network.eval()
    try:
        with torch.inference_mode():
            logits = network(*inputs)
    except (RuntimeError, TypeError) as error:
        raise RecipeError(
            "network",
            got=f"a network that does not take the samples ({_summary(error)})",
            expected=f"one that takes {shapes}",
            mend="Make the network's options fit the data.",
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise RecipeError(
            "network",
            got=f"an output {list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__}",
            expected="one tensor of logits [n, classes]",
            mend="Return the logits alone from forward.",
        )
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise RecipeError(
            "network",
            got="a network without weights to train",
            expected="at least one parameter that requires a gradient",
            mend="Choose another network.",
        )
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise SamplesError(
            f"{samples.source}: label",
            got=f"classes {labels.min()} to {labels.max()}",
            expected=f"0 to {logits.shape[1] - 1}: the network has {logits.shape[1]} classes",
            mend="Set the network's number of classes to that of the data.",
        )


def _classes(samples: Samples) -> Array:
    labels = samples.labels
    if labels is None or labels.dtype.kind not in "iu":
        raise SamplesError(
            f"{samples.source}: label",
            got="no labels" if labels is None else f"{labels.dtype} labels",
            expected="a class for each sample, as integers",
            mend="Add the classes as the array 'label'.",
        )
    return labels


def _is_image(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_floating_point()


def _so_far(state: _State) -> str:
    if not state.losses:
        return ""
    return f", loss {state.losses[-1]:.3f}, {100 * state.accuracies[-1]:.1f} % correct"


def _summary(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
