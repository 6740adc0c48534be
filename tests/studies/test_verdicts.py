"""The runner of real verdicts: it resumes, takes each once, counts, and leaves no process behind. Nothing is timed."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from onnx_lathe.benchmarks.measure import FINAL, Effort
from onnx_lathe.benchmarks.result import Comparison, Interval, Measurement, Timing
from onnx_lathe.benchmarks.subject import Subject
from tests import graphs
from tests.studies import verdicts
from tests.studies.rivals import Separate
from tests.studies.verdicts import RIVALS, Kind, read, run, table, take

KINDS = (Kind("idle", 4, 0.0, False, 1.0, 1.0), Kind("5 % slower", 2, 0.05, False, 2.0, 2.0))
ENTRY = {"verdict": "no difference", "speed": [1.0, 0.99, 1.01], "seconds": 1.0, "disturbed": False, "rivals": []}


def seen_by_rivals(seconds: float) -> dict[str, Any]:
    """Ten samples without ties and their statistics, around some latency."""
    samples = [seconds * (1.0 + index / 10_000) for index in range(10)]
    return {"benchmark": {"mean": seconds, "min": seconds, "median": seconds}, "asv": samples}


def test_what_an_interrupt_cut_short_is_left_out(tmp_path: Path):
    file = tmp_path / "verdicts.jsonl"
    assert read(file) == []
    file.write_text('{"kind": "idle", "index": 0}\n{"kind": "idle", "index": 1}\n{"kind": "idle", "ind')
    assert [entry["index"] for entry in read(file)] == [0, 1]


def test_each_verdict_is_taken_once_with_the_models_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    models = [graphs.write(tmp_path / f"{name}.onnx", graphs.LINEAR) for name in ("small", "middle")]
    file = tmp_path / "verdicts.jsonl"
    taken: list[tuple[str, int, str]] = []

    def once(kind: Kind, index: int, model: Path, feeds: Path) -> dict[str, Any]:
        assert feeds.is_file()
        if len(taken) == 2:
            raise KeyboardInterrupt
        taken.append((kind.name, index, model.stem))
        return ENTRY

    monkeypatch.setattr(verdicts, "take", once)
    monkeypatch.setattr(verdicts, "await_quiet", lambda: None)
    with pytest.raises(KeyboardInterrupt):
        run(models, file, KINDS)
    first, taken[:] = [*taken], []
    with pytest.raises(KeyboardInterrupt):
        run(models, file, KINDS)
    second, taken[:] = [*taken], []
    with pytest.raises(KeyboardInterrupt):
        run(models, file, (*KINDS, Kind("busy", 1, 0.0, True, 1.0, 1.0)))
    # A share of each kind at a time, so that all of them meet the same hours.
    assert [*first, *second] == [
        ("idle", 0, "small"),
        ("5 % slower", 0, "small"),
        ("idle", 1, "middle"),
        ("idle", 2, "small"),
    ]
    assert taken == [("busy", 0, "small"), ("5 % slower", 1, "middle")]
    taken.clear()
    run(models, file, KINDS)
    run(models, file, KINDS)
    assert taken == [("idle", 3, "middle")]
    entries = read(file)
    assert len({(entry["kind"], entry["index"]) for entry in entries}) == len(entries) == 7
    assert entries[0] == {"kind": "idle", "index": 0, "model": "small", **ENTRY}


def test_a_verdict_that_was_disturbed_is_kept_and_taken_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    model, file = graphs.write(tmp_path / "m.onnx", graphs.LINEAR), tmp_path / "verdicts.jsonl"
    disturbed = iter([True, True, False, False])
    waited: list[int] = []

    def once(kind: Kind, index: int, model: Path, feeds: Path) -> dict[str, Any]:
        del kind, index, model, feeds
        return ENTRY | {"disturbed": next(disturbed)}

    monkeypatch.setattr(verdicts, "take", once)
    monkeypatch.setattr(verdicts, "await_quiet", lambda: waited.append(len(read(file))))
    run([model], file, (Kind("idle", 2, 0.0, False, 1.0, 1.0),))
    assert [(entry["index"], entry["disturbed"]) for entry in read(file)] == [
        (0, True),
        (0, True),
        (0, False),
        (1, False),
    ]
    assert waited == [0, 1, 2, 3]


def test_a_verdict_waits_until_a_fixed_kernel_takes_the_same_time_again_and_again(monkeypatch: pytest.MonkeyPatch):
    jumping, steady = [0.01, 0.01, 0.015], [0.01, 0.0102, 0.0104]
    songs = iter([steady, steady, jumping, steady, steady, steady, jumping])
    monkeypatch.setattr(verdicts, "_sing", lambda seconds: next(songs))
    monkeypatch.setattr(verdicts, "strangers_seconds", lambda: 0.0)
    verdicts.await_quiet()
    assert list(songs) == [jumping]


def test_the_work_of_own_processes_is_not_that_of_strangers():
    spin = "import time\nwhile time.process_time() < 0.5: pass"
    with subprocess.Popen([sys.executable, "-c", spin]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        # Until a child has been waited for nobody is charged with it, as nobody here is with a stranger.
        as_stranger = verdicts.strangers_seconds()
    assert as_stranger - verdicts.strangers_seconds() >= 0.4


def test_the_table_counts_the_verdicts_of_each_kind_and_of_the_rivals():
    rivals = {same: [seen_by_rivals(1.0), seen_by_rivals(1.0 if same else 1.06)] for same in (True, False)}
    entries = [
        {"kind": "idle", **ENTRY, "rivals": rivals[True]},
        {"kind": "idle", **ENTRY, "verdict": "inconclusive", "speed": [1.0, 0.9, 1.1], "seconds": 3.5},
        {"kind": "idle", **ENTRY, "verdict": "faster", "speed": [1.02, 1.01, 1.03]},
        {"kind": "5 % slower", **ENTRY, "verdict": "slower", "speed": [1 / 1.06, 0.9, 1.0], "rivals": rivals[False]},
    ]
    entries.append({"kind": "idle", **ENTRY, "verdict": "slower", "speed": [0.5, 0.4, 0.6], "disturbed": True})
    lines = table(entries, (*KINDS, Kind("none yet", 1, 0.0, False, 1.0, 1.0))).splitlines()
    assert lines[2:4] == [
        "| idle | 3 | 1 | 0 | 1 | 1 | 1.0000 | 2.0 points | 3.5 at most |",
        "| 5 % slower | 1 | 0 | 1 | 0 | 0 | 0.9434 | 1.0 points | 1.0 at most |",
    ]
    assert "| rule: slower / faster | idle (1) | 5 % slower (1) |" in lines
    assert "| onnx-lathe | 0 / 0 | 1 / 0 |" in lines
    assert "| pytest-benchmark mean:5% | 0 / it has none | 1 / it has none |" in lines
    assert "| asv factor 1.1 | 0 / 0 | 0 / 0 |" in lines
    assert "| asv factor 1.02 | 0 / 0 | 1 / 0 |" in lines
    assert "Disturbed, and taken again: 1 (slower 1)." in lines
    assert "none yet" not in "\n".join(lines)


def _measured() -> Measurement:
    blocks = (((0.001,) * 3,) * 4,) * 3
    interval = Interval(1.0, 0.99, 1.01)
    timings = tuple(Timing(name, blocks, interval, None, 0, 0.0) for name in "ab")
    verdict = Comparison("b", "a", interval, "no difference", "not beyond the noise, 1.0%")
    return Measurement(timings, (verdict,), (1.0,) * 9, {})


@pytest.mark.parametrize("busy", [False, True])
def test_the_other_core_is_kept_busy_only_while_it_is_measured(
    busy: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    before = psutil.Process().children()
    seen: list[psutil.Process] = []
    asked: list[tuple[Sequence[Subject], Effort]] = []

    def look(subjects: Sequence[Subject], effort: Effort) -> Measurement:
        seen.extend(child for child in psutil.Process().children() if child not in before)
        asked.append((subjects, effort))
        return _measured()

    def alone(subject: Subject) -> Separate:
        del subject
        return Separate({"mean": 1.0}, (1.0,))

    # Only its presence is looked at: a real load would disturb whatever else is measured here.
    monkeypatch.setattr(verdicts, "_BUSY", "import time; time.sleep(60)")
    monkeypatch.setattr(verdicts, "measure", look)
    monkeypatch.setattr(verdicts, "separate", alone)
    kind = Kind("any", 1, 0.05, busy, 7.0, 9.0)
    entry = take(kind, 0, tmp_path / "m.onnx", tmp_path / "m.npz")
    assert len(seen) == busy
    assert not any(child.is_running() for child in seen)
    ((subjects, effort),) = asked
    assert [subject.arguments["by"] for subject in subjects] == [0.0, 0.05]
    assert (effort.time_budget, effort.most_time, effort.processes) == (7.0, 9.0, FINAL.processes)
    assert (entry["verdict"], entry["speed"], entry["processes"], entry["drift"]) == (
        "no difference",
        [1.0, 0.99, 1.01],
        3,
        0.0,
    )
    assert len(entry["rivals"]) == 2
    assert json.loads(json.dumps(entry)) == entry | {"rivals": json.loads(json.dumps(entry["rivals"]))}
    assert take(kind, RIVALS, tmp_path / "m.onnx", tmp_path / "m.npz")["rivals"] == []


def test_the_other_core_is_left_alone_after_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    before = psutil.Process().children()
    seen: list[psutil.Process] = []

    def fail(subjects: Sequence[Subject], effort: Effort) -> Measurement:
        seen.extend(child for child in psutil.Process().children() if child not in before)
        raise RuntimeError("the kernel failed")

    monkeypatch.setattr(verdicts, "_BUSY", "import time; time.sleep(60)")
    monkeypatch.setattr(verdicts, "measure", fail)
    with pytest.raises(RuntimeError, match="the kernel failed"):
        take(Kind("any", 1, 0.0, True, 1.0, 1.0), 0, tmp_path / "m.onnx", tmp_path / "m.npz")
    assert len(seen) == 1
    assert not seen[0].is_running()
