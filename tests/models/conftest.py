"""The original's networks, filled with weights by name, and its numbers."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion

REFERENCE = Path(__file__).parents[1] / "reference"
_spec = importlib.util.spec_from_file_location("reference_fill", REFERENCE / "fill.py")
assert _spec is not None and _spec.loader is not None
fill_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fill_module)

DDCONFIG = {
    "double_z": False,
    "z_channels": 3,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def release_params() -> dict[str, Any]:
    """The release's Shapes3D EncDiff, in the release's own names."""
    unet = {
        "image_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 64,
        "attention_resolutions": [1, 2, 4],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4, 4],
        "num_heads": 8,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "use_spatial_transformer": True,
        "context_dim": 16,
        "latent_unit": 20,
    }
    encoder = {"d": 128, "context_dim": 16, "latent_unit": 20}
    first_stage = {
        "embed_dim": 3,
        "n_embed": 2048,
        "ddconfig": DDCONFIG,
        "lossconfig": {"target": "torch.nn.Identity"},
    }
    return {
        "linear_start": 0.0015,
        "linear_end": 0.0155,
        "timesteps": 1000,
        "loss_type": "l1",
        "image_size": 16,
        "channels": 3,
        "scale_by_std": True,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": {"target": "ldm.models.autoencoder.VQModelInterface", "params": first_stage},
        "cond_stage_config": {"target": "ldm.modules.encoders.concept.Encoder4", "params": encoder},
    }


@pytest.fixture(scope="session")
def inputs():
    """`uniform` and `normal` of the reference, by shape and seed."""
    return fill_module


@pytest.fixture(scope="session")
def encdiff() -> LatentDiffusion:
    """The release's model, filled; tests leave it as it is."""
    model = LatentDiffusion(**release_params()).eval()
    for name in ("first_stage_model", "cond_stage_model", "model"):
        fill_module.fill(getattr(model, name), 0, f"{name}.")
    return model


@pytest.fixture(scope="session")
def kl() -> AutoencoderKL:
    """The KL autoencoder of the same widths, filled."""
    model = AutoencoderKL({**DDCONFIG, "double_z": True}, {"target": "torch.nn.Identity"}, embed_dim=3).eval()
    return fill_module.fill(model, 3, "kl.")


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """The original's numbers for `encdiff`."""
    return dict(np.load(REFERENCE / "golden_release.npz"))


@pytest.fixture(scope="session")
def golden_kl() -> dict[str, np.ndarray]:
    """The original's numbers for `kl`."""
    return dict(np.load(REFERENCE / "golden_kl.npz"))


@pytest.fixture(scope="session")
def keys() -> dict[str, dict[str, list[int]]]:
    """The original's state-dict names and shapes."""
    names = {"encdiff": "keys_latent_diffusion.json", "kl": "keys_kl.json"}
    return {key: json.loads((REFERENCE / name).read_text()) for key, name in names.items()}
