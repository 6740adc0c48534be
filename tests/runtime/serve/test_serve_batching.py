from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from onnx_lathe.runtime.errors import TensorError
from onnx_lathe.runtime.serve import warm
from onnx_lathe.runtime.serve.batching import Batcher
from onnx_lathe.runtime.serve.faults import RequestError
from onnx_lathe.runtime.serve.limits import Limits
from onnx_lathe.runtime.serve.metrics import Metrics
from onnx_lathe.runtime.session import Session
from tests.graphs import LINEAR, write


class Doubler:
    """Doubles x; refuses a 13; waits for its gate; keeps what it was given."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.runs: list[list[float]] = []

    def __call__(self, feeds, outputs, *, stop=None):
        self.runs.append(feeds["x"][:, 0].tolist())
        assert self.gate.wait(20)
        if (feeds["x"] == 13).any():
            raise TensorError("x", got="13", expected="luck", mend="Give another.")
        if (feeds["x"] == 99).any():
            raise MemoryError
        return dict.fromkeys(outputs or ("y", "z"), feeds["x"] * 2)


def request(value: float, rows: int = 1, width: int = 1) -> dict[str, np.ndarray]:
    return {"x": np.full((rows, width), value, np.float32)}


def attempt(case: Callable[[Batcher, Doubler], Awaitable[None]], *, joins: bool = True, **limits: float) -> Doubler:
    run = Doubler()

    async def main() -> None:
        batcher = Batcher(run, joins=joins, limits=Limits(**limits), metrics=Metrics())
        try:
            await asyncio.wait_for(case(batcher, run), 20)
        finally:
            run.gate.set()
            await batcher.close()

    asyncio.run(main())
    return run


async def occupied(batcher: Batcher, run: Doubler) -> asyncio.Task:
    """Return a request that runs, so that those after it wait."""
    first = asyncio.create_task(batcher.infer(request(0, width=3), (), None))
    while not run.runs:
        await asyncio.sleep(0.001)
    return first


def ask(batcher: Batcher, *values: float, outputs=()) -> list[asyncio.Task]:
    return [asyncio.create_task(batcher.infer(request(value), outputs, None)) for value in values]


def test_what_waits_together_runs_together_and_each_gets_its_own() -> None:
    async def case(batcher: Batcher, run: Doubler) -> None:
        first = await occupied(batcher, run)
        tasks = ask(batcher, 1, 2, 3)
        wide = asyncio.create_task(batcher.infer(request(4, rows=2), ("z",), None))
        odd = asyncio.create_task(batcher.infer(request(5, width=2), (), None))
        await asyncio.sleep(0)
        run.gate.set()
        await first
        for value, task in zip((1, 2, 3), tasks, strict=True):
            answer = await task
            assert {name: array.tolist() for name, array in answer.items()} == {"y": [[2 * value]], "z": [[2 * value]]}
        assert {name: array.tolist() for name, array in (await wide).items()} == {"z": [[8], [8]]}
        assert (await odd)["y"].tolist() == [[10, 10]]

    assert attempt(case).runs == [[0], [1, 2, 3, 4, 4], [5]]


def test_no_run_joins_more_rows_than_allowed() -> None:
    async def case(batcher: Batcher, run: Doubler) -> None:
        first = await occupied(batcher, run)
        tasks = ask(batcher, 1, 2, 3)
        await asyncio.sleep(0)
        run.gate.set()
        await asyncio.gather(first, *tasks)

    assert attempt(case, max_batch=2).runs == [[0], [1, 2], [3]]
    assert attempt(case, joins=False).runs == [[0], [1], [2], [3]]


def test_a_request_waits_for_others_as_long_as_it_may() -> None:
    async def case(batcher: Batcher, run: Doubler) -> None:
        run.gate.set()
        first = ask(batcher, 1)
        await asyncio.sleep(0.05)
        second = ask(batcher, 2)  # makes the batch full: the rest of the 30 s is not waited for
        await asyncio.gather(*first, *second)

    assert attempt(case, max_batch=2, max_delay=30.0).runs == [[1, 2]]

    async def lonely(batcher: Batcher, run: Doubler) -> None:
        run.gate.set()
        await asyncio.gather(*ask(batcher, 1))

    assert attempt(lonely, max_delay=0.01).runs == [[1]]


def test_a_cancelled_request_neither_runs_nor_disturbs_the_others() -> None:
    async def case(batcher: Batcher, run: Doubler) -> None:
        first = await occupied(batcher, run)
        one, two, three = ask(batcher, 1, 2, 3)
        await asyncio.sleep(0)
        two.cancel()
        await asyncio.sleep(0)
        run.gate.set()
        assert [(await task)["y"].tolist() for task in (one, three)] == [[[2]], [[6]]]
        await first

    assert attempt(case).runs == [[0], [1, 3]]


def test_one_that_is_cancelled_while_it_runs_leaves_the_answers_of_its_batch_alone() -> None:
    async def case(batcher: Batcher, run: Doubler) -> None:
        run.gate.clear()
        tasks = ask(batcher, 1, 2, 3)
        while not run.runs:
            await asyncio.sleep(0.001)
        tasks[1].cancel()
        await asyncio.sleep(0)
        run.gate.set()
        assert [(await task)["y"].tolist() for task in (tasks[0], tasks[2])] == [[[2]], [[6]]]

    assert attempt(case).runs == [[1, 2, 3]]


def test_a_request_that_fails_fails_alone() -> None:
    async def case(batcher: Batcher, run: Doubler) -> None:
        run.gate.set()
        good, bad, last = await asyncio.gather(*ask(batcher, 1, 13, 3), return_exceptions=True)
        assert good["y"].tolist() == [[2]]
        assert last["y"].tolist() == [[6]]
        assert isinstance(bad, TensorError)

    assert attempt(case).runs == [[1, 13, 3], [1], [13], [3]]


def test_a_defect_reaches_its_requests_and_the_next_ones_are_served() -> None:
    async def case(batcher: Batcher, run: Doubler) -> None:
        run.gate.set()
        (broken,) = await asyncio.gather(*ask(batcher, 99), return_exceptions=True)
        assert isinstance(broken, MemoryError)
        (after,) = await asyncio.gather(*ask(batcher, 1))
        assert after["y"].tolist() == [[2]]

    assert attempt(case).runs == [[99], [1]]


def test_an_expired_request_is_dropped_from_the_queue() -> None:
    async def case(batcher: Batcher, run: Doubler) -> None:
        first = await occupied(batcher, run)
        soon = asyncio.get_running_loop().time() + 0.01
        with pytest.raises(RequestError, match="the deadline of the request passed") as caught:
            await batcher.infer(request(1), (), soon)
        assert caught.value.status == 504
        run.gate.set()
        await first

    assert attempt(case).runs == [[0]]


def test_after_a_failed_run_who_left_is_not_run_again() -> None:
    async def case(batcher: Batcher, run: Doubler) -> None:
        first = await occupied(batcher, run)
        gone, bad, kept = ask(batcher, 1, 13, 2)
        await asyncio.sleep(0)
        run.gate.set()
        await first
        while len(run.runs) < 2:
            await asyncio.sleep(0.001)
        gone.cancel()
        with pytest.raises(TensorError):
            await bad
        assert (await kept)["y"].tolist() == [[4]]

    runs = attempt(case).runs
    assert runs[:2] == [[0], [1, 13, 2]]
    assert [13] in runs
    assert [2] in runs


def test_who_comes_after_the_end_is_told() -> None:
    async def case(batcher: Batcher, run: Doubler) -> None:
        await batcher.close()
        with pytest.raises(RequestError, match="the server is stopping"):
            await batcher.infer(request(1), (), None)

    attempt(case)


def test_the_end_answers_what_waits() -> None:
    async def case(batcher: Batcher, run: Doubler) -> None:
        first = await occupied(batcher, run)
        waiting = ask(batcher, 1)
        await asyncio.sleep(0)
        await batcher.close()
        for task in (first, *waiting):
            with pytest.raises(RequestError, match="the server is stopping"):
                await task

    attempt(case)


def warmed(path: Path, text: str) -> str | None:
    return warm.warm_up(Session(write(path / "m.onnx", text), threads=1))


def test_a_model_whose_rows_stand_alone_may_be_batched(tmp_path: Path) -> None:
    assert warmed(tmp_path, LINEAR) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("f (float[2, 4] x) => (float[2, 4] y) { y = Relu(x) }", "has no symbolic first axis"),
        ("f (float[N, 4] x) => (float y) { y = ReduceSum<keepdims = 0>(x) }", "has no symbolic first axis"),
        ("f (float[N, 4] x) => (float[N, 4] y) { m = ReduceMax<keepdims = 0>(x)  y = Div(x, m) }", "another 'y'"),
        ("f (float[N, 4] x) => (float[M, 4] y) { y = Concat<axis = 0>(x, x) }", "another 'y'"),
        (
            "f (float[N, 4] x) => (float[N, 4] y) "
            "{ q, s, z = DynamicQuantizeLinear(x)  y = DequantizeLinear(q, s, z) }",
            "dynamic quantization rounds all rows of a run on one scale",
        ),
        ("f (float[N, 5] x) => (float[N, 2] y) <int64[2] s = {-1, 2}> { y = Reshape(x, s) }", "did not run on random"),
    ],
)
def test_a_model_whose_rows_depend_on_each_other_is_not_batched(tmp_path: Path, text: str, reason: str) -> None:
    assert reason in (warmed(tmp_path, text) or "")
