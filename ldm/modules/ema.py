"""Exponential moving average of a module's parameters, stored under LDM's names."""


import torch
from torch import nn


class LitEma(nn.Module):
    """Shadow copies of the trainable parameters of a module.

    The k-th update uses the decay min(decay, (1 + k) / (10 + k)). A shadow's buffer is named after its parameter
    without the dots, so that checkpoints of LDM fit.

    Args:
        model: the module to follow.
        decay: upper limit of the decay, in [0, 1].
    """

    decay: torch.Tensor
    num_updates: torch.Tensor

    def __init__(self, model: nn.Module, decay: float = 0.9999, buffers: bool = False) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"the EMA decay must lie in [0, 1], got {decay}")
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0, dtype=torch.int))
        self.names: dict[str, str] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.names[name] = name.replace(".", "")
                self.register_buffer(self.names[name], parameter.detach().clone())
        self._stored: list[torch.Tensor] = []

    def _pairs(self, model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        parameters = dict(model.named_parameters())
        buffers = dict(self.named_buffers())
        shadows = [buffers[buffer] for buffer in self.names.values()]
        return shadows, [parameters[name].detach() for name in self.names]

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Update the shadows from the parameters of `model`, without waiting for the device."""
        self.num_updates += 1
        count = self.num_updates.float()
        decay = torch.minimum(self.decay, (1 + count) / (10 + count))
        shadows, parameters = self._pairs(model)
        step = torch._foreach_sub(shadows, parameters)
        torch._foreach_mul_(step, 1.0 - decay)
        torch._foreach_sub_(shadows, step)

    @torch.no_grad()
    def reset(self, model: nn.Module) -> None:
        """Begin anew from the parameters of `model`."""
        shadows, parameters = self._pairs(model)
        torch._foreach_copy_(shadows, parameters)
        self.num_updates.zero_()

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the parameters of `model` with the shadows."""
        shadows, parameters = self._pairs(model)
        torch._foreach_copy_(parameters, shadows)

    def store(self, parameters: nn.Module) -> None:
        """Keep a copy of parameters, to be put back by `restore`."""
        self._stored = [parameter.detach().clone() for parameter in parameters.parameters()]

    @torch.no_grad()
    def restore(self, parameters: nn.Module) -> None:
        """Put the parameters kept by `store` back."""
        torch._foreach_copy_([parameter.detach() for parameter in parameters.parameters()], self._stored)
        self._stored = []
