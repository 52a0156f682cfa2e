"""docs/walk.ipynb: runs from its first cell to its last, on a tiny model."""

import base64
import io
import os
import shutil
import sys

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from command_line import ROOT
from omegaconf import OmegaConf
from PIL import Image

NOTEBOOK = ROOT / "docs" / "walk.ipynb"


def test_it_is_stored_without_results():
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) > 8 and not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow
def test_it_runs(trained_encdiff, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("ENCDIFF_RUN", str(trained_encdiff.logdir))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, 4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "docs")}})
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    errors = [output for output in outputs if output.get("name") == "stderr"]
    assert not errors, errors
    texts = "".join(str(output.get("text", "")) + output.get("data", {}).get("text/plain", "") for output in outputs)
    assert trained_encdiff.logdir.name in texts and "(6, 16, 16, 3)" in texts and "(6, 4)" in texts
    assert "floor hue" in texts and "discrete_mig" in texts
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("L")) for picture in pictures]
    assert len(shown) >= 4 and all(picture.std() > 5 for picture in shown), "reconstructions, swaps, traversals, maps"


@pytest.mark.slow
def test_without_factors(trained_encdiff, tmp_path, monkeypatch, capsys):
    """On a folder of pictures: four concepts, and no scores. In this process, without the last cell."""
    logdir = shutil.copytree(trained_encdiff.logdir, tmp_path / "run")
    (tmp_path / "pictures").mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
    (path,) = (logdir / "configs").glob("*-project.yaml")
    config = OmegaConf.load(path)
    node = {"target": "ldm.data.dis.ImageFolder", "params": {"path": str(tmp_path / "pictures"), "image_size": 16}}
    config.data.params.train = config.data.params.validation = node
    OmegaConf.save(config, path)
    monkeypatch.setenv("ENCDIFF_RUN", str(logdir))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.path", sys.path[:])
    shown: list[int] = []
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: shown.append(len(plt.gcf().axes)))
    cells = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    names: dict = {}
    for cell in cells[:-1]:
        exec(cell.source, names)
    plt.close("all")
    assert shown == [12, 30, 44, 5], "reconstructions, swaps, traversals and maps of four concepts"
    assert "neither factors nor attributes" in capsys.readouterr().out
