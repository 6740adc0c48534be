"""What quantizing trained networks costs and gains, beside the rivals' quantizers, on the same data and in one run."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_lathe.benchmarks.measure import FINAL, measure
from onnx_lathe.benchmarks.result import Certificate, Comparison
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.converter.compile.certify import Judge
from onnx_lathe.passes import registry
from onnx_lathe.passes.run import apply
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.errors import LatheError
from onnx_lathe.runtime.samples import Samples
from tests.studies import datasets, rival_quantizers

SECONDS = 60.0
"""To measure all forms of a network in."""


@dataclass(frozen=True)
class Network:
    """A trained network and what is tried on it.

    Attributes:
        name: Of its file, without the suffix.
        load: Reads its samples from a parquet file.
        calibrate: The file that forms are calibrated on.
        judge: The file that they are judged on.
        batch: Samples in a call that is timed.
        forms: Our passes.
        rivals: The tools, as `tests.studies.rival_quantizers` names them.
    """

    name: str
    load: Callable[[Path, int | None], Samples]
    calibrate: str
    judge: str
    batch: int
    forms: Sequence[str]
    rivals: Sequence[str]


_CONV_FORMS = (
    "cleanup,quantize-static",
    "cleanup,quantize-static{ranges=mse}",
    "cleanup,equalize,quantize-static",
    "cleanup,correct-biases,quantize-static",
)
_ORT_STATIC = ("ort-static:MinMax", "ort-static:Percentile", "ort-static:Entropy")


def _of_images(name: str) -> Network:
    rivals = (*_ORT_STATIC, "ort-dynamic", "nncf")
    return Network(name, datasets.images, "cifar10-train.parquet", "cifar10-test.parquet", 1, _CONV_FORMS, rivals)


NETWORKS = (
    _of_images("cifar10-residual"),
    _of_images("cifar10-depthwise"),
    Network(
        "sst2-encoder",
        datasets.sentences,
        "sst2-train.parquet",
        "sst2-test.parquet",
        8,
        (
            "cleanup,keep-skip-apart,quantize-dynamic",
            "cleanup,smooth{alpha=search},keep-skip-apart,quantize-dynamic",
            "cleanup,keep-skip-apart,quantize-static",
            "cleanup,keep-skip-apart,quantize-static{ranges=percentile}",
            "cleanup,quantize-weights{bits=8}",
            "cleanup,quantize-weights{bits=4}",
        ),
        (*_ORT_STATIC, "ort-dynamic", "nncf:transformer"),
    ),
)
CALIBRATION_SAMPLES = 512


@dataclass(frozen=True)
class Row:
    """What one form came to.

    Attributes:
        network: The network.
        form: Our passes, or the rival's name.
        failure: Why there is no model; None where there is one.
        certificate: Its accuracy against the original's.
        speed: Against the original.
    """

    network: str
    form: str
    failure: str | None = None
    certificate: Certificate | None = None
    speed: Comparison | None = None


def run(network: Network, models: Path, data: Path, interpreter: Path | None, say: Callable[[str], None]) -> list[Row]:
    """Make every form, judge it on the whole judging file, and time all of them in one interleaved run.

    Args:
        network: What to try.
        models: The folder of the trained networks.
        data: The folder of their data.
        interpreter: A Python that has the rivals; None leaves them out.
        say: Told what is being done.
    """
    original = models / f"{network.name}.onnx"
    calibration = network.load(data / network.calibrate, CALIBRATION_SAMPLES)
    judged = network.load(data / network.judge, None)
    with tempfile.TemporaryDirectory(prefix="lathe-accuracy-") as scratch:
        folder = Path(scratch)
        made: dict[str, Path | str] = {}
        for form in network.forms:
            say(f"{network.name}: {form}")
            made[form] = _ours(original, form, calibration, folder / f"{len(made)}.onnx")
        if interpreter is not None:
            batches = _write_batches(calibration, folder / "batches")
            for tool in network.rivals:
                say(f"{network.name}: {tool}")
                made[tool] = _rival(interpreter, tool, original, batches, folder / f"{len(made)}.onnx")
        rows = _judge(network, original, made, judged, say)
        return _timed(network, original, made, rows, judged, folder, say)


def _ours(original: Path, form: str, calibration: Samples, target: Path) -> Path | str:
    try:
        apply(original, registry.parse(form), target, samples=calibration)
    except LatheError as error:
        return str(error)
    return target


def _write_batches(samples: Samples, folder: Path) -> Path:
    folder.mkdir()
    for number, batch in enumerate(samples.iter_batches(datasets.BATCH)):
        tensors.save_npz(folder / f"{number:04}.npz", batch)
    return folder


def _rival(interpreter: Path, tool: str, original: Path, batches: Path, target: Path) -> Path | str:
    script = Path(rival_quantizers.__file__)
    command = [str(interpreter), str(script), tool, str(original), str(batches), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return target if target.exists() and done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[-1]


def _judge(
    network: Network, original: Path, made: dict[str, Path | str], judged: Samples, say: Callable[[str], None]
) -> list[Row]:
    judge = Judge(original, judged, "accuracy", 0.01, "cpu", None)
    rows: list[Row] = []
    for form, model in made.items():
        if isinstance(model, str):
            rows.append(Row(network.name, form, failure=model))
            continue
        say(f"{network.name}: judge {form}")
        rows.append(Row(network.name, form, certificate=judge.certificate(judge.outputs(model))))
    return rows


def _timed(
    network: Network,
    original: Path,
    made: dict[str, Path | str],
    rows: Sequence[Row],
    judged: Samples,
    folder: Path,
    say: Callable[[str], None],
) -> list[Row]:
    feeds = folder / "feeds.npz"
    tensors.save_npz(feeds, tensors.first_batch(original, judged, network.batch))
    models = {"original": original, **{form: model for form, model in made.items() if isinstance(model, Path)}}
    start = "onnx_lathe.runtime.session:start_plain"
    subjects = [Subject(name, start, {"model": str(model), "feeds": str(feeds)}) for name, model in models.items()]
    found = measure(subjects, replace(FINAL, time_budget=SECONDS), lambda what, _: say(f"{network.name}: {what}"))
    return [row if row.failure else replace(row, speed=found.speed(row.form)) for row in rows]


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| network | form | accuracy | lost, points (95 % bound) | right to wrong / wrong to right | speed |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row.certificate is None or row.speed is None:
            lines.append(f"| {row.network} | {row.form} | failed: {row.failure} | | | |")
            continue
        judged, speed = row.certificate, row.speed.speed
        cells = (
            row.network,
            f"`{row.form}`",
            f"{judged.candidate.value:.2%}",
            f"{100 * judged.drop:.2f} ({100 * judged.bound:.2f})",
            f"{judged.losses} / {judged.gains}",
            f"{speed.value:.2f}x [{speed.low:.2f}, {speed.high:.2f}]",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
