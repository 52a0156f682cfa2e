"""Optimisers for `optimizer_config`, beside those of `torch.optim`."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ldm.util import UserError, instantiate_from_config

# One round turns each singular value x in [0, 1] into a x + b x³ + c x⁵ (Jordan et al., Muon, 2024). It is steep at 0:
# after five rounds all but the smallest lie between .68 and 1.14.
A, B, C = 3.4445, -4.7750, 2.0315


def build_optimizer(
    config: Mapping[str, Any],
    parameters: Iterable[torch.nn.Parameter],
    lr: float,
    named: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
) -> torch.optim.Optimizer:
    """The optimiser that a node with `target` and `params` describes.

    Args:
        config: the node.
        parameters: weights to train.
        lr: the learning rate.
        named: names and weights, which `adamw` of `Muon` goes by; without them it has no effect yet.

    Raises:
        UserError: no optimiser, unknown or wrong `params`, a learning rate among them, or an expression in
            `adamw` that matches no name.
    """
    settings = config.get("params") if isinstance(config, Mapping) else None
    if isinstance(settings, Mapping) and "lr" in settings:
        raise UserError(
            "the learning rate is base_learning_rate times the images of a step: set that", "optimizer_config.params.lr"
        )
    given = {"params": list(parameters), "lr": lr}
    optimizer = instantiate_from_config(config, "optimizer_config", "optimizer", given=given)
    if isinstance(optimizer, Muon) and named is not None:
        optimizer.leave_to_adamw(named)
    return optimizer


def checked_optimizer(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Build a node's optimiser for a single weight, so that mistakes are reported before any data are read.

    The names in `adamw` of `Muon` are looked up later, when the model's optimiser is built.

    Returns:
        The node.

    Raises:
        UserError: as `build_optimizer`.
    """
    if config is not None:
        build_optimizer(config, [torch.nn.Parameter(torch.zeros(1))], 1e-4)
    return config


