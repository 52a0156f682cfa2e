"""The moving average against its formula."""

import pytest
import torch
from torch import nn

from ldm.modules.ema import LitEma


def test_update_follows_the_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model[1].bias.requires_grad_(False)
    ema = LitEma(model, decay=0.9)
    shadow = model[0].weight.detach().clone()
    for k in range(1, 30):
        with torch.no_grad():
            model[0].weight.add_(torch.randn_like(model[0].weight))
        ema(model)
        decay = min(0.9, (1 + k) / (10 + k))
        shadow = shadow - (1 - decay) * (shadow - model[0].weight.detach())
    buffers = dict(ema.named_buffers())
    torch.testing.assert_close(buffers["0weight"], shadow)
    assert int(ema.num_updates) == 29
    # Names without dots; frozen parameters and running statistics are not averaged.
    assert set(buffers) == {"decay", "num_updates", "0weight", "0bias", "1weight"}


def test_copy_and_restore():
    model = nn.Linear(3, 2)
    ema = LitEma(model)
    averaged = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    trained = model.weight.detach().clone()
    ema.store(model.parameters())
    ema.copy_to(model)
    assert torch.equal(model.weight, averaged)
    ema.restore(model.parameters())
    assert torch.equal(model.weight, trained)


def test_decay_out_of_range():
    with pytest.raises(ValueError, match="decay"):
        LitEma(nn.Linear(1, 1), decay=1.5)
