from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lathe.runtime.errors import ModelFileError, SamplesError, TensorError
from onnx_lathe.runtime.samples import Samples
from onnx_lathe.runtime.tensors import (
    STRING,
    TensorSpec,
    bind_dims,
    check_feeds,
    first_batch,
    input_specs,
    load_npz,
    random_feeds,
    save_npz,
)
from tests.graphs import LINEAR, parse, write

SPECS = (
    TensorSpec("ids", np.dtype(np.int64), ("batch", "seq")),
    TensorSpec("mask", np.dtype(np.int64), ("batch", "seq")),
    TensorSpec("image", np.dtype(np.float32), ("batch", 3, None)),
)
GOOD = {
    "ids": np.zeros((2, 5), np.int64),
    "mask": np.zeros((2, 5), np.int64),
    "image": np.zeros((2, 3, 7), np.float32),
}

ENCODER = """
encoder (int64[batch, seq] input_ids, int64[batch, seq] attention_mask, int64[batch, seq] token_type_ids,
         int64[batch, seq] position_ids, float[batch, 2] dense) => (float[batch, seq, 2] y)
<float[5, 2] words = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, int8[3, 2] types = {1, 2, 3, 4, 5, 6}, float scale = {0.5}>
{
  narrow = Cast <to = 6> (input_ids)
  a = Gather(words, narrow)
  real = DequantizeLinear(types, scale)
  b = Gather(real, token_type_ids)
  y = Add(a, b)
}
"""


def test_feeds_that_fit_come_back_as_arrays() -> None:
    arrays = check_feeds(SPECS, GOOD)
    assert {name: array.shape for name, array in arrays.items()} == {name: array.shape for name, array in GOOD.items()}
    listed = check_feeds((TensorSpec("x", np.dtype(np.int64), (2,)),), {"x": [1, 2]})
    np.testing.assert_array_equal(listed["x"], [1, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"mask": None},
            "'mask': got no array; arrays were given for ids, image, expected arrays for ids, mask, image",
        ),
        ({"masks": 0}, "'masks': got an unknown input, expected one of ids, mask, image. Did you mean 'mask'"),
        ({"zzz": 0}, "'zzz': got an unknown input, .*Leave 'zzz' out"),
        ({"ids": np.zeros((2, 5), np.int32)}, r"'ids': got dtype int32, expected int64. .* array.astype\('int64'\)"),
        ({"image": np.zeros((2, 3, 7))}, "'image': got dtype float64, expected float32"),
        ({"ids": np.zeros(5, np.int64)}, r"'ids': got shape \[5\], expected 2 dimensions, \[batch, seq\]"),
        (
            {"image": np.zeros((2, 4, 7), "f4")},
            r"'image': got shape \[2, 4, 7\], expected 3 along axis 1 of \[batch, 3, \?\]",
        ),
        ({"mask": np.zeros((2, 6), np.int64)}, r"'mask': got 6 along 'seq' \(axis 1\), expected 5, as in 'ids'"),
        ({"image": np.zeros((1, 3, 7), "f4")}, r"'image': got 1 along 'batch' \(axis 0\), expected 2, as in 'ids'"),
        ({"ids": [[1, 2], [3]]}, r"'ids': got rows of different lengths, expected an array of shape \[batch, seq\]"),
    ],
)
def test_feeds_that_do_not_fit_are_named(change: dict[str, object], message: str) -> None:
    feeds = {name: value for name, value in (GOOD | change).items() if value is not None}
    with pytest.raises(TensorError, match="input " + message):
        check_feeds(SPECS, feeds)


def test_strings_are_strings_and_nothing_else() -> None:
    spec = TensorSpec("text", STRING, (None,))
    assert check_feeds((spec,), {"text": ["a", "bc"]})["text"].shape == (2,)
    with pytest.raises(TensorError, match="input 'text': got dtype int64, expected str"):
        check_feeds((spec,), {"text": [1]})


def test_an_initializer_is_no_input() -> None:
    model = parse("g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }")
    assert [spec.name for spec in input_specs(model, "m")] == ["x"]


def test_an_input_of_an_unknown_type_is_refused(tmp_path: Path) -> None:
    model = parse(LINEAR)
    model.graph.input[0].type.tensor_type.elem_type = 99
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match="'x': got element type 99, expected a type that ONNX defines"):
        random_feeds(tmp_path / "m.onnx")


