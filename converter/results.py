"""Results of ``lathe bench`` as files: kept once and for all, read back, held against each other, and shown."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from onnx_lathe.benchmarks import environment, history
from onnx_lathe.benchmarks.gate import Gate, check_environment, gate_measured, gate_recorded
from onnx_lathe.benchmarks.history import Result
from onnx_lathe.benchmarks.report.history import history_document, history_plots
from onnx_lathe.benchmarks.report.render import render_page
from onnx_lathe.benchmarks.suite import Suite
from onnx_lathe.converter.stages import work_folder
from onnx_lathe.runtime.errors import InputError
from onnx_lathe.runtime.staged import staged


@dataclass(frozen=True)
class Outputs:
    """Where a result goes, and meanwhile its cases.

    Attributes:
        file: A file of its own, never overwritten; None for none.
        history: A file whose end it is appended to; None for none.
    """

    file: Path | None = None
    history: Path | None = None

    @property
    def work(self) -> Path | None:
        """Where the cases of the file lie that are measured already; None where there is no file to go on with."""
        return None if self.file is None else work_folder(self.file)

    def check(self) -> None:
        """Refuse to overwrite a result, and to measure for a history that cannot be appended to.

        Raises:
            InputError: The file is there, or the history cannot be written or was cut short.
        """
        if self.file is not None and self.file.exists():
            raise InputError(
                str(self.file),
                got="a file that is there already",
                expected="a new one: results are never overwritten",
                mend="Name another, or use --append.",
            )
        if self.history is not None:
            history.check(self.history)

    def save(self, result: Result) -> None:
        """Write a result; its cases need not be kept any longer.

        Where the history cannot be appended to the file goes too, and the cases stay: the same command goes on.

        Raises:
            InputError: As `check`.
            OutputError: The file cannot be written.
        """
        Outputs(self.file).check()
        with contextlib.ExitStack() as undo:
            if self.file is not None:
                with staged(self.file) as part:
                    part.write_text(result.to_json() + "\n", encoding="utf-8")
                undo.callback(self.file.unlink)
            if self.history is not None:
                history.append(self.history, result)
            undo.pop_all()
        if self.work is not None:
            shutil.rmtree(self.work, ignore_errors=True)
            with contextlib.suppress(OSError):  # other results are still being measured
                self.work.parent.rmdir()


def read_baseline(file: Path, *, across_environments: bool = False) -> Suite | None:
    """Return an earlier result; None where ``file`` is a model or a bundle.

    Raises:
        InputError: It is missing, no result, of another schema, or of another environment.
    """
    if file.suffix != ".json":
        return None
    try:
        baseline = Suite.from_json(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            str(file),
            got=getattr(error, "strerror", None) or "no text",
            expected="a result that `lathe bench -o` wrote, or a model",
            mend="Name another file.",
        ) from None
    if not across_environments:
        check_environment(baseline, environment.describe())
    return baseline


def gate(suite: Suite, baseline: Suite | None, limit: float, *, across_environments: bool = False) -> tuple[Gate, ...]:
    """Judge every model against an earlier result, or without one against the first model of the same run.

    Raises:
        InputError: The environments differ, or the baseline lacks a model or a case.
    """
    if baseline is None:
        return gate_measured(suite, limit)
    return gate_recorded(baseline, suite, limit, anywhere=across_environments)


def write_history(file: Path, output: Path | None) -> tuple[Result, ...]:
    """Read a history, or a single result, and write it as a page.

    Raises:
        InputError: The history is missing, empty or corrupted.
        OutputError: The page cannot be written.
    """
    results = history.read(file)
    if output is not None:
        page = render_page(history_document(str(file), results), history_plots(results))
        with staged(output) as target:
            target.write_text(page, encoding="utf-8")
    return results
