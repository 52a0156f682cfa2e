"""scripts/export.py and what `ldm.load` makes of its folder, here or in the hub's cache."""

import builtins
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from command_line import ROOT
from PIL import Image
from safetensors import safe_open

import ldm
from ldm.api import known_concepts, load_config
from ldm.data.dis import Shapes3DTrain
from ldm.hub import located
from ldm.util import UserError, instantiate_from_config

sys.path.insert(0, str(ROOT / "scripts"))
import evaluate

_spec = importlib.util.spec_from_file_location("export", ROOT / "scripts" / "export.py")
assert _spec is not None and _spec.loader is not None
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FIGURES = ("matrices", "reconstructions", "swaps")
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def run(trained_encdiff, tmp_path_factory) -> Path:
    """A log directory, with figures."""
    logdir = tmp_path_factory.mktemp("share") / "run"
    shutil.copytree(trained_encdiff.logdir, logdir)
    (logdir / "figures").mkdir()
    Image.new("RGB", (30, 20)).save(logdir / "figures" / "swaps.png")
    (logdir / "figures" / "swaps.pdf").write_bytes(b"%PDF")
    return logdir


@pytest.fixture(scope="module")
def exported(run) -> Path:
    folder = run.parent / "my-model"
    assert script.main([str(run), str(folder)]) == 0
    return folder


