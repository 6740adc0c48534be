"""Recipes: what to train, distil, export, prune, quantize and measure, as TOML checked key by key."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from onnx_lathe.runtime.errors import RecipeError

Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataOptions(_Table):
    """Where the samples come from and how they are cut.

    ``source`` is ``digits`` (scikit-learn's), ``regression{samples=2000,inputs=1000,outputs=1000}`` (made by
    `onnx_lathe.converter.data.synthetic.Regression`), an ``.npz`` beside the recipe (arrays by input name and
    ``label``), or ``module:callable`` returning `onnx_lathe.runtime.samples.Samples`. What select and test leave is
    trained on; the first ``calibrate`` samples of that calibrate the quantization. The cut is stratified by class,
    where there are classes.
    """

    source: str
    select: Share = 0.28
    test: Share = 0.28
    calibrate: Count = 256

    @model_validator(mode="after")
    def _leaves_something(self) -> DataOptions:
        if self.select + self.test >= 0.9:
            raise ValueError(
                f"select + test must be under 0.9 to leave samples to train on, not {self.select + self.test:g}"
            )
        return self


class NetworkOptions(_Table):
    """A torch network: a name of `onnx_lathe.converter.models`, or ``module:callable``, and its keyword arguments."""

    network: str
    options: dict[str, Any] = {}


class TrainingOptions(_Table):
    """How a network is trained, the learning rate going through one cycle.

    ``cross_entropy`` takes a class for each sample, ``mse`` a number or several.
    """

    epochs: Count
    batch_size: Count = 64
    """Samples in a batch of all processes together."""
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    optimizer: Literal["adamw", "adam"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0.0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-2
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    shift: Annotated[int, Field(ge=0)] = 0
    """Augmentation: images are moved by up to this many pixels in each direction."""
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: bool = False
    """Activations inside the network's blocks are computed again for the backward pass: less memory, more time."""

    @model_validator(mode="after")
    def _smooths_classes(self) -> TrainingOptions:
        if self.loss == "mse" and self.label_smoothing:
            raise ValueError("label_smoothing must be 0 with loss 'mse', which knows no classes")
        return self


class DistributedOptions(_Table):
    """How several processes train one network, where torchrun starts them.

    ``ddp`` keeps the whole network on each, ``fsdp`` a part of every weight.
    """

    strategy: Literal["ddp", "fsdp"] = "ddp"


class TeacherOptions(NetworkOptions):
    """The large network, and how it is trained."""

    training: TrainingOptions


class StudentOptions(NetworkOptions):
    """The small network, and how it is trained: once alone, once distilled."""

    training: TrainingOptions


class DistillationOptions(_Table):
    """How much the teacher counts.

    Of classes: the loss ``(1 - alpha) CE + alpha T^2 KL(teacher_T || student_T)`` (Hinton et al. 2015,
    arXiv:1503.02531). Of numbers: ``(1 - alpha) MSE(labels) + alpha MSE(teacher)``, which has no temperature.
    """

    temperature: Annotated[float, Field(gt=0.0)] = 4.0
    alpha: Annotated[float, Field(ge=0.0, le=1.0)] = 0.9


class ExportOptions(_Table):
    """How a network becomes ONNX. ``tolerance`` is relative to the largest output."""

    opset: Annotated[int, Field(ge=18, le=23)] = 20
    input_names: tuple[str, ...] = ("image",)
    output_names: tuple[str, ...] = ("logits",)
    tolerance: Annotated[float, Field(gt=0.0)] = 1e-4
    external_above_mb: Annotated[float, Field(ge=0.0)] = 256.0


class PruneOptions(_Table):
    """The pruning pass as text, and the training that recovers from it: the dense student teaches the pruned one."""

    passes: str = "prune{ratio=0.3}"
    recovery: TrainingOptions | None = None


class CompileOptions(_Table):
    """What is measured, and what is allowed to be lost."""

    candidates: tuple[str, ...] = ("cleanup,quantize-static", "cleanup,quantize-dynamic")
    max_drop: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    metric: str = "accuracy"
    dims: dict[str, Count] = {"batch": 1}
    provider: str = "cpu"
    threads: Count | None = None
    time_budget: Annotated[float, Field(gt=0.0)] = 60.0
    """Seconds that the measurements may take."""


class Recipe(_Table):
    """A whole recipe."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataOptions
    teacher: TeacherOptions
    student: StudentOptions
    distillation: DistillationOptions = DistillationOptions()
    distributed: DistributedOptions = DistributedOptions()
    export: ExportOptions = ExportOptions()
    prune: PruneOptions | None = None
    compile: CompileOptions = CompileOptions()

    @model_validator(mode="after")
    def _has_one_loss(self) -> Recipe:
        recovery = self.prune.recovery if self.prune else None
        losses = [options.loss for options in (self.teacher.training, self.student.training, recovery) if options]
        if len(set(losses)) > 1:
            raise ValueError(f"every training must have the same loss, not {', '.join(losses)}")
        return self


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        RecipeError: The file is missing or not TOML, a key is missing or unknown, or a value is out of range.
    """
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except (FileNotFoundError, IsADirectoryError):
        raise RecipeError(
            str(path),
            got="no such file",
            expected="a recipe (TOML)",
            mend="Give the path of a recipe, such as recipes/digits.toml.",
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(
            str(path),
            got=f"not TOML ({error})",
            expected="a recipe in TOML",
            mend="Mend the syntax at that place.",
        ) from None
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise _explain(path, error) from None


def _explain(path: Path, error: ValidationError) -> RecipeError:
    """Turn pydantic's first complaint into an error that names the key and the mend."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    where = f"{path}: {'.'.join(location) or 'recipe'}"
    if first["type"] == "extra_forbidden":
        known = _keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        return RecipeError(
            where,
            got="an unknown key",
            expected=f"one of {', '.join(known)}",
            mend=f"Did you mean {near[0]!r}?" if near else "Remove the key.",
        )
    if first["type"] == "missing":
        return RecipeError(where, got="no such key", expected="a value", mend=f"Add {location[-1]!r} to the recipe.")
    expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return RecipeError(where, got=repr(first["input"]), expected=expected, mend="Change the value.")


def _keys(location: list[str]) -> list[str]:
    """Return the keys of the table at ``location``."""
    table: Any = Recipe
    for part in location:
        annotation = table.model_fields[part].annotation
        table = next((item for item in getattr(annotation, "__args__", ()) if item is not type(None)), annotation)
    return list(table.model_fields)
