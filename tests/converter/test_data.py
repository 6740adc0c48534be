import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from onnx_lathe.converter.data.files import load_samples
from onnx_lathe.converter.data.sources import load_source
from onnx_lathe.converter.data.split import stratified
from onnx_lathe.converter.recipe import DataOptions
from onnx_lathe.runtime.errors import RecipeError, SamplesError
from onnx_lathe.runtime.samples import Samples

RAMP = np.arange(12, dtype=np.float32).reshape(4, 3)


def test_digits_are_standardized_images() -> None:
    samples = load_source("digits", Path())
    (batch,) = samples.batches
    assert (batch["image"].shape, batch["image"].dtype) == ((1797, 1, 8, 8), np.float32)
    assert abs(batch["image"].mean()) < 1e-3
    assert abs(batch["image"].std() - 1.0) < 1e-3
    assert samples.labels is not None
    assert (samples.labels.dtype, samples.labels.min(), samples.labels.max()) == (np.int64, 0, 9)


def test_a_regression_is_a_smooth_function_of_few_factors() -> None:
    samples = load_source("regression{samples=300, inputs=40, outputs=7, factors=3, noise=0}", Path())
    (batch,), labels = samples.batches, samples.labels
    assert labels is not None
    assert (batch["x"].dtype, batch["x"].shape, labels.dtype, labels.shape) == (
        np.float32,
        (300, 40),
        np.float32,
        (300, 7),
    )
    assert np.linalg.matrix_rank(batch["x"], tol=1e-3) == 3
    assert 0.5 < batch["x"].std() < 1.5
    assert 0.5 < labels.std() < 1.5
    # Near samples have near labels, though no linear function of x gives them.
    order = np.linalg.norm(batch["x"] - batch["x"][0], axis=1).argsort()
    near, far = np.square(labels[order[1:4]] - labels[0]).mean(), np.square(labels[order[-50:]] - labels[0]).mean()
    assert near < 0.5 * far
    fitted = batch["x"] @ np.linalg.lstsq(batch["x"], labels - labels.mean(axis=0), rcond=1e-3)[0]
    assert 0.05 < np.square(labels - labels.mean(axis=0) - fitted).mean() / labels.var() < 0.7


def test_a_regression_depends_on_its_options_alone() -> None:
    default, same, other = (
        load_source(text, Path()).digest() for text in ("regression", "regression{seed=0}", "regression{seed=1}")
    )
    assert default == same != other


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "regression{sample=3}",
            r"regression\{sample\}: got an unknown option, expected one of samples, .* 'samples'\?",
        ),
        ("regression{samples=0}", r"regression\{samples\}: got '0', expected greater than or equal to 1"),
        ("regression{noise}", r"regression\{noise\}: got '', expected a valid number"),
    ],
)
def test_what_is_wrong_in_a_regression_is_named(source: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_source(source, Path())


def test_an_npz_lies_beside_the_recipe(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=RAMP, label=np.array([0, 1, 0, 1], np.uint8))
    samples = load_source("data.npz", tmp_path)
    assert samples.labels is not None
    assert (samples.names, samples.labels.dtype) == (("x",), np.int64)


def test_a_callable_of_a_module_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "own_samples.py").write_text(
        "import numpy as np\n"
        "from onnx_lathe.runtime.samples import Samples\n"
        "def make():\n    return Samples(({'x': np.zeros((2, 1))},), np.array([0, 1]))\n"
        "def wrong():\n    return [1, 2]\n"
    )
    assert len(load_source("own_samples:make", tmp_path)) == 2
    with pytest.raises(
        SamplesError, match=r"own_samples:wrong: got a list, expected onnx_lathe.runtime.samples.Samples"
    ):
        load_source("own_samples:wrong", tmp_path)
    with pytest.raises(RecipeError, match=r"own_samples has no callable 'absent'"):
        load_source("own_samples:absent", tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "digit",
            r"data\.source: got 'digit', expected 'digits', 'regression\{\.\.\.\}', the path of an \.npz, or module",
        ),
        ("no_such_module:make", r"Put no_such_module\.py beside the recipe, or install the module"),
    ],
)
def test_an_unknown_source_is_refused(source: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_source(source, tmp_path)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, "got no labels, expected a class for each sample"),
        (np.array([0.5, np.inf, 0, 1]), "label: got NaN or infinity"),
        (np.array([-1, 1, 0, 1]), r"got int64 labels \[4\] from -1 to 1, expected a class for each sample"),
    ],
)
def test_a_source_needs_classes(label: np.ndarray | None, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=RAMP, **({} if label is None else {"label": label}))
    with pytest.raises(SamplesError, match=message):
        load_source("data.npz", tmp_path)


