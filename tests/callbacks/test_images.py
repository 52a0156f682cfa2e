"""Pictures: when, of what, and that they do not affect training."""

import resource
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ldm.callbacks.images import ImageLogger
from ldm.models.autoencoder import VQModel
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import UserError


class Rows:
    """Ten uint8 images, each filled with its number."""

    def __len__(self):
        return 10

    def __getitem__(self, row):
        return {"image": torch.full((4, 4, 3), row, dtype=torch.uint8), "idx": row}


class Model(nn.Module):
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.calls: list[tuple] = []

    def log_images(self, batch, N, **options):
        image = batch["image"].permute(0, 3, 1, 2)
        self.norm(image)
        self.calls.append((batch["image"][:, 0, 0, 0], torch.rand(1).item(), self.training, N, options))
        return {"inputs": image, "beyond": image + 5}


def trainer(folder, step=0, **datasets):
    from contextlib import nullcontext

    data = SimpleNamespace(datasets=datasets or {"validation": Rows()})
    return SimpleNamespace(global_step=step, current_epoch=0, is_global_zero=True, loggers=[], datamodule=data,
                           default_root_dir=str(folder),
                           precision_plugin=SimpleNamespace(forward_context=nullcontext))  # fmt: skip


def steps_drawn(folder, until, **options):
    """Steps at which one callback draws in a run of two batches a step."""
    callback, model = ImageLogger(**options), Model()
    drawn = []
    run = trainer(folder)
    callback.on_train_start(run, model)
    for step in [step for step in range(1, until + 1) for _ in range(2)]:
        before = len(model.calls)
        run.global_step = step
        callback.on_train_batch_end(run, model, None, None, 0)
        drawn += [step] * (len(model.calls) - before)
    before = len(model.calls)
    callback.on_train_end(run, model)
    return drawn, len(model.calls) - before, len(model.calls)


def test_when(tmp_path):
    assert steps_drawn(tmp_path, 9, batch_frequency=4, increase_log_steps=False) == ([4, 8], 1, 3)
    assert steps_drawn(tmp_path, 8, batch_frequency=4, increase_log_steps=False) == ([4, 8], 0, 2)
    assert steps_drawn(tmp_path, 9, batch_frequency=4)[0] == [1, 2, 4, 8]
    assert steps_drawn(tmp_path, 5, batch_frequency=4, increase_log_steps=False, log_last_step=False) == ([4], 0, 1)
    assert steps_drawn(tmp_path, 1, batch_frequency=4, increase_log_steps=False, log_first_step=True) == ([], 1, 2)
    assert steps_drawn(tmp_path, 9, batch_frequency=1, disabled=True) == ([], 0, 0)


def test_the_same_images_and_noise_every_time(tmp_path):
    callback, model = ImageLogger(batch_frequency=1, max_images=4, log_images_kwargs={"sample": False}), Model()
    for step in (1, 2):
        callback.log_pictures(trainer(tmp_path, step), model)
    first, second = model.calls
    # Rows 0, 3, 6 and 9, evenly spaced.
    assert torch.allclose((first[0] + 1) * 127.5, torch.tensor([0.0, 3, 6, 9]), atol=1e-3)
    assert torch.equal(first[0], second[0]) and first[1] == second[1]
    assert first[3:] == (4, {"sample": False})


def test_training_does_not_notice(tmp_path):
    model = Model().train()
    before, mean = torch.get_rng_state(), model.norm.running_mean.clone()
    ImageLogger(batch_frequency=1).log_pictures(trainer(tmp_path, 1), model)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(model.norm.running_mean, mean)
    assert model.training and model.calls[0][2] is False


def test_files(tmp_path):
    ImageLogger(batch_frequency=1, max_images=1).log_pictures(trainer(tmp_path, 3), Model())
    folder = tmp_path / "images" / "train"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{n}_gs-000003_e-000000.png" for n in ("beyond", "inputs")
    ]
    assert np.asarray(Image.open(folder / "inputs_gs-000003_e-000000.png"))[3, 3].tolist() == [0, 0, 0]
    assert np.asarray(Image.open(folder / "beyond_gs-000003_e-000000.png"))[3, 3].tolist() == [255, 255, 255]


def test_without_validation_the_training_set_is_drawn(tmp_path):
    model = Model()
    ImageLogger(batch_frequency=1).log_pictures(trainer(tmp_path, 1, train=Rows()), model)
    assert len(model.calls) == 1


@pytest.mark.parametrize("options", [{"batch_frequency": 0}, {"batch_frequency": 1, "max_images": 0}])
def test_wrong_settings(options):
    with pytest.raises(UserError, match="expected at least 1, got 0"):
        ImageLogger(**options)


def unbuilt(kind, **attributes):
    """A model of a class, without its networks."""
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


