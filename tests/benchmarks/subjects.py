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
