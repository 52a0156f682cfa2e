"""Group normalisation (Wu and He, 2018), scale and shift, and SiLU as one kernel over channels-last memory."""

from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from ldm.modules.kernels.team import ONE, ZERO, add_to, at, exp, floats, jit, load, number, run, shorts, store, take

# Rows of a thread's scratch memory: each has a number per channel.
ROWS = 5


@jit
def _mean(x, sums, centre, mean, rows, channels, groups):
    """Mean of each group of one image, also in the channels of `centre`."""
    for c in range(channels):
        sums[c] = ZERO
    for p in range(rows):
        for c in range(channels):
            add_to(sums, c, load(x, p * channels + c))
    width = channels // groups
    for g in range(groups):
        total = ZERO
        for c in range(g * width, (g + 1) * width):
            total += sums[c]
        mean[g] = total / np.float32(rows * width)
    _spread(mean, centre, channels, groups)


@jit
def _rstd(x, sums, centre, rstd, eps, rows, channels, groups):
    """1 / standard deviation of each group of one image, given the means."""
    for c in range(channels):
        sums[c] = ZERO
    for p in range(rows):
        for c in range(channels):
            difference = load(x, p * channels + c) - load(centre, c)
            add_to(sums, c, difference * difference)
    width = channels // groups
    for g in range(groups):
        total = ZERO
        for c in range(g * width, (g + 1) * width):
            total += sums[c]
        rstd[g] = ONE / np.sqrt(total / np.float32(rows * width) + eps)


@jit
def _spread(values, wide, channels, groups):
    """Values of the groups to their channels."""
    width = channels // groups
    for g in range(groups):
        for c in range(g * width, (g + 1) * width):
            wide[c] = values[g]


