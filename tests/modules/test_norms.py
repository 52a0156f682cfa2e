"""Norms in bf16 and channels-last, and batch norms over several processes."""

import copy
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ldm.modules.diffusionmodules.util import GroupNorm32
from ldm.modules.sync_norm import SyncBatchNorm2d, synchronise_batch_norms

RESOLUTION = 2.0**-8  # of bf16, relative


def gradients(norm: nn.Module, x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    """Output, and gradients of input, weight and bias, in float64."""
    x = x.detach().requires_grad_()
    y = norm(x)
    return [t.double() for t in (y, *torch.autograd.grad(y, [x, *norm.parameters()], g.to(y.dtype)))]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("channels", "size"), [(128, 16), (128, 3), (64, 8), (32, 4), (256, 2)])
def test_group_norm_in_bf16_has_the_gradients_of_float64(channels, size, layout, autocast):
    """PyTorch's own bf16 kernel for channels-last had wrong ones with 4 channels in a group (its issue 140913)."""
    generator = torch.Generator().manual_seed(channels + size)
    x, g = (torch.randn(4, channels, size, size, generator=generator) for _ in range(2))
    x, g = ((3 * t + 1).bfloat16().to(memory_format=layout) for t in (x, g))
    norm = GroupNorm32(channels)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(channels, generator=generator))
    expected = gradients(copy.deepcopy(norm).double(), x.double(), g)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = gradients(norm, x, g)
        assert norm(x).dtype == torch.bfloat16
    for name, a, b in zip(("output", "input", "weight", "bias"), found, expected, strict=True):
        assert (a - b).abs().max() < RESOLUTION * b.abs().max(), name
        assert (a - b).norm() < RESOLUTION / 2 * b.norm(), name


def share(rank: int, folder: Path) -> None:
    """One of two processes: its half of the images through a synchronised batch norm."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    model, x, weight = torch.load(folder / "given.pt", weights_only=False)
    synchronise_batch_norms(model)
    x, weight = (t[:3] if rank == 0 else t[3:] for t in (x, weight))  # 3 images and 5
    x.requires_grad_()
    y = model(x)
    (y.square() * weight).sum().backward()
    content = {"y": y.detach(), "x": x.grad, "state": model.state_dict(), "grads": [p.grad for p in model.parameters()]}
    torch.save(content, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_normalise_as_one(tmp_path):
    """Unequal halves of a batch in two processes: outputs, gradients and statistics of PyTorch's on the whole batch."""
    torch.manual_seed(0)
    first, second = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False, momentum=None)
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), first, nn.ReLU(), second)
    x, weight = 5 + torch.randn(8, 3, 2, 2), torch.rand(8, 4, 2, 2)
    torch.save((model, x, weight), tmp_path / "given.pt")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=share, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    x.requires_grad_()
    y = model(x)
    (y.square() * weight).sum().backward()
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    torch.testing.assert_close(torch.cat([a["y"], b["y"]]), y.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([a["x"], b["x"]]), x.grad, rtol=1e-4, atol=1e-5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(a["state"][name], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(a["state"][name], b["state"][name])
    for parameter, one, other in zip(model.parameters(), a["grads"], b["grads"], strict=True):
        torch.testing.assert_close(one + other, parameter.grad, rtol=1e-4, atol=1e-5)


def test_synchronising_keeps_names_tensors_and_numbers():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4, eps=1e-3)))
    before, plain = model.state_dict(), copy.deepcopy(model)
    synchronise_batch_norms(model)
    assert isinstance(model[1][0], SyncBatchNorm2d)
    after = model.state_dict()
    assert list(after) == list(before) and all(after[k].data_ptr() == before[k].data_ptr() for k in before)
    x = torch.randn(5, 3, 2, 2)
    assert torch.equal(model(x), plain(x)) and torch.equal(model.eval()(x), plain.eval()(x))