def numbered(count: int, classes: int) -> Samples:
    """Return samples whose only value is their own number."""
    return Samples(({"x": np.arange(count)[:, None]},), np.arange(count) % classes)


def numbers(samples: Samples) -> set[int]:
    return set(np.concatenate([batch["x"].ravel() for batch in samples.batches]).tolist())


def test_the_parts_share_no_sample_and_keep_the_proportions() -> None:
    parts = stratified(numbered(200, 4), DataOptions(source="x", select=0.2, test=0.3, calibrate=30), seed=3)
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 100,
        "select": 40,
        "test": 60,
        "calibrate": 30,
    }
    train, select, test = (numbers(parts[name]) for name in ("train", "select", "test"))
    assert train | select | test == set(range(200))
    assert numbers(parts["calibrate"]) < train
    for name, each in (("train", 25), ("select", 10), ("test", 15)):
        labels = parts[name].labels
        assert labels is not None
        assert np.bincount(labels).tolist() == [each] * 4
        assert (labels == np.concatenate([batch["x"].ravel() for batch in parts[name].batches]) % 4).all()


def test_the_cut_depends_on_the_seed_alone() -> None:
    options = DataOptions(source="x", calibrate=10)
    first, again, other = (stratified(numbered(100, 2), options, seed) for seed in (0, 0, 1))
    assert all(first[name].digest() == again[name].digest() for name in first)
    assert all(first[name].digest() != other[name].digest() for name in first)


def test_calibrate_is_all_of_train_where_that_is_smaller() -> None:
    parts = stratified(numbered(40, 2), DataOptions(source="x", calibrate=1000), seed=0)
    assert numbers(parts["calibrate"]) == numbers(parts["train"])


def test_a_class_too_rare_for_three_parts_is_named() -> None:
    labels = np.zeros(50, np.int64)
    labels[7] = 1
    samples = Samples(({"x": np.zeros((50, 1))},), labels, "rare")
    with pytest.raises(SamplesError, match="rare: label: got 1 samples of class 1 for train, select and test"):
        stratified(samples, DataOptions(source="x"), seed=0)


@pytest.mark.parametrize("shape", [(100,), (100, 2)])
def test_numbers_are_cut_at_random(shape: tuple[int, ...]) -> None:
    labels = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    samples = Samples(({"x": np.arange(100)[:, None]},), labels)
    parts, again = (stratified(samples, DataOptions(source="x", select=0.2, test=0.3), seed=0) for _ in range(2))
    assert [len(parts[name]) for name in ("train", "select", "test")] == [50, 20, 30]
    assert set().union(*(numbers(part) for part in parts.values())) == set(range(100))
    assert all(part.digest() == again[name].digest() for name, part in parts.items())
    rows = sorted(numbers(parts["test"]))
    np.testing.assert_array_equal(parts["test"].labels, labels[rows])


def test_too_few_numbers_for_three_parts_are_named() -> None:
    samples = Samples(({"x": np.zeros((2, 1))},), np.zeros(2), "two")
    with pytest.raises(SamplesError, match="two: got 2 samples for train, select and test"):
        stratified(samples, DataOptions(source="x"), seed=0)


def test_samples_without_labels_cannot_be_stratified() -> None:
    with pytest.raises(SamplesError, match="got no labels, expected a class, or numbers, for each sample"):
        stratified(Samples(({"x": RAMP},)), DataOptions(source="x"), seed=0)


