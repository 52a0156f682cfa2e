"""Recorded cross attention: the same output as unrecorded, and the weights that a user would compute."""

import pytest
import torch
from torch import nn

from ldm.modules.attention import AttentionMaps, BasicTransformerBlock, CrossAttention, recording
from ldm.modules.diffusionmodules.openaimodel import UNetModel


def unet(**changed) -> UNetModel:
    torch.manual_seed(0)
    settings = {"image_size": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1}
    settings |= {"attention_resolutions": [1, 2], "channel_mult": [1, 2], "num_heads": 4, "context_dim": 16}
    network = UNetModel(**{**settings, **changed}).eval()
    for parameter in network.parameters():  # the output layers start at zero
        nn.init.normal_(parameter, std=0.1)
    return network


@pytest.mark.parametrize("kernels", [False, True])
def test_recording_changes_nothing(kernels):
    network, x, t = unet(), torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    for module in network.modules():
        if hasattr(module, "kernels"):
            module.kernels = kernels
    tokens = torch.randn(2, 5, 16)
    with torch.no_grad():
        plain = network(x, t, tokens)
        with recording(network) as maps:
            recorded = network(x, t, tokens)
        again = network(x, t, tokens)
    torch.testing.assert_close(recorded, plain, rtol=0, atol=1e-5 * plain.abs().max().item())
    assert torch.equal(again, plain)
    found = maps.mean(32)
    assert found is not None and found.shape == (2, 5, 32, 32)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2, 32, 32))


def test_under_autocast():
    """As at validation of a run in bfloat16: what is recorded is float32."""
    network, x, t, tokens = unet(), torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = network(x, t, tokens)
        with recording(network) as maps:
            recorded = network(x, t, tokens)
        found = maps.mean(16)
    assert found is not None and found.dtype == torch.float32
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2, 16, 16))
    torch.testing.assert_close(recorded, plain, rtol=0, atol=0.05 * plain.abs().max().item())


def test_the_weights_are_those_of_the_formula():
    torch.manual_seed(0)
    block = BasicTransformerBlock(32, 4, 8, context_dim=16)
    layer, x, tokens = block.attn2, torch.randn(2, 64, 32), torch.randn(2, 5, 16)
    inside = nn.ModuleList([block])
    with torch.no_grad(), recording(inside) as maps:
        layer(x, tokens)
        layer(2 * x, tokens)
    expected = torch.zeros(2, 64, 5)
    for query in (x, 2 * x):
        q, k = layer.to_q(query).view(2, 64, 4, 8), layer.to_k(tokens).view(2, 5, 4, 8)
        expected += torch.einsum("blhd,bnhd->bhln", q, k).div(8**0.5).softmax(-1).mean(1) / 2
    found = maps.mean(8)
    assert found is not None
    torch.testing.assert_close(found, expected.transpose(1, 2).reshape(2, 5, 8, 8), atol=1e-6, rtol=1e-5)


def test_self_attention_is_not_recorded():
    layer = CrossAttention(16, heads=2, dim_head=8)
    maps = AttentionMaps()
    layer.record = lambda weights: maps.add(0, weights)
    layer(torch.randn(1, 4, 16))
    assert maps.mean(4) is None


def test_an_error_ends_the_recording():
    network = unet()
    with pytest.raises(ValueError, match="concept tokens"), recording(network):
        network(torch.randn(1, 3, 8, 8), torch.tensor([1]))
    assert all(layer.record is None for layer in network.cross_attentions)


def test_a_token_changes_more_where_it_is_attended_to():
    """Another token in place of one: the layer's output moves where the map says, and not by another token's map."""
    torch.manual_seed(0)
    block = BasicTransformerBlock(32, 4, 8, context_dim=16)
    layer, x, tokens = block.attn2, 3 * torch.randn(64, 16, 32), torch.randn(64, 5, 16)
    with torch.no_grad(), recording(nn.ModuleList([block])) as maps:
        before = layer(x, tokens)
    changes = []
    for number in range(5):
        other = tokens.clone()
        other[:, number] = tokens.roll(1, 0)[:, number]
        with torch.no_grad():
            changes.append((layer(x, other) - before).norm(dim=-1))
    change, found = torch.stack(changes, dim=1), maps.mean(4)
    assert found is not None
    correlations = [
        torch.corrcoef(torch.stack([change.flatten(), found.roll(shift, 1).flatten()]))[0, 1] for shift in range(5)
    ]
    assert correlations[0] > 0.3 and max(correlations[1:]) < 0.1, correlations
