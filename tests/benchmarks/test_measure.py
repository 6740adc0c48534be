"""The chain from subjects to a measurement: order, fresh processes, refusals. No timing is asserted."""

import gc
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from onnx_lathe.benchmarks import worker
from onnx_lathe.benchmarks.measure import FINAL, MOST_CALLS, SCREEN, Effort, measure
from onnx_lathe.benchmarks.result import Comparison, Interval, Measurement, Timing, Verdict
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.runtime.errors import InputError, MeasurementError

QUICK = Effort(processes=1, rounds=6, block_seconds=0.003, time_budget=1.0)


@pytest.fixture(autouse=True)
def _subjects_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)


def sleeper(name: str, seconds: float = 0.001) -> Subject:
    return Subject(name, "subjects:sleep", {"seconds": seconds})


def test_a_measurement_holds_every_block_of_every_subject():
    found = measure([sleeper("a"), sleeper("b")], QUICK)
    assert [timing.name for timing in found.timings] == ["a", "b"]
    for timing in found.timings:
        assert [len(process) for process in timing.blocks] == [12]
        values = [value for process in timing.blocks for block in process for value in block]
        assert min(values) >= 0.001
        assert timing.p50.low <= timing.p50.value <= timing.p50.high
        assert timing.p90 is None or timing.p90.value >= timing.p50.value
        assert timing.start_seconds > 0.0
    assert [(comparison.name, comparison.against) for comparison in found.comparisons] == [("b", "a")]
    assert len(found.canary) == 25
    assert all((timing.cold_start_seconds or 0.0) > timing.start_seconds for timing in found.timings)
    assert found.environment["threads"] >= 1


def test_subjects_take_turns_there_and_back_and_each_round_starts_with_another(tmp_path: Path):
    log = tmp_path / "calls"
    names = ["a", "b", "c"]
    measure([Subject(name, "subjects:record", {"name": name, "log": str(log)}) for name in names], QUICK)
    seen = [name for name, _ in itertools.groupby(line.split()[0] for line in log.read_text().splitlines())]
    turns = ["abccba", "bcaacb", "cabbac"]
    wanted = [name for name, _ in itertools.groupby("abcabc" + "".join(turns + turns))]
    assert seen == wanted


def test_apart_one_worker_lives_at_a_time_and_all_have_the_same_blocks(tmp_path: Path):
    log = tmp_path / "calls"
    subjects = [Subject(name, "subjects:record", {"name": name, "log": str(log)}) for name in "ab"]
    living: list[int] = []

    def count(what: str, share: float) -> None:
        del share
        if what.endswith("measuring"):
            living.append(len(psutil.Process().children()))

    found = measure(subjects, Effort(3, 2, 0.003, 0.6, most_rounds=9, apart=True), count)
    assert set(living) == {1}
    seen = [name for name, _ in itertools.groupby(line.split()[0] for line in log.read_text().splitlines())]
    assert seen == list("abab")  # a b, b a, a b: each process of the run begins with another
    one, other = ([len(process) for process in timing.blocks] for timing in found.timings)
    assert one == other
    assert [comparison.name for comparison in found.comparisons] == ["b"]


def test_what_is_far_slower_than_the_fastest_is_retired_after_three_rounds():
    subjects = [sleeper("near", 0.001), sleeper("slow", 0.05), sleeper("fast", 0.001)]
    found = measure(subjects, replace(QUICK, retire=8.0))
    assert [len(timing.blocks[0]) for timing in found.timings] == [12, 6, 12]
    assert [comparison.name for comparison in found.comparisons] == ["slow", "fast"]
    assert [len(timing.blocks[0]) for timing in measure(subjects, QUICK).timings] == [12, 12, 12]
    beaten = measure(subjects[1:], replace(QUICK, retire=8.0))
    assert [len(timing.blocks[0]) for timing in beaten.timings] == [6, 6]
    with pytest.raises(InputError, match=r"effort: retire: got 2 in 3 processes, expected 0, or over 1 in one process"):
        Effort(processes=3, rounds=6, block_seconds=0.01, time_budget=1.0, retire=2.0)


def test_each_process_is_a_fresh_one_and_the_budget_leaves_three(tmp_path: Path):
    log = tmp_path / "calls"
    effort = Effort(processes=10, rounds=2, block_seconds=0.003, time_budget=0.0)
    found = measure([Subject("a", "subjects:record", {"name": "a", "log": str(log)})], effort)
    assert len(set(log.read_text().split()[1::2])) == 3
    assert [len(process) for process in found.timings[0].blocks] == [4, 4, 4]
    assert found.comparisons == ()


