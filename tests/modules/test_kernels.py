"""Fused kernels against PyTorch in float64: results and all gradients."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from ldm.modules import fused

pytestmark = pytest.mark.skipif(not fused.available(), reason="PyTorch has no OpenMP that the kernels can use here")
# Largest relative error; bfloat16 has 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
TYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])


def random(*shape, dtype=torch.float32, mean=0.0):
    return (torch.randn(shape) + mean).to(dtype).requires_grad_()


def compare(ours, reference, inputs, dtype):
    """Both functions of `inputs`, and their gradients for a random gradient of the result."""
    y, exact = ours(*inputs), [x.detach().double().requires_grad_() for x in inputs]
    dy = torch.randn(y.shape).to(dtype)
    y64 = reference(*exact)
    got = [y, *torch.autograd.grad(y, inputs, dy)]
    want = [y64, *torch.autograd.grad(y64, exact, dy.double())]
    assert [x.dtype for x in got] == [dtype, *(x.dtype for x in inputs)]
    for a, b in zip(got, want, strict=True):
        error = (a - b).abs().max() / b.abs().max()
        assert error < TOLERANCE[dtype], error
    return y


def norm64(silu):
    def function(x, weight, bias, modulation=None):
        y = F.group_norm(x, 32, weight, bias, 1e-5)
        if modulation is not None:
            scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
            y = y * (1 + scale) + shift
        return F.silu(y) if silu else y

    return function


def norm(silu):
    def function(x, weight, bias, modulation=None):
        parts = () if modulation is None else modulation.chunk(2, dim=1)
        return fused.group_norm(x, 32, weight, bias, 1e-5, *parts, silu=silu)

    return function


@TYPES
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("shape", [(1, 128, 2, 2), (3, 64, 5, 3), (2, 96, 16, 16)])
def test_group_norm(shape, modulated, silu, dtype):
    torch.manual_seed(0)
    x = random(*shape, dtype=dtype, mean=3).detach().to(memory_format=torch.channels_last).requires_grad_()
    inputs = [x, random(shape[1]), random(shape[1])]
    inputs += [random(shape[0], 2 * shape[1], dtype=dtype)] * modulated
    y = compare(norm(silu), norm64(silu), inputs, dtype)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_group_norm_takes_any_layout():
    torch.manual_seed(0)
    x, weight, bias = random(2, 64, 4, 6).detach().transpose(2, 3).requires_grad_(), random(64), random(64)
    compare(norm(True), norm64(True), [x, weight, bias], torch.float32)


def test_group_norm_far_from_zero():
    """A mean of 1,000 standard deviations; one pass with sums of squares would lose the variance."""
    torch.manual_seed(0)
    x = (torch.randn(1, 64, 8, 8) + 1000).to(memory_format=torch.channels_last)
    ones = torch.ones(64)
    ours, want = (f(t, ones.to(t), 0 * ones.to(t)) for f, t in ((norm(False), x), (norm64(False), x.double())))
    torch.testing.assert_close(ours.double(), want, rtol=0, atol=1e-3)


@TYPES
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 14), (2, 40, 512)])
def test_geglu(shape, dtype):
    def geglu64(x):
        x, gate = x.chunk(2, dim=-1)
        return x * F.gelu(gate)

    torch.manual_seed(0)
    compare(fused.geglu, geglu64, [(2 * random(*shape)).detach().to(dtype).requires_grad_()], dtype)


def test_gelu_of_all_sizes():
    gate = torch.linspace(-30, 30, 10001)
    y = fused.geglu(torch.stack([torch.ones_like(gate), gate], dim=1))[:, 0]
    torch.testing.assert_close(y.double(), F.gelu(gate.double()), rtol=1e-6, atol=1e-6)


@TYPES
@pytest.mark.parametrize(("queries", "keys", "width"), [(1, 2, 8), (13, 20, 16), (64, 33, 8), (4, 4, 32), (40, 256, 8)])
def test_attention(queries, keys, width, dtype):
    heads = 3

    def attention64(*inputs):
        q, k, v = (x.unflatten(2, (heads, width)).transpose(1, 2) for x in inputs)
        weights = (q @ k.transpose(2, 3) / width**0.5).softmax(dim=3)
        return (weights @ v).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    inputs = [random(2, n, heads * width, dtype=dtype) for n in (queries, keys, keys)]
    compare(lambda q, k, v: fused.attention(q, k, v, heads), attention64, inputs, dtype)


def test_attention_with_large_scores():
    """Scores of thousands: a weight of 1 for the largest, no overflow."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 8) for n in (5, 7, 7))
    out = fused.attention(1e4 * q, k, v, 1)
    torch.testing.assert_close(out[0], v[0, (q[0] @ k[0].T).argmax(dim=1)])


def test_nan_stays_nan_and_extremes_are_finite():
    x = torch.zeros(2, 32, 2, 2).to(memory_format=torch.channels_last)
    x[0, 0, 0, 0] = torch.nan
    bias = torch.tensor([-1e4, 1e4] * 16)
    y = fused.group_norm(x, 32, torch.ones(32), bias, 1e-5, silu=True)
    assert y[0, 0].isnan().all() and y[0, 1:].isfinite().all()
    torch.testing.assert_close(y[1], F.silu(bias)[:, None, None].expand(32, 2, 2))


def test_the_number_of_threads_does_not_change_the_result():
    torch.manual_seed(0)
    x, weight, bias, modulation = random(5, 64, 8, 8), random(64), random(64), random(5, 128)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = norm(True)(x, weight, bias, modulation)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, weight, bias, modulation])])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.slow
def test_numba_is_imported_when_a_kernel_is_first_used():
    code = "import sys, ldm.modules.fused as fused; print(fused.available(), 'numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
