"""The report: the same content in three renderings, nothing loaded, nothing that a name could break."""

from __future__ import annotations

import importlib.resources
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser

import plotly.graph_objects
import pytest
from rich.console import Console

from onnx_lathe.benchmarks.report.beyond import beyond
from onnx_lathe.benchmarks.report.contents import document
from onnx_lathe.benchmarks.report.difference import graph_difference as graph_difference_section
from onnx_lathe.benchmarks.report.document import Document, Mark, Panel, Section, Strip
from onnx_lathe.benchmarks.report.model import MeasuredShape, Report, Rung
from onnx_lathe.benchmarks.report.plots import pareto_front, plots
from onnx_lathe.benchmarks.report.render import (
    render_html,
    render_markdown,
    render_page,
    render_section,
    render_terminal,
)
from onnx_lathe.benchmarks.report.text import (
    change,
    clean,
    count,
    duration,
    escape_markdown,
    limit,
    percent,
    plain,
    points,
    size,
    size_unit,
    speed,
    time_unit,
)
from onnx_lathe.benchmarks.result import Interval
from onnx_lathe.runtime.errors import InputError
from tests.benchmarks.reports import INT8, evaluation, full_report, graph_difference, small_report

HOSTILE = "</script><script>alert(1)</script> a|b `c` *d* __e__ [f](http://g.example) %{h} \x1b[31m \u202e \udcff\nnext"

SMALL_MARKDOWN = """\
# digits

**certified**: with 95 % confidence the drop is within the budget.

model.onnx is the student: 3.33x as fast as the teacher.

Its drop of 0.20 points is certified within 2 points.

- speed against teacher: 3.33x [3.10, 3.50] (faster)
- median latency: 1.23 ms [1.21, 1.26]
- drop of accuracy: 0.20 points (95 % bound 0.93 points, budget 2 points)
- file: 0.395 MB (12.5 times smaller than teacher)

## The ladder

Every step from where it started to what ships; what ships is marked.

### batch 32

| network | parameters | MACs | file | accuracy | p50 | p90 | peak memory | speed |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| teacher | 1.23 M | 12.3 M | 4.94 MB | 99.0 % [97.0, 99.7] | 4.10 ms [4.00, 4.20] | — | 52.0 MB | 1.00x (reference) |
| **student (distilled)** | **98,765** | **—** | **0.395 MB** | **98.8 % [96.8, 99.6]** | **1.23 ms [1.21, 1.26]** \
| **—** | **51.0 MB** | **3.33x [3.10, 3.50]** |
| teacher in torch | — | — | — | — | — | — | — | — |

- p50: half of the calls take at most this long. p90: nine in ten do.
- speed: the latency of teacher divided by this network's, from calls made in turn.
- MACs: multiply-accumulate operations of one call.
- peak memory: of the whole process that runs the network, imports included. 1 MB is 10^6 bytes.
- Brackets: the 95 % interval of the figure before them.
- — teacher, p90: it takes 64 calls, there were fewer.
- — student, p90: it takes 64 calls, there were fewer.
- — teacher in torch, accuracy: judged as the teacher.
- — teacher in torch, latency: torch is not here.

## Who is faster

How many times as fast each network is, and how sure that is.

| network | against | speed | verdict | why |
| --- | --- | ---: | --- | --- |
| student | teacher | 3.33x [3.10, 3.50] | faster | beyond the noise of 1.0 % |

- faster, slower: beyond what the reference shows against itself, in at least four of five fresh processes.
- Brackets: the 95 % interval of the figure before them.

## What it costs in accuracy

Judged on samples that no decision was made on, against teacher.

| network | accuracy | drop | 95 % bound | budget | samples | lost | gained | verdict |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |
| **student** | **98.8 % [96.8, 99.6]** | **0.20 points** | **0.93 points** | **2 points** | **500** | **3** | **2** \
| **certified** |

- drop: the original's metric minus this network's, on the same samples; negative where it gained.
- certified: with 95 % confidence the drop, were all such samples judged, is within the budget.
- lost: samples that the original had right and this network has wrong. gained: the reverse.
- Brackets: the 95 % interval of the figure before them.
- The bound: Tango's score bound of paired proportions.

## How it was measured

- Every network runs in fresh processes of its own. They take turns in short blocks, A B C C B A, so that whatever \
changes in the machine meets all of them alike, and only one works at a time.
- Intervals are 95 %: of p50 and p90 by order statistics; of a speed from the ratios of paired blocks \
(Hodges-Lehmann), the wider of that over pairs and that over processes.
- batch 32: 1 fresh process of each network, 2 blocks, 4 calls in all.

## Do it again

    lathe convert recipes/digits.toml
"""


