"""Ways of computing the same thing faster: chosen by timing them on the machine at hand, and switched on in place."""

import ctypes
import gc
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ldm.modules import fused
from ldm.modules.ema import LitEma
from ldm.modules.graphs import Recorder, can_replay, forget

log = logging.getLogger(__name__)

# Options of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

# Autocast has costs that a short trial does not show, such as casting the weights of a large network at every step.
WORTH = 1.15


@dataclass(frozen=True)
class Choices:
    """How to compute.

    Attributes:
        precision: of Lightning's Trainer: 32-true or bf16-mixed.
        channels_last: memory layout of convolutions' weights and of feature maps.
        kernels: the fused CPU kernels of `ldm.modules.fused` and `ldm.modules.kernels`.
        cuda_graphs: record the launches of the networks that train, and replay them (`ldm.modules.graphs`).
        compile: `torch.compile` of the networks, in place of graphs.
        reasons: why, in one line.
    """

    precision: str = "32-true"
    channels_last: bool = False
    kernels: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    reasons: str = "the plain path"

    def autocast(self, device: torch.device) -> Any:
        """The context in which forward passes run, for loops without Lightning."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision.startswith("bf16"))


def keep_memory() -> bool:
    """Let this process keep memory that it frees, for what it needs next; returns whether the C library can.

    glibc's allocator (another one, preloaded, goes its own ways) takes large blocks from the system and gives them back
    when they are freed. A training step then gets most of its feature maps as pages that the kernel has to clear first:
    up to a sixth of a first stage's step, a quarter of encoding. Holds for the rest of the process, which stays as
    large as at its peak.
    """
    setting = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # not in musl
    return setting is not None and bool(setting(M_TRIM_THRESHOLD, -1)) and bool(setting(M_MMAP_MAX, 0))


def any_batch_size(*tensors: torch.Tensor | None) -> None:
    """Tell `torch.compile`, where it is in use, that other batch sizes will come: a ragged last batch then compiles
    nothing anew."""
    dynamo: Any = sys.modules.get("torch._dynamo")  # importing it takes seconds
    for tensor in tensors if dynamo is not None and not torch.compiler.is_compiling() else ():
        if tensor is not None:
            dynamo.maybe_mark_dynamic(tensor, 0)


def apply(model: nn.Module, choices: Choices) -> None:
    """Switch a model to the chosen way, in place; names, shapes and values of its weights stay.

    Args:
        model: networks of this project. `precision` is the caller's, by autocast.
        choices: from `choose`.
    """
    layout = torch.channels_last if choices.channels_last else torch.contiguous_format
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Conv2d | LitEma):  # averages too: multi-tensor operations want equal strides
            module.to(memory_format=layout)
        if hasattr(module, "kernels"):
            module.kernels = choices.kernels
        if choices.compile and getattr(module, "compiles", False):
            module.compile()
        if getattr(module, "replays", False):
            module.recorder = Recorder() if choices.cuda_graphs and can_replay(module) else None


def match_layouts(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Give optimisers' moments the memory layout of their parameters, in place.

    A checkpoint keeps the layout that it was saved in, and loading keeps the checkpoint's. PyTorch's fused AdamW walks
    through raw memory on a CPU: it would combine each weight with the moments of another one.
    """
    for parameter, state in (pair for optimizer in optimizers for pair in optimizer.state.items()):
        for name, value in state.items():
            same = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if same and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter.detach(), dtype=value.dtype).copy_(value)


