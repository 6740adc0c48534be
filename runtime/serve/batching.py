"""Dynamic batching: requests that wait together run together, and each is answered as if it had run alone.

All bookkeeping happens on the event loop, so that it needs no locks; only runs happen in threads.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np

from onnx_lathe.runtime.errors import TensorError
from onnx_lathe.runtime.samples import Array, Feeds
from onnx_lathe.runtime.serve.faults import too_late, unavailable
from onnx_lathe.runtime.serve.limits import Limits
from onnx_lathe.runtime.serve.metrics import Metrics
from onnx_lathe.runtime.session import Stop


class Run(Protocol):
    """Computes the named outputs (all where none is named) of checked feeds; raises TensorError."""

    def __call__(self, feeds: Feeds, outputs: Sequence[str], *, stop: Stop | None = None) -> Mapping[str, Array]:
        """Return arrays by output name."""
        ...


Answer = Mapping[str, Array] | TensorError
_STOPPING = "the server is stopping"


@dataclass(frozen=True, eq=False)
class _Job:
    feeds: Feeds
    outputs: tuple[str, ...]
    answer: asyncio.Future[Mapping[str, Array]]
    arrived: float
    rows: int
    alike: object
    """Jobs with equal ones may run together; None for a job that runs alone."""


class Batcher:
    """Runs requests in order of arrival, those together that wait together and are alike.

    A request is left out of a run where nobody waits for it any more; one that leaves during a run changes nothing for
    the others, and a run that nobody waits for any more is stopped. Where a run of several fails, each runs again
    alone, so that none suffers from another's values.

    Args:
        run: The model.
        joins: Whether requests may be joined along their first axis at all.
        limits: How many rows and how long to wait for them, and how many runs at a time.
        metrics: Where to count.
    """

    def __init__(self, run: Run, *, joins: bool, limits: Limits, metrics: Metrics) -> None:
        self._run, self._joins, self._limits, self._metrics = run, joins, limits, metrics
        self._waiting: deque[_Job] = deque()
        self._closed = False
        self._arrival = asyncio.Event()
        self._turn = asyncio.Lock()
        self._threads = ThreadPoolExecutor(limits.runs, "run")
        self._workers = [asyncio.create_task(self._work()) for _ in range(limits.runs)]

    async def infer(self, feeds: Feeds, outputs: Sequence[str], deadline: float | None) -> Mapping[str, Array]:
        """Return the outputs called ``outputs``, or all, for checked ``feeds``.

        Args:
            feeds: Arrays by input name.
            outputs: Names; empty for all.
            deadline: The event loop's time after which nobody waits for the answer; None for no limit.

        Raises:
            TensorError: The model cannot run on these values.
            RequestError: The deadline passed, or the server ends.
        """
        if self._closed:
            raise unavailable(_STOPPING)
        loop = asyncio.get_running_loop()
        rows, alike = _alike(feeds) if self._joins else (1, None)
        job = _Job(feeds, tuple(outputs), loop.create_future(), loop.time(), rows, alike)
        self._waiting.append(job)
        self._arrival.set()
        self._count()
        try:
            async with asyncio.timeout_at(deadline):
                return await job.answer
        except TimeoutError:
            raise too_late() from None
        finally:
            job.answer.cancel()
            if job in self._waiting:
                self._waiting.remove(job)
                self._count()

    async def close(self) -> None:
        """Stop; what still waits is answered that the server ends. A run is stopped."""
        self._closed = True
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        for job in self._waiting:
            _settle(job, unavailable(_STOPPING))
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _count(self) -> None:
        self._metrics.queued.set(len(self._waiting))

    async def _work(self) -> None:
        while True:
            async with self._turn:
                jobs = await self._take()
            await self._compute(jobs)

    async def _take(self) -> list[_Job]:
        """Return the first job with those that join it, once they are many enough or it has waited long enough."""
        loop = asyncio.get_running_loop()
        while True:
            self._arrival.clear()
            if not self._waiting:
                await self._arrival.wait()
                continue
            first = self._waiting[0]
            jobs = self._joined(first)
            left = first.arrived + self._limits.max_delay - loop.time()
            if first.alike is None or left <= 0 or sum(job.rows for job in jobs) >= self._limits.max_batch:
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._arrival.wait()
        for job in jobs:
            self._waiting.remove(job)
            self._metrics.queue_seconds.observe(loop.time() - job.arrived)
        self._count()
        return jobs

    def _joined(self, first: _Job) -> list[_Job]:
        jobs, rows = [first], first.rows
        if first.alike is not None:
            for job in list(self._waiting)[1:]:
                if job.alike == first.alike and rows + job.rows <= self._limits.max_batch:
                    jobs.append(job)
                    rows += job.rows
        return jobs

    async def _compute(self, jobs: list[_Job]) -> None:
        """Run jobs together; where that fails, one by one those that somebody still waits for."""
        try:
            answers = await self._in_thread(jobs) if len(jobs) > 1 else None
            for number, job in enumerate(jobs):
                if answers is not None:
                    _settle(job, answers[number])
                elif not job.answer.done() and (alone := await self._in_thread([job])) is not None:
                    _settle(job, alone[0])
        except asyncio.CancelledError:
            for job in jobs:
                _settle(job, unavailable(_STOPPING))
            raise

    async def _in_thread(self, jobs: list[_Job]) -> list[Answer] | None:
        """Return the answers of one run; None where it failed, and then a defect was told to those who wait."""
        stop = Stop()
        for job in jobs:
            job.answer.add_done_callback(lambda _: stop() if all(each.answer.done() for each in jobs) else None)
        requests = [(job.feeds, job.outputs, job.rows) for job in jobs]
        run = asyncio.get_running_loop().run_in_executor(self._threads, self._answers, requests, stop)
        await asyncio.wait([run])
        if (failure := run.exception()) is not None:  # a defect, or memory: the worker goes on, nobody hangs
            for job in jobs:
                _settle(job, failure)
            return None
        return run.result()

    def _answers(self, jobs: Sequence[tuple[Feeds, tuple[str, ...], int]], stop: Stop) -> list[Answer] | None:
        """Run jobs at once, in a thread; None where several could not be run together."""
        return [self._alone(*jobs[0], stop)] if len(jobs) == 1 else self._together(jobs, stop)

    def _together(self, jobs: Sequence[tuple[Feeds, tuple[str, ...], int]], stop: Stop) -> list[Answer] | None:
        """Return the answers of one run; None where it failed, or an output does not have a row for each of input."""
        feeds = {name: np.concatenate([each[name] for each, _, _ in jobs]) for name in jobs[0][0]}
        named = [outputs for _, outputs, _ in jobs]
        wanted = tuple(dict.fromkeys(chain.from_iterable(named))) if all(named) else ()
        sizes = [rows for _, _, rows in jobs]
        whole = self._alone(feeds, wanted, sum(sizes), stop)
        if isinstance(whole, TensorError) or any(
            not array.ndim or len(array) != sum(sizes) for array in whole.values()
        ):
            return None
        ends = np.cumsum(sizes)
        return [
            {name: whole[name][end - rows : end] for name in outputs or whole}
            for (_, outputs, rows), end in zip(jobs, ends.tolist(), strict=True)
        ]

    def _alone(self, feeds: Feeds, outputs: tuple[str, ...], rows: int, stop: Stop) -> Answer:
        start = time.perf_counter()
        try:
            return self._run(feeds, outputs, stop=stop)
        except TensorError as error:
            return error
        finally:
            self._metrics.compute_seconds.observe(time.perf_counter() - start)
            self._metrics.rows.observe(rows)


def _alike(feeds: Feeds) -> tuple[int, object]:
    """Return the rows of a request, and its shapes without them; (1, None) where its inputs disagree about rows."""
    rows = {array.shape[0] if array.ndim else 0 for array in feeds.values()}
    if len(rows) != 1 or 0 in rows:
        return 1, None
    return rows.pop(), tuple((name, array.shape[1:]) for name, array in sorted(feeds.items()))


def _settle(job: _Job, answer: Mapping[str, Array] | BaseException) -> None:
    if job.answer.done():  # its client left
        return
    if isinstance(answer, BaseException):
        job.answer.set_exception(answer)
    else:
        job.answer.set_result(answer)