class Page(HTMLParser):
    """What a test asks of a page: its anchors, tables, visible text, scripts, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.loads: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.figures = ""
        self.policy = ""
        self._inside: list[str] = []
        self._cell = False
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self._inside = [tag] if tag in ("script", "style") else []
        self.loads += [named[key] or "" for key in ("src", "href", "data", "action", "srcset") if key in named]
        if tag in ("section", "details"):
            self.anchors.append(named["id"] or "")
        if tag == "script":
            self.scripts.append(named)
        if tag == "meta" and named.get("http-equiv") == "Content-Security-Policy":
            self.policy = named["content"] or ""
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._inside = []
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._inside == ["script"] and self.scripts[-1].get("id") == "figures":
            self.figures += data
        if not self._inside:
            self.text += data
        if self._cell:
            self.tables[-1][-1][-1] += data

    def rows(self, table: int) -> list[list[str]]:
        return [[" ".join(cell.split()) for cell in row] for row in self.tables[table]]


def ladder_of(report: Report) -> list[list[str]]:
    table = document(report).sections[0].tables[0]
    return [[column.name for column in table.columns], *([cell.text for cell in row.cells] for row in table.rows)]


def terminal(report: Report, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render_terminal(report))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("report", [small_report(), full_report()], ids=["small", "full"])
def test_the_ladder_is_the_same_in_every_rendering(report: Report):
    want = ladder_of(report)
    assert Page(render_html(report)).rows(0) == want
    lines = [line for line in render_markdown(report).splitlines() if line.startswith("|")]
    markdown = [[cell.strip(" *") for cell in line.strip("|").split(" | ")] for line in lines[: len(want) + 1]]
    assert [markdown[0], *markdown[2:]] == want
    shown = terminal(report, 400).splitlines()
    start = next(number for number, line in enumerate(shown) if line.startswith("network"))
    rows = [re.split(r"\s{2,}", line.strip().removeprefix("→ ")) for line in shown[start : start + len(want) + 1]]
    assert [rows[0], *rows[2:]] == want


@pytest.mark.parametrize("width", [80, 120, 160])
def test_a_narrow_terminal_still_shows_every_figure_whole(width: int):
    report = full_report()
    shown = terminal(report, width)
    assert all(len(line) <= width for line in shown.splitlines())
    assert "…" not in shown
    for row in document(report).sections[0].tables[0].rows:
        for cell in row.cells[1:]:
            assert cell.value in shown
            assert cell.interval in shown


def test_markdown_of_a_small_report():
    assert render_markdown(small_report()) == SMALL_MARKDOWN


def test_sections_of_a_full_report_stand_in_html_and_markdown_alike():
    report = full_report()
    sections = document(report).sections
    page = Page(render_html(report))
    assert page.anchors == [section.key for section in sections]
    assert page.anchors == [
        *("ladder", "comparisons", "accuracy", "beyond", "distillation", "training"),
        *("candidates", "edits", "operators", "roofline", "difference", "environment", "method", "reproduce"),
    ]
    titles = re.findall(r"^## (.*)$", render_markdown(report), flags=re.MULTILINE)
    assert titles == [section.title for section in sections]
    for number, table in enumerate(table for section in sections for table in section.tables):
        assert page.rows(number)[1:] == [[cell.text for cell in row.cells] for row in table.rows]
    for warning in report.warnings:
        assert warning in page.text
    assert report.verdict in page.text


def test_what_ships_is_compared_beyond_its_metric():
    report = full_report()
    section = next(section for section in document(report).sections if section.key == "beyond")
    figures, distances, classes = section.tables
    assert [column.name for column in figures.columns] == ["figure", "teacher", INT8, "change", "better"]
    names = [row.cells[0].text for row in figures.rows]
    assert names == ["accuracy", "precision", "recall", "F1", "expected calibration error"]
    assert re.fullmatch(r"-?\d\.\d\d points", figures.rows[0].cells[3].value)
    assert [row.cells[0].text for row in distances.rows][:2] == [
        "right before, wrong after",
        "wrong before, right after",
    ]
    assert len(classes.rows) == 10
    assert classes.caption.endswith("the 10 with the most loss")
    assert any("one class is always the worst" in note for note in section.notes)
    unchanged = replace(report, rungs=(Rung("teacher"),))
    assert "beyond" not in [section.key for section in document(unchanged).sections]


def test_a_section_stands_alone_in_a_terminal():
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(render_section(beyond(evaluation(classes=2), "A", "B")))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "How far the answers of B lie from those of A" in shown
    assert "class 1" in shown
    assert "most loss" not in shown


def test_pictures_are_part_of_the_page_and_their_text_stays_text():
    strip = Strip(
        HOSTILE,
        HOSTILE,
        (Panel(HOSTILE, image=b"\x89PNG"), Panel("tokens", marks=(Mark(HOSTILE, 0.5), Mark("b", -1.0)))),
    )
    section = Section("samples", "Samples", strips=(strip,))
    made = Document("title", "agree", "meaning", "verdict", "", (), (), (section,))
    page = render_page(made)
    assert Page(page).loads == ["data:image/png;base64,iVBORw=="]
    assert Page(page).scripts == []
    assert Page(page).text.count(clean(HOSTILE)) == 4
    assert "var(--accent) 22.5%" in page
    assert "var(--series-2) 45.0%" in page


def test_details_group_what_passes_left_alone_and_show_their_oracles():
    tables = {table.caption: table for section in document(full_report()).sections for table in section.tables}
    alone = [[cell.text for cell in row.cells] for row in tables["What they left alone"].rows]
    assert [row[2:] for row in alone] == [
        ["Gemm", "1", "its output is an output of the graph", "node_gemm"],
        ["Conv", "5", "fewer than 4 input channels", "node_conv0, node_conv1, node_conv2 and 2 more"],
    ]
    checks = [[cell.text for cell in row.cells] for row in tables["Does the graph compute what it must?"].rows]
    assert checks[0][2:5] == [
        "edited graph against its reference graph (whole model)",
        "3.1e-07 relative error",
        "at most 1e-05 relative error",
    ]
    assert checks[1][3:5] == ["48.2 dB", "at least 30 dB"]


def test_the_graphs_difference_is_summed_up_by_what_happened():
    tables = {table.caption: table for section in document(full_report()).sections for table in section.tables}
    told = [[cell.text for cell in row.cells] for row in tables["What happened to nodes"].rows]
    assert told == [
        ["DequantizeLinear", "added", "27", "added0, added1, ..."],
        ["Conv", "reads DequantizeLinear", "6", "conv0, conv1, ..."],
        ["Relu", "removed", "2", "relu1, relu2"],
        ["Gemm → MatMulInteger", "replaced", "1", "head"],
    ]
    weights = [[cell.text for cell in row.cells] for row in tables["What happened to weights"].rows]
    assert weights[0] == [
        *("float → int8", "other type", "as before", "3", "442 kB", "111 kB", "conv1.weight, conv2.weight, ..."),
    ]
    assert weights[1][1:3] == ["other shape", "[64, 100] → [40, 100]"]
    assert [row[1] for row in weights[2:]] == ["gone", "new"]
    counted = [[cell.text for cell in row.cells] for row in tables["Operators whose number changed"].rows]
    assert counted[0] == ["DequantizeLinear", "0", "27", "+27"]
    assert counted[-1] == ["all nodes", "12", "48", "+36"]


def test_a_long_difference_is_cut_and_says_so():
    section = graph_difference_section(replace(full_report(), difference=graph_difference(groups=50)))
    assert section is not None
    rows = section.tables[-1].rows
    assert len(rows) == 21
    assert [cell.text for cell in rows[-1].cells][:1] == ["and 33 more"]
    assert graph_difference_section(small_report()) is None


def test_the_page_loads_nothing_and_holds_the_script_of_the_plots_once():
    page = Page(render_html(full_report()))
    assert page.loads == []
    assert page.policy.startswith("default-src 'none';")
    assert "http" not in page.policy
    assert [script.get("id") for script in page.scripts] == ["figures", None, None]


def test_a_report_without_plots_carries_no_script():
    page = render_html(replace(small_report(), shapes=(), rungs=(Rung("a", file_bytes=10),)))
    assert Page(page).scripts == []
    assert len(page) < 100_000


def test_hostile_names_are_text_everywhere():
    small = small_report()
    shape = small.shapes[0]
    timing = replace(shape.measurement.timings[1], name=HOSTILE)
    comparison = replace(shape.measurement.comparisons[0], name=HOSTILE)
    measurement = replace(shape.measurement, timings=(shape.measurement.timings[0], timing), comparisons=(comparison,))
    report = replace(
        small,
        title=HOSTILE,
        verdict=HOSTILE,
        reason=HOSTILE,
        command=HOSTILE,
        metric=HOSTILE,
        warnings=(HOSTILE,),
        rungs=(small.rungs[0], Rung(HOSTILE, HOSTILE, chosen=True, operators={HOSTILE: 1})),
        certificates={HOSTILE: small.certificates["student"]},
        shapes=(MeasuredShape(HOSTILE, measurement),),
    )
    seen = clean(HOSTILE)
    page = Page(render_html(report))
    assert len(page.scripts) == 3
    assert page.loads == []
    assert page.text.count(seen) >= 5
    assert page.rows(0)[2][0] == " ".join(f"{seen} ({seen})".split())
    json.loads(page.figures)
    assert "%{h}" not in page.figures
    markdown = render_markdown(report)
    markdown.encode()
    assert not re.search(r"(?<!\\)<|(?<!\\)`|(?<!\\)\]\(", markdown.replace(f"    {seen}", ""))
    ladder = [line for line in markdown.splitlines() if line.startswith("|")][:4]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in ladder} == {10}
    assert "\x1b" not in terminal(report, 200) + markdown + page.text
    assert "[31m" in terminal(report, 2000)


def test_what_is_missing_is_a_dash_with_its_reason():
    report = replace(
        small_report(),
        status="original kept",
        metric=None,
        certificates={},
        shapes=(),
        rungs=(Rung("model", parameters=None, file_bytes=None, missing={"parameters": "it is encrypted"}),),
    )
    page = document(report)
    assert [[cell.text for cell in row.cells] for row in page.sections[0].tables[0].rows] == [["model", "—", "—"]]
    assert page.sections[0].notes == (
        "Nothing was measured: there are no latencies.",
        "— model, parameters: it is encrypted.",
    )
    assert page.headlines == ()
    assert [section.key for section in page.sections] == ["ladder", "reproduce"]
    assert Page(render_html(report)).rows(0)[1] == ["model", "—", "—"]
    assert "| model | — | — |" in render_markdown(report)
    assert "model" in terminal(report, 80)


def test_several_shapes_have_a_ladder_each():
    small = small_report()
    report = replace(small, shapes=(small.shapes[0], replace(small.shapes[0], name="batch 1")))
    page = document(report)
    assert [table.caption for table in page.sections[0].tables] == ["batch 32", "batch 1"]
    assert [line.label for line in page.headlines][:2] == [
        "speed against teacher, batch 32",
        "median latency, batch 32",
    ]
    assert [cell.text for row in page.sections[1].tables[0].rows for cell in row.cells[:3]] == [
        *("student", "teacher", "batch 32"),
        *("student", "teacher", "batch 1"),
    ]
    assert len(page.sections[0].notes) == len(set(page.sections[0].notes))


def test_an_uncertified_rung_says_how_many_samples_it_would_take():
    small = small_report()
    certificate = replace(small.certificates["student"], bound=0.03, needed=1234)
    some = document(replace(small, status="uncertified", certificates={"student": certificate}))
    assert "student: at this drop it would take about 1,234 samples to certify." in some.sections[2].notes
    assert some.sections[2].tables[0].rows[0].cells[-1].value == "not certified"
    none = document(replace(small, certificates={"student": replace(certificate, needed=None, bound=float("inf"))}))
    assert none.sections[2].notes[-1] == "student: at this drop no number of samples within reach would certify it."
    assert none.sections[2].tables[0].rows[0].cells[3].value == "no finite bound"


def test_a_verdict_that_is_no_difference_stands_beside_the_speed():
    small = small_report()
    shape = small.shapes[0]
    unsure = replace(shape.measurement.comparisons[0], verdict="inconclusive")
    measurement = replace(shape.measurement, comparisons=(unsure,))
    report = replace(small, shapes=(replace(shape, measurement=measurement),))
    assert ladder_of(report)[2][-1] == "3.33x [3.10, 3.50] (inconclusive)"


@pytest.mark.parametrize("make", [small_report, full_report])
def test_json_brings_the_same_report_back(make: Callable[[], Report]):
    report = make()
    again = Report.from_json(report.to_json())
    assert again.to_json() == report.to_json()
    assert render_markdown(again) == render_markdown(report)
    assert json.loads(report.to_json())["schema"] == "onnx-lathe/report/2"


def test_json_keeps_a_figure_that_is_infinite():
    full = full_report()
    edit = replace(full.edits[1], checks=(replace(full.edits[1].checks[0], measured=float("inf")),))
    again = Report.from_json(replace(full, edits=(edit,)).to_json())
    assert again.edits[0].checks[0].measured == float("inf")
    assert "infinite dB" in render_markdown(again)


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("{", "no JSON"),
        ("[]", "schema None"),
        ('{"schema": "onnx-lathe/report/9"}', "schema 'onnx-lathe/report/9'"),
        ('{"schema": "onnx-lathe/report/2"}', "title: Field required"),
    ],
)
def test_what_is_no_report_is_refused(text: str, got: str):
    with pytest.raises(InputError) as caught:
        Report.from_json(text, "report.json")
    assert caught.value.where == "report.json"
    assert got in caught.value.got
    assert caught.value.expected == "JSON of schema 'onnx-lathe/report/2'"


@pytest.mark.parametrize(
    ("shown", "want"),
    [
        (duration(Interval(1.234e-3, 1.212e-3, 1.261e-3)).text, "1.23 ms [1.21, 1.26]"),
        (duration(Interval(9.876e-7, 9.8e-7, 9.9e-7)).text, "988 ns [980, 990]"),
        (duration(Interval(2.0, 1.9, 2.4)).text, "2.00 s [1.90, 2.40]"),
        (duration(Interval(1.2341e-3, 1.2340e-3, 1.2342e-3)).text, "1.2341 ms [1.2340, 1.2342]"),
        (duration(Interval(9.999e-4, 9.9e-4, 1.01e-3), (1e-3, "ms")).text, "1.00 ms [0.99, 1.01]"),
        (duration(Interval(0.0, 0.0, 0.0)).text, "0.00 ns"),
        (percent(Interval(0.984, 0.97, 0.992)).text, "98.4 % [97.0, 99.2]"),
        (percent(Interval(1.0, 1.0, 1.0)).text, "100.0 %"),
        (speed(Interval(5.123, 5.01, 5.204)).text, "5.12x [5.01, 5.20]"),
        (speed(Interval(12.34, 11.0, 13.0)).text, "12.3x [11.0, 13.0]"),
        (change(Interval(-0.002, -0.0093, 0.0051)).text, "-0.20 points [-0.93, 0.51]"),
        (change(Interval(0.0, 0.0, 0.0)).text, "0.00 points"),
        (plain(Interval(0.0341, 0.0312, 0.0402)).text, "0.0341 [0.0312, 0.0402]"),
        (plain(Interval(123.4, 120.1, 130.9)).text, "123 [120, 131]"),
        (plain(Interval(0.0, 0.0, 0.0)).text, "0"),
        (points(0.00204), "0.20 points"),
        (points(-0.00001), "0.00 points"),
        (points(float("inf")), "no finite bound"),
        (limit(0.02), "2 points"),
        (limit(0.01), "1 point"),
        (limit(0.07), "7 points"),
        (size(999), "999 B"),
        (size(1_234_567), "1.23 MB"),
        (size(123_456, (1e6, "MB")), "0.123 MB"),
        (count(999_999), "999,999"),
        (count(1_234_567_890), "1.23 G"),
    ],
)
def test_a_figure_has_its_unit_and_no_more_digits_than_it_needs(shown: str, want: str):
    assert shown == want


@pytest.mark.parametrize(
    ("unit", "want"),
    [
        (time_unit([4e-3, 5e-4]), (1e-3, "ms")),
        (time_unit([1.2, 5e-3]), (1e-3, "ms")),
        (time_unit([]), (1e-9, "ns")),
        (size_unit([4_000_000, 395_000]), (1e6, "MB")),
        (size_unit([395_000]), (1e3, "kB")),
    ],
)
def test_one_unit_serves_a_column(unit: tuple[float, str], want: tuple[float, str]):
    assert unit == want


def test_markdown_shows_a_name_as_it_is():
    assert escape_markdown("a|b *c* `d` <e> __f__ g_h [i](j) \\") == r"a\|b \*c\* \`d\` \<e\> \_\_f\_\_ g_h [i\](j) \\"


def test_the_pareto_front_has_no_point_that_another_beats():
    points = [(2.0, 0.9), (1.0, 0.8), (1.0, 0.7), (3.0, 0.9), (1.5, 0.75), (4.0, 0.95)]
    assert pareto_front(points) == [(1.0, 0.8), (2.0, 0.9), (4.0, 0.95)]
    assert pareto_front([]) == []


def test_plotly_accepts_every_figure_and_each_axis_names_its_unit():
    drawn = plots(full_report())
    assert [len(group) for group in drawn.values()] == [4, 2]
    for plot in (plot for group in drawn.values() for plot in group):
        figure = json.loads(re.sub(r'"--[a-z0-9-]+"', '"#123456"', json.dumps(plot.figure, allow_nan=False)))
        plotly.graph_objects.Figure(figure)
        assert re.search(r"\(.+\)|epoch", figure["layout"]["xaxis"]["title"]["text"])
        assert plot.title
        assert plot.note


def test_every_colour_of_a_plot_is_a_variable_of_the_page():
    page = _template()
    used = set(
        re.findall(
            r'"(--[a-z0-9-]+)"', json.dumps([plot.figure for group in plots(full_report()).values() for plot in group])
        )
    )
    assert used
    for theme in _themes(page):
        assert used <= set(theme)


def test_text_and_marks_stand_out_in_both_themes():
    # WCAG 2.2, success criteria 1.4.3 (text, 4.5) and 1.4.11 (graphics, 3).
    for theme in _themes(_template()):
        for back in ("--page", "--card", "--tint"):
            assert _contrast(theme["--ink"], theme[back]) >= 7.0
            assert _contrast(theme["--muted"], theme[back]) >= 4.5
        for text, back in (
            ("--warn-ink", "--warn"),
            ("--good", "--card"),
            ("--caution", "--card"),
            ("--accent", "--card"),
        ):
            assert _contrast(theme[text], theme[back]) >= 4.5
        for mark in ("--quiet", *(f"--series-{number}" for number in range(1, 7))):
            assert _contrast(theme[mark], theme["--card"]) >= 3.0


def _template() -> str:
    return (importlib.resources.files("onnx_lathe.benchmarks.report") / "report.html.jinja").read_text("utf-8")


def _themes(page: str) -> Sequence[dict[str, str]]:
    blocks = re.findall(r":root \{(.*?)\}", page, flags=re.DOTALL)
    assert len(blocks) == 2, "a light theme and a dark one"
    return [dict(re.findall(r"(--[a-z0-9-]+): (#[0-9a-f]{6});", block)) for block in blocks]


def _contrast(a: str, b: str) -> float:
    dark, light = sorted((_luminance(a), _luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
