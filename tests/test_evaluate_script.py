"""scripts/evaluate.py: its arguments, what it scores and where it writes. The scores: tests/evaluation."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import ROOT
from omegaconf import OmegaConf

import ldm
from ldm.api import load_config
from ldm.evaluation.codes import encode
from ldm.factors import FactorGrid
from ldm.metrics.evaluate import METRICS, defined_metrics, evaluate
from ldm.util import instantiate_from_config

sys.path.insert(0, str(Path(__file__).parent / "data"))
from data_files import attribute_table, write_celeba

_spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "scripts" / "evaluate.py")
assert _spec is not None and _spec.loader is not None
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)

FEW = ["dci.num_train=80", "dci.num_test=40", "factor_vae.num_train=50", "factor_vae.num_eval=20"]
FEW += ["beta_vae.num_train=50", "beta_vae.num_eval=20", "downstream_logistic_regression.num_train=[20]"]
FEW += ["downstream_gbt.num_train=[20]"]


@pytest.fixture
def codes(tmp_path):
    """`codes.npy` of a grid 4 × 3 × 5, and the grid."""
    grid = FactorGrid((4, 3, 5), ("hue", "shape", "scale"))
    factors = grid.factors(np.arange(60))
    values = factors / [4, 3, 5] + 0.05 * np.random.RandomState(0).standard_normal((60, 3))
    np.save(tmp_path / "codes.npy", values)
    np.save(tmp_path / "factors.npy", factors)
    return tmp_path / "codes.npy", values, grid


def run(*arguments) -> int:
    return script.main([str(argument) for argument in arguments])


def test_codes_of_a_grid(codes, capsys, tmp_path):
    path, values, grid = codes
    assert run("--codes", path, "--grid", "4,3,5", "--names", "hue,shape,scale", "--settings", *FEW) == 0
    folder = tmp_path / "codes_scores"
    record = json.loads((folder / "scores.json").read_text())
    assert list(record["scores"]) == defined_metrics(grid) and not record["not_computed"]
    assert record["factors"] == {"hue": 4, "shape": 3, "scale": 5} and record["source"] == str(path)
    expected = evaluate(values, grid, ["dci", "mig"], {"dci": {"num_train": 80, "num_test": 40}})
    assert all(record["scores"][metric] == expected[metric] for metric in expected)
    out = capsys.readouterr().out
    assert f"{expected['mig']['discrete_mig']:>10.4f}" in out and "time: beta_vae" in out
    assert str(folder / "scores.json") in out and str(folder / "dci_importance.png") in out


def test_codes_of_a_labelled_sample(codes, capsys, tmp_path):
    path, _, grid = codes
    lines = ["hue,shape,scale", *(f"h{a},{b},{c:.1f}" for a, b, c in grid.factors(np.arange(60)))]
    (tmp_path / "factors.csv").write_text("\n".join(lines) + "\n")
    records = []
    for factors in ("factors.csv", "factors.npy"):
        out = tmp_path / factors[-3:]
        assert run("--codes", path, "--factors", tmp_path / factors, "--metrics", "mig", "sap", "--out", out) == 0
        records.append(json.loads((out / "scores.json").read_text()))
    assert records[0]["scores"] == records[1]["scores"] and records[0]["kind"] == "labelled sample"
    assert list(records[0]["factors"]) == ["hue", "shape", "scale"]
    assert records[0]["settings"]["sap"]["num_train"] == 40, "two thirds of the rows"
    assert "labelled sample: hue 4, shape 3, scale 5 = 60 rows" in capsys.readouterr().out


def test_attributes_get_tad(tmp_path, capsys):
    attributes = np.random.RandomState(0).randint(2, size=(300, 3))
    np.save(tmp_path / "codes.npy", attributes + 0.1 * np.random.RandomState(1).standard_normal((300, 3)))
    np.save(tmp_path / "labels.npy", 2 * attributes - 1)
    assert run("--codes", tmp_path / "codes.npy", "--factors", tmp_path / "labels.npy", "--metrics", "tad") == 0
    assert "attributes_captured" in capsys.readouterr().out
    assert json.loads((tmp_path / "codes_scores" / "scores.json").read_text())["scores"]["tad"]["tad"] > 1
    assert (tmp_path / "codes_scores" / "tad_auroc.png").is_file()


def test_a_metric_asked_for_by_name_has_to_be_computed(codes, capsys, tmp_path):
    path, _, grid = codes
    factors = grid.factors(np.arange(60))
    factors[7, 1] = 3
    np.save(tmp_path / "factors.npy", factors)
    common = ("--codes", path, "--factors", tmp_path / "factors.npy", "--out", tmp_path)
    assert run(*common, "--metrics", "factor_vae", "mig") == 1
    assert "codes.npy: factor_vae: value number 3" in capsys.readouterr().err
    assert set(json.loads((tmp_path / "scores.json").read_text())["scores"]) == {"mig"}, "the rest is kept"


def test_several_are_ranked(codes, capsys, tmp_path):
    """Those of one name into folders of their own."""
    path, values, _ = codes
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / "codes.npy", values[:, ::-1])
    np.save(tmp_path / "noise.npy", np.random.RandomState(0).standard_normal((60, 3)))
    files = [path, tmp_path / "other" / "codes.npy", tmp_path / "noise.npy"]
    assert run("--codes", *files, "--grid", "4,3,5", "--metrics", "mig", "--out", tmp_path / "all") == 0
    assert json.loads((tmp_path / "all" / "udr.json").read_text())["codes"] == [str(file) for file in files]
    folders = sorted(path.parent.name for path in (tmp_path / "all").glob("*/scores.json"))
    assert folders == ["0_codes", "1_codes", "noise"] and "UDR, 60 points" in capsys.readouterr().out


def test_several_are_ranked_without_factors(codes, capsys, tmp_path):
    path, values, _ = codes
    np.save(tmp_path / "turned.npy", values[:, ::-1])
    np.save(tmp_path / "noise.npy", np.random.RandomState(0).standard_normal((60, 3)))
    assert run("--codes", path, tmp_path / "noise.npy", tmp_path / "turned.npy", "--out", tmp_path / "new") == 0
    record = json.loads((tmp_path / "new" / "udr.json").read_text())
    assert np.argmin(record["lasso"]["model_scores"]) == 1 and not list((tmp_path / "new").glob("*/scores.json"))
    assert "UDR, 60 points" in capsys.readouterr().out


def test_settings_are_numbers_or_strings(codes, tmp_path):
    settings = ["dci.backend=sklearn", "dci.num_train=20", "dci.num_test=20", "irs.diff_quantile=9e-1"]
    assert run("--codes", codes[0], "--grid", "4,3,5", "--metrics", "dci,irs", "--settings", *settings) == 0
    settings = json.loads((tmp_path / "codes_scores" / "scores.json").read_text())["settings"]
    assert settings["dci"]["backend"] == "sklearn" and settings["dci"]["num_train"] == 20
    assert settings["irs"]["diff_quantile"] == 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give trained models, or --codes FILE"),
        (["logs/x", "--codes", "codes.npy", "--grid", "4,3,5"], "give trained models, or --codes FILE"),
        (["--codes", "codes.npy"], "--codes needs --grid 10,10,8"),
        (["--codes", "codes.npy", "--grid", "4,3,5", "--factors", "factors.npy"], "--codes needs --grid"),
        (["--codes", "codes.npy", "--grid", "4,x"], "--grid 4,x: expected sizes such as 10,10,8"),
        (
            ["--codes", "codes.npy", "--grid", "4,3,6"],
            "codes.npy: the grid has 72 rows (factor 0 4 × factor 1 3 × factor 2 6), but there are 60",
        ),
        (["--codes", "codes.npy", "--factors", "factors.npy", "--names", "a,b,c"], "--names goes with --grid"),
        (["--codes", "codes.npy", "text.npy", "--grid", "4,3,5"], "text.npy is not a NumPy file"),
        (["--codes", "codes.npy", "none.npy", "--grid", "4,3,5"], "there is no file none.npy"),
        (["--codes", "codes.npy", "--grid", "4,3,5", "--metrics", "dcy"], "unknown metric 'dcy'; did you mean 'dci'?"),
        (
            ["--codes", "codes.npy", "--grid", "4,3,5", "--settings", "dci=3"],
            "settings of dci must map names to values, got 3",
        ),
        (
            ["--codes", "codes.npy", "--grid", "4,3,5", "--settings", "dci"],
            "--settings dci: expected metric.name=value",
        ),
        (["--codes", "codes.npy", "--grid", "4,3,5", "--settings", "dci.num=3"], "unknown setting 'num' of dci"),
        (["codes.npy", "--grid", "4,3,5"], "codes.npy is not a model: give codes by --codes codes.npy"),
        (["--codes", "codes.npy", "--grid", "4,3,5", "--metrics", "mig,udr"], "UDR ranks several models"),
        (["--codes", "codes.npy", "--grid", "4,3,5", "--settings", "irs.diff_quantile=2e0"], "at most 1, got 2.0"),
        (["--codes", "codes.npy", "--grid", "4,3,5", "--seed", "-1"], "seed must be an integer"),
        (["--codes", "codes.npy", "--grid", "4,3,5", "--fid", "9"], "--fid: of models, not of --codes"),
        (["--codes", "codes.npy", "--grid", "4,3,5", "--metrics", "mig", "--out", "text.npy"], "the folder text.npy"),
        (["--codes", "codes.npy", "--grid", "4,3,5", "--save-codes"], "--save-codes: of models"),
        (["--codes", "codes.npy", "--grid", "4,3,5", "--steps", "5", "--eta", "0"], "--steps, --eta: of models"),
        (["--codes", "codes.npy", "--grid", "4,3,5", "--settings", "mig.num_bins=[1"], "--settings mig.num_bins=[1: "),
        (["--codes", "codes.npy", "codes.npy", "--metrics", "mig"], "--metrics needs the factors of the codes"),
        (["logs/none"], "there is no log directory or checkpoint 'logs/none'"),
    ],
)
def test_mistakes_are_reported_in_one_line(codes, monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("text.npy").write_text("1 2 3")
    before = set(tmp_path.iterdir())
    assert run(*arguments) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert set(tmp_path.iterdir()) == before, "nothing is written"


def test_it_needs_neither_torch_nor_a_model(codes):
    code = (
        "import runpy, sys; sys.argv = ['evaluate.py', '--codes', sys.argv[1], *'--grid 4,3,5 --metrics mig'.split()]\n"
        "try: runpy.run_path('scripts/evaluate.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(codes[0])], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.strip().splitlines()[-1] == "False", done.stderr


# ---- models


@pytest.fixture(scope="module")
def run_of(trained_encdiff):
    """A trained model, its data set, and its codes."""
    model = ldm.load(trained_encdiff.logdir)
    data = instantiate_from_config(load_config(trained_encdiff.logdir).data, "data")
    data.setup()
    return trained_encdiff.logdir, model, data.datasets["validation"]


def test_a_log_directory(run_of, capsys, tmp_path):
    logdir, model, dataset = run_of
    out = tmp_path / "out"
    assert run(logdir, "--metrics", "mig", "factor_vae", "--settings", *FEW[2:4], "--out", out, "--save-codes") == 0
    record = json.loads((out / "scores.json").read_text())
    codes = encode(model, dataset, progress=False)
    np.testing.assert_allclose(np.load(out / "codes.npy"), codes, atol=1e-6)
    assert list(record["factors"]) == list(dataset.grid.names) and record["of"] == "scalars"
    assert record["scores"]["mig"] == evaluate(np.load(out / "codes.npy"), dataset.grid, ["mig"])["mig"]
    assert "mig" in capsys.readouterr().out
    # A checkpoint in it is the same model.
    assert run(logdir / "checkpoints" / "last.ckpt", "--metrics", "mig", "--out", out / "file") == 0
    assert json.loads((out / "file" / "scores.json").read_text())["scores"]["mig"] == record["scores"]["mig"]


@pytest.mark.parametrize(("of", "per_token"), [("tokens", 1), ("components", None)])
def test_tokens_of_a_model(run_of, tmp_path, of, per_token):
    logdir, model, dataset = run_of
    assert run(logdir, "--of", of, "--metrics", "mig", "--out", tmp_path, "--save-codes") == 0
    tokens = encode(model, dataset, progress=False, tokens=True)
    expected = tokens if of == "tokens" else tokens.reshape(len(tokens), -1)
    saved = np.load(tmp_path / "codes.npy")
    np.testing.assert_allclose(saved, expected, atol=1e-5)
    record = json.loads((tmp_path / "scores.json").read_text())
    assert record["shape"] == list(expected.shape) and record["of"] == of
    assert record["scores"]["mig"] == evaluate(saved, dataset.grid, ["mig"])["mig"]


def test_bf16(run_of, tmp_path):
    """Codes that are close, and not the same."""
    logdir, model, dataset = run_of
    assert run(logdir, "--bf16", "--save-codes", "--metrics", "mig", "--out", tmp_path / "half") == 0
    assert json.loads((tmp_path / "half" / "scores.json").read_text())["dtype"] == "bf16"
    found, plain = np.load(tmp_path / "half" / "codes.npy"), encode(model, dataset, progress=False)
    assert 0 < np.abs(found - plain).max() < 0.02 * np.abs(plain).max()
    assert np.array_equal(found, encode(model, dataset, progress=False, dtype="bf16"))


def test_reconstructions(run_of, first_stage, capsys, tmp_path):
    logdir, _, _ = run_of
    options = ("--reconstruction", 4, "--steps", 2, "--lpips", "none", "--metrics", "mig")
    assert run(logdir, *options, "--out", tmp_path) == 0
    record = json.loads((tmp_path / "images.json").read_text())["reconstruction"]
    assert record["mse"] > 0 and record["images"] == 4 and "DDIM, 2 steps, eta 1" in record["protocol"]
    assert record["protocol"] in capsys.readouterr().out
    assert run(logdir, *options, "--sampler", "dpm", "--out", tmp_path / "dpm") == 0
    record = json.loads((tmp_path / "dpm" / "images.json").read_text())["reconstruction"]
    assert "DPM-Solver++, 2 steps, eta 1" in record["protocol"]
    # A first stage has no scalars, but images.
    assert run(first_stage, "--reconstruction", 4, "--lpips", "none", "--out", tmp_path / "first") == 0
    assert json.loads((tmp_path / "first" / "images.json").read_text())["reconstruction"]["mse"] > 0
    assert run(first_stage, "--out", tmp_path / "none") == 1
    assert "it is a first stage, without scalars to score: ask for --reconstruction" in capsys.readouterr().err
    # What cannot be computed of images is reported before anything is scored.
    for wrong, message in (
        (("--eta", 2), "eta: expected a number from 0 to 1, got 2.0"),
        (("--steps", 101), "steps: expected 1 to 100"),
        (("--lpips", "alex"), "LPIPS on alex needs images of at least 31 pixels, not 16"),
    ):
        assert run(logdir, *options, *wrong, "--out", tmp_path / "wrong") == 1
        assert message in capsys.readouterr().err and not (tmp_path / "wrong").exists()


def test_faces_are_scored_against_their_attributes(run_of, capsys, tmp_path):
    logdir = run_of[0]
    write_celeba(tmp_path, 40)
    config = load_config(logdir)
    size = config.model.params.cond_stage_config.params.image_size
    split = {"target": "ldm.data.dis.CelebATrain", "params": {"path": str(tmp_path), "image_size": size}}
    config.data.params = {"batch_size": 8, "train": split, "validation": split}
    faces = tmp_path / "faces"
    (faces / "configs").mkdir(parents=True)
    OmegaConf.save(config, faces / "configs" / "x-project.yaml")
    shutil.copytree(logdir / "checkpoints", faces / "checkpoints")
    assert run(faces, "--metrics", "tad") == 0, capsys.readouterr().err
    record = json.loads((faces / "evaluation" / "scores.json").read_text())
    values = attribute_table(40)[1]
    assert record["rows"] == 40 and len(record["factors"]) == values.shape[1] and "tad" in record["scores"]


def test_scores_of_different_things_go_to_different_folders(run_of, capsys, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_of[0], copy)
    for more in ((), ("--of", "tokens"), ("--split", "train")):
        assert run(copy, "--metrics", "mig", *more) == 0
    records = {path.parent.name: json.loads(path.read_text()) for path in copy.glob("evaluation*/scores.json")}
    assert set(records) == {"evaluation", "evaluation-tokens", "evaluation-train"}
    assert records["evaluation-tokens"]["of"] == "tokens" and records["evaluation-train"]["split"] == "train"
    assert records["evaluation"]["versions"]["numpy"] == np.__version__ and records["evaluation"]["weights"] == "live"
    # The EMA weights are of the U-Net, which no score of scalars sees, but samples do.
    assert run(copy, "--metrics", "mig", "--weights", "ema") == 1
    assert "EMA weights are of the U-Net alone" in capsys.readouterr().err
    assert run(copy, "--weights", "ema", "--reconstruction", 2, "--steps", 1, "--lpips", "none") == 0
    assert "EMA weights are of the U-Net alone" in capsys.readouterr().out
    assert [path.name for path in (copy / "evaluation-ema").iterdir()] == ["images.json"]
    assert run(copy, "--metrics", "mig", "--grid", "4,3,5") == 1
    assert "--grid, --names and --factors go with --codes" in capsys.readouterr().err


def test_wrong_devices_and_numbers(run_of, capsys, tmp_path):
    for device in ("nothing", "cuda:99"):
        assert run(run_of[0], "--device", device, "--metrics", "mig", "--out", tmp_path / "x") == 1
        assert f"error: --device {device} cannot be used" in capsys.readouterr().err
    for flag in ("--steps", "--batch-size", "--reconstruction", "--fid"):
        with pytest.raises(SystemExit):
            run(run_of[0], flag, "0")
        assert f"{flag}: expected a whole number of at least 1, got '0'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_an_interruption(codes, monkeypatch, capsys, tmp_path):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setitem(METRICS, "irs", stop)
    assert run("--codes", codes[0], "--grid", "4,3,5", "--metrics", "irs") == 130
    assert "stopped" in capsys.readouterr().err


def test_help_names_every_metric(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    out = " ".join(capsys.readouterr().out.split())
    assert all(name in out for name in METRICS)
