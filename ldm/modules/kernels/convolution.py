"""3×3 convolutions of small maps, whose weights are differentiated by one matrix product."""

from typing import Any

import torch
from torch.nn import functional as F


def pays(x: torch.Tensor) -> bool:
    """Whether a convolution of x (b, c, h, w) is faster this way: on a CPU, for wide and small maps, not in float32.

    At 32 maps of 256 × 4 × 4 in bfloat16, PyTorch takes 2.0 ms for the gradient of the weights, a product .6; at 2 × 2,
    1.5 and .2 (two cores with AMX). At 128 × 8 × 8 they are equal. In float32, forward and backward at 256 × 4 × 4 take
    16.7 ms by PyTorch and 18.1 this way (one thread of an EPYC).
    """
    float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and not float32 and x.shape[1] >= 128 and x.shape[2] * x.shape[3] <= 16


def conv3x3(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A convolution of stride 1 and padding 1: x (b, i, h, w), weight (o, i, 3, 3), bias (o,) -> (b, o, h, w)."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    return _Conv3x3.apply(x, weight, bias)


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        sizes = [weight.shape[0]], [1, 1], [1, 1], [1, 1], False, [0, 0], 1
        grad_x = torch.ops.aten.convolution_backward(grad, x, weight, *sizes, [True, False, False])[0]
        rows = grad.permute(0, 2, 3, 1).flatten(0, 2)  # (b h w, o)
        product = rows.t() @ patches(x)
        grad_weight = product.view(weight.shape[0], 3, 3, weight.shape[1]).permute(0, 3, 1, 2)
        return grad_x, grad_weight, rows.sum(dim=0)  # accumulated in float32


def patches(x: torch.Tensor) -> torch.Tensor:
    """The 3×3 neighbourhoods, zero outside: x (b, c, h, w) -> (b h w, 9 c), channels varying fastest."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    b, height, width, c = padded.shape
    image, row, column, _ = padded.stride()
    # The three columns of a row lie side by side in memory.
    view = padded.as_strided((b, height - 2, width - 2, 3, 3 * c), (image, row, column, row, 1))
    return view.reshape(-1, 9 * c)
