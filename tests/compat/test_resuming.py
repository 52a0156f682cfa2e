"""Values in a checkpoint that Lightning could not restore, or would take without a word."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint

from ldm.callbacks.disentanglement import DisentanglementCallback
from ldm.callbacks.finite import FiniteCallback
from ldm.callbacks.stop import OpenValidation
from ldm.cli.configure import without_checkpoints
from ldm.compat.resuming import check_resumable
from ldm.util import UserError, instantiate_from_config

LOOP, STEPS = "epoch_loop.", "epoch_loop.automatic_optimization.optim_progress"
CHECKPOINTS = "ModelCheckpoint{'monitor': 'train/epoch_num', 'mode': 'max', 'every_n_train_steps': 0, 'every_n_epochs': 1, 'train_time_interval': None}"  # noqa: E501
DELETE: Any = object()


@pytest.fixture(scope="module")
def setting(trained_encdiff) -> tuple[Any, list[Any], dict[str, Any]]:
    """The model, the callbacks with a state, and the content of a checkpoint of theirs."""
    config = OmegaConf.load(next(trained_encdiff.logdir.glob("configs/*-project.yaml")))
    node = without_checkpoints(OmegaConf.to_container(config.model, resolve=True))  # type: ignore[arg-type]
    folder = trained_encdiff.logdir / "checkpoints"
    callbacks = [
        DisentanglementCallback(metrics=[]),
        FiniteCallback(),
        OpenValidation(),
        ModelCheckpoint(folder, monitor="train/epoch_num", mode="max", save_top_k=3, save_on_train_epoch_end=True),
    ]
    return instantiate_from_config(node), callbacks, torch.load(folder / "last.ckpt", weights_only=True)


def put(*place: Any, value: Any) -> Callable[[dict], None]:
    """Replace or delete the value at a place; a function gets the old one."""

    def edit(content: dict) -> None:
        node = content
        for key in place[:-1]:
            node = node[key]
        if value is DELETE:
            del node[place[-1]]
        else:
            node[place[-1]] = value(node[place[-1]]) if callable(value) else value

    return edit


WEIGHT = "model.diffusion_model.time_embed.0.weight"
MOMENT = ("optimizer_states", 0, "state", 0)
FIT = ("loops", "fit_loop")
# name: (what is done to the content, what the line must hold).
CASES: dict[str, tuple[Callable[[dict], Any], str]] = {
    "step a text": (put("global_step", value="8"), "global_step is '8', not a count"),
    "step negative": (put("global_step", value=-8), "global_step is -8"),
    "step another": (put("global_step", value=800), "global_step is 800, and loops.fit_loop counts 8 steps"),
    "epoch negative": (put("epoch", value=-1), "epoch is -1"),
    "version": (put("pytorch-lightning_version", value="two"), "pytorch-lightning_version is 'two'"),
    "no version": (put("pytorch-lightning_version", value=DELETE), "pytorch-lightning_version is missing"),
    # ---- weights
    "state dict a list": (put("state_dict", value=[1]), "state_dict is a list"),
    "weight a number": (put("state_dict", WEIGHT, value=3), f"3 as '{WEIGHT}', not a tensor"),
    "weight named by a number": (put("state_dict", value=lambda s: {**s, 7: s[WEIGHT]}), "as 7"),
    "weight missing": (put("state_dict", WEIGHT, value=DELETE), "another model: 1 of"),
    "weight of another shape": (put("state_dict", WEIGHT, value=lambda w: w[1:]), "1 have other shapes"),
    "weight rounded": (put("state_dict", WEIGHT, value=torch.Tensor.half), f"{WEIGHT} is torch.float16"),
    "weight of integers": (put("state_dict", WEIGHT, value=torch.Tensor.long), f"{WEIGHT} is torch.int64"),
    "weight sparse": (put("state_dict", WEIGHT, value=torch.Tensor.to_sparse), f"{WEIGHT} is torch.float32"),
    "weight NaN": (put("state_dict", WEIGHT, value=lambda w: w * float("nan")), "1 of its"),
    # ---- loops
    "no loops": (put("loops", value=DELETE), "no state of a training run"),
    "loops None": (put("loops", value=None), "loops is missing, without the counters of a fit_loop"),
    "loops a list": (put("loops", value=[1]), "loops is a list"),
    "no fit loop": (put(*FIT, value=DELETE), "without the counters of a fit_loop"),
    "no epochs": (put(*FIT, "epoch_progress", value=DELETE), "epoch_progress is missing, not counters"),
    "no batches": (put(*FIT, f"{LOOP}batch_progress", value=DELETE), "batch_progress is missing"),
    "batches a text": (put(*FIT, f"{LOOP}batch_progress", "current", "ready", value="4"), "batch_progress is a dict"),
    "last batch": (put(*FIT, f"{LOOP}batch_progress", "is_last_batch", value=DELETE), "is_last_batch"),
    "steps None": (put(*FIT, STEPS, "optimizer", "step", "total", value=None), "optimizer/step is a dict"),
    "loader's state": (put(*FIT, "state_dict", "combined_loader", value=3), "combined_loader is 3"),
    "validation": (put(*FIT, f"{LOOP}val_loop.batch_progress", value=3), "val_loop.batch_progress is 3"),
    "loop's state": (put(*FIT, f"{LOOP}state_dict", value=3), "state_dict is 3"),
    # ---- optimisers
    "optimizers a dict": (put("optimizer_states", value={}), "optimizer_states is a dict"),
    "optimizers empty": (put("optimizer_states", value=[]), "optimizer_states is a list"),
    "optimizer None": (put("optimizer_states", 0, value=None), "optimizer_states[0] is missing"),
    "another optimizer": (put("optimizer_states", value=lambda s: [*s, *s]), "optimisers of"),
    "no groups": (put("optimizer_states", 0, "param_groups", value=DELETE), "without param_groups"),
    "group a number": (put("optimizer_states", 0, "param_groups", 0, value=1), "param_groups holds 1"),
    "rate a text": (put("optimizer_states", 0, "param_groups", 0, "lr", value="fast"), "lr is 'fast'"),
    "no betas": (put("optimizer_states", 0, "param_groups", 0, "betas", value=DELETE), "betas is missing"),
    "a parameter less": (put("optimizer_states", 0, "param_groups", 0, "params", value=lambda p: p[1:]), "state holds"),
    "moment of another shape": (put(*MOMENT, "exp_avg", value=lambda m: m[1:]), "exp_avg of the parameter 0 of opti"),
    "moment a text": (put(*MOMENT, "exp_avg", value="abc"), "of the parameter 0, exp_avg is 'abc'"),
    "moment NaN": (put(*MOMENT, "exp_avg_sq", value=lambda m: m / 0), "of the parameter 0, exp_avg_sq is not finite"),
    "moment's step": (put(*MOMENT, "step", value="8"), "of the parameter 0, step is '8'"),
    "no moment": (put(*MOMENT, "exp_avg", value=DELETE), "exp_avg is missing"),
    "switch a text": (put("optimizer_states", 0, "param_groups", 0, "maximize", value="abc"), "maximize is 'abc'"),
    "another optimiser": (
        put("optimizer_states", 0, "param_groups", 0, "momentum", value=0.9),
        "another optimiser's (settings beyond Adam's: momentum; here: none): compare optimizer_config",
    ),
    "moment a list": (put(*MOMENT, value=[1]), "state holds a list for 0"),
    # ---- schedules
    "no schedules": (put("lr_schedulers", value=DELETE), "lr_schedulers is missing"),
    "a schedule less": (put("lr_schedulers", value=[]), "it holds 0 lr_schedulers, and this configuration has 1"),
    "schedule a number": (put("lr_schedulers", 0, value=3), "lr_schedulers[0] is 3"),
    "schedule's epoch": (put("lr_schedulers", 0, "last_epoch", value="8"), "last_epoch"),
    "schedule's count": (put("lr_schedulers", 0, "_step_count", value="9"), "_step_count is '9'"),
    "schedule's rates": (put("lr_schedulers", 0, "base_lrs", value=["a"]), "base_lrs is a list"),
    "schedule's functions": (put("lr_schedulers", 0, "lr_lambdas", value=[]), "lr_lambdas"),
    # ---- callbacks
    "callbacks a list": (put("callbacks", value=[1]), "callbacks is a list"),
    "callback a number": (put("callbacks", "DisentanglementCallback", value=3), "callbacks is a dict"),
    "callback's value": (put("callbacks", "DisentanglementCallback", "validations", value="2"), "'2' as validations"),
    "callback's key": (put("callbacks", CHECKPOINTS, "best_model_path", value=DELETE), "lacks best_model_path"),
    "best checkpoints": (put("callbacks", CHECKPOINTS, "best_k_models", value=[1]), "a list as best_k_models"),
    "their scores": (put("callbacks", CHECKPOINTS, "best_k_models", value={"a": "b"}), "not scores"),
}


def copied(content: Any) -> Any:
    """A copy of its dictionaries and lists, with the same tensors."""
    if isinstance(content, dict):
        return {key: copied(value) for key, value in content.items()}
    return list(map(copied, content)) if isinstance(content, list) else content


@pytest.mark.parametrize("case", CASES)
def test_a_value_that_cannot_be_restored(setting, tmp_path, case):
    model, callbacks, content = setting
    edit, expected = CASES[case]
    wrong = copied(content)
    edit(wrong)
    path = tmp_path / "wrong.ckpt"
    torch.save(wrong, path)
    with pytest.raises(UserError, match=re.escape(expected)) as error:
        check_resumable(path, model, "-r", callbacks)
    line = str(error.value)
    assert line.startswith("-r: ") and str(path) in line and "\n" not in line and len(line) < 700


def test_what_was_saved_can_be_resumed_from(setting, tmp_path):
    """Also without what older files lack, and with what Lightning's callbacks of then left."""
    model, callbacks, content = setting
    path = tmp_path / "right.ckpt"
    assert {callback.state_key for callback in callbacks} == set(content["callbacks"])
    edits = [
        put("epoch", value=1),
        put("callbacks", value=DELETE),
        put("lr_schedulers", 0, "_is_initial", value=DELETE),
        put("callbacks", CHECKPOINTS, "best_model_score", value=None),
        put("optimizer_states", 0, "param_groups", 0, "fused", value=DELETE),
    ]
    for edit in edits:
        right = copied(content)
        edit(right)
        torch.save(right, path)
        check_resumable(path, model, "-r", callbacks)


