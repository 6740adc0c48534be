from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from onnx_lathe.converter.stages import locked, run_stage, stage_name
from onnx_lathe.runtime.errors import BundleError

CODE = ("onnx_lathe.runtime.errors",)


@dataclass(frozen=True)
class Value:
    number: int
    items: tuple[str, ...]


def make(folder: Path) -> Value:
    (folder / "file.txt").write_text("content")
    return Value(1, ("a", "b"))


def test_a_stage_is_skipped_while_its_inputs_stay_the_same(tmp_path: Path) -> None:
    first = run_stage(tmp_path, "stage", {"x": 1}, CODE, make, Value)
    second = run_stage(tmp_path, "stage", {"x": 1}, CODE, make, Value)
    assert not first.skipped
    assert second.skipped
    assert second.value == Value(1, ("a", "b"))
    assert (second.folder, second.digest) == (first.folder, first.digest)


def test_another_input_or_code_makes_it_anew_and_drops_the_old(tmp_path: Path) -> None:
    first = run_stage(tmp_path, "stage", {"x": 1}, CODE, make, Value)
    second = run_stage(tmp_path, "stage", {"x": 2}, CODE, make, Value)
    third = run_stage(tmp_path, "stage", {"x": 2}, ("onnx_lathe.runtime.parity",), make, Value)
    assert not second.skipped
    assert not third.skipped
    assert len({first.folder, second.folder, third.folder}) == 3
    assert not first.folder.exists()
    assert first.digest == second.digest == third.digest


def test_stages_whose_names_begin_alike_keep_out_of_each_others_way(tmp_path: Path) -> None:
    run_stage(tmp_path, "student-alone", {}, CODE, make, Value)
    run_stage(tmp_path, "student", {}, CODE, make, Value)
    assert run_stage(tmp_path, "student-alone", {}, CODE, make, Value).skipped


def test_a_damaged_result_is_made_again(tmp_path: Path) -> None:
    first = run_stage(tmp_path, "stage", {}, CODE, make, Value)
    (first.folder / "file.txt").write_text("damaged")
    second = run_stage(tmp_path, "stage", {}, CODE, make, Value)
    assert not second.skipped
    assert (second.folder / "file.txt").read_text() == "content"


def test_what_the_leading_process_answers_counts_for_all(tmp_path: Path) -> None:
    answers: list[object] = []

    def lead(function: Callable[[], object]) -> object:
        answers.append(function())
        return answers[-1]

    def follow(_: Callable[[], object]) -> object:
        return answers.pop(0)

    def writes_nothing(folder: Path) -> Value:
        return Value(1, ("a", "b"))

    for skipped in (False, True):
        leader = run_stage(tmp_path, "stage", {}, CODE, make, Value, lead)
        follower = run_stage(tmp_path, "stage", {}, CODE, writes_nothing, Value, follow)
        assert follower == leader
        assert follower.skipped == skipped
        assert answers == []


def test_an_interrupted_stage_finds_what_it_had_left(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> Value:
        (folder / "half.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path, "stage", {}, CODE, interrupted, Value)

    def resumed(folder: Path) -> Value:
        assert (folder / "half.txt").read_text() == "half"
        return make(folder)

    stage = run_stage(tmp_path, "stage", {}, CODE, resumed, Value)
    assert not stage.skipped
    assert not list(tmp_path.glob("*.part"))


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(BundleError, match="another run is at work"), locked(tmp_path):
        pass


def test_a_value_that_is_infinite_is_found_again(tmp_path: Path) -> None:
    def make(folder: Path) -> tuple[float, ...]:
        return (float("inf"), 1.5)

    first = run_stage(tmp_path, "s", {}, (), make, tuple[float, ...])
    again = run_stage(tmp_path, "s", {}, (), make, tuple[float, ...])
    assert (first.value, again.value, again.skipped) == ((float("inf"), 1.5), (float("inf"), 1.5), True)


def test_names_of_stages_are_short_and_tell_apart() -> None:
    long = "quantize-static{exclude=" + "|".join(f"node_{number}" for number in range(100))
    names = [stage_name("apply", text) for text in ("a,b{c=1}", long, long + "|more")]
    assert names[0] == "apply-a_b_c_1_"
    assert len(set(names)) == 3
    assert all(len(name) < 100 and name.startswith("apply-") for name in names)
