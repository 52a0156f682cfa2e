"""How well a trained model gives images back: SSIM, LPIPS and MSE (paper, Table 10), and FID (Table 2)."""

from collections.abc import Callable, Iterable, Iterator
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
from ldm.models.diffusion.ddim import DDIMSampler
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


_LPIPS_REMEDY = "name its path by lpips_weights=PATH, or leave LPIPS out by lpips=None"
_ALEX_FILE = "alexnet-owt-7be5be79.pth"
BACKBONES = {
    "alex": Weights("AlexNet", _ALEX_FILE, f"https://download.pytorch.org/models/{_ALEX_FILE}", _LPIPS_REMEDY),
    "vgg": Weights("VGG16", VGG16_FILE, VGG16_URL, _LPIPS_REMEDY),
}
# Smaller images vanish in the backbone's poolings, or are narrower than the mirrored border of SSIM.
SMALLEST = {"alex": 31, "vgg": 16, None: 6}
# Ported from TensorFlow's network of 2015, with which published figures are measured.
_INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
_INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{_INCEPTION_FILE}"
INCEPTION = Weights("Inception", _INCEPTION_FILE, _INCEPTION_URL, "name its path by weights=PATH")
FEATURES = "2048"  # of Inception's last pooling


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
    _check_model(model, steps, eta)
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
    latents, _ = DDIMSampler(model).sample(steps, len(x), shape, tokens, eta, generator=generator, **options)
    return model.decode_first_stage(latents)


