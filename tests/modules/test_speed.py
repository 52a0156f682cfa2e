"""The ways of computing that `ldm.modules.speed` chooses among: they give the same numbers, and leave no trace."""

import copy
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ldm.modules.attention import CrossAttention, attend, keys_values
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.util import Conv3x3
from ldm.modules.ema import LitEma
from ldm.modules.kernels.convolution import conv3x3, pays
from ldm.modules.speed import Choices, apply, choose, has_bf16, match_layouts

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


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
    monkeypatch.setattr("ldm.modules.speed.has_bf16", lambda device: True)
    times = {("32-true", False): 3.0, ("32-true", True): 2.0, ("bf16-mixed", True): 1.0}
    monkeypatch.setattr("ldm.modules.speed._time", lambda model, way, *_, **__: times[way.precision, way.channels_last])
    model = torch.nn.Linear(1, 1)
    assert choose(model, lambda: None, CPU).precision == "bf16-mixed"
    assert choose(model, lambda: None, CPU, allowed={"bf16": False}).channels_last
    assert not choose(model, lambda: None, CPU, allowed={"bf16": False, "channels_last": False}).channels_last
    assert choose(model, lambda: None, CPU, precision="32-true").precision == "32-true"
    times["bf16-mixed", True] = 1.9  # what a short trial saves by bf16, casting the weights would cost
    assert choose(model, lambda: None, CPU).precision == "32-true"
    several = choose(model, None, CPU)
    assert several.precision == "32-true" and "several" in several.reasons


@pytest.mark.parametrize("native", [False, True])
def test_a_cpu_that_emulates_bf16_does_not_try_it(monkeypatch, native):
    tried = []
    monkeypatch.setattr("ldm.modules.speed._time", lambda model, way, *_, **__: tried.append(way.precision) or 1.0)
    monkeypatch.setattr("ldm.modules.speed.has_bf16", lambda device: native)
    choose(torch.nn.Linear(1, 1), lambda: None, CPU)
    assert ("bf16-mixed" in tried) == native


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file() or platform.machine() != "x86_64", reason="reads its flags")
def test_bf16_of_this_cpu():
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        assert has_bf16(CPU)
    elif "avx512f" not in flags and "avx_ne_convert" not in flags:
        assert not has_bf16(CPU)


def test_averages_lie_in_memory_as_the_weights_do():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1))
    both = torch.nn.ModuleList([model, LitEma(model)])
    apply(both, Choices(channels_last=True))
    strides = [[tensor.stride() for tensor in tensors] for tensors in (both[1]._shadows(), both[1]._live(model))]
    assert strides[0] == strides[1] and any(stride[1] == 1 for stride in strides[0] if len(stride) == 4)


@pytest.mark.parametrize("fused", [False, True])
def test_restored_moments_get_the_layout_of_their_weights(fused):
    """Without it, the fused kernel combines weights with the moments of others."""
    gradients = [torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(step)) for step in range(2)]
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = torch.nn.Parameter(torch.ones(4, 3, 3, 3))
        first = torch.optim.AdamW([weight], lr=0.1, fused=fused)
        weight.grad = gradients[0]
        first.step()
        weight = torch.nn.Parameter(weight.detach().to(memory_format=layout))
        second = torch.optim.AdamW([weight], lr=0.1, fused=fused)
        second.load_state_dict(first.state_dict())
        match_layouts([second])
        assert all(moment.stride() == weight.stride() for moment in second.state[weight].values() if moment.ndim)
        weight.grad = gradients[1].to(memory_format=layout)
        second.step()
        found.append(weight.detach())
    torch.testing.assert_close(found[1], found[0])


def test_a_gpu_that_compiles_is_not_timed(monkeypatch):
    monkeypatch.setattr("ldm.modules.speed.find_spec", lambda name: True)
    cuda, model = torch.device("cuda"), torch.nn.Linear(1, 1)
    model.replays = True
    for native, precision in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        found = choose(model, lambda: pytest.fail("timed"), cuda, allowed={"compile": True})
        assert (found.precision, found.compile, found.cuda_graphs) == (precision, True, False)
        assert found.channels_last and not found.kernels and "channels-last, compiled" in found.reasons
    assert not choose(model, None, cuda).cuda_graphs, "several processes"


def test_another_device_takes_the_plain_path():
    found = choose(torch.nn.Linear(1, 1), lambda: pytest.fail("timed"), torch.device("mps"))
    assert found == Choices(reasons=found.reasons) and "mps" in found.reasons


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


@pytest.mark.parametrize("size", [(3, 128, 4, 4), (2, 130, 2, 2), (1, 128, 1, 3)])
def test_a_small_convolution_and_its_gradients_are_pytorchs(size):
    torch.manual_seed(0)
    x = torch.randn(size, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(7, size[1], 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert pays(x)
    expected, found = F.conv2d(x, weight, bias, padding=1), conv3x3(x, weight, bias)
    assert torch.equal(found, expected)
    grad = torch.randn_like(expected)
    for name, a, b in zip(
        ("x", "weight", "bias"),
        torch.autograd.grad(expected, (x, weight, bias), grad),
        torch.autograd.grad(found, (x, weight, bias), grad),
        strict=True,
    ):
        torch.testing.assert_close(b, a, msg=lambda text, name=name: f"{name}: {text}")


def test_a_small_convolution_follows_autocast():
    x = torch.randn(2, 128, 4, 4, requires_grad=True)
    module = Conv3x3(128, 8)
    module.kernels = True
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert module.weight.grad.dtype == torch.float32 and x.grad.dtype == torch.float32
    half = torch.zeros(2, 128, 8, 8, dtype=torch.bfloat16)
    assert not pays(half) and not pays(half[:, :64, :4, :4]) and pays(half[:, :, :4, :4])
    assert not pays(torch.zeros(2, 128, 4, 4))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kept", [False, True])
def test_freed_memory_is_kept_where_it_is_told_so(kept):
    """40 MiB are used and freed: does the process still have them?"""
    program = f"""
import os
import torch
from ldm.modules.speed import keep_memory

def pages():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

torch.ones(10)
print({kept} and keep_memory())
before = pages()
torch.ones(10 * 2**20)
print((pages() - before) * os.sysconf("SC_PAGE_SIZE"))
"""
    usual = {
        name: value for name, value in os.environ.items() if not name.startswith(("LD_PRELOAD", "MALLOC_", "GLIBC_"))
    }
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=usual)
    assert done.returncode == 0, done.stderr
    told, more = done.stdout.split()
    if kept and told == "False":
        pytest.skip("the C library has no such option")
    assert (int(more) > 35 * 2**20) == kept
