"""Checkpoint files: old ones, hostile ones, damaged ones, and ones that lack a part."""

import contextlib
import copy
import logging
import os
import pickle
import pickletools
import runpy
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from old_checkpoints import old_layout
from torch import nn

from ldm.compat.checkpoints import fit_to, read_checkpoint, read_state_dict
from ldm.models.autoencoder import VQModel
from ldm.models.checkpoint import follow_configuration, load_weights
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import UserError, instantiate_from_config

REFERENCE = Path(__file__).parents[1] / "reference"
# Classes and functions that PyTorch 1.7 has, and that its checkpoints name.
KNOWN_TO_PYTORCH_1_7 = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "Long", "Int", "Short", "Char", "Byte", "Bool")),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_old_layout_loads(tmp_path, first_stage, zipped, caplog):
    """Nothing of it is imported, and its tensors are equal to the last bit."""
    plain = old_layout(tmp_path / "old.ckpt", first_stage, zipped)
    content, left_out = read_checkpoint(tmp_path / "old.ckpt")
    assert {"main_val_of_then.Callback", "omegaconf.dictconfig.DictConfig"} <= left_out
    assert "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint" in left_out
    assert content["global_step"] == plain["global_step"]
    expected = torch.load(first_stage, weights_only=True)["state_dict"]
    with caplog.at_level("INFO"):
        state = read_state_dict(tmp_path / "old.ckpt")
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert len(caplog.messages) == 1 and "left out pickled objects" in caplog.messages[0]


@pytest.mark.parametrize("file", ["lightning_1_4_2.ckpt", "lightning_1_4_2_before_1_6.ckpt"])
def test_a_genuine_file_of_that_time(file):
    """Written by PyTorch 1.7.1, Lightning 1.4.2 and OmegaConf 2.1.1 in either format of PyTorch's.

    A linear layer of weights .5 and biases -1 took six steps of AdamW at a rate of .25 along a constant gradient, each
    of which moves every entry by the rate.
    """
    content, left_out = read_checkpoint(REFERENCE / file)
    assert content["pytorch-lightning_version"] == "1.4.2"
    assert {"__main__.SetupCallback", "omegaconf.listconfig.ListConfig"} <= left_out
    torch.testing.assert_close(content["state_dict"]["encoder.weight"], torch.full((3, 2), -1.0))
    torch.testing.assert_close(content["state_dict"]["encoder.bias"], torch.full((3,), -2.5))
    assert content["state_dict"]["scale_factor"] == 0.25
    assert content["optimizer_states"][0]["state"][0]["step"] == 6


class Runs:
    """Pickles as a call."""

    def __init__(self, function, *args) -> None:
        self.call = (function, args)

    def __reduce__(self):
        return self.call


