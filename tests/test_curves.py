"""scripts/curves.py: what is read from log directories, and what is drawn."""

import csv
import json
import shutil
import sys

import numpy as np
import pytest
from command_line import ROOT
from omegaconf import OmegaConf

from ldm.util import UserError

sys.path.insert(0, str(ROOT / "scripts"))

import curves
import table

DIAGONAL = np.eye(3).tolist()
MIXED = [[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 0.0]]


def run(folder, name, seed, dci, accuracy=(1.0, 1.0, 0.5), importance=MIXED):
    logdir = folder / f"2026-01-01T00-00-0{seed}_{name}"
    for part in ("configs", "metrics"):
        (logdir / part).mkdir(parents=True)
    OmegaConf.save({"model": {}, "data": {"params": {"batch_size": 16}}}, logdir / "configs" / "now-project.yaml")
    OmegaConf.save({"lightning": {"seed": seed}}, logdir / "configs" / "now-lightning.yaml")
    for step, value in dci.items():
        scores = {"dci": {"disentanglement": value}, "factor_vae": {"eval_accuracy": 0.5}}
        matrices = {"dci": {"importance": importance, "accuracy": list(accuracy)}}
        record = {"step": step, "factors": {"hue": 4, "shape": 4, "scale": 4}, "scores": scores, "matrices": matrices}
        record |= {"scores_of_ema": scores, "matrices_of_ema": matrices}
        (logdir / "metrics" / f"{step:06}.json").write_text(json.dumps(record))


def test_means_and_bands_over_seeds(tmp_path):
    run(tmp_path, "ours", 0, {10: 0.2, 20: 0.6})
    run(tmp_path, "ours", 1, {10: 0.4, 20: 0.8, 30: 1.0})
    points = [point for logdir in sorted(tmp_path.iterdir()) for point in curves.points_of(logdir)]
    live = [point for point in points if point.weights == "live"]
    assert len(points) == 10 and len(live) == 5
    images, mean, spread = curves.band(live, "dci")
    assert images.tolist() == [160, 320], "where all seeds were scored"
    np.testing.assert_allclose(mean, [0.3, 0.7])
    np.testing.assert_allclose(spread, [np.std([0.2, 0.4], ddof=1)] * 2)
    np.testing.assert_allclose(curves.band(live, "scale")[1], [0.5, 0.5])


def test_dci_over_the_factors_that_are_known():
    """The third factor, spread over two dimensions, is not predicted, and does not count."""
    known = {"importance": MIXED, "accuracy": [0.95, 1.0, 0.9]}
    assert curves.known_dci(known) == pytest.approx(1.0)
    assert curves.known_dci({**known, "accuracy": [1.0, 1.0, 1.0]}) < 0.7
    assert np.isnan(curves.known_dci({**known, "accuracy": [1.0, 0.5, 0.5]}))


def test_files(tmp_path, capsys):
    for seed in (0, 1):
        run(tmp_path / "logs", "ours", seed, {10: 0.2, 20: 0.6}, importance=DIAGONAL)
        run(tmp_path / "logs", "theirs", seed, {10: 0.1, 20: 0.3})
    curves.main([str(tmp_path / "logs"), "--out", str(tmp_path / "out")])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["curves.csv", "factors.pdf", "factors.png", "scores.pdf", "scores.png"]
    assert len(capsys.readouterr().out.splitlines()) == 5
    with (tmp_path / "out" / "curves.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 2 * 2 * 2
    assert lines[0].keys() >= {"row", "seed", "images", "weights", "dci", "dci_known", "accuracy scale"}


def test_nothing_to_draw(tmp_path):
    run(tmp_path, "ours", 0, {})
    with pytest.raises(UserError, match="no scored runs"):
        curves.main([str(tmp_path)])
    run(tmp_path, "ours", 1, {10: 0.5})
    run(tmp_path / "again", "ours", 1, {10: 0.4})
    with pytest.raises(UserError, match="two runs of 'ours' with seed 1"):
        curves.main([str(tmp_path)])
    shutil.rmtree(tmp_path / "again")
    with pytest.raises(UserError, match="no run was scored by mig"):
        curves.main([str(tmp_path), "--metrics", "mig", "--out", str(tmp_path / "out")])


def test_points_that_were_written_before(tmp_path, capsys):
    """A CSV goes together with runs: the same points, and by scripts/table.py the same last scores."""
    run(tmp_path / "first", "ours", 0, {10: 0.2, 20: 0.6})
    run(tmp_path / "second", "ours", 1, {10: 0.4, 20: 0.8})
    curves.main([str(tmp_path / "first"), "--out", str(tmp_path / "old")])
    curves.main([str(tmp_path / "old" / "curves.csv"), str(tmp_path / "second"), "--out", str(tmp_path / "new")])
    curves.main([str(tmp_path / "first"), str(tmp_path / "second"), "--out", str(tmp_path / "whole")])
    assert (tmp_path / "new" / "curves.csv").read_text() == (tmp_path / "whole" / "curves.csv").read_text()
    capsys.readouterr()
    table.main([str(tmp_path / "new" / "curves.csv"), "--metrics", "dci"])
    assert "| ours | 2 | .700 ± .141 |" in capsys.readouterr().out
    (tmp_path / "other.csv").write_text("a,b\\n1,2\\n")
    with pytest.raises(UserError, match="no column 'row'"):
        table.main([str(tmp_path / "other.csv")])
    with pytest.raises(UserError, match="cannot read"):
        curves.main([str(tmp_path / "missing.csv")])


def test_scores_above_one_are_inside_the_axes(tmp_path, monkeypatch):
    """TAD is a sum over attributes."""
    seen = {}
    monkeypatch.setattr(
        curves, "save", lambda figure, *_: seen.update(limits=[a.get_ylim() for a in figure.axes]) or []
    )
    points = [curves.Point("ours", "0", count, "live", {"tad": 1.5 + count / 100, "dci": 0.5}) for count in (10, 20)]
    curves.draw_scores(points, ["ours"], ["tad", "dci"], tmp_path)
    assert seen["limits"] == [(0, pytest.approx(1.05 * 1.7)), (0, 1.02)]
