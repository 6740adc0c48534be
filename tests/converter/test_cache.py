"""Results that compilations share: whole or not there, made once, and bounded."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from onnx_lathe.converter.compile import cache as module
from onnx_lathe.converter.compile.cache import Cache


def stage(cache: Cache, number: int, made: list[int] | None = None, seconds: float = 0.0) -> int:
    """Make a result of 1 kB."""

    def make(folder: Path) -> int:
        time.sleep(seconds)
        (folder / "file").write_bytes(bytes(1000))
        if made is not None:
            made.append(number)
        return number

    return cache.stage("kind", "what", {"number": number}, (), make, int).value


def test_results_of_one_name_live_side_by_side(tmp_path: Path) -> None:
    cache, made = Cache(tmp_path), list[int]()
    assert [stage(cache, number, made) for number in (1, 2, 1, 2)] == [1, 2, 1, 2]
    assert made == [1, 2]


def test_what_fails_or_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def make(folder: Path) -> int:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path).stage("kind", "what", {}, (), make, int)
    assert [path.name for path in tmp_path.iterdir()] == [".locks"]


def test_one_makes_what_two_want_at_the_same_time(tmp_path: Path) -> None:
    made: list[int] = []
    threads = [threading.Thread(target=stage, args=(Cache(tmp_path), 1, made, 0.1)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]


def test_a_damaged_result_is_made_again(tmp_path: Path) -> None:
    cache, made = Cache(tmp_path), list[int]()
    stage(cache, 1, made)
    next(tmp_path.glob("kind-what-*/file")).write_text("damaged")
    stage(cache, 1, made)
    assert made == [1, 1]


def test_beyond_the_limit_what_was_used_longest_ago_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT_BYTES", 2500)
    cache, made = Cache(tmp_path), list[int]()
    for number in (1, 2, 3):
        stage(cache, number, made)
    for age, folder in enumerate(sorted(tmp_path.glob("kind-*"), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(folder, (age, age))
    (tmp_path / ".part-left").mkdir()
    stage(cache, 1, made)  # used anew
    with cache.in_use(), cache.in_use():
        pass
    assert not (tmp_path / ".part-left").exists()
    assert [stage(cache, number, made) for number in (1, 3)] == [1, 3]
    assert made == [1, 2, 3]
    stage(cache, 2, made)
    assert made == [1, 2, 3, 2]
