"""Networks against plain references written here."""

import math

import pytest
import torch
from torch.nn import functional as F

from ldm.modules.attention import CrossAttention, SpatialTransformer
from ldm.modules.diffusionmodules import model, openaimodel
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.encoders.concept import ConceptEncoder, Encoder4, TokenMLPs
from ldm.util import UserError

UNET = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_heads": 4,
    "context_dim": 6,
    "latent_unit": 5,
}


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """With random weights everywhere, also where they start at zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    return module


def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    layer = CrossAttention(12, 7, heads=3, dim_head=4).double()
    x, context = torch.randn(2, 5, 12).double(), torch.randn(2, 6, 7).double()
    out = torch.zeros(2, 5, 12).double()
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    for b in range(2):
        for head in range(3):
            part = slice(4 * head, 4 * head + 4)
            for row in range(5):
                scores = torch.stack([q[b, row, part] @ k[b, n, part] / math.sqrt(4) for n in range(6)])
                weights = scores.exp() / scores.exp().sum()
                out[b, row, part] = sum(weights[n] * v[b, n, part] for n in range(6))
    torch.testing.assert_close(layer(x, context), layer.to_out(out))


def test_spatial_transformer_starts_as_identity_and_ignores_the_order_of_tokens():
    torch.manual_seed(0)
    layer = SpatialTransformer(32, 4, 8, context_dim=6)
    x, context = torch.randn(2, 32, 4, 4), torch.randn(2, 5, 6)
    torch.testing.assert_close(layer(x, context), x)
    randomised(layer)
    permuted = context[:, [3, 0, 4, 1, 2]]
    torch.testing.assert_close(layer(x, context), layer(x, permuted), rtol=1e-4, atol=1e-4)
    assert (layer(x, context) - layer(x, context + 1)).abs().max() > 1e-3


def test_token_mlps_in_one_pass_equal_a_loop():
    torch.manual_seed(0)
    encoder = Encoder4(d=8, context_dim=6, latent_unit=5, image_size=32).double()
    scalars = torch.randn(7, 5).double()
    expected = torch.stack([encoder.net[k](scalars[:, k : k + 1]) for k in range(5)], dim=1)
    torch.testing.assert_close(encoder.warp(scalars), expected)
    # A token depends on its own scalar only.
    moved = scalars.clone()
    moved[:, 2] += 1
    changed = (encoder.warp(moved) - encoder.warp(scalars)).abs().amax(dim=(0, 2)) > 0
    assert changed.tolist() == [False, False, True, False, False]


class OwnMLPs(TokenMLPs):
    """Token MLPs of a user: nested, normalised, residual, with statistics and a parameter of their own."""

    def __init__(self, latent_unit: int, context_dim: int, width: int = 7) -> None:
        self.width = width
        super().__init__(latent_unit, context_dim)

    def mlp(self) -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Linear(1, self.width, bias=False),
            torch.nn.SiLU(),
            torch.nn.Sequential(torch.nn.Linear(self.width, self.width), torch.nn.LayerNorm(self.width)),
            Residual(self.width),
            torch.nn.BatchNorm1d(self.width),
            torch.nn.Linear(self.width, self.context_dim),
        )


class Residual(torch.nn.Linear):
    """A linear layer that is not only that."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


@pytest.mark.usefixtures("own_classes")
def test_own_token_mlps_override_one_method():
    torch.manual_seed(0)
    node = {"target": f"{__name__}.OwnMLPs", "params": {"latent_unit": 5, "context_dim": 6, "width": 9}}
    encoder = Encoder4(d=8, context_dim=6, latent_unit=5, image_size=16, tokens_config=node).double()
    scalars = torch.randn(7, 5).double()
    tokens = encoder.warp(scalars)
    tokens.square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.net.parameters())
    expected = torch.stack([encoder.net[k](scalars[:, k : k + 1]) for k in range(5)], dim=1)
    torch.testing.assert_close(tokens, expected)
    assert encoder.net[0][0].weight.shape == (9, 1)


class OwnEncoder(ConceptEncoder):
    """A user's encoder."""

    def image_network(self, outputs: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(self.num_channels * self.image_size**2, outputs))


def test_own_encoder_overrides_one_method():
    encoder = OwnEncoder(context_dim=6, latent_unit=5, image_size=16)
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(encoder.encoding(image), encoder.encoder(image))
    assert encoder(image).shape == (2, 5, 6)


def test_encoder_takes_multiples_of_16():
    for size in (16, 48):
        encoder = Encoder4(d=8, context_dim=6, latent_unit=5, image_size=size)
        assert encoder(torch.zeros(2, 3, size, size)).shape == (2, 5, 6)
        with pytest.raises(ValueError, match="image_size"):
            encoder(torch.zeros(2, 3, size + 16, size + 16))
    with pytest.raises(ValueError, match="image_size: expected a multiple of 16, got 40"):
        Encoder4(d=8, context_dim=6, latent_unit=5, image_size=40)


