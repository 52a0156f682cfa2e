"""Which classes a configuration may name, and where they may come from."""

import ast
import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from command_line import CHECKPOINT, ROOT
from omegaconf import OmegaConf
from test_hostile_files import script

import ldm
from ldm.data.dis import Shapes3DTrain
from ldm.lr_scheduler import LambdaLinearScheduler
from ldm.targets import KINDS, PACKAGES, allowing, refusal, suits
from ldm.util import UserError, get_obj_from_str, instantiate_from_config

NETWORK = "from ldm.modules.encoders.concept import TokenMLPs\nclass Own(TokenMLPs): pass\n"
TOKENS = "model.params.cond_stage_config.params.tokens_config"


def node(target: str) -> dict:
    """Another class for the token MLPs of the tiny EncDiff."""
    return {"target": target, "params": {"latent_unit": 4, "context_dim": 8}}


def tokens(target: str) -> str:
    """An override that puts it there."""
    return f"{TOKENS}={json.dumps(node(target))}"


@pytest.mark.parametrize("package", ["torchvision", "torch2.nn", "ldmx", "pytorch_lightning_extra", "taming.models"])
def test_names_that_begin_alike_are_others(package):
    assert "give --allow" in refusal(f"{package}.Class")
    with allowing([package, "torch"]):
        assert refusal(f"{package}.Class") is None
    assert "give --allow" in refusal(f"{package}.Class"), "outside the block again"


def test_a_part_of_a_package_is_allowed_alone():
    with allowing("a.b"):
        assert [refusal(f"{module}.Class") is None for module in ("a.b", "a.b.c", "a", "a.bc")] == [
            True,
            True,
            False,
            False,
        ]


def test_nothing_is_imported_to_refuse(monkeypatch, tmp_path):
    (tmp_path / "named_by_yaml.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for target in ("named_by_yaml.Class", "antigravity.Class", "torch._dynamo.nothing.Class"):
        with pytest.raises(UserError, match=r"^model\.target: "):
            get_obj_from_str(target, "model.target")
        assert target.rpartition(".")[0] not in sys.modules


def test_a_class_comes_from_where_it_is_defined(monkeypatch, tmp_path):
    """Not from a module that only imports it."""
    (tmp_path / "reexports.py").write_text("from subprocess import Popen\nfrom torch.nn import Identity\n")
    monkeypatch.syspath_prepend(tmp_path)
    with allowing("reexports"):
        assert get_obj_from_str("reexports.Identity") is torch.nn.Identity
        with pytest.raises(UserError, match=r"'reexports\.Popen' is defined in 'subprocess'.* --allow subp"):
            get_obj_from_str("reexports.Popen")


def test_kinds_are_told_by_their_bases():
    examples = {
        "Lightning module": pl.LightningModule, "data module": pl.LightningDataModule, "network": torch.nn.Module,
        "callback": pl.callbacks.ModelCheckpoint, "logger": pl.loggers.WandbLogger, "data set": Shapes3DTrain,
        "scheduler": LambdaLinearScheduler, "optimizer": torch.optim.SGD,
    }  # fmt: skip
    assert set(examples) == set(KINDS)
    found = {kind: {other for other, cls in examples.items() if suits(cls, kind)} for kind in KINDS}
    assert found.pop("network") == {"network", "Lightning module"}
    assert found == {kind: {kind} for kind in found}
    assert suits(torch.nn.Linear, "") and not suits(Path, "") and suits(Path, object)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("network", r"expected a network \(derived from torch\.nn\.modules\.module\.Module\), and 'ldm\.\S+' is none"),
        ("data set", r"expected a data set \(with __len__ and __getitem__\)"),
        (pl.Callback, r"expected a Callback \(derived from pytorch_lightning\.callbacks\.callback\.Callback\)"),
        ("", "expected a Lightning module, .* or optimizer"),
    ],
)
def test_another_kind_is_not_called(kind, said):
    with pytest.raises(UserError, match=rf"^x\.target: {said}"):
        instantiate_from_config({"target": "ldm.callbacks.record.Record"}, "x", kind)


