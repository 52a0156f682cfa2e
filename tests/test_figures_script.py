"""scripts/figures.py on a trained model, and what a run draws by itself."""

import json
import shutil
import sys

import pytest
import torch
from command_line import ROOT, data_node
from PIL import Image
from safetensors.torch import save_file

from ldm.figures import draw as drawing
from ldm.figures.draw import FIGURES

sys.path.insert(0, str(ROOT / "scripts"))

import export
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


@pytest.fixture(scope="module")
def exported(logdir):
    """What scripts/export.py writes of it."""
    assert export.main([str(logdir), str(logdir.parent / "my-model")]) == 0
    return logdir.parent / "my-model"


def test_an_exported_folder_and_the_data_of_a_run(logdir, exported, capsys):
    assert figures.main([str(exported), "reconstructions", "--data", str(logdir), *QUICK]) == 0
    assert capsys.readouterr().out.split()[-1] == str(exported / "figures" / "reconstructions.png")
    assert (exported / "figures" / "reconstructions.png").is_file()


def test_an_exported_file_and_a_folder_of_pictures(exported, tmp_path, capsys):
    """Of any size: they become as large as the model's."""
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (80 * number, 9, 200)).save(tmp_path / "pictures" / f"{number}.png")
    argv = ["reconstructions", "attention", "--data", str(tmp_path / "pictures"), "--out", str(tmp_path / "out")]
    assert figures.main([str(exported / "model.safetensors"), *argv, *QUICK]) == 0, capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"reconstructions.png", "attention.png"}


def test_a_yaml_file_and_an_address(rooms, exported, tmp_path, monkeypatch, capsys):
    """Nothing is written into the hub's cache."""
    (tmp_path / "mine.yaml").write_text(json.dumps({"data": data_node(rooms)}))
    monkeypatch.setattr("ldm.hub._downloaded", lambda address: exported)
    monkeypatch.chdir(tmp_path)
    assert figures.main(["hf://user/name", "reconstructions", "--data", "mine.yaml", *QUICK]) == 0
    assert capsys.readouterr().out.split()[-1] == "figures/reconstructions.png"
    assert (tmp_path / "figures" / "reconstructions.png").is_file()


def test_without_data(exported, tmp_path, capsys):
    (tmp_path / "none.yaml").write_text("model: {}")
    for argv in ([], ["--data", str(tmp_path / "none.yaml")]):
        assert figures.main([str(exported), *argv, *QUICK]) == 1
        err = capsys.readouterr().err
        assert "has no data with it: give a log directory, a YAML file" in err and err.count("\n") == 1


def test_a_file_with_the_configuration_of_its_run(logdir, tmp_path):
    state = torch.load(logdir / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    kept = {name: value.contiguous() for name, value in state.items() if "_ema" not in name}
    save_file(kept, tmp_path / "model.safetensors")
    (config,) = (logdir / "configs").glob("*-project.yaml")
    shutil.copy(config, tmp_path / "model.yaml")
    assert figures.main([str(tmp_path / "model.safetensors"), "bottleneck", *QUICK]) == 0
    assert (tmp_path / "figures" / "bottleneck.png").is_file()


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
