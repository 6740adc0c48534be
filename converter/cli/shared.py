"""What the verbs share: their options, and how they answer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import TypeAdapter

from onnx_lathe.converter import launch
from onnx_lathe.converter.progress import console
from onnx_lathe.runtime.errors import InputError

if TYPE_CHECKING:
    from onnx_lathe.benchmarks.report.model import Report

LIMIT_MISSED = 3

Model = Annotated[Path, typer.Argument(help="An .onnx file or a bundle.", show_default=False)]
Recipe = Annotated[Path, typer.Argument(help="A recipe (TOML).")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="The folder of the bundle.", show_default="out/NAME")
]
Data = Annotated[
    Path,
    typer.Option("--data", help="Samples: an .npz (arrays by input name, optional label) or a folder of them."),
]
OptionalData = Annotated[Path | None, typer.Option("--data", help="Samples: an .npz or a folder of them.")]
DimsOption = Annotated[
    list[str] | None,
    typer.Option("--dims", help="A shape to be fast at, such as batch=8,seq=128; repeatable."),
]
WeightedDimsOption = Annotated[
    list[str] | None,
    typer.Option("--dims", help="A shape to be fast at, such as batch=8,seq=128; repeatable; @3 counts three times."),
]
Provider = Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of a session.", show_default="all allowed cores")]
Metric = Annotated[
    str | None,
    typer.Option(help="accuracy, f1_macro, spearman, mean_cosine, ...", show_default="what fits the data"),
]
MaxDrop = Annotated[float, typer.Option(min=0.0, max=1.0, help="How much of the metric (0..1) may be lost.")]

DEFAULT_RECIPE = Path("recipes/digits.toml")


def emit(verb: str, value: dict[str, Any], version: int = 1) -> None:
    """Print the one JSON object that ends stdout, under the schema of ``verb``, from the leading process alone."""
    content = {"schema": f"onnx-lathe/{verb}/{version}", **value}
    content = TypeAdapter(dict[str, Any]).dump_python(content, mode="json", fallback=str)
    if launch.leads():
        print(json.dumps(content))  # noqa: T201


def show_report(report: Any) -> None:
    """Print a report for people."""
    from onnx_lathe.benchmarks.report.render import render_terminal

    console.print(render_terminal(report))


def show_search(report: Report) -> None:
    """Print every form that a search tried, in order: its speed, its step, its drop, its cost and why it lost."""
    from onnx_lathe.benchmarks.report.details import candidates
    from onnx_lathe.benchmarks.report.render import render_section

    section = candidates(report)
    if section is not None:
        console.print(render_section(section))
    for sentence in report.method:
        console.print(sentence, markup=False, soft_wrap=True)


def exit_if_missed(limit: str | None) -> None:
    """End with the exit status of a missed limit, where there is one."""
    if limit is not None:
        console.print(f"limit missed: {limit}", markup=False)
        raise typer.Exit(LIMIT_MISSED)


def parse_dims(text: str) -> dict[str, int]:
    """Return the sizes that ``batch=8,seq=128`` spells."""
    sizes: dict[str, int] = {}
    for item in text.split(","):
        name, sign, size = item.strip().partition("=")
        if not sign or not name or not size.isdecimal() or int(size) < 1:
            raise InputError(
                "--dims",
                got=repr(item),
                expected="NAME=SIZE with a size of at least 1",
                mend="Write --dims batch=8,seq=128.",
            )
        sizes[name] = int(size)
    return sizes


def parse_weighted_dims(text: str) -> tuple[dict[str, int], float]:
    """Return the sizes and the weight that ``batch=1,seq=32@3`` spells; the weight is 1 where none is given."""
    sizes, sign, weight = text.partition("@")
    try:
        number = float(weight) if sign else 1.0
    except ValueError:
        number = math.nan
    if not 0.0 < number < math.inf:
        raise InputError(
            "--dims",
            got=f"the weight {weight!r}",
            expected="a positive number after the @",
            mend="Write --dims batch=1,seq=32@3.",
        )
    return parse_dims(sizes), number


def parse_share(option: str, text: str) -> float:
    """Return the share that ``5%`` or ``0.05`` spells, on 0..1."""
    number, percent = (text[:-1], 100.0) if text.endswith("%") else (text, 1.0)
    try:
        share = float(number) / percent
    except ValueError:
        share = float("nan")
    if not 0.0 <= share <= 1.0:
        raise InputError(option, got=repr(text), expected="a share of 0% to 100%", mend=f"Write {option} 5%.")
    return share
