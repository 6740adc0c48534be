"""Three renderings of one report: a page that needs no network, Markdown, and the terminal."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly import offline
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from onnx_lathe.benchmarks.report.contents import document
from onnx_lathe.benchmarks.report.document import Document, Row, Section, Table
from onnx_lathe.benchmarks.report.history import history_plots
from onnx_lathe.benchmarks.report.model import Report, Status
from onnx_lathe.benchmarks.report.plots import Plot, plots
from onnx_lathe.benchmarks.report.roofline_plot import roofline_plots
from onnx_lathe.benchmarks.report.text import Cell, clean, escape_markdown

_ANY_WIDTH = 1000
_LEAST_NAME = 16
"""Characters that a column of names gets at least in a terminal."""
_MARK = "→ "
"""Before what ships."""
_STATUS_STYLE: dict[Status, str] = {
    "certified": "bold green",
    "uncertified": "bold yellow",
    "exact": "bold blue",
    "original kept": "bold blue",
}


def render_html(report: Report) -> str:
    """Return the report as one page that loads nothing, light or dark as the reader's system asks.

    Its tables are complete without scripts; the plots need them, and carry plotly's along (about 5 MB).
    """
    past = history_plots(report.history) if len(report.history) > 1 else {}
    return render_page(document(report), {**plots(report), "roofline": roofline_plots(report.rooflines), **past})


def render_page(page: Document, drawn: Mapping[str, Sequence[Plot]] | None = None) -> str:
    """Return a document as a page, with the plots of each section by its key."""
    groups = drawn or {}
    return _page().render(
        document=page,
        plots=groups,
        figures={key: [plot.figure for plot in group] for key, group in groups.items()},
        plotly=Markup(_plotly_script()) if any(groups.values()) else "",
    )


def render_markdown(report: Report) -> str:
    """Return the report as Markdown with GitHub's tables."""
    page = document(report)
    lines = [f"# {escape_markdown(page.title)}", ""]
    lines += [f"**{page.status}**: {page.meaning}.", "", escape_markdown(page.verdict), ""]
    lines += [escape_markdown(page.reason), ""] if page.reason else []
    lines += [f"- {escape_markdown(line.label)}: {escape_markdown(line.cell.text)}" for line in page.headlines]
    lines += [""] if page.headlines else []
    lines += [line for warning in page.warnings for line in (f"> **Warning:** {escape_markdown(warning)}", "")]
    for section in page.sections:
        lines += _markdown_section(section)
    return "\n".join(lines).rstrip() + "\n"


def render_terminal(report: Report) -> RenderableType:
    """Return the verdict, the ladder and the warnings for a terminal; the rest is in the other renderings."""
    page = document(report)
    ladder = page.sections[0]
    parts: list[RenderableType] = [_terminal_head(page, report.status)]
    parts += [Padding(_Fitting(table), (1, 0, 0, 0)) for table in ladder.tables]
    parts += [Text(""), *(Text(clean(note), style="dim") for note in ladder.notes)]
    parts += [Text(f"warning: {clean(warning)}", style="yellow") for warning in page.warnings]
    return Group(*parts)


def render_section(section: Section) -> RenderableType:
    """Return a section by itself for a terminal: its tables and notes."""
    parts: list[RenderableType] = [Padding(_Fitting(table), (1, 0, 0, 0)) for table in section.tables]
    return Group(*parts, *(Text(clean(note), style="dim") for note in section.notes))


@cache
def _page() -> Any:
    environment = Environment(
        loader=PackageLoader("onnx_lathe.benchmarks.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters["base64"] = _base64
    return environment.get_template("report.html.jinja")


def _base64(content: bytes) -> str:
    return b64encode(content).decode("ascii")


def _finalize(value: object) -> object:
    """Make every text that enters the page visible; what is markup already stays as it is."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _plotly_script() -> str:
    return cast("str", cast("Any", offline).get_plotlyjs())


def _markdown_section(section: Section) -> list[str]:
    lines = [f"## {escape_markdown(section.title)}", ""]
    lines += [escape_markdown(section.lead), ""] if section.lead else []
    for table in section.tables:
        lines += [f"### {escape_markdown(table.caption)}", ""] if table.caption else []
        lines += [*_markdown_table(table), ""]
    lines += [f"- {escape_markdown(note)}" for note in section.notes]
    lines += [""] if section.notes else []
    return [*lines, f"    {clean(section.code)}", ""] if section.code else lines


def _markdown_table(table: Table) -> list[str]:
    heads = [escape_markdown(column.name) for column in table.columns]
    lines = [_markdown_row(heads), _markdown_row(["---:" if column.numeric else "---" for column in table.columns])]
    for line in table.rows:
        entries = [escape_markdown(cell.text) for cell in line.cells]
        lines.append(_markdown_row([f"**{entry}**" if line.chosen else entry for entry in entries]))
    return lines


def _markdown_row(entries: list[str]) -> str:
    return f"| {' | '.join(entries)} |"


def _terminal_head(page: Document, status: Status) -> Text:
    head = Text()
    head.append(f"{clean(page.title)}: ", style="bold").append(page.status, style=_STATUS_STYLE[status])
    return head.append(f" ({page.meaning})\n{clean(page.verdict)}")


@dataclass(frozen=True)
class _Fitting:
    """A table as the terminal is wide: intervals beside their figures, or below them, or two tables instead of one."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for separator in (" ", "\n"):
            whole = _terminal_table(self.table, separator)
            if Measurement.get(console, options.update(width=_ANY_WIDTH), whole).minimum <= options.max_width:
                yield whole
                return
        end = len(self.table.columns)
        for indices in (range((end + 1) // 2), (0, *range((end + 1) // 2, end))):
            yield _terminal_table(_columns_of(self.table, indices), "\n")


def _columns_of(table: Table, indices: Sequence[int]) -> Table:
    rows = tuple(Row(tuple(line.cells[index] for index in indices), line.chosen) for line in table.rows)
    return Table(tuple(table.columns[index] for index in indices), rows, table.caption)


def _terminal_table(table: Table, separator: str) -> RichTable:
    """Return a table whose figures are never broken; ``separator`` stands before intervals and remarks on figures."""
    title = Text(clean(table.caption), style="bold") if table.caption else None
    result = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title=title, title_justify="left")
    lines = [[_terminal_cell(cell, separator) for cell in line.cells] for line in table.rows]
    for index, column in enumerate(table.columns):
        head = Text(clean(column.name))
        if column.numeric:
            widest = max(cell_len(part) for line in lines for part in line[index].plain.split("\n"))
            result.add_column(head, justify="right", no_wrap=True, min_width=max(widest, head.cell_len))
        else:
            result.add_column(head, overflow="fold", min_width=_LEAST_NAME)
    for line, cells in zip(table.rows, lines, strict=True):
        cells[0] = Text(_MARK if line.chosen else "").append_text(cells[0])
        result.add_row(*cells, style="bold" if line.chosen else "")
    return result


def _terminal_cell(cell: Cell, separator: str) -> Text:
    entry = Text(clean(cell.value))
    for part in (cell.interval, f"({cell.note})" if cell.note else ""):
        if part:
            entry.append(separator + clean(part), style="dim")
    return entry
