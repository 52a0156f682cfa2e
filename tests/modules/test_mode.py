"""Evaluation mode, and back."""

import pytest
from torch import nn

from ldm.modules.mode import evaluating


def test_every_submodule_returns_to_its_own_mode():
    module = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(), nn.Dropout()))
    module[1][0].eval()
    before = [submodule.training for submodule in module.modules()]
    assert any(before) and not all(before)
    with evaluating(module):
        assert not any(submodule.training for submodule in module.modules())
    assert [submodule.training for submodule in module.modules()] == before
    with pytest.raises(ZeroDivisionError), evaluating(module):
        _ = 1 / 0
    assert [submodule.training for submodule in module.modules()] == before
