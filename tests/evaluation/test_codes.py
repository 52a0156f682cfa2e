"""A data set's scalars and tokens."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ldm.evaluation.batches import image_batches
from ldm.evaluation.codes import encode, why_not_scored
from ldm.factors import FactorGrid
from ldm.util import UserError


class Rows:
    """Seven grey images, each filled with its row's number."""

    grid = FactorGrid((7,))

    def __len__(self):
        return 7

    def fetch(self, rows):
        image = torch.as_tensor(rows, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 4, 4, 3)
        return {"image": image, "idx": torch.as_tensor(rows)}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def encoding(self, image):
        """The mean pixel, 0–255, and its negative."""
        assert image.shape[1:] == (3, 4, 4) and not self.norm.training
        mean = (image.mean(dim=(1, 2, 3)) + 1) * 127.5
        return torch.stack([mean, -mean], dim=1)

    def warp(self, scalars):
        return torch.stack([scalars, scalars**2], dim=-1)


def model(**attributes):
    made = nn.Module()
    made.cond_stage_model = Encoder()
    made.device = torch.device("cpu")
    for name, value in attributes.items():
        setattr(made, name, value)
    return made.train()


def test_every_image_in_order():
    encoder = model()
    expected = np.stack([np.arange(7), -np.arange(7)], axis=1)
    scalars = encode(encoder, Rows(), batch_size=3, progress=False)
    np.testing.assert_allclose(scalars, expected, atol=1e-4)
    assert scalars.dtype == np.float32 and encoder.training and encoder.cond_stage_model.norm.training
    tokens = encode(encoder, Rows(), batch_size=3, progress=False, tokens=True)
    np.testing.assert_allclose(tokens, np.stack([expected, expected**2], axis=-1), atol=1e-2)


@pytest.mark.parametrize(
    ("made", "dataset", "weights", "reason"),
    [
        (nn.Identity(), Rows(), "live", "it is a first stage"),
        (model(ema_parameters="unet"), Rows(), "ema", "of the U-Net alone"),
        (model(), SimpleNamespace(grid=None), "live", "neither a factor grid nor attributes"),
        (model(ema_parameters="unet"), Rows(), "live", "^$"),
        (model(ema_parameters="all"), Rows(), "ema", "^$"),
    ],
)
def test_what_cannot_be_scored(made, dataset, weights, reason):
    import re

    assert re.search(reason, why_not_scored(made, dataset, weights))


def test_a_data_set_without_fetch_is_named():
    class Plain(list):
        pass

    with pytest.raises(UserError, match="Plain has no method fetch"):
        next(image_batches(Plain([0]), np.arange(1), 1, False, ""))
