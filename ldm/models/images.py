"""What people hand to a model as images."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.pictures import as_rgb, central_square
from ldm.util import UserError


def as_images(images: Any, channels: int, size: int) -> torch.Tensor:
    """Images of any kind as one batch.

    Args:
        images: a PIL image of any mode and size, cropped to its central square and resized; an array (b, h, w, c),
            (h, w, c) or, with one channel, (h, w) of uint8, or of floats in [-1, 1]; a tensor (b, c, h, w) or
            (c, h, w), uint8 or floats in [-1, 1]; or a list of these.
            Floats in [0, 1], such as torchvision's `ToTensor` gives, are in range and mean other, pale images: give
            2·x - 1.
        channels, size: of the model's images.

    Returns:
        (b, channels, size, size) float32 in [-1, 1], on the images' device.

    Raises:
        UserError: another kind, shape, size or range; says what was expected.
    """
    if isinstance(images, list | tuple):
        if not images:
            raise UserError("expected at least one image, got an empty list", "images")
        return torch.cat([as_images(image, channels, size) for image in images])
    if isinstance(images, Image.Image):
        rgb = central_square(as_rgb(images, "the image")[0], size)
        images = np.asarray(rgb if channels == 3 else rgb.convert("L"))
    if isinstance(images, str | Path):
        raise UserError(f"expected an image, got the path '{images}': open it with PIL.Image.open", "images")
    given = tuple(getattr(images, "shape", ()))
    if isinstance(images, np.ndarray):
        array = images[..., None] if images.ndim == 2 else images
        array = array if array.ndim == 4 else array[None]
        if array.dtype != np.uint8 and array.dtype.kind != "f":
            raise UserError(f"expected uint8, or floats in [-1, 1], got {array.dtype}", "images")
        images = torch.from_numpy(np.array(np.moveaxis(array, -1, 1), order="C"))  # a copy: PIL's are read-only
    if not isinstance(images, torch.Tensor):
        kind = type(images).__name__
        raise UserError(f"expected PIL images, arrays (b, h, w, c) or tensors (b, c, h, w), got {kind}", "images")
    x = images if images.ndim == 4 else images[None]
    if tuple(x.shape[1:]) != (channels, size, size):
        raise UserError(
            f"this model takes images of {size}×{size} pixels and {channels} channels: arrays (b, h, w, c) or tensors"
            f" (b, c, h, w); got {given}. PIL images are resized",
            "images",
        )
    if x.dtype == torch.uint8:
        return x.float() / 127.5 - 1
    if not x.is_floating_point() or not bool((x.abs() <= 1 + 1e-4).all()):
        raise UserError(f"expected uint8, or floats in [-1, 1], got {_range(x)}", "images")
    return x.float()


def _range(x: torch.Tensor) -> str:
    low, high = x.min().item(), x.max().item()
    return f"{x.dtype} from {low:g} to {high:g}".replace("torch.", "")