class Marks:
    """Leaves the marker when its state is restored."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __getstate__(self):
        return str(self.marker)

    def __setstate__(self, state):
        Path(state).touch()


def script(marker: Path) -> str:
    """A file that leaves the marker."""
    marker.with_name("script.py").write_text(f"open({str(marker)!r}, 'w').close()")
    return str(marker.with_name("script.py"))


HOSTILE = {
    "os.system": lambda marker: Runs(os.system, f"touch {marker}"),
    "subprocess": lambda marker: Runs(subprocess.call, ["touch", str(marker)]),
    "exec": lambda marker: Runs(exec, f"open({str(marker)!r}, 'w').close()"),
    "open": lambda marker: Runs(open, str(marker), "w"),
    "eval": lambda marker: Runs(eval, f"open({str(marker)!r}, 'w').close()"),
    "class": lambda marker: Runs(logging.FileHandler, str(marker)),
    "method": lambda marker: Runs(Path.touch, marker),
    "state": Marks,
    "script": lambda marker: Runs(runpy.run_path, script(marker)),
    "pickle in it": lambda marker: Runs(pickle.loads, pickle.dumps(Runs(os.system, f"touch {marker}"))),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("place", ["beside", "in the state dict"])
def test_a_malicious_pickle_does_not_run(tmp_path, first_stage, kind, zipped, place):
    """Whether it is left out or the file is refused, none of it is called."""
    marker, path = tmp_path / "marker", tmp_path / "hostile.ckpt"
    hostile = HOSTILE[kind](marker)
    if place == "beside":
        old_layout(path, first_stage, zipped, hostile=hostile)
    else:
        torch.save({"state_dict": {"w": hostile}}, path, _use_new_zipfile_serialization=zipped)
    try:
        state = read_state_dict(path)
    except UserError as error:
        assert "--trust" in str(error) or "no state dict" in str(error)
    else:
        assert place == "beside" and set(state) == set(torch.load(first_stage, weights_only=True)["state_dict"])
    assert not marker.exists()
    with contextlib.suppress(ModuleNotFoundError):  # raised after the harm is done
        torch.load(path, weights_only=False)
    assert marker.exists(), "the pickle is one that does its harm where it is run"


CALLS = {
    "protocol 0": lambda command: pickle.dumps(Runs(os.system, command), 0),
    "protocol 4": lambda command: pickle.dumps(Runs(os.system, command), 4),
    "INST": lambda command: f"(S'{command}'\nios\nsystem\n.".encode(),
    "OBJ": lambda command: f"(cos\nsystem\nS'{command}'\no.".encode(),
}


@pytest.mark.parametrize("place", ["alone", "zip", "before 1.6"])
@pytest.mark.parametrize("call", CALLS)
def test_a_pickle_by_hand_does_not_run(tmp_path, call, place):
    """With instructions that `torch.save` does not write."""
    marker, path = tmp_path / "marker", tmp_path / "hostile.ckpt"
    content = CALLS[call](f"touch {marker}")
    if place == "zip":
        torch.save({"w": torch.ones(1)}, tmp_path / "good.ckpt")
        with zipfile.ZipFile(tmp_path / "good.ckpt") as source, zipfile.ZipFile(path, "w") as target:
            for entry in source.namelist():
                target.writestr(entry, content if entry.endswith("/data.pkl") else source.read(entry))
    else:
        head = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head if place != "alone") + content)
    with pytest.raises(
        UserError, match=r"hostile\.ckpt' (is not a checkpoint|holds pickled objects|holds no state dict)"
    ):
        read_state_dict(path)
    assert not marker.exists()
    pickle.loads(content)
    assert marker.exists(), "the pickle is one that does its harm where it is run"


def test_nested_torch_load_does_not_run(tmp_path):
    """A storage that is unpickled by a second, unrestricted load."""
    marker = tmp_path / "marker"
    torch.save(Runs(os.system, f"touch {marker}"), tmp_path / "inner.pt")
    inner = Runs(torch.storage._load_from_bytes, (tmp_path / "inner.pt").read_bytes())
    torch.save({"hostile": inner, "state_dict": {"w": torch.ones(2)}}, tmp_path / "outer.pt")
    assert torch.equal(read_state_dict(tmp_path / "outer.pt")["w"], torch.ones(2))
    assert not marker.exists()


@pytest.mark.parametrize("which", ["first_stage", "encdiff"])
def test_ours_can_be_read_by_the_original(which, first_stage, trained_encdiff):
    """Nothing is named in the pickle that PyTorch 1.7 lacks or that is more than a tensor."""
    path = first_stage if which == "first_stage" else trained_encdiff.logdir / "checkpoints" / "last.ckpt"
    with zipfile.ZipFile(path) as archive:
        (name,) = (entry for entry in archive.namelist() if entry.endswith("/data.pkl"))
        operations = list(pickletools.genops(archive.read(name)))
        assert int(archive.read(name.replace("data.pkl", "version"))) <= 3, "the format's version of PyTorch 1.7"
    assert {str(argument) for operation, argument, _ in operations if operation.name == "GLOBAL"} <= (
        KNOWN_TO_PYTORCH_1_7
    )
    assert not any(operation.name in ("STACK_GLOBAL", "INST", "OBJ") for operation, _, _ in operations)
    assert {argument for operation, argument, _ in operations if operation.name == "PROTO"} == {2}


def small(**options) -> LatentDiffusion:
    from test_training import encdiff

    return encdiff(**options)


def save(path: Path, model: nn.Module, *without: str, **more: torch.Tensor) -> Path:
    state = (
        {k: v for k, v in model.state_dict().items() if not k.startswith(without)} if without else model.state_dict()
    )
    torch.save({"state_dict": {**state, **more}}, path)
    return path


def test_absent_ema_weights_begin_at_the_live_ones(tmp_path, caplog):
    """The EMA weights of a newly built model are random."""
    torch.manual_seed(0)
    path = save(tmp_path / "a.ckpt", small(), "model_ema.")
    torch.manual_seed(1)
    with caplog.at_level("INFO"):
        model = small(ckpt_path=str(path), ema_parameters="all")
    shadows = dict(model.model_ema.named_buffers())
    assert all(torch.equal(shadows[n.replace(".", "")], p) for n, p in model.model.named_parameters())
    encoder = dict(model.cond_stage_model_ema.named_buffers())
    assert all(torch.equal(encoder[n.replace(".", "")], p) for n, p in model.cond_stage_model.named_parameters())
    assert len(caplog.messages) == 1
    assert "not in the file: cond_stage_model_ema.* (" in caplog.text
    assert "model_ema.* (" in caplog.text


def test_ema_weights_of_a_first_stage(tmp_path):
    from test_training import DDCONFIG, LOSS

    def build(**options) -> VQModel:
        loss = {"target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": LOSS}
        return VQModel(DDCONFIG, loss, n_embed=16, embed_dim=3, **options)

    torch.manual_seed(0)
    path = save(tmp_path / "a.ckpt", build(), "loss.")
    model = build(use_ema=True, ckpt_path=str(path))
    shadows = dict(model.model_ema.named_buffers())
    for name, parameter in model.named_parameters():
        if not name.startswith("loss."):
            assert torch.equal(shadows[name.replace(".", "")], parameter), name


def test_present_ema_weights_are_kept(tmp_path):
    torch.manual_seed(0)
    first = small()
    first.model_ema.num_updates.fill_(7)
    for shadow in first.model_ema.buffers():
        shadow += 1 if shadow.is_floating_point() and shadow.ndim else 0
    model = small(ckpt_path=str(save(tmp_path / "a.ckpt", first)))
    assert model.model_ema.num_updates == 7
    found, expected = dict(model.model_ema.named_buffers()), dict(first.model_ema.named_buffers())
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_scale_factor_of_a_checkpoint(tmp_path):
    """LDM saves it only where it was computed; where it is missing, the first batch gives it."""
    model = small()
    model.scale_factor.fill_(0.25)
    whole, without = save(tmp_path / "a.ckpt", model), save(tmp_path / "b.ckpt", model, "scale_factor")
    loaded = small(ckpt_path=str(whole))
    assert loaded.scale_factor == 0.25 and loaded.scale_factor_known
    assert not small(ckpt_path=str(without)).scale_factor_known
    constant = small(ckpt_path=str(without), scale_by_std=False, scale_factor=0.5)
    assert constant.scale_factor == 0.5 and constant.scale_factor_known


def test_logvar_and_losses_present_or_absent(tmp_path, caplog):
    plain, learned = small(), small(learn_logvar=True, logvar_init=0.3)
    with caplog.at_level("INFO"):
        assert load_weights(plain, save(tmp_path / "a.ckpt", learned)) == set()
        assert load_weights(learned, save(tmp_path / "b.ckpt", plain)) == {"logvar"}
        more = {"loss.discriminator.main.0.weight": torch.zeros(1), "loss.logvar": torch.zeros(())}
        load_weights(plain, save(tmp_path / "c.ckpt", plain, **more))
    assert learned.logvar[0].item() == pytest.approx(0.3)
    count = len(plain.state_dict())
    assert caplog.messages == [
        f"loaded {count} weights from {tmp_path / 'a.ckpt'}; not used: logvar",
        f"loaded {count} weights from {tmp_path / 'b.ckpt'}; not in the file: logvar",
        f"loaded {count} weights from {tmp_path / 'c.ckpt'}; not used: loss.* (2)",
    ]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_damaged_files(tmp_path, first_stage, zipped):
    old_layout(tmp_path / "whole.ckpt", first_stage, zipped)
    content = (tmp_path / "whole.ckpt").read_bytes()
    broken = {
        "empty": b"",
        "text": b"This is not a checkpoint at all, but a text of some length.",
        "zip": b"PK\x03\x04" + bytes(100),
        **{f"cut at {part}": content[: len(content) * part // 10] for part in (1, 5, 9)},
        "cut in the head": content[:60],
        "wrong in the middle": content[:2000] + b"\x00" * 3000 + content[5000:],
    }
    for name, damaged in broken.items():
        path = tmp_path / "damaged.ckpt"
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged\.ckpt") as error:
            read_state_dict(path)
        assert len(str(error.value)) < 500, name


def test_files_without_weights(tmp_path):
    for content in ([1, 2], {"state_dict": {}}, {"state_dict": {"a": 1}}, {"epoch": 3}):
        torch.save(content, tmp_path / "a.ckpt")
        with pytest.raises(UserError, match="holds no state dict"):
            read_state_dict(tmp_path / "a.ckpt")


def test_a_first_stage_from_an_old_checkpoint(tmp_path, first_stage, trained_encdiff):
    """`first_stage_config.params.ckpt_path` may be one."""
    from ldm.config import load_yaml

    config = load_yaml(next(trained_encdiff.logdir.glob("configs/*-project.yaml"))).model
    old_layout(tmp_path / "old.ckpt", first_stage)
    config.params.first_stage_config.params.ckpt_path = str(tmp_path / "old.ckpt")
    model = instantiate_from_config(config, "model")
    expected = torch.load(first_stage, weights_only=True)["state_dict"]
    for name, value in model.first_stage_model.state_dict().items():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_numbers_of_numpy_are_read(tmp_path, zipped):
    """As LDM's schedules leave them in optimisers, without importing what makes them."""
    numbers = [np.float64(2.56e-4), np.float32(0.1), np.int64(-7), np.uint8(200), np.bool_(True)]
    content = {
        "state_dict": {"w": torch.ones(2)},
        "numbers": numbers,
        "text": np.str_("abc"),
        "date": np.datetime64(0, "s"),
    }
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    found, left_out = read_checkpoint(tmp_path / "a.ckpt")
    assert found["numbers"] == [number.item() for number in numbers]
    assert [type(number) for number in found["numbers"]] == [float, float, int, int, bool]
    assert not left_out & {"numpy.dtype", "numpy._core.multiarray.scalar"}


