"""Golden losses of the first steps: a change that should not change the numbers does not.

`python tests/models/test_loss_traces.py` writes the file anew, after a change that should.
"""

import json
from pathlib import Path

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from test_training import encdiff, fit, kl, loader, vq

TRACES = Path(__file__).parents[1] / "reference" / "loss_traces.json"
BUILD = {
    "vq": vq,
    "kl": kl,
    "encdiff": encdiff,
    "encdiff, paper's loss": lambda: encdiff(loss_type="l2", beta_schedule="cosine", ema_parameters="all"),
}
KEPT = ("loss", "loss_simple", "loss_vlb", "total_loss", "rec_loss", "d_weight", "g_loss", "disc_loss", "kl_loss")


class Losses(Callback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        found = {name: trainer.callback_metrics.get(f"train/{name}_step") for name in KEPT}
        self.rows.append({name: float(value) for name, value in found.items() if value is not None})


def trace(name: str) -> list[dict[str, float]]:
    """Losses of five steps from seed 0."""
    torch.manual_seed(0)
    model, losses = BUILD[name](), Losses()
    model.learning_rate = 1e-4
    fit(model, loader(5), callbacks=[losses])
    return losses.rows


@pytest.mark.parametrize("name", BUILD)
def test_losses_are_what_they_were(name):
    expected = json.loads(TRACES.read_text())[name]
    found = trace(name)
    assert len(found) == len(expected) == 5
    for step, (row, known) in enumerate(zip(found, expected, strict=True)):
        assert set(row) == set(known)
        for key, value in row.items():
            # The discriminator's batch norm magnifies the rounding of another machine.
            tolerance = 1e-2 if key in ("g_loss", "d_weight", "disc_loss") else 1e-4
            assert value == pytest.approx(known[key], rel=tolerance, abs=tolerance / 10), (step, key)


def test_a_wrong_number_would_show():
    """One step at another rate leaves the trace."""
    torch.manual_seed(0)
    model, losses = encdiff(), Losses()
    model.learning_rate = 1.1e-4
    fit(model, loader(5), callbacks=[losses])
    expected = json.loads(TRACES.read_text())["encdiff"]
    assert losses.rows[4]["loss"] != pytest.approx(expected[4]["loss"], rel=1e-4)


if __name__ == "__main__":
    TRACES.write_text(json.dumps({name: trace(name) for name in BUILD}, indent=1) + "\n")
