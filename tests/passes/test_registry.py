"""Text, JSON and requests are the same thing; what is wrong in them is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lathe.passes.cleanup.cleanup import Cleanup
from onnx_lathe.passes.prune.request import Prune
from onnx_lathe.passes.quantize.dynamic import QuantizeDynamic
from onnx_lathe.passes.quantize.static import QuantizeStatic
from onnx_lathe.passes.registry import PASSES, build, catalogue, parse, spell, to_json
from onnx_lathe.passes.request import Request
from onnx_lathe.runtime.errors import PassSpecError

NODE_NAMES = st.lists(st.text(min_size=1, max_size=8), max_size=3).map(tuple)
PRUNE = st.builds(
    Prune,
    ratio=st.floats(0.01, 0.99),
    multiple=st.integers(1, 64),
    importance=st.sampled_from(["auto", "magnitude", "fluctuation", "interaction", "std"]),
    threshold=st.floats(0.01, 10.0),
    reconstruct=st.booleans(),
)
STATIC = st.builds(
    QuantizeStatic,
    ranges=st.sampled_from(["minmax", "percentile", "mse", "kl"]),
    per_channel=st.booleans(),
    weight_exponent=st.none() | st.integers(-60, 60),
    weight_bits=st.sampled_from([None, 7, 8]),
    operators=st.sampled_from([("Conv",), ("Conv", "Gemm"), ("Conv", "Gemm", "MatMul")]),
    exclude=NODE_NAMES,
)
REQUESTS = st.one_of(st.just(Cleanup()), PRUNE, STATIC, st.builds(QuantizeDynamic))


@given(st.lists(REQUESTS, min_size=1, max_size=4).map(tuple))
def test_text_and_requests_are_the_same(requests: tuple[Request, ...]) -> None:
    assert parse(spell(requests)) == requests


@given(REQUESTS)
def test_json_and_requests_are_the_same(request_: Request) -> None:
    options = json.loads(json.dumps(to_json(request_)))
    assert build(options.pop("pass"), options) == request_


def test_every_pass_is_known_by_its_name() -> None:
    assert {name: request.name for name, request in PASSES.items()} == {name: name for name in PASSES}


def test_options_at_their_default_are_left_out() -> None:
    assert spell(Prune()) == "prune"
    assert spell([Cleanup(), Prune(ratio=0.5, reconstruct=False)]) == "cleanup,prune{ratio=0.5,reconstruct=False}"


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        (" prune { } ", Prune()),
        ("prune{ ratio = 0.5 , multiple=8 }", Prune(ratio=0.5, multiple=8)),
        ("prune{reconstruct=no}", Prune(reconstruct=False)),
        ("quantize-static{exclude=/head/MatMul}", QuantizeStatic(exclude=("/head/MatMul",))),
        ("quantize-static{weight_exponent=-6}", QuantizeStatic(weight_exponent=-6)),
        ("quantize-static{exclude=a|b,weight_bits=7}", QuantizeStatic(exclude=("a", "b"), weight_bits=7)),
    ],
)
def test_text_may_be_written_in_several_ways(text: str, request_: Request) -> None:
    assert parse(text) == (request_,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "passes: got '', expected PASS or PASS{option=value,...}, joined by commas."),
        ("prune{ratio=0.3", "passes: got 'prune{ratio=0.3', expected PASS or PASS{option=value,...}"),
        ("prnue", "pass 'prnue': got an unknown pass, expected one of cleanup, prune, "),
        ("prnue", "Did you mean 'prune'?"),
        ("prune{ration=1}", "prune{ration}: got an unknown option, expected one of ratio, multiple, "),
        ("prune{ration=1}", "Did you mean 'ratio'?"),
        ("cleanup{fast=1}", "expected one of (none: this pass has no options)"),
        ("prune{ratio}", "prune{ratio}: got an option without a value, expected option=value. Write prune{ratio=...}."),
        ("prune{ratio=1.5}", "prune{ratio}: got '1.5', expected less than 1."),
        ("prune{multiple=0}", "prune{multiple}: got 0, expected greater than or equal to 1."),
        ("prune{multiple=wide}", "prune{multiple}: got 'wide', expected a valid integer"),
        ("quantize-dynamic{weight_exponent=-61}", "quantize-dynamic{weight_exponent}: got -61, expected greater than"),
        ("prune{importance=luck}", "prune{importance}: got 'luck', expected 'auto', 'magnitude', 'fluctuation', "),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(PassSpecError) as error:
        parse(text)
    assert message in str(error.value)


@pytest.mark.parametrize("options", [{"ratio": None}, {"ratio": [0.3]}, {"multiple": 2.5}])
def test_json_of_a_wrong_type_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PassSpecError, match=r"prune\{"):
        build("prune", options)


def test_the_catalogue_says_what_values_an_option_takes() -> None:
    options = {entry.name: {option.name: option for option in entry.options} for entry in catalogue()}
    assert options["quantize-weights"]["bits"].kind == "4 or 8"
    assert options["quantize-weights"]["method"].kind == "rtn, hqq or gptq"
    assert options["quantize-weights"]["operators"].kind == "one or more of Gemm or MatMul, joined by |"
    assert options["quantize-static"]["percentile"].kind == "a number over 0 and at most 100"
    assert options["quantize-static"]["weight_bits"].kind == "7 or 8 or none"
    assert (options["quantize-static"]["exclude"].kind, options["quantize-static"]["exclude"].default) == (
        "one or more of text, joined by |",
        "none",
    )
    assert (options["smooth"]["insert"].kind, options["smooth"]["insert"].default) == ("true or false", "true")
    assert options["quantize-weights"]["operators"].default == "Gemm|MatMul"
