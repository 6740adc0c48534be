"""Ranges as a file: written, read, edited, and refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.quantize.insert_qdq import InsertQDQ
from onnx_lathe.passes.quantize.static import QuantizeStatic
from onnx_lathe.passes.registry import parse, spell
from onnx_lathe.runtime.errors import InputError, OutputError
from tests import graphs


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return graphs.save(graphs.build(graphs.CLASSIFIER), tmp_path / "source.onnx")


@pytest.fixture
def file(source: Path, tmp_path: Path) -> Path:
    """Return a file of ranges that was observed."""
    path = tmp_path / "kept" / "ranges.json"
    observed(source, path)
    return path


def observed(source: Path, path: Path, **options: Any) -> InsertQDQ:
    request = QuantizeStatic(ranges="percentile", ranges_file=str(path), **options)
    return request.plan(files.load(source), graphs.samples_for(source), None)


def from_file(source: Path, path: Path, **options: Any) -> InsertQDQ:
    return QuantizeStatic(ranges_file=str(path), **options).plan(files.load(source), None, None)


def edit(path: Path, name: str, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content["values"].setdefault(name, {"low": 0.0, "high": 1.0}).update(changes)
    path.write_text(json.dumps(content))


def test_ranges_are_written_once_and_then_need_no_samples(source: Path, file: Path) -> None:
    content = json.loads(file.read_text())
    assert content["schema"] == "onnx-lathe/ranges/1"
    assert content["method"] == "percentile 99.99"
    assert content["samples"] == len(graphs.samples_for(source))
    assert list(content["values"]) == sorted(content["values"])
    image = content["values"]["image"]
    assert image["seen_low"] <= image["low"] < 0.0 < image["high"] <= image["seen_high"]
    before = file.read_bytes()
    assert from_file(source, file).values == observed(source, file).values
    assert file.read_bytes() == before


def test_an_edited_range_is_used(source: Path, file: Path) -> None:
    edit(file, "image", low=0.0, high=25.5)
    affine = {value.name: value.affine for value in from_file(source, file).values}
    assert affine["image"].scale == pytest.approx(0.1)
    assert affine["image"].zero_point == 0


def test_a_file_serves_a_request_that_rounds_less(source: Path, file: Path) -> None:
    assert [layer.result for layer in from_file(source, file, exclude=("conv1",)).layers] == ["d", "logits"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("imagee", {}, r"'imagee': got an unknown name, expected a value of the graph\. Did you mean 'image'\?"),
        ("image", {"low": 3.0, "high": 1.0}, r"'image': got low 3 and high 1, expected finite numbers, low not above"),
        ("image", {"high": float("inf")}, r"'image': got low .* and high inf, expected finite numbers"),
        ("image", {"low": float("nan")}, r"'image': got low nan"),
        ("image", {"low": "much"}, r"got values\.image\.low: Input should be a valid number"),
    ],
)
def test_a_range_that_does_not_fit_is_named(
    name: str, changes: dict[str, Any], message: str, source: Path, file: Path
) -> None:
    edit(file, name, **changes)
    with pytest.raises(InputError, match=message) as error:
        from_file(source, file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("options", "asked"), [({"ranges": "mse"}, "mse"), ({"ranges": "percentile", "percentile": 90.0}, "percentile 90")]
)
def test_ranges_chosen_in_another_way_are_refused(
    options: dict[str, Any], asked: str, source: Path, file: Path
) -> None:
    with pytest.raises(
        InputError, match=rf"got ranges that were chosen by 'percentile 99\.99', expected by '{asked}'"
    ) as error:
        QuantizeStatic(ranges_file=str(file), **options).plan(files.load(source), graphs.samples_for(source), None)
    assert error.value.where == str(file)
    assert error.value.mend.startswith("Delete the file")


@pytest.mark.parametrize("graph", ["BOTTLENECK", "DEPTHWISE", "ENCODER", "JOINED", "LONE_DEPTHWISE", "RESIDUAL"])
def test_a_file_of_the_whole_plan_serves_layers_one_by_one(graph: str, tmp_path: Path) -> None:
    source, path = graphs.save(graphs.build(getattr(graphs, graph)), tmp_path / "m.onnx"), tmp_path / "ranges.json"
    samples, request = graphs.samples_for(source), QuantizeStatic(ranges_file=str(path))
    request.plan(files.load(source), samples, None)
    alone = request.plan_each(files.load(source), None)
    assert alone == QuantizeStatic().plan_each(files.load(source), samples)


def test_a_missing_range_is_named(source: Path, file: Path) -> None:
    content = json.loads(file.read_text())
    del content["values"]["image"]
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"got no range of 'image', expected one of each value that is rounded"):
        from_file(source, file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"got no JSON"),
        ("[]", r"got schema None, expected JSON of schema 'onnx-lathe/ranges/1'"),
        ('{"schema": "onnx-lathe/ranges/9"}', r"got schema 'onnx-lathe/ranges/9'"),
        ('{"schema": "onnx-lathe/ranges/1", "samples": 1, "method": "mse"}', r"got values: Field required"),
        ("\udcff", r"got no JSON"),
    ],
)
def test_another_file_is_refused(text: str, message: str, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message):
        from_file(source, path)


def test_a_folder_is_no_file_of_ranges(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got a file that cannot be read"):
        from_file(source, tmp_path)


def test_where_nothing_can_be_written_is_an_error(source: Path) -> None:
    with pytest.raises(OutputError):
        observed(source, source / "ranges.json")


def test_a_path_is_spelled_as_it_is() -> None:
    request = QuantizeStatic(ranges_file="out/a, b/ranges.json", memory=64)
    text = "quantize-static{memory=64,ranges_file=out/a%2C%20b/ranges.json}"
    assert spell(request) == text
    assert parse(text) == (request,)
