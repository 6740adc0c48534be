"""The stages of a recipe before the search: trained, distilled, exported, pruned and recovered networks."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from onnx_lathe.benchmarks.proportions import wilson
from onnx_lathe.benchmarks.report.model import Curve, DistillationScore
from onnx_lathe.benchmarks.result import Interval
from onnx_lathe.benchmarks.stats import Vector, bca_bootstrap
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.converter.compile.explain import Story, edits
from onnx_lathe.converter.compile.forms import Candidate
from onnx_lathe.converter.compile.task import Parts, Rung, Task
from onnx_lathe.converter.data.sources import load_source
from onnx_lathe.converter.data.split import stratified
from onnx_lathe.converter.distill import distill
from onnx_lathe.converter.distributed import led
from onnx_lathe.converter.export import Exported, export
from onnx_lathe.converter.models.build import build, fold_batchnorm
from onnx_lathe.converter.objective import Classification, objective_for
from onnx_lathe.converter.progress import Progress
from onnx_lathe.converter.recipe import NetworkOptions, Recipe, StudentOptions, TeacherOptions
from onnx_lathe.converter.recover import recover
from onnx_lathe.converter.stages import Stage, run_stage
from onnx_lathe.converter.train import TrainingCurve, predict, train
from onnx_lathe.converter.weights import load_weights, save_weights
from onnx_lathe.passes import registry
from onnx_lathe.passes import run as passes_run
from onnx_lathe.passes.run import Applied
from onnx_lathe.runtime.samples import Samples

WEIGHTS = "weights.safetensors"
MODEL = "model.onnx"

_TRAINING_CODE = (
    "onnx_lathe.converter.train",
    "onnx_lathe.converter.batches",
    "onnx_lathe.converter.distributed",
    "onnx_lathe.converter.objective",
    "onnx_lathe.converter.distill",
    "onnx_lathe.converter.recover",
    "onnx_lathe.converter.models",
    "onnx_lathe.converter.data",
)
_EXPORT_CODE = ("onnx_lathe.converter.export", "onnx_lathe.converter.models")
_PASSES_CODE = ("onnx_lathe.passes", "onnx_lathe.runtime")


TORCH, TEACHER, STUDENT, PRUNED = "teacher in torch", "teacher", "student", "pruned student"
"""The rungs of the ladder, by the names that reports call them."""


class Chain:
    """The stages of one recipe; each is run when first asked for, or found done.

    Args:
        recipe: What to do.
        recipe_folder: Where the recipe lies; its paths are relative to it.
        folder: Where the stages keep their results.
        progress: Told what is being done.
    """

    def __init__(self, recipe: Recipe, recipe_folder: Path, folder: Path, progress: Progress) -> None:
        self.recipe = recipe
        self._recipe_folder = recipe_folder
        self._folder = folder
        self._progress = progress

    @cached_property
    def data(self) -> dict[str, Samples]:
        """The parts train, calibrate, select and test."""
        samples = load_source(self.recipe.data.source, self._recipe_folder)
        return stratified(samples, self.recipe.data, self.recipe.seed)

    @cached_property
    def teacher(self) -> Stage[TrainingCurve]:
        """Train the large network."""
        return self._train("teacher", self.recipe.teacher)

    @cached_property
    def student_alone(self) -> Stage[TrainingCurve]:
        """Train the small network on the labels alone: what distillation is compared with."""
        return self._train("student-alone", self.recipe.student)

    @cached_property
    def student(self) -> Stage[TrainingCurve]:
        """Train the small network from the large one."""
        options, seed, data = self.recipe.student, self.recipe.seed, self.data
        teacher = self.teacher

        def make(folder: Path) -> TrainingCurve:
            network = build(options, seed, self._recipe_folder)
            curve = distill(
                network,
                self._load(self.recipe.teacher, teacher),
                data["train"],
                data["select"],
                options.training,
                self.recipe.distillation,
                seed,
                strategy=self.recipe.distributed.strategy,
                checkpoint=folder / "checkpoint",
                progress=self._named("student"),
            )
            save_weights(network, folder / WEIGHTS)
            return curve

        depends = {
            "student": options.model_dump(),
            "distillation": self.recipe.distillation.model_dump(),
            "teacher": teacher.digest,
            **self._seen("train", "select"),
        }
        return run_stage(self._folder, "student", depends, _TRAINING_CODE, make, TrainingCurve, led)

    @cached_property
    def teacher_onnx(self) -> Stage[Exported]:
        """Export the teacher."""
        return self._export("export-teacher", self.recipe.teacher, self.teacher)

    @cached_property
    def student_onnx(self) -> Stage[Exported]:
        """Export the distilled student."""
        return self._export("export-student", self.recipe.student, self.student)

    @cached_property
    def pruned(self) -> Stage[tuple[Applied, ...]] | None:
        """Prune the exported student; None where the recipe does not prune."""
        if self.recipe.prune is None:
            return None
        student, calibrate = self.student_onnx, self.data["calibrate"]
        requests = registry.parse(self.recipe.prune.passes)

        def make(folder: Path) -> tuple[Applied, ...]:
            self._progress(0, 1, f"apply {registry.spell(requests)}")
            return passes_run.apply(student.folder / MODEL, requests, folder / MODEL, samples=calibrate)

        depends = {"model": student.digest, "passes": registry.spell(requests), **self._seen("calibrate")}
        return run_stage(self._folder, "prune", depends, _PASSES_CODE, make, tuple[Applied, ...])

    @cached_property
    def recovered(self) -> Stage[TrainingCurve] | None:
        """Train the pruned student again, the dense one teaching; None where the recipe does not."""
        pruned = self.pruned
        if pruned is None or self.recipe.prune is None or self.recipe.prune.recovery is None:
            return None
        student, exported, data = self.student, self.student_onnx, self.data
        options = self.recipe.prune.recovery

        def make(folder: Path) -> TrainingCurve:
            return recover(
                pruned.folder / MODEL,
                folder / MODEL,
                exported.value.parameters,
                network=fold_batchnorm(self._load(self.recipe.student, student)),
                teacher=self._load(self.recipe.teacher, self.teacher),
                samples=data["train"],
                evaluate_on=data["select"],
                options=options,
                distillation=self.recipe.distillation,
                seed=self.recipe.seed,
                checkpoint=folder / "checkpoint",
                progress=self._named("recovery"),
            )

        depends = {
            "pruned": pruned.digest,
            "student": student.digest,
            "teacher": self.teacher.digest,
            "recovery": options.model_dump(),
            "distillation": self.recipe.distillation.model_dump(),
            **self._seen("train", "select"),
        }
        return run_stage(self._folder, "recover", depends, _TRAINING_CODE, make, TrainingCurve)

    def task(self) -> Task:
        """Return the search over what the stages made: forms of the student, judged against the teacher."""
        options = self.recipe.compile
        teacher, student, small = self.teacher, self.student_onnx, self.recovered or self.pruned
        teacher_model, student_model = self.teacher_onnx.folder / MODEL, student.folder / MODEL
        rungs = [
            Rung(TORCH, subject=self._torch_subject(teacher)),
            Rung(STUDENT, student_model),
        ]
        candidates = [Candidate(STUDENT, student_model, "")]
        base, base_name = student_model, STUDENT
        if small is not None:
            base, base_name = small.folder / MODEL, PRUNED
            rungs.append(Rung(base_name, base))
            candidates.append(Candidate(base_name, base, ""))
        candidates += [Candidate(f"{base_name}, {passes}", base, passes) for passes in options.candidates]
        return Task(
            original=teacher_model,
            original_name=TEACHER,
            candidates=candidates,
            parts=Parts(self.data["calibrate"], self.data["select"], self.data["test"]),
            metric=options.metric,
            max_drop=options.max_drop,
            dims=(options.dims,),
            provider=options.provider,
            threads=options.threads,
            time_budget=options.time_budget,
            folder=self._folder,
            rungs=rungs,
        )

    def story(self, command: str) -> Story:
        """Return what the report tells besides the search."""
        curves = {
            TEACHER: self.teacher,
            "student alone": self.student_alone,
            "student distilled": self.student,
            "pruned student, recovering": self.recovered,
        }
        pruned = self.pruned
        return Story(
            title=self.recipe.name,
            command=command,
            curves=tuple(
                Curve(name, stage.value.loss, stage.value.score, "select")
                for name, stage in curves.items()
                if stage is not None
            ),
            distillation=self.distillation(),
            edits=edits(PRUNED, pruned.value) if pruned else (),
            notes={
                TORCH: "the large network, eager, BatchNorm folded, channels last",
                TEACHER: "the large network in onnxruntime, fp32",
                STUDENT: "distilled, fp32",
                PRUNED: "channels cut and weights recovered, fp32" if self.recovered else "channels cut, fp32",
            },
            source=STUDENT,
            manifest={"recipe": self.recipe.model_dump(mode="json")},
        )

    def distillation(self) -> tuple[DistillationScore, ...]:
        """Return what distilling gained over training the student alone, on select and on test."""
        stages = (
            (self.recipe.teacher, self.teacher),
            (self.recipe.student, self.student_alone),
            (self.recipe.student, self.student),
        )

        def make(folder: Path) -> tuple[DistillationScore, ...]:
            del folder
            networks = [self._load(options, stage) for options, stage in stages]
            return tuple(
                DistillationScore(part, *(_score_interval(network, self.data[part]) for network in networks))
                for part in ("select", "test")
            )

        depends = {"networks": [stage.digest for _, stage in stages], **self._seen("select", "test")}
        return run_stage(self._folder, "scores", depends, _TRAINING_CODE, make, tuple[DistillationScore, ...]).value

    def _train(self, name: str, options: TeacherOptions | StudentOptions) -> Stage[TrainingCurve]:
        seed, data = self.recipe.seed, self.data

        def make(folder: Path) -> TrainingCurve:
            network = build(options, seed, self._recipe_folder)
            curve = train(
                network,
                data["train"],
                data["select"],
                options.training,
                seed,
                strategy=self.recipe.distributed.strategy,
                checkpoint=folder / "checkpoint",
                progress=self._named(name),
            )
            save_weights(network, folder / WEIGHTS)
            return curve

        depends = {"network": options.model_dump(), "seed": seed, **self._seen("train", "select")}
        return run_stage(self._folder, name, depends, _TRAINING_CODE, make, TrainingCurve, led)

    def _export(self, name: str, options: NetworkOptions, trained: Stage[TrainingCurve]) -> Stage[Exported]:
        def make(folder: Path) -> Exported:
            self._progress(0, 1, name.replace("-", " "))
            network = fold_batchnorm(self._load(options, trained))
            return export(network, self.data["calibrate"].first(4).batches[0], folder / MODEL, self.recipe.export)

        depends = {"weights": trained.digest, "export": self.recipe.export.model_dump()}
        return run_stage(self._folder, name, depends, _EXPORT_CODE, make, Exported)

    def _load(self, options: NetworkOptions, trained: Stage[TrainingCurve]) -> torch.nn.Module:
        network = build(options, self.recipe.seed, self._recipe_folder)
        load_weights(network, trained.folder / WEIGHTS)
        return network.eval()

    def _torch_subject(self, trained: Stage[TrainingCurve]) -> Subject:
        arguments = {
            "options": {"network": self.recipe.teacher.network, "options": self.recipe.teacher.options},
            "weights": str(trained.folder / WEIGHTS),
            "threads": self.recipe.compile.threads,
            "folder": str(self._recipe_folder),
        }
        return Subject(TORCH, "onnx_lathe.converter.models.build:start", arguments)

    def _seen(self, *parts: str) -> dict[str, str]:
        return {part: self.data[part].digest() for part in parts}

    def _named(self, name: str) -> Progress:
        return lambda done, total, text: self._progress(done, total, f"{name}: {text}")


def _score_interval(network: torch.nn.Module, samples: Samples) -> Interval:
    objective, outputs = objective_for(samples), predict(network, samples)
    labels = objective.labels(samples)
    if isinstance(objective, Classification):
        return wilson(len(samples) - objective.errors(outputs, labels), len(samples))

    def score(indices: NDArray[np.int64]) -> Vector:
        chosen = labels[indices]
        return np.array([objective.score(objective.errors(outputs[indices], chosen), chosen)])

    (value,) = score(np.arange(len(samples)))
    low, high = bca_bootstrap(score, len(samples), (0.025, 0.975))[:, 0]
    return Interval(float(value), min(float(low), float(value)), max(float(high), float(value)))
