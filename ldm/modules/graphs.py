"""CUDA graphs of the networks that train: their launches are recorded once, and replayed as a whole in every step.

A step of these networks is thousands of short kernels, each of which costs a launch.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ldm.util import UserError

# A batch size is recorded when it is met again: the last batch of an epoch is smaller, and comes once.
SECOND, KEPT = 2, 2


class Recorder:
    """Records a network's forward and backward pass for each kind of input that comes again, and replays them.

    It belongs to a network as its attribute `recorder`, and `call` goes through it. In evaluation mode, without
    gradients, on a CPU, and for inputs that are not recorded, the network computes as ever. Copies of the network get a
    recorder without records.

    Output and gradients of a replay lie in memory that the next one overwrites: each call needs its backward pass
    before the next call, and gradients must be used and set to None (`zero_grad`) in the same step. So graphs do not go
    together with the accumulation of batches.

    Raises:
        UserError: an input came again, and PyTorch could not record it. It may leave the GPU in a state in which
            training should not go on.
    """

    def __init__(self) -> None:
        self.replays: dict[Any, Callable[..., Any]] = {}
        self.met: Counter[Any] = Counter()

    def __deepcopy__(self, memo: Any) -> "Recorder":
        return Recorder()

    def __reduce__(self) -> Any:
        return Recorder, ()

    def __call__(self, network: nn.Module, *inputs: Any) -> Any:
        """The network's output for `inputs`, by a replay where there is one."""
        training = network.training and torch.is_grad_enabled()
        if not training or not all(isinstance(x, torch.Tensor) and x.is_cuda for x in inputs):
            return network(*inputs)
        half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = half, tuple((x.shape, x.dtype, x.requires_grad) for x in inputs)
        if key not in self.replays:
            self.met[key] += 1
            if self.met[key] < SECOND or len(self.replays) >= KEPT:
                return network(*inputs)
            try:
                self.replays[key] = record(network, inputs, half)
            except (RuntimeError, AssertionError) as error:
                raise UserError(
                    f"the CUDA graphs of {type(network).__name__} cannot be recorded: set"
                    f" lightning.callbacks.fast.params.cuda_graphs=false. PyTorch says: {error}"
                ) from error
        return self.replays[key](*inputs)


def record(network: nn.Module, inputs: tuple[torch.Tensor, ...], half: torch.dtype | None) -> Callable[..., Any]:
    """A function that replays the network for inputs like these; its weights, statistics and gradients stay.

    Args:
        network: in training mode, on a GPU.
        inputs: tensors like those to come.
        half: the type of autocast, None without it.
    """
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    random = torch.cuda.get_rng_state(inputs[0].device)
    samples = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
    names, weights = zip(*network.named_parameters(), strict=True)
    # Aliases in the same memory: the record keeps its autograd graph, and with it the node that accumulates a weight's
    # gradient, on the stream of the record. The weights' own nodes stay on the stream of training.
    aliases = tuple(weight.detach().requires_grad_(weight.requires_grad) for weight in weights)

    def compute(*given: torch.Tensor) -> Any:
        return functional_call(network, dict(zip(names, given[len(inputs) :], strict=True)), given[: len(inputs)])

    options: dict[str, Any] = {"allow_unused_input": True}
    if "capture_error_mode" in inspect.signature(torch.cuda.make_graphed_callables).parameters:
        options["capture_error_mode"] = "thread_local"  # a thread that pins memory does not disturb
    try:
        # The weights' casts must be in the graph, not in a cache beside it.
        with torch.autocast("cuda", half, enabled=half is not None, cache_enabled=False):
            replay: Any = torch.cuda.make_graphed_callables(compute, (*samples, *aliases), **options)
    finally:
        with torch.no_grad():
            for buffer, value in buffers:  # the passes before the record changed batch norm's statistics
                buffer.copy_(value)
        torch.cuda.set_rng_state(random, inputs[0].device)  # and drew dropout
    return lambda *given: replay(*given, *weights)


def call(network: nn.Module, *inputs: Any) -> Any:
    """`network(*inputs)`, through its recorder if it has one."""
    recorder = getattr(network, "recorder", None)
    return network(*inputs) if recorder is None else recorder(network, *inputs)


def can_replay(network: nn.Module) -> bool:
    """Whether a network is one of those that are recorded: `replays` says so, and no part is `capturable = False`."""
    return getattr(network, "replays", False) and all(getattr(m, "capturable", True) for m in network.modules())


def forget(model: nn.Module) -> None:
    """Drop the records of all its networks: at another time their weights and statistics may lie elsewhere."""
    module: Any
    for module in model.modules():
        if isinstance(getattr(module, "recorder", None), Recorder):
            module.recorder = Recorder()
