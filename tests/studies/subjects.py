"""What the studies time: a model in a plain session, made slower by a known share."""

from __future__ import annotations

import time
from collections.abc import Callable

from onnx_lathe.runtime.session import start_plain


def slowed(model: str, feeds: str, by: float) -> Callable[[], object]:
    """Prepare one inference on one thread that takes ``by`` (a share, 0 or more) longer than the model alone."""
    call = start_plain(model, feeds, threads=1)

    def run() -> object:
        began = time.perf_counter_ns()
        result = call()
        until = began + (time.perf_counter_ns() - began) * (1.0 + by)
        while time.perf_counter_ns() < until:
            pass
        return result

    return run
