"""Compiled networks: the numbers of the eager ones, the same names, and no second compilation for a ragged batch.

The networks are tiny, as compiling their kernels takes the time.
"""

import shutil
from typing import Any

import pytest
import torch
from torch import nn

from ldm.modules.diffusionmodules.model import Decoder
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.concept import Encoder4, TokenMLPs
from ldm.modules.speed import Choices, any_batch_size, apply

pytestmark = pytest.mark.slow
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++")), reason="Inductor compiles C++ on a CPU"
)


@pytest.fixture(autouse=True)
def fresh():
    """Nothing that another test compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def networks() -> tuple[UNetModel, Encoder4]:
    """The smallest U-Net and encoder, no weight of which is zero."""
    torch.manual_seed(0)
    unet = UNetModel(image_size=4, in_channels=3, out_channels=3, model_channels=32, attention_resolutions=[],
                     num_res_blocks=1, channel_mult=[1], num_heads=4, context_dim=8, latent_unit=4)  # fmt: skip
    encoder = Encoder4(d=8, context_dim=8, latent_unit=4, image_size=16)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return unet, encoder


def step(unet: nn.Module, encoder: nn.Module, batch: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """Loss and gradients of a batch, as in training."""
    generator = torch.Generator().manual_seed(batch)
    image, x = (torch.randn(batch, 3, size, size, generator=generator) for size in (16, 4))
    t = torch.randint(0, 1000, (batch,), generator=generator)
    any_batch_size(image, x, t)
    tokens = encoder(image)
    any_batch_size(tokens)
    loss = (unet(x, t, tokens) - x).abs().mean()
    parameters = {f"{i}.{name}": p for i, net in enumerate((unet, encoder)) for name, p in net.named_parameters()}
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return loss.detach(), dict(zip(parameters, gradients, strict=True))


def test_a_ragged_batch_does_not_recompile():
    """With the batch marked as dynamic one compilation serves all sizes. Dynamo and AOT autograd decide that."""
    compiled = networks()
    for network in compiled:
        network.compile(backend="aot_eager")
    plain = networks()
    step(*compiled, 8)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (5, 8, 2):
            found, expected = step(*compiled, batch), step(*plain, batch)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert all(list(a.state_dict()) == list(b.state_dict()) for a, b in zip(compiled, plain, strict=True))


def test_an_unmarked_batch_would_recompile():
    mlps = TokenMLPs(2, 4)
    mlps.compile(backend="eager", dynamic=False)
    mlps(torch.randn(8, 2))
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(torch._dynamo.exc.RecompileError):
        mlps(torch.randn(5, 2))


@needs_compiler
def test_compiled_equals_eager():
    """The encoder's output and gradients, by Inductor; names in checkpoints stay. (The U-Net takes two minutes.)"""
    (_, compiled), (_, plain) = networks(), networks()
    names = list(plain.state_dict())
    apply(compiled, Choices(compile=True))
    inputs = (torch.randn(3, 3, 16, 16),)
    any_batch_size(*inputs)
    torch.testing.assert_close(compiled(*inputs), plain(*inputs), rtol=1e-5, atol=1e-5)
    plain.load_state_dict(compiled.state_dict())
    for network in (compiled, plain):
        network(*inputs).square().mean().backward()
    for (name, found), expected in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-5, msg=name)
    assert list(compiled.state_dict()) == names
    for name, value in compiled.state_dict().items():  # batch norm's statistics among them
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_last_layer_of_a_compiled_decoder_is_differentiated_alone():
    """As the adaptive weight of the first stage needs it, before the gradients of all: twice, by the last layer."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        decoder = Decoder(ch=32, out_ch=3, ch_mult=[1, 1], num_res_blocks=1, attn_resolutions=[], in_channels=3,
                          resolution=8, z_channels=3)  # fmt: skip
        if compiled:
            decoder.compile(backend="aot_eager")
        z = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
        any_batch_size(z)
        images, last = decoder(z), decoder.conv_out.weight
        parts = [
            torch.autograd.grad(images, last, gradient, retain_graph=True)[0]
            for gradient in (images.detach().sign(), torch.ones_like(images))
        ]
        images.square().mean().backward()
        found.append((parts, {name: parameter.grad for name, parameter in decoder.named_parameters()}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
