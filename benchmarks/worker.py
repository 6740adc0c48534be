"""The process in which one subject is prepared and timed: ``python -m onnx_lathe.benchmarks.worker``.

It reads one JSON object a line, and answers each with one. The first is a subject; then come requests, such
as ``{"do": "block", "calls": 50, "limit": 0.5}``. It ends with its input. An error of the subject is not caught: the
worker dies of it, and whoever started it reads why on stderr. Only the standard library is imported here, so
that the memory of the process is the subject's.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

LEAD_IN = 0.1
"""Share of a block's calls that go before it and do not count: they wake threads and fill caches."""
LEAD_IN_MOST = 0.2
"""A call of so many seconds takes far longer than threads to wake and caches to fill: none goes before it."""
WARM_UP_WINDOW = 0.05
WARM_UP_CALLS = 3
WARM_UP_LIMIT = 2.0
WARM_UP_GAIN = 0.02
"""Warm-up ends once a window (of so many seconds and calls) is less than this share faster than the last."""
SETTLE_LIMIT = 1.0
SETTLE_STEP = 0.005
SETTLE_SHARE = 0.2
"""Settled: the threads of the process used less than this share of one core over a step, in seconds."""

Call = Callable[[], object]


def main() -> None:
    """Serve the requests on stdin until it ends."""
    requests, answers = _take_over_streams()

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    subject = json.loads(requests.readline())
    module, _, function = subject["start"].partition(":")
    start = getattr(importlib.import_module(module), function)
    answer({"imported": True})
    call: Call | None = None
    lead_in = True
    for line in requests:
        request = json.loads(line)
        if request["do"] == "prepare":
            begin = time.perf_counter()
            call = start(**subject["arguments"])
            answer({"seconds": time.perf_counter() - begin})
        elif call is None:
            raise RuntimeError(f"asked to {request['do']} before it was prepared")
        elif request["do"] == "first_call":
            call()
            answer({})
        elif request["do"] == "warm_up":
            nanoseconds = warm_up(call)
            lead_in = nanoseconds < 1e9 * LEAD_IN_MOST
            answer({"nanoseconds": nanoseconds, "settled": settle()})
        elif request["do"] == "block":
            values = block(call, request["calls"], request["limit"], lead_in=lead_in)
            answer({"nanoseconds": values, "settled": settle()})
        elif request["do"] == "offline":
            found = _load().offline(call, request["queries"], request["streams"], request["limit"])
            answer(found | {"settled": settle()})
        elif request["do"] == "server":
            found = _load().server(call, request["arrivals"], request["streams"], request["limit"])
            answer(found | {"settled": settle()})
        else:
            answer({"peak_memory": peak_memory()})


def _load() -> Any:
    """Import what only the scenarios with several streams need: others do without its memory."""
    return importlib.import_module("onnx_lathe.benchmarks.load")


def _take_over_streams() -> tuple[TextIO, TextIO]:
    """Keep stdin and stdout for the protocol; the subject reads nothing, and prints to stderr."""
    requests, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return requests, answers


def warm_up(call: Call) -> float:
    """Call until it gets no faster, and return the nanoseconds that a call then takes."""
    previous = float("inf")
    begin = time.perf_counter()
    while True:
        window: list[int] = []
        until = time.perf_counter() + WARM_UP_WINDOW
        while len(window) < WARM_UP_CALLS or time.perf_counter() < until:
            window.append(_time(call))
        median = statistics.median(window)
        if median > (1.0 - WARM_UP_GAIN) * previous or time.perf_counter() - begin > WARM_UP_LIMIT:
            break
        previous = median
    # What lives now lives to the end: later collections need not look at it again.
    gc.collect()
    gc.freeze()
    return median


def block(call: Call, calls: int, limit: float, *, lead_in: bool = True) -> list[int]:
    """Return the latencies of calls in a row, garbage collection off.

    A number of calls and not of seconds, so that every block weighs the same in a percentile: a disturbed one would
    hold fewer.

    Args:
        call: The subject.
        calls: How many, at least 1.
        limit: Seconds after which no more is begun, after the first.
        lead_in: Whether some calls go before that do not count.

    Returns:
        Nanoseconds.
    """
    gc.collect()
    gc.disable()
    for _ in range(math.ceil(LEAD_IN * calls) if lead_in else 0):
        call()
    until = time.perf_counter() + limit
    values = [_time(call)]
    while len(values) < calls and time.perf_counter() < until:
        values.append(_time(call))
    gc.enable()
    return values


def _time(call: Call) -> int:
    begin = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - begin


def settle() -> bool:
    """Wait until the threads of this process sleep, and return whether they do.

    Thread pools (onnxruntime's, OpenMP's) spin for tens of milliseconds after a call, on the cores that the
    next subject is about to be timed on.
    """
    until = time.perf_counter() + SETTLE_LIMIT
    while time.perf_counter() < until:
        begin, used = time.perf_counter(), time.process_time()
        time.sleep(SETTLE_STEP)
        if time.process_time() - used < SETTLE_SHARE * (time.perf_counter() - begin):
            return True
    return False


def peak_memory() -> int:
    """Return the peak resident bytes of this process.

    Linux carries ``ru_maxrss`` over ``execve``, so in a child it starts at what the parent held; ``VmHWM``
    starts anew.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    main()
