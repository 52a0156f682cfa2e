"""What `ldm.load` says of damaged runs: one line that names the file, or the argument."""

import shutil
from pathlib import Path

import pytest
import torch

import ldm
from ldm.util import UserError

VQ = "target: ldm.models.autoencoder.VQModel"
CONFIGS = {
    "empty": ("", "must hold the sections"),
    "without a model": ("data: {}\n", "is damaged: 'model'"),
    "model a number": ("model: 3\n", "expected the keys target and params"),
    "params a text": (f"model: {{{VQ}, params: abc}}\n", "expected the keys target and params"),
    "first stage a text": (f"model: {{{VQ}, params: {{first_stage_config: {{params: abc}}}}}}\n", "first_stage_config"),
    "a broken reference": (f"model: {{{VQ}, params: {{embed_dim: '${{a.b}}'}}}}\n", "'a.b' not found"),
    "no model's class": (
        "model: {target: collections.OrderedDict, params: {}}\n",
        "OrderedDict' is defined in 'collections'",
    ),
}
WEIGHT = "encoder.conv_in.weight"
VALUES = {
    "NaN": (lambda w: w * float("nan"), "1 of its 131 weights are not finite (the first: encoder.conv_in.weight)"),
    "whole numbers": (lambda w: w.long(), "encoder.conv_in.weight is torch.int64"),
    "complex numbers": (lambda w: w.to(torch.complex64), "encoder.conv_in.weight is torch.complex64"),
    "no tensor": (lambda w: None, "1 of 121 weights are missing (the first: encoder.conv_in.weight)"),
}


@pytest.fixture
def logdir(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained.logdir, tmp_path / "run"))


def said(*arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        ldm.load(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_damaged_configuration(logdir, case):
    text, expected = CONFIGS[case]
    next(logdir.glob("configs/*-project.yaml")).write_text(text)
    assert expected in said(logdir)


@pytest.mark.parametrize("case", VALUES)
def test_values_that_are_no_weights(logdir, case):
    edit, expected = VALUES[case]
    path = logdir / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["state_dict"][WEIGHT] = edit(content["state_dict"][WEIGHT])
    torch.save(content, path)
    assert expected in said(logdir) and str(path) in said(logdir)


def test_names_that_are_none_and_precision_that_is_fine(logdir):
    path = logdir / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    state = content["state_dict"]
    torch.save({**content, "state_dict": {**state, 7: torch.ones(2)}}, path)
    assert "7 is no name of a weight" in said(logdir)
    torch.save({**content, "state_dict": {**state, WEIGHT: state[WEIGHT].half()}}, path)
    assert torch.equal(ldm.load(logdir).state_dict()[WEIGHT], state[WEIGHT].half().float())


def test_the_newest_whole_checkpoint_is_named_where_the_last_is_not(logdir):
    last = logdir / "checkpoints" / "last.ckpt"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    named = f"the newest whole one beside it is '{logdir / 'checkpoints' / 'epoch=000001.ckpt'}' (step 8)"
    assert f"'{last}' is damaged" in said(logdir) and named in said(logdir)
    last.unlink()
    assert named in said(logdir)


@pytest.mark.parametrize("device", ["cdua", "cuda:99"])
def test_a_device_that_cannot_be_used(logdir, device):
    assert f"device: '{device}' cannot be used" in said(logdir, device=device)