def test_a_compressed_archive(tmp_path, first_stage):
    """Its tensors are not stored in the file as they are."""
    with (
        zipfile.ZipFile(first_stage) as source,
        zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    found, expected = read_state_dict(tmp_path / "a.ckpt"), read_state_dict(first_stage)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_names_of_data_parallel_and_entries_that_are_no_tensors(tmp_path, caplog):
    state = {"module.a.w": torch.ones(2), "module.b": torch.zeros(1)}
    torch.save({"state_dict": {**state, "version": 3, "none": None}}, tmp_path / "a.ckpt")
    with caplog.at_level("INFO"):
        assert set(read_state_dict(tmp_path / "a.ckpt")) == {"a.w", "b"}
    assert "not tensors: version, none" in caplog.text and "dropped the prefix 'module.'" in caplog.text
    # One name without it: then it is a name like others.
    torch.save({"state_dict": {**state, "c": torch.ones(1)}}, tmp_path / "b.ckpt")
    assert set(read_state_dict(tmp_path / "b.ckpt")) == {*state, "c"}


def test_a_checkpoint_of_ldm(tmp_path):
    """LDM's schedule has one part less; and its scale factor is the configuration's where it was not computed."""
    model = small(scale_by_std=False, scale_factor=0.2)
    path = save(tmp_path / "a.ckpt", model, "alphas_cumprod_next")
    loaded = small(ckpt_path=str(path), scale_by_std=False, scale_factor=0.5)
    assert torch.equal(loaded.alphas_cumprod_next, model.alphas_cumprod_next)
    assert loaded.scale_factor == 0.5
    saved = {"state_dict": dict(model.state_dict())}
    model.on_save_checkpoint(saved)
    assert "scale_factor" not in saved["state_dict"]
    del saved["state_dict"]["alphas_cumprod_next"]
    loaded.on_load_checkpoint(saved)
    loaded.load_state_dict(saved["state_dict"])
    assert loaded.scale_factor == 0.5


class Counting(torch.optim.SGD):
    """Keeps a count in its group, as optimisers without a schedule do."""

    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        self.param_groups[0]["k"] = 0


class OwnOptimizer(LatentDiffusion):
    """Somebody's model: a schedule that sets the learning rate itself."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.trained_parameters()[0], lr=0.5)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


@pytest.fixture
def saved_settings():
    group = {"lr": 0.01, "initial_lr": 0.1, "momentum": 0.9, "k": 4, "params": [0]}
    schedule = {"last_epoch": 4, "base_lrs": [0.1], "_last_lr": [0.01]}
    return {"optimizer_states": [{"state": {}, "param_groups": [group]}], "lr_schedulers": [schedule]}


def test_settings_are_the_configurations_and_counts_the_checkpoints(monkeypatch, saved_settings, caplog):
    model = small()
    model.schedule, model._trainer = lambda step: 1 / (1 + step), SimpleNamespace(training=True)
    made = [Counting(model.trained_parameters()[0], lr=0.3, momentum=0.5)]
    monkeypatch.setattr("ldm.models.checkpoint.optimizers_of", lambda _: made)
    with caplog.at_level("INFO"):
        follow_configuration(model, saved_settings)
    (group,), (schedule,) = saved_settings["optimizer_states"][0]["param_groups"], saved_settings["lr_schedulers"]
    rate = pytest.approx(0.3 / 5)
    assert (group["lr"], group["initial_lr"], group["momentum"], group["k"]) == (rate, 0.3, 0.5, 4)
    assert (schedule["base_lrs"], schedule["_last_lr"]) == ([0.3], [rate])
    assert caplog.messages == [
        "settings of the optimiser changed by this resume: learning rate 0.3 (was 0.1), momentum 0.5 (was 0.9)"
    ]


@pytest.mark.parametrize("kind", ["not trained", "its own optimiser"])
def test_whose_settings_stay(saved_settings, kind):
    model = small()
    model._trainer = SimpleNamespace(training=kind != "not trained")
    if kind != "not trained":
        model.__class__ = OwnOptimizer
    before = copy.deepcopy(saved_settings)
    follow_configuration(model, saved_settings)
    assert saved_settings == before


def test_ema_weights_without_their_counter_are_kept(tmp_path):
    first = small()
    for shadow in first.model_ema.buffers():
        shadow += 5 if shadow.is_floating_point() and shadow.ndim else 0
    model = small(ckpt_path=str(save(tmp_path / "a.ckpt", first, "model_ema.num_updates")))
    found, expected = dict(model.model_ema.named_buffers()), dict(first.model_ema.named_buffers())
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_scale_factor_of_shape_one(tmp_path):
    """The original with an identity first stage."""
    model = small()
    path = save(tmp_path / "a.ckpt", model, "scale_factor", scale_factor=torch.tensor([0.5]))
    assert small(ckpt_path=str(path)).scale_factor == 0.5


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_objects_of_pytorch_are_left_out(tmp_path, zipped):
    layer = nn.Linear(2, 2)
    content = {"optimizer": torch.optim.Adam(layer.parameters()), "state_dict": layer.state_dict()}
    if zipped:  # the older format keeps the source code of modules too, which PyTorch refuses
        content["layer"] = layer
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    found, left_out = read_checkpoint(tmp_path / "a.ckpt")
    assert "torch.optim.adam.Adam" in left_out
    assert torch.equal(found["state_dict"]["weight"], layer.weight)


def test_ema_weights_without_statistics_get_the_live_ones():
    """As checkpoints were before the statistics had EMA weights; without any EMA weights none are made up."""
    from test_training import encdiff

    model = encdiff(ema_parameters="all")
    own, state = model.state_dict(), dict(model.state_dict())
    statistics = [name for name in state if name.startswith("cond_stage_model_ema.") and "running_" in name]
    for name in statistics:
        del state[name]
    fit_to(own, state)
    assert statistics and set(state) == set(own) and all(torch.equal(state[name], own[name]) for name in statistics)
    for name in [name for name in state if name.startswith("cond_stage_model_ema.")]:
        del state[name]
    fit_to(own, state)
    assert not any(name.startswith("cond_stage_model_ema.") for name in state)
