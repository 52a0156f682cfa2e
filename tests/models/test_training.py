"""Lightning's training steps against plain loops written here."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel, VQModelInterface
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import UserError

DDCONFIG = {
    "double_z": False,
    "z_channels": 3,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
}
LOSS = {"disc_start": 1, "disc_num_layers": 1, "disc_ndf": 8, "perceptual_weight": 0.0}


def loader(batches: int, size: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(3)
    images = [
        {"image": torch.rand(16, 16, 3, generator=generator) * 2 - 1, "idx": torch.tensor(row)}
        for row in range(batches * size)
    ]
    return DataLoader(images, batch_size=size)


def fit(model: pl.LightningModule, data: DataLoader, **options: Any) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(**{"accelerator": "cpu", "max_epochs": 1, **quiet, **options})
    trainer.fit(model, data)
    return trainer


def vq() -> VQModel:
    loss = {"target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": LOSS}
    return VQModel(DDCONFIG, loss, n_embed=16, embed_dim=3)


def kl() -> AutoencoderKL:
    loss = {"target": "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator", "params": LOSS}
    return AutoencoderKL({**DDCONFIG, "double_z": True}, loss, embed_dim=3)


@pytest.mark.parametrize("build", [vq, kl])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_first_stage_alternates_generator_and_discriminator(build, accumulate):
    """Per batch: generator forward, backward, step; then a new forward for the discriminator, as released."""
    torch.manual_seed(0)
    model = build()
    model.learning_rate, model.accumulate_grad_batches, model.gradient_clip_val = 1e-3, accumulate, 0.5
    plain = copy.deepcopy(model).train()
    data = loader(5)  # with accumulation, the last group has one batch

    torch.manual_seed(1)
    trainer = fit(model, data)

    torch.manual_seed(1)
    autoencoder = torch.optim.Adam(plain.generator_parameters(), lr=1e-3, betas=(0.5, 0.9))
    discriminator = torch.optim.Adam(plain.loss.discriminator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    steps = 0
    for index, batch in enumerate(data):
        x = batch["image"].permute(0, 3, 1, 2)
        full = (index + 1) % accumulate == 0 or index == 4
        now = steps
        held = [p.detach().clone() if p.grad is None else p.grad.clone() for p in plain.loss.discriminator.parameters()]
        reconstruction, extra = plain.reconstruct(x)
        loss, _ = plain.loss.generator_loss(extra, x, reconstruction, now, plain.decoder.conv_out.weight)
        (loss / accumulate).backward()
        for p, g in zip(plain.loss.discriminator.parameters(), held, strict=True):
            p.grad = g if index % accumulate else None  # the generator's loss does not train the discriminator
        if full:
            nn.utils.clip_grad_norm_(plain.generator_parameters(), 0.5)
            autoencoder.step()
            autoencoder.zero_grad()
            steps += 1
        with torch.no_grad():
            reconstruction, _ = plain.reconstruct(x)
        loss, _ = plain.loss.discriminator_loss(x, reconstruction, now)
        (loss / accumulate).backward()
        if full:
            nn.utils.clip_grad_norm_(plain.loss.discriminator.parameters(), 0.5)
            discriminator.step()
            discriminator.zero_grad()

    # A step is one group of batches, whatever the number of optimisers.
    assert trainer.global_step == steps == -(-5 // accumulate)
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def encdiff(**options: Any) -> LatentDiffusion:
    unet = {
        "image_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "attention_resolutions": [1],
        "num_res_blocks": 1,
        "channel_mult": [1],
        "num_heads": 4,
        "context_dim": 8,
        "latent_unit": 4,
    }
    encoder = {"d": 8, "context_dim": 8, "latent_unit": 4, "image_size": 16}
    stage = options.pop("first_stage", None) or {
        "target": "ldm.models.autoencoder.VQModelInterface",
        "params": {
            "embed_dim": 3,
            "n_embed": 16,
            "ddconfig": DDCONFIG,
            "lossconfig": {"target": "torch.nn.Identity"},
        },
    }
    params: dict[str, Any] = {
        "linear_start": 0.0015,
        "linear_end": 0.0155,
        "timesteps": 100,
        "loss_type": "l1",
        "image_size": 8,
        "scale_by_std": True,
    }
    return LatentDiffusion(
        unet_config={"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        first_stage_config=stage,
        cond_stage_config={"target": "ldm.modules.encoders.concept.Encoder4", "params": encoder},
        **{**params, **options},
    )


@pytest.mark.parametrize("ema_parameters", ["unet", "all"])
def test_encdiff_trains_on_the_noise_prediction_loss(ema_parameters):
    """AdamW on the loss of a plain loop; EMA weights once per batch; the scale factor from the first batch."""
    torch.manual_seed(0)
    model = encdiff(ema_parameters=ema_parameters)
    model.learning_rate = 1e-3
    plain = copy.deepcopy(model).train()
    data = loader(4)
    torch.manual_seed(1)
    fit(model, data, accumulate_grad_batches=2)

    torch.manual_seed(1)
    parameters = [*plain.model.parameters(), *plain.cond_stage_model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    ema_weights = {name: p.detach().clone() for name, p in plain.model.named_parameters()}
    ema_encoder = {name: p.detach().clone() for name, p in plain.cond_stage_model.named_parameters()}
    scale = None
    for index, batch in enumerate(data):
        x = batch["image"].permute(0, 3, 1, 2)
        with torch.no_grad():
            latent = plain.first_stage_model.encode(x)
        scale = 1 / latent.std() if scale is None else scale
        t = torch.randint(0, 100, (4,))
        noise = torch.randn(latent.shape)
        a = plain.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        noisy = a.sqrt() * scale * latent + (1 - a).sqrt() * noise
        loss = (plain.model(noisy, t, plain.cond_stage_model(x)) - noise).abs().mean()
        (loss / 2).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(0.9999, (2 + index) / (11 + index))
        for name, p in plain.model.named_parameters():
            ema_weights[name] = ema_weights[name] - (1 - decay) * (ema_weights[name] - p.detach())
        for name, p in plain.cond_stage_model.named_parameters():
            ema_encoder[name] = ema_encoder[name] - (1 - decay) * (ema_encoder[name] - p.detach())

    assert scale is not None
    torch.testing.assert_close(model.scale_factor, scale)
    # A step moves a weight by 1e-3; where a gradient is almost 0 (biases before a norm), Adam magnifies its rounding.
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-5, msg=lambda text, n=name: f"{n}: {text}")
    shadows = dict(model.model_ema.named_buffers())
    for name, expected in ema_weights.items():
        torch.testing.assert_close(shadows[name.replace(".", "")], expected, rtol=1e-4, atol=5e-5)
    assert hasattr(model, "cond_stage_model_ema") == (ema_parameters == "all")
    if ema_parameters == "all":
        shadows = dict(model.cond_stage_model_ema.named_buffers())
        for name, expected in ema_encoder.items():
            torch.testing.assert_close(shadows[name.replace(".", "")], expected, rtol=1e-4, atol=5e-5)


class Steps(Callback):
    """Keeps weights, random state, gradients, rate and loss of every step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append({"before": copy.deepcopy(pl_module.state_dict()), "random": torch.get_rng_state()})

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        self.rows[-1] |= {"gradients": named, "rate": optimizer.param_groups[0]["lr"]}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = float(trainer.callback_metrics["train/loss_step"])
        self.rows[-1] |= {"loss": loss, "after": copy.deepcopy(pl_module.state_dict())}


