"""Levels of weights that are read some rows at a time: the same whatever the parts."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.quantize import params, streamed
from onnx_lathe.passes.quantize.scheme import WeightScheme

WEIGHT = np.random.default_rng(0).normal(size=(37, 5, 3)).astype(np.float32)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("read", "written"), [(2**18, 2**20), (100, 1), (100, 70)])
def test_levels_are_those_of_the_whole_weight_however_it_is_cut(
    axis: int, read: int, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "ROWS_BYTES", read)
    monkeypatch.setattr(streamed, "WRITTEN_BYTES", written)
    tensor, scheme = ir.Tensor(WEIGHT, name="w"), WeightScheme()
    scales = params.scales_of(streamed.largest_magnitudes(tensor, axis), scheme)
    np.testing.assert_array_equal(scales, params.weight_scales(WEIGHT, axis, scheme))
    want = params.quantize_weight(WEIGHT, scales, axis, scheme)
    np.testing.assert_array_equal(streamed.quantized(tensor, scales, axis, scheme.limit), want)
    parts = [part.copy() for part in streamed.quantized_rows(tensor, scales, axis, scheme.limit)]
    np.testing.assert_array_equal(np.concatenate(parts), want)
    assert (len(parts) > 1) == (read < WEIGHT.nbytes)


def test_a_factor_on_the_weight_is_part_of_its_levels() -> None:
    tensor, scales = ir.Tensor(WEIGHT, name="w"), np.float32(0.05) * np.ones(37, np.float32)
    want = params.quantize_weight(WEIGHT * np.float32(-0.5), scales, 0, WeightScheme())
    np.testing.assert_array_equal(streamed.quantized(tensor, scales, 0, 127, alpha=-0.5), want)


def test_a_weight_without_rows_has_no_levels() -> None:
    tensor = ir.Tensor(np.zeros((0, 4), np.float32), name="w")
    assert streamed.quantized(tensor, np.ones(4, np.float32), 1, 127).shape == (0, 4)
