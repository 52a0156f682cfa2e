"""Somebody else's files that would run something: YAML files, model folders, checkpoints. Nothing of it runs.

What each would do is to leave a marker, and a reader that trusts it, as LDM's is, does leave it.
"""

import contextlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from command_line import ROOT
from omegaconf import OmegaConf

import ldm
from ldm.util import UserError

_spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "scripts" / "evaluate.py")
assert _spec is not None and _spec.loader is not None
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)

HANDLER = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
STARTED = {"target": f"{HANDLER}.SubprocessHandler", "params": {
    "entrypoint": "cp", "args": ["FOLDER/evil.py", "MARKER"], "env": {}, "stdout": None, "stderr": None,
    "local_rank_id": 0, "numa_options": None}}  # fmt: skip
COPY = {"args": ["cp", "FOLDER/evil.py", "MARKER"]}
TOUCH = {"command": "touch MARKER"}


class Hostile(NamedTuple):
    """A node for a place of a configuration, and what the refusal says."""

    key: str
    node: Any
    said: str


def foreign(module: str) -> str:
    """Of a class that is not allowed."""
    return f"is defined in '{module}', and classes are taken from ldm, torch, pytorch_lightning, taming.modules"


UNET, ENCODER, STAGE = (f"model.params.{name}_config" for name in ("unet", "cond_stage", "first_stage"))
MODEL = {
    "function": Hostile(UNET, {"target": "os.system", "params": TOUCH}, foreign("os")),
    "class": Hostile(ENCODER, {"target": "subprocess.Popen", "params": COPY}, foreign("subprocess")),
    "code": Hostile("model", {"target": "timeit.timeit", "params": {"stmt": "open('MARKER', 'w')", "number": 1}},
                    foreign("timeit")),
    "module of the folder": Hostile(UNET, {"target": "evil.Network"}, foreign("evil")),
    "function of torch": Hostile(
        STAGE, {"target": "torch.hub.load", "params": {"repo_or_dir": "FOLDER", "model": "x", "source": "local"}},
        "'torch.hub.load' is not a class"),
    "class of torch": Hostile(f"{ENCODER}.params.tokens_config", STARTED,
                              "expected a network (derived from torch.nn.modules.module.Module)"),
    "what torch imports": Hostile(UNET, {"target": f"{HANDLER}.Popen", "params": COPY}, foreign("subprocess")),
    "what ours imports": Hostile(UNET, {"target": "ldm.data.files.os.system", "params": TOUCH},
                                 "there is no module 'ldm.data.files.os'"),
    "class of another kind": Hostile(
        "model.params.scheduler_config", {"target": "torch.utils.tensorboard.SummaryWriter",
                                          "params": {"log_dir": "MARKER"}}, "expected a scheduler (with schedule)"),
    "private": Hostile(
        f"{STAGE}.params.lossconfig", {"target": "torch._inductor.runtime.compile_tasks._reload_python_module",
                                       "params": {"key": "x", "path": "FOLDER/evil.py"}}, "is private"),
    "resolver": Hostile(UNET, {"target": "${oc.env:NOT_SET_HERE,os.system}", "params": TOUCH}, foreign("os")),
    "decoded": Hostile(UNET, "${oc.decode:'{target: os.system, params: {command: touch MARKER}}'}", foreign("os")),
}  # fmt: skip
# The data are read by main.py and evaluate.py, and what follows them by main.py alone.
DATA = {
    "data set": Hostile("data.params.validation", {"target": "logging.FileHandler", "params": {"filename": "MARKER"}},
                        foreign("logging")),
    "data module": Hostile("data", {"target": "evil.Data", "params": {}}, foreign("evil")),
}  # fmt: skip
RUN = {
    "callback": Hostile("lightning.callbacks.x", {"target": "evil.Callback"}, foreign("evil")),
    "pictures": Hostile("lightning.callbacks.image_logger.params.log_config", STARTED, "expected a Record"),
    "logger": Hostile("lightning.logger", {"target": "os.mkdir", "params": {"path": "MARKER"}}, foreign("os")),
    "checkpoints": Hostile("lightning.modelcheckpoint", STARTED, "expected a callback"),
}
CASES = MODEL | DATA | RUN


@pytest.fixture
def folder(tmp_path, trained_encdiff, monkeypatch) -> Path:
    """The folder of a good model beside modules that leave the marker; Python is in it, and looks there for modules."""
    folder = tmp_path / "shared"
    (folder / "configs").mkdir(parents=True)
    (folder / "checkpoints").symlink_to(trained_encdiff.logdir / "checkpoints")
    shutil.copy(next(trained_encdiff.logdir.glob("configs/*-project.yaml")), folder / "configs" / "2026-project.yaml")
    for name in ("evil", "hubconf", "__init__"):
        code = f"open({str(tmp_path / 'marker')!r}, 'a').close()\nclass Network: ...\nx = Data = Callback = Network\n"
        (folder / f"{name}.py").write_text(code)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return folder


def write(folder: Path, hostile: Hostile) -> Path:
    """Put the node into the folder's configuration."""
    path = folder / "configs" / "2026-project.yaml"
    config: Any = OmegaConf.load(path)
    OmegaConf.update(config, hostile.key, hostile.node, merge=False, force_add=True)
    text = OmegaConf.to_yaml(config).replace("FOLDER", str(folder)).replace("MARKER", str(folder.parent / "marker"))
    path.write_text(text)
    return path


