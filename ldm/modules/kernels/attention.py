"""Attention of narrow heads (Vaswani et al., 2017) as one kernel per image and head, without the matrix of weights.

With 8 to 32 channels per head, the exponentials cost as much as the products. Keys and values are transposed, so that
vector instructions compute the scores of many keys at once; one row of scores at a time stays in the first-level cache.
The base-2 logarithm of each row's sum is kept for the gradients (as in Dao et al., 2022).
"""

from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from ldm.modules.kernels.team import (
    LOG2E,
    ONE,
    ZERO,
    at,
    exp2,
    floats,
    jit,
    largest,
    load,
    load_row,
    run,
    shorts,
    store,
    store_sum,
    take,
)

# Channels, or queries, that one pass over the keys takes.
BLOCK = 8
# Keys are padded to a multiple of this, with a score that gives no weight.
LANES = 16
NO_SCORE = np.float32(-1e30)


@jit
def _scores(s, rows, a, first, keys):
    """s[j] = sum over 8 channels of a[c] rows[c, j], added to `s` unless they are the first."""
    a0, a1, a2, a3, a4, a5, a6, a7 = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
    for j in range(keys):
        total = a0 * load(rows, j) + a1 * load(rows, keys + j) + a2 * load(rows, 2 * keys + j)
        total += a3 * load(rows, 3 * keys + j) + a4 * load(rows, 4 * keys + j) + a5 * load(rows, 5 * keys + j)
        total += a6 * load(rows, 6 * keys + j) + a7 * load(rows, 7 * keys + j)
        store(s, j, total if first else total + s[j])


@jit
def _dots(out, s, rows, factor, keys):
    """out[c] = factor * sum over keys of s[j] rows[c, j], for 8 channels."""
    t0, t1, t2, t3, t4, t5, t6, t7 = ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO
    for j in range(keys):
        p = s[j]
        t0 += p * rows[j]
        t1 += p * rows[keys + j]
        t2 += p * rows[2 * keys + j]
        t3 += p * rows[3 * keys + j]
        t4 += p * rows[4 * keys + j]
        t5 += p * rows[5 * keys + j]
        t6 += p * rows[6 * keys + j]
        t7 += p * rows[7 * keys + j]
    store(out, 0, t0 * factor)
    store(out, 1, t1 * factor)
    store(out, 2, t2 * factor)
    store(out, 3, t3 * factor)
    store(out, 4, t4 * factor)
    store(out, 5, t5 * factor)
    store(out, 6, t6 * factor)
    store(out, 7, t7 * factor)


@jit
def _add_rows(total, rows, a, keys):
    """total[j] += sum over 8 queries of a[i] rows[i, j]."""
    a0, a1, a2, a3, a4, a5, a6, a7 = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
    for j in range(keys):
        more = a0 * load_row(rows, j) + a1 * load_row(rows, keys + j) + a2 * load_row(rows, 2 * keys + j)
        more += a3 * load_row(rows, 3 * keys + j) + a4 * load_row(rows, 4 * keys + j)
        more += a5 * load_row(rows, 5 * keys + j) + a6 * load_row(rows, 6 * keys + j)
        store_sum(total, j, total[j] + more + a7 * load_row(rows, 7 * keys + j))


@jit
def _transpose(x, rows, count, padded, stride, width):
    """rows[c, j] = x[j, c], zero beyond the keys."""
    for c in range(width):
        for j in range(count):
            rows[c * padded + j] = load(x, j * stride + c)
        for j in range(count, padded):
            rows[c * padded + j] = ZERO


@jit
def _row(s, a, q, keys, factor, count, padded, width):
    """Scores of one query in base 2, and the largest."""
    for c in range(width):
        a[c] = load(q, c) * factor
    for c in range(0, width, BLOCK):
        _scores(at(s, 0), at(keys, c * padded), at(a, c), c == 0, padded)
    for j in range(count, padded):
        s[j] = NO_SCORE


@jit
def _softmax(s, padded):
    """Scores to weights that are not divided by their sum; returns the largest score and the sum."""
    top = s[0]
    for j in range(padded):
        top = largest(top, s[j])
    total = ZERO
    for j in range(padded):
        p = exp2(s[j] - top)
        s[j] = p
        total += p
    return top, total


