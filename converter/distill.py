"""Distillation: a small network learns from the answers of a large one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from onnx_lathe.converter.progress import Progress, silent
from onnx_lathe.converter.recipe import DistillationOptions, TrainingOptions
from onnx_lathe.converter.train import TrainingCurve, predict, train
from onnx_lathe.runtime.errors import RecipeError
from onnx_lathe.runtime.samples import Samples


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return ``(1 - alpha) CE(student, labels) + alpha T^2 KL(p_T teacher || p_T student)``.

    A mean over the batch, with ``p_T = softmax(logits / T)``. The factor T^2 keeps the two parts in
    proportion, since the gradient of the second falls as 1/T^2 (Hinton et al. 2015, arXiv:1503.02531, section
    2 and equation 4).

    Args:
        student_logits: ``[n, classes]``.
        teacher_logits: ``[n, classes]``.
        labels: ``int64 [n]``.
        temperature: T > 0.
        alpha: 0 for the labels alone, 1 for the teacher alone.
        label_smoothing: Of the cross entropy.

    Returns:
        A ``float32`` scalar, computed in float32 whatever the logits are.
    """
    student, teacher = student_logits.float(), teacher_logits.float()
    hard = functional.cross_entropy(student, labels, label_smoothing=label_smoothing)
    soft = functional.kl_div(
        functional.log_softmax(student / temperature, dim=1),
        functional.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return (1.0 - alpha) * hard + alpha * temperature**2 * soft


def distill(
    student: nn.Module,
    teacher: nn.Module,
    samples: Samples,
    evaluate_on: Samples,
    options: TrainingOptions,
    distillation: DistillationOptions,
    seed: int,
    *,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> TrainingCurve:
    """Train ``student`` in place by `distillation_loss`; the teacher sees the same augmented batches.

    Arguments and errors are those of `onnx_lathe.converter.train.train`.

    Raises:
        RecipeError: Teacher and student have not the same classes.
    """
    few = samples.first(2)
    classes = {name: predict(network, few).shape[1] for name, network in (("teacher", teacher), ("student", student))}
    if classes["teacher"] != classes["student"]:
        raise RecipeError(
            "student.options",
            got=f"{classes['student']} classes",
            expected=f"{classes['teacher']}, as the teacher has",
            mend="Give both networks the same classes.",
        )
    teacher.eval()

    def loss(logits: Tensor, labels: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            taught = teacher(*inputs)
        return distillation_loss(
            logits, taught, labels, distillation.temperature, distillation.alpha, options.label_smoothing
        )

    return train(student, samples, evaluate_on, options, seed, loss=loss, checkpoint=checkpoint, progress=progress)