def orthogonalize(matrices: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Matrices (b, rows, columns) of the same singular vectors, with singular values near 1; zeros stay zeros.

    By Newton and Schulz's iteration, which needs nothing but products of matrices.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    if x.shape[-1] < 2 * x.shape[-2]:
        for _ in range(rounds):
            x = torch.baddbmm(x, even(x.bmm(x.mT)), x, beta=A)
    else:  # long rows: the rounds' factors, which commute, are gathered first, and meet the rows once
        gram = x.bmm(x.mT)
        part = even(gram)
        gathered = part.clone()
        gathered.diagonal(dim1=-2, dim2=-1).add_(A)
        for _ in range(rounds - 1):
            gram = torch.baddbmm(gram, part, gram, beta=A)
            gram = torch.baddbmm(gram, gram, part, beta=A)
            part = even(gram)
            gathered = torch.baddbmm(gathered, part, gathered, beta=A)
        x = gathered.bmm(x)
    return x.mT if tall else x


def even(gram: torch.Tensor) -> torch.Tensor:
    """B x xᵀ + C (x xᵀ)²: with A, the factor by which a round multiplies x."""
    return torch.baddbmm(gram, gram, gram, beta=B, alpha=C)


class Muon(torch.optim.AdamW):
    """Muon for matrices and kernels, AdamW for everything else, at one learning rate.

    Muon (Jordan et al., 2024) takes the momentum's nearest orthogonal matrix as its step, so that all directions of a
    layer are learned at one pace. A kernel (out, in, h, w) is a matrix (out, in · h · w). The entries of a step have a
    root mean square of .2, as AdamW's have about (Liu et al., "Muon is Scalable for LLM Training", 2025, Section 2.2):
    a learning rate and a weight decay found for AdamW can stay.

    Args:
        params: weights to train.
        lr, weight_decay: of both.
        betas, eps, fused: of AdamW; see there.
        momentum: of Muon, with Nesterov's step.
        smallest: a matrix with fewer rows or columns is AdamW's, such as a first or a last layer; the layer that
            gives N scalars has N rows.
        adamw: regular expressions; weights whose name one of them matches anywhere are AdamW's, once `leave_to_adamw`
            has been given the names.

    Raises:
        UserError: an entry of `adamw` is no regular expression.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        momentum: float = 0.95,
        smallest: int = 16,
        adamw: Sequence[str] = (),
        fused: bool = True,
    ) -> None:
        super().__init__(params, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay, fused=fused)
        # Gradient scalers are to undo their scale themselves, as for any optimiser but a fused one.
        self._step_supports_amp_scaling = False
        own = {"momentum": momentum, "smallest": smallest}
        self.defaults |= own
        for group in self.param_groups:
            group |= own
        self.adamw = [adamw] if isinstance(adamw, str) else list(adamw)
        self.left: set[torch.nn.Parameter] = set()
        for pattern in self.adamw:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"'{pattern}' is no regular expression: {error}", "adamw") from error

    def leave_to_adamw(self, named: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        """Leave to AdamW the weights whose names `adamw` matches.

        Args:
            named: name and weight; those of another optimiser may be among them, and frozen ones, which do not count.

        Raises:
            UserError: an expression that matches no name.
        """
        names = {name: weight for name, weight in named if weight.requires_grad}
        for pattern in self.adamw:
            found = [name for name in names if re.search(pattern, name)]
            if not found:
                raise UserError(
                    f"'{pattern}' matches the name of no trained weight; one is '{next(reversed(names), '')}'",
                    "optimizer_config.params.adamw",
                )
            self.left.update(names[name] for name in found)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both; gives what the closure gives."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients: dict[torch.Tensor, torch.Tensor] = {}
        for group in self.param_groups:
            alike: dict[Any, list[torch.Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None and self.is_muons(parameter, group["smallest"]):
                    alike[parameter.shape, parameter.device, parameter.dtype].append(parameter)
                    gradients[parameter] = parameter.grad
            for parameters in alike.values():
                self._step_matrices(parameters, [gradients[parameter] for parameter in parameters], group)
        for parameter in gradients:
            parameter.grad = None  # AdamW passes over what has no gradient
        super().step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As PyTorch's.

        Raises:
            UserError: see `check_moments`.
        """
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            self.check_moments({weight: self.state.get(weight) for weight in group["params"]}, group["smallest"])

    def check_moments(self, states: Mapping[torch.nn.Parameter, Any], smallest: int) -> None:
        """Refuse what was saved of weights that change hands.

        Args:
            states: what was saved of each weight; nothing before the first step.
            smallest: see the class.

        Raises:
            UserError: a weight was Muon's there, and is AdamW's here, or the other way round.
        """
        for weight, state in states.items():
            here = self.is_muons(weight, smallest)
            if state and here == ("exp_avg_sq" in state):  # which AdamW alone keeps
                there, now = ("AdamW", "Muon") if here else ("Muon", "AdamW")
                raise UserError(
                    f"a weight of shape {tuple(weight.shape)} was {there}'s when this was saved, and is {now}'s here:"
                    " leave smallest and adamw as they were, or start from the weights alone, by"
                    " model.params.ckpt_path",
                    "optimizer_config.params",
                )

    def __getstate__(self) -> dict[str, Any]:
        """For copies: PyTorch's knows of groups and state alone."""
        return super().__getstate__() | {"adamw": self.adamw, "left": self.left}

    def is_muons(self, weight: torch.nn.Parameter, smallest: int) -> bool:
        """Whether Muon moves a weight, and not AdamW."""
        return weight not in self.left and is_matrix(weight, smallest)

    def _step_matrices(
        self, parameters: list[torch.Tensor], gradients: list[torch.Tensor], group: Mapping[str, Any]
    ) -> None:
        """A step of Muon for weights of one shape, as one batch."""
        for parameter in parameters:
            state = self.state[parameter]
            if not state:  # AdamW looks for a step in every state that it loads
                state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter)}
        torch._foreach_add_([self.state[parameter]["step"] for parameter in parameters], 1)
        averages = [self.state[parameter]["exp_avg"] for parameter in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, averages, group["momentum"])
        # Manual optimisation steps inside of autocast, and in half precision the iteration diverges.
        with torch.autocast(parameters[0].device.type, enabled=False):
            steps = orthogonalize(torch.stack([step.flatten(1) for step in ahead]))
        size = -0.2 * group["lr"] * max(steps.shape[-2:]) ** 0.5  # an entry's root mean square is 1 / √max before
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, [step.view_as(p) for step, p in zip(size * steps, parameters, strict=True)])


def is_matrix(weight: torch.Tensor, smallest: int) -> bool:
    """Whether a weight (rows, ...) has at least `smallest` rows, and columns."""
    return weight.ndim >= 2 and weight.shape[0] >= smallest and weight[0].numel() >= smallest
