"""Training a network, and judging it: Adam, one cycle of the learning rate, resumed if interrupted."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed  # pyright: ignore[reportUnknownVariableType]

from onnx_lathe.converter import distributed
from onnx_lathe.converter.batches import Group, draw, draw_moves, grouped, is_image, moved, steps, to_tensors
from onnx_lathe.converter.checkpoint import TrainingState
from onnx_lathe.converter.objective import Objective, objective_for, objective_of
from onnx_lathe.converter.progress import Progress, silent
from onnx_lathe.converter.recipe import TrainingOptions
from onnx_lathe.runtime.errors import RecipeError, TrainingError
from onnx_lathe.runtime.samples import Array, Feeds, Samples

Loss = Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor]
"""Of outputs ``float32``, labels and the network's inputs, samples along their first axes: the mean to minimize."""

_EVALUATION_BATCH = 256


@dataclass(frozen=True)
class TrainingCurve:
    """How a training went, one value an epoch.

    Attributes:
        loss: Mean of the training loss over the epoch.
        score: On the samples that the training was judged on, after the epoch, on 0..1: the share of correct classes,
            or R^2 of numbers (0 where negative).
    """

    loss: tuple[float, ...]
    score: tuple[float, ...]


def train(
    network: nn.Module,
    samples: Samples,
    evaluate_on: Samples,
    options: TrainingOptions,
    seed: int,
    *,
    loss: Loss | None = None,
    strategy: distributed.Strategy = "ddp",
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> TrainingCurve:
    """Train ``network`` in place; afterwards it is in eval mode.

    AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) or Adam (Kingma & Ba 2015, arXiv:1412.6980) with the one-cycle
    learning rate (Smith & Topin 2018, arXiv:1708.07120). Batches are drawn anew each epoch, nearly equal in size, none
    across two shapes. Equal arguments give equal weights on one machine with one number of threads, interrupted or not.

    On several processes (`onnx_lathe.converter.distributed.joined`) each takes its share of every batch and calls this
    with equal arguments, the network's weights included. But for rounding they do what one does; not so BatchNorm on
    CPUs, whose statistics are of a process's own share, and dropout, which each process draws for itself.

    Args:
        network: Takes the inputs of the samples in their order and returns logits ``float [n, classes]``, or, for the
            loss ``mse``, a tensor of the labels' shape.
        samples: What to train on, with a class for each, or numbers: ``float [n]`` or ``[n, outputs]``.
        evaluate_on: What to judge each epoch on.
        options: How to train.
        seed: Of the order of the samples, their augmentation and dropout.
        loss: Instead of that of the options.
        strategy: On several processes: ``ddp`` keeps the whole network on each, ``fsdp`` leaves it sharded.
        checkpoint: A folder to keep the state in after each epoch, to go on from where there is one; removed at
            the end.
        progress: Told before each batch, and at the end.

    Raises:
        RecipeError: The network does not take the samples, or the options do not fit them.
        SamplesError: There are no labels of the kind that the loss takes, or one lies outside the network's classes.
        TrainingError: The loss is not finite, or the checkpoint belongs to another training.
    """
    objective = objective_of(options)
    for part in (samples, evaluate_on):
        _check_fits(network, part, options, objective)
    groups = grouped(samples, objective.labels(samples))
    with _own_randomness(), _recomputing(network, options.recompute):
        training = _Training.start(network, groups, options, seed, strategy, progress)
        training.loss = loss or training.loss
        if checkpoint is not None:
            training.state.restore(checkpoint)
        while not training.done():
            training.run_epoch(evaluate_on)
            if checkpoint is not None:
                training.state.save(checkpoint)
    network.eval()
    if not distributed.is_sharded(network):
        network.cpu()
    training.tell(len(training.state.losses) * training.steps, f"trained {options.epochs} epochs")
    if checkpoint is not None:
        distributed.led(lambda: shutil.rmtree(checkpoint))
    return TrainingCurve(tuple(training.state.losses), tuple(training.state.scores))


def predict(network: nn.Module, samples: Samples) -> Array:
    """Return the outputs ``float32 [samples, ...]``; the network is in eval mode afterwards."""
    network.eval()
    return np.concatenate([_answers(network, batch) for batch in samples.iter_batches(_EVALUATION_BATCH)])


def score(network: nn.Module, samples: Samples) -> float:
    """Return the share (0..1) of samples whose largest logit is that of their class, or R^2 (0 where negative).

    Each process judges its share of the samples, and gets the score on all; the network is in eval mode afterwards.

    Raises:
        SamplesError: There are no labels.
    """
    network.eval()
    objective = objective_for(samples)
    labels = objective.labels(samples)
    errors, start = 0.0, 0
    for batch in samples.iter_batches(_EVALUATION_BATCH):
        size = len(next(iter(batch.values())))
        mine, counted = distributed.share(size)
        outputs = _answers(network, {name: array[mine] for name, array in batch.items()})
        errors += objective.errors(outputs[:counted], labels[start : start + size][mine][:counted])
        start += size
    return objective.score(distributed.total(errors), labels)


@dataclass
class _Training:
    """One training at work.

    Attributes:
        module: What is called instead of the network: it averages the gradients of the processes.
        state: What it goes on from.
        groups: The samples.
        loss: What is minimized.
        steps: Batches in an epoch.
    """

    module: nn.Module
    state: TrainingState
    groups: Sequence[Group]
    loss: Loss
    objective: Objective
    options: TrainingOptions
    seed: int
    steps: int
    progress: Progress

    @classmethod
    def start(
        cls,
        network: nn.Module,
        groups: Sequence[Group],
        options: TrainingOptions,
        seed: int,
        strategy: distributed.Strategy,
        progress: Progress,
    ) -> _Training:
        network.to(distributed.device())
        if strategy == "ddp":  # FSDP takes contiguous weights only
            network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]: torch's overloads lack it
        module = distributed.parallel(network, strategy, options.precision)
        each = sum(steps(len(labels), options.batch_size) for _, labels in groups)
        about = json.dumps({"seed": seed, "steps": each, **options.model_dump()}, sort_keys=True)
        objective = objective_of(options)
        # After sharding, because the optimizer learns the parts.
        optimizer = _optimizer(network, options)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, options.learning_rate, total_steps=options.epochs * each
        )
        state = TrainingState(network, optimizer, scheduler, about)
        training = cls(module, state, groups, _by_labels(objective), objective, options, seed, each, progress)
        if distributed.size() > 1 and distributed.device().type == "cpu" and distributed.batch_norms(network):
            training.tell(0, "BatchNorm on CPUs: each process takes the statistics of its own share")
        return training

    def tell(self, done: int, text: str) -> None:
        """Report the progress, and what was reached so far."""
        state = self.state
        if state.losses:
            text += f", loss {state.losses[-1]:.3f}, {self.objective.spell(state.scores[-1])}"
        self.progress(done, self.options.epochs * self.steps, text)

    def done(self) -> bool:
        """Return whether all epochs are behind."""
        return len(self.state.losses) >= self.options.epochs

    def run_epoch(self, evaluate_on: Samples) -> None:
        """Train one epoch and judge it.

        The epoch draws from its own seed: it is the same one whatever came before, and on any number of processes.
        """
        number, summed = len(self.state.losses) + 1, 0.0
        drawn = torch.Generator().manual_seed(_mixed(self.seed, number))
        torch.manual_seed(_mixed(self.seed, number, 1 + distributed.rank()))
        self.module.train()
        for step, (group, indices) in enumerate(draw(self.groups, self.options.batch_size, drawn)):
            self.tell((number - 1) * self.steps + step, f"epoch {number} of {self.options.epochs}")
            value = self._step(group, indices, drawn)
            if not math.isfinite(value):
                raise self._diverged(f"epoch {number}, batch {step + 1}", value)
            summed += value * len(indices)
        distributed.share_buffers(self.state.network)
        self.state.losses.append(summed / sum(len(labels) for _, labels in self.groups))
        self.state.scores.append(score(self.state.network, evaluate_on))

    def _step(self, group: int, indices: Tensor, drawn: torch.Generator) -> float:
        """Learn from one batch, this process from its share; return the mean loss of all of it.

        The gradient of the batch is the sum of the shares' gradients by the samples in each. Averaging over the
        processes divides by their number, which the factor of the loss makes good.
        """
        mine, counted = distributed.share(len(indices))
        inputs, labels = self.groups[group]
        parts = tuple(self._augmented(tensor, indices, mine, drawn) for tensor in inputs)
        wanted = labels[indices[mine]].to(distributed.device())
        lowered = self.options.precision == "bf16" and not distributed.is_sharded(self.state.network)
        with torch.autocast(distributed.device().type, torch.bfloat16, enabled=lowered):
            outputs = self.module(*parts)
        mean, weight = self.loss(outputs.float(), wanted, parts), counted / len(indices)
        value = distributed.total(mean.item() * weight)
        if math.isfinite(value):
            self.state.optimizer.zero_grad()
            (mean * (weight * distributed.size())).backward()
            self.state.optimizer.step()
            self.state.scheduler.step()
        return value

    def _augmented(self, inputs: Tensor, indices: Tensor, mine: slice, drawn: torch.Generator) -> Tensor:
        """Return this process's share of a batch; what is drawn, is drawn for the whole batch."""
        part, most = inputs[indices[mine]], self.options.shift
        if most:
            part = moved(part, draw_moves(len(indices), most, drawn)[mine])
        return part.to(distributed.device())

    def _diverged(self, where: str, value: float) -> TrainingError:
        return TrainingError(
            where,
            got=f"a loss of {value}",
            expected="a finite loss",
            mend=f"Lower learning_rate (now {self.options.learning_rate:g})"
            + (", or train in fp32." if self.options.precision == "bf16" else "."),
        )