def test_every_place_says_what_it_wants():
    files = [*(ROOT / "ldm").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    calls = [
        (path.name, node.lineno, len(node.args))
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "instantiate_from_config"
    ]
    assert len(calls) > 12 and not [call for call in calls if call[2] != 3]


def test_what_the_packages_offer_is_taken():
    """Loggers of Lightning among them, whatever they need to be installed."""
    assert PACKAGES == ("ldm", "torch", "pytorch_lightning", "taming.modules")
    for name in ("WandbLogger", "CSVLogger", "MLFlowLogger"):
        assert suits(get_obj_from_str(f"pytorch_lightning.loggers.{name}"), "logger")
    assert suits(get_obj_from_str("taming.modules.losses.vqperceptual.DummyLoss"), "network")


# ---- the working directory, and --allow


@pytest.fixture
def base(cli, first_stage) -> tuple:
    """EncDiff, built and not trained."""
    return "--base", cli.enc, "--gpus", 0, f"{CHECKPOINT}={first_stage}"


def refused(result, module: str) -> str:
    assert result.status == 2 and len(result.errors) == 1, result.err
    assert f"{TOKENS}.target: " in result.errors[0] and f"give --allow {module}" in result.errors[0]
    return result.errors[0]


def test_modules_and_packages_of_the_working_directory_are_taken(cli, base, monkeypatch):
    """Wherever the script lies; but not plain folders, nor what is installed beneath it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("own_tokens.py", "own_package/__init__.py", "own_package/tokens.py", "plain_folder/tokens.py"):
        (cli.folder / name).parent.mkdir(exist_ok=True)
        (cli.folder / name).write_text(NETWORK)
    importlib.invalidate_caches()
    assert cli.run(*base, tokens("own_tokens.Own")).status == 0
    assert sys.path[-1] == str(cli.folder), "behind all that is installed"
    assert cli.run(*base, tokens("own_package.tokens.Own")).status == 0
    refused(cli.run(*base, tokens("plain_folder.tokens.Own")), "plain_folder")
    assert cli.run(*base, tokens("plain_folder.tokens.Own"), "--allow", "plain_folder").status == 0
    # An installed module of the same name is not the working directory's.
    (cli.folder / "einops.py").write_text(NETWORK)
    importlib.invalidate_caches()
    refused(cli.run(*base, tokens("einops.Own")), "einops")


def test_a_module_from_elsewhere_is_named(cli, base, tmp_path_factory, monkeypatch):
    """By every command that builds the run's model: the flag is not kept with the run."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "from_elsewhere.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(elsewhere)
    given = (*base, "-t", "--max_steps", 1, tokens("from_elsewhere.Own"))
    assert "ldm, torch, pytorch_lightning, taming.modules, the working directory only" in refused(
        cli.run(*given), "from_elsewhere"
    )
    assert "from_elsewhere" not in sys.modules
    run = cli.run(*given, "--allow", "something", "--allow", "from_elsewhere")
    assert run.status == 0, run.err
    assert "allow" not in "".join(path.read_text() for path in run.logdir.glob("configs/*.yaml"))
    refused(cli.run("-r", run.logdir), "from_elsewhere")
    assert cli.run("-r", run.logdir, "--allow", "from_elsewhere").status == 0
    with pytest.raises(UserError, match=r"--allow from_elsewhere \(in Python: allow=\['from_elsewhere'\]\)"):
        ldm.load(run.logdir)
    evaluate = [str(run.logdir), "--metrics", "mig", "--out", str(cli.folder / "out")]
    assert script.main(evaluate) == 1 and script.main([*evaluate, "--allow", "from_elsewhere"]) == 0
    for allow in ("from_elsewhere", ["from_elsewhere"]):
        assert type(ldm.load(run.logdir, allow=allow).cond_stage_model.net).__name__ == "Own"


def test_a_run_that_lies_in_the_working_directory_brings_no_modules(cli, trained_encdiff, monkeypatch):
    """Resumed from within its folder, or where its folder is a package: it may be somebody else's."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    here, shared = cli.folder, cli.folder / "shared"
    shutil.copytree(trained_encdiff.logdir, shared)
    for path in (here / "mine_first.py", shared / "__init__.py", shared / "inside.py"):
        path.write_text(NETWORK)
    importlib.invalidate_caches()
    (path,) = shared.glob("configs/*-project.yaml")
    config: Any = OmegaConf.load(path)
    for cli.folder, resumed, module in ((shared, ".", "inside"), (here, "shared", "shared.inside")):
        OmegaConf.update(config, TOKENS, node(f"{module}.Own"), force_add=True)
        OmegaConf.save(config, path)
        refused(cli.run("-r", resumed), module.partition(".")[0])
        assert module not in sys.modules and str(shared) not in sys.path
    OmegaConf.update(config, TOKENS, node("mine_first.Own"), force_add=True)
    OmegaConf.save(config, path)
    assert cli.run("-r", "shared").status == 0, "its user's own modules are taken"
