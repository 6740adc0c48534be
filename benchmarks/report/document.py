"""The parts that a report is set from, the same for every rendering."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from onnx_lathe.benchmarks.report.text import Cell


@dataclass(frozen=True)
class Column:
    """The head of a column, and whether figures stand in it (set flush right)."""

    name: str
    numeric: bool = False


@dataclass(frozen=True)
class Row:
    """The entries of a row, and whether it is what ships."""

    cells: tuple[Cell, ...]
    chosen: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under columns; every row has an entry for each column.

    Attributes:
        columns: The heads.
        rows: The entries.
        caption: What the table is about, where the section's title does not say it.
    """

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    caption: str = ""


@dataclass(frozen=True)
class Mark:
    """A piece of text with a weight on -1..1."""

    text: str
    weight: float


@dataclass(frozen=True)
class Panel:
    """A picture under its caption: a PNG, or marked text."""

    caption: str
    image: bytes = b""
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Strip:
    """Pictures side by side under a title, and a remark on them. Only the page shows them."""

    title: str
    note: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Section:
    """A part of the report under a title of its own.

    Attributes:
        key: Its anchor.
        title: Its title.
        lead: What it tells, in a sentence.
        tables: Its figures.
        notes: What its terms mean, and why a figure is missing, a sentence each.
        code: A command to copy; empty where there is none.
        folded: Whether it is detail that opens on demand.
        strips: Pictures.
    """

    key: str
    title: str
    lead: str = ""
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    code: str = ""
    folded: bool = False
    strips: tuple[Strip, ...] = ()


@dataclass(frozen=True)
class Headline:
    """One of the few figures that stand on top: what it is, and the figure."""

    label: str
    cell: Cell


@dataclass(frozen=True)
class Document:
    """A whole report, set.

    Attributes:
        title: What it is about.
        status: Of what ships, in a word or two.
        meaning: What that status means.
        verdict: What ships and what it gained.
        reason: Why that status.
        headlines: The few figures that count most.
        warnings: What to know before relying on a figure.
        sections: The parts, in order.
    """

    title: str
    status: str
    meaning: str
    verdict: str
    reason: str
    headlines: tuple[Headline, ...]
    warnings: tuple[str, ...]
    sections: tuple[Section, ...]


def columns(*names: str, numeric: Iterable[str] = ()) -> tuple[Column, ...]:
    """Return the heads called ``names``; those in ``numeric`` hold figures."""
    figures = frozenset(numeric)
    return tuple(Column(name, name in figures) for name in names)


def row(*entries: str | Cell, chosen: bool = False) -> Row:
    """Return a row of ``entries``."""
    return Row(tuple(Cell(entry) if isinstance(entry, str) else entry for entry in entries), chosen)
