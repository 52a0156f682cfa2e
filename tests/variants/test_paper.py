"""The paper's own values: its encoder, and the overlay that sets them."""

from functools import reduce

import pytest
import torch
from command_line import ROOT
from overlays import BASES, composed, without_checkpoint
from torch import nn
from torch.nn import functional as F

from ldm.util import instantiate_from_config
from ldm.variants.paper_encoder import PaperEncoder


def test_encoder_of_table_8():
    """Conv 7×7×64 of stride 1, four of 4×4 of stride 2 (128, 256, 256, 256), ReLU after each, then 4096-256-256-K."""
    torch.manual_seed(0)
    encoder = PaperEncoder(context_dim=32, latent_unit=20).double()
    x = torch.randn(2, 3, 64, 64).double()
    convolutions = [layer for layer in encoder.encoder if isinstance(layer, nn.Conv2d)]
    linears = [layer for layer in encoder.encoder if isinstance(layer, nn.Linear)]
    assert [(c.in_channels, c.out_channels, *c.kernel_size, *c.stride) for c in convolutions] == [
        (3, 64, 7, 7, 1, 1),
        (64, 128, 4, 4, 2, 2),
        (128, 256, 4, 4, 2, 2),
        (256, 256, 4, 4, 2, 2),
        (256, 256, 4, 4, 2, 2),
    ]
    assert [tuple(layer.weight.shape) for layer in linears] == [(256, 4096), (256, 256), (20, 256)]
    h = F.relu(F.conv2d(F.pad(x, (3, 3, 3, 3)), convolutions[0].weight, convolutions[0].bias))
    for c in convolutions[1:]:
        h = F.relu(F.conv2d(F.pad(h, (1, 1, 1, 1)), c.weight, c.bias, stride=2))
    assert h.shape == (2, 256, 4, 4)
    h = reduce(lambda h, layer: F.relu(layer(h)), linears[:2], h.flatten(1))
    scalars = linears[2](h)
    torch.testing.assert_close(encoder.encoding(x), scalars)
    tokens = torch.stack([encoder.net[k](scalars[:, k : k + 1]) for k in range(20)], dim=1)
    assert tokens.shape == (2, 20, 32)
    torch.testing.assert_close(encoder(x), tokens)


@pytest.mark.parametrize("base", BASES, ids=lambda path: path.stem)
def test_training(base, tmp_path):
    """Batches of 64 at a learning rate of 1e-4, without warm-up."""
    config = composed(without_checkpoint(tmp_path, base), "paper")
    assert config.data.params.batch_size == 64 and config.model.params.scheduler_config is None
    assert config.model.base_learning_rate * 64 == pytest.approx(1e-4)


def test_values(tmp_path):
    """Each from the paper; see the table of values in which paper and release disagree."""
    model = instantiate_from_config(composed(without_checkpoint(tmp_path), "paper").model, "model")
    assert isinstance(model.configure_optimizers(), torch.optim.AdamW)
    assert model.loss_type == "l2" and model.num_timesteps == 1000
    assert model.ema_parameters == "all" and model.cond_stage_model_ema.decay == pytest.approx(0.9999)
    # Cosine: alphas_cumprod falls as cos² of (t/T + s)/(1 + s), s = .008 (Nichol and Dhariwal, 2021).
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    start = torch.tensor(0.008 / 1.008 * torch.pi / 2).cos() ** 2
    curve = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2 / start
    torch.testing.assert_close(model.alphas_cumprod[:990].double(), curve[:990], rtol=1e-3, atol=1e-5)
    dropouts = {m.p for m in model.model.modules() if isinstance(m, nn.Dropout)}
    assert dropouts == {0.1, 0.0}, "in the residual blocks, not in the transformers"
    assert isinstance(model.cond_stage_model, PaperEncoder)
    assert model.get_learned_conditioning(torch.zeros(1, 3, 64, 64)).shape == (1, 20, 32)
    assert model.model.diffusion_model.context_dim == 32


def test_other_sizes(tmp_path):
    """On the quickstart, with smaller images and fewer tokens: the image size follows the first stage."""
    base = ROOT / "configs" / "quickstart" / "encdiff.yaml"
    model = instantiate_from_config(composed(without_checkpoint(tmp_path, base), "paper").model, "model")
    size = model.cond_stage_model.image_size
    tokens = model.get_learned_conditioning(torch.zeros(1, 3, size, size))
    latent = torch.zeros(1, model.channels, model.image_size, model.image_size)
    assert size == 32 and tokens.shape == (1, 20, 32)
    assert model.apply_model(latent, torch.zeros(1, dtype=torch.long), tokens).shape == latent.shape
