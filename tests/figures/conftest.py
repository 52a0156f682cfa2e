"""A tiny EncDiff with weights that depend on everything, on 64 rooms."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import CHECKPOINT, encdiff_config, first_stage_config
from omegaconf import OmegaConf

from ldm.api import model_node
from ldm.data.dis import Shapes3DTrain
from ldm.figures.subject import Subject, make_subject
from ldm.util import instantiate_from_config

ROOT = Path(__file__).resolve().parents[2]


def built(config: Any) -> Any:
    """The model of a configuration; what starts as zero is filled, so that pictures depend on the tokens."""
    torch.manual_seed(0)
    model = instantiate_from_config(model_node(OmegaConf.create(config), "tests"), "model", "Lightning module")
    generator = torch.Generator().manual_seed(0)
    for weight in (p for p in model.parameters() if p.ndim > 1 and not p.any()):
        weight.data.normal_(std=0.1, generator=generator)
    # At random, scalars hardly differ between images, nor images between tokens: louder, each token can be seen.
    loud = {"cond_stage_model.encoder": 3.0, "cond_stage_model.net": 3.0, "attn2": 3.0}
    for name, weight in model.named_parameters():
        factors = [factor for part, factor in loud.items() if part in name and weight.ndim > 1]
        weight.data.mul_(factors[0] if factors else 1.0)
    if getattr(model, "use_ema", False):
        for module, ema in model.emas():
            ema.reset(module)
    return model.eval()


@pytest.fixture(scope="session")
def dataset(rooms) -> Shapes3DTrain:
    return Shapes3DTrain(rooms)


@pytest.fixture(scope="session")
def variant(rooms) -> Callable[..., Any]:
    """Builds the tiny EncDiff, changed by files of configs/ablations."""

    def build(*names: str) -> Any:
        config = OmegaConf.create(encdiff_config(rooms))
        OmegaConf.update(config, CHECKPOINT, None)
        overlays = [OmegaConf.load(ROOT / "configs" / "ablations" / f"{name}.yaml") for name in names]
        return built(OmegaConf.merge(config, *overlays))

    return build


@pytest.fixture(scope="session")
def model(variant) -> Any:
    """The tiny EncDiff; tests leave it as it is."""
    return variant()


@pytest.fixture(scope="session")
def first_stage_model(rooms) -> Any:
    return built(first_stage_config(rooms))


@pytest.fixture
def subject(model, dataset) -> Subject:
    """Four images, two steps."""
    return make_subject(model, dataset, count=4, steps=2, run="tiny", step=1234)
