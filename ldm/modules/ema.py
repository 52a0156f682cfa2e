"""Exponential moving average of a module's weights, stored under LDM's names."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from ldm.util import UserError


class LitEma(nn.Module):
    """EMA weights of a module: of its trainable parameters and, if asked for, of its statistics.

    The k-th update uses the decay min(decay, (1 + k) / (10 + k)). Each is a buffer here, named after what it follows
    without the dots, so that checkpoints of LDM fit.

    Args:
        model: the module to follow.
        decay: upper limit of the decay, in [0, 1].
        buffers: also average the floating-point buffers, such as the running means and variances of batch norm. LDM
            averages parameters only: batch norm then combines EMA weights with the statistics of the live weights.

    Attributes:
        names: name of the parameter or buffer in `model` -> name of the buffer here.

    Raises:
        UserError: a decay outside [0, 1].
    """

    decay: torch.Tensor
    num_updates: torch.Tensor

    def __init__(self, model: nn.Module, decay: float = 0.9999, buffers: bool = False) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise UserError(f"expected a number in [0, 1], got {decay}", "ema_decay")
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0, dtype=torch.int))
        followed: dict[str, torch.Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if buffers:
            followed |= {name: b for name, b in model.named_buffers() if b.is_floating_point()}
        self.names = {name: name.replace(".", "") for name in followed}
        for name, tensor in followed.items():
            self.register_buffer(self.names[name], tensor.detach().clone())
        self._stored: list[torch.Tensor] = []

    def _shadows(self) -> list[torch.Tensor]:
        own = dict(self.named_buffers())
        return [own[name] for name in self.names.values()]

    def _live(self, model: nn.Module) -> list[torch.Tensor]:
        """The tensors of `model` that are followed, in the order of `_shadows`."""
        found: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return [found[name] for name in self.names]

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Update the EMA weights from `model`, without waiting for the device; of several processes, on the first one
        alone, which also saves them. The others get them by `share`."""
        if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
            return
        self.num_updates += 1
        count = self.num_updates.float()
        decay = torch.minimum(self.decay, (1 + count) / (10 + count))
        shadows = self._shadows()
        if decay.device.type == "cpu":  # one pass over the weights instead of three; a GPU has no kernel for it
            torch._foreach_lerp_(shadows, self._live(model), [1.0 - decay] * len(shadows))
            return
        step = torch._foreach_sub(shadows, self._live(model))
        torch._foreach_mul_(step, 1.0 - decay)
        torch._foreach_sub_(shadows, step)

    @torch.no_grad()
    def share(self) -> None:
        """Give all processes the first one's EMA weights; every process must call it."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        for buffer in self.buffers():
            sent = buffer.contiguous()
            dist.broadcast(sent, src=0)
            buffer.copy_(sent)

    @torch.no_grad()
    def reset(self, model: nn.Module) -> None:
        """Start again from the weights of `model`."""
        torch._foreach_copy_(self._shadows(), self._live(model))
        self.num_updates.zero_()

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the weights of `model` with the EMA weights."""
        torch._foreach_copy_(self._live(model), self._shadows())

    def store(self, model: nn.Module | Iterable[torch.Tensor]) -> None:
        """Keep a copy of what `copy_to` overwrites in `model`, or, as in LDM, of the given parameters."""
        tensors = self._live(model) if isinstance(model, nn.Module) else model
        self._stored = [tensor.detach().clone() for tensor in tensors]

    @torch.no_grad()
    def restore(self, model: nn.Module | Iterable[torch.Tensor]) -> None:
        """Put back what `store` kept of the same argument."""
        tensors = self._live(model) if isinstance(model, nn.Module) else list(model)
        torch._foreach_copy_(tensors, self._stored)
        self._stored = []


def ema_buffers(model: nn.Module) -> list[str]:
    """Names of the EMA weights in a model. DDP ignores these: it would broadcast every buffer before each forward pass,
    and these are needed at validation alone."""
    prefixes = [f"{name}." for name, module in model.named_modules() if isinstance(module, LitEma)]
    return [name for name, _ in model.named_buffers() if name.startswith(tuple(prefixes))]
