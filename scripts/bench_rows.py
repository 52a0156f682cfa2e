"""Rows of `bench.py` that do not train: samples, codes, loading, and operations per second."""

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_release import WAYS, as_released
from bench_training import ENCDIFF, SyntheticImages, overrides
from bench_turns import Timing, in_turns, stopwatch, synchronize
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from ldm.cli.configure import compose
from ldm.data.module import DataModuleFromConfig
from ldm.evaluation.codes import encode
from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.speed import apply, choose
from ldm.targets import allowing
from ldm.util import instantiate_from_config

# Of DDIM; of DPM-Solver++, with which 8 steps reach the same reconstruction error (docs/metrics.md, "Samplers").
RELEASED_STEPS, FAST_STEPS = 200, 8


def encdiff(folder: Path, device: str, changes: Sequence[str] = ()) -> Any:
    """The shipped EncDiff for Shapes3D with random weights, on the device."""
    config = compose([ENCDIFF], [*overrides("train", folder, device, 8, 64, 512), *changes])
    torch.manual_seed(0)
    return instantiate_from_config(config.model, "model", "Lightning module").to(device).eval()


@torch.no_grad()
def sample(
    device: str, folder: Path, pairs: int, budget: float, batch_size: int, steps: int = RELEASED_STEPS
) -> Timing:
    """Seconds per sample, from the tokens to the image: the release's DDIM against the fast sampler.

    Args:
        device, folder, pairs, budget: see `in_turns` and `encdiff`.
        batch_size: samples at a time.
        steps: how many of DDIM's 200 steps are timed; the time of the others is that of these.
    """
    fast = encdiff(folder, device)
    plain: Any = as_released(copy.deepcopy(fast))
    images = torch.rand(batch_size, 3, 64, 64, device=device) * 2 - 1
    where, shape = torch.device(device), (fast.channels, fast.image_size, fast.image_size)
    settings: dict[str, Any] = {"batch_size": batch_size, "shape": shape, "verbose": False}
    tokens = plain.get_learned_conditioning(images)
    noise, t = torch.randn(batch_size, *shape, device=device), torch.zeros(batch_size, device=device)
    choices = choose(fast, lambda: fast.apply_model(noise, t, tokens), where)
    apply(fast, choices)
    last: list[torch.Tensor] = []

    def released_steps() -> None:
        last[:] = [plain.sampler().sample(steps, conditioning=tokens, eta=1.0, **settings)[0]]

    def fast_samples() -> None:
        with choices.autocast(where):
            found, _ = fast.sampler("dpm").sample(FAST_STEPS, conditioning=tokens, eta=1.0, **settings)
            fast.decode_first_stage(found)

    denoise = stopwatch(released_steps, where, batch_size * steps / RELEASED_STEPS)
    decode = stopwatch(lambda: plain.decode_first_stage(last[0]), where, batch_size)
    found = in_turns(lambda: denoise() + decode(), stopwatch(fast_samples, where, batch_size), pairs, budget)
    timed = "" if steps == RELEASED_STEPS else f" ({steps} timed)"
    ways = f"DDIM {RELEASED_STEPS}{timed} against DPM-Solver++ {FAST_STEPS}"
    return Timing(*found, "sample", f"batch {batch_size}; {ways}; {choices.reasons}")


@torch.no_grad()
def codes(device: str, folder: Path, pairs: int, budget: float, images: int, half: bool = False) -> Timing:
    """Images encoded to scalars per second: contiguous float32 batches of 128, against `encode` of `ldm.evaluation`."""
    model = encdiff(folder, device)
    plain: Any = as_released(copy.deepcopy(model))
    dataset = SyntheticImages(str(folder / f"codes-{images}.bin"), images)
    batches = [
        torch.stack([dataset[row]["image"] for row in range(start, min(start + 128, images))]).permute(0, 3, 1, 2)
        for start in range(0, images, 128)
    ]

    def released() -> None:
        for batch in batches:
            plain.cond_stage_model.encoding(batch.contiguous().to(device)).cpu()

    def ours() -> None:
        encode(model, dataset, progress=False, dtype="bf16" if half else "float32")

    where = torch.device(device)
    found = in_turns(stopwatch(released, where, images), stopwatch(ours, where, images), pairs, budget)
    return Timing(*found)


def loader(folder: Path, pairs: int, budget: float, batch_size: int, images: int) -> Timing:
    """Images loaded per second by the training process: item by item as float32, against the data module's loader."""
    params = {"path": str(folder / f"loader-{images}.bin"), "count": images}
    dataset = SyntheticImages(**params)  # type: ignore[arg-type]
    node = {"target": f"{SyntheticImages.__module__}.SyntheticImages", "params": params}
    ours = DataModuleFromConfig(batch_size, train=node)
    with allowing(SyntheticImages.__module__):
        ours.setup("fit")
    items = _Items(dataset)
    plain = DataLoader(items, batch_size, shuffle=True)

    def exhaust(loader: Any) -> Callable[[], None]:
        def run() -> None:
            for _ in loader:
                pass

        return run

    cpu = torch.device("cpu")
    first, second = (stopwatch(exhaust(which), cpu, images) for which in (plain, ours.train_dataloader()))
    return Timing(
        *in_turns(first, second, pairs, budget), note=f"batch {batch_size}, {images} images in the file cache"
    )


class _Items(torch.utils.data.Dataset):
    """A data set that gives single items only."""

    def __init__(self, dataset: SyntheticImages) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


def step_flops(device: str, folder: Path) -> float:
    """Floating-point operations of training EncDiff on one image: concept encoder and U-Net, forward and backward."""
    model = encdiff(folder, device).train()
    for module in model.modules():
        if type(module) in (CrossAttention, UNetModel):
            module.__class__ = WAYS[type(module)]  # products that the counter sees on every device
    latent = torch.randn(2, model.channels, model.image_size, model.image_size, device=device)
    images, t = torch.rand(2, 3, 64, 64, device=device), torch.zeros(2, dtype=torch.long, device=device)
    with FlopCounterMode(display=False) as counter:
        loss, _ = model.p_losses(latent, model.get_learned_conditioning(images), t)
        loss.backward()
    return counter.get_total_flops() / 2


def product_flops(device: str, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Floating-point operations per second of a product of two square matrices, the fastest seen."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    where, best, start = torch.device(device), float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - start < seconds:
        synchronize(where)
        begin = time.perf_counter()
        torch.mm(a, b)
        synchronize(where)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def operations(device: str, folder: Path, train: dict[str, Any] | None) -> dict[str, Any]:
    """GFLOP of a training step on one image, GFLOP/s of matrix products, and of training where its speed is known."""
    found: dict[str, Any] = {"step_gflop": step_flops(device, folder) / 1e9}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        found[f"product_{name}_gflops"] = product_flops(device, dtype) / 1e9
    for way in ("plain", "fast") if train and "ratio" in train else ():
        found[f"train_{way}_gflops"] = found["step_gflop"] * train[way]  # type: ignore[index]
    return found