WRONG = [
    (LatentDiffusion, {"ddim_step": 2}, "ddim_step.*did you mean 'ddim_steps'"),
    (LatentDiffusion, {"ddim_steps": 0}, r"log_images_kwargs\.ddim_steps: expected at least 1, got 0"),
    (LatentDiffusion, {"ddim_steps": "two"}, r"log_images_kwargs\.ddim_steps"),
    (LatentDiffusion, {"n_row": -1}, r"log_images_kwargs\.n_row: expected at least 1, got -1"),
    (LatentDiffusion, {"batch": 1}, r"log_images_kwargs\.batch: is set by the callback"),
    (LatentDiffusion, {"quantize_denoised": True}, r"quantize_denoised: Identity has no codebook"),
    (LatentDiffusion, {"dpm_steps": 0}, r"log_images_kwargs\.dpm_steps: expected at least 1, got 0"),
    (LatentDiffusion, {"sampler": "plms"}, r"log_images_kwargs\.sampler: expected ddim or dpm, got 'plms'"),
    (VQModel, {"ddim_steps": 2}, "ddim_steps"),
    (VQModel, {"N": 0}, r"log_images_kwargs\.N: expected at least 1, got 0"),
]


@pytest.mark.parametrize(("kind", "options", "message"), WRONG)
def test_options_that_the_model_would_not_take(kind, options, message):
    model = unbuilt(kind, first_stage_model=nn.Identity())
    with pytest.raises(UserError, match=message):
        ImageLogger(1, log_images_kwargs=options).check(model, {}, {})


@pytest.mark.parametrize("kind", [LatentDiffusion, VQModel])
def test_options_that_the_model_takes(kind):
    options = {"ddim_steps": None, "swap_images": 1, "sample": False} if kind is LatentDiffusion else {"N": 2}
    ImageLogger(1, log_images_kwargs=options).check(unbuilt(kind), {}, {})
    ImageLogger(1, log_images_kwargs={"anything": 1}).check(Model(), {}, {})  # your own, which takes any
    ImageLogger(1, log_images_kwargs={"anything": 1}).check(nn.Identity(), {}, {})  # without pictures


def test_any_key_and_strings(tmp_path):
    """uint8 images under another name are normalised too; what is not an array is left out."""

    class Named(Rows):
        def __getitem__(self, row):
            return {"jpg": torch.full((4, 4, 3), 255, dtype=torch.uint8), "caption": "a room", "idx": np.int64(row)}

    batch = ImageLogger(batch_frequency=1)._fixed_batch(trainer(tmp_path, 1, validation=Named()))
    assert set(batch) == {"jpg", "idx"} and torch.equal(batch["jpg"], torch.ones(8, 4, 4, 3))


def test_a_full_disk_leaves_no_half_pictures(tmp_path):
    callback, run = ImageLogger(batch_frequency=1), trainer(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*inputs_gs-000001"):
            callback.log_pictures(run, Model())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "images" / "train").iterdir())


def drawn_by(options, device="cpu", **attributes):
    """Arguments with which an EncDiff on a device is asked for pictures, and how that is told."""

    class On(LatentDiffusion):
        device = torch.device("cpu")

    On.device = torch.device(device)
    return ImageLogger(1, log_images_kwargs=options)._options(unbuilt(On, **{"use_ema": True, **attributes}))


def test_fewer_steps_without_a_gpu():
    few = {"N": 8, "sampler": "dpm", "dpm_steps": 10, "ddim_eta": 0.0}
    assert drawn_by({}) == (few, "DPM-Solver++ in 10 steps, as there is no GPU, with the EMA weights")
    assert drawn_by({"plot_ema": False, "sample_swap": False})[1].endswith("no GPU, with the live weights")
    assert drawn_by({}, "cuda") == ({"N": 8}, "DDIM in 200 steps, with the EMA weights")
    for given, told in (
        ({"ddim_steps": 50}, "DDIM in 50 steps"),
        ({"ddim_steps": None}, "DDIM in 1000 steps"),
        ({"sampler": "dpm"}, "DPM-Solver++ in 20 steps"),
        ({"sampler": "ddim"}, "DDIM in 200 steps"),
        ({"dpm_steps": 5, "sampler": "dpm"}, "DPM-Solver++ in 5 steps"),
    ):
        options, way = drawn_by(given, num_timesteps=1000)
        assert options == {"N": 8, **given} and way == f"{told}, with the EMA weights"
    assert ImageLogger(1)._options(Model()) == ({"N": 8}, ""), "a model of your own"


def test_names_and_descriptions_say_what_is_shown(tmp_path, caplog):
    """Files and loggers; `log_images` keeps LDM's names."""

    class Named(Model):
        picture_names = {"beyond": "far_away"}

    told = []
    run = trainer(tmp_path, 3)
    run.loggers = [SimpleNamespace(experiment=SimpleNamespace(add_image=lambda name, *_, **__: told.append(name)))]
    callback = ImageLogger(batch_frequency=1, max_images=1)
    with caplog.at_level("INFO"):
        callback.log_pictures(run, Named())
        run.global_step = 4
        callback.log_pictures(run, Named())
    path = tmp_path / "images" / "train" / "far_away_gs-000003_e-000000.png"
    assert Image.open(path).info["Description"] == "far_away at step 3" and told[:2] == [
        "train/inputs",
        "train/far_away",
    ]
    assert caplog.messages == [f"pictures are in {path.parent}: inputs, far_away"], "once"
    assert callback.drawing_seconds > 0
