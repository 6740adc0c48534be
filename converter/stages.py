"""Stages that are skipped while their inputs stay the same, and resumed after an interruption.

A stage is a function that fills a folder. Its key is the hash of what it depends on: the values it is given (options,
the digests of earlier stages, of data), the versions of the libraries, and the source code named. The folder is called
after the key and appears under that name only when it is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter

from onnx_lathe.converter.launch import Led, alone
from onnx_lathe.runtime import loading, machine
from onnx_lathe.runtime.bundle import file_digest
from onnx_lathe.runtime.errors import BundleError
from onnx_lathe.runtime.extras import installed_version
from onnx_lathe.runtime.providers import cpu_class, default_threads
from onnx_lathe.runtime.staged import make_folder

_RESULT = "result.json"
_LONGEST_NAME = 80
"""Of what a stage works on: names of files end at 255 bytes."""
_VERSIONS = (
    "numpy",
    "scikit-learn",
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
)


T = TypeVar("T")


@dataclass(frozen=True)
class Stage(Generic[T]):
    """A finished stage.

    Attributes:
        name: What it is called.
        folder: Where its files lie.
        value: What it returned.
        digest: sha256 over the names and contents of its files and its value: what later stages depend on.
        skipped: Whether an earlier run had made it.
    """

    name: str
    folder: Path
    value: T
    digest: str
    skipped: bool


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Hold ``folder`` for this process alone.

    Raises:
        BundleError: Another process works there.
    """
    make_folder(folder)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BundleError(
                str(folder),
                got="a folder in which another run is at work",
                expected="a folder of its own for each run",
                mend="Wait for the other run, or give another output.",
            ) from None
        yield


def work_folder(output: Path) -> Path:
    """Return where the stages of a bundle keep their results: beside it, so that it can be removed alone."""
    return output.parent / ".work" / output.name


def model_digest(model: Path) -> str:
    """Return a digest of a model's graph and of the weights beside it."""
    beside = _beside(str(model), *_seen(model))
    return ":".join(known_digest(path) for path in (model, *beside))


def known_digest(file: Path) -> str:
    """Return the sha256 of a file, read once while its size and time of change stay the same."""
    return _known_digest(str(file), *_seen(file))


def _seen(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=4096)
def _known_digest(file: str, size: int, changed: int) -> str:
    del size, changed
    return file_digest(Path(file))


@functools.lru_cache(maxsize=4096)
def _beside(model: str, size: int, changed: int) -> tuple[Path, ...]:
    """Return the files of a model's weights beside it."""
    del size, changed
    return tuple(loading.external_files(Path(model)))


def stage_name(kind: str, what: str) -> str:
    """Return the name of a stage of ``kind`` that works on ``what``, whatever characters and length that has."""
    plain = "".join(each if each.isalnum() else "_" for each in what)
    if len(plain) > _LONGEST_NAME:
        plain = f"{plain[:_LONGEST_NAME]}_{hashlib.sha256(what.encode()).hexdigest()[:8]}"
    return f"{kind}-{plain}"


def run_stage(
    folder: Path,
    name: str,
    depends: Mapping[str, Any],
    code: Sequence[str],
    make: Callable[[Path], T],
    kind: type[T],
    led: Led = alone,
) -> Stage[T]:
    """Run a stage, or return what an earlier run made from the same inputs.

    Args:
        folder: The folder of all stages.
        name: The stage; one result of each name is kept.
        depends: Everything that its result depends on besides versions and code, JSON-able.
        code: The modules and packages whose source the result depends on.
        make: Fills the folder that it is given and returns a value. After an interruption it finds there what it had
            left, and may go on from it.
        kind: The type of that value: a dataclass or a plain type, kept as JSON.
        led: Where several processes make the stage together: it lets one of them decide and finish for all. They must
            see the same ``folder``.
    """
    adapter = TypeAdapter(kind)
    key = stage_key(depends, code)
    final, part = folder / f"{name}-{key}", folder / f"{name}-{key}.part"

    def found() -> dict[str, Any] | None:
        record = _read_record(final)
        if record is None:
            part.mkdir(parents=True, exist_ok=True)
        return record

    def finished() -> dict[str, Any]:
        record = _write_record(part, adapter.dump_python(value))
        os.replace(part, final)
        for old in folder.glob(f"{name}-*"):
            if old != final and old.name.removeprefix(f"{name}-").removesuffix(".part").isalnum():
                shutil.rmtree(old)
        return record

    record = led(found)
    if record is not None:
        return Stage(name, final, adapter.validate_python(record["value"]), record["digest"], skipped=True)
    value = make(part)
    return Stage(name, final, value, led(finished)["digest"], skipped=False)


def read_result(folder: Path, kind: type[T]) -> tuple[T, str] | None:
    """Return the value and the digest of a finished stage; None, and it is removed, where it is not whole."""
    record = _read_record(folder)
    return None if record is None else (TypeAdapter(kind).validate_python(record["value"]), record["digest"])


def write_result(folder: Path, value: T, kind: type[T]) -> tuple[T, str]:
    """Write down what a stage returned beside its files; return it as it will be read, and the digest of both."""
    adapter = TypeAdapter(kind)
    record = _write_record(folder, adapter.dump_python(value))
    return adapter.validate_python(record["value"]), record["digest"]


def _read_record(folder: Path) -> dict[str, Any] | None:
    if (folder / _RESULT).is_file():
        with contextlib.suppress(json.JSONDecodeError):  # it was cut off with the machine's power
            record = json.loads((folder / _RESULT).read_text())
            if record["digest"] == _digest(folder, record["value"]):
                return record
    if folder.exists():
        shutil.rmtree(folder)
    return None


def _write_record(folder: Path, value: Any) -> dict[str, Any]:
    plain = json.loads(json.dumps(value, default=str))
    record = {"value": plain, "digest": _digest(folder, plain)}
    (folder / _RESULT).write_text(json.dumps(record))
    return record


def stage_key(depends: Mapping[str, Any], code: Sequence[str]) -> str:
    """Return the hash of what a result depends on: values, the source of ``code``, the CPU and the versions."""
    total = hashlib.sha256(json.dumps(depends, sort_keys=True).encode())
    total.update(f"{machine.cpu_model()}:{cpu_class()}:{default_threads()}".encode())
    installed = {distribution: installed_version(distribution) for distribution in _VERSIONS}
    total.update(json.dumps(installed, sort_keys=True).encode())
    for module in sorted(set(code)):
        total.update(_code_digest(module))
    return total.hexdigest()[:16]


@functools.cache
def _code_digest(module: str) -> bytes:
    """Return the sha256 of a module's source, read once: what was imported runs, whatever is edited meanwhile."""
    total = hashlib.sha256()
    for source in sorted(_sources(module)):
        total.update(source.read_bytes())
    return total.digest()


def _sources(module: str) -> Iterator[Path]:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    if spec.submodule_search_locations:
        for location in spec.submodule_search_locations:
            yield from Path(location).rglob("*.py")
    else:
        yield Path(spec.origin)


def _digest(folder: Path, value: Any) -> str:
    total = hashlib.sha256(json.dumps(value, sort_keys=True).encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _RESULT):
        total.update(f"{path.relative_to(folder)}:{known_digest(path)}".encode())
    return total.hexdigest()
