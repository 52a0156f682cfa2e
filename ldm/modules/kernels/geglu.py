"""GEGLU, x * GELU(gate) (Shazeer, 2020), as one kernel, with the exact GELU."""

from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from ldm.modules.kernels.team import HALF, ONE, at, exp, floats, jit, load, run, shorts, store, take

# Rows of a task.
ROWS = 32
# erf(z) = 1 - (A1 t + ... + A5 t^5) exp(-z²) with t = 1 / (1 + P z), z >= 0, to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
# z = |gate| / √2, so that exp(-z²) is the Gaussian of the gradient as well.
P_ROOT_HALF = np.float32(0.3275911 / np.sqrt(2))
A1, A2, A3 = np.float32(0.254829592), np.float32(-0.284496736), np.float32(1.421413741)
A4, A5 = np.float32(-1.453152027), np.float32(1.061405429)
GAUSSIAN = np.float32(1 / np.sqrt(2 * np.pi))


@jit
def _normal_cdf(gate, gaussian):
    """Φ(gate), given exp(-gate² / 2)."""
    t = ONE / (ONE + P_ROOT_HALF * abs(gate))
    upper = HALF * gaussian * t * (A1 + t * (A2 + t * (A3 + t * (A4 + t * A5))))
    return ONE - upper if gate > 0 else upper


@jit
def _forward_row(x, gates, y, channels):
    for c in range(channels):
        gate = load(gates, c)
        store(y, c, load(x, c) * gate * _normal_cdf(gate, exp(-HALF * gate * gate)))


@jit
def _backward_row(x, gates, dy, dx, dgates, channels):
    for c in range(channels):
        gate, d = load(gates, c), load(dy, c)
        gaussian = exp(-HALF * gate * gate)
        cdf = _normal_cdf(gate, gaussian)
        store(dx, c, d * gate * cdf)
        store(dgates, c, d * load(x, c) * (cdf + gate * gaussian * GAUSSIAN))


@jit
def _forward(p, x, y):
    """Arguments: x, y, rows, channels."""
    rows, channels = p[5], p[6]
    block = take(at(p, 1))
    while block < p[2]:
        for row in range(block * ROWS, min(rows, (block + 1) * ROWS)):
            here = row * 2 * channels
            _forward_row(at(x, here), at(x, here + channels), at(y, row * channels), channels)
        block = take(at(p, 1))


@jit
def _backward(p, x, dy, dx):
    """Arguments: x, dy, dx, rows, channels."""
    rows, channels = p[6], p[7]
    block = take(at(p, 1))
    while block < p[2]:
        for row in range(block * ROWS, min(rows, (block + 1) * ROWS)):
            here, gates = row * 2 * channels, (row * 2 + 1) * channels
            _backward_row(at(x, here), at(x, gates), at(dy, row * channels), at(dx, here), at(dx, gates), channels)
        block = take(at(p, 1))


def _forward_float(p):
    _forward(p, floats(p[3]), floats(p[4]))


def _forward_bfloat(p):
    _forward(p, shorts(p[3]), shorts(p[4]))


def _backward_float(p):
    _backward(p, floats(p[3]), floats(p[4]), floats(p[5]))


def _backward_bfloat(p):
    _backward(p, shorts(p[3]), shorts(p[4]), shorts(p[5]))


class Geglu(torch.autograd.Function):
    """x (..., 2c), float32 or bfloat16 -> (..., c)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        channels = x.shape[-1] // 2
        y, rows = x.new_empty(*x.shape[:-1], channels), x.numel() // (2 * channels)
        run(_forward_bfloat if x.dtype == torch.bfloat16 else _forward_float, _tasks(rows), x, y, rows, channels)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        dy, dx = dy.to(x.dtype).contiguous(), torch.empty_like(x)
        rows, channels = dy.numel() // dy.shape[-1], dy.shape[-1]
        kernel = _backward_bfloat if x.dtype == torch.bfloat16 else _backward_float
        run(kernel, _tasks(rows), x, dy, dx, rows, channels)
        return dx


def _tasks(rows: int) -> int:
    return -(-rows // ROWS)
