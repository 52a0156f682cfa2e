"""A data set's scalars and tokens."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ldm.evaluation.batches import image_batches
from ldm.evaluation.codes import CodeEncoder, encode, why_not_scored
from ldm.factors import FactorGrid
from ldm.modules.encoders.concept import Encoder4
from ldm.util import UserError
from ldm.variants.transformer_encoder import TransformerEncoder


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
    assert encoder.cond_stage_model.norm.weight.requires_grad
    tokens = encode(encoder, Rows(), batch_size=3, progress=False, tokens=True)
    np.testing.assert_allclose(tokens, np.stack([expected, expected**2], axis=-1), atol=1e-2)


@pytest.mark.parametrize(("given", "sizes"), [({}, [64, 6]), ({"batch_size": 50}, [50, 20])])
def test_a_cpu_takes_few_images_at_a_time(given, sizes):
    class Many(Rows):
        def __len__(self):
            return 70

        def fetch(self, rows):
            seen.append(len(rows))
            return {"image": torch.zeros(len(rows), 4, 4, 3, dtype=torch.uint8)}

    seen: list[int] = []
    assert encode(model(), Many(), progress=False, **given).shape == (70, 2) and seen == sizes


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


SMALL = {"context_dim": 4, "latent_unit": 5, "image_size": 32}
CHUNKS = {"target": "ldm.variants.vector.ChunkTokens", "params": {"context_dim": 4, "latent_unit": 5}}
ENCODERS = {
    "convolutions": lambda: Encoder4(d=32, **SMALL),
    "transformer": lambda: TransformerEncoder(d=32, depth=1, heads=4, **SMALL),
    "vectors": lambda: Encoder4(d=32, tokens_config=CHUNKS, **SMALL),
}


def trained(encoder):
    """With batch norms that hold the images' statistics, and weights of no fresh layer."""
    torch.manual_seed(0)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    with torch.no_grad():
        for _ in range(20):
            encoder.train().encoding(images(64))
    return encoder


def images(count=6):
    """Rectangles of other colours and sizes on each."""
    random = np.random.default_rng(1)
    made = np.empty((count, 3, 32, 32), np.float32)
    for image in made:
        image[:] = random.uniform(-1, 1, (3, 1, 1))
        top, left = random.integers(0, 24, 2)
        image[:, top : top + random.integers(4, 20), left : left + 8] = random.uniform(-1, 1, (3, 1, 1))
    return torch.from_numpy(made)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", ENCODERS)
def test_codes_are_the_plain_encoders(kind, inference):
    """And the encoder is afterwards what it was: names, values, layout and mode."""
    encoder = trained(ENCODERS[kind]()).train()
    before = {name: (value.clone(), value.stride()) for name, value in encoder.state_dict().items()}
    with torch.inference_mode(inference):
        scalars, tokens = CodeEncoder(encoder)(images(), tokens=True)
    after = encoder.state_dict()
    assert list(after) == list(before) and encoder.training and all(p.requires_grad for p in encoder.parameters())
    assert all(torch.equal(after[name], value) and after[name].stride() == s for name, (value, s) in before.items())
    encoder.eval()
    with torch.no_grad():
        expected = encoder.encoding(images())
        # Rounding of float32: up to 2e-6 of the largest on CPUs without AVX-512.
        torch.testing.assert_close(scalars, expected, rtol=1e-6, atol=1e-5 * float(expected.abs().max()))
        torch.testing.assert_close(tokens, encoder.warp(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ENCODERS)
def test_bf16_is_close_and_not_rounded(kind):
    encoder = trained(ENCODERS[kind]()).eval()
    with torch.no_grad():
        expected = encoder.encoding(images(64))
        (scalars,) = CodeEncoder(encoder, "bf16")(images(64))
    assert scalars.dtype == torch.float32
    assert 0 < float((scalars - expected).norm() / (expected - expected.mean(0)).norm()) < 0.05
    assert not torch.equal(scalars, scalars.bfloat16().float()), "more digits than bfloat16 has"


def test_batch_norms_are_folded():
    """All of those that follow a convolution: five in Encoder4 and its blocks, one stands after a sum."""
    made = CodeEncoder(trained(Encoder4(d=32, **SMALL))).encoder
    assert sum(isinstance(module, nn.BatchNorm2d) for module in made.modules()) == 1


def test_autocast_around_it_changes_nothing():
    """Lightning may validate under it."""
    made = CodeEncoder(trained(Encoder4(d=32, **SMALL)))
    with torch.autocast("cpu", torch.bfloat16):
        scalars, tokens = made(images(), tokens=True)
    assert torch.equal(scalars, made(images())[0]) and tokens.dtype == torch.float32


def test_another_dtype_is_refused():
    with pytest.raises(UserError, match=r"dtype: expected float32 or bf16, got 'fp8'"):
        CodeEncoder(nn.Identity(), "fp8")
