"""The main job: a recipe goes in, a bundle comes out. Also its torch stages alone."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_lathe.converter.compile.compile import Compiled, ship
from onnx_lathe.converter.compile.home import at_home
from onnx_lathe.converter.compile.search import search
from onnx_lathe.converter.launch import leads
from onnx_lathe.converter.progress import Progress, silent
from onnx_lathe.converter.recipe import load_recipe
from onnx_lathe.converter.stages import locked, work_folder
from onnx_lathe.passes import registry
from onnx_lathe.runtime.bundle import check_replaceable
from onnx_lathe.runtime.extras import require

if TYPE_CHECKING:
    from onnx_lathe.converter.chain import Chain


def convert(recipe: Path, output: Path | None = None, *, progress: Progress = silent) -> Compiled:
    """Train, distil, export, prune, quantize and measure what a recipe says, and write the bundle with its report.

    Stages whose inputs did not change since the last run are skipped; after an interruption the next run goes on.

    Args:
        recipe: A recipe file.
        output: The folder of the bundle; None for ``out/NAME``.
        progress: Told what is being done.

    Raises:
        RecipeError: The recipe is wrong, and where.
        PassSpecError: It names an unknown pass or option.
        BundleError: Something other than a bundle lies at ``output``.
        TrainingError: A loss is not finite.
        OracleError: An export or a pass computed something else than it must.
    """
    with _chain(recipe, output, progress) as (target, chain):
        story, task = chain.story(f"lathe convert {recipe}"), chain.task()
        with task.cache.in_use():
            task = at_home(task)
            return ship(task, search(task, progress), target, story)


def train(recipe: Path, output: Path | None = None, *, progress: Progress = silent) -> dict[str, Any]:
    """Train the teacher of a recipe and the student alone; return their weight files, losses and scores on select.

    Started by torchrun, all processes train together (docs/training.md).
    """
    return _stage_alone(recipe, output, progress, lambda chain: [chain.teacher, chain.student_alone])


def distill(recipe: Path, output: Path | None = None, *, progress: Progress = silent) -> dict[str, Any]:
    """Train the student of a recipe from its teacher; return its weight file, losses and scores on select.

    Started by torchrun, all processes train together (docs/training.md).
    """
    return _stage_alone(recipe, output, progress, lambda chain: [chain.student])


def export(recipe: Path, output: Path | None = None, *, progress: Progress = silent) -> dict[str, Any]:
    """Export the teacher and the distilled student of a recipe; return the model files."""
    return _stage_alone(recipe, output, progress, lambda chain: [chain.teacher_onnx, chain.student_onnx])


def _stage_alone(
    recipe: Path, output: Path | None, progress: Progress, run: Callable[[Chain], list[Any]]
) -> dict[str, Any]:
    with _chain(recipe, output, progress) as (_, chain):
        return {
            stage.name: {"folder": str(stage.folder), "skipped": stage.skipped, "result": stage.value}
            for stage in run(chain)
        }


@contextmanager
def _chain(recipe: Path, output: Path | None, progress: Progress) -> Generator[tuple[Path, Chain]]:
    options = load_recipe(recipe)
    require("torch", "safetensors", extra="train")
    from onnx_lathe.converter.chain import Chain
    from onnx_lathe.converter.distributed import joined

    for passes in (*options.compile.candidates, *([options.prune.passes] if options.prune else [])):
        registry.parse(passes)
    target = output or Path("out") / options.name
    check_replaceable(target)
    work = work_folder(target)
    with joined(), locked(work) if leads() else nullcontext():
        yield target, Chain(options, recipe.parent, work, progress)
