"""Batch norm over the batches of all processes on a CPU, where PyTorch's SyncBatchNorm refuses to run."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over all processes. Every process's loss depends on it, so gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Any shape -> the same."""
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        """Any shape -> the same."""
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`BatchNorm2d` whose statistics in training are those of all processes' batches together."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) -> the same shape and type; in one process, as `BatchNorm2d`."""
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        h = x.float()
        own = h.sum(dim=(0, 2, 3))
        sums = SumOverProcesses.apply(torch.cat([own, own.new_full((1,), h.numel() // h.shape[1])]))
        count, mean = sums[-1].detach(), (sums[:-1] / sums[-1].detach())[:, None, None]
        # Two passes, as the difference of E x² and (E x)² would lose digits.
        variance = SumOverProcesses.apply((h - mean).square().sum(dim=(0, 2, 3))) / count
        self._update(mean.detach().flatten(), variance.detach() * count / (count - 1))
        h = (h - mean) * (variance + self.eps).rsqrt()[:, None, None]
        if self.affine:
            h = h * self.weight[:, None, None] + self.bias[:, None, None]
        return h.to(x.dtype)

    @torch.no_grad()
    def _update(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Follow the batches' mean and unbiased variance, both (c,)."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


def synchronise_batch_norms(model: nn.Module) -> None:
    """Replace every `BatchNorm2d` in a model, in place; parameters, buffers and their names stay."""
    for name, module in list(model.named_modules()):
        if type(module) is not nn.BatchNorm2d:
            continue
        settings = (module.eps, module.momentum, module.affine, module.track_running_stats)
        other = SyncBatchNorm2d(module.num_features, *settings).train(module.training)
        # The same tensors, not copies: an optimiser may hold them already.
        other._parameters, other._buffers = module._parameters, module._buffers
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, other)
