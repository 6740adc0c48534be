import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lathe.runtime import bundle
from onnx_lathe.runtime.bundle import model_file, open_bundle, write_bundle
from onnx_lathe.runtime.errors import BundleError
from onnx_lathe.runtime.session import Session
from tests.graphs import LINEAR, parse, write

CPU = bundle.SessionOptions(provider="cpu", threads=None)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "report.md").write_text("# Report\n")
    return {"model.onnx": write(tmp_path / "m.onnx", LINEAR), "docs/report.md": tmp_path / "report.md"}


def test_a_bundle_holds_what_it_was_given_and_says_so(files: dict[str, Path], tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "out" / "name", files, {"seed": 7}, {"provider": "cpu", "threads": 3})
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names == ["docs/report.md", "manifest.json", "model.onnx", "session.toml"]
    assert (folder / "session.toml").read_text() == 'provider = "cpu"\nthreads = 3\n'
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["schema"], manifest["seed"], list(manifest["files"])) == (
        1,
        7,
        ["model.onnx", "docs/report.md", "session.toml"],
    )
    assert manifest["files"]["model.onnx"] == hashlib.sha256(files["model.onnx"].read_bytes()).hexdigest()
    opened = open_bundle(folder)
    assert (opened.folder, opened.model, opened.provider, opened.threads) == (folder, folder / "model.onnx", "cpu", 3)
    assert (opened.manifest["seed"], opened.warning) == (7, None)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["name"]


def test_weights_beside_the_model_come_along(tmp_path: Path) -> None:
    model = parse(LINEAR)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    given = {"model.onnx": tmp_path / "m.onnx", "m.onnx.data": tmp_path / "m.onnx.data"}
    folder = write_bundle(tmp_path / "b", given, {}, CPU)
    np.testing.assert_array_equal(Session(folder).run({"x": np.ones((1, 4), np.float32)})["y"], [[16.5, 19.5]])
    (folder / "m.onnx.data").write_bytes(bytes(40))
    with pytest.raises(BundleError, match=r"m.onnx.data: got sha256"):
        Session(folder)


def test_a_model_file_is_a_file_or_the_one_in_a_bundle(files: dict[str, Path], tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", files, {}, CPU)
    assert model_file(folder) == folder / "model.onnx"
    assert model_file(files["model.onnx"]) == files["model.onnx"]
    assert open_bundle(folder).threads is None


def test_files_that_the_manifest_does_not_name_are_tolerated(files: dict[str, Path], tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", files, {}, CPU)
    (folder / "notes.txt").write_text("mine")
    assert "notes.txt" not in open_bundle(folder).manifest["files"]


def test_a_bundle_is_replaced_whole(files: dict[str, Path], tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", files, {"seed": 1}, CPU)
    del files["docs/report.md"]
    write_bundle(folder, files, {"seed": 2}, CPU)
    assert open_bundle(folder).manifest["seed"] == 2
    assert not (folder / "docs").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "m.onnx", "report.md"]


@pytest.mark.parametrize("broken", ["copy", "manifest", "first rename", "second rename"])
def test_an_interruption_leaves_the_old_bundle(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    folder = write_bundle(tmp_path / "b", files, {"seed": 1}, CPU)
    rename, renames = bundle.os.rename, iter(("first rename", "second rename"))

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    def rename_or_fail(*paths: Path) -> None:
        fail() if next(renames) == broken else rename(*paths)

    with monkeypatch.context() as patch:
        if broken == "copy":
            patch.setattr(bundle, "_copy", fail)
        elif broken == "manifest":
            patch.setattr(bundle, "cpu_class", fail)
        patch.setattr(bundle.os, "rename", rename_or_fail)
        with pytest.raises(KeyboardInterrupt):
            write_bundle(folder, files, {"seed": 2}, CPU)
    assert open_bundle(folder).manifest["seed"] == 1
    assert Session(folder).outputs[0].name == "y"
    write_bundle(folder, files, {"seed": 3}, CPU)
    assert open_bundle(folder).manifest["seed"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "m.onnx", "report.md"]


@pytest.mark.parametrize("name", ["../out.txt", "/etc/x", "a/../../x", "a\\b", ""])
def test_names_stay_inside(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="got a name that is not one of a file in the bundle"):
        write_bundle(tmp_path / "b", {**files, name: files["model.onnx"]}, {}, CPU)
    assert not (tmp_path / "b").exists()
    folder = write_bundle(tmp_path / "b", files, {}, CPU)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="got a name that is not one of a file in the bundle"):
        open_bundle(folder)


def test_a_bundle_needs_a_model(files: dict[str, Path], tmp_path: Path) -> None:
    del files["model.onnx"]
    with pytest.raises(BundleError, match=r"got files docs/report.md, expected model.onnx"):
        write_bundle(tmp_path / "b", files, {}, CPU)


def test_what_is_no_bundle_is_not_replaced(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(
        BundleError, match="got something that is not a bundle, expected a bundle, an empty folder or nothing"
    ):
        write_bundle(tmp_path / "thesis", files, {}, CPU)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    open_bundle(write_bundle(tmp_path / "empty", files, {}, CPU))


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def change(name: str, old: str, new: str) -> Callable[[Path], object]:
    """Return what replaces text in a file; a change of session.toml is also entered in the manifest."""

    def apply(folder: Path) -> None:
        path, manifest = folder / name, folder / "manifest.json"
        before = bundle.file_digest(path)
        path.write_text(path.read_text().replace(old, new))
        if name == "session.toml":
            manifest.write_text(manifest.read_text().replace(before, bundle.file_digest(path)))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("docs/report.md"), "report.md: got no such file, expected a file of the bundle"),
        (
            change("docs/report.md", "Report", "Rapport"),
            "report.md: got sha256 [0-9a-f]{64}, expected sha256 [0-9a-f]{64}. ",
        ),
        (remove("manifest.json"), "b: got no manifest.json, expected a bundle"),
        (change("manifest.json", "{", "["), r"manifest.json: got not JSON \(.*\), expected a manifest"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "got JSON that is not an object"),
        (change("manifest.json", '"schema": 1', '"schema": 2'), "got schema 2, expected schema 1. Open it"),
        (change("manifest.json", "model.onnx", "other.onnx"), "got no sha256 of the model and its session"),
        (change("session.toml", "=", ":"), r"session.toml: got not TOML \(.*\), expected provider and threads"),
        (change("session.toml", '"cpu"', "1"), "session.toml: got provider = 1, expected the name of a provider"),
        (change("session.toml", "2", "0"), "session.toml: got threads = 0, expected a number of at least 1"),
        (change("session.toml", "2", "'all'"), "session.toml: got threads = 'all', expected a number of at least 1"),
    ],
)
def test_damage_is_named(
    files: dict[str, Path], tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = write_bundle(tmp_path / "b", files, {}, {"provider": "cpu", "threads": 2})
    damage(folder)
    with pytest.raises(BundleError, match=message):
        open_bundle(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="b: got no such folder, expected a bundle"):
        open_bundle(tmp_path / "b")


def test_another_class_of_cpu_is_said(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(bundle, "cpu_class", lambda: "x86_64 abacus")
        folder = write_bundle(tmp_path / "b", files, {}, CPU)
    warning = Session(folder).warning
    assert warning is not None
    assert "was made for a CPU of class x86_64 abacus" in warning
    assert warning.endswith("what was measured does not hold here.")


def test_a_manifest_must_be_json_that_others_can_read(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_bundle(tmp_path / "b", files, {"sqnr": float("inf")}, CPU)
    assert not (tmp_path / "b").exists()