@pytest.mark.parametrize("updown", [True, False])
@pytest.mark.parametrize("scale_shift", [True, False])
def test_unet(updown, scale_shift):
    net = UNetModel(**UNET, resblock_updown=updown, use_scale_shift_norm=scale_shift)
    x, t, tokens = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 6)
    assert (net(x, t, tokens) == 0).all()  # the last convolution starts at zero
    randomised(net)
    out = net(x, t, tokens)
    assert out.shape == x.shape
    torch.testing.assert_close(net(x, t, tokens.flatten(1)), out)
    assert (net(x, t + 1, tokens) - out).abs().max() > 1e-4
    for k in range(5):
        moved = tokens.clone()
        moved[:, k] += 1
        assert (net(x, t, moved) - out).abs().max() > 1e-4


def test_unet_refuses_what_does_not_fit():
    for wrong, message in (
        ({"num_heads": -1}, "num_heads"),
        ({"num_heads": 5}, "5 heads"),
        ({"image_size": 9}, "image_size: expected a multiple of 2"),
        ({"model_channels": 40}, "multiple of 32"),
        ({"use_spatial_transformer": False}, "use_spatial_transformer"),
    ):
        with pytest.raises(ValueError, match=message):
            UNetModel(**{**UNET, **wrong})
    net = UNetModel(**UNET)
    x, t = torch.zeros(2, 3, 8, 8), torch.zeros(2)
    for tokens in (None, torch.zeros(2, 4, 6), torch.zeros(2, 5, 7)):
        with pytest.raises(ValueError, match="token"):
            net(x, t, tokens)


@pytest.mark.parametrize("updown", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_unet_gradient_equals_finite_differences(updown):
    """Along a random direction of every parameter, of the latent and of the tokens, and of all of them together."""
    torch.manual_seed(0)
    options = {"resblock_updown": updown, "use_scale_shift_norm": updown, "attention_resolutions": [1, 2]}
    net = randomised(UNetModel(**{**UNET, **options, "image_size": 4})).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    t, noise = torch.tensor([40, 700]), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    leaves = {**dict(net.named_parameters()), "x": x, "tokens": tokens}

    def loss() -> torch.Tensor:
        return (net(x, t, tokens) - noise).square().mean()

    gradients = dict(zip(leaves, torch.autograd.grad(loss(), list(leaves.values())), strict=True))
    steps = {name: torch.randn_like(leaf) for name, leaf in leaves.items()}
    step = 1e-5

    @torch.no_grad()
    def slope(names: list[str]) -> float:
        values = []
        for sign in (1, -1):
            for name in names:
                leaves[name].add_(steps[name], alpha=sign * step)
            values.append(loss().item())
            for name in names:
                leaves[name].sub_(steps[name], alpha=sign * step)
        return (values[0] - values[1]) / (2 * step)

    for names in [[name] for name in leaves] + [list(leaves)]:
        expected = sum((gradients[name] * steps[name]).sum().item() for name in names)
        # The gradient of a bias before a norm is 0 but for rounding.
        assert slope(names) == pytest.approx(expected, rel=1e-5, abs=1e-8), names


def test_timestep_embedding_by_hand():
    found = timestep_embedding(torch.tensor([7.0]), 5)[0]
    second = 7 * math.exp(-math.log(10000) / 2)
    expected = torch.tensor([math.cos(7), math.cos(second), math.sin(7), math.sin(second), 0.0])
    torch.testing.assert_close(found, expected)


def test_first_stage_shapes_and_attention():
    config = {
        "ch": 32,
        "out_ch": 3,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [8],
        "in_channels": 3,
        "resolution": 16,
        "z_channels": 4,
    }
    encoder, decoder = Encoder(**config, double_z=True), Decoder(**config)
    z = encoder(torch.randn(2, 3, 16, 16))
    assert z.shape == (2, 8, 8, 8)
    assert decoder(z[:, :4]).shape == (2, 3, 16, 16)
    assert len(encoder.down[1].attn) == 1 and len(encoder.down[0].attn) == 0
    assert len(decoder.up[1].attn) == 2 and len(decoder.up[1].block) == 2


def test_gaussian_kl_against_torch():
    torch.manual_seed(0)
    posterior = DiagonalGaussianDistribution(torch.randn(3, 8, 2, 2))
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    standard = torch.distributions.Normal(torch.zeros_like(posterior.mean), torch.ones_like(posterior.mean))
    expected = torch.distributions.kl_divergence(normal, standard).sum(dim=(1, 2, 3))
    torch.testing.assert_close(posterior.kl(), expected)
    generator = torch.Generator().manual_seed(5)
    draws = torch.stack([posterior.sample(generator) for _ in range(4000)])
    assert ((draws.mean(0) - posterior.mean).abs() < 6 * posterior.std / math.sqrt(4000)).all()


def plain_convolution(x: torch.Tensor, layer: torch.nn.Conv2d, stride: int) -> torch.Tensor:
    """A 3×3 convolution of a padded image (b, c, h, w), position by position."""
    b, _, height, width = x.shape
    rows, columns = (height - 3) // stride + 1, (width - 3) // stride + 1
    out = x.new_zeros(b, layer.out_channels, rows, columns)
    for i in range(rows):
        for j in range(columns):
            patch = x[:, :, i * stride : i * stride + 3, j * stride : j * stride + 3]
            out[:, :, i, j] = patch.flatten(1) @ layer.weight.flatten(1).t() + layer.bias
    return out


def doubled(x: torch.Tensor) -> torch.Tensor:
    """Every position twice in both directions."""
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def test_resampling_of_the_unet():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6).double()
    halves = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    torch.testing.assert_close(openaimodel.Downsample(4, False)(x), halves)
    torch.testing.assert_close(openaimodel.Upsample(4, False)(x), doubled(x))
    down, up = openaimodel.Downsample(4, True).double(), openaimodel.Upsample(4, True).double()
    torch.testing.assert_close(down(x), plain_convolution(F.pad(x, (1, 1, 1, 1)), down.op, 2))
    torch.testing.assert_close(up(x), plain_convolution(F.pad(doubled(x), (1, 1, 1, 1)), up.conv, 1))


