"""The original's numbers, names and shapes come out, in every way in which they can be computed.

Tokens are made by one batched pass and attention is PyTorch's fused one, unless a test does otherwise.
"""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.schedule import ddim_coefficients, ddim_timesteps

# How attention is computed, how maps lie in memory, with how many threads.
WAYS: dict[str, tuple[list[SDPBackend] | None, torch.memory_format, int]] = {
    "as shipped": (None, torch.contiguous_format, 1),
    "fused attention": ([SDPBackend.FLASH_ATTENTION], torch.contiguous_format, 1),
    "plain attention": ([SDPBackend.MATH], torch.contiguous_format, 1),
    "channels-last": (None, torch.channels_last, 1),
    "channels-last, fused attention": ([SDPBackend.FLASH_ATTENTION], torch.channels_last, 1),
    "two threads": (None, torch.contiguous_format, 2),
}


class Way:
    """One way of computing: prepares models and inputs.

    Attributes:
        format: how maps of four dimensions lie in memory.
    """

    def __init__(self, memory_format: torch.memory_format) -> None:
        self.format = memory_format
        self.made: dict[int, Any] = {}

    def __call__(self, value: Any) -> Any:
        """A model (a copy, made once) or a tensor in this way's memory format."""
        if isinstance(value, torch.nn.Module):
            if self.format == torch.contiguous_format:
                return value
            return self.made.setdefault(id(value), copy.deepcopy(value).to(memory_format=self.format))
        return value.contiguous(memory_format=self.format)


@pytest.fixture(scope="module", params=WAYS)
def way(request) -> Iterator[Way]:
    backends, memory_format, threads = WAYS[request.param]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with nullcontext() if backends is None else sdpa_kernel(backends):
        yield Way(memory_format)
    torch.set_num_threads(before)


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
def test_first_stage(encdiff, golden, inputs, way):
    stage = way(encdiff).first_stage_model
    latent = stage.encode(way(inputs.uniform((2, 3, 64, 64), 1)))
    close(latent, golden["vq_prequant"])
    _, loss, (_, _, indices) = stage.quantize(latent)
    assert (indices.numpy().ravel() == golden["vq_indices"].ravel()).all()
    close(loss, golden["vq_loss"])
    close(stage.decode(latent), golden["vq_decode"])


@torch.no_grad()
def test_scalars_tokens_and_noise(encdiff, golden, inputs, way):
    model, x = way(encdiff), way(inputs.uniform((2, 3, 64, 64), 1))
    scalars = model.cond_stage_model.encoding(x)
    close(scalars, golden["scalars"])
    tokens = model.get_learned_conditioning(x)
    close(tokens, golden["tokens"])
    # One MLP after another, as the original has it, instead of all in one pass.
    one_by_one = [net(scalars[:, k : k + 1]) for k, net in enumerate(model.cond_stage_model.net)]
    close(torch.cat(one_by_one, dim=1), golden["tokens"])
    t = torch.tensor([17, 503])
    z = way(inputs.normal((2, 3, 16, 16), 2))
    close(model.apply_model(z, t, tokens), golden["eps"])
    # The original passes tokens flat.
    close(model.apply_model(z, t, torch.from_numpy(golden["tokens"]).float()), golden["eps"])


@torch.no_grad()
def test_losses(encdiff, golden, inputs, way):
    model, t = way(encdiff), torch.tensor([17, 503])
    z, noise = way(inputs.normal((2, 3, 16, 16), 3)), way(inputs.normal((2, 3, 16, 16), 4))
    close(model.q_sample(z, t, noise), golden["q_sample"])
    loss, parts = model.p_losses(z, torch.from_numpy(golden["tokens"]).float(), t, noise)
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
@pytest.mark.slow
def test_ddim(encdiff, golden, inputs, way):
    model, steps = way(encdiff), ddim_timesteps(20, 1000)
    assert (steps == golden["ddim_timesteps"]).all()
    sigmas = ddim_coefficients(model.alphas_cumprod.double().numpy(), steps, 1.0)[2]
    np.testing.assert_allclose(sigmas, golden["ddim_sigmas_eta1"], rtol=1e-5)
    start, tokens = way(inputs.normal((2, 3, 16, 16), 5)), torch.from_numpy(golden["tokens"]).float()
    samples, _ = DDIMSampler(model).sample(20, 2, (3, 16, 16), tokens, x_T=start, verbose=False)
    close(samples, golden["ddim_eta0"])
    close(model.decode_first_stage(way(torch.from_numpy(golden["ddim_eta0"]).float())), golden["decoded"])
    close(model.decode_first_stage(samples), golden["decoded"])


@torch.no_grad()
def test_kl_first_stage(kl, golden_kl, inputs, way):
    model = way(kl)
    posterior = model.encode(way(inputs.uniform((2, 3, 64, 64), 9)))
    close(posterior.mean, golden_kl["mean"])
    close(posterior.logvar, golden_kl["logvar"])
    close(posterior.kl(), golden_kl["kl"])
    close(model.decode(posterior.mode()), golden_kl["decode"])


def test_every_golden_array_is_compared(golden, golden_kl):
    """By name, so that none is forgotten."""
    text = Path(__file__).read_text()
    assert all(f'"{name}"' in text for name in [*golden, *golden_kl])