def test_every_step_of_encdiff():
    """Loss, gradients, learning rate, AdamW, EMA weights and scale factor of each step, by formulas written here."""
    torch.manual_seed(0)
    warm_up = {"warm_up_steps": [3], "cycle_lengths": [100], "f_start": [0.01], "f_max": [1.0], "f_min": [1.0]}
    schedule = {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": warm_up}
    model = encdiff(scheduler_config=schedule)
    randomise(model.model)
    model.learning_rate = 1e-3
    model.model_ema.reset(model.model)
    data, steps = loader(5), Steps()
    plain = copy.deepcopy(model).train()
    fit(model, data, callbacks=[steps])

    betas = torch.linspace(0.0015**0.5, 0.0155**0.5, 100, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0).float()
    first = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    second = copy.deepcopy(first)
    for index, (row, batch) in enumerate(zip(steps.rows, data, strict=True)):
        plain.load_state_dict(row["before"])
        torch.set_rng_state(row["random"])
        x = batch["image"].permute(0, 3, 1, 2)
        with torch.no_grad():
            latent = plain.first_stage_model.encode(x)
        if index == 0:
            scale = 1 / latent.std()
        torch.testing.assert_close(row["after"]["scale_factor"], scale)
        t, noise = torch.randint(0, 100, (4,)), torch.randn(latent.shape)
        a = alphas[t].reshape(-1, 1, 1, 1)
        predicted = plain.model.diffusion_model(
            a.sqrt() * scale * latent + (1 - a).sqrt() * noise, t, plain.cond_stage_model(x)
        )
        loss = (predicted - noise).abs().mean()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)

        rate = 1e-3 * min(1.0, 0.01 + 0.99 * index / 3)
        assert row["rate"] == pytest.approx(rate)
        trained = {n: p for n, p in plain.named_parameters() if n.startswith(("model.", "cond_stage_model."))}
        assert set(row["gradients"]) == set(trained)
        expected = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
        decay = min(0.9999, (2 + index) / (11 + index))
        for name, gradient in row["gradients"].items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=name)
            # AdamW (Loshchilov and Hutter, 2019), from the gradient that Lightning's run had.
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            size = (second[name] / (1 - 0.999 ** (index + 1))).sqrt() + 1e-8
            before = row["before"][name]
            weight = before - rate * 0.01 * before - rate * first[name] / (1 - 0.9 ** (index + 1)) / size
            torch.testing.assert_close(row["after"][name], weight, rtol=1e-5, atol=1e-6, msg=name)
            if name.startswith("model."):
                shadow = f"model_ema.{name.removeprefix('model.').replace('.', '')}"
                average = row["before"][shadow] - (1 - decay) * (row["before"][shadow] - row["after"][name])
                torch.testing.assert_close(row["after"][shadow], average, rtol=1e-5, atol=1e-6, msg=shadow)