def test_the_newest_whole_one_is_named(setting, tmp_path):
    model, callbacks, content = setting
    torch.save(content, tmp_path / "epoch=000001.ckpt")
    torch.save({**content, "loops": None}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"the newest whole one beside it is '.*epoch=000001\.ckpt' \(step 8\)"):
        check_resumable(tmp_path / "last.ckpt", model, "-r", callbacks)


@pytest.fixture
def logdir(trained_encdiff, tmp_path) -> Path:
    return Path(shutil.copytree(trained_encdiff.logdir, tmp_path / "run"))


def test_resuming_a_folder_whose_last_checkpoint_is_damaged(cli, logdir, monkeypatch):
    """The newest that is whole is taken, and a line says so; nothing else is."""
    taken: list[str] = []
    monkeypatch.setattr("pytorch_lightning.Trainer.fit", lambda *_, ckpt_path, **__: taken.append(ckpt_path))
    last, other = logdir / "checkpoints" / "last.ckpt", logdir / "checkpoints" / "epoch=000001.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    result = cli.run("-r", logdir, "-t")
    assert result.status == 0 and taken == [str(other)], result.err
    (line,) = (line for line in result.log.splitlines() if line.startswith("resuming from"))
    assert line.startswith(f"resuming from '{other}' (step 8): last.ckpt is not a checkpoint, or is truncated")

    result = cli.run("-r", last, "-t")
    assert result.status == 2 and len(result.errors) == 1
    assert f"'{last}' is not a checkpoint, or is truncated" in result.err and f"'{other}' (step 8)" in result.err
    last.unlink()
    result = cli.run("-r", logdir)
    assert result.status == 0 and f"resuming from '{other}' (step 8)\n" in result.log
    for path in (logdir / "checkpoints").iterdir():
        path.write_bytes(b"")
    before = {str(path) for path in logdir.rglob("*")}
    result = cli.run("-r", logdir, "-t")
    assert result.status == 2 and "no checkpoint in" in result.err and "epoch=000000.ckpt is not" in result.err
    assert {str(path) for path in logdir.rglob("*")} == before and len(taken) == 1
