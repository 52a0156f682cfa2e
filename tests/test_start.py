"""Help and mistakes come before PyTorch is imported; signatures are read from the source, and are the classes'."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ldm.cli.early import check_names
from ldm.cli.main import is_follower
from ldm.signatures import stand_in
from ldm.util import UserError, check_params, get_obj_from_str, parameters_of

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "pytorch_lightning", "lightning_fabric", "torchvision", "matplotlib", "numba", "sklearn", "scipy"}
FIRST, SECOND = "configs/autoencoder/shapes3d_vq_4_16.yaml", "configs/latent-diffusion/shapes3d-vq-4-16.yaml"
STAGE = "model.params.first_stage_config.params.ckpt_path"
# Command lines, and what each is answered by.
ANSWERS = [
    (["--help"], "every argument of lightning's trainer"),
    (["--max_epoch", "3"], "unknown flag '--max_epoch'; did you mean '--max_epochs'?"),
    (["--base", "configs/autoencoder/shape3d_vq_4_16.yaml"], "the nearest is"),
    (["--base", SECOND, "configs/ablations/vector.yaml"], "left as ???"),
    (["--base", SECOND, f"{STAGE}=nowhere.ckpt"], "there is no file 'nowhere.ckpt'"),
    (["--base", SECOND, f"{STAGE}={FIRST}", "model.params.unet_config.params.chanels=1"], "unknown key for unetmodel"),
    (["--base", FIRST, "model.params.ddconfig.chm=1"], "ddconfig.chm: unknown key"),
    (["--base", FIRST, "model.params.n_embed=many"], "expected a whole number, got 'many'"),
    (["--base", FIRST, "lightning.callbacks.image_logger.params.max_image=1"], "did you mean 'max_images'?"),
    (["--base", FIRST, "--gpus", "x"], "--gpus: expected device numbers"),
    (["--base", FIRST, "--max_epochs", "x"], "--max_epochs: expected a whole number or null, got 'x'"),
    (["--base", FIRST, "--accumulate_grad_batches", "0"], "expected a number above 0"),
    (["--base", FIRST, "-l", "/dev/null/logs"], "cannot write to"),
    (["-s", "x"], "invalid int value"),
    (["-r", "nowhere"], "there is no log directory or checkpoint 'nowhere'"),
    (["-r", "README.md"], "the checkpoint 'readme.md' is not a checkpoint"),
    (["-r", "docs"], "'docs/checkpoints' holds no checkpoint"),
]


def test_help_and_mistakes_wait_for_no_import():
    code = (
        "import sys, io, json, contextlib\nfrom ldm.cli.main import main\nsaid = []\n"
        f"for argv in {[argv for argv, _ in ANSWERS]!r}:\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):\n"
        "        main(argv)\n"
        "    said.append(out.getvalue())\n"
        "print(json.dumps([said, sorted(name for name in sys.modules if '.' not in name)]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, modules = json.loads(done.stdout)
    for (argv, expected), answer in zip(ANSWERS, said, strict=True):
        assert expected in " ".join(answer.lower().split()), (argv, answer)
    assert not HEAVY & set(modules)


def test_signature_of_lightnings_trainer():
    """Names, kinds, order, and which have defaults."""

    def form(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default is p.empty) for p in parameters]

    real = get_obj_from_str("pytorch_lightning.Trainer")
    assert form(stand_in("pytorch_lightning.Trainer")) == form(real)


def targets() -> list[str]:
    """Every class that a shipped or released configuration names."""
    found: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            found.update([node["target"]] if isinstance(node.get("target"), str) else [])
            node = list(node.values())
        for child in node if isinstance(node, list) else []:
            visit(child)

    for path in (ROOT / "configs").rglob("*.yaml"):
        visit(OmegaConf.to_container(OmegaConf.load(path)))
    ours = (name for name in found if name.startswith(("ldm.", "pytorch_lightning.")))
    more = ("TensorBoardLogger", "CSVLogger"), ("ModelCheckpoint", "LearningRateMonitor")
    return sorted({*ours, *(f"pytorch_lightning.loggers.{name}" for name in more[0]),
                   *(f"pytorch_lightning.callbacks.{name}" for name in more[1])})  # fmt: skip


def answers(hint: Any) -> list[bool]:
    """Which of some values a hint lets pass."""

    def function(value): ...

    function.__annotations__["value"] = hint
    found = []
    for value in (1, 0.5, True, "text", None, [1], {"a": 1}):
        try:
            check_params(function, {"value": value})
            found.append(True)
        except UserError:
            found.append(False)
    return found


@pytest.mark.parametrize("target", targets())
def test_stand_ins_take_what_the_classes_take(target):
    real, found = get_obj_from_str(target), stand_in(target)
    assert found.__name__ == real.__name__ and inspect.isclass(found) == inspect.isclass(real)
    (ours, ours_more), (theirs, theirs_more) = parameters_of(found), parameters_of(real)
    assert list(ours) == list(theirs) and ours_more == theirs_more
    for name, hint in theirs.items():
        assert answers(ours[name]) == answers(hint), name


def test_stand_ins_derive_as_the_classes_do():
    base, derived = (stand_in(f"ldm.{name}") for name in
                     ("models.diffusion.ddpm.LatentDiffusion", "variants.sparsity.SparseDiffusion"))  # fmt: skip
    assert issubclass(derived, base) and not issubclass(base, derived)
    assert stand_in("ldm.variants.sparsity.LatentDiffusion") is base, "by whichever name it is reached"


@pytest.mark.parametrize(
    "target", ["torch.nn.Identity", "nowhere.Class", "ldm.util.nothing", "ldm.util", "Class", "", "a..b", "math.sqrt"]
)
def test_what_no_source_shows_has_no_stand_in(target):
    assert stand_in(target) is None


def test_what_a_source_may_hold(tmp_path, monkeypatch):
    """Keyword-only and positional-only arguments, bases from elsewhere, dataclasses, definitions that repeat."""
    (tmp_path / "held.py").write_text(
        "from dataclasses import dataclass\nfrom collections import OrderedDict as Base\n"
        "class A: pass\n"
        "class A:\n    def __init__(self, a, /, b: 'int | None', *c, d: list[int] = [], e): ...\n"
        "class B(A, Base):\n    def __init__(self, f: bool = True, **rest): ...\n"
        "@dataclass\nclass C:\n    g: int\n"
        "class D(D): ...\n"
        "def h(x: float = 1, *, y: str): ...\n"
        "class E: ...\nE = wrapped(E)\n"
        "@wrapped\ndef f(x): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = {name: stand_in(f"held.{name}") for name in "ABCDh"}
    assert "held" not in sys.modules
    names, takes_any = parameters_of(found["A"])
    assert {"b", "d", "e"} <= set(names) and names["b"] == (int | None) and not takes_any
    assert parameters_of(found["B"])[0]["f"] is bool and "e" in parameters_of(found["B"])[0]
    assert parameters_of(found["C"])[1] and parameters_of(found["D"])[1], "what is not shown takes anything"
    assert stand_in("held.E") is None and stand_in("held.f") is None, "made by a call"
    assert parameters_of(found["h"]) == ({"x": float, "y": str}, False)


def test_checkpoints_of_a_resumed_run_may_be_gone():
    config = {"model": {"params": {"ckpt_path": "gone.ckpt"}}, "lightning": {"trainer": {}}}
    check_names(config, resumed=True)
    with pytest.raises(UserError, match=r"^model\.params\.ckpt_path: there is no file 'gone\.ckpt'"):
        check_names(config, resumed=False)


@pytest.mark.parametrize(("variable", "value", "follower"), [("LOCAL_RANK", "1", True), ("SLURM_PROCID", "0", False)])
def test_the_process_is_known_before_lightning_is(monkeypatch, variable, value, follower):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    monkeypatch.delitem(sys.modules, "lightning_utilities.core.rank_zero", raising=False)
    assert is_follower() == follower
