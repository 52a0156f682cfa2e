"""From images to scalars or tokens under a trained model, as fast as its encoder allows."""

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ldm.data.images import to_unit_range
from ldm.evaluation.batches import RowBuffer, image_batches
from ldm.factors import factors_of
from ldm.util import UserError

DTYPES = ("float32", "bf16")
# Images at a time on a CPU, where 64 is the fastest of 8, 16, 64 and 256 (AVX2, images of 64x64), and elsewhere.
CPU_BATCH, BATCH = 64, 256


def check_dtype(dtype: str, *more: str) -> None:
    """Refuse what is neither in `DTYPES` nor one `more`, by a UserError."""
    known = (*DTYPES, *more)
    if dtype not in known:
        raise UserError(f"expected {', '.join(known[:-1])} or {known[-1]}, got {dtype!r}", "dtype")


class CodeEncoder:
    """A model's concept encoder, copied as it is now and prepared for encoding many images.

    Evaluation mode; batch norms are folded into the convolutions before them, and weights lie channels-last, as the
    images do. In float32, scalars equal those of `cond_stage_model.encoding` up to rounding. The model is not changed.

    Args:
        encoder: the `cond_stage_model` of a `LatentDiffusion`, on its device.
        dtype: `float32`, or `bf16` for everything but linear layers, from which the scalars come: rounding them to
            three digits would make many of them equal.

    Raises:
        UserError: another dtype.
    """

    def __init__(self, encoder: nn.Module, dtype: str = "float32") -> None:
        check_dtype(dtype)
        self.half = dtype == "bf16"
        self.encoder: Any = copy.deepcopy(encoder).eval().requires_grad_(False)
        fold_batch_norms(self.encoder)
        self.encoder.to(memory_format=torch.channels_last)
        # Its image network; the network that makes tokens of scalars is computed in float32 anyway.
        for module in getattr(self.encoder, "encoder", self.encoder).modules():
            if self.half and type(module) is nn.Linear:
                module.__class__ = FloatLinear

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, tokens: bool = False) -> list[torch.Tensor]:
        """Images (b, c, h, w) in [-1, 1] -> scalars (b, n) float32 and, if asked for, tokens (b, n, d) float32."""
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.half):
            scalars = self.encoder.encoding(images)
        with torch.autocast(images.device.type, enabled=False):
            scalars = scalars.float()
            return [scalars, self.encoder.warp(scalars).float()] if tokens else [scalars]


class FloatLinear(nn.Linear):
    """A linear layer that computes in float32 even under autocast."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, i) -> (…, o) float32."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def fold_batch_norms(module: nn.Module) -> None:
    """Fold each batch norm that follows a convolution in a `Sequential` into it, in place; in evaluation mode only."""
    for child in module.children():
        fold_batch_norms(child)
    if type(module) is not nn.Sequential:
        return
    for before, name in pairwise(list(module._modules)):
        convolution, norm = module._modules[before], module._modules[name]
        if type(convolution) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.track_running_stats:
            module._modules[before] = fuse_conv_bn_eval(convolution, norm)
            module._modules[name] = nn.Identity()


def encode(
    model: Any,
    dataset: Any,
    batch_size: int | None = None,
    progress: bool = True,
    tokens: bool = False,
    dtype: str = "float32",
) -> np.ndarray:
    """Scalars, or tokens, of every image of a data set, in its order.

    Args:
        model: a `LatentDiffusion` with a concept encoder; it is not changed.
        dataset: of `ldm.data`, with `fetch`.
        batch_size: images at a time; by default what suits the model's device.
        progress: show a bar.
        tokens: give the concept tokens instead.
        dtype: of the computation, see `CodeEncoder`.

    Returns:
        scalars (m, n) or tokens (m, n, d), float32: what `ldm.evaluation.scores.score_codes` takes.

    Raises:
        UserError: a data set without `fetch`, or an unknown dtype.
    """
    encoder, codes = CodeEncoder(model.cond_stage_model, dtype), RowBuffer(len(dataset))
    if batch_size is None:
        batch_size = CPU_BATCH if torch.device(model.device).type == "cpu" else BATCH
    for images in image_batches(dataset, np.arange(len(dataset)), batch_size, progress, "encoding"):
        codes.add(encoder(to_unit_range(images.to(model.device)), tokens)[-1].cpu())
    return codes.tensors()[0].numpy()


def why_not_encoded(model: Any, weights: str = "live") -> str:
    """Why a model has no codes; empty if it has.

    Args:
        model: any.
        weights: `live` or `ema`: those that the model was loaded with.
    """
    if not hasattr(getattr(model, "cond_stage_model", None), "encoding"):
        return "it is a first stage, without scalars to score"
    if weights == "ema" and model.ema_parameters != "all":
        return f"its EMA weights are of the U-Net alone (ema_parameters: {model.ema_parameters}), not of the encoder"
    return ""


def why_not_scored(model: Any, dataset: Any, weights: str = "live") -> str:
    """Why a model cannot be scored for disentanglement on a data set; empty if it can.

    Args:
        model, weights: see `why_not_encoded`.
        dataset: of `ldm.data`.
    """
    if reason := why_not_encoded(model, weights):
        return reason
    if factors_of(dataset) is None:
        return "its data have neither a factor grid nor attributes to score against"
    return ""
