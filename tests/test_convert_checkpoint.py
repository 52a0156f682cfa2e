"""scripts/convert_checkpoint.py: old checkpoints to ours, and ours to safetensors."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import CHECKPOINT, ROOT
from old_checkpoints import old_layout
from safetensors import safe_open

import ldm
from ldm.compat.checkpoints import read_checkpoint
from ldm.config import load_yaml
from ldm.util import UserError

_spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "scripts" / "convert_checkpoint.py")
assert _spec is not None and _spec.loader is not None
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)


def last(logdir: Path) -> Path:
    return logdir / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("stage", ["first stage", "EncDiff"])
def test_old_to_ours_resumes(stage, trust, cli, first_stage, trained_encdiff, tmp_path, capsys):
    """Weights, optimisers, learning rate and step are those of the old file, and training resumes there."""
    source = first_stage if stage == "first stage" else last(trained_encdiff.logdir)
    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    # LPIPS was part of the model then.
    plain = old_layout(old, source, weights={script.FIXED + "net.w": torch.zeros(3)})
    assert script.main([str(old), str(new), *(["--trust"] if trust else [])]) == 0
    assert f"with the state of training at step {plain['global_step']}" in capsys.readouterr().out

    found, left_out = read_checkpoint(new)
    assert not left_out and found["global_step"] == plain["global_step"] == 8
    assert list(found["state_dict"]) == list(torch.load(source, weights_only=True)["state_dict"])

    base, more = (cli.vq, ()) if stage == "first stage" else (cli.enc, (f"{CHECKPOINT}={first_stage}",))
    run = cli.run("--base", base, "-t", "--gpus", 0, "--resume_from_checkpoint", new, "--max_steps", 10, *more)
    assert run.status == 0, run.err
    resumed = torch.load(last(run.logdir), weights_only=True)
    assert resumed["global_step"] == 10
    assert resumed["epoch"] == 2, "two epochs of four batches were done"
    for optimizer in resumed["optimizer_states"]:
        assert {int(state["step"]) for state in optimizer["state"].values()} == {10}
    if stage == "EncDiff":
        assert resumed["lr_schedulers"][0]["last_epoch"] == 10
        scale = [content["state_dict"]["scale_factor"] for content in (plain, resumed)]
        assert torch.equal(*scale)


def test_the_next_step_is_the_same_as_from_ours(cli, first_stage, trained_encdiff, tmp_path, monkeypatch):
    """Resuming from the converted file and from our own gives the same weights."""
    source = last(trained_encdiff.logdir)
    old_layout(tmp_path / "old.ckpt", source)
    assert script.main([str(tmp_path / "old.ckpt"), str(tmp_path / "new.ckpt")]) == 0
    weights = []
    for name in (source, tmp_path / "new.ckpt"):
        run = cli.run("--base", cli.enc, "-t", "--gpus", 0, "--resume_from_checkpoint", name, "--max_steps", 9,
                      f"{CHECKPOINT}={first_stage}")  # fmt: skip
        assert run.status == 0, run.err
        weights.append(torch.load(last(run.logdir), weights_only=True)["state_dict"])
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_ours_to_safetensors(trained_encdiff, rooms, tmp_path):
    target = tmp_path / "model.safetensors"
    assert script.main([str(trained_encdiff.logdir), str(target)]) == 0
    expected = torch.load(last(trained_encdiff.logdir), weights_only=True)
    with safe_open(target, "pt") as file:
        about = file.metadata()
        assert len(about.pop("sha256")) == 64 and about == {"format": "pt", "global_step": "8", "epoch": "1"}
        assert set(file.keys()) == set(expected["state_dict"])
        assert all(torch.equal(file.get_tensor(k), v) for k, v in expected["state_dict"].items())
    assert load_yaml(tmp_path / "model.yaml").model.target == "ldm.models.diffusion.ddpm.LatentDiffusion"
    x, t = torch.rand(2, 3, 16, 16), torch.tensor([3, 50])
    for weights in ("live", "ema"):
        ours, theirs = (ldm.load(path, weights=weights) for path in (trained_encdiff.logdir, target))
        for model in (ours, theirs):
            model.z = model.get_first_stage_encoding(model.encode_first_stage(x))
            model.out = model.apply_model(model.z, t, model.get_learned_conditioning(x))
        assert torch.equal(ours.z, theirs.z) and torch.equal(ours.out, theirs.out)
    # And back.
    assert script.main([str(target), str(tmp_path / "again.ckpt")]) == 0
    assert set(read_checkpoint(tmp_path / "again.ckpt")[0]["state_dict"]) == set(expected["state_dict"])


def test_old_to_safetensors_with_a_configuration(first_stage, trained, tmp_path):
    """Given by --config, where there is no log directory that holds it."""
    old_layout(tmp_path / "old.ckpt", first_stage, zipped=False)
    config = next(trained.logdir.glob("configs/*-project.yaml"))
    target = tmp_path / "model.safetensors"
    assert script.main([str(tmp_path / "old.ckpt"), str(target), "--config", str(config)]) == 0
    model, expected = ldm.load(target), ldm.load(trained.logdir)
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(model(x)[0], expected(x)[0])


def test_damaged_files(first_stage, trained, tmp_path, capsys):
    """A converted one would have checksums that hold; so is an export refused where one of its bits is wrong."""
    data = bytearray(first_stage.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.ckpt").write_bytes(data)
    for more in ([], ["--trust"]):
        assert script.main([str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt"), *more]) == 2
        assert "is damaged" in capsys.readouterr().err and not (tmp_path / "b.ckpt").exists()
    target = tmp_path / "model.safetensors"
    assert script.main([str(trained.logdir), str(target)]) == 0
    data = bytearray(target.read_bytes())
    data[-100] ^= 1
    target.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors' is damaged"):
        ldm.load(target)


def test_trust_runs_what_the_file_holds(tmp_path, first_stage):
    """Only with --trust. A checkpoint without the state of training gives weights only."""

    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'marker'}",)

    state = torch.load(first_stage, weights_only=True)["state_dict"]
    torch.save({"state_dict": state, "hostile": Runs()}, tmp_path / "old.ckpt")
    command = [str(tmp_path / "old.ckpt"), str(tmp_path / "new.ckpt")]
    assert script.main(command) == 2
    assert not (tmp_path / "marker").exists() and not (tmp_path / "new.ckpt").exists()
    assert script.main([*command, "--trust"]) == 0
    assert (tmp_path / "marker").exists()
    assert set(read_checkpoint(tmp_path / "new.ckpt")[0]) == {"state_dict"}


def test_mistakes(trained, first_stage, tmp_path, capsys):
    """One line, exit status 2, and nothing written."""
    (tmp_path / "there.ckpt").write_bytes(b"mine")
    (tmp_path / "there.yaml").write_text("mine: 1")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    cases = [
        ([tmp_path / "none.ckpt", tmp_path / "new.ckpt"], "there is no log directory or checkpoint"),
        ([first_stage, tmp_path / "new.pt"], "ends in .ckpt or .safetensors"),
        ([first_stage, tmp_path / "there.ckpt"], "--force"),
        ([first_stage, tmp_path / "there.safetensors"], "there.yaml' exists"),
        ([tmp_path / "folder", tmp_path / "new.ckpt"], "has no checkpoint"),
        ([tmp_path / "text.ckpt", tmp_path / "new.ckpt"], "a checkpoint"),
        ([tmp_path / "text.ckpt", tmp_path / "new.ckpt", "--trust"], "a checkpoint"),
        ([tmp_path / "there.ckpt", tmp_path / "there.ckpt", "--force"], "is the checkpoint itself"),
        ([tmp_path / "text.ckpt", tmp_path / "new.safetensors"], "configs' holds no"),
    ]
    for arguments, message in cases:
        assert script.main([str(argument) for argument in arguments]) == 2
        err = capsys.readouterr().err
        assert message in err and err.startswith("error: ") and err.count("\n") == 1, (arguments, err)
    assert sorted(tmp_path.iterdir()) == before
    assert script.main([str(first_stage), str(tmp_path / "there.ckpt"), "--force"]) == 0
    assert (tmp_path / "there.ckpt").read_bytes() != b"mine"


def test_resuming_an_old_file_says_to_convert_it(cli, first_stage, tmp_path):
    old_layout(tmp_path / "old.ckpt", first_stage)
    run = cli.run("--base", cli.vq, "-t", "--gpus", 0, "--resume_from_checkpoint", tmp_path / "old.ckpt")
    assert run.status == 2 and "convert_checkpoint.py" in run.err and "--resume_from_checkpoint" in run.err
    assert not run.logdirs


@pytest.mark.parametrize(
    ("key", "value", "trusted"),
    [
        ("global_step", torch.tensor(8), True),
        ("global_step", np.int64(8), True),
        ("epoch", None, False),
        ("epoch", "two", False),
        ("global_step", -1, False),
        ("optimizer_states", [{"state": Path("x")}], False),
    ],
    ids=str,
)
def test_counters_of_other_types(tmp_path, first_stage, key, value, trusted, cli, capsys):
    """They become whole numbers, or only the weights are taken, and the message says why."""
    content = {**old_layout(tmp_path / "old.ckpt", first_stage), key: value}
    torch.save(content, tmp_path / "old.ckpt")
    assert script.main([str(tmp_path / "old.ckpt"), str(tmp_path / "new.ckpt"), "--trust"]) == 0
    out, found = capsys.readouterr().out, torch.load(tmp_path / "new.ckpt", weights_only=True)
    if trusted:
        assert "at step 8" in out and type(found["global_step"]) is int
        run = cli.run("--base", cli.vq, "-t", "--gpus", 0, "--max_steps", 9, "--resume_from_checkpoint",
                      tmp_path / "new.ckpt")  # fmt: skip
        assert run.status == 0, run.err
    else:
        assert f"weights only: {key} of the source" in out and set(found) == {"state_dict"}


def test_a_resume_with_other_trained_parameters(cli, first_stage, trained_encdiff):
    """The optimiser's state does not fit, which Lightning would report by a traceback."""
    run = cli.run("--base", cli.enc, "-t", "--gpus", 0, "--resume_from_checkpoint", last(trained_encdiff.logdir),
                  f"{CHECKPOINT}={first_stage}", "model.params.cond_stage_trainable=false")  # fmt: skip
    assert run.status == 2 and "cond_stage_trainable" in run.err and "model.params.ckpt_path" in run.err
    assert not run.logdirs