@jit
def _forward(p, q, k, v, out):
    """Arguments: q, k, v, out, logarithms of sums, scratch, its size, queries, keys, padded keys, heads, width."""
    queries, count, padded, heads, width = p[10], p[11], p[12], p[13], p[14]
    keys = at(floats(p[8]), take(at(p, 0)) * p[9])
    values, s, a = at(keys, width * padded), at(keys, 2 * width * padded), at(keys, (2 * width + BLOCK) * padded)
    factor, stride = LOG2E / np.sqrt(np.float32(width)), heads * width
    task = take(at(p, 1))
    while task < p[2]:
        first_key = (task // heads * count * heads + task % heads) * width
        first_query = (task // heads * queries * heads + task % heads) * width
        _transpose(at(k, first_key), keys, count, padded, stride, width)
        _transpose(at(v, first_key), values, count, padded, stride, width)
        for i in range(queries):
            here = first_query + i * stride
            _row(s, a, at(q, here), keys, factor, count, padded, width)
            top, total = _softmax(s, padded)
            floats(p[7])[task * queries + i] = top + np.log2(total)
            for c in range(0, width, BLOCK):
                _dots(at(out, here + c), s, at(values, c * padded), ONE / total, padded)
        task = take(at(p, 1))


@jit
def _score_gradients(s, t, log_sum, mean, padded):
    """Scores and products of dy with the values -> weights, and gradients of the scores."""
    for j in range(padded):
        weight = exp2(s[j] - log_sum)
        s[j] = weight
        t[j] = weight * (t[j] - mean)


@jit
def _clear(x, count):
    for j in range(count):
        x[j] = ZERO


@jit
def _query_block(q, out, dy, dq, keys, values, a, b, s, t, log_sums, valid, count, padded, stride, width):
    """Weights `s` and gradients of scores `t` of up to 8 queries; their `dq`; a, b: what dk and dv need of q and dy."""
    factor = ONE / np.sqrt(np.float32(width))
    _clear(a, 2 * BLOCK * width)
    for i in range(BLOCK):
        here, si, ti = i * stride, at(s, i * padded), at(t, i * padded)
        if i >= valid:
            _clear(si, padded)
            _clear(ti, padded)
        else:
            line = at(b, BLOCK * width)
            _row(si, line, at(q, here), keys, factor * LOG2E, count, padded, width)
            mean = ZERO
            for c in range(width):
                line[c] = load(dy, here + c)
                mean += line[c] * load(out, here + c)
                b[c * BLOCK + i] = line[c]
                a[c * BLOCK + i] = load(q, here + c) * factor
            for c in range(0, width, BLOCK):
                _scores(ti, at(values, c * padded), at(line, c), c == 0, padded)
            _score_gradients(si, ti, log_sums[i], mean, padded)
            for c in range(0, width, BLOCK):
                _dots(at(dq, here + c), ti, at(keys, c * padded), factor, padded)


@jit
def _backward(p, q, k, v, out, dy, dq, dk, dv):
    """Arguments: q, k, v, out, dy, dq, dk, dv, logarithms of sums, scratch, its size, and the sizes as forward."""
    queries, count, padded, heads, width = p[14], p[15], p[16], p[17], p[18]
    keys = at(floats(p[12]), take(at(p, 0)) * p[13])
    tile, stride = width * padded, heads * width
    values, key_sums, value_sums = at(keys, tile), at(keys, 2 * tile), at(keys, 3 * tile)
    s, t, a = at(keys, 4 * tile), at(keys, 4 * tile + BLOCK * padded), at(keys, 4 * tile + 2 * BLOCK * padded)
    b = at(a, BLOCK * width)
    task = take(at(p, 1))
    while task < p[2]:
        first_key = (task // heads * count * heads + task % heads) * width
        _transpose(at(k, first_key), keys, count, padded, stride, width)
        _transpose(at(v, first_key), values, count, padded, stride, width)
        _clear(key_sums, 2 * tile)
        for i in range(0, queries, BLOCK):
            here = (task // heads * queries * heads + task % heads) * width + i * stride
            x, y, d, dx = at(q, here), at(out, here), at(dy, here), at(dq, here)
            log_sums, valid = at(floats(p[11]), task * queries + i), min(BLOCK, queries - i)
            _query_block(x, y, d, dx, keys, values, a, b, s, t, log_sums, valid, count, padded, stride, width)
            for c in range(width):
                _add_rows(at(key_sums, c * padded), t, at(a, c * BLOCK), padded)
                _add_rows(at(value_sums, c * padded), s, at(b, c * BLOCK), padded)
        for j in range(count):
            for c in range(width):
                store(dk, first_key + j * stride + c, key_sums[c * padded + j])
                store(dv, first_key + j * stride + c, value_sums[c * padded + j])
        task = take(at(p, 1))


def _forward_float(p):
    _forward(p, floats(p[3]), floats(p[4]), floats(p[5]), floats(p[6]))


def _forward_bfloat(p):
    _forward(p, shorts(p[3]), shorts(p[4]), shorts(p[5]), shorts(p[6]))


def _backward_float(p):
    tensors = floats(p[3]), floats(p[4]), floats(p[5]), floats(p[6])
    _backward(p, *tensors, floats(p[7]), floats(p[8]), floats(p[9]), floats(p[10]))


def _backward_bfloat(p):
    tensors = shorts(p[3]), shorts(p[4]), shorts(p[5]), shorts(p[6])
    _backward(p, *tensors, shorts(p[7]), shorts(p[8]), shorts(p[9]), shorts(p[10]))


class Attention(torch.autograd.Function):
    """q (b, l, heads * d), k and v (b, n, heads * d) of one type, float32 or bfloat16 -> (b, l, heads * d)."""

    @staticmethod
    def forward(ctx: Any, q, k, v, heads: int) -> torch.Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, log_sums = torch.empty_like(q), q.new_empty(len(q), heads, q.shape[1], dtype=torch.float32)
        ctx.heads = heads
        kernel = _forward_bfloat if q.dtype == torch.bfloat16 else _forward_float
        run(kernel, len(q) * heads, q, k, v, out, log_sums, *_sizes(q, k, heads, 2, BLOCK))
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        q, k, v, out, log_sums = ctx.saved_tensors
        dy = dy.to(q.dtype).contiguous()
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        kernel = _backward_bfloat if q.dtype == torch.bfloat16 else _backward_float
        sizes = _sizes(q, k, ctx.heads, 4, 2 * BLOCK)
        run(kernel, len(q) * ctx.heads, q, k, v, out, dy, *gradients, log_sums, *sizes)
        return *gradients, None


def _sizes(q: torch.Tensor, k: torch.Tensor, heads: int, tiles: int, rows: int) -> tuple:
    """Scratch memory for each thread, of `tiles` transposed matrices and `rows` rows, its size, and all sizes."""
    queries, keys, width = q.shape[1], k.shape[1], q.shape[2] // heads
    padded = -(-keys // LANES) * LANES
    size = (tiles * width + rows) * padded + 3 * BLOCK * width + LANES
    scratch = torch.empty(torch.get_num_threads(), size)
    return scratch, size, queries, keys, padded, heads, width