def trusting(path: Path, key: str) -> None:
    """LDM's `instantiate_from_config`."""
    node: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    for part in key.split("."):
        node = node[part]
    parts = node["target"].split(".")
    with contextlib.suppress(ModuleNotFoundError):
        try:
            found = getattr(importlib.import_module(".".join(parts[:-1])), parts[-1])
        except ModuleNotFoundError:  # a reader may look deeper than LDM's
            found = getattr(getattr(importlib.import_module(".".join(parts[:-2])), parts[-2]), parts[-1])
        made = found(**node.get("params", {}))
        getattr(getattr(made, "proc", made), "wait", int)()
    sys.modules.pop("evil", None)


@pytest.mark.parametrize("case", CASES)
def test_a_yaml_file_calls_nothing(case, folder, cli, capsys):
    marker, hostile = folder.parent / "marker", CASES[case]
    path = write(folder, hostile)
    if case in MODEL:
        with pytest.raises(UserError) as caught:
            ldm.load(folder)
        assert hostile.said in str(caught.value) and "\n" not in str(caught.value)
    if case in MODEL | DATA:
        assert script.main([str(folder), "--metrics", "mig", "--out", str(cli.folder / "out")]) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert hostile.said in line and f"{folder}: {hostile.key}.target: " in line
    result = cli.run("--base", path, "-t", "--gpus", 0)
    assert result.status == 2 and len(result.errors) == 1, result.err
    assert hostile.said in result.errors[0]
    assert not marker.exists() and "evil" not in sys.modules and not list(cli.folder.glob("logs/*"))
    if "evil" in str(hostile.node["target"] if isinstance(hostile.node, dict) else ""):
        assert "give --allow evil" in result.errors[0]
    trusting(path, hostile.key)
    assert marker.exists(), "the file is one that does its harm where it is believed"


def test_a_tag_of_yaml_calls_nothing(folder, cli, capsys):
    marker, path = folder.parent / "marker", folder / "configs" / "2026-project.yaml"
    text = f"{path.read_text()}\nx: !!python/object/apply:os.system ['touch {marker}']\n"
    path.write_text(text)
    with pytest.raises(UserError, match=r"project\.yaml' is not valid YAML: .* the tag '.*:os\.system' .* line \d+"):
        ldm.load(folder)
    assert script.main([str(folder)]) == 1 and "the tag" in capsys.readouterr().err
    result = cli.run("--base", path, "-t", "--gpus", 0)
    assert result.status == 2 and len(result.errors) == 1 and "the tag" in result.errors[0]
    override = cli.run("--base", cli.vq, "-t", f"model.target=!!python/object/apply:os.system ['touch {marker}']")
    assert override.status == 2 and len(override.errors) == 1
    assert not marker.exists()
    yaml.unsafe_load(text)
    assert marker.exists()


def test_a_folder_is_read_and_not_run(folder):
    """Its model is loaded, by path and from within, and none of its modules; nor does Python look there from now on."""
    sys.path.remove(str(folder))
    before = list(sys.path)
    models = [ldm.load(path) for path in (folder, ".", folder / "checkpoints" / "last.ckpt")]
    assert all(type(model).__name__ == "LatentDiffusion" for model in models)
    assert not (folder.parent / "marker").exists() and sys.path == before
    files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
    assert not any(str(file).startswith(f"{folder}/") for file in files)


@pytest.mark.slow
def test_modules_of_libraries_names_are_not_taken_from_the_folder(folder, tmp_path):
    """A process that starts there, and one that starts elsewhere, import what is installed."""
    names = ("torch", "numpy", "ldm", "yaml", "omegaconf", "safetensors", "numba", "triton", "wandb", "sitecustomize",
             "usercustomize", "conftest")  # fmt: skip
    for name in names:
        shutil.copy(folder / "evil.py", folder / f"{name}.py")
    (folder / "taming").mkdir()
    shutil.copy(folder / "evil.py", folder / "taming" / "__init__.py")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    evaluate = [str(ROOT / "scripts" / "evaluate.py"), ".", "--metrics", "mig", "--out", str(tmp_path / "out")]
    load = ["-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import ldm; ldm.load({str(folder)!r})"]
    for arguments, cwd in ((evaluate, folder), (load, tmp_path)):
        done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "marker").exists()


class Runs:
    """Pickles as a call."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


# Places of a checkpoint, and what is put there in place of what it holds.
PLACES = {
    "state_dict": lambda old, evil: {**old, "scale_factor": evil},
    "optimizer_states": lambda old, evil: [{**old[0], "state": {0: {"exp_avg": evil}}}],
    "lr_schedulers": lambda old, evil: [{**old[0], "lr_lambdas": [evil]}],
    "callbacks": lambda old, evil: {**old, "EarlyStopping": {"best_score": evil}},
    "hyper_parameters": lambda old, evil: {"model": {"target": evil}},
    "loops": lambda old, evil: {**old, "fit_loop": evil},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_checkpoint_calls_nothing(place, folder, cli, trained_encdiff):
    """Whether it is refused or the object is left out; all ways to a checkpoint but these two are `ldm.load`'s."""
    marker, path = folder.parent / "marker", folder / "checkpoints" / "last.ckpt"
    (folder / "checkpoints").unlink()
    path.parent.mkdir()
    content = torch.load(trained_encdiff.logdir / "checkpoints" / "last.ckpt", weights_only=True)
    content[place] = PLACES[place](content.get(place), Runs(marker))
    torch.save(content, path)
    with contextlib.suppress(UserError):
        ldm.load(folder)
    result = cli.run("-r", folder, "-t", "--max_epochs", 3)
    assert result.status == 2 and len(result.errors) == 1 and "last.ckpt' holds pickled" in result.errors[0]
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the file is one that does its harm where it is believed"