def randomise(module: nn.Module) -> None:
    """Fill what starts as zero, so that every weight has a gradient."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


def test_first_stage_stays_frozen_and_in_evaluation_mode():
    torch.manual_seed(0)
    model = encdiff()
    before = copy.deepcopy(model.first_stage_model.state_dict())
    fit(model, loader(2))
    model.train()
    assert not any(module.training for module in model.first_stage_model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.first_stage_model.state_dict().items())


def test_an_encoder_that_is_not_trained_stays_as_it_is():
    """Its batch norms too, so that its scalars are those that are scored and sampled from."""
    torch.manual_seed(0)
    model = encdiff(cond_stage_trainable=False)
    before = copy.deepcopy(model.cond_stage_model.state_dict())
    fit(model, loader(2))
    model.train()
    assert not any(module.training for module in model.cond_stage_model.modules()) and model.model.training
    assert all(torch.equal(before[key], value) for key, value in model.cond_stage_model.state_dict().items())


def test_the_configuration_s_schedule_counts(tmp_path, caplog):
    """Not that of the checkpoint from which weights are loaded, or a run is resumed."""
    other, model = encdiff(), encdiff(beta_schedule="cosine", ema_decay=0.9)
    wanted = {name: model.get_buffer(name).clone() for name in (*model.schedule_names, "model_ema.decay")}
    torch.save({"state_dict": other.state_dict()}, tmp_path / "other.ckpt")
    model.init_from_ckpt(str(tmp_path / "other.ckpt"))
    assert "noise schedule and ema_decay: the configuration's, not the checkpoint's" in caplog.text
    assert all(torch.equal(model.get_buffer(name), values) for name, values in wanted.items())
    resumed = encdiff(beta_schedule="cosine", ema_decay=0.9)
    checkpoint = {"state_dict": other.state_dict()}
    resumed.on_load_checkpoint(checkpoint)
    resumed.load_state_dict(checkpoint["state_dict"])
    assert all(torch.equal(resumed.get_buffer(name), values) for name, values in wanted.items())
    for own, read in zip(other.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(own, read)
    slower = encdiff(ema_decay=0.99999)
    slower.init_from_ckpt(str(tmp_path / "other.ckpt"))
    assert float(slower.model_ema.decay) == pytest.approx(0.99999, abs=1e-7), "and the checkpoint's is .9999"
    caplog.clear()
    half = {
        name: values.half() if values.is_floating_point() else values for name, values in other.state_dict().items()
    }
    torch.save({"state_dict": half}, tmp_path / "half.ckpt")
    of_half = encdiff()
    of_half.init_from_ckpt(str(tmp_path / "half.ckpt"))
    assert torch.equal(of_half.betas, other.betas) and float(of_half.model_ema.decay) < 1
    same = encdiff()
    same.init_from_ckpt(str(tmp_path / "other.ckpt"))
    assert "not the checkpoint's" not in caplog.text


def test_scale_factor_of_bytes_and_in_parts(monkeypatch):
    """As many images at a time as in training; bytes as the batches have them."""
    model, seen = encdiff(scale_factor_images=10), []
    images = torch.randint(0, 256, (10, 16, 16, 3), dtype=torch.uint8)
    dataset = [{"image": image} for image in images]
    strategy = SimpleNamespace(broadcast=lambda value: value)
    model._trainer = SimpleNamespace(train_dataloader=SimpleNamespace(dataset=dataset), strategy=strategy)
    encode = model.encode_first_stage
    monkeypatch.setattr(model, "encode_first_stage", lambda x: seen.append(len(x)) or encode(x))
    batch = images[:4] / 127.5 - 1
    model.on_train_batch_start({"image": batch}, 0)
    assert seen == [4, 4, 2]
    expected = 1 / encode((images / 127.5 - 1).permute(0, 3, 1, 2)).std()
    torch.testing.assert_close(model.scale_factor, expected)


def test_scale_factor_from_images_spread_over_the_set():
    torch.manual_seed(0)
    model = encdiff(scale_factor_images=3)
    data = loader(3)
    x = torch.stack([data.dataset[row]["image"] for row in (0, 5, 11)]).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = 1 / model.first_stage_model.encode(x).std()
    fit(model, data)
    torch.testing.assert_close(model.scale_factor, expected)


def test_images_themselves_are_not_scaled():
    """Diffusion in pixel space, as released; and a given scale factor is not silently replaced."""
    torch.manual_seed(0)
    identity = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    unet = {"image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1,
            "attention_resolutions": [1], "channel_mult": [1], "num_heads": 4, "context_dim": 8}  # fmt: skip
    encoder = {"d": 8, "context_dim": 8, "latent_unit": 4, "image_size": 16}
    model = LatentDiffusion(
        unet_config={"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        first_stage_config=identity,
        cond_stage_config={"target": "ldm.modules.encoders.concept.Encoder4", "params": encoder},
        image_size=16,
        scale_by_std=True,
    )
    fit(model, loader(1))
    assert model.scale_factor == 1 and model.scale_factor_known
    with pytest.raises(UserError, match="scale_by_std"):
        encdiff(scale_by_std=True, scale_factor=0.5)


def test_quantised_latents_are_scaled():
    torch.manual_seed(0)
    model = encdiff(scale_by_std=False, scale_factor=3.0).eval()
    z = torch.randn(2, 3, 8, 8)
    codes = model.first_stage_model.quantize.embedding.weight
    nearest = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 3), codes).argmin(1)
    expected = 3 * codes[nearest].reshape(2, 8, 8, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(model.quantize_latent(3 * z), expected)


def test_pictures_mark_no_codes():
    torch.manual_seed(0)
    model = vq().eval()
    model.log_images(next(iter(loader(1))))
    assert not model.codes_used.any()


def test_kept_latents_change_nothing():
    """Encoding the training set once gives the weights that encoding every batch gives."""
    models = []
    for cache in (False, True):
        torch.manual_seed(0)
        model = encdiff(cache_latents=cache)
        model.learning_rate = 1e-3
        torch.manual_seed(1)
        fit(model, loader(3))
        models.append(model)
    for (name, found), expected in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        # Steps are of 1e-3; rounding moves what is near zero by up to 7e-5 on CPUs without AVX-512.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}")
    assert models[1]._latents is None


def test_latents_are_kept_when_they_are_met(monkeypatch):
    """Nothing is encoded before the first step; each batch once, as large as the others; then none."""
    sizes: list[int] = []
    model = encdiff(cache_latents=True, scale_by_std=False)
    encode = model.encode_first_stage
    monkeypatch.setattr(model, "encode_first_stage", lambda x: (sizes.append(len(x)), encode(x))[1])
    images = [{"image": torch.rand(16, 16, 3) * 2 - 1, "idx": torch.tensor(row)} for row in range(10)]

    class Seen(pl.Callback):
        known: list[int] = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.known.append(int(pl_module._latents.known.sum()))

    seen = Seen()
    fit(model, DataLoader(images, batch_size=4), callbacks=[seen], max_epochs=2)
    assert sizes == [4, 4, 4] and seen.known == [0, 4, 8, 10, 10, 10]


def test_training_can_be_of_some_timesteps_alone(monkeypatch):
    model, seen = encdiff(timestep_range=[30, 60]), []
    monkeypatch.setattr(model, "p_losses", lambda x, cond, t, noise: seen.append(t))
    latent = torch.zeros(2000, 3, 8, 8)
    model.train().losses_at_random_times(latent, None)
    model.eval().losses_at_random_times(latent, None)
    assert (seen[0].min(), seen[0].max()) == (30, 59) and (seen[1].min(), seen[1].max()) == (0, 99)
    for wrong in ([60, 30], [0, 101], [-1, 5], [0, 0.5], [0, 30, 60]):
        with pytest.raises(UserError, match=r"timestep_range"):
            encdiff(timestep_range=wrong)


def test_known_tokens_are_used_for_themselves_alone():
    model = encdiff().eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 50])
    tokens, others = torch.randn(2, 2, 4, 8).unbind()
    expected = [model.apply_model(x, t, given) for given in (tokens, others)]
    with model.conditioned_on(tokens):
        assert torch.equal(model.apply_model(x, t, tokens), expected[0])
        assert torch.equal(model.apply_model(x, t, others), expected[1])
        with model.conditioned_on(others):
            assert torch.equal(model.apply_model(x, t, others), expected[1])
        assert torch.equal(model.apply_model(x, t, tokens), expected[0])
    assert not torch.equal(*expected)


def test_kept_latents_refuse_a_random_first_stage():
    stage = {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {
            "embed_dim": 3,
            "ddconfig": {**DDCONFIG, "double_z": True},
            "lossconfig": {"target": "torch.nn.Identity"},
        },
    }
    with pytest.raises(UserError, match="cache_latents"):
        fit(encdiff(first_stage=stage, cache_latents=True), loader(2))


def test_kl_first_stage_and_elbo_weight():
    """Latents are drawn from the posterior, scaled; the bound's term is weighted by t."""
    stage = {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {
            "embed_dim": 3,
            "ddconfig": {**DDCONFIG, "double_z": True},
            "lossconfig": {"target": "torch.nn.Identity"},
        },
    }
    torch.manual_seed(0)
    model = encdiff(first_stage=stage, original_elbo_weight=0.3, loss_type="l2", l_simple_weight=0.5)
    fit(model, loader(2))
    x = torch.randn(3, 3, 16, 16).clamp(-1, 1)
    posterior = model.encode_first_stage(x)
    torch.manual_seed(5)
    z = model.get_first_stage_encoding(posterior)
    torch.manual_seed(5)
    torch.testing.assert_close(
        z, model.scale_factor * (posterior.mean + posterior.std * torch.randn_like(posterior.mean))
    )
    t, noise = torch.tensor([0, 40, 99]), torch.randn_like(z)
    tokens = model.get_learned_conditioning(x)
    loss, parts = model.p_losses(z, tokens, t, noise)
    error = (model.apply_model(model.q_sample(z, t, noise), t, tokens) - noise).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, 0.5 * error.mean() + 0.3 * (model.lvlb_weights[t] * error).mean())
    torch.testing.assert_close(parts["loss_simple"], error.mean())


