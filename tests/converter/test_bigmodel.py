"""The recipe of the large model, its sizes shrunk, through every stage but the measuring (see test_convert.py)."""

from pathlib import Path

import onnx
import pytest

from onnx_lathe.converter.chain import MODEL, Chain
from onnx_lathe.converter.compile.certify import Judge
from onnx_lathe.converter.progress import silent
from onnx_lathe.converter.recipe import load_recipe
from onnx_lathe.passes import registry, run
from onnx_lathe.runtime.facts import read_facts

RECIPE = Path(__file__).parents[2] / "recipes" / "bigmodel.toml"
SMALLER = {
    "samples=2000,inputs=1000,outputs=1000": "samples=300,inputs=16,outputs=16",
    "widths = [1000, 50000, 1000]": "widths = [16, 64, 16]",
    "widths = [1000, 2000, 1000]": "widths = [16, 64, 16]",
    "epochs = 20": "epochs = 6",
    "batch_size = 100": "batch_size = 8",
    "learning_rate = 5e-4": "learning_rate = 1e-2",
    "external_above_mb = 64": "external_above_mb = 0",
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Every stage of the shrunk recipe."""
    text = RECIPE.read_text()
    for large, small in SMALLER.items():
        assert large in text
        text = text.replace(large, small)
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "bigmodel.toml").write_text(text)
    return Chain(load_recipe(folder / "bigmodel.toml"), folder, folder / "work", silent)


def test_the_recipe_is_of_a_hundred_million_parameters() -> None:
    recipe = load_recipe(RECIPE)
    inputs, hidden, outputs = recipe.teacher.options["widths"]
    assert (inputs + outputs) * hidden + hidden + outputs > 100_000_000
    assert recipe.export.external_above_mb < 400


def test_weights_lie_beside_the_graph(chain: Chain) -> None:
    teacher = chain.teacher_onnx.folder / MODEL
    assert teacher.with_name(f"{MODEL}.data").stat().st_size >= 4 * 2 * 16 * 64
    graph = onnx.load(teacher, load_external_data=False).graph
    assert any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in graph.initializer)


def test_every_candidate_is_judged_by_r2(chain: Chain, tmp_path: Path) -> None:
    task = chain.task()
    assert task.parts is not None
    student, pruned = (read_facts(candidate.base).parameters for candidate in task.candidates[:2])
    assert pruned < 0.6 * student
    judge = Judge(task.original, task.parts.certify, task.metric, task.max_drop, task.provider, None)
    for number, candidate in enumerate(task.candidates):
        model = candidate.base
        if candidate.passes:
            model = tmp_path / f"{number}.onnx"
            run.apply(candidate.base, registry.parse(candidate.passes), model, samples=task.parts.calibrate)
        certificate = judge.certificate(judge.outputs(model))
        assert certificate.metric == "r2"
        assert 0.3 < certificate.candidate.low < certificate.candidate.value < certificate.original.value < 1.0
        assert certificate.drop < certificate.bound < 1.0
