"""What ``compile`` gains, beside the rivals and other runtimes: one interleaved run a case, one judge for all.

Networks, their data and what the rivals make of them are made once and kept in a folder. Each case is a line of a file
of results; what is there already is not done again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from onnx_lathe.benchmarks import accuracy
from onnx_lathe.benchmarks.measure import Effort, measure
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.runtime import providers, tensors
from onnx_lathe.runtime.errors import LatheError, MeasurementError
from onnx_lathe.runtime.profile import profile
from onnx_lathe.runtime.samples import Array, Feeds
from tests.studies.cases import NETWORKS, Case, Places, load
from tests.studies.made import MAX_DROP, OURS, OURS_PROVIDER, Form, interpreter, ours, rival
from tests.studies.other_runtimes import openvino_runner, plain_runner

ORIGINAL, OPENVINO, TORCH = "onnxruntime, fp32", "OpenVINO", "torch.compile"
BATCH = 32
"""Samples judged together."""
MOST_BATCHES = 4
"""In a call, where they are run as they come: enough to meet short and long ones."""
_SHOWN = 0.02
"""Share of the time from which an operator is named."""
_RUNTIMES = "tests.studies.other_runtimes"


@dataclass(frozen=True)
class Budget:
    """What a case may take.

    Attributes:
        search: Time budget of a compilation, seconds.
        measure: Time budget of the final run, seconds.
        threads: Of every runtime; None for all allowed cores.
    """

    search: float = 60.0
    measure: float = 30.0
    threads: int | None = None


def run(
    cases: Sequence[Case], places: Places, results: Path, budget: Budget, say: Callable[[str], None]
) -> Iterator[Mapping[str, Any]]:
    """Yield the result of each case, done now or read from ``results``, a line of JSON each."""
    done = {row["case"]: row for row in read(results)}
    for case in cases:
        if case.title not in done:
            done[case.title] = _show(case, places, budget, say)
            results.parent.mkdir(parents=True, exist_ok=True)
            with results.open("a") as file:
                file.write(json.dumps(done[case.title]) + "\n")
        yield done[case.title]


def read(results: Path) -> list[dict[str, Any]]:
    """Return what was done so far."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def make_rivals(cases: Sequence[Case], places: Places, say: Callable[[str], None]) -> None:
    """Make networks, their data and all that the rivals make of them, so that `run` finds them."""
    for case in cases:
        _prepare(case, places)
        _rivals(case, places, say)


def _prepare(case: Case, places: Places) -> None:
    # Only making networks needs torch, transformers and what reads their data.
    from tests.studies import networks

    networks.prepare(case.network, places)


def _show(case: Case, places: Places, budget: Budget, say: Callable[[str], None]) -> dict[str, Any]:
    network = NETWORKS[case.network]
    _prepare(case, places)
    forms: list[Form] = []
    for name in (OURS, OURS_PROVIDER) if case.provider_goal and places.site("provider") else (OURS,):
        say(f"{case.title}: {name}")
        forms.append(ours(name, network, case.dims, places, budget.search, budget.threads))
    forms = [_judged(case, form, places, say) for form in forms] + _rivals(case, places, say)
    forms = _timed(case, forms, places, budget, say)
    left = _left(case, next((form for form in forms if form.name == OURS and not form.failure), None), places, budget)
    goals = {"goal": case.goal, "provider_goal": case.provider_goal}
    return {"case": case.title, **goals, **asdict(budget), "forms": [asdict(form) for form in forms], "left": left}


def _left(case: Case, form: Form | None, places: Places, budget: Budget) -> dict[str, float]:
    """Return the share of the time that each operator of a form takes, where it misses its goal; the longest first."""
    if form is None or form.model is None or form.speed["speed"]["value"] >= case.goal:
        return {}
    feeds = tensors.load_npz(Path(_feeds(case, places)[0]))
    shares: Counter[str] = Counter()
    for time in profile(Path(form.model), feeds, threads=budget.threads):
        shares[time.op_type] += time.seconds
    return {operator: seconds / shares.total() for operator, seconds in shares.most_common()}


