"""`lathe deploy`: what another server needs to serve a bundle, as files."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from onnx_lathe.runtime import loading
from onnx_lathe.runtime.bundle import MANIFEST, MODEL, Bundle, open_bundle
from onnx_lathe.runtime.errors import InputError, ProviderError, UnsupportedModelError
from onnx_lathe.runtime.serve import warm
from onnx_lathe.runtime.serve.datatypes import check_datatypes, datatype
from onnx_lathe.runtime.serve.serve import check_name
from onnx_lathe.runtime.session import Session
from onnx_lathe.runtime.signing import SIGNATURE
from onnx_lathe.runtime.staged import make_folder
from onnx_lathe.runtime.tensors import TensorSpec

_TRITON_PROVIDERS = {
    "cpu": ("KIND_CPU", None),
    "cuda": ("KIND_GPU", None),
    "openvino": ("KIND_CPU", "cpu_execution_accelerator"),
    "tensorrt": ("KIND_GPU", "gpu_execution_accelerator"),
}
"""By provider: the kind of instance group, and where Triton's onnxruntime backend takes an accelerator's name."""

_APP = '''"""A Ray Serve application that onnx-lathe wrote; in this folder: serve run serve.yaml"""

from pathlib import Path

from onnx_lathe.runtime.serve.limits import Limits
from onnx_lathe.runtime.serve.ray_serve import application


def build(arguments):
    """Return the application with the arguments of serve.yaml."""
    limits = Limits(max_batch=int(arguments["max_batch"]), max_delay=float(arguments["max_delay"]))
    return application(
        Path(__file__).parent / arguments["bundle"],
        name=arguments["bundle"],
        threads=int(arguments["threads"]),
        limits=limits,
        keys_file=arguments.get("keys_file"),
    )
'''

_CONFIG = """proxy_location: EveryNode
http_options:
  host: 127.0.0.1
  port: 8000
applications:
  - name: {name}
    route_prefix: /
    import_path: lathe_app:build
    args:
      bundle: {name}
      max_batch: {max_batch}
      max_delay: {max_delay}
      threads: {threads}
    deployments:
      - name: Model
        num_replicas: {replicas}
        ray_actor_options:
          num_cpus: {threads}
