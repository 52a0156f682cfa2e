"""The ways of computing that `ldm.modules.speed` chooses among: they give the same numbers, and leave no trace."""

import copy

import pytest
import torch

from ldm.modules.attention import CrossAttention, attend, keys_values
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.speed import Choices, apply, choose

CPU = torch.device("cpu")


def unet() -> UNetModel:
    torch.manual_seed(0)
    model = UNetModel(
        image_size=8, in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1, attention_resolutions=[1],
        channel_mult=[1, 2], num_heads=4, use_scale_shift_norm=True, resblock_updown=True, context_dim=6, latent_unit=5,
    )  # fmt: skip
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)  # what starts at zero would hide what is behind it
    return model


def inputs(size: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, tokens = torch.randn(size, 3, 8, 8, generator=generator), torch.randn(size, 5, 6, generator=generator)
    return x, torch.arange(size) * 300, tokens


@pytest.mark.parametrize("way", [Choices(channels_last=True), Choices(channels_last=True, kernels=True)])
def test_a_faster_way_gives_the_same_output_and_gradients(way):
    plain, fast = unet(), unet()
    apply(fast, way)
    assert list(fast.state_dict()) == list(plain.state_dict())
    outputs = [model(*inputs()) for model in (plain, fast)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    for output in outputs:
        output.square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert b.shape == a.shape
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_bf16_is_near():
    plain, fast = unet(), unet()
    way = Choices("bf16-mixed", channels_last=True, kernels=True)
    apply(fast, way)
    expected = plain(*inputs())
    with way.autocast(CPU):
        found = fast(*inputs())
    assert (found.float() - expected).abs().mean() < 0.04 * expected.abs().mean()


def test_apply_can_be_undone():
    model, plain = unet(), unet()
    apply(model, Choices(channels_last=True, kernels=True))
    apply(model, Choices())
    assert torch.equal(model(*inputs()), plain(*inputs()))


def test_choosing_leaves_the_model_and_the_random_numbers_alone():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Dropout(0.5))
    before, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3, 8, 8)
    state = torch.get_rng_state()
    found = choose(model, lambda: model(x).sum().backward(), CPU)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found.precision in ("32-true", "bf16-mixed") and "ms" in found.reasons and not found.compile


def test_the_fastest_way_is_chosen(monkeypatch):
    times = {("32-true", False): 3.0, ("32-true", True): 2.0, ("bf16-mixed", True): 1.0}
    monkeypatch.setattr("ldm.modules.speed._time", lambda model, way, *_: times[way.precision, way.channels_last])
    model = torch.nn.Linear(1, 1)
    assert choose(model, lambda: None, CPU).precision == "bf16-mixed"
    assert choose(model, lambda: None, CPU, allowed={"bf16": False}).channels_last
    assert not choose(model, lambda: None, CPU, allowed={"bf16": False, "channels_last": False}).channels_last
    assert choose(model, lambda: None, CPU, precision="32-true").precision == "32-true"
    times["bf16-mixed", True] = 1.9  # what a short trial saves by bf16, casting the weights would cost
    assert choose(model, lambda: None, CPU).precision == "32-true"
    several = choose(model, None, CPU)
    assert several.precision == "32-true" and "several" in several.reasons


@pytest.mark.parametrize("length", [16, 256])
def test_attention_in_half_precision_is_that_of_float32(length):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, length, 8, requires_grad=True) for _ in range(3))
    halves = [part.detach().bfloat16().requires_grad_() for part in (q, k, v)]
    expected, found = attend(q, k, v), attend(*halves)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.02)
    for output in (expected, found):
        output.float().square().sum().backward()
    for half, full in zip(halves, (q, k, v), strict=True):
        assert (half.grad.float() - full.grad).norm() < 0.03 * full.grad.norm()


def test_keys_and_values_of_all_layers_are_those_of_each():
    torch.manual_seed(0)
    layers = [CrossAttention(query_dim=dim, context_dim=6, heads=2, dim_head=dim // 2) for dim in (8, 16)]
    tokens = torch.randn(3, 5, 6)
    for place, (layer, (k, v)) in enumerate(zip(layers, keys_values(layers, tokens), strict=True)):
        torch.testing.assert_close(k, layer.to_k(tokens))
        torch.testing.assert_close(v, layer.to_v(tokens))
        layer.place = place
        x = torch.randn(3, 4, layer.to_q.in_features)
        torch.testing.assert_close(layer(x, keys_values(layers, tokens)), layer(x, tokens))


def test_keys_and_values_can_be_computed_once():
    model = unet()
    x, t, tokens = inputs()
    computed = model.keys_values(tokens)
    assert torch.equal(model(x, t, tokens, computed=computed), model(x, t, tokens))
    other = model(x, t, tokens, computed=model.keys_values(tokens + 1))
    assert not torch.allclose(other, model(x, t, tokens)), "they are what is attended to"
