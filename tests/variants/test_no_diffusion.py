"""EncDec w/o Diff: tokens alone decide, in one pass."""

import pytest
import torch
from command_line import IMAGE_SIZE, encdiff_config
from torch import nn

from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.variants.no_diffusion import DecoderUNet, NoDiffusion

SETTINGS = {
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [1, 2],
    "channel_mult": [1, 2],
    "num_heads": 4,
    "context_dim": 8,
    "latent_unit": 4,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
}


def randomised(module: nn.Module) -> nn.Module:
    """With random weights everywhere, also where they start at zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.1)
    return module


@pytest.fixture
def model(tmp_path) -> NoDiffusion:
    params = encdiff_config(tmp_path)["model"]["params"]
    params["first_stage_config"]["params"]["ckpt_path"] = None
    params["unet_config"]["target"] = "ldm.variants.no_diffusion.DecoderUNet"
    model = NoDiffusion(**{**params, "loss_type": "l2"}).eval()
    randomised(model.model)
    return model


def test_the_loss_knows_neither_timestep_nor_noise(model):
    x, tokens = torch.randn(3, 3, 8, 8), torch.randn(3, 4, 8)
    first, _ = model.p_losses(x, tokens, torch.tensor([0, 5, 99]), torch.randn_like(x))
    again, losses = model.p_losses(x, tokens, torch.tensor([7, 7, 7]), torch.zeros_like(x))
    assert torch.equal(first, again)
    decoded = model.apply_model(torch.zeros_like(x), torch.zeros(3, dtype=torch.long), tokens)
    torch.testing.assert_close(first, ((decoded - x) ** 2).mean())
    assert set(losses) == {"loss_simple", "loss"}
    image = torch.rand(3, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1
    losses = [model(x, image, torch.Generator().manual_seed(seed))[0] for seed in (1, 2)]
    assert torch.equal(*losses)


def test_only_the_tokens_are_decoded(model):
    unet, tokens = model.model.diffusion_model, torch.randn(2, 4, 8)
    out = unet(torch.randn(2, 3, 8, 8), torch.tensor([3, 9]), tokens)
    assert torch.equal(out, unet(torch.randn(2, 3, 8, 8), torch.tensor([50, 1]), tokens))
    for k in range(4):
        moved = tokens.clone()
        moved[:, k] += 1
        assert (unet(torch.zeros(2, 3, 8, 8), torch.zeros(2).long(), moved) - out).abs().max() > 1e-4
    with pytest.raises(ValueError, match="no concept tokens"):
        unet(torch.zeros(2, 3, 8, 8), torch.zeros(2).long())


def test_a_weight_per_timestep_is_refused(tmp_path):
    with pytest.raises(ValueError, match="learn_logvar: without diffusion"):
        NoDiffusion(**encdiff_config(tmp_path)["model"]["params"], learn_logvar=True)


def test_the_decoder_half_is_what_is_left():
    whole, half = UNetModel(**SETTINGS), DecoderUNet(**SETTINGS)
    assert not [name for name, _ in half.named_parameters() if name.startswith(("input_blocks", "time_embed"))]
    assert not [name for name, _ in half.named_parameters() if "emb_layers" in name]
    assert half.start.shape == (1, 64, 4, 4), "the lowest resolution"

    def cross(unet) -> list[str]:
        modules = (*unet.middle_block.named_modules(), *unet.output_blocks.named_modules())
        return [name for name, m in modules if isinstance(m, CrossAttention) and name.endswith("attn2")]

    assert cross(half) == cross(whole), "cross attention is kept"
    for block, kept in zip(whole.output_blocks, half.output_blocks, strict=True):
        a, b = block[0], kept[0]
        assert a.out_layers[3].weight.shape == b.out_layers[3].weight.shape
        assert b.in_layers[2].weight.shape[1] < a.in_layers[2].weight.shape[1], "no skip connections"
    out = randomised(half)(torch.zeros(2, 3, 8, 8), torch.zeros(2).long(), torch.randn(2, 4, 8))
    assert out.shape == (2, 3, 8, 8)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in half.parameters()), "nothing is idle"


def test_sampling_is_one_pass(model):
    tokens = torch.randn(2, 4, 8)
    once = model.apply_model(torch.zeros(2, 3, 8, 8), torch.zeros(2).long(), tokens)
    for steps in (1, 50):
        latents, way = model.sampler().sample(steps, 2, (3, 8, 8), tokens, 1.0, torch.randn(2, 3, 8, 8))
        assert torch.equal(latents, once) and torch.equal(way["pred_x0"][-1], once)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    known = torch.randn(2, 3, 8, 8)
    mixed, _ = model.sampler().sample(1, 2, (3, 8, 8), tokens, mask=mask, x0=known)
    assert torch.equal(mixed[..., :4], known[..., :4]) and torch.equal(mixed[..., 4:], once[..., 4:])
