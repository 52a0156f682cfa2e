"""How well a trained model gives images back: MSE, SSIM and LPIPS (paper, Table 10)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm import tqdm

from ldm.data.images import to_unit_range
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.schedule import ddim_timesteps
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.lpips import LPIPS, VGG16_FILE, VGG16_URL
from ldm.util import UserError, require_at_least


class Weights(NamedTuple):
    """Pretrained weights that a score needs: whose, the file's name, where it is fetched, what else can be done."""

    network: str
    file: str
    url: str
    remedy: str


_LPIPS_REMEDY = "name its path by lpips_weights (--lpips-weights), or leave LPIPS out: lpips=None (--lpips none)"
_ALEX_FILE = "alexnet-owt-7be5be79.pth"
BACKBONES = {
    "alex": Weights("AlexNet", _ALEX_FILE, f"https://download.pytorch.org/models/{_ALEX_FILE}", _LPIPS_REMEDY),
    "vgg": Weights("VGG16", VGG16_FILE, VGG16_URL, _LPIPS_REMEDY),
}
# Smaller images vanish in the backbone's poolings, or are narrower than the mirrored border of SSIM.
SMALLEST = {"alex": 31, "vgg": 16, None: 6}


@torch.no_grad()
def reconstruct(
    model: Any, images: torch.Tensor, steps: int = 200, eta: float = 1.0, generator: torch.Generator | None = None
) -> torch.Tensor:
    """What a model makes of images.

    A first stage encodes and decodes them. EncDiff encodes each into its concept tokens, draws a latent from noise by
    DDIM under these tokens, and decodes it: the tokens are all that comes from the image.

    Args:
        model: `VQModel`, `AutoencoderKL` or `LatentDiffusion`; in evaluation mode meanwhile.
        images: (b, c, h, w) in [-1, 1].
        steps, eta: of DDIM; of no effect for a first stage.
        generator: source of the random numbers, on the model's device; the global one if not given.

    Returns:
        (b, c, h, w), clamped to [-1, 1], on the model's device.

    Raises:
        UserError: no such model, images of another shape than it makes, steps or eta out of range.
    """
    check_model(model, steps, eta)
    if images.ndim != 4 or not images.is_floating_point():
        raise UserError(f"images: expected floats of shape (b, c, h, w), got {images.dtype} {tuple(images.shape)}")
    x = images.to(model.device)
    with _evaluating(model):
        if isinstance(model, LatentDiffusion):
            made = _draw(model, x, steps, eta, generator)
        else:
            # Not by `model.reconstruct`, which marks the codes that training uses, and takes no generator.
            encoded = model.encode(x)
            if isinstance(encoded, DiagonalGaussianDistribution):
                encoded = encoded.sample(generator)
            made = model.decode(encoded[0] if isinstance(encoded, tuple) else encoded)
    if made.shape != x.shape:
        raise UserError(f"images: the model makes {tuple(made.shape[1:])} of images of {tuple(x.shape[1:])}")
    return made.clamp(-1, 1)


def _draw(
    model: LatentDiffusion, x: torch.Tensor, steps: int, eta: float, generator: torch.Generator | None
) -> torch.Tensor:
    """Samples (b, c, h, w) under the tokens of images (b, c, h, w)."""
    try:
        tokens = model.get_learned_conditioning(x)
    except ValueError as error:  # images of another size than the encoder's
        raise UserError(f"images: {error}") from error
    shape = (model.channels, model.image_size, model.image_size)
    options: dict[str, Any] = {"log_every_t": model.num_timesteps, "verbose": False}
    latents, _ = model.sampler().sample(steps, len(x), shape, tokens, eta, generator=generator, **options)
    return model.decode_first_stage(latents)


