"""EMA weights against the formula."""

import pytest
import torch
from torch import nn

from ldm.modules.ema import LitEma


def network() -> nn.Module:
    """A linear layer and a batch norm whose bias is frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model[1].bias.requires_grad_(False)
    return model


def train(model: nn.Module) -> None:
    """Change every weight and every running statistic."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
        model(torch.randn(8, 3))


@pytest.mark.parametrize("buffers", [False, True])
def test_update_follows_the_formula(buffers):
    model = network()
    ema = LitEma(model, decay=0.9, buffers=buffers)
    names = {"0.weight": "0weight", "0.bias": "0bias", "1.weight": "1weight"}
    if buffers:
        names |= {"1.running_mean": "1running_mean", "1.running_var": "1running_var"}
    assert ema.names == names, "without dots, without frozen parameters and counters"
    assert list(dict(ema.named_buffers())) == ["decay", "num_updates", *names.values()]
    expected = {name: model.state_dict()[name].clone() for name in names}
    for k in range(1, 30):
        train(model)
        ema(model)
        decay = min(0.9, (1 + k) / (10 + k))
        expected = {name: decay * old + (1 - decay) * model.state_dict()[name] for name, old in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(dict(ema.named_buffers())[names[name]], value)
    assert int(ema.num_updates) == 29


def test_statistics_of_a_constant_stream():
    """Batches with the same mean and variance: both running statistics are known geometric sequences."""
    model = nn.BatchNorm1d(1, momentum=0.5)
    ema = LitEma(model, decay=0.0, buffers=True)  # with decay 0 the copies equal the statistics
    batch = torch.tensor([[1.0], [3.0]])
    for k in range(1, 6):
        model(batch)
        ema(model)
        assert float(ema.running_mean) == pytest.approx(2 * (1 - 0.5**k))
        assert float(ema.running_var) == pytest.approx(2 - 0.5**k)


@pytest.mark.parametrize("buffers", [False, True])
def test_copy_and_restore(buffers):
    model = network()
    ema = LitEma(model, buffers=buffers)
    averaged = {name: model.state_dict()[name].clone() for name in ema.names}
    train(model)
    live = {name: value.clone() for name, value in model.state_dict().items()}
    ema.store(model)
    ema.copy_to(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, averaged.get(name, live[name])), name
    ema.restore(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, live[name]), name
    ema.reset(model)
    assert all(torch.equal(dict(ema.named_buffers())[ema.names[name]], live[name]) for name in ema.names)


def test_parameters_are_kept_too_as_in_ldms_notebooks():
    model = network()
    ema = LitEma(model)
    train(model)
    live = model[0].weight.detach().clone()
    ema.store(model.parameters())
    ema.copy_to(model)
    assert not torch.equal(model[0].weight, live)
    ema.restore(model.parameters())
    assert torch.equal(model[0].weight, live)


def test_decay_out_of_range():
    with pytest.raises(ValueError, match=r"ema_decay: expected a number in \[0, 1\], got 1\.5"):
        LitEma(nn.Linear(1, 1), decay=1.5)
