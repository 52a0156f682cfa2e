"""AdaGN: the tokens enter by group norms, not by attention."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from ldm.variants.adagn import AdaGNUNet, TokenModulation

SETTINGS = {
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [1],
    "channel_mult": [1, 2],
    "num_heads": 4,
    "context_dim": 8,
    "latent_unit": 4,
}


def build(**settings) -> AdaGNUNet:
    torch.manual_seed(0)
    model = AdaGNUNet(**SETTINGS, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


@pytest.fixture
def unet() -> AdaGNUNet:
    return build()


@pytest.mark.parametrize("modulation", ["scale_shift", "scale", "embedding"])
def test_no_attention_over_tokens_but_every_token_counts(modulation):
    contexts, unet = [], build(modulation=modulation)
    for module in unet.modules():
        if isinstance(module, CrossAttention):
            assert module.to_k.weight.shape[1] == module.to_q.weight.shape[1] != 8, "keys are of the map's width"
            module.register_forward_hook(lambda m, args, out: contexts.append(args[1] if len(args) > 1 else None))
    x, t, tokens = torch.randn(2, 3, 8, 8), torch.tensor([3, 70]), torch.randn(2, 4, 8)
    out = unet(x, t, tokens)
    assert contexts and all(context is None for context in contexts)
    for k in range(4):
        for component in range(8):
            moved = tokens.clone()
            moved[:, k, component] += 1
            changed = (unet(x, t, moved) - out).abs().amax(dim=(1, 2, 3))
            assert (changed > 1e-5).all(), (k, component)
    assert (unet(x, t + 1, tokens) - out).abs().max() > 1e-5
    swapped = tokens[:, [1, 0, 2, 3]]
    assert (unet(x, t, swapped) - out).abs().max() > 1e-4, "their order matters, unlike in attention"


@pytest.mark.parametrize("shift", [True, False])
def test_a_block_computes_diff_aes_formula(shift):
    """z_s (t_s GroupNorm(h) + t_b) + z_b, around the second convolution; z_b is 0 where the tokens only scale."""
    unet = build(modulation="scale_shift" if shift else "scale")
    block = next(module for module in unet.modules() if isinstance(module, ResBlock))
    modulation = block.emb_layers
    assert isinstance(modulation, TokenModulation)
    x, emb, tokens = torch.randn(2, 32, 8, 8), torch.randn(2, 128), torch.randn(2, 32)
    t_s, t_b = F.linear(F.silu(emb), modulation.timestep[1].weight, modulation.timestep[1].bias).chunk(2, dim=1)
    z = F.linear(F.silu(tokens), modulation.tokens[1].weight, modulation.tokens[1].bias)
    z_s, z_b = z.chunk(2, dim=1) if shift else (z, torch.zeros_like(z))
    t_s, t_b, z_s, z_b = (v[:, :, None, None] for v in (1 + t_s, t_b, 1 + z_s, z_b))
    norm, conv = block.out_layers[0], block.out_layers[3]
    h = block.in_layers(x)
    h = z_s * (t_s * F.group_norm(h, 32, norm.weight, norm.bias, norm.eps) + t_b) + z_b
    expected = x + conv(F.silu(h))
    torch.testing.assert_close(block(x, torch.cat([emb, tokens], dim=1)), expected, rtol=1e-4, atol=1e-5)


def test_tokens_of_zero_weight_leave_the_plain_block(unet):
    for module in unet.modules():
        if isinstance(module, TokenModulation):
            nn.init.zeros_(module.tokens[1].weight)
            nn.init.zeros_(module.tokens[1].bias)
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([3])
    torch.testing.assert_close(unet(x, t, torch.randn(1, 4, 8)), unet(x, t, torch.randn(1, 4, 8)))


def test_by_the_embedding_the_blocks_are_those_of_the_plain_unet():
    """The tokens move the embedded timestep, and nothing else."""
    unet = build(modulation="embedding")
    plain = UNetModel(**SETTINGS | {"context_dim": None}, use_scale_shift_norm=True)
    plain.load_state_dict({k: v for k, v in unet.state_dict().items() if not k.startswith("token_embed")})
    x, t, tokens = torch.randn(2, 3, 8, 8), torch.tensor([3, 70]), torch.randn(2, 4, 8)
    first, second = unet.token_embed[0], unet.token_embed[2]
    added = F.linear(F.silu(F.linear(tokens.reshape(2, 32), first.weight, first.bias)), second.weight, second.bias)
    plain.time_embed.register_forward_hook(lambda module, args, out: out + added)
    torch.testing.assert_close(unet(x, t, tokens), plain(x, t))


def test_errors():
    with pytest.raises(ValueError, match="modulation: expected one of scale_shift, scale, embedding, got 'film'"):
        AdaGNUNet(**SETTINGS, modulation="film")
    with pytest.raises(ValueError, match="use_scale_shift_norm: AdaGN needs true"):
        AdaGNUNet(**SETTINGS, use_scale_shift_norm=False)
    with pytest.raises(ValueError, match="expected 4 concept tokens of width 8"):
        AdaGNUNet(**SETTINGS)(torch.zeros(1, 3, 8, 8), torch.zeros(1).long(), torch.zeros(1, 5, 8))
