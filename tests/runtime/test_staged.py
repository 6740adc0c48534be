from pathlib import Path

import pytest

from onnx_lathe.runtime.errors import OutputError
from onnx_lathe.runtime.staged import staged


def test_a_file_and_what_lies_beside_it_appear_together(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "model.onnx"
    with staged(target) as part:
        part.write_text("graph")
        part.with_name("model.onnx.data").write_text("weights")
        assert list(target.parent.glob("model*")) == []
    assert {path.name: path.read_text() for path in target.parent.iterdir()} == {
        "model.onnx": "graph",
        "model.onnx.data": "weights",
    }


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("half")
        raise ValueError("half written")

    with pytest.raises(ValueError, match="half written"), staged(target) as part:
        fail(part)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_place_that_takes_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"got a folder, expected the name of a file"), staged(tmp_path):
        pass
    with (
        pytest.raises(OutputError, match=r"file: got a folder that cannot be made \(\w"),
        staged(tmp_path / "file" / "x"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_name_that_the_disk_does_not_take_is_said(tmp_path: Path) -> None:
    wanted = r"got a place that cannot be written at \(File name too long\)"
    with pytest.raises(OutputError, match=wanted), staged(tmp_path / ("x" * 300)) as part:
        part.write_text("much")
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_no_folder_can_be_made_is_said() -> None:
    place = Path("/proc/x.onnx")
    with pytest.raises(OutputError, match=r"^/proc/x\.onnx: got a place that cannot be written at"), staged(place):
        pass


def test_errors_of_other_files_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged(tmp_path / "x"):
        (tmp_path / "not there").read_text()
