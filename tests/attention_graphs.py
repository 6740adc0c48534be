"""Attention as torch exports it, as text graphs: by its newer exporter, by TorchScript, and with rotary positions."""

from __future__ import annotations

import numpy as np

from onnx_lathe.runtime.samples import Samples

EXPORTED = """
exported (float[batch, seq, 32] x, int64[batch, seq] mask) => (float[batch, seq, 32] y)
<float[32, 32] wq, float[32] bq, float[32, 32] wk, float[32] bk, float[32, 32] wv, float[32] bv, float[32, 32] wo,
 int64[4] split = {0, 0, -1, 8}, int64[3] merge = {0, 0, -1}, float root = {0.6}, bool yes = {1}, float none = {0.0},
 float low = {-3.4028234663852886e38}, int64 zero = {0}, int64 one = {1}, int64[1] last = {-1}, int64[1] before = {-2},
 int64[1] least = {-9223372036854775808}, int64[1] end = {9223372036854775807}, int64[2] batch_axes = {1, 2},
 int64[2] key_axes = {0, 1}, int64[1] two = {2}, int64[1] three = {3}>
{
  rows = Shape <start = 0, end = 1> (mask)
  row_count = Squeeze (rows)
  tokens = Shape <start = 1, end = 2> (mask)
  token_count = Squeeze (tokens)
  row_numbers = Range (zero, row_count, one)
  token_numbers = Range (zero, token_count, one)
  rows_wide = Unsqueeze (row_numbers, batch_axes)
  rows_wider = Unsqueeze (rows_wide, three)
  keys_wide = Unsqueeze (token_numbers, key_axes)
  queries = Unsqueeze (keys_wide, three)
  keys = Unsqueeze (keys_wide, two)
  any_query = GreaterOrEqual (queries, zero)
  certain = And (yes, any_query)
  most = Max (rows_wider, keys)
  dims = Shape (most)
  row_grid = Expand (rows_wider, dims)
  row_index = Unsqueeze (row_grid, last)
  key_grid = Expand (keys, dims)
  key_index = Unsqueeze (key_grid, last)
  index = Concat <axis = -1> (row_index, key_index)
  flags = Cast <to = 9> (mask)
  gathered = GatherND (flags, index)
  kept = And (certain, gathered)
  bias = Where (kept, none, low)
  q0 = MatMul (x, wq)
  q1 = Add (q0, bq)
  q2 = Reshape (q1, split)
  q3 = Transpose <perm = [0, 2, 1, 3]> (q2)
  k0 = MatMul (x, wk)
  k1 = Add (k0, bk)
  k2 = Reshape (k1, split)
  k3 = Transpose <perm = [0, 2, 1, 3]> (k2)
  v0 = MatMul (x, wv)
  v1 = Add (v0, bv)
  v2 = Reshape (v1, split)
  v3 = Transpose <perm = [0, 2, 1, 3]> (v2)
  kd = Shape (k3)
  kd_last = Slice (kd, last, end)
  kd_before = Slice (kd, before, last)
  kd_first = Slice (kd, least, before)
  merged_dims = Concat <axis = 0> (last, kd_before, kd_last)
  k4 = Reshape (k3, merged_dims)
  k5 = Transpose <perm = [0, 2, 1]> (k4)
  turned_dims = Concat <axis = 0> (kd_first, kd_last, kd_before)
  k6 = Reshape (k5, turned_dims)
  q4 = Mul (q3, root)
  k7 = Mul (k6, root)
  scores = MatMul (q4, k7)
  masked = Add (scores, bias)
  p = Softmax <axis = -1> (masked)
  broken = IsNaN (p)
  guarded = Where (broken, none, p)
  c0 = MatMul (guarded, v3)
  c1 = Transpose <perm = [0, 2, 1, 3]> (c0)
  c2 = Reshape (c1, merge)
  y = MatMul (c2, wo)
}
"""
"""As ``torch.onnx.export(dynamo=True)`` writes scaled_dot_product_attention with a padding mask (transformers 5)."""