def test_learned_logvar_is_trained_and_x0_parameterisation_agrees():
    torch.manual_seed(0)
    model = encdiff(learn_logvar=True, logvar_init=0.5)
    assert model.configure_optimizers().param_groups[0]["params"][-1] is model.logvar
    x0 = encdiff(parameterization="x0")
    z, t, noise = torch.randn(2, 3, 8, 8), torch.tensor([30, 90]), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(x0.predict_eps(x0.q_sample(z, t, noise), t, z), noise, rtol=1e-3, atol=1e-4)


def test_pictures():
    torch.manual_seed(0)
    model = encdiff(scale_by_std=False).eval()
    batch = next(iter(loader(1)))
    pictures = model.log_images(
        batch, N=4, n_row=2, ddim_steps=3, swap_images=3, plot_progressive_rows=True, plot_diffusion_rows=True,
        inpaint=True, quantize_denoised=True,
    )  # fmt: skip
    assert set(pictures) == {
        "inputs", "reconstruction", "samples", "denoise_row", "progressive_row", "diffusion_row", "samples_inpainting",
        "samples_x0_quantized", "swap",
    }  # fmt: skip
    assert pictures["swap"].shape == (1, 3, 5 * 16, 3 * 16)  # the images, then a row per token
    torch.testing.assert_close(pictures["swap"][0, :, :16, :16], pictures["inputs"][0])
    assert pictures["denoise_row"].shape == (1, 3, 2 * 16, 3 * 16)


