"""What a server counts, in a registry of its own: two servers in one process share nothing."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Prometheus metrics of one server.

    Attributes:
        requests: Requests by ``endpoint`` (infer or other) and ``status``; 499 where the client left before its answer.
        held: Inference requests that are being read, waiting or running.
        queued: Requests that wait to run.
        rows: Rows (the first axis) of each run.
        queue_seconds: How long each request waited to run.
        compute_seconds: How long each run took.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "lathe_requests", "Requests by endpoint and status.", ("endpoint", "status"), registry=registry
        )
        self.held = Gauge("lathe_requests_held", "Requests being read, waiting or running.", registry=registry)
        self.queued = Gauge("lathe_queue_length", "Inference requests that wait to run.", registry=registry)
        self.rows = Histogram("lathe_batch_rows", "Rows of each run.", buckets=_ROWS, registry=registry)
        self.queue_seconds = Histogram(
            "lathe_queue_seconds", "How long a request waited to run.", buckets=_SECONDS, registry=registry
        )
        self.compute_seconds = Histogram(
            "lathe_compute_seconds", "How long a run took.", buckets=_SECONDS, registry=registry
        )

    def text(self) -> bytes:
        """Return all of them in Prometheus's text format."""
        return generate_latest(self._registry)
