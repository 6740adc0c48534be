"""Explanations whose weights are known, of models small enough to see through."""

import importlib.util
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lathe.converter import attribute as module
from onnx_lathe.converter.attribute import Attribution, attribute
from onnx_lathe.converter.attribution.explainers import explain
from onnx_lathe.converter.attribution.features import Explained, Tokens, channel_axis, explained, mean_sample
from onnx_lathe.converter.cli import main as cli
from onnx_lathe.runtime.errors import DependencyError, InputError, SamplesError, TensorError
from onnx_lathe.runtime.samples import Samples
from onnx_lathe.runtime.tensors import TensorSpec
from tests import graphs

LINEAR = """
linear (float[batch, 12] x) => (float[batch, 3] y) <float[12, 3] w> { y = MatMul(x, w) }
"""
IMAGE = """
image (float[batch, 3, 12, 12] x) => (float[batch, 4] y) <float[432, 4] w>
{ flat = Flatten(x)  straight = MatMul(flat, w)  y = Relu(straight) }
"""
TEXT = """
text (int64[batch, seq] ids, int64[batch, seq] attention_mask) => (float[batch, 2] logits)
<float[50, 2] table, int64[1] last = {-1}, int64[1] along = {1}>
{
  rows = Gather(table, ids)
  wide = Cast<to = 1>(attention_mask)
  open = Unsqueeze(wide, last)
  seen = Mul(rows, open)
  logits = ReduceSum<keepdims = 0>(seen, along)
}
"""
FIXED = """
fixed (float[4, 12] x) => (float[4, 3] y) <float[12, 3] w> { y = MatMul(x, w) }
"""


def write(folder: Path, text: str, name: str = "model", seed: int = 0) -> Path:
    return graphs.save(graphs.build(text, seed), folder / f"{name}.onnx")


def weights_of(path: Path, name: str = "w") -> np.ndarray:
    tensors = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    return onnx.numpy_helper.to_array(tensors[name])


def vectors(count: int = 8) -> Samples:
    return Samples(({"x": np.random.default_rng(0).normal(size=(count, 12)).astype(np.float32)},))


def images(count: int = 6) -> Samples:
    return Samples(({"x": np.random.default_rng(0).normal(size=(count, 3, 12, 12)).astype(np.float32)},))


