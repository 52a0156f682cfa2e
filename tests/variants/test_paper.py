"""The paper's own values: its encoder, and the overlay that sets them."""

from functools import reduce

import pytest
import torch
from command_line import CHECKPOINT, ROOT
from ldm.cli_build import set_learning_rate
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

import ldm
from ldm.config import check_config, load_yaml, merge
from ldm.modules.encoders.concept import Encoder4
from ldm.util import instantiate_from_config
from ldm.variants.paper_encoder import PaperEncoder

OVERLAY = ROOT / "configs" / "ablations" / "paper.yaml"


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


def test_both_encoders_refuse_other_images():
    for build in (lambda s: PaperEncoder(8, 4, image_size=s), lambda s: Encoder4(8, 8, 4, image_size=s)):
        with pytest.raises(ValueError, match="multiple of 16"):
            build(40)
        with pytest.raises(ValueError, match="image_size"):
            build(32).encoding(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("dataset", ["cars3d", "shapes3d", "mpi3d", "celeba"])
def test_the_overlays_values(dataset):
    """Each from the paper; see the table of values in which paper and release disagree."""
    base = load_yaml(ROOT / "configs" / "latent-diffusion" / f"{dataset}-vq-4-16.yaml")
    config = merge([base, load_yaml(OVERLAY), OmegaConf.from_dotlist([f"{CHECKPOINT}=null"])])
    check_config(config)
    model = instantiate_from_config(config.model, "model")
    set_learning_rate(model, config, 1, 1, scale=True)
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW), "no warm-up"
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)
    assert config.data.params.batch_size == 64
    assert model.loss_type == "l2" and model.num_timesteps == 1000
    assert model.ema_parameters == "all" and model.cond_stage_model_ema.decay == pytest.approx(0.9999)
    # Cosine: alphas_cumprod falls as cos² of (t/T + s)/(1 + s), s = .008 (Nichol and Dhariwal, 2021).
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    start = torch.tensor(0.008 / 1.008 * torch.pi / 2).cos() ** 2
    curve = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2 / start
    torch.testing.assert_close(model.alphas_cumprod[:990].double(), curve[:990], rtol=1e-3, atol=1e-5)
    dropouts = {m.p for m in model.model.modules() if isinstance(m, nn.Dropout)}
    assert dropouts == {0.1, 0.0}, "in the residual blocks, not in the transformers"
    x = torch.zeros(1, 3, 64, 64)
    assert isinstance(model.cond_stage_model, PaperEncoder)
    assert model.get_learned_conditioning(x).shape == (1, 20, 32)
    assert model.model.diffusion_model.context_dim == 32


def test_the_overlay_on_the_quickstart():
    """Other sizes of images and tokens."""
    base = load_yaml(ROOT / "configs" / "quickstart" / "encdiff.yaml")
    config = merge([base, load_yaml(OVERLAY), OmegaConf.from_dotlist([f"{CHECKPOINT}=null"])])
    check_config(config)
    model = instantiate_from_config(config.model, "model")
    size = model.cond_stage_model.image_size
    tokens = model.get_learned_conditioning(torch.zeros(1, 3, size, size))
    latent = torch.zeros(1, model.channels, model.image_size, model.image_size)
    assert size == 32 and tokens.shape == (1, 20, 32)
    assert model.apply_model(latent, torch.zeros(1, dtype=torch.long), tokens).shape == latent.shape


def test_the_overlay_trains_scores_and_resumes(cli, first_stage):
    """On tiny rooms; the encoder's image size is that of the first stage."""
    base = ("--base", cli.enc, OVERLAY, "--token_num", 4, f"{CHECKPOINT}={first_stage}")
    run = cli.run(*base, "-t", "--gpus", 0, "--max_steps", 2, score=True)
    assert run.status == 0, run.err
    assert "learning rate 1.00e-04" in run.log
    # The whole set of 64 rooms is one batch.
    assert [path.name for path in sorted((run.logdir / "metrics").glob("*.json"))] == ["000001.json", "000002.json"]
    resumed = cli.run("-r", run.logdir, "-t", "--max_steps", 3)
    assert resumed.status == 0, resumed.err
    model = ldm.load(run.logdir, weights="ema")
    assert isinstance(model.cond_stage_model, PaperEncoder) and model.cond_stage_model.image_size == 16