@pytest.mark.parametrize(
    ("label", "dtype"), [(np.array([True, False, True, True]), np.int64), (np.array([0.5, 1, 2, 3]), np.float64)]
)
def test_an_npz_gives_arrays_and_labels(label: np.ndarray, dtype: type, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=RAMP, text=np.array(["a", "b", "c", "d"]), label=label)
    samples = load_samples(tmp_path / "data.npz")
    assert samples.labels is not None
    assert samples.labels.dtype == dtype
    assert samples.labels.tolist() == label.tolist()
    assert samples.batches[0]["x"].tolist() == RAMP.tolist()
    assert samples.batches[0]["text"].tolist() == ["a", "b", "c", "d"]


def test_a_folder_is_a_batch_a_file_of_any_shape(tmp_path: Path) -> None:
    np.savez(tmp_path / "1.npz", x=np.ones((2, 5)), label=[0, 1])
    np.savez(tmp_path / "0.npz", x=np.zeros((3, 7)), label=[2, 3, 4])
    samples = load_samples(tmp_path)
    assert [batch["x"].shape for batch in samples.batches] == [(3, 7), (2, 5)]
    assert samples.labels is not None
    assert samples.labels.tolist() == [2, 3, 4, 0, 1]


def test_a_folder_without_files_or_with_labels_in_some_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match=r"got a folder without \.npz files"):
        load_samples(tmp_path)
    np.savez(tmp_path / "0.npz", x=RAMP, label=[0, 1, 0, 1])
    np.savez(tmp_path / "1.npz", x=RAMP)
    with pytest.raises(SamplesError, match=r"1\.npz: got no labels, unlike 0\.npz"):
        load_samples(tmp_path)
    np.savez(tmp_path / "1.npz", x=RAMP, label=np.zeros((4, 2)))
    with pytest.raises(SamplesError, match=r"1\.npz: label: got \[4, 2\], unlike 0\.npz, expected the same number"):
        load_samples(tmp_path)


def npz(**arrays: object) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, RAMP)
    return file.getvalue()


HUGE = npy().replace(b"(4, 3), }" + 12 * b" ", b"(4, 3000000000000), }")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"got a file that is not an \.npz"),
        (b"text", r"got a file that is not an \.npz"),
        (npy(), r"got a file that is not an \.npz"),
        (npz(x=RAMP)[:-40], r"got a file that is not an \.npz"),
        (npz(x=RAMP).replace(RAMP.tobytes(), b"\xff" * RAMP.nbytes), r"got an \.npz that cannot be read \(Bad CRC-32"),
        (npz(x=np.array([{}, {}])), "Object arrays cannot be loaded when allow_pickle=False"),
        (zipped("x.npy", npy()[:-8]), r"got an \.npz that cannot be read"),
        (
            zipped("x.npy", npy().replace(b"(4, 3), }", b"(4, 3),  ")),
            r"cannot be read \(\('EOF in multi-line statement'",
        ),
        (zipped("x.npy", HUGE), r"cannot be read \(Unable to allocate"),
        (zipped("notes.txt", b"text"), "notes.txt: got a member that is not an array"),
        (npz(), "got no samples"),
        (npz(label=[1, 2]), "got no samples"),
        (npz(x=RAMP[:0]), r"got no samples \(first axis 0\)"),
        (npz(x=RAMP, y=RAMP[:3]), "first axes of different length: {'x': 4, 'y': 3}"),
        (npz(x=np.where(RAMP == 6, np.nan, RAMP)), "NaN or infinity in sample 2"),
        (npz(x=RAMP, label=[1, 2]), "got 2 labels, expected 4, one for each sample"),
        (npz(x=RAMP, label=RAMP.astype(int)), r"got int64 \[4, 3\], expected integers of shape \[samples\], or floats"),
        (npz(x=RAMP, label=["a"] * 4), r"got <U1 \[4\], expected integers of shape"),
        (npz(x=RAMP, label=[np.nan, 0, 0, 0]), "label: got NaN or infinity, expected finite scores"),
    ],
)
def test_a_bad_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(SamplesError, match=message):
        load_samples(tmp_path / "data.npz")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match=r"absent\.npz: got no such file"):
        load_samples(tmp_path / "absent.npz")
