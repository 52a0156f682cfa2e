"""scripts/figures.py on a trained model, and what a run draws by itself."""

import json
import shutil
import sys

import pytest
import torch
from command_line import ROOT
from PIL import Image
from safetensors.torch import save_file

from ldm.figures import draw as drawing
from ldm.figures.draw import FIGURES

sys.path.insert(0, str(ROOT / "scripts"))

import figures

QUICK = ("--images", "2", "--steps", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def logdir(trained_encdiff, tmp_path_factory):
    """A copy of a run, to write into."""
    return shutil.copytree(trained_encdiff.logdir, tmp_path_factory.mktemp("logs") / "run")


def test_a_run_draws_at_each_validation(trained_encdiff):
    logdir = trained_encdiff.logdir
    found = sorted(str(path.relative_to(logdir)) for path in logdir.rglob("figures/*/*"))
    assert found == [
        f"images/figures/{step:06}/{name}.png" for step in (4, 8) for name in ("matrices", "reconstructions")
    ]


def test_named_figures(logdir, capsys):
    assert figures.main([str(logdir), "swaps", "matrices", *QUICK]) == 0
    lines = capsys.readouterr().out.split()
    assert lines == [str(logdir / "figures" / name) for name in ("swaps.png", "matrices.png", "matrices.pdf")]
    with Image.open(lines[0]) as picture:
        assert round(picture.info["dpi"][0]) == 300


def test_a_checkpoint_and_live_weights(logdir, tmp_path, capsys, monkeypatch):
    """The line below says what is drawn."""
    notes = []

    def spy(subject, names, folder, **options):
        notes.append((subject.note, subject.live))
        return {"x": [folder / "x.png"]}

    monkeypatch.setattr(drawing, "draw_figures", spy)
    last = logdir / "checkpoints" / "last.ckpt"
    assert figures.main([str(last), *QUICK, "--out", str(tmp_path)]) == 0
    assert figures.main([str(last), *QUICK, "--out", str(tmp_path), "--weights", "live"]) == 0
    assert notes == [
        ("run · EMA weights of the U-Net · step 8 · 2 steps of DPM-Solver++", False),
        ("run · live weights · step 8 · 2 steps of DPM-Solver++", True),
    ]


def test_an_exported_model_without_ema(logdir, tmp_path, capsys):
    state = torch.load(logdir / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    kept = {name: value.contiguous() for name, value in state.items() if "_ema" not in name}
    save_file(kept, tmp_path / "model.safetensors")
    (config,) = (logdir / "configs").glob("*-project.yaml")
    shutil.copy(config, tmp_path / "model.yaml")
    assert figures.main([str(tmp_path / "model.safetensors"), "reconstructions", *QUICK]) == 0
    assert (tmp_path / "figures" / "reconstructions.png").is_file()


def test_mistakes(logdir, tmp_path, capsys):
    assert figures.main([str(logdir), "swap", *QUICK]) == 1
    assert capsys.readouterr().err == "error: NAME: there is no figure 'swap'; did you mean 'swaps'?\n"
    assert figures.main([str(tmp_path / "none")]) == 1
    assert "there is no log directory or checkpoint" in capsys.readouterr().err
    broken = shutil.copytree(logdir, tmp_path / "broken")
    newest = max((broken / "metrics").glob("*.json"))
    newest.write_text(json.dumps({"step": 8})[:-2])
    assert figures.main([str(broken), "matrices", *QUICK]) == 1
    assert "damaged" in capsys.readouterr().err


def test_help_names_every_figure():
    assert all(f"\n  {name} " in figures.__doc__ for name in FIGURES)
