"""A model's methods for people: scalars, tokens, reconstruct, swap, traverse, attention."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ldm.models.diffusion.concepts import Concepts
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.images import as_images
from ldm.util import UserError

UNET = {"image_size": 16, "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1}
UNET |= {"attention_resolutions": [1], "channel_mult": [1], "num_heads": 2, "context_dim": 8, "latent_unit": 3}
ENCODER = {"d": 4, "context_dim": 8, "latent_unit": 3, "image_size": 16}

# What batches of other sizes change in an image of three steps: up to 1.4e-4 on CPUs without AVX-512.
ROUNDING = 5e-4


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    torch.manual_seed(0)
    made = LatentDiffusion(
        unet_config={"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNET},
        first_stage_config={"target": "ldm.models.autoencoder.IdentityFirstStage"},
        cond_stage_config={"target": "ldm.modules.encoders.concept.Encoder4", "params": ENCODER},
        image_size=16,
    ).eval()
    for parameter in made.model.parameters():
        if not parameter.any():  # the output layers, which start at zero
            nn.init.normal_(parameter, std=0.1)
    for parameter in made.cond_stage_model.net.parameters():  # so that tokens differ from image to image
        nn.init.normal_(parameter, std=0.5)
    return made


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_scalars_and_tokens_are_the_encoders(model, images):
    with torch.no_grad():
        scalars = model.cond_stage_model.encoding(images)
        tokens = model.cond_stage_model(images)
    torch.testing.assert_close(model.scalars(images, batch_size=2), scalars)
    torch.testing.assert_close(model.tokens(images, batch_size=2), tokens, atol=1e-4, rtol=1e-4)
    assert model.scalars(images[0]).shape == (1, 3)


def test_swapping_nothing_reconstructs(model, images):
    made = model.reconstruct(images, steps=3)
    assert made.shape == images.shape and made.abs().max() <= 1
    assert torch.equal(model.swap(images, images[:1], [], steps=3), made)
    assert torch.equal(model.swap(images, images, [0, 2], steps=3), made)


def test_swapping_all_concepts_gives_the_other_image(model, images):
    swapped = model.swap(images, images[3], [0, 1, 2], steps=3)
    torch.testing.assert_close(swapped, model.reconstruct(images[[3] * 5], steps=3), atol=ROUNDING, rtol=0)
    one = model.swap(images, images[3], 1, steps=3)
    assert (one[3] - swapped[3]).abs().max() < ROUNDING < 1e-3 < (one[0] - swapped[0]).abs().max()


def test_images_do_not_depend_on_the_batch(model, images):
    together = model.reconstruct(images, steps=3)
    torch.testing.assert_close(model.reconstruct(images, steps=3, batch_size=2), together, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(model.reconstruct(images[4], steps=3)[0], together[4], atol=ROUNDING, rtol=0)
    assert torch.equal(model.reconstruct(images, steps=3), together)
    assert not torch.equal(model.reconstruct(images, steps=3, seed=1), together)


def test_no_random_number_of_others_is_used(model, images):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model.reconstruct(images, steps=2, eta=1.0)
    assert torch.equal(torch.rand(3), expected)


def test_traversals_move_one_scalar(model, images):
    scalars = model.scalars(images[:2])
    made = model.traverse(images[:2], 1, [-1.0, float(scalars[0, 1]), 2.0], steps=3)
    assert made.shape == (2, 3, 3, 16, 16)
    torch.testing.assert_close(made[0, 1], model.reconstruct(images[0], steps=3)[0], atol=ROUNDING, rtol=0)
    moved = scalars[1:].clone()
    moved[:, 1] = 2.0
    torch.testing.assert_close(made[1, 2], model.draw(model.warp(moved), steps=3)[0], atol=ROUNDING, rtol=0)


def test_attention_is_a_share_of_each_place(model, images):
    maps = model.attention(images, steps=2, batch_size=2)
    assert maps.shape == (5, 3, 16, 16) and maps.min() >= 0
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(5, 16, 16))
    torch.testing.assert_close(model.attention(images[2:3], steps=2)[0], maps[2], atol=1e-4, rtol=0)


def test_concepts_by_name(model, images):
    with pytest.raises(UserError, match=r"wall.*no names yet"):
        model.swap(images, images, "wall", steps=1)
    with pytest.raises(UserError, match="range is not known"):
        model.traverse(images, 0, steps=1)
    model.concepts = Concepts({"wall": (2, 0), "floor": (1,)}, {}, (-1.0, -2.0, -3.0), (1.0, 2.0, 3.0))
    try:
        assert model.concept_numbers(["floor", "wall"]) == [1, 2, 0]
        by_name = model.swap(images, images[0], "wall", steps=2)
        assert torch.equal(by_name, model.swap(images, images[0], [2, 0], steps=2))
        made = model.traverse(images[0], "wall", steps=1)
        assert torch.equal(made, model.traverse(images[0], 2, torch.linspace(-3, 3, 11), steps=1))
        with pytest.raises(UserError, match="did you mean 'wall'"):
            model.swap(images, images, "wal")
    finally:
        del model.concepts


def test_mistakes(model, images):
    for wrong in (3, -1, 1.5, [0.5], None):
        with pytest.raises(UserError, match="concepts: expected a number from 0 to 2"):
            model.swap(images, images, wrong)
    assert model.concept_numbers(np.int64(2)) == [2] and model.concept_numbers(range(2)) == [0, 1]
    with pytest.raises(UserError, match=r"concept: .* got none"):
        model.traverse(images, [])
    for option, value in (("steps", 5.5), ("batch_size", 0), ("eta", 2)):
        with pytest.raises(UserError, match=f"^{option}: expected"):
            model.reconstruct(images, **{option: value})
    with pytest.raises(UserError, match="5 as in a, got 2"):
        model.swap(images, images[:2], 0)
    with pytest.raises(UserError, match="1 to 1000"):
        model.reconstruct(images, steps=0)


def test_images_of_any_kind():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    floats = pixels.astype(np.float64) / 127.5 - 1
    listed = [Image.fromarray(picture) for picture in pixels]
    for given in (pixels, floats, listed, torch.from_numpy(pixels).permute(0, 3, 1, 2), expected, list(pixels)):
        torch.testing.assert_close(as_images(given, 3, 16), expected)
    assert as_images(Image.new("L", (40, 20), 255), 3, 16).eq(1).all()
    assert as_images(Image.new("RGB", (5, 7)), 1, 16).shape == (1, 1, 16, 16)
    assert as_images(np.zeros((16, 16), np.uint8), 1, 16).shape == (1, 1, 16, 16)


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_that_cannot_be_written(channels):
    """torch warns of these only once per process: here it is to warn each time."""
    pixels = np.zeros((1, 16, 16, channels), np.uint8)
    pixels.flags.writeable = False
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        assert as_images(pixels, channels, 16).eq(-1).all()  # a warning from ldm would raise
        assert as_images(Image.new("RGB", (16, 16)), channels, 16).eq(-1).all()
    finally:
        torch.set_warn_always(before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((2, 3, 16, 16), np.uint8), "16×16 pixels and 3 channels"),
        (np.zeros((1, 16, 16, 3), np.int64), "uint8, or floats"),
        (torch.full((1, 3, 16, 16), 255.0), r"float32 from 255 to 255"),
        (torch.full((1, 3, 16, 16), float("nan")), "nan"),
        ([], "empty list"),
        ("picture.png", "PIL.Image.open"),
        (3, "got int"),
        (np.zeros((64, 64, 3), np.uint8), r"got \(64, 64, 3\)"),
    ],
)
def test_images_that_do_not_fit(given, message):
    with pytest.raises(UserError, match=f"images: .*{message}"):
        as_images(given, 3, 16)