SCRIPTED = """
scripted (float[batch, seq, 32] x, int64[batch, seq] mask) => (float[batch, seq, 32] y)
<float[32, 32] wq, float[32] bq, float[32, 32] wk, float[32] bk, float[32, 32] wv, float[32] bv, float[32, 32] wo,
 int64[4] split = {0, 0, -1, 8}, int64[3] merge = {0, 0, -1}, float root = {0.6}, float none = {0.0},
 float[1] low = {-inf}, int64[2] axes = {1, 2}, int64[1] one = {1}>
{
  flags = Cast <to = 9> (mask)
  wide = Unsqueeze (flags, axes)
  all = Shape (mask)
  rows = Shape <start = 0, end = 1> (mask)
  tokens = Shape <start = 1, end = 2> (mask)
  dims = Concat <axis = 0> (rows, one, tokens, tokens)
  kept = Expand (wide, dims)
  bias = Where (kept, none, low)
  q0 = MatMul (x, wq)
  q1 = Add (bq, q0)
  q2 = Reshape (q1, split)
  q3 = Transpose <perm = [0, 2, 1, 3]> (q2)
  k0 = MatMul (x, wk)
  k1 = Add (bk, k0)
  k2 = Reshape (k1, split)
  k3 = Transpose <perm = [0, 2, 3, 1]> (k2)
  v0 = MatMul (x, wv)
  v1 = Add (bv, v0)
  v2 = Reshape (v1, split)
  v3 = Transpose <perm = [0, 2, 1, 3]> (v2)
  q4 = Mul (q3, root)
  k4 = Mul (k3, root)
  scores = MatMul (q4, k4)
  masked = Add (scores, bias)
  p = Softmax <axis = -1> (masked)
  broken = IsNaN (p)
  guarded = Where (broken, none, p)
  c0 = MatMul (guarded, v3)
  c1 = Transpose <perm = [0, 2, 1, 3]> (c0)
  c2 = Reshape (c1, merge)
  y = MatMul (c2, wo)
}
"""
"""As TorchScript writes it: minus infinity where a key is masked, so a sentence without keys needs the guard."""

