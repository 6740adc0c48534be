"""Measurements survive JSON exactly, and nothing else is read as one."""

import dataclasses
import json
import math

import pytest

from onnx_lathe.benchmarks.result import Comparison, Interval, Measurement, Timing
from onnx_lathe.runtime.errors import InputError

FOUND = Measurement(
    timings=(
        Timing("a", (((0.001, 0.0012), (0.0011,)),), Interval(0.001, 0.0009, 0.0012), None, 1 << 30, 0.25),
        Timing("b", (((0.002,), (0.1 + 0.2,)),), Interval(0.002, 0.002, 0.003), Interval(3e-3, 3e-3, 4e-3), 1, 0.5),
    ),
    comparisons=(Comparison("b", "a", Interval(0.5, 0.4, 0.6), "slower", "beyond the noise"),),
    canary=(0.01, 0.0101),
    environment={"cpu": "x", "cores": [0, 1], "load": None},
)


def test_a_measurement_is_read_as_it_was_written():
    text = FOUND.to_json()
    assert json.loads(text)["schema"] == "onnx-lathe/measurement/2"
    assert Measurement.from_json(text) == FOUND
    assert Measurement.from_json(text).speed("b").verdict == "slower"


def test_an_unbounded_limit_is_read_as_it_was_written():
    speed = Interval(0.5, -math.inf, math.inf)
    unbounded = dataclasses.replace(FOUND, comparisons=(dataclasses.replace(FOUND.comparisons[0], speed=speed),))
    text = unbounded.to_json()
    assert json.loads(text)["comparisons"][0]["speed"] == {"value": 0.5, "low": "-Infinity", "high": "Infinity"}
    assert Measurement.from_json(text) == unbounded


def test_a_measurement_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FOUND.timings[0].name = "c"  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(Measurement.from_json(FOUND.to_json()).timings[0].blocks[0][0], tuple)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "old.json: got no JSON"),
        (FOUND.to_json()[:-40], "old.json: got no JSON"),
        ("[1, 2]", "old.json: got schema None, expected JSON of schema 'onnx-lathe/measurement/2'"),
        (
            FOUND.to_json().replace("measurement/2", "measurement/0"),
            "got schema 'onnx-lathe/measurement/0'",
        ),
        (json.dumps({"schema": Measurement.SCHEMA, "timings": []}), "got comparisons: Field required"),
        (FOUND.to_json().replace('"slower"', '"quicker"'), r"got comparisons.0.verdict: Input should be 'faster'"),
    ],
)
def test_anything_else_is_refused(text: str, message: str):
    with pytest.raises(InputError, match=message):
        Measurement.from_json(text, "old.json")
