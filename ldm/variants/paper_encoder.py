"""The encoder of the paper's Table 8; the release has another (`ldm.modules.encoders.concept.Encoder4`)."""

from torch import nn

from ldm.modules.encoders.concept import ConceptEncoder


class PaperEncoder(ConceptEncoder):
    """Five convolutions and three linear layers to the scalars, with ReLU between them."""

    def image_network(self, outputs: int) -> nn.Module:
        """Four of the convolutions halve the image; images of 64 pixels give 4096 features to the linear layers."""
        return nn.Sequential(
            nn.Conv2d(self.num_channels, 64, 7, padding=3),
            nn.ReLU(),
            nn.Conv2d(64, 128, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(128, 256, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256 * (self.image_size // 16) ** 2, 256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, outputs),
        )