def test_random_feeds_are_plausible_for_what_they_feed(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", ENCODER)
    feeds = random_feeds(path, {"batch": 64, "seq": 9})
    assert {name: array.shape for name, array in feeds.items()} == {
        **dict.fromkeys(("input_ids", "attention_mask", "token_type_ids", "position_ids"), (64, 9)),
        "dense": (64, 2),
    }
    assert set(np.unique(feeds["input_ids"])) == set(range(5))
    assert (feeds["attention_mask"] == 1).all()
    assert (feeds["token_type_ids"] == 0).all()
    np.testing.assert_array_equal(feeds["position_ids"][3], np.arange(9))
    assert feeds["dense"].dtype == np.float32
    again, other = random_feeds(path, {"batch": 64, "seq": 9}), random_feeds(path, {"batch": 64, "seq": 9}, seed=1)
    np.testing.assert_array_equal(feeds["dense"], again["dense"])
    assert not np.array_equal(feeds["dense"], other["dense"])


def test_sizes_nobody_gave_have_defaults_and_unknown_names_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", ENCODER)
    assert random_feeds(path)["input_ids"].shape == (2, 16)
    assert random_feeds(path, {"seq": 3})["input_ids"].shape == (2, 3)
    with pytest.raises(
        TensorError, match=r"dimension 'sequ': got an unknown dimension, expected one of batch, seq. Did you mean 'seq'"
    ):
        random_feeds(path, {"sequ": 3})
    with pytest.raises(TensorError, match="dimension 'seq': got 0, expected a size of at least 1"):
        random_feeds(path, {"seq": 0})
    with pytest.raises(
        TensorError, match=r"'input_ids': got shape \[2, 1000000000\], 16000000000 bytes, expected at most"
    ):
        random_feeds(path, {"seq": 10**9})
    assert bind_dims(SPECS, {"seq": 4}, batch=1) == {"batch": 1, "seq": 4}


def test_a_first_batch_is_the_first_samples(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", LINEAR)
    x = np.arange(40, dtype=np.float32).reshape(10, 4)
    samples = Samples(({"x": x[:3]}, {"x": x[3:]}), np.arange(10))
    np.testing.assert_array_equal(first_batch(path, samples, 5)["x"], x[:5])
    np.testing.assert_array_equal(first_batch(path, samples, 99)["x"], x)
    assert first_batch(path, None, 5)["x"].shape == (2, 4)


def test_a_first_batch_has_one_shape(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", "g (int64[n, seq] x) => (int64[n, seq] y) { y = Identity(x) }")
    samples = Samples(({"x": np.zeros((2, 3), np.int64)}, {"x": np.ones((2, 4), np.int64)}))
    assert first_batch(path, samples, 4)["x"].shape == (2, 3)


@pytest.mark.parametrize(("available", "rows"), [(2, [0, 1, 0]), (5, [0, 1, 2])])
def test_a_first_batch_fills_a_fixed_batch(tmp_path: Path, available: int, rows: list[int]) -> None:
    path = write(tmp_path / "m.onnx", "g (float[3, 1] x) => (float[3, 1] y) { y = Identity(x) }")
    samples = Samples(({"x": np.arange(available, dtype=np.float32)[:, None]},))
    np.testing.assert_array_equal(first_batch(path, samples, 1)["x"][:, 0], rows)


def test_samples_without_an_input_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", LINEAR)
    with pytest.raises(SamplesError, match=r"mine: got arrays for z, expected arrays for x. Add an array for 'x'"):
        first_batch(path, Samples(({"z": np.zeros((1, 4), np.float32)},), source="mine"), 1)


def test_arrays_survive_a_file_whatever_they_are_called(tmp_path: Path) -> None:
    arrays = {"file": np.arange(3), "a/b": np.ones((2, 0), np.float16), "text": np.array(["a", "bc"], dtype=object)}
    save_npz(tmp_path / "new" / "x.npz", arrays)
    back = load_npz(tmp_path / "new" / "x.npz")
    assert list(back) == list(arrays)
    np.testing.assert_array_equal(back["file"], arrays["file"])
    assert (back["a/b"].shape, back["a/b"].dtype) == ((2, 0), np.float16)
    assert back["text"].tolist() == ["a", "bc"]
    with np.load(tmp_path / "new" / "x.npz") as plain:
        assert plain["file"].tolist() == [0, 1, 2]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.npz"]