@jit
def _affine(factor, offset, centre, rstd, weight, bias, scale, shift, channels, groups):
    """The whole normalisation of a channel as factor * x + offset."""
    width = channels // groups
    for c in range(channels):
        factor[c] = rstd[c // width] * weight[c] * (ONE + scale[c])
        offset[c] = bias[c] * (ONE + scale[c]) + shift[c] - centre[c] * factor[c]


@jit
def _apply(x, y, factor, offset, silu, rows, channels):
    """y = factor * x + offset for each channel, then SiLU if asked for."""
    for p in range(rows):
        if silu:
            for c in range(channels):
                z = load(x, p * channels + c) * load(factor, c) + load(offset, c)
                store(y, p * channels + c, z / (ONE + exp(-z)))
        else:
            for c in range(channels):
                store(y, p * channels + c, load(x, p * channels + c) * load(factor, c) + load(offset, c))


@jit
def _before_silu(x, dy, dz, centre, factor, offset, first, second, silu, rows, channels):
    """Gradient dz of what goes into SiLU, and its sums over positions: of dz, and of dz * (x - mean)."""
    for c in range(channels):
        first[c] = ZERO
        second[c] = ZERO
    for p in range(rows):
        if silu:
            for c in range(channels):
                value = load(x, p * channels + c)
                z = value * load(factor, c) + load(offset, c)
                gate = ONE / (ONE + exp(-z))
                d = load(dy, p * channels + c) * gate * (ONE + z * (ONE - gate))
                store(dz, p * channels + c, d)
                add_to(first, c, d)
                add_to(second, c, d * (value - load(centre, c)))
        else:
            for c in range(channels):
                d = load(dy, p * channels + c)
                store(dz, p * channels + c, d)
                add_to(first, c, d)
                add_to(second, c, d * (load(x, p * channels + c) - load(centre, c)))


@jit
def _before_norm(x, dx, dz, centre, factor, offset, slope, first, second, rstd, rows, channels, groups):
    """Gradient of the normalisation: dz * factor, less its mean and its part along x within each group."""
    width = channels // groups
    for g in range(groups):
        total, along = ZERO, ZERO
        for c in range(g * width, (g + 1) * width):
            total += factor[c] * first[c]
            along += factor[c] * second[c]
        count = np.float32(rows * width)
        for c in range(g * width, (g + 1) * width):
            slope[c] = -along * rstd[g] * rstd[g] / count
            offset[c] = -total / count - slope[c] * centre[c]
            second[c] *= rstd[g]
    for p in range(rows):
        for c in range(channels):
            k = p * channels + c
            store(dx, k, dz[k] * load(factor, c) + load(x, k) * load(slope, c) + load(offset, c))


@jit
def _forward(p, x, y):
    """Arguments: x, y, mean, rstd, weight, bias, scale and shift, scratch, eps, silu, rows, channels, groups."""
    rows, channels, groups = p[13], p[14], p[15]
    scratch = at(floats(p[10]), take(at(p, 0)) * ROWS * channels)
    centre, factor = at(scratch, channels), at(scratch, 2 * channels)
    image = take(at(p, 1))
    while image < p[2]:
        here, group, channel = image * rows * channels, image * groups, image * channels
        mean, rstd = at(floats(p[5]), group), at(floats(p[6]), group)
        scale, shift = at(floats(p[9]), 2 * channel), at(floats(p[9]), 2 * channel + channels)
        _mean(at(x, here), scratch, centre, mean, rows, channels, groups)
        _rstd(at(x, here), scratch, centre, rstd, number(p[11]), rows, channels, groups)
        _affine(factor, scratch, centre, rstd, floats(p[7]), floats(p[8]), scale, shift, channels, groups)
        _apply(at(x, here), at(y, here), factor, scratch, p[12] != 0, rows, channels)
        image = take(at(p, 1))


@jit
def _backward(p, x, dy, dx):
    """Arguments: x, dy, dx, mean, rstd, weight, bias, scale and shift, two sums, scratch, silu, and the sizes."""
    rows, channels, groups = p[15], p[16], p[17]
    scratch = at(floats(p[13]), take(at(p, 0)) * (ROWS + rows) * channels)
    centre, factor = at(scratch, channels), at(scratch, 2 * channels)
    slope, dz = at(scratch, 3 * channels), at(scratch, ROWS * channels)
    image = take(at(p, 1))
    while image < p[2]:
        here, group, channel = image * rows * channels, image * groups, image * channels
        mean, rstd = at(floats(p[6]), group), at(floats(p[7]), group)
        scale, shift = at(floats(p[10]), 2 * channel), at(floats(p[10]), 2 * channel + channels)
        first, second = at(floats(p[11]), channel), at(floats(p[12]), channel)
        _spread(mean, centre, channels, groups)
        _affine(factor, scratch, centre, rstd, floats(p[8]), floats(p[9]), scale, shift, channels, groups)
        _before_silu(at(x, here), at(dy, here), dz, centre, factor, scratch, first, second, p[14] != 0, rows, channels)
        _before_norm(
            at(x, here), at(dx, here), dz, centre, factor, scratch, slope, first, second, rstd, rows, channels, groups
        )
        image = take(at(p, 1))


def _forward_float(p):
    _forward(p, floats(p[3]), floats(p[4]))


def _forward_bfloat(p):
    _forward(p, shorts(p[3]), shorts(p[4]))


def _backward_float(p):
    _backward(p, floats(p[3]), floats(p[4]), floats(p[5]))


def _backward_bfloat(p):
    _backward(p, shorts(p[3]), shorts(p[4]), shorts(p[5]))


class GroupNorm(torch.autograd.Function):
    """x (b, c, h, w) float32 or bfloat16, weight and bias (c,) float32, scale and shift (b, 2c) float32 or None."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, modulation, groups: int, eps: float, silu: bool) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        b, c, h, w = x.shape
        y = torch.empty_like(x, memory_format=torch.channels_last)
        statistics, scratch = x.new_empty(2, b, groups, dtype=torch.float32), _scratch(ROWS * c)
        kernel = _forward_bfloat if x.dtype == torch.bfloat16 else _forward_float
        factors = _factors(weight, bias, modulation, b)
        run(kernel, b, x, y, *statistics, *factors, scratch, float(eps), int(silu), h * w, c, groups)
        ctx.save_for_backward(x, statistics, weight, bias, modulation)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        x, statistics, weight, bias, modulation = ctx.saved_tensors
        b, c, h, w = x.shape
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        # Sums over positions: of the gradient before SiLU, and of its product with the normalised x.
        sums, scratch = x.new_empty(2, b, c, dtype=torch.float32), _scratch((ROWS + h * w) * c)
        kernel = _backward_bfloat if x.dtype == torch.bfloat16 else _backward_float
        factors = _factors(weight, bias, modulation, b)
        run(kernel, b, x, dy, dx, *statistics, *factors, *sums, scratch, int(ctx.silu), h * w, c, statistics.shape[2])
        plain, along = sums
        if modulation is None:
            return dx, along.sum(0), plain.sum(0), None, None, None, None
        dbias, dweight = (sums * (1 + modulation[:, :c])).sum(1)
        dmodulation = torch.cat([weight * along + bias * plain, plain], dim=1)
        return dx, dweight, dbias, dmodulation, None, None, None


def _factors(weight, bias, modulation: torch.Tensor | None, images: int) -> tuple[torch.Tensor, ...]:
    """Weight, bias, and each image's scale and shift (b, 2c), dense."""
    if modulation is None:
        modulation = weight.new_zeros(images, 2 * len(weight))
    return weight.contiguous(), bias.contiguous(), modulation.contiguous()


def _scratch(size: int) -> torch.Tensor:
    """Memory of `size` numbers for each thread."""
    return torch.empty(torch.get_num_threads(), size)
