"""Reports for tests: a small one whose every word is known, and a full one like those that a recipe makes."""

from __future__ import annotations

import numpy as np

from onnx_lathe.benchmarks.evaluation import Evaluation, evaluate
from onnx_lathe.benchmarks.limits import ModelRoofline, OperatorShare
from onnx_lathe.benchmarks.proportions import wilson
from onnx_lathe.benchmarks.report.model import (
    AppliedEdit,
    CandidateResult,
    Curve,
    DistillationScore,
    LeftAlone,
    MeasuredShape,
    OracleCheck,
    Report,
    Rung,
)
from onnx_lathe.benchmarks.result import Certificate, Comparison, Interval, Measurement, Timing
from onnx_lathe.benchmarks.stats import percentile
from onnx_lathe.benchmarks.verdict import compare
from onnx_lathe.runtime.difference import GraphDifference, NodeChange, StoredForm, WeightChange
from onnx_lathe.runtime.samples import Samples

INT8 = "pruned student, quantize-static{ranges=percentile}"


def small_report() -> Report:
    """Return a report of two rungs and a third that was neither judged nor measured."""
    timings = (
        Timing("teacher", (((0.004, 0.0042),),), Interval(0.0041, 0.004, 0.0042), None, 52_000_000, 0.1),
        Timing("student", (((0.001, 0.0012),),), Interval(0.00123, 0.00121, 0.00126), None, 51_000_000, 0.1),
    )
    speed = Comparison("student", "teacher", Interval(3.333, 3.1, 3.5), "faster", "beyond the noise of 1.0 %")
    certificate = Certificate(
        metric="accuracy",
        original=Interval(0.99, 0.97, 0.997),
        candidate=Interval(0.988, 0.968, 0.996),
        drop=0.002,
        bound=0.0093,
        max_drop=0.02,
        samples=500,
        needed=400,
        losses=3,
        gains=2,
        method="Tango's score bound of paired proportions",
    )
    return Report(
        title="digits",
        status="certified",
        verdict="model.onnx is the student: 3.33x as fast as the teacher.",
        reason="Its drop of 0.20 points is certified within 2 points.",
        rungs=(
            Rung("teacher", parameters=1_234_567, file_bytes=4_940_000),
            Rung("student", "distilled", chosen=True, parameters=98_765, file_bytes=395_000),
            Rung("teacher in torch", missing={"accuracy": "judged as the teacher", "latency": "torch is not here"}),
        ),
        original="teacher",
        metric="accuracy",
        certificates={"student": certificate},
        shapes=(MeasuredShape("batch 32", Measurement(timings, (speed,), (), {}), {"teacher": 12_300_000}),),
        command="lathe convert recipes/digits.toml",
    )


def full_report() -> Report:
    """Return a report with every section, its latencies drawn from a seed."""
    names = ("teacher", "teacher in torch", "student", "pruned student", INT8)
    medians = (2.61e-3, 4.05e-3, 1.31e-3, 0.92e-3, 0.47e-3)
    rng = np.random.default_rng(0)
    timings = tuple(_timing(name, median, rng) for name, median in zip(names, medians, strict=True))
    canary = tuple(float(value) for value in rng.normal(5e-4, 2e-6, 50))
    environment = {
        "cpu": "Example CPU at 2.6 GHz",
        "cpu_class": "x86-64 avx512_vnni",
        "cores": [0, 1],
        "threads": 2,
        "memory": 16_700_000_000,
        "kernel": "Linux 6.1",
        "governor": None,
        "packages": {"onnxruntime": "1.32.0", "numpy": "2.3.1"},
        "load": 0.3123,
    }
    macs: dict[str, int] = dict(zip(names, (152_000_000, 152_000_000, 61_500_000, 31_200_000, 31_200_000), strict=True))
    shape = MeasuredShape(
        "batch 32",
        Measurement(timings, compare(timings, canary), canary, environment),
        macs,
        compare((timings[2], timings[4]), canary),
    )
    right = dict(zip(names, (497, 497, 495, 494, 493), strict=True))
    return Report(
        title="digits",
        status="certified",
        verdict=f"model.onnx is the {INT8}: 5.56x as fast as the teacher in onnxruntime, accuracy drop 0.79 points.",
        reason="The one-sided 95 % bound of the drop is 1.78 points, the budget 2 points.",
        rungs=_rungs(),
        original="teacher",
        metric="accuracy",
        certificates={name: _certificate(right[name]) for name in names if name != "teacher in torch"},
        evaluation=evaluation(),
        shapes=(shape,),
        distillation=(
            DistillationScore("select", wilson(500, 503), wilson(492, 503), wilson(498, 503)),
            DistillationScore("test", wilson(497, 504), wilson(490, 504), wilson(495, 504)),
        ),
        curves=tuple(
            _curve(*each, rng)
            for each in (
                ("teacher", 1.6, 0.993),
                ("student alone", 1.8, 0.977),
                ("student distilled", 2.4, 0.988),
                ("pruned student, recovering", 0.4, 0.985),
            )
        ),
        candidates=_candidates(),
        edits=_edits(),
        difference=graph_difference(),
        rooflines=(model_roofline(),),
        method=("The samples were cut by label into train, select and test; calibration saw training samples only.",),
        warnings=("The test part has 504 samples: differences below one point are within its noise.",),
        command="lathe convert recipes/digits.toml",
    )


