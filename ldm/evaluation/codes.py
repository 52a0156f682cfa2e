"""A data set's scalars or tokens under a trained model."""

from typing import Any

import numpy as np
import torch

from ldm.data.images import to_unit_range
from ldm.evaluation.batches import image_batches
from ldm.factors import factors_of
from ldm.modules.mode import evaluating


@torch.no_grad()
def encode(model: Any, dataset: Any, batch_size: int = 256, progress: bool = True, tokens: bool = False) -> np.ndarray:
    """Scalars, or tokens, of every image of a data set, in its order.

    Args:
        model: a `LatentDiffusion` with a concept encoder; in evaluation mode meanwhile.
        dataset: of `ldm.data`, with `fetch`.
        batch_size: images at a time.
        progress: show a bar.
        tokens: give the concept tokens instead.

    Returns:
        scalars (m, n) or tokens (m, n, d), float32: what `ldm.evaluation.scores.score_codes` takes.
    """
    encoder, parts = model.cond_stage_model, []
    with evaluating(model):
        for images in image_batches(dataset, np.arange(len(dataset)), batch_size, progress, "encoding"):
            scalars = encoder.encoding(to_unit_range(images.to(model.device)))
            parts.append((encoder.warp(scalars) if tokens else scalars).float().cpu())
    return torch.cat(parts).numpy()


def why_not_scored(model: Any, dataset: Any, weights: str = "live") -> str:
    """Why a model cannot be scored for disentanglement on a data set; empty if it can.

    Args:
        model: any.
        dataset: of `ldm.data`.
        weights: `live` or `ema`: those that the model was loaded with.
    """
    if not hasattr(getattr(model, "cond_stage_model", None), "encoding"):
        return "it is a first stage, without scalars to score"
    if weights == "ema" and model.ema_parameters != "all":
        return f"its EMA weights are of the U-Net alone (ema_parameters: {model.ema_parameters}), not of the encoder"
    if factors_of(dataset) is None:
        return "its data have neither a factor grid nor attributes to score against"
    return ""
