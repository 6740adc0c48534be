"""The parent's side of a worker: starts it, asks it, and says what went wrong with it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.runtime.errors import MeasurementError


class Worker:
    """A fresh process that prepares and times one subject; as a context manager it is killed on the way out.

    It begins to import the subject at once; `prepare` waits for that.

    Args:
        subject: What to prepare.
        timeout: Seconds that one step may take.
    """

    def __init__(self, subject: Subject, timeout: float) -> None:
        self._subject = subject
        self._timeout = timeout
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        # -P and the parent's path: the worker finds the very modules that the parent would, and none by its folder.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "onnx_lathe.benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | {"PYTHONPATH": path},
            text=True,
            encoding="utf-8",
        )
        self._send({"start": subject.start, "arguments": dict(subject.arguments)})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Kill, not ask: a worker holds nothing that wants an orderly end, and after Ctrl-C nobody wants to wait.
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            # A request that the worker never read is still in the buffer.
            with contextlib.suppress(BrokenPipeError):
                if stream:
                    stream.close()

    def prepare(self) -> float:
        """Wait for the imports, prepare the subject, and return the seconds that preparing took."""
        self._receive("be imported")
        return float(self._ask("be prepared", do="prepare")["seconds"])

    def first_call(self) -> float:
        """Call the subject for the first time, and return the seconds since its process was started."""
        self._ask("be called", do="first_call")
        return time.perf_counter() - self._began

    def warm_up(self) -> float:
        """Call the subject until it gets no faster, and return the seconds that a call then takes."""
        return float(self._ask_and_settle("warm up", do="warm_up")["nanoseconds"]) / 1e9

    def block(self, calls: int, limit: float) -> tuple[float, ...]:
        """Return the latencies in seconds of so many calls in a row, or of those begun within ``limit`` seconds."""
        answer = self._ask_and_settle("run a block", do="block", calls=calls, limit=limit)
        return tuple(value / 1e9 for value in answer["nanoseconds"])

    def offline(self, queries: int, streams: int, limit: float) -> tuple[int, float]:
        """Serve so many queries from the start, none begun after ``limit`` seconds: queries served, and seconds."""
        answer = self._ask_and_settle("serve queries", do="offline", queries=queries, streams=streams, limit=limit)
        return int(answer["queries"]), answer["nanoseconds"] / 1e9

    def server(self, arrivals: Sequence[int], streams: int, limit: float) -> Mapping[str, Sequence[int]]:
        """Serve queries as they arrive; arguments and result are those of `onnx_lathe.benchmarks.load.server`."""
        return self._ask_and_settle("serve queries", do="server", arrivals=arrivals, streams=streams, limit=limit)

    def peak_memory(self) -> int:
        """Return the peak resident bytes of the process so far."""
        return int(self._ask("report its memory", do="report")["peak_memory"])

    def _ask_and_settle(self, step: str, **request: Any) -> dict[str, Any]:
        """Ask for something after which the worker's threads must sleep."""
        answer = self._ask(step, **request)
        if not answer["settled"]:
            raise MeasurementError(
                self._subject.name,
                got="threads that keep a core busy between calls",
                expected="threads that sleep a second after a call",
                mend="Let nothing run in the background: it would slow what is measured next.",
            )
        return answer

    def _ask(self, step: str, **request: Any) -> dict[str, Any]:
        self._send(request)
        return self._receive(step)

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin
        # A worker that died does not read; `_receive` then finds out why.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def _receive(self, step: str) -> dict[str, Any]:
        """Return the next answer, which ends ``step``."""
        assert self._process.stdout
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self._timeout, give_up)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if line.endswith("\n"):
            return dict(json.loads(line))
        if late.is_set():
            raise MeasurementError(
                self._subject.name,
                got=f"no answer for {self._timeout:g} s",
                expected=f"a subject that can {step}",
                mend="Allow more time, or run it alone to see where it hangs.",
            )
        raise MeasurementError(
            self._subject.name,
            got=self._obituary(),
            expected=f"a subject that can {step}",
            mend=f"Call {self._subject.start} with the same arguments to see it fail.",
        )

    def _obituary(self) -> str:
        """Return how the worker ended and the last thing that it said."""
        status = self._process.wait()
        end = f"exit status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return f"a worker that died ({end}): {lines[-1]}" if lines else f"a worker that died ({end})"
