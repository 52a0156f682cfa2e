"""The numbers, names and shapes of the original come out."""

import numpy as np
import pytest
import torch

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.schedule import ddim_coefficients, ddim_timesteps


def close(found: torch.Tensor, expected: np.ndarray) -> None:
    """max |a - b| <= 1e-5 * max(1, max |b|)."""
    difference = np.abs(found.detach().numpy().reshape(expected.shape) - expected).max()
    assert difference <= 1e-5 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("name", ["encdiff", "kl"])
def test_state_dict_names_shapes_and_order(name, keys, request):
    state = request.getfixturevalue(name).state_dict()
    assert list(state) == list(keys[name])
    assert {key: list(value.shape) for key, value in state.items()} == keys[name]


def test_parameter_count(encdiff):
    # Paper, Table 7, counts U-Net, encoder and first stage together; 37.47 M is the U-Net's share.
    assert sum(p.numel() for p in encdiff.model.parameters()) == 37_469_635


@torch.no_grad()
def test_first_stage(encdiff, golden, inputs):
    stage = encdiff.first_stage_model
    latent = stage.encode(inputs.uniform((2, 3, 64, 64), 1))
    close(latent, golden["vq_prequant"])
    _, loss, (_, _, indices) = stage.quantize(latent)
    assert (indices.numpy().ravel() == golden["vq_indices"].ravel()).all()
    close(loss, golden["vq_loss"])
    close(stage.decode(latent), golden["vq_decode"])


@torch.no_grad()
def test_scalars_tokens_and_noise(encdiff, golden, inputs):
    x = inputs.uniform((2, 3, 64, 64), 1)
    close(encdiff.cond_stage_model.encoding(x), golden["scalars"])
    tokens = encdiff.get_learned_conditioning(x)
    close(tokens, golden["tokens"])
    t = torch.tensor([17, 503])
    z = inputs.normal((2, 3, 16, 16), 2)
    close(encdiff.apply_model(z, t, tokens), golden["eps"])
    # The original hands tokens over flat.
    close(encdiff.apply_model(z, t, torch.from_numpy(golden["tokens"]).float()), golden["eps"])
    close(encdiff.apply_model(z.contiguous(memory_format=torch.channels_last), t, tokens), golden["eps"])


@torch.no_grad()
def test_losses(encdiff, golden, inputs):
    t, z, noise = torch.tensor([17, 503]), inputs.normal((2, 3, 16, 16), 3), inputs.normal((2, 3, 16, 16), 4)
    close(encdiff.q_sample(z, t, noise), golden["q_sample"])
    loss, parts = encdiff.p_losses(z, torch.from_numpy(golden["tokens"]).float(), t, noise)
    close(loss, golden["loss"])
    close(parts["loss_vlb"], golden["loss_vlb"])


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("betas", 1e-6),
        ("alphas_cumprod", 1e-6),
        ("posterior_variance", 1e-6),
        ("posterior_log_variance_clipped", 1e-6),
        # The original computes these in float32; itself it moves by less with the number of threads.
        ("lvlb_weights", 2e-5),
    ],
)
def test_schedule(encdiff, golden, name, tolerance):
    np.testing.assert_allclose(getattr(encdiff, name).numpy(), golden[name], rtol=tolerance)


@torch.no_grad()
def test_ddim(encdiff, golden, inputs):
    steps = ddim_timesteps(20, 1000)
    assert (steps == golden["ddim_timesteps"]).all()
    sigmas = ddim_coefficients(encdiff.alphas_cumprod.double().numpy(), steps, 1.0)[2]
    np.testing.assert_allclose(sigmas, golden["ddim_sigmas_eta1"], rtol=1e-5)
    start, tokens = inputs.normal((2, 3, 16, 16), 5), torch.from_numpy(golden["tokens"]).float()
    samples, _ = DDIMSampler(encdiff).sample(20, 2, (3, 16, 16), tokens, x_T=start, verbose=False)
    close(samples, golden["ddim_eta0"])
    close(encdiff.decode_first_stage(torch.from_numpy(golden["ddim_eta0"]).float()), golden["decoded"])


@torch.no_grad()
def test_kl_first_stage(kl, golden_kl, inputs):
    posterior = kl.encode(inputs.uniform((2, 3, 64, 64), 9))
    close(posterior.mean, golden_kl["mean"])
    close(posterior.logvar, golden_kl["logvar"])
    close(posterior.kl(), golden_kl["kl"])
    close(kl.decode(posterior.mode()), golden_kl["decode"])
