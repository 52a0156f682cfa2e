"""One file for both stages of a user's own pictures: configs/own_images.yaml."""

import json
import logging

import numpy as np
import pytest
from command_line import CHECKPOINT, ROOT
from omegaconf import OmegaConf
from PIL import Image

from ldm.cli.configure import compose
from ldm.config import latent_size, load_yaml, of_stage
from ldm.util import UserError

OWN = ROOT / "configs" / "own_images.yaml"
TRAIN = "data.params.train.params"
PAIRS = [
    ("configs/quickstart/first_stage.yaml", "configs/quickstart/encdiff.yaml", 4),
    ("configs/autoencoder/shapes3d_vq_4_16.yaml", "configs/latent-diffusion/shapes3d-vq-4-16.yaml", 4),
]


def resolved(*given):
    return OmegaConf.to_container(compose(*given), resolve=True)


@pytest.mark.parametrize(("first", "second", "factor"), PAIRS)
def test_everything_follows_from_the_size(first, second, factor, tmp_path):
    """Every number that says how large an image or a latent is, of both stages."""
    size, given = 96, [f"{TRAIN}.path={tmp_path}", f"{TRAIN}.image_size=96", f"{CHECKPOINT}=x"]
    stage = resolved([ROOT / first, OWN], given[:2])
    params = stage["model"]["params"]
    assert params["ddconfig"]["resolution"] == size
    model = resolved([ROOT / second, OWN], given)
    parts = model["model"]["params"]
    assert parts["first_stage_config"]["params"]["ddconfig"] == params["ddconfig"]
    assert parts["image_size"] == parts["unet_config"]["params"]["image_size"] == size // factor
    assert parts["cond_stage_config"]["params"]["image_size"] == size
    for config in (stage, model):
        assert set(config) == {"model", "data", "lightning"}
        nodes = config["data"]["params"]
        assert nodes["train"] == nodes["validation"] and nodes["train"]["target"] == "ldm.data.dis.ImageFolder"
        assert nodes["train"]["params"] == {
            "path": str(tmp_path), "image_size": 96, "table": None, "attributes": None
        }  # fmt: skip


def test_what_is_left_open_is_named():
    with pytest.raises(UserError, match=r"^data\.params\.train\.params\.path: left as \?\?\?"):
        compose([ROOT / PAIRS[0][0], OWN])
    with pytest.raises(UserError, match=r"image_size: expected an image size that is a multiple of 4.*got 50"):
        compose([ROOT / PAIRS[0][1], OWN], [f"{TRAIN}.path=x", f"{TRAIN}.image_size=50", f"{CHECKPOINT}=x"])


def test_parts_of_a_file():
    file = OmegaConf.create({"data": {"x": 1}, "first_stage": {"data": {"x": 2}}, "encdiff": {"data": {"y": 3}}})
    first, second = (
        OmegaConf.create({"model": {"params": {}}}),
        OmegaConf.create({"model": {"params": {"first_stage_config": {}}}}),
    )
    assert of_stage([first, file])[1] == {"data": {"x": 2}}
    assert of_stage([second, file])[1] == {"data": {"x": 1, "y": 3}}
    assert file.first_stage == {"data": {"x": 2}}, "what it reads is left alone"
    with pytest.raises(UserError, match="encdiff: expected sections"):
        of_stage([first, OmegaConf.create({"encdiff": 3})])
    assert latent_size(OmegaConf.create({"resolution": 48, "ch_mult": [1, 2, 4, 4]})) == 6


@pytest.fixture
def pictures(tmp_path):
    """40 pictures: bright or dark, with a bar or without."""
    folder, lines = tmp_path / "pictures", ["file,bright,bar"]
    folder.mkdir()
    random = np.random.default_rng(0)
    for k in range(40):
        image = random.integers(0, 40, (20, 30, 3), dtype=np.uint8) + np.uint8(200 * (k % 2))
        image[8:12] = image[8:12] if k % 4 < 2 else 128
        Image.fromarray(image).save(folder / f"{k:02}.{('png', 'jpg', 'webp')[k % 3]}")
        lines.append(f"{k:02}.{('png', 'jpg', 'webp')[k % 3]},{k % 2},{k % 4 // 2}")
    (folder / "attributes.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.slow
def test_both_stages(cli, pictures):
    """Without a table nothing is scored, and the run goes on; with binary attributes, TAD is."""
    given = [f"{TRAIN}.path={pictures}", f"{TRAIN}.image_size=16", "--gpus", 0, "-t", "--max_epochs", 1,
             "lightning.callbacks.image_logger.params.disabled=true"]  # fmt: skip
    first = cli.run("--base", cli.vq, OWN, *given)
    assert first.status == 0, first.err
    given.append(f"{CHECKPOINT}={first.logdir / 'checkpoints' / 'last.ckpt'}")
    for table, metrics in ((None, set()), ("attributes.csv", {"tad", "mig"})):
        run = cli.run("--base", cli.enc, OWN, *given, f"{TRAIN}.table={table or 'null'}", score=True)
        assert run.status == 0, run.err
        files = list(run.logdir.glob("metrics/*.json"))
        assert ("no scores: there are no factors to score against" in run.log) == (not metrics) == (not files)
        assert not files or set(json.loads(files[0].read_text())["scores"]) == metrics
    saved = [load_yaml(next(run.logdir.glob(f"configs/*-{kind}.yaml"))) for kind in ("project", "lightning")]
    again = resolved([], (), saved)  # as a run that is resumed, or loaded, reads it
    assert again["data"]["params"]["validation"]["params"]["table"] == table
    assert (
        again["model"]["params"]["image_size"] == again["model"]["params"]["unet_config"]["params"]["image_size"] == 8
    )


def test_factors_that_cannot_be_scored_stop_nothing(caplog):
    from ldm.callbacks.disentanglement import suited
    from ldm.factors import FactorGrid

    class Labelled:
        attribute_names = ("x",)
        attributes = np.array([[0], [1]] * 5)

    class Three(Labelled):
        attribute_names = ("x", "y")
        attributes = np.array([[0, 1], [1, 0], [2, 1]] * 5)

    class Grid:
        grid = FactorGrid((2, 3))

    with caplog.at_level(logging.INFO):
        assert suited(None) == () and suited(Labelled()) == ()
    assert "no scores: disentanglement needs at least two factors" in caplog.text
    assert suited(Three()) == suited(Grid()) == ("beta_vae", "factor_vae", "dci", "mig")