def _rivals(case: Case, places: Places, say: Callable[[str], None]) -> list[Form]:
    """Return what the rivals make, judged; both once for a network."""
    found: list[Form] = []
    for tool in filter(lambda tool: interpreter(tool, places).exists(), case.tools):
        say(f"{case.network}: {tool}")
        record = places.folder / "rivals" / case.network / f"{tool}.json"
        form = _judged(case, rival(tool, NETWORKS[case.network], places), places, say)
        record.write_text(json.dumps(asdict(form)))
        found.append(form)
    if places.site("tools"):
        record = places.folder / "rivals" / case.network / "openvino.json"
        model = str(places.model(case.network))
        form = Form(**json.loads(record.read_text())) if record.exists() else Form(OPENVINO, model)
        found.append(_judged(case, form, places, say))
        record.write_text(json.dumps(asdict(found[-1])))
    return [*found, Form(TORCH)] if case.full else found


def _judged(case: Case, form: Form, places: Places, say: Callable[[str], None]) -> Form:
    """Return a form with its accuracy on samples that nobody has seen; as it is where it has that, or no model."""
    if form.model is None or form.certificate or form.failure:
        return form
    say(f"{case.network}: judge {form.name}")
    network = NETWORKS[case.network]
    samples = load(places, network, "judge")
    try:
        outputs = accuracy.predict(_runner(form, places), samples, BATCH)
        original = _original_outputs(case.network, places)
        if not set(original) <= set(outputs) and len(original) == len(outputs):
            # Runtimes may call them otherwise; their order they keep.
            outputs = dict(zip(original, outputs.values(), strict=True))
        certificate = accuracy.judge(network.metric, original, outputs, samples, MAX_DROP)
    except (LatheError, *providers.onnxruntime_errors()) as error:
        return replace(form, failure=f"made, but it does not run: {' '.join(str(error).split())[:300]}")
    return replace(form, certificate=asdict(certificate))


@cache
def _original_outputs(network: str, places: Places) -> Mapping[str, Array]:
    original = places.model(network)
    samples = load(places, NETWORKS[network], "judge")
    return accuracy.predict(plain_runner(str(original), None), samples, BATCH)


def _runner(form: Form, places: Places) -> Callable[[Feeds], Mapping[str, Array]]:
    assert form.model is not None
    site = places.site("tools")
    if form.name == OPENVINO or form.model.endswith(".xml"):
        return openvino_runner(form.model, str(site), None)
    return plain_runner(form.model, None)


def _timed(case: Case, forms: Sequence[Form], places: Places, budget: Budget, say: Callable[[str], None]) -> list[Form]:
    """Time the original and every form in one interleaved run; what cannot be started is a failure."""
    feeds = _feeds(case, places)
    original = Form(ORIGINAL, str(places.model(case.network)))
    subjects = {
        form.name: _subject(form, case, feeds, places, budget.threads)
        for form in (original, *forms)
        if not form.failure
    }
    # Three processes give an interval; more would mostly start sessions.
    effort = Effort(3, 4, 0.05, budget.measure, most_rounds=200)
    failures: dict[str, str] = {}
    while True:
        try:
            found = measure(list(subjects.values()), effort, lambda what, _: say(f"{case.title}: {what}"))
        except MeasurementError as error:
            if error.where not in subjects or error.where == ORIGINAL:
                raise
            failures[error.where] = f"made, but it does not run: {error.got}"
            del subjects[error.where]
        else:
            break
    rows = [replace(original, latency=found.timing(ORIGINAL).p50.value)]
    for form in forms:
        if form.name in subjects:
            speed, latency = asdict(found.speed(form.name)), found.timing(form.name).p50.value
            rows.append(replace(form, speed=speed, latency=latency))
        else:
            rows.append(replace(form, failure=form.failure or failures[form.name]))
    return rows


def _feeds(case: Case, places: Places) -> list[str]:
    """Write what is run, and return the files."""
    model, network = places.model(case.network), NETWORKS[case.network]
    samples = load(places, network, "judge")
    batches: Sequence[Feeds] = samples.batches[:MOST_BATCHES]
    if "seq" in case.dims:
        batches = [tensors.random_feeds(model, case.dims)]
    elif case.dims:
        batches = [tensors.first_batch(model, samples, case.dims["batch"])]
    folder = places.folder / "feeds"
    folder.mkdir(exist_ok=True)
    files = [folder / f"{case.title.replace(' ', '')}-{number}.npz" for number in range(len(batches))]
    for file, batch in zip(files, batches, strict=True):
        tensors.save_npz(file, batch)
    return [str(file) for file in files]