def check_model(model: Any, steps: int, eta: float) -> None:
    """Refuse what `reconstruct` cannot use."""
    if isinstance(model, LatentDiffusion):
        if not model.conditioned:
            raise UserError("model: it has no concept encoder, so that nothing of an image reaches its samples")
        if not 1 <= steps <= model.num_timesteps:
            raise UserError(f"steps: expected 1 to {model.num_timesteps}, the model's timesteps, got {steps!r}")
        if not 0 <= eta <= 1:
            raise UserError(f"eta: expected a number from 0 to 1, got {eta!r}")
    elif not all(hasattr(model, name) for name in ("encode", "decode", "reconstruct")):
        raise UserError(f"model: expected a first stage or a LatentDiffusion, got {type(model).__name__}")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; at its end every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def reconstruction_scores(
    model: Any,
    dataset: Any,
    images: int = 1000,
    batch_size: int = 100,
    steps: int = 200,
    eta: float = 1.0,
    seed: int = 0,
    lpips: str | None = "alex",
    lpips_weights: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Mean squared error, SSIM and LPIPS of reconstructions, as in the paper's Table 10.

    SSIM is Wang et al.'s (2004). The release's script hands images (b, h, w, c) to a function for (b, c, h, w): its
    window lies over width and colours, and its SSIM is another quantity. Nor are its reconstructions clamped.

    Args:
        model: see `reconstruct`.
        dataset: of `ldm.data`, with `fetch`.
        images: how many, at even distances over the set; at most all.
        batch_size: images at a time. Noise is drawn batch by batch: a seed means the same for the same size.
        steps, eta: of DDIM. seed: of its noise.
        lpips: its backbone, `alex` as in the release's script, or `vgg`; None leaves LPIPS out.
        lpips_weights: path of the backbone's weights; torch hub's folder, into which they are fetched, if left out.
        progress: show a bar.

    Returns:
        Means over images: `mse` and `ssim` of images in [0, 1], and `lpips` unless left out; the standard error of
        each, as `mse_standard_error`; the number of `images`; and what was done, as `protocol`.

    Raises:
        UserError: see `reconstruct`; fewer than two images, too small ones, or weights that cannot be had.
    """
    check_model(model, steps, eta)
    images = min(images, len(dataset))
    require_at_least(2, "reconstruction_scores", images=images)
    require_at_least(1, "reconstruction_scores", batch_size=batch_size)
    if lpips not in SMALLEST:
        raise UserError(f"lpips: expected alex, vgg or None, got {lpips!r}")
    if dataset.image_size < SMALLEST[lpips]:
        raise UserError(f"lpips={lpips!r} needs images of at least {SMALLEST[lpips]} pixels, not {dataset.image_size}")
    distance, network = _lpips(lpips, lpips_weights, model.device, progress) if lpips else (None, "none")
    generator = torch.Generator(device=model.device).manual_seed(seed)
    rows = np.linspace(0, len(dataset) - 1, images).round().astype(np.int64)
    parts = []
    for batch in image_batches(dataset, rows, batch_size, progress, "reconstructing"):
        x = to_unit_range(batch.to(model.device))
        parts.append(_compare(x, reconstruct(model, x, steps, eta, generator), distance))
    result: dict[str, Any] = {}
    for name in parts[0]:
        values = torch.cat([part[name] for part in parts]).double()
        result |= {name: float(values.mean()), f"{name}_standard_error": float(values.std() / images**0.5)}
    protocol = (
        f"{images} of {len(dataset)} images at even distances, {dataset.image_size}×{dataset.image_size} pixels;"
        f" {way_of_drawing(model, steps, eta, seed, batch_size)}; clamped, not rounded; MSE and SSIM (Gaussian window"
        f" 11, sigma 1.5, mirrored border) of images in [0, 1]; LPIPS: {network}"
    )
    return {**result, "images": images, "protocol": protocol}


def _compare(x: torch.Tensor, made: torch.Tensor, distance: nn.Module | None) -> dict[str, torch.Tensor]:
    """Scores (b,) of reconstructions, on the CPU; both (b, c, h, w) in [-1, 1]."""
    a, b = (x + 1) / 2, (made + 1) / 2
    options: dict[str, Any] = {"sigma": 1.5, "kernel_size": 11, "data_range": 1.0, "reduction": "none"}
    scores: dict[str, Any] = {"mse": (a - b).square().mean(dim=(1, 2, 3))}
    scores["ssim"] = structural_similarity_index_measure(b, a, **options)
    if distance is not None:
        scores["lpips"] = distance(x, made).flatten()
    return {name: values.cpu() for name, values in scores.items()}


def image_batches(dataset: Any, rows: np.ndarray, size: int, progress: bool, title: str) -> Iterator[torch.Tensor]:
    """Images (b, c, h, w) uint8 of rows, with a bar."""
    for start in tqdm(range(0, len(rows), size), desc=title, disable=not progress, leave=False):
        yield rearrange(dataset.fetch(rows[start : start + size])["image"], "b h w c -> b c h w")


def way_of_drawing(model: Any, steps: int, eta: float, seed: int, batch_size: int) -> str:
    """How reconstructions are made, in words."""
    if not isinstance(model, LatentDiffusion):
        return "images of the set encoded and decoded by the first stage"
    count = len(ddim_timesteps(steps, model.num_timesteps))
    noise = f"noise of seed {seed} in batches of {batch_size}"
    return f"DDIM, {count} steps, eta {eta:g}, {noise}, each under the tokens of an image of the set"


def pretrained(weights: Weights, path: str | Path | None, progress: bool, build: Callable[[Path], Any]) -> Any:
    """A network built from the file of its weights: the one named, else torch hub's, fetched if it is not there.

    Raises:
        UserError: it cannot be fetched or read; the message says what to do.
    """
    file = Path(path) if path is not None else Path(torch.hub.get_dir()) / "checkpoints" / weights.file
    try:
        if path is None and not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(weights.url, str(file), progress=progress)
        with torch.random.fork_rng(devices=[]):  # building draws weights, which the file's replace
            return build(file)
    except Exception as error:  # urllib, ssl, pickle, a missing name: whatever went wrong, the remedy is the same
        cause = error.__cause__ or error
        said = " ".join(str(cause).split())[:200]
        raise UserError(
            f"{weights.network}'s weights could not be had from '{file}' ({type(cause).__name__}: {said}):"
            f" save {weights.url} there, or {weights.remedy}"
        ) from error


def _alex(file: Path) -> nn.Module:
    """LPIPS on AlexNet with torchmetrics' heads; `net` holds AlexNet's layers under their numbers."""
    from torchmetrics.functional.image.lpips import _LPIPS

    backbone = torch.load(file, map_location="cpu", weights_only=True)
    network = _LPIPS(net="alex", pnet_rand=True)
    names = network.net.state_dict()
    network.net.load_state_dict({name: backbone[f"features.{name.split('.', 1)[1]}"] for name in names})
    return network


def _lpips(backbone: str, path: str | Path | None, device: torch.device, progress: bool) -> tuple[nn.Module, str]:
    """LPIPS between images in [-1, 1], and its description."""
    weights = BACKBONES[backbone]
    network = pretrained(weights, path, progress, LPIPS if backbone == "vgg" else _alex)
    return network.to(device).eval(), f"{weights.network}, {Path(path or weights.file).name}"
