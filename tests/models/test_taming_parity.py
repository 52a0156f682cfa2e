"""The first stage against taming's classes: networks, quantiser, losses, and training step after step."""

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import taming.modules.losses.lpips as taming_lpips
import torch
import torchmetrics.functional.image as torchmetrics_image
import torchvision
from pytorch_lightning.callbacks import Callback
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.losses.vqperceptual import VQLPIPSWithDiscriminator as TamingLoss
from taming.modules.vqvae.quantize import VectorQuantizer2
from torch import nn
from torch.utils.data import DataLoader

from ldm.models.autoencoder import VQModel

DDCONFIG: dict[str, Any] = {
    "double_z": False,
    "z_channels": 3,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [16],
    "dropout": 0.0,
}
# The discriminator comes in at the third step.
LOSS = {"disc_start": 2, "disc_num_layers": 2, "disc_ndf": 8, "disc_weight": 0.75, "codebook_weight": 1.0}
RATE = 1e-3


@pytest.fixture(scope="module")
def vgg(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(torchvision.models.vgg16(weights=None).features.state_dict(prefix="features."), path)
    return path


@pytest.fixture
def taming_offline(monkeypatch, vgg):
    """Taming's LPIPS, with these weights and torchmetrics' heads in place of its downloads."""

    def build(pretrained: bool) -> nn.Module:
        net = torchvision.models.vgg16(weights=None)
        net.load_state_dict(torch.load(vgg, weights_only=True), strict=False)
        return net

    heads = Path(torchmetrics_image.__file__).parent / "lpips_models" / "vgg.pth"
    monkeypatch.setattr(taming_lpips, "models", type("models", (), {"vgg16": staticmethod(build)}))
    monkeypatch.setattr(
        taming_lpips.LPIPS,
        "load_from_pretrained",
        lambda self: self.load_state_dict(torch.load(heads, map_location="cpu", weights_only=True), strict=False),
    )


class TamingVQ(nn.Module):
    """An autoencoder of taming's parts under the names of its checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(**DDCONFIG), Decoder(**DDCONFIG)
        self.loss = TamingLoss(**LOSS)
        self.quantize = VectorQuantizer2(16, 3, beta=0.25)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        quant, codebook_loss, _ = self.quantize(self.quant_conv(self.encoder(x)))
        return self.decoder(self.post_quant_conv(quant)), codebook_loss


def ours(vgg: Path, **options: Any) -> VQModel:
    params = {**LOSS, "perceptual_weights": str(vgg), **options}
    loss = {"target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": params}
    return VQModel(DDCONFIG, loss, n_embed=16, embed_dim=3)


def pair(vgg: Path, **options: Any) -> tuple[VQModel, TamingVQ]:
    """Both models with the same weights: ours takes taming's by name."""
    torch.manual_seed(0)
    theirs = TamingVQ()
    with torch.no_grad():
        theirs.quantize.embedding.weight.normal_()  # codes far apart: a rounding error changes none
        for layer in (theirs.encoder, theirs.decoder):
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model = ours(vgg, **options)
    state = theirs.state_dict()
    fixed = [name for name in state if name.startswith("loss.perceptual_loss.")]
    assert not set(model.state_dict()) - set(state) and set(state) - set(model.state_dict()) == set(fixed)
    model.load_state_dict({name: value for name, value in state.items() if name not in fixed})
    return model, theirs


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize("step", [0, 2])
def test_losses_gradients_and_adaptive_weight(taming_offline, vgg, step):
    """One batch, both turns, before and after the discriminator's start."""
    model, theirs = pair(vgg)
    theirs.loss.perceptual_loss.eval()
    x = images(4)
    found, codebook_loss = model.reconstruct(x)
    expected, their_codebook_loss = theirs(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(codebook_loss, their_codebook_loss, rtol=1e-5, atol=1e-7)

    loss, parts = model.loss.generator_loss(codebook_loss, x, found, step, model.get_last_layer())
    their_loss, log = theirs.loss(their_codebook_loss, x, expected, 0, step, last_layer=theirs.decoder.conv_out.weight)
    torch.testing.assert_close(loss, their_loss, rtol=1e-4, atol=1e-6)
    assert set(parts) == {name.removeprefix("train/") for name in log}
    for name, value in parts.items():
        torch.testing.assert_close(value.float(), log[f"train/{name}"].float(), rtol=1e-4, atol=1e-6, msg=name)
    assert (parts["d_weight"] > 0) and parts["disc_factor"] == float(step >= 2)
    loss.backward()
    their_loss.backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith("loss."):
            torch.testing.assert_close(
                parameter.grad, theirs_by_name[name].grad, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )

    loss, parts = model.loss.discriminator_loss(x, found, step)
    their_loss, log = theirs.loss(their_codebook_loss, x, expected, 1, step)
    torch.testing.assert_close(loss, their_loss, rtol=1e-4, atol=1e-6)
    assert {f"train/{name}" for name in parts} == set(log)
    for name, value in parts.items():
        torch.testing.assert_close(value, log[f"train/{name}"], rtol=1e-4, atol=1e-6, msg=name)


class Trace(Callback):
    """Keeps what a model logs and holds, batch by batch."""

    def __init__(self) -> None:
        self.before: list[tuple[dict, list[dict], torch.Tensor]] = []
        self.after: list[tuple[dict[str, float], dict]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        optimizers = [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers]
        self.before.append((copy.deepcopy(pl_module.state_dict()), optimizers, torch.get_rng_state()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k.endswith("_step")}
        named = {k.removeprefix("train/").removesuffix("_step"): v for k, v in logged.items()}
        self.after.append((named, copy.deepcopy(pl_module.state_dict())))


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [False, True])
def test_training_step_after_step(taming_offline, vgg, dropout):
    """Six steps of Lightning, each against the same step by taming's parts: its losses, and the weights after it.

    Every step is compared from where Lightning's run stood before it, since a discriminator with batch norm magnifies
    rounding a hundredfold per step. With `perceptual_dropout`, taming's LPIPS is in training mode, as LDM trains, and
    the same random state drops the same. (Over a run the states part: taming computes LPIPS in the discriminator's
    turn too, where nothing uses it.)
    """
    model, theirs = pair(vgg, perceptual_dropout=dropout)
    model.learning_rate = RATE
    x = images(24)
    rows = [{"image": image.permute(1, 2, 0), "idx": torch.tensor(row)} for row, image in enumerate(x)]
    trace = Trace()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[trace],
    )  # fmt: skip
    trainer.fit(model, DataLoader(rows, batch_size=4))

    theirs.train()
    theirs.loss.perceptual_loss.train(dropout)
    parts = (theirs.encoder, theirs.decoder, theirs.quantize, theirs.quant_conv, theirs.post_quant_conv)
    autoencoder = torch.optim.Adam([p for part in parts for p in part.parameters()], lr=RATE, betas=(0.5, 0.9))
    discriminator = torch.optim.Adam(theirs.loss.discriminator.parameters(), lr=RATE, betas=(0.5, 0.9))
    assert len(trace.before) == len(trace.after) == 6
    for step, ((state, optimizers, random), (found, reached)) in enumerate(zip(trace.before, trace.after, strict=True)):
        theirs.load_state_dict(state, strict=False)
        for optimizer, saved in zip((autoencoder, discriminator), optimizers, strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(random)
        batch = x[4 * step : 4 * step + 4]
        log: dict[str, torch.Tensor] = {}
        felt: dict[str, torch.Tensor] = {}
        for turn, optimizer in enumerate((autoencoder, discriminator)):
            reconstruction, codebook_loss = theirs(batch)
            loss, more = theirs.loss(
                codebook_loss, batch, reconstruction, turn, step, last_layer=theirs.decoder.conv_out.weight
            )
            optimizer.zero_grad()
            loss.backward()
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            felt |= {n: p.grad.abs() for n, p in theirs.named_parameters() if id(p) in own and p.grad is not None}
            optimizer.step()
            log |= more
        assert set(found) == {name.removeprefix("train/") for name in log}
        for name, value in found.items():
            # The discriminator's turn comes after the autoencoder's step.
            assert value == pytest.approx(float(log[f"train/{name}"]), rel=1e-4, abs=1e-4), (step, name)
        for name, gradient in felt.items():
            # Where a gradient is nothing but rounding, as of biases before a norm, Adam makes a whole step of it.
            apart = (reached[name] - theirs.get_parameter(name)).abs()[gradient > 1e-6]
            assert not len(apart) or (apart > 0.05 * RATE).float().mean() < 0.05, (step, name, apart.max())
