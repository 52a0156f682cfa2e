"""How well a trained model reconstructs images: MSE, SSIM and LPIPS (paper, Table 10)."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure

from ldm.data.images import evenly_spaced, to_unit_range
from ldm.evaluation.batches import image_batches
from ldm.models.diffusion.ddpm import SAMPLERS, LatentDiffusion
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.lpips import BACKBONES, LPIPS
from ldm.modules.mode import evaluating
from ldm.util import UserError

SMALLEST_FOR_SSIM = 6  # pixels: smaller images are narrower than the mirrored border


@torch.no_grad()
def reconstruct(
    model: Any,
    images: torch.Tensor,
    steps: int | None = None,
    eta: float = 1.0,
    generator: torch.Generator | None = None,
    sampler: str = "ddim",
) -> torch.Tensor:
    """A model's reconstructions of images.

    A first stage encodes and decodes them. EncDiff encodes each into its concept tokens, samples a latent from noise
    under these tokens, and decodes it: the tokens are all that comes from the image.

    Args:
        model: `VQModel`, `AutoencoderKL` or `LatentDiffusion`; in evaluation mode meanwhile.
        images: (b, c, h, w) in [-1, 1].
        steps, eta: of the sampler; without effect for a first stage. If left out, 200 steps of DDIM, as released, or 20
            of DPM-Solver++.
        generator: source of the random numbers, on the model's device; the global one if left out.
        sampler: `ddim`, or `dpm` for DPM-Solver++.

    Returns:
        (b, c, h, w), clamped to [-1, 1], on the model's device.

    Raises:
        UserError: see `check_sampling`; or images of another shape than the model's.
    """
    check_sampling(model, steps, eta, sampler)
    if images.ndim != 4 or not images.is_floating_point():
        raise UserError(f"expected floats of shape (b, c, h, w), got {images.dtype} {tuple(images.shape)}", "images")
    x = images.to(model.device)
    with evaluating(model):
        if isinstance(model, LatentDiffusion):
            made = _sample(model, x, steps, eta, generator, sampler)
        else:
            # Not by `model.reconstruct`, which marks the codes that training uses, and takes no generator.
            encoded = model.encode(x)
            if isinstance(encoded, DiagonalGaussianDistribution):
                encoded = encoded.sample(generator)
            made = model.decode(encoded[0] if isinstance(encoded, tuple) else encoded)
    if made.shape != x.shape:
        raise UserError(f"the model makes {tuple(made.shape[1:])} of images of {tuple(x.shape[1:])}", "images")
    return made.clamp(-1, 1)


def _sample(
    model: LatentDiffusion,
    x: torch.Tensor,
    steps: int | None,
    eta: float,
    generator: torch.Generator | None,
    sampler: str,
) -> torch.Tensor:
    """Samples (b, c, h, w) under the tokens of images (b, c, h, w)."""
    try:
        tokens = model.get_learned_conditioning(x)
    except ValueError as error:  # images of another size than the encoder's
        raise UserError(str(error), "images") from error
    shape = (model.channels, model.image_size, model.image_size)
    options: dict[str, Any] = {"log_every_t": model.num_timesteps, "verbose": False}
    count = _count(sampler, steps)
    latents, _ = model.sampler(sampler).sample(count, len(x), shape, tokens, eta, generator=generator, **options)
    return model.decode_first_stage(latents)


def _count(sampler: str, steps: int | None) -> int:
    """The number of steps, the sampler's usual one if it is left open."""
    return SAMPLERS[sampler].usual_steps if steps is None else steps


def check_sampling(model: Any, steps: int | None, eta: float, sampler: str = "ddim") -> None:
    """Refuse a model without reconstructions, and arguments of its sampler that are out of range.

    Raises:
        UserError: names the argument.
    """
    if not isinstance(model, LatentDiffusion):
        if not all(hasattr(model, name) for name in ("encode", "decode", "reconstruct")):
            raise UserError(f"expected a first stage or a LatentDiffusion, got {type(model).__name__}", "model")
        return
    if not model.conditioned:
        raise UserError("it has no concept encoder, so its samples know nothing of an image", "model")
    if sampler not in SAMPLERS:
        raise UserError(f"expected {' or '.join(SAMPLERS)}, got {sampler!r}", "sampler")
    count = _count(sampler, steps)
    if not 1 <= count <= model.num_timesteps:
        raise UserError(f"expected 1 to {model.num_timesteps}, the model's timesteps, got {count!r}", "steps")
    if not 0 <= eta <= 1:
        raise UserError(f"expected a number from 0 to 1, got {eta!r}", "eta")


def describe_sampling(
    model: Any, steps: int | None, eta: float, seed: int, batch_size: int, sampler: str = "ddim"
) -> str:
    """How `reconstruct` makes images, for the record."""
    if not isinstance(model, LatentDiffusion):
        return "images of the set encoded and decoded by the first stage"
    kind = SAMPLERS[sampler]
    count = len(kind(model).plan(_count(sampler, steps), eta).timesteps)
    noise = f"noise of seed {seed} in batches of {batch_size}"
    return f"{kind.title}, {count} steps, eta {eta:g}, {noise}, each under the tokens of an image of the set"


