"""Muon against the formula on singular values, PyTorch's own Muon and AdamW; optimisers named in a configuration."""

import copy

import pytest
import torch
from torch import nn

from ldm.optimizers import Muon, build_optimizer, checked_optimizer, orthogonalize
from ldm.util import UserError


def weights(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def train(optimizer, parameters, steps=3, seed=1):
    """Steps with gradients that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_singular_values_become_one_and_vectors_stay(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    result = orthogonalize(matrices)
    for matrix, found in zip(matrices, result, strict=True):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        x = s / s.norm()
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
        torch.testing.assert_close(found, u @ x.diag() @ vh)
        assert x[s > 0.05 * s.norm()].min() > 0.6 and x.max() < 1.25
    assert not orthogonalize(torch.zeros(1, 2, 3)).any()


def test_matrices_step_as_by_pytorchs_muon():
    """Which computes in bf16: the steps have nearly the same direction and size."""
    (ours,), (theirs,) = weights((32, 96)), weights((32, 96))
    start = ours.detach().clone()
    train(Muon([ours], lr=0.02, weight_decay=0.1), [ours])
    muon = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    train(muon, [theirs])
    a, b = (ours.detach() - start).flatten(), (theirs.detach() - start).flatten()
    assert torch.cosine_similarity(a, b, dim=0) > 0.99 and a.norm() / b.norm() == pytest.approx(1, abs=0.02)


def test_everything_else_steps_as_by_adamw():
    shapes = ((32,), (8, 64), (3, 32, 3, 3), (1,))
    ours, theirs = weights(*shapes), weights(*shapes)
    train(Muon(ours, lr=0.02, betas=(0.8, 0.99), weight_decay=0.1), ours)
    train(torch.optim.AdamW(theirs, lr=0.02, betas=(0.8, 0.99), weight_decay=0.1), theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_smallest_says_whose_a_matrix_is():
    shapes = ((20, 64), (64, 20), (24, 24))
    ours, theirs, muons = weights(*shapes), weights(*shapes), weights(*shapes)
    train(Muon(ours, smallest=24), ours)
    train(torch.optim.AdamW(theirs), theirs)
    train(Muon(muons), muons)
    for one, other in ((ours[0], theirs[0]), (ours[1], theirs[1]), (ours[2], muons[2])):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(muons[0], theirs[0], atol=1e-4)


def test_adamw_says_whose_a_matrix_is_by_its_name():
    shapes = ((24, 24), (24, 24), (24, 24))
    ours, theirs, muons = weights(*shapes), weights(*shapes), weights(*shapes)
    named = zip(("encoder.0.weight", "net.0.weight", "unet.to_k.weight"), ours, strict=True)
    node = {"target": "ldm.optimizers.Muon", "params": {"adamw": ["to_[kv]", r"^encoder\."]}}
    optimizer = build_optimizer(node, ours, 1e-3, named)
    train(optimizer, ours)
    train(torch.optim.AdamW(theirs), theirs)
    train(Muon(muons), muons)
    for one, other in ((ours[0], theirs[0]), (ours[1], muons[1]), (ours[2], theirs[2])):
        torch.testing.assert_close(one, other)
    copied, weight = copy.deepcopy((optimizer, ours))
    for one, own in ((optimizer, ours), (copied, weight)):
        train(one, own)
    assert all(map(torch.equal, ours, weight))


def test_a_kernel_is_a_matrix_in_any_memory_layout():
    (kernel,), (matrix,) = weights((32, 16, 3, 3)), weights((32, 16 * 9))
    matrix.data = kernel.detach().flatten(1).clone()
    last = nn.Parameter(kernel.detach().clone().contiguous(memory_format=torch.channels_last))
    train(Muon([matrix]), [matrix])
    for parameter in (kernel, last):
        train(Muon([parameter]), [parameter])
        torch.testing.assert_close(parameter.flatten(1), matrix)


def test_weights_of_one_shape_step_apart():
    """They are computed as one batch."""
    together, alone = weights((16, 24), (16, 24)), weights((16, 24), (16, 24))
    for seed, parameter in enumerate(alone):
        train(Muon([parameter]), [parameter], seed=seed)
    optimizer = Muon(together)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    for _ in range(3):
        for parameter, generator in zip(together, generators, strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_stay_and_what_has_none_stays():
    trained, idle = weights((16, 16), (16, 16))
    before = idle.detach().clone()
    optimizer = Muon([trained, idle])
    trained.grad = torch.ones(16, 16)
    assert optimizer.step(lambda: 7) == 7
    assert trained.grad.eq(1).all() and idle.grad is None and idle.equal(before)


def test_saved_and_loaded():
    shapes = ((16, 32), (16,))
    whole, pieces = weights(*shapes), weights(*shapes)
    first = Muon(whole, lr=0.01)
    train(first, whole)
    train(first, whole, seed=2)
    second = Muon(pieces, lr=0.01)
    train(second, pieces)
    third = Muon(pieces, lr=0.5, momentum=0.1)
    third.load_state_dict(second.state_dict())
    train(third, pieces, seed=2)
    assert all(map(torch.equal, whole, pieces))


@pytest.mark.parametrize("muons_first", [True, False])
def test_a_weight_that_changes_hands_is_refused(muons_first):
    """AdamW would look for moments that Muon does not keep, and Muon would take AdamW's average for its momentum."""
    (weight,) = weights((24, 24))
    node = {"target": "ldm.optimizers.Muon", "params": {"adamw": ["net"]}}
    muon, adamw = Muon([weight]), build_optimizer(node, [weight], 1e-3, [("net.weight", weight)])
    before, after = (muon, adamw) if muons_first else (adamw, muon)
    train(before, [weight])
    whose = r"Muon's .* AdamW's" if muons_first else r"AdamW's .* Muon's"
    with pytest.raises(UserError, match=rf"optimizer_config\.params: a weight of shape \(24, 24\) was {whose} here"):
        after.load_state_dict(before.state_dict())


def test_a_gradient_scaler_finds_its_scale_undone():
    """Under float16: with a scale as without, and no step where a gradient overflows."""
    plain, scaled = weights((16, 32), (16,)), weights((16, 32), (16,))
    first, second = Muon(plain), Muon(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    sum((p**3).sum() for p in plain).backward()
    first.step()
    scaler.scale(sum((p**3).sum() for p in scaled)).backward()
    scaler.step(second)
    scaler.update()
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(one, other)
    before = [parameter.detach().clone() for parameter in scaled]
    second.zero_grad()
    scaler.scale(sum((p * float("inf")).sum() for p in scaled)).backward()
    scaler.step(second)
    assert all(map(torch.equal, before, scaled))


def test_autocast_does_not_reach_the_step():
    """Manual optimisation steps inside of it; the iteration would diverge in bf16."""
    shapes = ((16, 16), (16, 16, 3, 3), (16,))
    plain, cast = weights(*shapes), weights(*shapes)
    train(Muon(plain), plain)
    with torch.autocast("cpu", torch.bfloat16):
        train(Muon(cast), cast)
    assert all(map(torch.equal, plain, cast))


def test_one_by_name():
    made = build_optimizer({"target": "torch.optim.SGD", "params": {"momentum": 0.9}}, weights((2,)), 0.3)
    assert isinstance(made, torch.optim.SGD) and made.defaults["lr"] == 0.3 and made.defaults["momentum"] == 0.9
    assert checked_optimizer(None) is None
    node = {"target": "ldm.optimizers.Muon", "params": {"adamw": ["encoder"]}}
    assert checked_optimizer(node) is node


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"target": "torch.nn.Linear"}, r"optimizer_config\.target: expected an optimizer \(derived from torch\.optim"),
        ({"target": "ldm.optimizers.Muno"}, r"optimizer_config\.target: .*Muon"),
        ({"target": "ldm.optimizers.Muon", "params": {"lr": 1}}, r"optimizer_config\.params\.lr: .*base_learning_rate"),
        ({"target": "ldm.optimizers.Muon", "params": {"params": 1}}, r"params\.params: is not for a configuration"),
        ({"target": "ldm.optimizers.Muon", "params": {"momentun": 1}}, r"momentun: unknown key .*momentum"),
        ({"target": "ldm.optimizers.Muon", "params": {"adamw": ["to_[kv"]}}, r"params\.adamw: 'to_\[kv' is no regular"),
        ({"target": "torch.optim.AdamW", "params": {"betas": [2, 0.9]}}, r"optimizer_config \(AdamW\): .*beta"),
        ("adam", r"optimizer_config: expected the keys target"),
    ],
)
def test_mistakes_in_a_configuration(config, said):
    with pytest.raises(UserError, match=said):
        checked_optimizer(config)


def test_a_name_that_no_weight_has():
    node = {"target": "ldm.optimizers.Muon", "params": {"adamw": ["encodr"]}}
    (weight,) = weights((24, 24))
    frozen = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    with pytest.raises(UserError, match=r"params\.adamw: 'encodr' matches the name of no .*'encoder\.weight'"):
        build_optimizer(node, [weight], 1e-3, [("encoder.weight", weight), ("encodr", frozen)])