def evaluation(classes: int = 12) -> Evaluation:
    """Return what a candidate near its original gives on 504 samples."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, 504)
    logits = rng.normal(size=(504, classes)) + 4 * np.eye(classes)[labels]
    samples = Samples(({"x": np.zeros((504, 1), np.float32)},), labels)
    return evaluate({"logits": logits}, {"logits": logits + rng.normal(0, 0.3, logits.shape)}, samples)


def model_roofline() -> ModelRoofline:
    """Return how near the nodes of what ships came to their limits, of which one is unknown and one is nothing."""
    shares = (
        OperatorShare("conv1", "QLinearConv", 24_000_000, 400_000, 2e-4, 5e-5, "arithmetic", integers=True),
        OperatorShare("conv2", "QLinearConv", 6_000_000, 100_000, 1e-4, 2.5e-5, "memory", integers=True),
        OperatorShare("head", "MatMul", 1_000_000, 2_000_000, 6e-5, 3e-5, "memory"),
        OperatorShare("state", "LSTM", None, 50_000, 3e-5, None, "unknown"),
        OperatorShare("view", "Reshape", 0, 0, 1e-5, 0.0, "overhead"),
    )
    return ModelRoofline(INT8, shares, float_rate=1.2e11, integer_rate=4.8e11, bandwidth=3.2e10, threads=2)


def graph_difference(groups: int = 1) -> GraphDifference:
    """Return what pruning and quantizing changed, with ``groups`` of pruned weights."""
    quantized, float32 = StoredForm("int8", (64, 64, 3, 3), 36_864), StoredForm("float", (64, 64, 3, 3), 147_456)
    pruned = tuple(
        WeightChange(
            StoredForm("float", (64, 100 + number), 256 * (100 + number)),
            StoredForm("float", (40, 100 + number), 160 * (100 + number)),
            (f"cut{number}.weight",),
        )
        for number in range(groups)
    )
    return GraphDifference(
        before="student",
        after=INT8,
        operators_before={"Conv": 6, "Relu": 5, "Gemm": 1},
        operators_after={"DequantizeLinear": 27, "QuantizeLinear": 11, "Conv": 6, "Relu": 3, "MatMulInteger": 1},
        nodes=(
            NodeChange(None, "DequantizeLinear", (), tuple(f"added{number}" for number in range(27))),
            NodeChange("Conv", "Conv", ("reads DequantizeLinear",), tuple(f"conv{number}" for number in range(6))),
            NodeChange("Relu", None, (), ("relu1", "relu2")),
            NodeChange("Gemm", "MatMulInteger", (), ("head",)),
        ),
        nodes_kept=3,
        weights=(
            WeightChange(float32, quantized, ("conv1.weight", "conv2.weight", "conv3.weight")),
            *pruned,
            WeightChange(None, StoredForm("float", (), 4), ("scale",)),
            WeightChange(StoredForm("int64", (1,), 8), None, ("axis",)),
        ),
        weights_kept=1,
        weight_bytes_before=1_224_000,
        weight_bytes_after=172_000,
    )


def _timing(name: str, median: float, rng: np.random.Generator) -> Timing:
    blocks = tuple(
        tuple(tuple(float(value) for value in median * factor * rng.lognormal(0.0, 0.03, 25)) for _ in range(4))
        for factor in rng.lognormal(0.0, 0.01, 10)
    )
    values = [value for process in blocks for block in process for value in block]
    memory = 390_000_000 if "torch" in name else 62_000_000
    return Timing(name, blocks, percentile(values, 0.5), percentile(values, 0.9), memory, 0.05)


def _certificate(right: int) -> Certificate:
    losses = max(0, 497 - right) + (2 if right < 497 else 0)
    return Certificate(
        metric="accuracy",
        original=wilson(497, 504),
        candidate=wilson(right, 504),
        drop=(497 - right) / 504,
        bound=(497 - right) / 504 + 0.0099,
        max_drop=0.02,
        samples=504,
        needed=420,
        losses=losses,
        gains=losses - (497 - right),
        method="Tango's score bound of paired proportions",
    )


def _rungs() -> tuple[Rung, ...]:
    conv = {"Conv": 10, "Relu": 9, "Add": 4, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1}
    small = {"Conv": 6, "Relu": 5, "Add": 2, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1}
    quantized = {**small, "QuantizeLinear": 11, "DequantizeLinear": 27, "Relu": 3}
    return (
        Rung(
            "teacher in torch",
            "where it started",
            parameters=775_434,
            missing={"file": "it is no ONNX file", "accuracy": "judged as the exported teacher"},
        ),
        Rung("teacher", "exported to ONNX", parameters=772_874, file_bytes=3_101_000, operators=conv),
        Rung("student", "distilled", parameters=306_154, file_bytes=1_228_000, operators=small),
        Rung(
            "pruned student",
            "30 % of the channels cut, recovered",
            parameters=151_802,
            file_bytes=611_000,
            operators=small,
        ),
        Rung(
            INT8,
            "8-bit integers",
            chosen=True,
            parameters=151_802,
            file_bytes=176_000,
            operators=quantized,
            executed={"QLinearConv": 6, "QLinearAdd": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1},
        ),
    )


def _curve(name: str, loss: float, score: float, rng: np.random.Generator) -> Curve:
    epochs = np.arange(12 if "recovering" not in name else 6)
    losses = loss * np.exp(-epochs / 3.0) + 0.05 + rng.uniform(0, 0.01, len(epochs))
    scores = score - 0.5 * np.exp(-epochs / 1.5) * (loss > 1) - rng.uniform(0, 0.004, len(epochs))
    return Curve(name, tuple(map(float, losses)), tuple(map(float, scores)), "select")


def _candidates() -> tuple[CandidateResult, ...]:
    return (
        CandidateResult("student", "refused", f"{INT8} is faster: 5.60x, this one 1.99x.", (1.99,), 0.002),
        CandidateResult("pruned student", "refused", f"{INT8} is faster: 5.60x, this one 2.84x.", (2.84,), 0.004),
        CandidateResult(INT8, "kept", "It is the fastest that keeps its accuracy.", (5.6,), 0.006),
        CandidateResult(
            "pruned student, quantize-static{scheme=pow2}",
            "refused",
            "It loses 4.10 points of accuracy on the select part; 2 are allowed.",
            (),
            0.041,
        ),
        CandidateResult("pruned student, quantize-dynamic", "failed", "No MatMul or Gemm is large enough to gain."),
    )


def _edits() -> tuple[AppliedEdit, ...]:
    small = tuple(LeftAlone(f"node_conv{number}", "Conv", "fewer than 4 input channels") for number in range(5))
    other = (LeftAlone("node_gemm", "Gemm", "its output is an output of the graph"),)
    check = OracleCheck(
        "edited graph against its reference graph", "whole model", 3.1e-7, 1e-5, "relative error", "logits"
    )
    signal = OracleCheck("quantized graph against the same, unfused", "whole model", 48.2, 30.0, "dB", "logits")
    return (
        AppliedEdit("pruned student", "prune{ratio=0.3}", True, 1.31, other, (check,)),
        AppliedEdit(INT8, "quantize-static{ranges=percentile}", True, 0.82, small, (signal,)),
        AppliedEdit("pruned student, quantize-dynamic", "quantize-dynamic", False, 0.02),
    )
