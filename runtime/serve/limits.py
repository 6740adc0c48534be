"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_lathe.runtime.errors import InputError


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        max_batch: Most rows in a run that joins requests; 1 joins none. A single larger request still runs.
        max_delay: Seconds that a request may wait for others to join it; at 0 those join that wait anyway.
        max_requests: Inference requests held at once: being read, waiting or running. More are answered 429.
        max_body: Bytes of a body; a larger one is answered 413.
        timeout: Seconds from the end of a request's headers to its answer; None for no limit.
        runs: Runs at the same time; each uses the session's threads.

    Raises:
        InputError: One is out of range.
    """

    max_batch: int = 32
    max_delay: float = 0.0
    max_requests: int = 512
    max_body: int = 64 * 2**20
    timeout: float | None = 60.0
    runs: int = 1

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_requests", "max_body", "runs"):
            _check(name, getattr(self, name) >= 1, getattr(self, name), "at least 1")
        _check("max_delay", 0.0 <= self.max_delay <= 60.0, self.max_delay, "between 0 and 60 seconds")
        _check("timeout", self.timeout is None or self.timeout > 0.0, self.timeout, "above 0 seconds")


def _check(name: str, fits: bool, got: object, expected: str) -> None:
    if not fits:
        raise InputError(name, got=str(got), expected=expected, mend=f"Give another {name}.")