def test_no_samples_are_drawn_unasked():
    """Rows over time are of the samples, as in LDM."""
    torch.manual_seed(0)
    model = encdiff(scale_by_std=False).eval()
    pictures = model.log_images(next(iter(loader(1))), N=2, sample=False, sample_swap=False, plot_ema=False)
    assert set(pictures) == {"inputs", "reconstruction"}


def test_pictures_by_dpm_solver(monkeypatch):
    torch.manual_seed(0)
    model = encdiff(scale_by_std=False).eval()
    batch = next(iter(loader(1)))
    only = dict(N=2, plot_denoise_rows=False, sample_swap=False, plot_ema=False)
    asked = []
    for kind in (DDIMSampler, DPMSolverSampler):

        def plan(self, S, eta, plan=kind.plan):
            asked.append((self.title, S))
            return plan(self, S, eta)

        monkeypatch.setattr(kind, "plan", plan)
    model.log_images(batch, ddim_steps=3, **only)
    model.log_images(batch, ddim_steps=3, sampler="dpm", **only)
    start, again = (torch.Generator().manual_seed(3) for _ in range(2))
    pictures = model.log_images(batch, sampler="dpm", dpm_steps=2, ddim_eta=0.0, generator=start, **only)
    assert asked == [("DDIM", 3), ("DPM-Solver++", 20), ("DPM-Solver++", 2)]
    tokens = model.get_learned_conditioning(model.get_input(batch, "image")[:2])
    latents, _ = DPMSolverSampler(model).sample(2, 2, (3, 8, 8), tokens, generator=again, verbose=False)
    torch.testing.assert_close(pictures["samples"], model.decode_first_stage(latents))
    with pytest.raises(UserError, match="sampler: expected ddim or dpm, got 'dmp'"):
        model.log_images(batch, sampler="dmp", **only)