@pytest.mark.parametrize(("first", "processes"), [("no difference", 3), ("inconclusive", 6)])
def test_an_inconclusive_verdict_gets_a_second_look_over_more_processes(
    first: Verdict, processes: int, monkeypatch: pytest.MonkeyPatch
):
    told: list[int] = []

    def compare(timings: Sequence[Timing], canary: Sequence[float]) -> tuple[Comparison, ...]:
        del canary
        told.append(len(timings[0].blocks))
        verdict: Verdict = "no difference" if len(told) > 1 else first
        return (Comparison("b", "a", Interval(1.0, 1.0, 1.0), verdict, "as the test says"),)

    monkeypatch.setattr("onnx_lathe.benchmarks.measure.compare", compare)
    effort = Effort(processes=3, rounds=2, block_seconds=0.003, time_budget=30.0, most_time=60.0)
    found = measure([sleeper("a"), sleeper("b")], effort)
    assert told == list(range(3, processes + 1, 3))
    assert [len(timing.blocks) for timing in found.timings] == [processes] * 2
    assert found.comparisons[0].verdict == "no difference"


def test_without_more_time_there_is_one_look():
    assert SCREEN.looks == ((1, 10.0),)
    assert FINAL.looks == ((10, 25.0), (30, 75.0))


def test_what_a_subject_prints_and_reads_stays_out_of_the_protocol():
    found = measure([Subject("chatter", "subjects:chatter")], QUICK)
    assert all(block for block in found.timings[0].blocks[0])


def test_peak_memory_is_the_workers_own():
    ballast = np.ones(32 << 20)  # 256 MiB of this process, which the workers must not be charged with
    found = measure([sleeper("small"), Subject("large", "subjects:hold", {"megabytes": 128})], QUICK)
    small, large = (found.timing(name).peak_memory for name in ("small", "large"))
    assert ballast.nbytes == 256 << 20
    assert small < 64 << 20
    assert 128 << 20 < large < 192 << 20


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            "subjects:fail_to_start",
            r"bad: got a worker that died \(exit status 1\): ValueError: there is no such",
        ),
        ("subjects:fail_to_run", "RuntimeError: the kernel failed, expected a subject that can be called"),
        ("subjects:die", r"a worker that died \(killed by SIGKILL\), expected"),
        ("subjects:nothing", "has no attribute 'nothing'"),
        ("no_such_module:start", "No module named 'no_such_module', expected a subject that can be imported"),
    ],
)
def test_a_subject_that_fails_is_named_with_its_own_words(start: str, message: str):
    with pytest.raises(MeasurementError, match=message):
        measure([sleeper("good"), Subject("bad", start)], QUICK)
    assert psutil.Process().children() == []


def test_a_subject_that_hangs_is_given_up():
    effort = Effort(processes=1, rounds=6, block_seconds=0.003, time_budget=1.0, timeout=1.0)
    with pytest.raises(MeasurementError, match=r"slow: got no answer for 1 s, expected a subject that can be called"):
        measure([sleeper("slow", 30.0)], effort)
    assert psutil.Process().children() == []


def test_a_subject_whose_threads_never_sleep_is_refused():
    with pytest.raises(MeasurementError, match="spin: got threads that keep a core busy between calls"):
        measure([Subject("spin", "subjects:spin")], QUICK)


def test_an_interrupt_kills_the_workers():
    def interrupt(what: str, share: float) -> None:
        if what.endswith("warming up b"):
            assert len(psutil.Process().children()) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure([sleeper("a"), sleeper("b")], QUICK, interrupt)
    assert psutil.Process().children() == []


def test_progress_rises_to_one():
    shares: list[float] = []
    measure([sleeper("a")], QUICK, lambda what, share: shares.append(share))
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_no_subject_and_equal_names_are_refused():
    with pytest.raises(MeasurementError, match="got no subject"):
        measure([], QUICK)
    with pytest.raises(InputError, match="two subjects called 'a'"):
        measure([sleeper("a"), sleeper("a")], QUICK)


def test_an_effort_too_small_for_an_interval_is_refused():
    with pytest.raises(InputError, match=r"rounds over all processes: got 2, expected at least 3"):
        Effort(processes=1, rounds=2, block_seconds=0.01, time_budget=1.0)
    with pytest.raises(InputError, match="effort: block_seconds: got 0"):
        Effort(processes=1, rounds=6, block_seconds=0.0, time_budget=1.0)
    assert SCREEN.processes == 1
    assert FINAL.processes >= 10


def test_a_block_is_so_many_calls_without_garbage_collection():
    states: list[bool] = []
    assert len(worker.block(lambda: states.append(gc.isenabled()), 30, 60.0)) == 30
    assert states == [False] * 33  # three calls lead in
    assert gc.isenabled()
    assert len(worker.block(lambda: None, 30, 0.0)) == 1


def test_all_blocks_of_a_subject_are_of_one_length(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onnx_lathe.benchmarks.measure.PATIENCE", 1e6)  # a busy machine would cut some off
    found = measure([sleeper("a"), Subject("b", "subjects:noop")], QUICK)
    lengths = [{len(block) for process in timing.blocks for block in process} for timing in found.timings]
    assert len(lengths[0]) == 1
    assert lengths[1] == {MOST_CALLS}


def test_a_measurement_survives_json():
    found = measure([sleeper("a"), sleeper("b")], QUICK)
    assert Measurement.from_json(found.to_json()) == found