def _subject(form: Form, case: Case, feeds: Sequence[str], places: Places, threads: int | None) -> Subject:
    shared: dict[str, Any] = {"feeds": list(feeds), "threads": threads}
    if form.name == TORCH:
        return Subject(form.name, f"{_RUNTIMES}:torch_compiled", {"network": case.network, **shared})
    shared["model"] = form.model
    if form.name == OPENVINO or str(form.model).endswith(".xml"):
        return Subject(form.name, f"{_RUNTIMES}:openvino", {"site": str(places.site("tools")), **shared})
    if form.name == OURS_PROVIDER:
        shared |= {"provider": "openvino", "site": str(places.site("provider"))}
    return Subject(form.name, f"{_RUNTIMES}:plain", shared)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the results as Markdown: the goals, then a table of all forms a case."""
    lines = [
        "| case | ours | to reach | certified | best rival on onnxruntime | OpenVINO's best |",
        "|---|---:|---:|---|---|---|",
    ]
    lines += [_summary(row) for row in rows]
    for row in rows:
        lines += ["", f"### {row['case']}", "", *_forms(row)]
        left = [f"{operator} {share:.0%}" for operator, share in row["left"].items() if share >= _SHOWN]
        lines += ["", f"The goal is missed; what is left of ours: {', '.join(left)}."] if left else []
    return "\n".join(lines)


def _summary(row: Mapping[str, Any]) -> str:
    forms = {form["name"]: form for form in row["forms"]}
    others = [form for name, form in forms.items() if form["speed"] and name not in (OURS, OURS_PROVIDER, TORCH)]
    foreign = [form for form in others if _is_openvino(form)]
    rivals = [form for form in others if not _is_openvino(form)]
    goal = f"{row['goal']:.1f}x" + (f" ({row['provider_goal']:.1f}x)" if row["provider_goal"] else "")
    own = _speed(forms[OURS]) + (f" ({_speed(forms[OURS_PROVIDER])})" if OURS_PROVIDER in forms else "")
    cells = (row["case"], own, goal, _certified(forms[OURS]), _best(rivals), _best(foreign))
    return f"| {' | '.join(cells)} |"


def _is_openvino(form: Mapping[str, Any]) -> bool:
    return form["name"] in (OPENVINO, "nncf-openvino")


def _best(forms: Sequence[Mapping[str, Any]]) -> str:
    """Return the fastest of those that keep their accuracy; without one the fastest, with what it loses."""
    keeping = [form for form in forms if form["certificate"] and form["certificate"]["drop"] <= MAX_DROP]
    best = max(keeping or forms, key=lambda form: form["speed"]["speed"]["value"], default=None)
    if best is None:
        return "none"
    return f"{_speed(best)} {best['name']}" + ("" if keeping else f", loses {_drop(best)}")


def _forms(row: Mapping[str, Any]) -> Iterator[str]:
    yield "| form | speed | median | metric | lost, points (95 % bound) | size | to make | memory to make |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for form in row["forms"]:
        if form["failure"]:
            failure = f"failed: {form['failure'].replace('|', '/')}"
            made = f"{_seconds(form)} | {_bytes(form['peak_bytes'])}"
            yield f"| {form['name']} | {failure} | | | | | {made} |"
            continue
        judged = form["certificate"]
        cells = (
            form["name"] + (f" `{form['note'].replace('|', ', ')}`" if form["note"] else ""),
            "1.00x" if form["name"] == ORIGINAL else _speed(form, with_interval=True),
            f"{1000 * form['latency']:.2f} ms",
            f"{judged['candidate']['value']:.4f}" if judged else "",
            _drop(form),
            _bytes(form["size"]),
            _seconds(form),
            _bytes(form["peak_bytes"]),
        )
        yield f"| {' | '.join(cells)} |"


def _speed(form: Mapping[str, Any], *, with_interval: bool = False) -> str:
    if not form["speed"]:
        return "failed"
    speed = form["speed"]["speed"]
    interval = f" [{speed['low']:.2f}, {speed['high']:.2f}]" if with_interval else ""
    return f"{speed['value']:.2f}x{interval}"


def _certified(form: Mapping[str, Any]) -> str:
    judged = form["certificate"]
    return "" if not judged else f"{'yes' if judged['bound'] <= judged['max_drop'] else 'no'}: {_drop(form)}"


def _drop(form: Mapping[str, Any]) -> str:
    judged = form["certificate"]
    return f"{100 * judged['drop']:.2f} ({100 * judged['bound']:.2f})" if judged else ""


def _seconds(form: Mapping[str, Any]) -> str:
    return "" if form["seconds"] is None else f"{form['seconds']:.0f} s"


def _bytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.0f} MB"
