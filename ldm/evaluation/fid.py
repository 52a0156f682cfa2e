"""The Fréchet Inception distance of a model's samples (paper, Table 2), the standard one."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ldm.data.images import to_unit_range
from ldm.evaluation.batches import image_batches
from ldm.evaluation.reconstruction import check_sampling, describe_sampling, reconstruct
from ldm.modules.pretrained import Pretrained
from ldm.util import UserError

# Ported from TensorFlow's network of 2015, with which published figures are measured.
INCEPTION = Pretrained(
    "Inception",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "name your own copy (--inception-weights FILE)",
)
FEATURES = "2048"  # of Inception's last pooling


@torch.no_grad()
def fid(
    model_or_images: Any,
    dataset: Any,
    images: int = 10_000,
    steps: int | None = None,
    eta: float = 1.0,
    seed: int = 0,
    weights: str | Path | None = None,
    batch_size: int = 100,
    real_images: int | None = None,
    progress: bool = True,
    sampler: str = "ddim",
) -> dict[str, Any]:
    """Fréchet Inception distance (Heusel et al., 2017) by torch-fidelity, on images rounded to 0–255.

    The set is shuffled by the seed. The tokens of its first `images` steer the samples, which are compared with its
    last `real_images`: no image is in both, unless the set is too small. With fewer images than the 2,048 features,
    covariances are singular, and the figure says little.

    Args:
        model_or_images: a model, see `reconstruct` (of a first stage, its reconstructions are taken); or images
            (n, c, h, w) uint8, all of which are used.
        dataset: of `ldm.data`, with `fetch`.
        images: number of samples; tokens of a smaller set are used again.
        steps, eta, sampler: see `reconstruct`. seed: of the shuffling and of the noise.
        weights: file of Inception's weights; fetched into torch hub's folder if left out.
        batch_size: images at a time; none are kept.
        real_images: as many as samples if left out, as in the release's script; at most all.
        progress: show bars.

    Returns:
        `fid`; the numbers of `images` and `real_images`; and what was done, as `protocol`.

    Raises:
        UserError: an argument out of range, fewer than two images, no torch-fidelity, or no weights.
    """
    given = isinstance(model_or_images, torch.Tensor | np.ndarray)
    images = len(model_or_images) if given else images
    real = min(images if real_images is None else real_images, len(dataset))
    for name, count in (("images", images), ("real_images", real)):
        if count < 2:
            raise UserError(f"expected at least 2, got {count}", name)
    order = np.random.default_rng(seed).permutation(len(dataset))
    if given:
        batches, device, way = _given(model_or_images, batch_size)
    else:
        rows = np.sort(np.resize(order, images))
        batches, device, way = _sampled(model_or_images, dataset, rows, steps, eta, seed, batch_size, progress, sampler)
    reals = image_batches(dataset, np.sort(order[len(order) - real :]), batch_size, progress, "real images")
    distance, network = _inception(weights, device)
    protocol = (
        f"{images} images ({way}) against the last {real} of {len(dataset)} images shuffled by seed {seed},"
        f" {dataset.image_size}×{dataset.image_size} pixels; rounded to 0–255; {network}"
    )
    return {"fid": distance(batches, reals), "images": images, "real_images": real, "protocol": protocol}


def _given(images: Any, batch_size: int) -> tuple[Iterator[torch.Tensor], torch.device, str]:
    """Batches (b, c, h, w) of given images, their device, and a description."""
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(f"expected uint8 of shape (n, c, h, w), got {images.dtype} {tuple(images.shape)}", "images")
    return iter(images.split(batch_size)), images.device, f"given, {images.shape[3]}×{images.shape[2]} pixels"


def _sampled(
    model: Any,
    dataset: Any,
    rows: np.ndarray,
    steps: int | None,
    eta: float,
    seed: int,
    batch_size: int,
    progress: bool,
    sampler: str,
) -> tuple[Iterator[torch.Tensor], torch.device, str]:
    """Batches (b, c, h, w) uint8 of a model's reconstructions of rows, made one by one; its device; a description."""
    check_sampling(model, steps, eta, sampler)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    inputs = image_batches(dataset, rows, batch_size, progress, "sampling")
    made = (reconstruct(model, to_unit_range(x.to(model.device)), steps, eta, generator, sampler) for x in inputs)
    way = describe_sampling(model, steps, eta, seed, batch_size, sampler)
    pixels = (((x + 1) * 127.5).round().to(torch.uint8) for x in made)
    return pixels, model.device, f"{way}, the first of the set shuffled by seed {seed}"


def _statistics(batches: Iterable[torch.Tensor], inception: nn.Module, device: torch.device) -> dict[str, np.ndarray]:
    """Mean `mu` (d,) and covariance `sigma` (d, d) of the features of images (b, c, h, w) uint8, both float64."""
    count, total, products = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        features = inception(batch.to(device).expand(-1, 3, -1, -1))[0].cpu().double()
        count += len(features)
        total, products = total + features.sum(dim=0), products + features.T @ features
    mean = total / count
    return {"mu": mean.numpy(), "sigma": ((products - count * torch.outer(mean, mean)) / (count - 1)).numpy()}


def require_torch_fidelity() -> Any:
    """The package torch-fidelity.

    Raises:
        UserError: it is not installed.
    """
    try:
        import torch_fidelity
    except ImportError as error:
        raise UserError('FID needs the package torch-fidelity: pip install -e ".[fid]"') from error
    return torch_fidelity


def _inception(
    path: str | Path | None, device: torch.device
) -> tuple[Callable[[Iterable[torch.Tensor], Iterable[torch.Tensor]], float], str]:
    """The FID between two series of batches (b, c, h, w) uint8, and its description."""
    torch_fidelity = require_torch_fidelity()
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    def build(file: Path) -> nn.Module:
        torch.load(file, map_location="cpu", weights_only=True)  # torch-fidelity would run what else a file holds
        with torch.random.fork_rng(devices=[]):  # building draws weights, which the file's replace
            return torch_fidelity.FeatureExtractorInceptionV3(
                "inception-v3-compat", [FEATURES], feature_extractor_weights_path=str(file)
            )

    network = INCEPTION.load(path, build).to(device)

    def distance(a: Iterable[torch.Tensor], b: Iterable[torch.Tensor]) -> float:
        statistics = [_statistics(batches, network, device) for batches in (a, b)]
        return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])

    file = Path(path or INCEPTION.file).name
    return distance, f"{file}, layer {FEATURES}, torch-fidelity {torch_fidelity.__version__}"
