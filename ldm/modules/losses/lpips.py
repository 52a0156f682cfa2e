"""LPIPS (Zhang et al., 2018) on VGG16, built only where a perceptual loss is asked for."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ldm.util import UserError

VGG16_FILE = "vgg16-397923af.pth"
VGG16_URL = f"https://download.pytorch.org/models/{VGG16_FILE}"
# Convolutions of torchvision's vgg16().features, by the stage whose output is compared; pooling between stages.
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


def vgg16_state_dict(path: str | Path | None) -> dict[str, torch.Tensor]:
    """Weights of torchvision's VGG16 from a file, else from torch hub's folder, else fetched into it.

    Raises:
        UserError: the file is missing or unreadable and cannot be fetched; the message says where it goes.
    """
    target = Path(path) if path is not None else Path(torch.hub.get_dir()) / "checkpoints" / VGG16_FILE
    way_out = "or set model.params.lossconfig.params.perceptual_weight=0 to train without LPIPS"
    try:
        if path is None and not target.is_file():
            return torch.hub.load_state_dict_from_url(VGG16_URL, progress=True, weights_only=True)
        return torch.load(target, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(
            f"LPIPS needs VGG16's weights, and there is no file '{target}': fetch {VGG16_URL} to there, {way_out}"
        ) from error
    except Exception as error:  # urllib, ssl, socket, pickle: whatever went wrong, the remedy is the same
        raise UserError(
            f"LPIPS needs VGG16's weights, which could neither be read nor fetched ({error}):"
            f" save {VGG16_URL} as '{target}' or name it by perceptual_weights=PATH, {way_out}"
        ) from error


class LPIPS(nn.Module):
    """Perceptual distance of images, frozen.

    The backbone is torchvision's VGG16, the linear heads are those that torchmetrics ships. All weights are
    buffers that are not saved: checkpoints stay small, and no optimiser sees them.

    Args:
        weights: path of VGG16's state dict; see `vgg16_state_dict`.
        dropout: drop half of the squared differences while training. LPIPS as published does not, but taming and LDM
            train so, since Lightning puts the loss into training mode with the rest of the model.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, weights: str | Path | None = None, dropout: bool = False) -> None:
        super().__init__()
        self.dropout = dropout
        import torchmetrics.functional.image as torchmetrics_image

        backbone = vgg16_state_dict(weights)
        heads_file = Path(torchmetrics_image.__file__).parent / "lpips_models" / "vgg.pth"
        heads = torch.load(heads_file, map_location="cpu", weights_only=True)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        for stage, layers in enumerate(STAGES):
            for layer in layers:
                for kind in ("weight", "bias"):
                    name = f"features.{layer}.{kind}"
                    if name not in backbone:
                        raise UserError(f"'{weights}' is no state dict of torchvision's VGG16: it has no '{name}'")
                    self.register_buffer(f"{kind}_{layer}", backbone[name].clone(), persistent=False)
            self.register_buffer(f"head_{stage}", heads[f"lin{stage}.model.1.weight"].clone(), persistent=False)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Images (b, 3, h, w) in [-1, 1] -> the five stages' activations, each of unit length over channels."""
        h, out = (x - self.shift) / self.scale, []
        for stage, layers in enumerate(STAGES):
            if stage:
                h = F.max_pool2d(h, 2)
            for layer in layers:
                h = F.relu(F.conv2d(h, getattr(self, f"weight_{layer}"), getattr(self, f"bias_{layer}"), padding=1))
            out.append(h / (h.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return out

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Two batches of images (b, 3, h, w) in [-1, 1] -> distances (b, 1, 1, 1)."""
        total = torch.zeros(())
        for stage, (u, v) in enumerate(zip(self.features(a), self.features(b), strict=True)):
            differences = (u - v).square()
            if self.dropout and self.training:
                # In (b, c, h, w) order whatever the memory layout, so that a seed drops what it drops in taming.
                differences = F.dropout(differences.contiguous(), 0.5)
            weighted = F.conv2d(differences, getattr(self, f"head_{stage}"))
            total = total.to(weighted) + weighted.mean(dim=(2, 3), keepdim=True)
        return total
