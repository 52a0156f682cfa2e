"""Cross-attention maps (paper, Figure 5): where the U-Net looks at which token; means over heads, layers and steps."""

import numpy as np
import torch

from ldm.figures.panels import Panels, to_pixels
from ldm.figures.subject import BATCH, NotShown, Subject
from ldm.util import UserError

IMAGES = 5
MAP = "viridis"  # legible in grey, and for the colour-blind
SHADE = 0.6  # how much of the colour an image's dark places take away


def draw(subject: Subject) -> Panels:
    """A row per factor, or concept, and a column per image: the map of its tokens over the image."""
    subject.require_tokens()
    images, rows = subject.images[:IMAGES], subject.rows()
    try:
        maps = subject.model.attention(
            images, steps=subject.steps, sampler="dpm", seed=subject.seed, batch_size=BATCH, progress=subject.progress
        )
    except UserError as error:
        raise NotShown(error.message) from error
    found = torch.stack([maps[:, list(row.concepts)].sum(dim=1) for row in rows])  # (r, b, h, w)
    scaled = found - found.amin(dim=(1, 2, 3), keepdim=True)
    scaled = scaled / scaled.amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
    pixels = np.stack([to_pixels(images), *[overlaid(images, row) for row in scaled]])
    ranges = [f"attention {row.min():.2f} to {row.max():.2f}".replace("0.", ".") for row in found]
    labels = ["image", *(f"{row.label}\n{told}" for row, told in zip(rows, ranges, strict=True))]
    note = f"each row from its least (violet) to its greatest attention (yellow), of 1 in all · {subject.note}"
    return Panels(pixels, labels, title="Cross attention to the tokens", note=note, after=(0,), width=4.5)


def overlaid(images: torch.Tensor, maps: torch.Tensor) -> np.ndarray:
    """Maps (b, h, w) in [0, 1] in colour over images (b, c, h, w), uint8 (b, h, w, 3)."""
    import matplotlib

    grey = to_pixels(images).astype(np.float32).mean(axis=-1, keepdims=True) / 255
    colour = matplotlib.colormaps[MAP](maps.numpy())[..., :3]
    light = 1 - SHADE + SHADE * grey / max(float(grey.max()), 1e-6)
    return (colour * light * 255).round().clip(0, 255).astype(np.uint8)