def _check_model(model: Any, steps: int, eta: float) -> None:
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
    _check_model(model, steps, eta)
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
    for batch in _batches(dataset, rows, batch_size, progress, "reconstructing"):
        x = to_unit_range(batch.to(model.device))
        parts.append(_compare(x, reconstruct(model, x, steps, eta, generator), distance))
    result: dict[str, Any] = {}
    for name in parts[0]:
        values = torch.cat([part[name] for part in parts]).double()
        result |= {name: float(values.mean()), f"{name}_standard_error": float(values.std() / images**0.5)}
    protocol = (
        f"{images} of {len(dataset)} images at even distances, {dataset.image_size}×{dataset.image_size} pixels;"
        f" {_way(model, steps, eta, seed, batch_size)}; clamped, not rounded; MSE and SSIM (Gaussian window 11, sigma"
        f" 1.5, mirrored border) of images in [0, 1]; LPIPS: {network}"
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


@torch.no_grad()
def fid(
    model_or_images: Any,
    dataset: Any,
    images: int = 10_000,
    steps: int = 200,
    eta: float = 1.0,
    seed: int = 0,
    weights: str | Path | None = None,
    batch_size: int = 100,
    real_images: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Fréchet Inception distance (Heusel et al., 2017) by torch-fidelity, on images of whole numbers 0–255.

    The set is shuffled by the seed. The tokens of its first `images` steer the samples, its last `real_images` are
    what they are compared with: no image is in both, unless the set is too small. With fewer images than the 2,048
    features, covariances are singular, and the figure says little.

    Args:
        model_or_images: see `reconstruct` (of a first stage, its reconstructions are taken); or images (n, c, h, w)
            uint8, which are all used.
        dataset: of `ldm.data`, with `fetch`.
        images: number of samples; tokens of a smaller set are used again.
        steps, eta: of DDIM. seed: of the shuffling and of the noise.
        weights: path of Inception's weights; torch hub's folder, into which they are fetched, if left out.
        batch_size: images at a time; none are kept.
        real_images: as many as samples if left out, as in the release's script; at most all.
        progress: show bars.

    Returns:
        `fid`; the numbers of `images` and `real_images`; and what was done, as `protocol`.

    Raises:
        UserError: see `reconstruct`; fewer than two images, torch-fidelity is not installed, or no weights.
    """
    given = isinstance(model_or_images, torch.Tensor | np.ndarray)
    images = len(model_or_images) if given else images
    real = min(images if real_images is None else real_images, len(dataset))
    require_at_least(2, "fid", images=images, real_images=real)
    require_at_least(1, "fid", batch_size=batch_size)
    order = np.random.default_rng(seed).permutation(len(dataset))
    if given:
        batches, device, way = _given(model_or_images, batch_size)
    else:
        rows = np.sort(np.resize(order, images))
        batches, device, way = _sampled(model_or_images, dataset, rows, steps, eta, seed, batch_size, progress)
    reals = _batches(dataset, np.sort(order[len(order) - real :]), batch_size, progress, "real images")
    distance, network = _inception(weights, device, progress)
    protocol = (
        f"{images} images ({way}) against the last {real} of {len(dataset)} images shuffled by seed {seed},"
        f" {dataset.image_size}×{dataset.image_size} pixels; rounded to 0–255; {network}"
    )
    return {"fid": distance(batches, reals), "images": images, "real_images": real, "protocol": protocol}


def _given(images: Any, batch_size: int) -> tuple[Iterator[torch.Tensor], torch.device, str]:
    """Batches (b, c, h, w) of images that a user gave, their device, and a description."""
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(f"images: expected uint8 of shape (n, c, h, w), got {images.dtype} {tuple(images.shape)}")
    return iter(images.split(batch_size)), images.device, f"given, {images.shape[3]}×{images.shape[2]} pixels"


def _sampled(
    model: Any, dataset: Any, rows: np.ndarray, steps: int, eta: float, seed: int, batch_size: int, progress: bool
) -> tuple[Iterator[torch.Tensor], torch.device, str]:
    """Batches (b, c, h, w) uint8 of what a model makes of rows, each made when asked for; its device; a description."""
    _check_model(model, steps, eta)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    inputs = _batches(dataset, rows, batch_size, progress, "sampling")
    made = (reconstruct(model, to_unit_range(x.to(model.device)), steps, eta, generator) for x in inputs)
    way = f"{_way(model, steps, eta, seed, batch_size)}, the first of the set shuffled by seed {seed}"
    return (((x + 1) * 127.5).round().to(torch.uint8) for x in made), model.device, way


def _statistics(batches: Iterable[torch.Tensor], inception: nn.Module, device: torch.device) -> dict[str, np.ndarray]:
    """Mean `mu` (d,) and covariance `sigma` (d, d) of the features of images (b, c, h, w) uint8, both float64."""
    count, total, products = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        features = inception(batch.to(device).expand(-1, 3, -1, -1))[0].cpu().double()
        count += len(features)
        total, products = total + features.sum(dim=0), products + features.T @ features
    mean = total / count
    return {"mu": mean.numpy(), "sigma": ((products - count * torch.outer(mean, mean)) / (count - 1)).numpy()}


def _batches(dataset: Any, rows: np.ndarray, size: int, progress: bool, title: str) -> Iterator[torch.Tensor]:
    """Images (b, c, h, w) uint8 of rows, with a bar."""
    for start in tqdm(range(0, len(rows), size), desc=title, disable=not progress, leave=False):
        yield rearrange(dataset.fetch(rows[start : start + size])["image"], "b h w c -> b c h w")


def _way(model: Any, steps: int, eta: float, seed: int, batch_size: int) -> str:
    """How reconstructions are made, in words."""
    if not isinstance(model, LatentDiffusion):
        return "images of the set encoded and decoded by the first stage"
    count = len(ddim_timesteps(steps, model.num_timesteps))
    noise = f"noise of seed {seed} in batches of {batch_size}"
    return f"DDIM, {count} steps, eta {eta:g}, {noise}, each under the tokens of an image of the set"


def _network(weights: Weights, path: str | Path | None, progress: bool, build: Callable[[Path], Any]) -> Any:
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
    network = _network(weights, path, progress, LPIPS if backbone == "vgg" else _alex)
    return network.to(device).eval(), f"{weights.network}, {Path(path or weights.file).name}"


def _inception(
    path: str | Path | None, device: torch.device, progress: bool
) -> tuple[Callable[[Iterable[torch.Tensor], Iterable[torch.Tensor]], float], str]:
    """The FID between two series of batches (b, c, h, w) uint8, and its description."""
    try:
        import torch_fidelity
        from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
    except ImportError as error:
        raise UserError('FID needs the package torch-fidelity: pip install -e ".[fid]"') from error

    def build(file: Path) -> nn.Module:
        torch.load(file, map_location="cpu", weights_only=True)  # torch-fidelity would run what else a file holds
        return torch_fidelity.FeatureExtractorInceptionV3(
            "inception-v3-compat", [FEATURES], feature_extractor_weights_path=str(file)
        )

    network = _network(INCEPTION, path, progress, build).to(device)

    def distance(a: Iterable[torch.Tensor], b: Iterable[torch.Tensor]) -> float:
        statistics = [_statistics(batches, network, device) for batches in (a, b)]
        return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])

    file = Path(path or INCEPTION.file).name
    return distance, f"{file}, layer {FEATURES}, torch-fidelity {torch_fidelity.__version__}"
