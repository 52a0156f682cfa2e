"""The sparsity penalty: its value, its gradient, and that nothing else changes."""

import pytest
import torch
from command_line import IMAGE_SIZE, encdiff_config

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import UserError, instantiate_from_config
from ldm.variants.sparsity import SparseDiffusion


@pytest.fixture
def params(tmp_path):
    params = encdiff_config(tmp_path)["model"]["params"]
    params["first_stage_config"]["params"]["ckpt_path"] = None
    return params


def test_the_loss_is_encdiffs_plus_the_penalty(params):
    x, image = torch.randn(3, 3, 8, 8), torch.rand(3, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1
    models = []
    for kind, extra in ((LatentDiffusion, {}), (SparseDiffusion, {"sparsity_weight": 0.5})):
        torch.manual_seed(0)
        models.append(kind(**params, **extra).eval())
    (plain, _), (sparse, losses) = (m(x, image, torch.Generator().manual_seed(1)) for m in models)
    scalars = models[0].cond_stage_model.encoding(image)
    torch.testing.assert_close(sparse, plain + 0.5 * scalars.abs().sum() / 12)
    assert float(losses["sparsity"]) == pytest.approx(float(scalars.detach().abs().mean())) and losses["loss"] == sparse


def test_gradient_of_the_penalty():
    """sign(s) / (b·n) for scalars, the unit vector for several features per concept."""
    scalars = torch.tensor([[1.5, -2.0, 0.3], [-0.1, 4.0, -7.0]], requires_grad=True)
    SparseDiffusion.sparsity(scalars).backward()
    torch.testing.assert_close(scalars.grad, scalars.detach().sign() / 6)
    features = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SparseDiffusion.sparsity, (features,))
    SparseDiffusion.sparsity(features).backward()
    torch.testing.assert_close(features.grad, (features / features.norm(dim=-1, keepdim=True)).detach() / 6)


def test_mistakes(params):
    node = {"target": "ldm.variants.sparsity.SparseDiffusion", "params": params}
    with pytest.raises(UserError, match="sparsity_weight: expected at least 0"):
        instantiate_from_config({**node, "params": {**params, "sparsity_weight": -1.0}}, "model")
    lone = {key: value for key, value in params.items() if key != "cond_stage_config"} | {"conditioning_key": "none"}
    lone["unet_config"]["params"]["context_dim"] = None
    with pytest.raises(UserError, match="needs a concept encoder"):
        instantiate_from_config({**node, "params": lone}, "model")