def test_resampling_of_the_first_stage():
    """Halving pads on the right and at the bottom only."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6).double()
    down, up = model.Downsample(4).double(), model.Upsample(4).double()
    torch.testing.assert_close(down(x), plain_convolution(F.pad(x, (0, 1, 0, 1)), down.conv, 2))
    torch.testing.assert_close(up(x), plain_convolution(F.pad(doubled(x), (1, 1, 1, 1)), up.conv, 1))


@pytest.mark.parametrize("direction", ["up", "down"])
def test_resampling_inside_a_residual_block(direction):
    """The map is resampled after the first activation, on both paths through the block (guided-diffusion)."""
    torch.manual_seed(0)
    block = randomised(openaimodel.ResBlock(32, 8, 0.0, 32, True, direction)).double()
    x, emb = torch.randn(2, 32, 4, 4).double(), torch.randn(2, 8).double()

    def resample(h: torch.Tensor) -> torch.Tensor:
        return doubled(h) if direction == "up" else F.avg_pool2d(h, 2)

    first, last, out = block.in_layers[2], block.out_layers[3], block.out_layers[0]
    h = resample(F.silu(F.group_norm(x, 32, block.in_layers[0].weight, block.in_layers[0].bias)))
    h = plain_convolution(F.pad(h, (1, 1, 1, 1)), first, 1)
    scale, shift = block.emb_layers[1](F.silu(emb))[:, :, None, None].chunk(2, dim=1)
    h = F.silu(F.group_norm(h, 32, out.weight, out.bias) * (1 + scale) + shift)
    h = plain_convolution(F.pad(h, (1, 1, 1, 1)), last, 1)
    torch.testing.assert_close(block(x, emb), resample(x) + h)


def test_attention_that_no_level_has_is_told(caplog):
    sizes = {"image_size": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1}
    UNetModel(**sizes, attention_resolutions=[1, 2], channel_mult=[1, 2], num_heads=4, context_dim=8)
    assert not caplog.text
    UNetModel(**sizes, attention_resolutions=[2, 4, 8], channel_mult=[1, 2], num_heads=4, context_dim=8)
    assert "no map is smaller by a factor of 4 or 8, with the 2 levels of channel_mult" in caplog.text


def test_heads_of_a_width_that_does_not_fit_are_refused():
    sizes = {"image_size": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1}
    with pytest.raises(UserError, match="num_head_channels: 32 channels cannot be divided into heads of 24"):
        UNetModel(**sizes, attention_resolutions=[1], channel_mult=[1], num_head_channels=24, context_dim=8)


class Unsized(torch.nn.Module):
    """Tokens that do not say how many they are."""


def test_own_tokens_say_how_many_they_are(own_classes):
    node = {"target": f"{__name__}.Unsized"}
    with pytest.raises(UserError, match=r"tokens_config\.target: Unsized has no attribute 'latent_unit'"):
        Encoder4(d=8, context_dim=6, latent_unit=5, image_size=16, tokens_config=node)
