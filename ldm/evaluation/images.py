"""Scores of a model's images: its reconstructions' and its samples', written down and shown."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.data.files import reading
from ldm.evaluation.fid import fid, require_torch_fidelity
from ldm.evaluation.files import write_json
from ldm.evaluation.reconstruction import check_reconstruction, check_sampling, reconstruction_scores


def check_images(
    model: Any,
    dataset: Any,
    reconstructions: int,
    samples: int,
    steps: int | None,
    eta: float,
    lpips: Any,
    sampler: str = "ddim",
) -> None:
    """Refuse what `score_images` cannot compute; its arguments.

    Raises:
        UserError: names the argument.
    """
    if reconstructions:
        check_reconstruction(model, dataset, reconstructions, steps, eta, lpips, sampler)
    if samples:
        check_sampling(model, steps, eta, sampler)
        require_torch_fidelity()


def score_images(
    model: Any,
    dataset: Any,
    folder: Path,
    reconstructions: int = 0,
    samples: int = 0,
    lpips: str | None = "alex",
    lpips_weights: Path | None = None,
    inception_weights: Path | None = None,
    about: Mapping[str, Any] | None = None,
    **sampling: Any,
) -> str:
    """Compare reconstructions with their images, and samples with the set by FID; into `images.json`.

    Args:
        model, dataset: see `reconstruction_scores`.
        folder: to write into; what `images.json` already holds there of the other kind of score is kept.
        reconstructions, samples: how many; 0 for none.
        lpips, lpips_weights: see `reconstruction_scores`. inception_weights: see `fid`.
        about: what the record begins with.
        sampling: batch_size, steps, eta, sampler and seed, see `fid`.

    Returns:
        the scores and what was done, to read.
    """
    path, lines = folder / "images.json", []
    with reading(path, "images.json"):  # before anything is computed
        earlier = json.loads(path.read_text()) if path.is_file() else {}
    results: dict[str, dict[str, Any]] = {}
    if reconstructions:
        options = {"lpips": lpips, "lpips_weights": lpips_weights, **sampling}
        results["reconstruction"] = reconstruction_scores(model, dataset, reconstructions, **options)
    if samples:
        results["fid"] = fid(model, dataset, samples, weights=inception_weights, **sampling)
    write_json(path, {**earlier, **(about or {}), **results})
    for kind, values in results.items():
        numbers = [f"{key} {value:.6g}" for key, value in values.items() if isinstance(value, float)]
        lines += [f"{kind}: {', '.join(numbers)}", f"  {values['protocol']}"]
    return "\n".join([*lines, str(path)])
