"""Rewrites that cleanup applies: onnxscript's common rules, the guards that some of them lack, and what none covers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern
from onnxscript.rewriter.rules import common
from onnxscript.rewriter.rules.common import _fuse_batchnorm as batchnorm

WIDE = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
"""Types in which folding a normalization into weights rounds no worse than running it."""


class _GuardedBatchNorm:
    """Mixin for onnxscript's BatchNormalization rules: refuse what they would get wrong, keep the node's name.

    Mixed before a rule; ``super()`` is that rule.
    """

    def check(self, context: Any, x: ir.Value, inbound_out: ir.Value, batchnorm_out: ir.Value) -> Any:
        inbound, norm = inbound_out.producer(), batchnorm_out.producer()
        assert inbound is not None
        assert norm is not None
        operands = [*inbound.inputs[1:], *norm.inputs[1:]]
        if norm.attributes.get_int("training_mode", 0):
            return pattern.MatchResult().fail("normalizes with the statistics of the batch")
        if any(value is None or value.dtype not in WIDE or value.dtype != x.dtype for value in operands):
            return pattern.MatchResult().fail("folding would round in a narrower type, or mix types")
        rule: Any = super()
        return rule.check(context, x, inbound_out, batchnorm_out)

    def rewrite(self, op: Any, x: ir.Value, inbound_out: ir.Value, batchnorm_out: ir.Value) -> ir.Value:
        rule: Any = super()
        folded: ir.Value = rule.rewrite(op, x, inbound_out, batchnorm_out)
        node, inbound = folded.producer(), inbound_out.producer()
        assert node is not None
        assert inbound is not None
        node.name = inbound.name
        return folded


class _BatchNormIntoConv(_GuardedBatchNorm, batchnorm.FuseBatchNormIntoConv): ...


class _BatchNormIntoConvTranspose(_GuardedBatchNorm, batchnorm.FuseBatchNormIntoConvTranspose): ...


class _BatchNormIntoGemm(_GuardedBatchNorm, batchnorm.FuseBatchNormIntoGemm): ...


class _NoOpPad(pattern.RewriteRuleClassBase):
    """``Pad`` by nothing on every side."""

    def pattern(self, op: Any, x: Any, pads: Any) -> Any:
        return op.Pad(x, pads, _allow_other_inputs=True, _allow_other_attributes=True)

    def check(self, context: Any, x: ir.Value, pads: ir.Value) -> Any:
        tensor = ir.convenience.get_const_tensor(pads)
        result = pattern.MatchResult()
        return result if tensor is not None and not np.any(tensor.numpy()) else result.fail("pads something")

    def rewrite(self, op: Any, x: ir.Value, pads: ir.Value) -> ir.Value:
        return op.Identity(x)


class _NoOpReshape(pattern.RewriteRuleClassBase):
    """``Reshape`` to the same dimensions; one unknown one is the same because the number of elements is."""

    def pattern(self, op: Any, x: Any, shape: Any) -> Any:
        return op.Reshape(x, shape, _allow_other_attributes=True, _outputs=["reshaped"])

    def check(self, context: Any, x: ir.Value, shape: ir.Value, reshaped: ir.Value) -> Any:
        result = pattern.MatchResult()
        if x.shape is None or reshaped.shape is None or len(x.shape) != len(reshaped.shape):
            return result.fail("the ranks differ or are not known")
        unknown = 0
        for before, after in zip(x.shape, reshaped.shape, strict=True):
            if isinstance(before, int) and isinstance(after, int):
                if before != after or before == 0:
                    return result.fail("a dimension differs")
            elif isinstance(before, int) or isinstance(after, int):
                return result.fail("a dimension may differ")
            else:
                unknown += 1
        return result if unknown <= 1 else result.fail("several dimensions are not known")

    def rewrite(self, op: Any, x: ir.Value, shape: ir.Value, reshaped: ir.Value) -> ir.Value:
        return op.Identity(x)


class _NoOpDropout(pattern.RewriteRuleClassBase):
    """``Dropout`` that nobody told to train."""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Dropout(x, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["dropped"])

    def check(self, context: Any, x: ir.Value, dropped: ir.Value) -> Any:
        node = dropped.producer()
        result = pattern.MatchResult()
        trains = node is None or len(node.inputs) > 2 or node.attributes.get_int("is_test", 1) == 0
        return result.fail("may train") if trains else result

    def rewrite(self, op: Any, x: ir.Value, dropped: ir.Value) -> ir.Value:
        return op.Identity(x)


class _SpatialMean(pattern.RewriteRuleClassBase):
    """``ReduceMean`` over the pixels of an image: what exporters write for a pooling; it has no integer kernel."""

    def pattern(self, op: Any, x: Any, axes: Any) -> Any:
        return op.ReduceMean(x, axes, _allow_other_attributes=True, _outputs=["mean"])

    def check(self, context: Any, x: ir.Value, axes: ir.Value, mean: ir.Value) -> Any:
        tensor, result = ir.convenience.get_const_tensor(axes), pattern.MatchResult()
        if x.shape is None or len(x.shape) != 4 or x.dtype not in WIDE:
            return result.fail("no image of single or double precision")
        over = [] if tensor is None else sorted(int(axis) % 4 for axis in tensor.numpy())
        return result if over == [2, 3] else result.fail("other axes")

    def rewrite(self, op: Any, x: ir.Value, axes: ir.Value, mean: ir.Value) -> ir.Value:
        node = mean.producer()
        assert node is not None
        pooled: ir.Value = op.GlobalAveragePool(x)
        return pooled if node.attributes.get_int("keepdims", 1) else op.Flatten(pooled, axis=1)


RULES = pattern.RewriteRuleSet(
    [
        _NoOpPad.rule(),
        _NoOpReshape.rule(),
        _NoOpDropout.rule(),
        _SpatialMean.rule(),
        common.add_0_rule,
        common.sub_0_rule,
        common.mul_by_1_rule,
        common.div_by_1_rule,
        common.no_op_cast_rule,
        common.no_op_transpose_rule,
        common.transpose_transpose_rule,
        common.unsqueeze_unsqueeze_rule,
        common.squeeze_reshape_1d_rule,
        common.collapse_slice_rule,
        common.collapse_slice2_rule,
        common.fuse_pad_into_conv_rule,
        _BatchNormIntoConv.rule(),
        _BatchNormIntoConvTranspose.rule(),
        _BatchNormIntoGemm.rule(),
    ]
)