def test_the_same_model_comes_back(run, exported, rooms):
    ours, theirs = ldm.load(run), ldm.load(exported)
    assert torch.equal(ours.scalars(IMAGES), theirs.scalars(IMAGES))
    assert torch.equal(ours.reconstruct(IMAGES, steps=2), theirs.reconstruct(IMAGES, steps=2))
    assert theirs.concepts.tokens == ours.concepts.tokens and theirs.concepts.share == ours.concepts.share
    low, high = np.percentile(ours.scalars(Shapes3DTrain(rooms).images).numpy(), [1, 99], axis=0)
    np.testing.assert_allclose([theirs.concepts.low, theirs.concepts.high], [low, high], rtol=1e-5)
    assert theirs.traverse(IMAGES[:1], "floor hue", steps=1).shape == (1, 11, 3, 16, 16)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    with safe_open(exported / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert names == {name for name in state if not name.startswith("model_ema.")}
        assert all(torch.equal(file.get_tensor(name), state[name]) for name in names)


@pytest.mark.slow
def test_averages_instead(run, tmp_path):
    assert script.main([str(run), str(tmp_path / "ema"), "--weights", "ema"]) == 0
    ours, theirs = ldm.load(run, weights="ema"), ldm.load(tmp_path / "ema")
    with pytest.raises(UserError, match=r"no EMA weights: .*exported without them"):
        ldm.load(tmp_path / "ema", weights="ema")
    assert torch.equal(ours.reconstruct(IMAGES, steps=2), theirs.reconstruct(IMAGES, steps=2))
    assert not torch.equal(ldm.load(run).reconstruct(IMAGES, steps=2), theirs.reconstruct(IMAGES, steps=2))
    card = (tmp_path / "ema" / "README.md").read_text()
    assert "weights: averages (EMA)" in card and "## Scores" not in card, "the scores are the live weights'"


def test_to_be_scored_it_lacks_data(exported, capsys):
    assert evaluate.main([str(exported)]) == 1
    assert "is an exported model, without data: in Python" in capsys.readouterr().err


def test_a_first_stage(trained, tmp_path):
    assert script.main([str(trained.logdir), str(tmp_path / "stage")]) == 0
    ours, theirs = ldm.load(trained.logdir), ldm.load(tmp_path / "stage")
    assert torch.equal(ours(IMAGES)[0], theirs(IMAGES)[0]) and not (tmp_path / "stage" / "concepts.json").exists()


def test_the_card(run, exported):
    card = (exported / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["library_name"] == "encdiff" and "disentanglement" in header["tags"] and "license" not in header
    assert 'ldm.load("my-model")' in card and "16×16 pixels, 4 concepts, tokens of 8 numbers" in card
    assert "`Shapes3DTrain`" in card and "- steps: 8" in card and "- images per batch and process: 16" in card
    record = json.loads(max((run / "metrics").glob("*.json")).read_text())
    for metric, entry in (("factor_vae", "eval_accuracy"), ("mig", "discrete_mig")):
        assert f"| {metric} | {entry} | {record['scores'][metric][entry]:.3f} |" in card
    assert f"- torch {torch.__version__}" in card
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", card)
    assert pictures == [f"figures/{name}.png" for name in FIGURES]
    for name in ("matrices", "reconstructions"):  # of the last validation
        original = run / "images" / "figures" / "000008" / f"{name}.png"
        assert (exported / "figures" / f"{name}.png").read_bytes() == original.read_bytes()
    assert "*Swaps*" in card
    assert "unless it says live, of averages (EMA), which this folder does not hold" in card


def test_nothing_of_the_machine_is_in_it(run, exported):
    """No paths: data, log directory, first stage."""
    files = sorted(path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file())
    assert files == ["README.md", "concepts.json", *(f"figures/{name}.png" for name in FIGURES),
                     "model.safetensors", "model.yaml"]  # fmt: skip
    for name in ("README.md", "concepts.json", "model.yaml"):
        text = (exported / name).read_text()
        assert "/" + str(run).split("/")[1] + "/" not in text and "last.ckpt" not in text, name
    assert set(yaml.safe_load((exported / "model.yaml").read_text())) == {"model"}


def test_mistakes(run, exported, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for argv, message in [
        ([run, exported], "is not empty: give another folder, or --force"),
        ([run, tmp_path / "file"], "is a file"),
        ([tmp_path / "none", tmp_path / "new"], "there is no log directory"),
        ([exported, tmp_path / "new"], "is an exported model already: copy its folder"),
        ([exported / "model.safetensors", tmp_path / "new"], "is an exported model already"),
    ]:
        assert script.main(list(map(str, argv))) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err
    assert not (tmp_path / "new").exists()
    assert script.main([str(run), str(exported), "--force"]) == 0


def test_over_an_earlier_export(run, tmp_path):
    """What the earlier card shows and this run lacks goes; other people's files stay."""
    logdir = tmp_path / "run"
    shutil.copytree(run, logdir)
    folder = tmp_path / "model"
    assert script.main([str(logdir), str(folder)]) == 0
    for kept in (folder / "figures" / "mine.png", folder / "LICENSE"):
        kept.write_text("x")
    (logdir / "figures" / "swaps.png").unlink()
    assert script.main([str(logdir), str(folder), "--force"]) == 0
    names = {path.name for path in (folder / "figures").iterdir()}
    assert names == {"matrices.png", "reconstructions.png", "mine.png"} and (folder / "LICENSE").exists()


def test_where_the_data_are_gone(run, tmp_path, capsys):
    """The rest is exported all the same."""
    logdir = tmp_path / "run"
    shutil.copytree(run, logdir)
    config = next(logdir.glob("configs/*-project.yaml"))
    config.write_text(re.sub(r"path: /\S+", "path: /nowhere", config.read_text()))
    assert script.main([str(logdir), str(tmp_path / "new")]) == 0
    found = json.loads((tmp_path / "new" / "concepts.json").read_text())
    if not ldm.load(run).concepts.low:  # else it comes from the scores
        assert "as the run's data cannot be read" in capsys.readouterr().out
        assert found["low"] == found["high"] == []
    assert found["tokens"]


def test_without_scores_concepts_are_matched(run, tmp_path):
    """By what they know of the factors of the run's data."""
    logdir = tmp_path / "run"
    shutil.copytree(run, logdir)
    shutil.rmtree(logdir / "metrics")
    assert script.main([str(logdir), str(tmp_path / "new")]) == 0
    model, found = ldm.load(logdir), ldm.load(tmp_path / "new").concepts
    assert model.concepts is None
    dataset = instantiate_from_config(load_config(logdir).data.params.validation)
    known = ldm.match(model, dataset, progress=False)
    assert found.tokens == known.tokens and set(found.tokens) == set(dataset.grid.names)
    np.testing.assert_allclose([found.low, found.high], [known.low, known.high], rtol=1e-4)
    assert "## Concepts" in (tmp_path / "new" / "README.md").read_text()


@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_attributes_that_cannot_be_matched_cost_no_ranges(names, monkeypatch):
    """As it is told."""

    def refuse(*arguments):
        raise ValueError("factor 'a' has one value")

    images = torch.arange(40.0).reshape(20, 2)
    dataset = SimpleNamespace(attributes=np.arange(20)[:, None] % [2, 4][: len(names)], attribute_names=names,
                              fetch=lambda rows: {"image": images[rows]})  # fmt: skip
    monkeypatch.setattr(script, "len", lambda dataset: 20, raising=False)
    module = SimpleNamespace(setup=lambda: None, datasets={"train": dataset})
    monkeypatch.setattr(script, "instantiate_from_config", lambda *arguments: module)
    model = SimpleNamespace(concepts=None, scalars=torch.as_tensor)
    if len(names) == 1:
        monkeypatch.setattr(script, "match", refuse)
    told = script.add_concepts(model, SimpleNamespace(data={}), ())
    assert model.concepts.low == tuple(np.percentile(images.numpy(), 1, axis=0))
    assert tuple(model.concepts.tokens) == (names if len(names) > 1 else ())
    assert told == ("the concepts have no names: factor 'a' has one value" if len(names) == 1 else "")


def test_the_scores_are_those_of_the_checkpoint(tmp_path):
    (tmp_path / "metrics").mkdir()
    for step in (4, 999999, 1000000):
        text = json.dumps({"step": step, "weights": "live", "scores": {}, "scores_of_ema": {"mig": {"x": step}}})
        (tmp_path / "metrics" / f"{step:06}.json").write_text(text)
    assert [script.scores_of(tmp_path, "live", step)["step"] for step in (None, "999999", "7")] == [1000000, 999999, 4]
    assert script.scores_of(tmp_path, "ema", "5")["scores"] == {"mig": {"x": 4}}
    (tmp_path / "metrics" / "000004.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        script.scores_of(tmp_path, "live", "5")


def test_an_export_that_differs_is_told(run, tmp_path, monkeypatch, capsys):
    load = ldm.load

    def other(path, **options):
        model = load(path, **options)
        if (Path(path) / "model.safetensors").exists():
            with torch.no_grad():
                model.cond_stage_model.encoder[0].bias[0] += 1e-6
        return model

    monkeypatch.setattr(ldm, "load", other, raising=False)
    assert script.main([str(run), str(tmp_path / "new")]) == 2
    assert "computes other numbers" in capsys.readouterr().err


# ---- the hub


@pytest.fixture
def hub(exported, tmp_path, monkeypatch) -> Path:
    """The exported folder as the hub's client caches it, without a network."""
    from huggingface_hub import constants

    cache = tmp_path / "hub" / "models--user--name"
    (cache / "snapshots" / COMMIT).mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "refs").mkdir()
    for revision in ("main", "v1"):
        (cache / "refs" / revision).write_text(COMMIT)
    for name in ("model.safetensors", "model.yaml", "concepts.json"):
        shutil.copy(exported / name, cache / "blobs" / name)
        (cache / "snapshots" / COMMIT / name).symlink_to(cache / "blobs" / name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache / "snapshots" / COMMIT


@pytest.mark.parametrize("address", ["hf://user/name", "hf://user/name@v1", "hf://user/name@" + COMMIT])
def test_from_the_hub(address, hub, exported):
    assert located(address).parent.resolve() == located(Path(address)).parent.resolve() == hub.resolve()
    ours, theirs = ldm.load(exported), ldm.load(address)
    assert torch.equal(ours.scalars(IMAGES), theirs.scalars(IMAGES)) and theirs.concepts == ours.concepts


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://user/other", "'hf://user/other' is not in the hub's cache, and cannot be downloaded: .*copy the folder"),
        ("hf://user/name@v2", "'hf://user/name@v2' is not in the hub's cache"),
        ("hf://user", "expected hf://user/name, or hf://user/name@revision, got 'hf://user'"),
        ("hf://user/name@", "expected hf://user/name"),
        ("hf://user/name/file", "expected hf://user/name"),
        ("hf://../x", "cannot be downloaded"),
    ],
)
def test_addresses_that_lead_nowhere(address, message, hub):
    with pytest.raises(UserError, match=message):
        ldm.load(address)


def test_a_reason_that_ends_in_a_full_stop(tmp_path, monkeypatch):
    def fail(name, **options):
        raise ValueError("no such model.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=r"ValueError: no such model\. Without a network"):
        located("hf://user/name")


def test_something_else_on_the_hub(hub):
    (hub / "model.yaml").unlink()
    with pytest.raises(UserError, match=r"is not a model that scripts/export\.py wrote: it has no model\.yaml"):
        ldm.load("hf://user/name")


def test_without_the_client(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"needs huggingface-hub: pip install 'encdiff\[hub\]'"):
        ldm.load("hf://user/name")


def test_nothing_of_a_folder_is_run(exported, tmp_path, monkeypatch):
    """Neither what its configuration names, nor what lies beside it."""
    folder = tmp_path / "theirs"
    shutil.copytree(exported, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\n")
    text = (folder / "model.yaml").read_text()
    monkeypatch.chdir(folder)
    for target in ("evil.Model", "os.system", "subprocess.Popen"):
        (folder / "model.yaml").write_text(text.replace("ldm.models.diffusion.ddpm.LatentDiffusion", target))
        with pytest.raises(UserError, match="classes are taken from"):
            ldm.load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"tokens": {"a": [0]}, "share": {}, "low": [], "high": []}',
        '{"tokens": {"a": [true]}, "share": {"a": 1}, "low": [], "high": []}',
        '{"tokens": {"a": [4]}, "share": {"a": 1}, "low": [], "high": []}',
        '{"tokens": {"a": []}, "share": {"a": 1}, "low": [], "high": []}',
        '{"tokens": {}, "share": {}, "low": [1, 2], "high": [1, 2]}',
        '{"tokens": {}, "share": {}, "low": [1, 2, 3, 4], "high": ["x"]}',
    ],
)
def test_damaged_names_of_concepts(content, tmp_path):
    (tmp_path / "concepts.json").write_text(content)
    with pytest.raises(UserError, match=r"damaged|names other concepts"):
        known_concepts(tmp_path / "model.safetensors", "live", SimpleNamespace(latent_unit=4))