ROTARY = """
rotary (float[batch, seq, 32] x) => (float[batch, seq, 32] y)
<float[32, 32] wq, float[32, 16] wk, float[32, 16] wv, float[32, 32] wo, float[4] frequency = {1.0, 0.3, 0.1, 0.03},
 int64[4] split = {0, 0, -1, 8}, int64[3] merge = {0, 0, -1}, float scale = {0.35}, float none = {0.0},
 float low = {-3.4028234663852886e38}, int64 zero = {0}, int64 one = {1}, int64[1] first = {0}, int64[1] half = {4},
 int64[1] end = {9223372036854775807}, int64[1] last = {3}, int64[2] outer = {0, 1}, int64[2] around = {0, 2},
 int64[1] middle = {2}, int64[1] heads = {1}, int64[3] three = {1, 1, 1}, int64[5] repeated = {1, 1, 2, 1, 1},
 int64[4] joined = {0, 4, -1, 8}>
{
  count = Shape <start = 1, end = 2> (x)
  size = Squeeze (count)
  positions = Range (zero, size, one)
  keys = Unsqueeze (positions, outer)
  queries = Unsqueeze (positions, around)
  queries_column = Unsqueeze (queries, heads)
  keys_row = Unsqueeze (keys, heads)
  causal = LessOrEqual (keys_row, queries_column)
  bias = Where (causal, none, low)
  numbers = Cast <to = 1> (queries)
  angles = Mul (numbers, frequency)
  both = Concat <axis = -1> (angles, angles)
  cosine = Cos (both)
  sine = Sin (both)
  cos = Unsqueeze (cosine, heads)
  sin = Unsqueeze (sine, heads)
  q0 = MatMul (x, wq)
  q1 = Reshape (q0, split)
  q2 = Transpose <perm = [0, 2, 1, 3]> (q1)
  q_cos = Mul (q2, cos)
  q_low = Slice (q2, first, half, last)
  q_high = Slice (q2, half, end, last)
  q_negative = Neg (q_high)
  q_turned = Concat <axis = -1> (q_negative, q_low)
  q_sin = Mul (q_turned, sin)
  q = Add (q_cos, q_sin)
  k0 = MatMul (x, wk)
  k1 = Reshape (k0, split)
  k2 = Transpose <perm = [0, 2, 1, 3]> (k1)
  k_cos = Mul (k2, cos)
  k_low = Slice (k2, first, half, last)
  k_high = Slice (k2, half, end, last)
  k_negative = Neg (k_high)
  k_turned = Concat <axis = -1> (k_negative, k_low)
  k_sin = Mul (k_turned, sin)
  k = Add (k_cos, k_sin)
  k_five = Unsqueeze (k, middle)
  k_twice = Expand (k_five, repeated)
  k_all = Reshape (k_twice, joined)
  k_last = Transpose <perm = [0, 1, 3, 2]> (k_all)
  v0 = MatMul (x, wv)
  v1 = Reshape (v0, split)
  v2 = Transpose <perm = [0, 2, 1, 3]> (v1)
  v_five = Unsqueeze (v2, middle)
  v_twice = Expand (v_five, repeated)
  v_all = Reshape (v_twice, joined)
  scores = MatMul (q, k_last)
  scaled = Mul (scores, scale)
  masked = Add (scaled, bias)
  p = Softmax <axis = -1> (masked)
  c0 = MatMul (p, v_all)
  c1 = Transpose <perm = [0, 2, 1, 3]> (c0)
  c2 = Reshape (c1, merge)
  y = MatMul (c2, wo)
}
"""
"""A decoder's attention with rotary positions, a causal mask, and two heads of queries for each head of keys."""

MERGED = """
merged (float[batch, seq, 32] x) => (float[batch, seq, 32] y)
<float[32, 96] w, float[96] b, float[32, 32] wo, int64[2] flat = {-1, 32}, int64[1] width = {96},
 int64[4] split = {0, 0, -1, 8}, int64[3] merge = {0, 0, -1}, float scale = {0.35}>
{
  sizes = Shape <start = 0, end = 2> (x)
  rows = Reshape (x, flat)
  qkv = Gemm (rows, w, b)
  dims = Concat <axis = 0> (sizes, width)
  together = Reshape (qkv, dims)
  q0, k0, v0 = Split <axis = 2, num_outputs = 3> (together)
  q1 = Reshape (q0, split)
  q2 = Transpose <perm = [0, 2, 1, 3]> (q1)
  k1 = Reshape (k0, split)
  k2 = Transpose <perm = [0, 2, 3, 1]> (k1)
  v1 = Reshape (v0, split)
  v2 = Transpose <perm = [0, 2, 1, 3]> (v1)
  scores = MatMul (q2, k2)
  scaled = Mul (scores, scale)
  p = Softmax <axis = -1> (scaled)
  c0 = MatMul (p, v2)
  c1 = Transpose <perm = [0, 2, 1, 3]> (c0)
  c2 = Reshape (c1, merge)
  y = MatMul (c2, wo)
}
"""
"""As GPT-2 has it: one layer makes queries, keys and values; no mask here."""


def padded(batch: int = 3, seq: int = 6, width: int = 32) -> Samples:
    """Return sentences of different lengths, the last one without any token at all."""
    lengths = np.array([seq, seq // 2, *[0] * (batch - 2)])
    mask = (np.arange(seq)[None] < lengths[:, None]).astype(np.int64)
    x = np.random.default_rng(0).normal(size=(batch, seq, width)).astype(np.float32)
    return Samples(({"x": x, "mask": mask},), source="padded")
