"""What a measurement says of its machine, and which machines are alike."""

import json

from onnx_lathe.benchmarks.environment import describe, differs


def test_the_environment_is_described_in_json():
    found = describe()
    assert json.loads(json.dumps(found)) == found
    assert found["cpu"]
    assert 1 <= found["threads"] <= len(found["cores"])
    assert found["memory"] > 1 << 28
    assert found["packages"]["numpy"]


def test_an_environment_is_like_itself_whatever_the_load():
    found = describe()
    assert differs(found, {**found, "load": 99.0}) == ()


def test_what_differs_is_named_with_both_values():
    assert differs({"cpu": "x", "threads": 2}, {"cpu": "y", "threads": 2, "kernel": "z"}) == (
        "cpu: x, y",
        "kernel: None, z",
    )
