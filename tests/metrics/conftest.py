"""Codes whose scores are known."""

import json
from pathlib import Path

import numpy as np
import pytest
import reference_codes

from ldm.factors import FactorGrid

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def reference():
    """Codes, grid and scores of the original's evaluation code on Shapes3D's grid."""
    scores = json.loads((HERE / "metrics_shapes3d.json").read_text())["scores"]
    return reference_codes.codes("shapes3d", seed=11), FactorGrid(reference_codes.SIZES["shapes3d"]), scores


@pytest.fixture(scope="session")
def grid():
    """A grid small enough for scikit-learn's trees."""
    return FactorGrid((4, 3, 5), ("hue", "shape", "scale"))


@pytest.fixture(scope="session")
def perfect(grid):
    """Codes (60, 3): one dimension per factor."""
    return grid.factors(np.arange(len(grid))) / np.array(grid.sizes)
