"""LPIPS (Zhang et al., 2018): the first stage's perceptual loss, and a score of reconstructions."""

from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ldm.modules.pretrained import Pretrained

REMEDY = (
    "name your own copy (training: perceptual_weights=FILE, evaluation: --lpips-weights FILE), or leave LPIPS out"
    " (training: perceptual_weight=0, evaluation: --lpips none)"
)


class Backbone(NamedTuple):
    """A network of torchvision's whose activations are compared.

    Attributes:
        weights: its published weights.
        stages: the convolutions up to each activation that is compared, by their number in `features`.
        pools: size of the max pooling before each stage; 0 for none. Their stride is 2.
        stride, padding: of the first convolution. The others keep the size.
        smallest: height and width of the smallest images that all poolings leave something of.
    """

    weights: Pretrained
    stages: tuple[tuple[int, ...], ...]
    pools: tuple[int, ...]
    stride: int
    padding: int
    smallest: int


_VGG16 = Pretrained("VGG16", "https://download.pytorch.org/models/vgg16-397923af.pth", REMEDY)
_ALEXNET = Pretrained("AlexNet", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", REMEDY)
BACKBONES = {
    "vgg": Backbone(
        _VGG16, ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)), (0, 2, 2, 2, 2), 1, 1, smallest=16
    ),
    "alex": Backbone(_ALEXNET, ((0,), (3,), (6,), (8,), (10,)), (0, 3, 3, 0, 0), 4, 2, smallest=31),
}


class LPIPS(nn.Module):
    """Perceptual distance of images, frozen.

    The linear heads are those that torchmetrics ships. All weights are buffers that are not saved: checkpoints stay
    small, and no optimiser sees them.

    Args:
        weights: file of the backbone's state dict; fetched into torch hub's folder if left out.
        dropout: drop half of the squared differences while training. LPIPS as published does not, but taming and LDM
            train so, since Lightning puts the loss into training mode with the rest of the model.
        backbone: `vgg`, the usual one to train with, or `alex`, the usual one to compare with.

    Raises:
        UserError: see `Pretrained.load`.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, weights: str | Path | None = None, dropout: bool = False, backbone: str = "vgg") -> None:
        super().__init__()
        import torchmetrics.functional.image as torchmetrics_image

        self.dropout, self.backbone = dropout, BACKBONES[backbone]
        self.backbone.weights.load(weights, self._read_convolutions)
        file = Path(torchmetrics_image.__file__).parent / "lpips_models" / f"{backbone}.pth"
        heads = torch.load(file, map_location="cpu", weights_only=True)
        for stage in range(len(self.backbone.stages)):
            self._keep(f"head_{stage}", heads[f"lin{stage}.model.1.weight"].clone())
        self._keep("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self._keep("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def _keep(self, name: str, values: torch.Tensor) -> None:
        self.register_buffer(name, values, persistent=False)

    def _read_convolutions(self, file: Path) -> None:
        state = torch.load(file, map_location="cpu", weights_only=True)
        for layer in chain(*self.backbone.stages):
            for kind in ("weight", "bias"):
                self._keep(f"{kind}_{layer}", state[f"features.{layer}.{kind}"].clone())

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Images (b, 3, h, w) in [-1, 1] -> the stages' activations, each of unit length over channels."""
        h, out = (x - self.shift) / self.scale, []
        for layers, pool in zip(self.backbone.stages, self.backbone.pools, strict=True):
            if pool:
                h = F.max_pool2d(h, pool, stride=2)
            for layer in layers:
                weight, bias = getattr(self, f"weight_{layer}"), getattr(self, f"bias_{layer}")
                first = layer == 0
                stride, padding = (self.backbone.stride, self.backbone.padding) if first else (1, weight.shape[-1] // 2)
                h = F.relu(F.conv2d(h, weight, bias, stride, padding))
            out.append(h / (h.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return out

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Two batches of images (b, 3, h, w) in [-1, 1] -> distances (b, 1, 1, 1)."""
        total = torch.zeros((), device=a.device)
        for stage, (u, v) in enumerate(zip(self.features(a), self.features(b), strict=True)):
            differences = (u - v).square()
            if self.dropout and self.training:
                # In (b, c, h, w) order whatever the memory layout, so that a seed drops what it drops in taming.
                differences = F.dropout(differences.contiguous(), 0.5)
            weighted = F.conv2d(differences, getattr(self, f"head_{stage}"))
            total = total.to(weighted) + weighted.mean(dim=(2, 3), keepdim=True)
        return total