def texts() -> Samples:
    """Return sentences of three to eight tokens, padded to nine."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 9, 8)
    mask = (np.arange(9) < lengths[:, None]).astype(np.int64)
    return Samples(({"ids": rng.integers(1, 50, (8, 9)) * mask, "attention_mask": mask},))


def ranks(found: Attribution) -> dict[str, float]:
    return {each.method: each.between.rank_correlation.value for each in found.methods}


@pytest.mark.parametrize("method", ["lime", "kernel-shap", "occlusion"])
def test_a_sum_is_explained_by_its_parts(method: str) -> None:
    parts = np.array([3.0, -2.0, 0.5, 0.0, 1.0])

    def score(kept: np.ndarray) -> np.ndarray:
        assert kept.dtype == bool
        return kept @ parts + 7.0

    found = explain(method, score, 5, evaluations=400, batch=32, seed=0)
    # The ridge of LIME pulls its weights towards zero; the others are exact.
    assert found == pytest.approx(parts, abs=0.1 if method == "lime" else 1e-4)
    again = explain(method, score, 5, evaluations=400, batch=7, seed=0)
    assert again == pytest.approx(found, abs=1e-6)


def test_drawing_leaves_the_generator_of_torch_alone() -> None:
    import torch

    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    explain("lime", lambda kept: kept[:, 0].astype(float), 4, evaluations=20, batch=8, seed=0)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize(("text", "data"), [(LINEAR, vectors()), (IMAGE, images()), (TEXT, texts())])
def test_a_model_agrees_with_itself_exactly(text: str, data: Samples, tmp_path: Path) -> None:
    model = write(tmp_path, text)
    found = attribute(model, model, data, samples=4, evaluations=60)
    assert ranks(found) == {"lime": 1.0, "kernel-shap": 1.0, "occlusion": 1.0}
    for each in found.methods:
        assert each.between.top_overlap.low == each.between.sign_agreement.low == 1.0
        assert not each.differs
    assert found == attribute(model, model, data, samples=4, evaluations=60)
    assert found.indices != attribute(model, model, data, samples=4, evaluations=60, seed=1).indices


def test_models_that_answer_for_other_reasons_differ(tmp_path: Path) -> None:
    a, b = write(tmp_path, LINEAR, "a"), write(tmp_path, LINEAR, "b", seed=1)
    found = attribute(a, b, vectors(), samples=8, evaluations=100)
    assert all(each.differs for each in found.methods)
    # Of a linear model KernelSHAP finds the same weights whatever it draws.
    shap = next(each for each in found.methods if each.method == "kernel-shap")
    assert shap.floor.rank_correlation.low == 1.0
    assert "kernel-shap: B's explanations differ from A's by more than the noise floor" in shap.sentence


def test_what_is_explained_is_the_class_that_a_answers(tmp_path: Path) -> None:
    model = write(tmp_path, LINEAR)
    data = vectors()
    found = attribute(model, model, data, methods=["occlusion"], samples=3, evaluations=20)
    answers = (data.batches[0]["x"] @ weights_of(model)).argmax(axis=1)
    assert found.targets == tuple(answers[list(found.indices)].tolist())
    fixed = attribute(model, model, data, methods=["occlusion"], samples=3, evaluations=20, target=2)
    assert fixed.targets == (2, 2, 2)


def test_a_fixed_batch_is_filled(tmp_path: Path) -> None:
    open_, fixed = write(tmp_path, LINEAR, "open"), write(tmp_path, FIXED, "fixed")
    found = attribute(fixed, fixed, vectors(), samples=3, evaluations=30)
    wanted = attribute(open_, open_, vectors(), samples=3, evaluations=30)
    assert found.targets == wanted.targets
    assert ranks(found) == ranks(wanted)


def one(samples: Samples, specs: list[TensorSpec], name: str, tokens: Tokens | None = None) -> Explained:
    return explained(samples, 0, specs, name, tokens or Tokens(), partial(mean_sample, samples, name))


def spec(name: str, shape: tuple[int | str, ...], dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name, np.dtype(dtype), shape)


def test_padding_special_and_baseline_tokens_are_no_features() -> None:
    ids = np.array([[1, 7, 8, 0, 9, 2, 5, 5]])
    mask = np.array([[1, 1, 1, 1, 1, 1, 0, 0]])
    types = np.array([[0, 0, 0, 0, 0, 0, 1, 1]])
    data = Samples(({"ids": ids, "attention_mask": mask, "token_type_ids": types},))
    specs = [spec(name, ("b", "s"), "int64") for name in ("ids", "attention_mask", "token_type_ids")]
    sample = one(data, specs, "ids", Tokens(0, frozenset({1, 2})))
    assert sample.labels == ("7", "8", "9")
    assert sample.groups.tolist() == [-1, 0, 1, -1, 2, -1]  # the padding is cut off
    batch = sample.without(np.array([[True, False, True], [False, False, False]]))
    assert batch["ids"].tolist() == [[1, 7, 0, 0, 9, 2], [1, 0, 0, 0, 0, 2]]
    assert batch["ids"].dtype == ids.dtype
    assert batch["attention_mask"].tolist() == [[1] * 6] * 2
    assert batch["token_type_ids"].tolist() == [[0] * 6] * 2
    fixed = [spec(name, ("b", 8), "int64") for name in ("ids", "attention_mask", "token_type_ids")]
    assert one(data, fixed, "ids").groups.tolist() == [0, 1, 2, -1, 3, 4, -1, -1]


@pytest.mark.parametrize(("shape", "axis"), [((3, 12, 12), 0), ((12, 12, 3), 2), ((12, 12), None), ((12, 13, 12), 0)])
def test_an_image_is_cut_into_patches_over_all_channels(shape: tuple[int, ...], axis: int | None) -> None:
    data = Samples(({"x": np.random.default_rng(0).normal(2.0, 1.0, (5, *shape)).astype(np.float32)},))
    sample = one(data, [spec("x", ("b", *shape))], "x")
    assert channel_axis(shape) == axis
    assert sample.kind == "image"
    assert sample.groups.shape == shape
    assert len(sample.labels) == len(np.unique(sample.groups)) == 36
    nothing = sample.without(np.zeros((1, 36), bool))["x"][0]
    mean = data.batches[0]["x"].mean(axis=tuple(a for a in range(len(shape) + 1) if axis is None or a != axis + 1))
    assert np.unique(nothing) == pytest.approx(np.sort(np.unique(mean)), rel=1e-5)
    np.testing.assert_array_equal(sample.without(np.ones((1, 36), bool))["x"][0], data.batches[0]["x"][0])


def test_a_wide_vector_is_cut_into_blocks() -> None:
    data = Samples(({"x": np.arange(400, dtype=np.float32).reshape(2, 200)},))
    sample = one(data, [spec("x", ("b", 200))], "x")
    assert len(sample.labels) == 64
    assert sample.labels[:2] == ("0 to 3", "4 to 6")
    assert sample.without(np.zeros((1, 64), bool))["x"][0] == pytest.approx(data.batches[0]["x"].mean(axis=0))


def test_the_page_shows_the_samples_and_loads_nothing(tmp_path: Path) -> None:
    a, b = write(tmp_path, IMAGE, "a"), write(tmp_path, IMAGE, "b", seed=1)
    attribute(a, b, images(), samples=3, evaluations=60, output=tmp_path / "images.html")
    page = (tmp_path / "images.html").read_text("utf-8")
    assert len(re.findall(r'<img alt="[^"]+" src="data:image/png;base64,iVBORw', page)) == 3 * (1 + 3 * 2)
    assert page.count("rank correlation: lime") == 3
    assert not re.search(r"https?:|(src|href)=(?!.data:)", page)
    a, b = write(tmp_path, TEXT, "a"), write(tmp_path, TEXT, "b", seed=1)
    attribute(a, b, texts(), samples=3, evaluations=60, output=tmp_path / "text.html")
    page = (tmp_path / "text.html").read_text("utf-8")
    assert page.count('class="mark"') > 3 * 3 * 2 * 2
    assert "<img" not in page


def test_a_tokenizer_shows_tokens_as_text(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = Tokenizer(WordLevel({f"word{number}": number for number in range(50)}, unk_token="word0"))
    tokenizer.add_special_tokens([AddedToken("[CLS]", special=True), AddedToken("[MASK]", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = write(tmp_path, TEXT.replace("float[50, 2]", "float[52, 2]"))
    with_special = texts()
    with_special.batches[0]["ids"][:, 0] = 50
    found = attribute(
        model, model, with_special, samples=3, evaluations=40, tokenizer=tmp_path, output=tmp_path / "page.html"
    )
    page = (tmp_path / "page.html").read_text("utf-8")
    assert re.search(r'class="mark"[^>]*>word\d+<', page)
    assert "[CLS]" not in page
    lengths = with_special.batches[0]["attention_mask"].sum(axis=1)
    assert found.features == tuple((lengths[list(found.indices)] - 1).tolist())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"methods": ["limes"]}, InputError, "--method: got 'limes', expected one of lime, kernel-shap, occlusion"),
        ({"evaluations": 10}, InputError, "--evaluations: got 10, expected at least 14: a sample has 12 features"),
        ({"target": 3}, InputError, "--target: got 3, expected 0 to 2, a component of 'y'"),
        ({"input_name": "z"}, TensorError, "input 'z': got an unknown input, expected one of x"),
        ({"data": vectors(1)}, SamplesError, "got 1 of 1 samples with at least 3 features, expected at least two"),
        ({"data": images()}, TensorError, r"input 'x': got shape \[1, 3, 12, 12\]"),
        ({"output": Path()}, InputError, "--output: got ., a folder, expected a file"),
        ({"tokenizer": Path("none.json")}, InputError, "none.json: got no such file, expected a tokenizer.json"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    model = write(tmp_path, LINEAR)
    with pytest.raises(error, match=message):
        attribute(model, model, **{"data": vectors(), "samples": 2, "output": tmp_path / "page.html", **options})
    assert not (tmp_path / "page.html").exists()


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    model = write(tmp_path, TEXT)
    with pytest.raises(InputError, match=r"tokenizer.json: got a tokenizer that cannot be read"):
        attribute(model, model, texts(), tokenizer=tmp_path)


TWO = "two (float[b, 4] p, float[b, 4] q) => (float[b, 4] y) { y = Add(p, q) }"
STRINGS = """strings (string[b, 4] s) => (float[b, 4] y) { same = Equal(s, s)  y = Cast<to = 1>(same) }"""
MAP = "map (float[b, 4] p) => (float[b, 4, 1] y) <int64[1] axis = {2}> { y = Unsqueeze(p, axis) }"
ENDLESS = "endless (float[b, 4] p) => (float[b, 4] y) { none = Sub(p, p)  y = Div(p, none) }"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (TWO, InputError, "--input: got no name, and 2 inputs that could be explained: p, q, expected one of p, q"),
        (STRINGS, TensorError, "input 's': got text, expected numbers"),
        (
            MAP,
            TensorError,
            r"outputs: got y float32 \[4, 1\] for a sample, expected a float number, or a row of scores",
        ),
        (ENDLESS, TensorError, "output 'y': got NaN or infinity for sample"),
    ],
)
def test_models_that_cannot_be_explained(text: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    model = write(tmp_path, text)
    p = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    arrays = {"p": p, "q": p, "s": np.full((4, 4), "a", dtype=object)}
    names = [value.name for value in onnx.load(model).graph.input]
    with pytest.raises(error, match=message):
        attribute(model, model, Samples(({name: arrays[name] for name in names},)))


def test_the_input_to_explain_may_be_named(tmp_path: Path) -> None:
    model = write(tmp_path, TWO)
    p = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    found = attribute(model, model, Samples(({"p": p, "q": p},)), input_name="q", evaluations=20)
    assert (found.input, found.kind, found.features) == ("q", "entries", (4, 4, 4, 4))


def test_models_of_other_shape_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path, LINEAR, "a")
    b = write(tmp_path, LINEAR.replace(" y)", " z)").replace("y =", "z ="), "b")
    with pytest.raises(TensorError, match=r"b.onnx: outputs: got z float32, expected y float32, as .*a.onnx has"):
        attribute(a, b, vectors())


def test_without_captum_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "captum" else find(name))
    model = write(tmp_path, LINEAR)
    with pytest.raises(
        DependencyError, match=r'captum: got a package that is not installed.*"onnx-lathe\[attribute\]"'
    ):
        attribute(model, model, vectors())


def test_the_command_tells_figures_and_writes_the_page(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = write(tmp_path, LINEAR, "a"), write(tmp_path, LINEAR, "b", seed=1)
    np.savez(tmp_path / "data.npz", **vectors().batches[0])
    page = tmp_path / "page.html"
    arguments = ["attribute", a, b, "--data", tmp_path / "data.npz", "--samples", 3, "--evaluations", 30, "-o", page]
    monkeypatch.setattr(sys, "argv", ["lathe", *map(str, [*arguments, "--method", "lime", "--method", "occlusion"])])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert result["schema"] == "onnx-lathe/attribute/1"
    assert [each["method"] for each in result["methods"]] == ["lime", "occlusion"]
    assert set(result["methods"][0]["between"]) == {"rank_correlation", "top_overlap", "sign_agreement"}
    assert len(result["methods"][0]["by_sample"]) == len(result["indices"]) == 3
    assert "noise floor" in printed.err
    assert page.is_file()
    assert module.METHODS == ("lime", "kernel-shap", "occlusion")