"""


@dataclass(frozen=True)
class _Wanted:
    name: str
    max_batch: int
    max_delay: float
    replicas: int
    threads: int | None

    def __post_init__(self) -> None:
        check_name(self.name)
        for option, low in (("max_batch", 1), ("max_delay", 0), ("replicas", 1), ("threads", 1)):
            value = getattr(self, option)
            if value is not None and value < low:
                raise InputError(option, got=str(value), expected=f"at least {low}", mend=f"Give another {option}.")


def deploy(
    bundle: str | Path,
    to: str,
    output: str | Path,
    *,
    name: str | None = None,
    max_batch: int = 32,
    max_delay: float = 0.0,
    replicas: int = 1,
    threads: int | None = None,
) -> tuple[Path, ...]:
    """Write what another server needs to serve a bundle, whole or not at all.

    Args:
        bundle: The folder.
        to: "triton": ``output`` is, or becomes, a model repository that holds the model beside others. "ray-serve":
            ``output`` becomes a folder with an application, its configuration and the bundle.
        output: The folder.
        name: The model's name for clients; None for the bundle's folder.
        max_batch: Most rows in a run that joins requests; 1 joins none.
        max_delay: Seconds that a request may wait for others to join it.
        replicas: Sessions: instances of Triton, replicas of Ray Serve.
        threads: Threads of each; None for what the bundle says, else Triton's default, or 1 on Ray, which plans with
            the CPUs of each replica.

    Returns:
        The files.

    Raises:
        BundleError: It is no bundle, or a file of it is missing or changed.
        InputError: The target is unknown, the name is none, a number is out of range, or something lies in the way.
        ProviderError: Triton's onnxruntime backend has no such provider.
        UnsupportedModelError: The target has no way to describe an input or output.
    """
    source, folder = Path(bundle), Path(output)
    if to not in _WRITERS:
        raise InputError("--to", got=repr(to), expected=" or ".join(_WRITERS), mend="Choose one of them.")
    wanted = _Wanted(name or source.resolve().name, max_batch, max_delay, replicas, threads)
    target = folder / wanted.name if to == "triton" else folder
    if target.exists():
        raise InputError(str(target), got="something that lies there", expected="nothing", mend="Give another output.")
    opened = open_bundle(source)
    root = folder.absolute().parent
    make_folder(root)
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{folder.name}.") as scratch:
        place = Path(scratch) / "made"
        place.mkdir()
        _WRITERS[to](opened, place, wanted)
        target.parent.mkdir(exist_ok=True)
        os.rename(place, target)
    return tuple(sorted(path for path in target.rglob("*") if path.is_file()))


def _ray(bundle: Bundle, place: Path, wanted: _Wanted) -> None:
    name = wanted.name
    _copy(bundle.folder, place / name, [*bundle.manifest["files"], MANIFEST])
    if (bundle.folder / SIGNATURE).is_file():
        _copy(bundle.folder, place / name, [SIGNATURE])
    (place / "lathe_app.py").write_text(_APP)
    values = {**asdict(wanted), "name": json.dumps(name), "threads": wanted.threads or bundle.threads or 1}
    (place / "serve.yaml").write_text(_CONFIG.format(**values))


def _triton(bundle: Bundle, place: Path, wanted: _Wanted) -> None:
    if bundle.provider not in _TRITON_PROVIDERS:
        raise ProviderError(
            f"{bundle.folder}: provider {bundle.provider!r}",
            got="one that Triton's onnxruntime backend does not have",
            expected=" or ".join(_TRITON_PROVIDERS),
            mend="Compile the model for another provider.",
        )
    session = Session(bundle.folder)
    check_datatypes(str(bundle.model), (*session.inputs, *session.outputs))
    _check_ranks(bundle, (*session.inputs, *session.outputs))
    alone = _alone(session) if wanted.max_batch > 1 else "joining was not asked for"
    (place / "config.pbtxt").write_text(_config(bundle, session, alone, wanted))
    graph = loading.read_graph(bundle.model)
    external = (tensor for tensor in loading.tensors(graph) if loading.is_external(tensor))
    beside = {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"}
    _copy(bundle.folder, place / "1", [MODEL, *sorted(beside)])


def _config(bundle: Bundle, session: Session, alone: str | None, wanted: _Wanted) -> str:
    """Return Triton's model configuration, in protobuf's text format."""
    name, max_batch = wanted.name, wanted.max_batch
    kind, accelerator = _TRITON_PROVIDERS[bundle.provider]
    skipped = 1 if alone is None else 0
    parts = [f"# max_batch_size is 0: {alone}"] if alone else []
    parts += [
        f"name: {json.dumps(name)}",
        'backend: "onnxruntime"',
        f'default_model_filename: "{MODEL}"',
        f"max_batch_size: {0 if alone else max_batch}",
        *(_tensor("input", spec, skipped) for spec in session.inputs),
        *(_tensor("output", spec, skipped) for spec in session.outputs),
        f"instance_group [ {{ count: {wanted.replicas} kind: {kind} }} ]",
    ]
    if alone is None:
        parts.append(f"dynamic_batching {{ max_queue_delay_microseconds: {round(wanted.max_delay * 1e6)} }}")
    if (threads := wanted.threads or bundle.threads) is not None:
        value = f'{{ string_value: "{threads}" }}'
        parts.append(f'parameters {{ key: "intra_op_thread_count" value: {value} }}')
    if accelerator is not None:
        named = f"{accelerator} : [ {{ name: {json.dumps(bundle.provider)} }} ]"
        parts.append(f"optimization {{ execution_accelerators {{ {named} }} }}")
    return "\n".join(parts) + "\n"


def _tensor(field: str, spec: TensorSpec, skipped: int) -> str:
    kind = (datatype(spec.dtype) or "").replace("BYTES", "STRING")
    dims = ", ".join(str(dim if isinstance(dim, int) else -1) for dim in spec.shape[skipped:])
    text = json.dumps(spec.name, ensure_ascii=False)
    return f"{field} [ {{ name: {text} data_type: TYPE_{kind} dims: [ {dims} ] }} ]"


def _alone(session: Session) -> str | None:
    """Return why Triton must not join requests; None where it may."""
    if reason := warm.warm_up(session):
        return reason
    if any(len(spec.shape) < 2 for spec in (*session.inputs, *session.outputs)):
        return "a tensor has no dimension but the batch, and Triton wants one"
    return None


def _check_ranks(bundle: Bundle, specs: Iterable[TensorSpec]) -> None:
    for spec in specs:
        if not spec.shape:
            raise UnsupportedModelError(
                f"{bundle.model}: {spec.name!r}",
                got="a scalar, or a tensor of unknown rank",
                expected="at least one dimension, which Triton asks for",
                mend="Export the model with a dimension of 1 there.",
            )


def _copy(source: Path, target: Path, names: Iterable[str]) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


_WRITERS: Mapping[str, Callable[[Bundle, Path, _Wanted], None]] = {"triton": _triton, "ray-serve": _ray}
