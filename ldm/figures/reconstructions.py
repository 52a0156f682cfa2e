"""Images, what the first stage makes of them, and what EncDiff draws from their tokens alone."""

import numpy as np
import torch

from ldm.evaluation.reconstruction import reconstruct
from ldm.figures.panels import Panels, to_pixels
from ldm.figures.subject import Subject
from ldm.models.autoencoder import IdentityFirstStage


def draw(subject: Subject) -> Panels:
    """A row of images, one of the first stage's reconstructions unless there is none, and one of EncDiff's."""
    images, model = subject.images, subject.model
    rows = {"image": images}
    if subject.first_stage_only:
        generator = torch.Generator(model.device).manual_seed(subject.seed)
        rows["first stage"] = reconstruct(model, images, generator=generator).cpu()
    elif not isinstance(model.first_stage_model, IdentityFirstStage):
        generator = torch.Generator(model.device).manual_seed(subject.seed)
        encoded = model.encode_first_stage(images.to(model.device))
        rows["first stage"] = model.decode_first_stage(model.get_first_stage_encoding(encoded, generator))
    if subject.has_tokens:
        rows["EncDiff"] = subject.draw(model.tokens(images))
    labels = []
    for name, made in rows.items():
        error = (made.cpu().float().clamp(-1, 1) - images).square().mean().item() / 4  # of images in [0, 1]
        labels.append(name if made is images else f"{name}\nMSE {error:.4f}".replace(" 0.", " ."))
    pixels = np.stack([to_pixels(made) for made in rows.values()])
    return Panels(pixels, rows=labels, title="Reconstructions", note=subject.note)
