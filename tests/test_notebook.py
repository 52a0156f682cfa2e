"""docs/walk.ipynb: runs from its first cell to its last, on a tiny model."""

import base64
import io
import os

import nbformat
import numpy as np
import pytest
from command_line import ROOT
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