def test_vq_interface_decodes_through_the_codebook():
    torch.manual_seed(0)
    model = VQModelInterface(DDCONFIG, {"target": "torch.nn.Identity"}, n_embed=16, embed_dim=3).eval()
    x = torch.randn(2, 3, 16, 16).clamp(-1, 1)
    h = model.encode(x)
    flat = h.permute(0, 2, 3, 1).reshape(-1, 1, 3)
    nearest = (flat - model.quantize.embedding.weight[None]).square().sum(-1).argmin(1)
    torch.testing.assert_close(model.decode(h), model.decode_code(nearest.reshape(2, 8, 8)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x)[0], model.decode(h))
    assert not torch.allclose(model.decode(h, force_not_quantize=True), model.decode(h))


def test_unet_without_condition():
    net = UNetModel(8, 3, 32, 3, 1, [1], channel_mult=[1], num_heads=4)
    assert net(torch.zeros(1, 3, 8, 8), torch.zeros(1)).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("vq_interface", [False, True])
def test_quantised_latents_of_first_stages_without_codebook(vq_interface):
    """The identity gives latents back; a KL-regularised first stage has no codes to offer."""
    model = encdiff(scale_by_std=False).eval()
    model.first_stage_model = IdentityFirstStage(vq_interface)
    z = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model.quantize_latent(z), z)
    model.first_stage_model = torch.nn.Identity()
    with pytest.raises(UserError, match="Identity has no codebook"):
        model.quantize_latent(z)