def _optimizer(network: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    rule = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[options.optimizer]
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    # Fused: of 100 million parameters a step takes a quarter of the time that it takes torch's default on CPUs.
    return rule(learned, options.learning_rate, weight_decay=options.weight_decay, fused=True)


def _by_labels(objective: Objective) -> Loss:
    return lambda outputs, labels, _: objective.loss(outputs, labels)


def _mixed(*numbers: int) -> int:
    """Return a seed that depends on all the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def _own_randomness() -> Generator[None]:
    """Leave torch's random numbers as they were."""
    place = distributed.device()
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        yield


@contextmanager
def _recomputing(network: nn.Module, wanted: bool) -> Generator[None]:
    """Keep no activations inside the network's blocks for the backward pass, but compute them again."""
    # A block that stands at two places is one.
    chosen = list(dict.fromkeys(distributed.blocks(network))) if wanted else []
    for block in chosen:
        block.forward = functools.partial(recomputed, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in chosen:
            del block.forward


def _answers(network: nn.Module, batch: Feeds) -> Array:
    place = next((parameter.device for parameter in network.parameters()), None)
    # Not inference_mode, whose tensors FSDP could not train with afterwards.
    with torch.no_grad():
        return network(*(tensor.to(place) for tensor in to_tensors(batch))).float().cpu().numpy()


def _check_fits(network: nn.Module, samples: Samples, options: TrainingOptions, objective: Objective) -> None:
    objective.labels(samples)
    feeds = samples.first(2).batches[0]
    inputs = to_tensors(feeds)
    shapes = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in feeds.items())
    if options.shift and not all(is_image(tensor) for tensor in inputs):
        raise RecipeError(
            "training.shift",
            got=f"{options.shift} with the inputs {shapes}",
            expected="images, float [n, channels, height, width]",
            mend="Leave shift at 0.",
        )
    network.eval()
    try:
        with torch.inference_mode():
            outputs = network(*inputs)
    except (RuntimeError, TypeError) as error:
        raise RecipeError(
            "network",
            got=f"a network that does not take the samples ({(str(error).splitlines() or [type(error).__name__])[0]})",
            expected=f"one that takes {shapes}",
            mend="Make the network's options fit the data.",
        ) from error
    objective.check(samples, outputs)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise RecipeError(
            "network",
            got="a network without weights to train",
            expected="at least one parameter that requires a gradient",
            mend="Choose another network.",
        )
