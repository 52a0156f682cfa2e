"""The shipped configurations on small files in the real layouts: train, stop, resume, validate, draw, score."""

import json
import sys
from pathlib import Path

import pytest
import torch
from command_line import CHECKPOINT, DDCONFIG, ROOT, encdiff_config
from omegaconf import OmegaConf

from ldm.factors import FactorGrid, factors_of

sys.path.insert(0, str(Path(__file__).parent / "data"))
from data_files import DATA_SETS, small

FIRST_STAGES = ROOT / "configs" / "autoencoder"
# Data set of the configurations -> its class; dSprites, which has none of its own, is read by those of MPI3D.
LAYOUTS = {
    path.name.removesuffix("_vq_4_16.yaml"): str(OmegaConf.load(path).data.params.train.target)
    for path in sorted(FIRST_STAGES.glob("*_vq_4_16.yaml"))
}
LAYOUTS["dsprites"] = "ldm.data.dis.DSpritesTrain"
STOP = "lightning.callbacks.stop_here"


def shrunk(layout: str, stage: str, params: dict, scored: bool) -> dict:
    """What makes a shipped configuration small enough for a test."""
    split = {"target": LAYOUTS[layout], "params": {**params, "image_size": 16}}
    config = {
        "data": {"params": {"batch_size": 8, "train": split, "validation": split}},
        "lightning": {"trainer": {"benchmark": False, "accumulate_grad_batches": 1}},
    }
    if stage == "autoencoder":
        loss = {"perceptual_weight": 0.0, "disc_num_layers": 1, "disc_ndf": 8}
        config["model"] = {"params": {"n_embed": 32, "ddconfig": DDCONFIG, "lossconfig": {"params": loss}}}
        return config
    tiny = encdiff_config(Path())
    params = tiny["model"]["params"]
    unet = {**params["unet_config"]["params"], "resblock_updown": False}
    first = {"params": {"n_embed": 32, "ddconfig": DDCONFIG}}
    encoder = {"params": params["cond_stage_config"]["params"]}
    config["model"] = {
        "params": {"image_size": 8, "unet_config": {"params": unet}, "first_stage_config": first,
                   "cond_stage_config": encoder}}  # fmt: skip
    callbacks = {"image_logger": {"params": {"log_images_kwargs": {"ddim_steps": 2}}}}
    if scored:
        settings = tiny["lightning"]["callbacks"]["disentanglement"]["params"]["settings"]
        callbacks |= {"disentanglement": {"params": {"settings": settings}}, "figures": {"params": {"names": []}}}
    config["lightning"]["callbacks"] = callbacks
    return config


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_stages(layout, cli, tmp_path, monkeypatch):
    cls = DATA_SETS[LAYOUTS[layout].rpartition(".")[2].removesuffix("Train")]
    example = small(cls)
    example.write(tmp_path / "datasets")
    has_grid = isinstance(factors_of(cls(tmp_path / "datasets", **example.params)), FactorGrid)
    name = "mpi3d" if layout == "dsprites" else layout
    monkeypatch.setenv("ENCDIFF_DATA", str(tmp_path / "datasets"))
    checkpoint = None
    for stage, file in (("autoencoder", f"{name}_vq_4_16.yaml"), ("latent-diffusion", f"{name}-vq-4-16.yaml")):
        score = stage == "latent-diffusion"
        overlay = cli.write(f"{stage}.yaml", shrunk(layout, stage, example.params, has_grid))
        more = [f"{CHECKPOINT}={checkpoint}"] if score else []
        signal = [f"{STOP}.target=run_callbacks.SignalAt", f"{STOP}.params.batch=2"]
        stopped = cli.run("--base", ROOT / "configs" / stage / file, overlay, "-t", "--gpus", "0,", "-n", stage,
                          *more, *signal, score=score)  # fmt: skip
        assert stopped.status == 130 and not stopped.errors, (stopped.err, stopped.log)
        assert ("TRAINING ON THE CPU" in stopped.log) != torch.cuda.is_available()
        logdir = stopped.logdir
        checkpoint = logdir / "checkpoints" / "last.ckpt"
        assert torch.load(checkpoint, weights_only=True)["global_step"] == 2

        result = cli.run("-r", logdir, "-t", "--max_steps", 4, f"{STOP}.params.batch=1000", score=score)
        assert result.status == 0 and result.logdir == logdir, (result.err, result.log)
        assert torch.load(checkpoint, weights_only=True)["global_step"] == 4
        drawn = {path.name.split("_gs-")[0] for path in (logdir / "images" / "train").glob("*_gs-000004_*.png")}
        assert {"encdiff_reconstruction", "swap"} <= drawn if score else {"inputs", "reconstructions"} <= drawn, drawn
    record = json.loads((logdir / "metrics" / "000004.json").read_text())
    if not has_grid:
        assert set(record["scores"]) == {"tad"} and len(record["factors"]) == 40
        return
    assert set(record["scores"]) == {"beta_vae", "factor_vae", "dci", "mig"}
    product = 1
    for size in record["factors"].values():
        product *= size
    assert product == example.count
