"""The same protocol on Ray Serve: each replica holds one session."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from onnx_lathe.runtime.extras import require
from onnx_lathe.runtime.serve.keys import read_keys
from onnx_lathe.runtime.serve.limits import Limits
from onnx_lathe.runtime.serve.serve import model_name
from onnx_lathe.runtime.session import Session

DEPLOYMENT = "Model"
"""The deployment's name in Ray's configuration."""


def application(
    model: str | Path,
    *,
    name: str | None = None,
    provider: str | None = None,
    threads: int | None = None,
    require_signature: str | Path | None = None,
    identity: str | Path | None = None,
    limits: Limits | None = None,
    keys_file: str | Path | None = None,
) -> Any:
    """Return an application for Ray's ``serve.run``; how many replicas there are is said in Ray's configuration.

    Paths are those of the nodes on which replicas run, and so is the environment variable ``LATHE_SERVE_KEYS``.

    Args:
        model: An ``.onnx`` file, a bundle or an encrypted bundle.
        name: The model's name for clients; None for its folder's or file's.
        provider: As in `Session`.
        threads: As in `Session`.
        require_signature: As in `Session`.
        identity: As in `Session`.
        limits: What each replica allows; None for the defaults.
        keys_file: A file of bearer keys, as in `onnx_lathe.serve`.

    Raises:
        DependencyError: Ray is not installed.
    """
    require("ray", "starlette", "prometheus_client", extra="ray")
    serve: Any = importlib.import_module("ray.serve")
    allowed = limits or Limits()

    def build() -> Any:
        # Imported where the replica runs: Ray carries this function there, not the modules' objects.
        from onnx_lathe.runtime.serve import app
        from onnx_lathe.runtime.serve.service import Service

        def open_session() -> Session:
            return Session(
                model, provider=provider, threads=threads, require_signature=require_signature, identity=identity
            )

        keys = read_keys(None if keys_file is None else Path(keys_file))
        return app.build(Service(name or model_name(Path(model)), open_session, allowed, keys))

    # Ray keeps what is over this in its proxy; the replica's own limit answers 429 before.
    deployment = serve.deployment(name=DEPLOYMENT, max_ongoing_requests=allowed.max_requests + 1)
    return deployment(serve.ingress(build)()).bind()
