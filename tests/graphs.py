"""Small graphs for tests, as text that `onnx.parser` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.samples import Samples

HEADER = '<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>'

LINEAR = """
linear (float[batch, 4] x) => (float[batch, 2] y)
<float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[2] b = {0.5, -0.5}>
{
  [product] h = MatMul(x, w)
  [sum] y = Add(h, b)
}
"""
"""One linear layer: ``y = x w + b``."""


def parse(text: str, header: str = HEADER) -> onnx.ModelProto:
    """Return the model of a text graph at opset 20."""
    return onnx.parser.parse_model(f"{header}\n{text}")


def write(path: Path, text: str, header: str = HEADER) -> Path:
    """Write the model of a text graph and return its path."""
    onnx.save(parse(text, header), path)
    return path


# Fixture graphs of the passes. Where ONNX text declares a value between ``<`` and ``>`` that no node produces and that
# has no literal, `build` makes it a weight.


def build(text: str, seed: int = 0) -> onnx.ModelProto:
    """Parse a graph or a whole model and give its weights values; equal arguments give equal models.

    Weights are normal random numbers scaled by ``1 / sqrt(inputs of one output)``, as a trained network's would be.
    """
    model = onnx.parser.parse_model(text if text.lstrip().startswith("<") else f"{OPSET_20}\n{text}")
    graph = model.graph
    generator = np.random.default_rng(seed)
    produced = {name for node in graph.node for name in node.output}
    known = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
    inner = [value for value in graph.value_info if value.name in produced]
    for value in graph.value_info:
        if value.name not in produced | known:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            inputs = max(1, int(np.prod(shape[1:]))) if len(shape) > 1 else 1
            weight = generator.normal(size=shape) / np.sqrt(inputs)
            if "var" in value.name:
                weight = np.abs(weight) + 0.5
            if np.issubdtype(dtype, np.integer):
                weight = np.round(weight * 100)
            graph.initializer.append(numpy_helper.from_array(weight.astype(dtype), value.name))
            if model.ir_version < 4:
                graph.input.append(value)
    del graph.value_info[:]
    graph.value_info.extend(inner)
    return model


def save(model: onnx.ModelProto, path: Path) -> Path:
    """Check a model, write it and return its path."""
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def samples_for(path: Path, batches: int = 4) -> Samples:
    """Return random samples that fit the model at ``path``, several batches."""
    return Samples(tuple(tensors.random_feeds(path, seed=seed) for seed in range(batches)))


OPSET_20 = '<ir_version: 10, opset_import: ["" : 20]>'

CONV_CHAIN = """
conv_chain (float[N, 3, 8, 8] image) => (float[N, 5] logits)
<float[32, 3, 3, 3] w1, float[32] b1, float[32] scale, float[32] shift, float[32] mean, float[32] var,
 float[48, 32, 3, 3] w2, float[48] b2, float[5, 48] w3, float[5] b3>
{
  [conv1] a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, w1, b1)
  [norm1] n = BatchNormalization (a, scale, shift, mean, var)
  [relu1] r = Relu (n)
  [pool] m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
  [conv2] c = Conv <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (m, w2, b2)
  [relu2] s = Relu (c)
  [gap] g = GlobalAveragePool (s)
  [flat] f = Flatten (g)
  [fc] logits = Gemm <transB = 1> (f, w3, b3)
}
"""

RESIDUAL = """
residual (float[N, 3, 8, 8] image) => (float[N, 5] logits)
<float[32, 3, 3, 3] stem, float[32] stem_bias, float[32, 32, 3, 3] w1, float[32] b1, float[32, 32, 3, 3] w2,
 float[32] b2, float[64, 32, 3, 3] w3, float[64, 32, 1, 1] short, float[64, 5] w5, int64[2] axes = {2, 3}>
{
  [stem] x = Conv <pads = [1, 1, 1, 1]> (image, stem, stem_bias)
  [relu0] x0 = Relu (x)
  [conv1] a = Conv <pads = [1, 1, 1, 1]> (x0, w1, b1)
  [relu1] b = Relu (a)
  [conv2] c = Conv <pads = [1, 1, 1, 1]> (b, w2, b2)
  [add1] d = Add (c, x0)
  [relu2] e = Relu (d)
  [conv3] f = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (e, w3)
  [short] g = Conv <strides = [2, 2]> (e, short)
  [add2] h = Add (f, g)
  [relu3] i = Relu (h)
  [mean] j = ReduceMean <keepdims = 0> (i, axes)
  [fc] logits = MatMul (j, w5)
}
"""

DEPTHWISE = """
depthwise (float[N, 3, 8, 8] image) => (float[N, 5] logits)
<float[16, 3, 3, 3] w0, float[16] b0, float[64, 16, 1, 1] w1, float[64] b1, float[64, 1, 3, 3] w2, float[64] b2,
 float[16, 64, 1, 1] w3, float[5, 16] w4, float[5] b4, float six = {6.0}, float zero = {0.0},
 int64[2] axes = {2, 3}>
{
  [stem] x = Conv <pads = [1, 1, 1, 1]> (image, w0, b0)
  [expand] a = Conv (x, w1, b1)
  [clip1] b = Clip (a, zero, six)
  [depth] c = Conv <group = 64, pads = [1, 1, 1, 1], strides = [2, 2]> (b, w2, b2)
  [hard] d = HardSwish (c)
  [project] e = Conv (d, w3)
  [mean] f = ReduceMean <keepdims = 0> (e, axes)
  [fc] logits = Gemm <transB = 1> (f, w4, b4)
}
"""

DENSE = """
dense (float[N, 3, 8, 8] image) => (float[N, 5] logits)
<float[32, 3, 3, 3] w0, float[32, 32, 3, 3] w1, float[32] b1, float[64] scale, float[64] shift, float[64] mean,
 float[64] var, float[32, 64, 1, 1] w2, float[32, 5] w3, int64[2] axes = {2, 3}>
{
  [stem] x = Conv <pads = [1, 1, 1, 1]> (image, w0)
  [relu0] a = Relu (x)
  [conv1] b = Conv <pads = [1, 1, 1, 1]> (a, w1, b1)
  [join] c = Concat <axis = 1> (a, b)
  [norm] d = BatchNormalization (c, scale, shift, mean, var)
  [relu1] e = Relu (d)
  [conv2] f = Conv (e, w2)
  [pool] g = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (f)
  [mean] h = ReduceMean <keepdims = 0> (g, axes)
  [fc] logits = MatMul (h, w3)
}
"""

FLATTENED = """
flattened (float[N, 1, 8, 8] image) => (float[N, 5] logits)
<float[32, 1, 3, 3] w1, float[32] b1, float[64, 512] w2, float[64] b2, float[32, 5] w3, int64[2] shape = {-1, 512}>
{
  [conv] a = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (image, w1, b1)
  [relu] b = Relu (a)
  [flat] c = Reshape (b, shape)
  [hidden] d = Gemm <transB = 1> (c, w2, b2)
  [halves] e, gate = Split <axis = 1, num_outputs = 2> (d)
  [gate_sigmoid] s = Sigmoid (gate)
  [gated] g = Mul (e, s)
  [fc] logits = MatMul (g, w3)
}
"""

ENCODER = """
encoder (int64[batch, seq] ids, int64[batch, seq] mask) => (float[batch, 3] logits)
<float[100, 32] table, float[32] norm_scale, float[32] norm_shift, float[32, 64] q, float[64] q_bias,
 float[32, 64] k, float[64] k_bias, float[32, 64] v, float[64] v_bias, float[64, 32] o, float[32] o_bias,
 float[32] norm2_scale, float[32] norm2_shift, float[32, 96] up, float[96] up_bias, float[96, 32] down,
 float[32] down_bias, float[32, 3] head, float[3] head_bias, int64[4] split = {0, 0, -1, 16},
 int64[3] merge = {0, 0, -1}, float root = {4.0}, float one = {1.0}, float low = {-1000.0},
 int64[2] mask_axes = {1, 2}, int64[1] sequence = {1}>
{
  [embed] x = Gather (table, ids)
  [norm1] h = LayerNormalization <axis = -1> (x, norm_scale, norm_shift)
  [query] qm = MatMul (h, q)
  [query_bias] qb = Add (qm, q_bias)
  [query_split] qs = Reshape (qb, split)
  [query_heads] qh = Transpose <perm = [0, 2, 1, 3]> (qs)
  [key] km = MatMul (h, k)
  [key_bias] kb = Add (km, k_bias)
  [key_split] ks = Reshape (kb, split)
  [key_heads] kh = Transpose <perm = [0, 2, 3, 1]> (ks)
  [value] vm = MatMul (h, v)
  [value_bias] vb = Add (vm, v_bias)
  [value_split] vs = Reshape (vb, split)
  [value_heads] vh = Transpose <perm = [0, 2, 1, 3]> (vs)
  [scores] qk = MatMul (qh, kh)
  [scaled] sc = Div (qk, root)
  [mask_float] mf = Cast <to = 1> (mask)
  [mask_wide] mw = Unsqueeze (mf, mask_axes)
  [mask_flip] mi = Sub (one, mw)
  [mask_low] ml = Mul (mi, low)
  [masked] sm = Add (sc, ml)
  [weights] p = Softmax <axis = -1> (sm)
  [context] c = MatMul (p, vh)
  [context_turn] ct = Transpose <perm = [0, 2, 1, 3]> (c)
  [context_merge] cm = Reshape (ct, merge)
  [output] om = MatMul (cm, o)
  [output_bias] ob = Add (om, o_bias)
  [add1] r1 = Add (ob, h)
  [norm2] n2 = LayerNormalization <axis = -1> (r1, norm2_scale, norm2_shift)
  [up] um = MatMul (n2, up)
  [up_bias] ub = Add (um, up_bias)
  [gelu] g = Gelu (ub)
  [down] dm = MatMul (g, down)
  [down_bias] db = Add (dm, down_bias)
  [add2] r2 = Add (db, n2)
  [mean] m = ReduceMean <keepdims = 0> (r2, sequence)
  [head] hm = MatMul (m, head)
  [head_bias] logits = Add (hm, head_bias)
}
"""

LEFTOVERS = """
leftovers (float[N, 4, 6, 6] x) => (float[N, 72] y, float[N, 4, 6, 6] z)
<float[8, 4, 3, 3] w, float[8] scale, float[8] shift, float[8] mean, float[8] var, float[3, 3] unused,
 int64[8] pads = {0, 0, 0, 0, 0, 0, 0, 0}, int64[4] same = {-1, 8, 3, 3}, int64[2] flat = {-1, 72},
 int64[1] rest = {-1}, int64 first = {0}, int64[1] front = {0}, float ratio = {0.5}>
{
  [named_conv] a = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w)
  [named_norm] b = BatchNormalization (a, scale, shift, mean, var)
  [identity] c = Identity (b)
  [dropout] d = Dropout (c, ratio)
  [cast] e = Cast <to = 1> (d)
  [transpose] f = Transpose <perm = [0, 1, 2, 3]> (e)
  [pad] g = Pad (f, pads)
  [reshape] h = Reshape (g, same)
  [relu] i = Relu (h)
  [dead] dead = Sigmoid (i)
  one = Constant <value_float = 1.0> ()
  two = Constant <value_float = 2.0> ()
  [folded] three = Add (one, two)
  [scaled] j = Mul (i, three)
  [dims] dims = Shape (j)
  [batch] batch = Gather (dims, first)
  [batch_vector] batch_vector = Unsqueeze (batch, front)
  [view_shape] view_shape = Concat <axis = 0> (batch_vector, rest)
  [view] k = Reshape (j, view_shape)
  [flat] l = Reshape (j, flat)
  [sum] y = Add (k, l)
  [negative] n = Neg (x)
  [copy] z = Identity (n)
}
"""

TWO_NAMES = """
two_names (float[N, 4] x) => (float[N, 4] first, float[N, 4] second, float[N, 4] third)
<float one = {1.0}>
{
  [relu] first = Relu (x)
  [alias] second = Identity (first)
  [same] third = Mul (x, one)
}
"""

BRANCHES = """
branches (float[N, 8] x) => (float[N, 4] y)
<float[8, 32] w1, float[32] b1, float[32, 4] w2, float zero = {0.0}>
{
  [total] total = ReduceSum <keepdims = 0> (x)
  [positive] flag = Greater (total, zero)
  [hidden] a = MatMul (x, w1)
  [bias] b = Add (a, b1)
  [choose] c = If (flag) <
    then_branch = yes () => (float[N, 32] t) { [yes_relu] t = Relu (b) },
    else_branch = no () => (float[N, 32] e) { scale = Constant <value_float = 0.5> () [no_scale] e = Mul (b, scale) }
  >
  [out] y = MatMul (c, w2)
}
"""

FUNCTION = """
<ir_version: 10, opset_import: ["" : 20, "local" : 1]>
with_function (float[N, 8] x) => (float[N, 4] y)
<float[8, 48] w1, float[48] b1, float[48, 4] w2, float[4] b2>
{
  [first] a = local.Layer (x, w1, b1)
  [relu] b = Relu (a)
  [second] y = local.Layer (b, w2, b2)
}
<domain: "local", opset_import: ["" : 20]>
Layer (data, weight, bias) => (result)
{
  [product] product = MatMul (data, weight)
  [sum] result = Add (product, bias)
}
"""

OLD_INPUTS = """
<ir_version: 3, opset_import: ["" : 9]>
old_inputs (float[1, 8] x) => (float[1, 4] y)
<float[32, 8] w1, float[32] b1, float[4, 32] w2, float[4] b2>
{
  [hidden] a = Gemm <transB = 1> (x, w1, b1)
  [relu] b = Relu (a)
  [out] y = Gemm <transB = 1> (b, w2, b2)
}
"""

FIXED_BATCH = """
fixed_batch (float[4, 16] x) => (float[4, 2] y)
<float[16, 32] w1, float[32] b1, float[32, 2] w2>
{
  [hidden] a = Gemm (x, w1, b1)
  [act] b = Sigmoid (a)
  [out] y = MatMul (b, w2)
}
"""

QUANTIZED = """
quantized (float[N, 8] x) => (float[N, 4] y)
<int8[8, 32] w1, float sx = {0.02}, uint8 zx = {128}, float sw = {0.01}, int8 zw = {0}, float[32, 4] w2>
{
  [q] xq = QuantizeLinear (x, sx, zx)
  [dq] xd = DequantizeLinear (xq, sx, zx)
  [wdq] wd = DequantizeLinear (w1, sw, zw)
  [hidden] a = MatMul (xd, wd)
  [relu] b = Relu (a)
  [out] y = MatMul (b, w2)
}
"""

COUNTING = """
counting (int64[N, M] x) => (int64[N, 1] y)
<int64[1] axis = {1}, int64 two = {2}>
{
  [double] a = Mul (x, two)
  [sum] y = ReduceSum <keepdims = 1> (a, axis)
}
"""

HALF = CONV_CHAIN.replace("float[", "float16[")

GRAPHS: Mapping[str, str] = {
    "conv_chain": CONV_CHAIN,
    "residual": RESIDUAL,
    "depthwise": DEPTHWISE,
    "dense": DENSE,
    "flattened": FLATTENED,
    "encoder": ENCODER,
    "leftovers": LEFTOVERS,
    "two_names": TWO_NAMES,
    "branches": BRANCHES,
    "function": FUNCTION,
    "old_inputs": OLD_INPUTS,
    "fixed_batch": FIXED_BATCH,
    "quantized": QUANTIZED,
    "counting": COUNTING,
    "half": HALF,
}
"""Every fixture graph of the passes by name: the contract suite runs every pass on each."""


# Fixture graphs of quantization: each shows one form that onnxruntime must fuse to integer operators, or one refusal.

CLASSIFIER = """
classifier (float[N, 16, 8, 8] image) => (float[N, 5] logits)
<float[32, 16, 3, 3] w1, float[32] b1, float[32, 32, 3, 3] w2, float[32] b2, float[5, 32] w3, float[5] b3,
 float zero = {0.0}, float six = {6.0}>
{
  [conv1] a = Conv <pads = [1, 1, 1, 1]> (image, w1, b1)
  [clip] b = Clip (a, zero, six)
  [pool] c = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (b)
  [conv2] d = Conv <pads = [1, 1, 1, 1]> (c, w2, b2)
  [relu] e = Relu (d)
  [gap] f = GlobalAveragePool (e)
  [flat] g = Flatten (f)
  [fc] logits = Gemm <transB = 1> (g, w3, b3)
}
"""

JOINED = """
joined (float[N, 16, 8, 8] image) => (float[N, 32, 8, 8] y)
<float[16, 16, 3, 3] w1, float[16, 16, 1, 1] w2, float[32, 32, 1, 1] w3>
{
  [conv1] a = Conv <pads = [1, 1, 1, 1]> (image, w1)
  [conv2] b = Conv (image, w2)
  [join] c = Concat <axis = 1> (a, b)
  [conv3] y = Conv (c, w3)
}
"""

BOTTLENECK = """
bottleneck (float[N, 16, 8, 8] image) => (float[N, 16, 8, 8] y)
<float[32, 16, 1, 1] w1, float[32] b1, float[32, 1, 3, 3] w2, float[32] b2, float[16, 32, 1, 1] w3, float[16] b3>
{
  [expand] a = Conv (image, w1, b1)
  [relu1] b = Relu (a)
  [depth] c = Conv <group = 32, pads = [1, 1, 1, 1]> (b, w2, b2)
  [relu2] d = Relu (c)
  [project] e = Conv (d, w3, b3)
  [add] y = Add (e, image)
}
"""

LONE_DEPTHWISE = """
lone_depthwise (float[N, 16, 8, 8] image) => (float[N, 32, 8, 8] y)
<float[16, 1, 3, 3] w1, float[32, 16, 1, 1] w2>
{
  [depth] a = Conv <group = 16, pads = [1, 1, 1, 1]> (image, w1)
  [swish] b = HardSwish (a)
  [project] y = Conv (b, w2)
}
"""

PERCEPTRON = """
perceptron (float[N, 24] x) => (float[N, 4] y)
<float[24, 32] w1, float[32] b1, float[32, 32] w2, float[4, 32] w3, float[4] b3>
{
  [first] a = MatMul (x, w1)
  [bias] b = Add (a, b1)
  [relu1] c = Relu (b)
  [second] d = Gemm (c, w2)
  [relu2] e = Relu (d)
  [third] y = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (e, w3, b3)
}
"""

RESIDUAL_PRODUCT = """
residual_product (float[N, 32] x) => (float[N, 32] y)
<float[32, 32] w>
{
  [tanh] a = Tanh (x)
  [product] b = MatMul (a, w)
  [add] y = Add (b, x)
}
"""

FIXED_SEQUENCE = """
fixed_sequence (float[2, 6, 24] x) => (float[2, 6, 24] y)
<float[24, 32] w1, float[32] b1, float[32, 24] w2, float[24] b2>
{
  [up] a = MatMul (x, w1)
  [up_bias] b = Add (a, b1)
  [gelu] c = Gelu (b)
  [down] d = MatMul (c, w2)
  [down_bias] e = Add (b2, d)
  [add] y = Add (e, x)
}
"""

SHARED_WEIGHT = """
shared_weight (float[N, 4, 24] x) => (float[N, 4, 24] y, float[24, 24] w)
<float[24, 24] w>
{
  [first] a = MatMul (x, w)
  [tanh] b = Tanh (a)
  [second] c = MatMul (b, w)
  [turned] t = Transpose <perm = [1, 0]> (w)
  [third] y = MatMul (c, t)
}
"""

CONSTANT_WEIGHT = """
constant_weight (float[N, 2] x) => (float[N, 2] y)
{
  w = Constant <value = float[2, 2] {0.5, -1.0, 2.0, 0.25}> ()
  [product] y = MatMul (x, w)
}
"""