def choose(
    model: nn.Module,
    step: Callable[[], Any] | None,
    device: torch.device,
    precision: str | None = None,
    allowed: Mapping[str, bool] | None = None,
    repeats: int = 2,
) -> Choices:
    """Time a step of training each way, and choose the fastest.

    Args:
        model: on the device; its weights, statistics and gradients are as before afterwards, its layout is not.
        step: runs the model forwards and backwards. Without it nothing is timed, as in several processes, which must
            all choose the same.
        device: of the model.
        precision: if given, it is not chosen.
        allowed: `bf16`, `channels_last`, `compile`, `cuda_graphs`: those that are False are left out.
        repeats: timed steps per way; the shortest counts. A way that takes twice as long as another gets one.

    Returns:
        What to give to `apply`. bf16 is not tried where the device has none. On a GPU, steps are timed as they will
        run, with their launches recorded. Compiling takes minutes, and is not timed: where it is allowed, a GPU takes
        it with bf16, if it computes in it, and channels-last. On other devices than these two, the plain path.
    """
    allowed = {"bf16": True, "channels_last": True, "compile": False, "cuda_graphs": True, **(allowed or {})}
    if device.type not in ("cpu", "cuda"):
        return Choices(precision or "32-true", reasons=f"the plain path: not tried on {device.type}")
    kernels = device.type == "cpu" and fused.available()
    precisions = ["32-true" if precision is None else precision]
    if precision is None and allowed["bf16"] and has_bf16(device):
        precisions.append("bf16-mixed")
    layouts = [False, True] if allowed["channels_last"] else [False]
    graphs = device.type == "cuda" and allowed["cuda_graphs"] and any(can_replay(m) for m in model.modules())
    # On a CPU, half precision in the contiguous layout is never the fastest.
    ways = [
        Choices(p, last, kernels and last, cuda_graphs=graphs and step is not None)
        for p in precisions
        for last in layouts
        if last or p == precisions[0] or len(layouts) == 1 or device.type == "cuda"
    ]
    compiled = allowed["compile"] and device.type == "cuda" and find_spec("triton") is not None
    if compiled or step is None:
        way = ways[-1] if device.type == "cuda" else [way for way in ways if way.precision == precisions[0]][-1]
        why = "several processes must agree" if step is None else "a step that is not compiled yet would mislead"
        way = replace(way, compile=compiled, cuda_graphs=False)
        return replace(way, reasons=f"{_name(way)}{', compiled' if compiled else ''} (not timed: {why})")
    times: list[float] = [0.0] * len(ways)
    for index in reversed(range(len(ways))):  # the fastest is likely to be the last: the others need fewer steps
        fastest = min(times[index + 1 :], default=float("inf"))
        times[index] = _time(model, ways[index], step, device, repeats, enough=2 * fastest)
    best = min(range(len(ways)), key=lambda i: times[i] * (WORTH if ways[i].precision != precisions[0] else 1.0))
    told = ", ".join(f"{_name(way)} {1000 * t:.0f} ms" for way, t in zip(ways, times, strict=True))
    return replace(ways[best], reasons=f"{_name(ways[best])} (a trial step: {told})")


def has_bf16(device: torch.device) -> bool:
    """Whether a GPU computes in bf16 itself; False of a CPU that would emulate it slowly, as without AVX-512."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    onednn = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None
    return getattr(onednn, "_is_mkldnn_bf16_supported", lambda: True)()


def _name(way: Choices) -> str:
    precision = {"32-true": "float32", "bf16-mixed": "bf16"}.get(way.precision, way.precision)
    beside = " with fused kernels" if way.kernels else " with CUDA graphs" if way.cuda_graphs else ""
    return precision + (" channels-last" if way.channels_last else "") + beside


def _time(
    model: nn.Module, way: Choices, step: Callable[[], Any], device: torch.device, repeats: int, enough: float
) -> float:
    """The shortest of several steps, in seconds, after those that set things up; a step above `enough` is the last."""
    apply(model, way)
    # Steps change batch norm's running statistics, among others.
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    cuda = device.type == "cuda"
    # The first step chooses PyTorch's kernels, the second records graphs.
    found, warm_up = [], 3 if way.cuda_graphs else 1
    with torch.random.fork_rng(devices=[device] if cuda else []):
        for _ in range(warm_up + repeats):
            start = time.perf_counter()
            with way.autocast(device):
                step()
            if cuda:
                torch.cuda.synchronize(device)
            found.append(time.perf_counter() - start)
            model.zero_grad(set_to_none=True)
            if len(found) > warm_up and found[-1] > enough:
                break
    with torch.no_grad():
        for buffer, value in kept:
            buffer.copy_(value)
    if cuda:  # records hold memory, and references in a circle
        forget(model)
        gc.collect()
        torch.cuda.empty_cache()
    return min(found[warm_up:])