def check_reconstruction(
    model: Any,
    dataset: Any,
    images: int,
    steps: int | None = None,
    eta: float = 1.0,
    lpips: str | None = "alex",
    sampler: str = "ddim",
) -> None:
    """Refuse what `reconstruction_scores` cannot compute; its arguments.

    Raises:
        UserError: names the argument.
    """
    check_sampling(model, steps, eta, sampler)
    if min(images, len(dataset)) < 2:
        raise UserError(f"expected at least 2, got {min(images, len(dataset))}", "images")
    if lpips is not None and lpips not in BACKBONES:
        raise UserError(f"expected {', '.join(BACKBONES)} or None, got {lpips!r}", "lpips")
    smallest = BACKBONES[lpips].smallest if lpips else SMALLEST_FOR_SSIM
    if dataset.image_size < smallest:
        score = f"LPIPS on {lpips}" if lpips else "SSIM"
        raise UserError(f"{score} needs images of at least {smallest} pixels, not {dataset.image_size}")


@torch.no_grad()
def reconstruction_scores(
    model: Any,
    dataset: Any,
    images: int = 1000,
    batch_size: int = 100,
    steps: int | None = None,
    eta: float = 1.0,
    seed: int = 0,
    lpips: str | None = "alex",
    lpips_weights: str | Path | None = None,
    progress: bool = True,
    sampler: str = "ddim",
) -> dict[str, Any]:
    """Mean squared error, SSIM and LPIPS of reconstructions, as in the paper's Table 10.

    SSIM is that of Wang et al. (2004). The release's script hands images (b, h, w, c) to a function for (b, c, h, w):
    its window lies over width and colours, so its SSIM is another quantity. Its reconstructions are not clamped either.

    Args:
        model: see `reconstruct`.
        dataset: of `ldm.data`, with `fetch`.
        images: how many, at even distances over the set; at most all.
        batch_size: images at a time. Noise is drawn batch by batch: a seed means the same for the same size.
        steps, eta, sampler: see `reconstruct`. seed: of the sampler's noise.
        lpips: its backbone, `alex` as in the release's script, or `vgg`; None leaves LPIPS out.
        lpips_weights: file of the backbone's weights; fetched into torch hub's folder if left out.
        progress: show a bar.

    Returns:
        Means over images: `mse` and `ssim` of images in [0, 1], and `lpips` unless left out; the standard error of
        each, as `mse_standard_error`; the number of `images`; and what was done, as `protocol`.

    Raises:
        UserError: an argument out of range, too few or too small images, or no weights for LPIPS.
    """
    check_reconstruction(model, dataset, images, steps, eta, lpips, sampler)
    network = LPIPS(lpips_weights, backbone=lpips).to(model.device).eval() if lpips else None
    generator = torch.Generator(device=model.device).manual_seed(seed)
    rows = evenly_spaced(len(dataset), images)
    parts = []
    for batch in image_batches(dataset, rows, batch_size, progress, "reconstructing"):
        x = to_unit_range(batch.to(model.device))
        parts.append(_compare(x, reconstruct(model, x, steps, eta, generator, sampler), network))
    result: dict[str, Any] = {}
    for name in parts[0]:
        values = torch.cat([part[name] for part in parts]).double()
        result |= {name: float(values.mean()), f"{name}_standard_error": float(values.std() / len(rows) ** 0.5)}
    weights = BACKBONES[lpips].weights if lpips else None
    used = f"{weights.network}, {Path(lpips_weights or weights.file).name}" if weights else "none"
    way = describe_sampling(model, steps, eta, seed, batch_size, sampler)
    protocol = (
        f"{len(rows)} of {len(dataset)} images at even distances, {dataset.image_size}×{dataset.image_size} pixels;"
        f" {way}; clamped, not rounded; MSE and SSIM (Gaussian window 11, sigma 1.5, mirrored border) of images in"
        f" [0, 1]; LPIPS: {used}"
    )
    return {**result, "images": len(rows), "protocol": protocol}


def _compare(x: torch.Tensor, made: torch.Tensor, lpips: nn.Module | None) -> dict[str, torch.Tensor]:
    """Scores (b,) of reconstructions, on the CPU; both (b, c, h, w) in [-1, 1]."""
    a, b = (x + 1) / 2, (made + 1) / 2
    options: dict[str, Any] = {"sigma": 1.5, "kernel_size": 11, "data_range": 1.0, "reduction": "none"}
    scores: dict[str, Any] = {"mse": (a - b).square().mean(dim=(1, 2, 3))}
    scores["ssim"] = structural_similarity_index_measure(b, a, **options)
    if lpips is not None:
        scores["lpips"] = lpips(x, made).flatten()
    return {name: values.cpu() for name, values in scores.items()}
