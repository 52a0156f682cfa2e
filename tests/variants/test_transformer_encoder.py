"""The transformer encoder: queries are refined by the image, not by each other."""

import pytest
import torch

from ldm.variants.transformer_encoder import TransformerEncoder


@pytest.fixture
def model() -> TransformerEncoder:
    torch.manual_seed(0)
    model = TransformerEncoder(context_dim=8, latent_unit=5, image_size=16, d=16, depth=2, heads=2).double().eval()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.normal_(std=0.3)
    return model


def test_permuted_queries_give_permuted_scalars(model):
    image, order = torch.randn(3, 3, 16, 16).double(), [3, 0, 4, 1, 2]
    before = model.encoding(image)
    with torch.no_grad():
        model.encoder.queries.copy_(model.encoder.queries[order].clone())
    torch.testing.assert_close(model.encoding(image), before[:, order])


def test_queries_do_not_see_each_other(model):
    image = torch.randn(3, 3, 16, 16).double()
    before = model.encoding(image)
    with torch.no_grad():
        model.encoder.queries[2] += torch.randn(16).double()
    changed = (model.encoding(image) - before).abs().amax(dim=0) > 1e-9
    assert changed.tolist() == [False, False, True, False, False]


def test_scalars_depend_on_the_image_and_on_its_places(model):
    image = torch.randn(1, 3, 16, 16).double()
    before = model.encoding(image)
    for corner in ((slice(0, 4), slice(0, 4)), (slice(12, 16), slice(12, 16))):
        moved = image.clone()
        moved[0, :, corner[0], corner[1]] += 1
        assert ((model.encoding(moved) - before).abs() > 1e-6).all()
    assert (model.encoding(image.flip(-1)) - before).abs().max() > 1e-6


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="d: expected a multiple of heads"):
        TransformerEncoder(context_dim=8, latent_unit=5, image_size=16, d=10, heads=4)
