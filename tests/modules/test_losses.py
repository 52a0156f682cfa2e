"""First-stage losses against closed forms, torchmetrics and hand-made gradients."""

import pytest
import torch
import torchvision
from torch.nn import functional as F
from torchmetrics.functional.image.lpips import _LPIPS

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.adversarial import hinge_d_loss, vanilla_d_loss
from ldm.modules.losses.contperceptual import LPIPSWithDiscriminator
from ldm.modules.losses.lpips import BACKBONES, LPIPS
from ldm.modules.losses.vqperceptual import VQLPIPSWithDiscriminator

SMALL = {"disc_num_layers": 2, "disc_ndf": 8, "perceptual_weight": 0.0}


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A file of VGG16's layout with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(torchvision.models.vgg16(weights=None).features.state_dict(prefix="features."), path)
    return path


def images(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1, torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_lpips_equals_torchmetrics(vgg, tmp_path, backbone):
    """The same backbone, the heads that torchmetrics ships."""
    path = vgg
    if backbone == "alex":
        path = tmp_path / "alexnet.pth"
        torch.save(torchvision.models.alexnet(weights=None).features.state_dict(prefix="features."), path)
    ours, theirs = LPIPS(path, backbone=backbone), _LPIPS(pretrained=True, net=backbone, pnet_rand=True)
    weights = torch.load(path, weights_only=True)
    state = theirs.state_dict()
    for name in list(state):
        layer = name.split(".")
        if layer[0] == "net" and f"features.{layer[-2]}.{layer[-1]}" in weights:
            state[name] = weights[f"features.{layer[-2]}.{layer[-1]}"]
    theirs.load_state_dict(state)
    a, b = images()
    torch.testing.assert_close(ours(a, b), theirs.eval()(a, b), rtol=1e-4, atol=1e-6)
    assert ours(a, a).abs().max() == 0
    assert not list(ours.parameters()) and not ours.state_dict()


def test_without_the_perceptual_loss_no_weights_are_read():
    assert VQLPIPSWithDiscriminator(0, **SMALL).perceptual_loss is None


def test_discriminator_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge_d_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.5))
    expected = 0.5 * (F.binary_cross_entropy_with_logits(real, torch.ones(2)) + F.binary_cross_entropy_with_logits(
        fake, torch.zeros(2)))  # fmt: skip
    assert vanilla_d_loss(real, fake).item() == pytest.approx(expected.item())


def test_vq_loss_adds_up_and_starts_the_discriminator():
    torch.manual_seed(0)
    loss = VQLPIPSWithDiscriminator(5, codebook_weight=2.0, disc_weight=0.75, **SMALL)
    x, noise = images()
    layer = torch.nn.Parameter(torch.full((3, 1, 1), 0.9))
    codebook = torch.tensor(0.3)

    def run(step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return loss.generator_loss(codebook, x, noise * layer, step, layer)

    before, parts = run(4)
    l1 = (x - noise * layer).abs().mean()
    assert before.item() == pytest.approx((l1 + 0.6).item()) and parts["disc_factor"] == 0
    after, parts = run(5)
    g_loss = -loss.discriminator(noise * layer).mean()
    (nll_grad,), (g_grad,) = torch.autograd.grad(l1, layer), torch.autograd.grad(g_loss, layer)
    weight = 0.75 * nll_grad.norm() / (g_grad.norm() + 1e-4)
    assert parts["d_weight"].item() == pytest.approx(weight.item(), rel=1e-3)
    assert after.item() == pytest.approx((l1 + 0.6 + weight * g_loss).item(), rel=1e-3)
    assert loss.discriminator_loss(x, noise, 4)[0] == 0
    expected = hinge_d_loss(loss.discriminator(x), loss.discriminator(noise))
    assert loss.discriminator_loss(x, noise, 5)[0].item() == pytest.approx(expected.item(), rel=1e-4)


def test_perceptual_term(vgg):
    loss = VQLPIPSWithDiscriminator(
        0, disc_factor=0.0, perceptual_weight=0.5, perceptual_weights=str(vgg), pixel_loss="l2"
    )
    x, y = images()
    total, parts = loss.generator_loss(torch.tensor(0.0), x, y, 0, torch.zeros(1))
    expected = (x - y).square().mean() + 0.5 * LPIPS(vgg)(x, y).mean()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.discriminator is None and "g_loss" not in parts


def test_kl_loss_by_hand():
    torch.manual_seed(0)
    loss = LPIPSWithDiscriminator(0, logvar_init=0.4, kl_weight=1e-2, disc_factor=0.0, perceptual_weight=0.0)
    x, y = images()
    posterior = DiagonalGaussianDistribution(torch.randn(2, 6, 4, 4))
    total, _ = loss.generator_loss(posterior, x, y, 0, torch.zeros(1))
    nll = ((x - y).abs() / torch.tensor(0.4).exp() + 0.4).sum() / 2
    assert total.item() == pytest.approx((nll + 1e-2 * posterior.kl().mean()).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disc_loss": "wasserstein"}, "disc_loss"),
        ({"pixel_loss": "l3"}, "pixel_loss"),
        ({"disc_conditional": True}, "disc_conditional"),
        ({"perceptual_weight": -1.0}, "perceptual_weight"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        VQLPIPSWithDiscriminator(0, **{**SMALL, **options})
