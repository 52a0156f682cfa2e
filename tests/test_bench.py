"""scripts/bench.py: the release's way gives our numbers; turns, rows and what is written."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from command_line import encdiff_config, first_stage_config

from ldm.util import instantiate_from_config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import bench_release


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """No weight is zero, so that each has a gradient."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def encdiff() -> Any:
    node = encdiff_config(Path())["model"]
    del node["params"]["first_stage_config"]["params"]["ckpt_path"]
    node["params"]["unet_config"]["params"]["channel_mult"] = [1, 2]
    return randomised(instantiate_from_config(node))


def first_stage() -> Any:
    node = first_stage_config(Path())["model"]
    node["params"]["ddconfig"] = {**node["params"]["ddconfig"], "ch_mult": [1, 2]}
    return randomised(instantiate_from_config(node))


class LargeEpsilon(pl.Callback):
    """Adam then does not blow up gradients that are zero but for rounding, as of biases in front of a norm."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for group in [group for optimizer in trainer.optimizers for group in optimizer.param_groups]:
            group["eps"] = 1e-3


def trained(model: Any, steps: int = 4) -> dict[str, torch.Tensor]:
    """Everything in its state after a few steps."""
    generator = torch.Generator().manual_seed(1)
    images = [{"image": torch.rand(16, 16, 3, generator=generator) * 2 - 1, "idx": row} for row in range(4 * steps)]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", max_steps=steps, callbacks=[LargeEpsilon()], **quiet)  # type: ignore[arg-type]
    torch.manual_seed(2)
    trainer.fit(model, torch.utils.data.DataLoader(images, batch_size=4))
    return model.state_dict()


def gradients(model: Any, x: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    model.train()
    latent = model.get_first_stage_encoding(model.encode_first_stage(x))
    loss, _ = model.p_losses(latent, model.get_learned_conditioning(x), t, noise)
    loss.backward()
    return float(loss), [p.grad for p in model.trained_parameters()[0]]


def test_the_release_s_way_has_our_loss_and_gradients():
    plain = encdiff()
    released = bench_release.as_released(copy.deepcopy(plain))
    x, noise = torch.rand(4, 3, 16, 16) * 2 - 1, torch.randn(4, 3, 8, 8)
    t = torch.tensor([0, 20, 50, 99])
    (ours, our_gradients), (theirs, their_gradients) = (gradients(m, x, t, noise) for m in (plain, released))
    assert theirs == pytest.approx(ours, rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in our_gradients)
    for expected, found in zip(our_gradients, their_gradients, strict=True):
        assert float(expected.abs().max()) > 0
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("build", [encdiff, first_stage])
def test_the_release_s_way_trains_as_ours(build):
    """Weights, averages and the discriminator, after steps of both."""
    plain = build()
    plain.learning_rate = 3e-3
    before = copy.deepcopy(plain.state_dict())
    released = bench_release.as_released(copy.deepcopy(plain))
    expected, found = trained(plain), trained(released)
    assert list(found) == list(expected)
    assert any(not torch.equal(before[name], value) for name, value in expected.items())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_every_network_of_the_release_is_replaced():
    kinds = {type(module) for model in (encdiff(), first_stage()) for module in model.modules()}
    assert set(bench_release.WAYS) <= kinds, "a way that nothing uses"
    model = bench_release.as_released(encdiff())
    assert not {type(module) for module in model.modules()} & set(bench_release.WAYS)


def test_a_first_stage_that_the_release_does_not_have():
    model = first_stage()
    model.loss.pixel_loss = "l2"
    with pytest.raises(ValueError, match="l1"):
        bench_release.as_released(model)


@pytest.mark.slow
@pytest.mark.parametrize("row", ["train", "loader", "startup"])
def test_a_row_is_measured(row, tmp_path):
    """What is timed is built by the command line, which takes classes of the project alone unless it is told more."""
    import bench_process
    import bench_rows
    import bench_training

    if row == "train":
        small = [
            "model.params.unet_config.params.model_channels=32",
            "model.params.unet_config.params.num_res_blocks=1",
        ]
        found = bench_training.compare(row, "cpu", 4, pairs=1, budget=0, image_size=32, images=16, extra=small)
        assert found.ratios[0] > 0 and found.memory["fast"] > 0
    elif row == "loader":
        assert bench_rows.loader(tmp_path, pairs=1, budget=0, batch_size=4, images=16).ratios[0] > 0
    else:
        assert bench_process.first_step_seconds("cpu", 4, tmp_path, fast=False) > 0