class ScaledPrecision(MixedPrecision):
    """Mixed precision with a gradient scaler, as for float16, on the CPU."""

    def __init__(self) -> None:
        super().__init__("bf16-mixed", "cpu")
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_scaled_gradients_are_clipped_after_unscaling(clip):
    """Both optimisers under a gradient scaler; clipping by value bounds what the optimisers see."""
    seen: list[float] = []

    class Watched(VQModel):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            seen.append(max(float(p.grad.abs().max()) for group in optimizer.param_groups for p in group["params"]))

    torch.manual_seed(0)
    loss = {"target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": {**LOSS, "disc_start": 0}}
    model = Watched(DDCONFIG, loss, n_embed=16, embed_dim=3)
    model.learning_rate, model.gradient_clip_val, model.gradient_clip_algorithm = 1e-4, clip, "value"
    trainer = fit(model, loader(2), plugins=[ScaledPrecision()])
    assert trainer.global_step == 2 and len(seen) == 4
    if clip is None:
        assert 1e-3 < max(seen) < 100, "unscaled, and larger than the limit of the other case"
    else:
        assert max(seen) == pytest.approx(clip)


def test_what_ddp_need_not_send():
    """Each process counts its own codes; LPIPS's weights, which are buffers, never change."""
    model = VQModel(DDCONFIG, {"target": "torch.nn.Identity"}, embed_dim=3, n_embed=16)
    assert "codes_used" in model._ddp_params_and_buffers_to_ignore
    model.loss = nn.Module()
    model.loss.perceptual_loss = nn.BatchNorm1d(2, affine=False)
    model.finish(None, ())
    ignored = model._ddp_params_and_buffers_to_ignore
    assert {"loss.perceptual_loss.running_mean", "loss.perceptual_loss.running_var"} < set(ignored)
    assert set(ignored) <= {name for name, _ in model.named_buffers()}
