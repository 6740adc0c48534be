"""Subjects for the tests of `measure`: prepared and called in worker processes, and so light to import."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path


def sleep(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def noop() -> Callable[[], None]:
    return lambda: None


def record(name: str, log: str) -> Callable[[], None]:
    """Every call adds the subject's name and its process to a file."""

    def call() -> None:
        with Path(log).open("a") as file:
            file.write(f"{name} {os.getpid()}\n")
        time.sleep(0.001)

    return call


def chatter() -> Callable[[], None]:
    """Prints, from Python and around it, and reads stdin: none of it may reach the protocol."""
    os.write(1, b'{"seconds": -1}\n')
    assert sys.stdin.read() == ""

    def call() -> None:
        sys.stdout.write('{"nanoseconds": []}\n')
        sys.stdout.flush()

    return call


def hold(megabytes: int) -> Callable[[], None]:
    held = b"x" * (megabytes << 20)
    return lambda: time.sleep(0.001 if held else 0.0)


def fail_to_start() -> Callable[[], None]:
    raise ValueError("there is no such model")


def fail_to_run() -> Callable[[], None]:
    def call() -> None:
        raise RuntimeError("the kernel failed")

    return call


def die() -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signal.SIGKILL)


def spin() -> Callable[[], None]:
    """Never lets its second thread sleep."""

    def forever() -> None:
        while True:
            pass

    threading.Thread(target=forever, daemon=True).start()
    return lambda: time.sleep(0.001)


def stall_once(seconds: float, at: int) -> Callable[[], None]:
    """One call, counted from 0, takes long."""
    calls = iter(range(1_000_000_000))
    return lambda: time.sleep(seconds if next(calls) == at else 0.0)


def fail_later(after: int) -> Callable[[], None]:
    """Fails once it has been called so often."""
    calls = iter(range(after))

    def call() -> None:
        time.sleep(0.0001)
        if next(calls, None) is None:
            raise RuntimeError("the kernel failed under load")

    return call


def fail_in_threads() -> Callable[[], None]:
    """Works in the main thread, where it is warmed up, and nowhere else."""

    def call() -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("not here")
        time.sleep(0.001)

    return call
