"""Distillation: a small network learns from the answers of a large one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from onnx_lathe.converter import distributed
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


def regression_distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """Return ``(1 - alpha) MSE(student, labels) + alpha MSE(student, teacher)``.

    Numbers are no distribution: there is no temperature.

    Args:
        student: ``[n]`` or ``[n, outputs]``.
        teacher: Of the same shape.
        labels: Of the same shape.
        alpha: 0 for the labels alone, 1 for the teacher alone.

    Returns:
        A ``float32`` scalar, computed in float32 whatever the outputs are.
    """
    hard, soft = (functional.mse_loss(student.float(), wanted.float()) for wanted in (labels, teacher))
    return (1.0 - alpha) * hard + alpha * soft


def distill(
    student: nn.Module,
    teacher: nn.Module,
    samples: Samples,
    evaluate_on: Samples,
    options: TrainingOptions,
    distillation: DistillationOptions,
    seed: int,
    *,
    strategy: distributed.Strategy = "ddp",
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> TrainingCurve:
    """Train ``student`` in place from the labels and the teacher, which sees the same augmented batches.

    By `distillation_loss`, or by `regression_distillation_loss` where the loss of the options is ``mse``. Arguments and
    errors are those of `onnx_lathe.converter.train.train`. On several processes with the strategy ``fsdp`` the teacher
    is sharded too, and stays so, its parameters without gradients.

    Raises:
        RecipeError: Teacher and student have not the same outputs.
    """
    few = samples.first(2)
    networks = {"teacher": teacher, "student": student}
    outputs = {name: list(predict(network, few).shape[1:]) for name, network in networks.items()}
    if outputs["teacher"] != outputs["student"]:
        raise RecipeError(
            "student.options",
            got=f"outputs of shape {outputs['student']} a sample",
            expected=f"{outputs['teacher']}, as the teacher has",
            mend="Give both networks the same outputs.",
        )
    distributed.frozen(teacher, strategy, options.precision)

    def loss(outputs: Tensor, labels: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            taught = teacher(*inputs)
        if options.loss == "mse":
            return regression_distillation_loss(outputs, taught, labels, distillation.alpha)
        return distillation_loss(
            outputs, taught, labels, distillation.temperature, distillation.alpha, options.label_smoothing
        )

    curve = train(
        student,
        samples,
        evaluate_on,
        options,
        seed,
        loss=loss,
        strategy=strategy,
        checkpoint=checkpoint,
        progress=progress,
    )
    if not distributed.is_sharded(teacher):
        teacher.cpu()
    return curve
