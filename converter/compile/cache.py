"""Results of stages by key: found again by any compilation, whichever output it has, and shared by processes.

The key of a result is the hash of all that it depends on (`onnx_lathe.converter.stages.stage_key`). A result appears
under its key whole or not at all, and while one process makes it another that wants the same waits.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from onnx_lathe.converter.stages import Stage, read_result, stage_key, stage_name, write_result
from onnx_lathe.runtime.staged import make_folder

LIMIT_BYTES = 20 * 10**9
"""What a cache may hold between compilations; beyond it what was used longest ago goes first."""
_PART = ".part-"
_LOCKS = ".locks"
_AT_WORK = "at-work"

T = TypeVar("T")


@dataclass(frozen=True)
class Cache:
    """A folder of results. Removing it, or anything in it while no compilation runs, costs nothing but time.

    Attributes:
        folder: Where they lie.
    """

    folder: Path

    def stage(
        self,
        kind: str,
        what: str,
        depends: Mapping[str, Any],
        code: Sequence[str],
        make: Callable[[Path], T],
        value: type[T],
    ) -> Stage[T]:
        """Return what ``make`` made before from the same inputs, or let it make that now.

        Args:
            kind: What is done, such as "apply".
            what: What it is done to, for the eye: the name of the folder begins with both.
            depends: Everything that the result depends on besides versions and code, JSON-able.
            code: The modules and packages whose source the result depends on.
            make: Fills the folder that it is given and returns a value. Where it raises nothing is left.
            value: The type of that value: a dataclass or a plain type, kept as JSON.
        """
        name, key = stage_name(kind, what), stage_key(depends, code)
        final = self.folder / f"{name}-{key}"
        with self._locked(key):
            record = read_result(final, value)
            if record is not None:
                os.utime(final)
                return Stage(name, final, *record, skipped=True)
            # Beside its place, so that the renaming cannot fail halfway.
            part = Path(tempfile.mkdtemp(prefix=_PART, dir=self.folder))
            try:
                made = write_result(part, make(part), value)
                os.replace(part, final)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        return Stage(name, final, *made, skipped=False)

    @contextmanager
    def in_use(self) -> Generator[None]:
        """Keep what is found within the block; after it the oldest goes, unless another process is within such a one.

        Raises:
            OutputError: The folder cannot be made.
        """
        make_folder(self.folder / _LOCKS)
        with (self.folder / _LOCKS / _AT_WORK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            try:
                yield
            finally:
                self._trim(file.fileno())

    def _trim(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        for part in self.folder.glob(f"{_PART}*"):
            shutil.rmtree(part, ignore_errors=True)
        for key in (self.folder / _LOCKS).iterdir():
            if key.name != _AT_WORK:
                key.unlink()
        results = [path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in results}
        total = sum(sizes.values())
        for path in sorted(results, key=lambda path: path.stat().st_mtime):
            if total <= LIMIT_BYTES:
                break
            shutil.rmtree(path, ignore_errors=True)
            total -= sizes[path]

    @contextmanager
    def _locked(self, key: str) -> Generator[None]:
        make_folder(self.folder / _LOCKS)
        with (self.folder / _LOCKS / key).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
