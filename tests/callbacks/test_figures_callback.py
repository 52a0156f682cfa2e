"""Figures at validation: files and loggers, on the first process, without a trace in training."""

import json
import logging
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import CHECKPOINT, encdiff_config
from omegaconf import OmegaConf

from ldm import signals
from ldm.api import model_node
from ldm.callbacks.figures import FiguresCallback
from ldm.data.dis import Shapes3DTrain
from ldm.util import UserError, instantiate_from_config

NAMES = ["reconstructions", "matrices"]
QUICK = {"images": 2, "steps": 2}


class Loggers:
    def __init__(self):
        self.sent, self.experiment = [], self

    def add_image(self, name, pixels, global_step, dataformats):
        self.sent.append((name, pixels.shape, global_step, dataformats))


@pytest.fixture(scope="module")
def model(rooms):
    config = OmegaConf.create(encdiff_config(rooms))
    OmegaConf.update(config, CHECKPOINT, None)
    OmegaConf.update(config, "model.params.unet_config.params.dropout", 0.5, force_add=True)
    torch.manual_seed(0)
    return instantiate_from_config(model_node(config, "tests"), "model", "Lightning module")


@pytest.fixture
def trainer(rooms, tmp_path):
    data = SimpleNamespace(datasets={"validation": Shapes3DTrain(rooms)})
    return SimpleNamespace(global_step=12, is_global_zero=True, sanity_checking=False, fast_dev_run=0,
                           progress_bar_callback=None, loggers=[Loggers()],
                           datamodule=data, default_root_dir=str(tmp_path),
                           precision_plugin=SimpleNamespace(forward_context=nullcontext))  # fmt: skip


def drawn(trainer, tmp_path):
    return sorted(path.name for path in tmp_path.glob("images/figures/000012/*"))


def test_files_and_loggers(model, trainer, tmp_path):
    FiguresCallback(NAMES, **QUICK).on_validation_end(trainer, model)
    assert drawn(trainer, tmp_path) == ["matrices.png", "reconstructions.png"]
    sent = trainer.loggers[0].sent
    assert [entry[0] for entry in sent] == ["figures/reconstructions", "figures/matrices"]
    assert all(entry[1][2] == 3 and entry[2:] == (12, "HWC") for entry in sent)


def test_training_does_not_notice(model, trainer, tmp_path):
    """Neither random numbers nor weights, modes or statistics; the pictures are the same whatever they are."""
    callback = FiguresCallback(["reconstructions", "attention"], **QUICK)
    model.train()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    callback.on_validation_end(trainer, model)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())
    first = (tmp_path / "images/figures/000012/reconstructions.png").read_bytes()
    torch.manual_seed(4)
    callback.on_validation_end(trainer, model)
    assert (tmp_path / "images/figures/000012/reconstructions.png").read_bytes() == first


@pytest.mark.parametrize("change", [{"is_global_zero": False}, {"sanity_checking": True}])
def test_when_nothing_is_drawn(change, model, trainer, tmp_path):
    FiguresCallback([], **QUICK).on_validation_end(trainer, model)
    FiguresCallback(NAMES, **QUICK).on_validation_end(trainer, torch.nn.Linear(1, 1))
    vars(trainer).update(change)
    FiguresCallback(NAMES, **QUICK).on_validation_end(trainer, model)
    assert drawn(trainer, tmp_path) == [] and trainer.loggers[0].sent == []


def test_rows_are_named_by_the_newest_scores(model, trainer, tmp_path):
    names = ["floor hue", "wall hue", "object hue", "scale", "shape", "orientation"]
    (tmp_path / "metrics").mkdir()
    for step, shift in ((4, 0), (12, 1), (30, 2)):
        importance = np.roll(np.eye(4, 6), shift, axis=0).tolist()
        record = {"step": step, "factors": dict.fromkeys(names, 2), "matrices": {"dci": {"importance": importance}}}
        (tmp_path / "metrics" / f"{step:06}.json").write_text(json.dumps(record))
    subject = FiguresCallback(NAMES, **QUICK)._subject(trainer, model, tmp_path, 12)
    assert subject.concepts.tokens["floor hue"] == (1,) and subject.scored["dci"] == 12
    later = FiguresCallback(NAMES, **QUICK)._subject(trainer, model, tmp_path, 13)
    assert later.scored["dci"] == 12, "the scores until then, not those of an earlier run's later steps"
    (tmp_path / "metrics" / "000012.json").write_text('{"step": 1')
    with pytest.raises(UserError, match=r"000012\.json' is damaged"):
        FiguresCallback(NAMES, **QUICK)._subject(trainer, model, tmp_path, 12)


def test_a_picture_is_not_worth_a_run(model, trainer, tmp_path, caplog):
    def broken(*args, **options):
        raise RuntimeError("out of memory")

    trainer.loggers[0].add_image = broken
    with caplog.at_level(logging.WARNING):
        FiguresCallback(NAMES, **QUICK).on_validation_end(trainer, model)
    assert "the figures of step 12: RuntimeError: out of memory" in caplog.text


def test_a_signal_cuts_it_short(model, trainer, tmp_path):
    """As in training, where it waits, and what changes nothing is cut short."""
    calls = []
    step = model.apply_model

    def apply_model(*args):
        calls.append(None)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    model.apply_model = apply_model
    try:
        with signals.handled():
            signals.state.waits = signals.state.cuts_short = True
            FiguresCallback(["swaps", "reconstructions"], images=2, steps=5).on_validation_end(trainer, model)
            assert signals.state.stop == signal.SIGINT and signals.state.waits
    finally:
        del model.apply_model
        signals.state.stop, signals.state.waits, signals.state.cuts_short = None, False, False
    assert len(calls) == 3 and drawn(trainer, tmp_path) == []


def test_wrong_settings():
    with pytest.raises(UserError, match=r"names: there is no figure 'swap'; did you mean 'swaps'"):
        FiguresCallback(["swap"])
    for key in ("images", "steps"):
        with pytest.raises(UserError, match=f"{key}: expected at least 1, got 0"):
            FiguresCallback(**{key: 0})


@pytest.mark.slow
def test_compiled_networks_are_not_compiled_anew(model, trainer, tmp_path):
    """Nor are they left uncompiled."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    unet = model.model.diffusion_model
    latent, t, tokens = torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long), torch.zeros(2, 4, 8)
    unet.compile(backend="eager")
    try:
        with torch.no_grad():
            unet(latent, t, tokens)
            counters.clear()
            FiguresCallback(["swaps", "attention"], **QUICK).on_validation_end(trainer, model)
            assert drawn(trainer, tmp_path) == ["attention.png", "swaps.png"]
            assert counters["stats"]["unique_graphs"] == 0
            unet(latent.repeat(2, 1, 1, 1), t.repeat(2), tokens.repeat(2, 1, 1))
            assert counters["stats"]["unique_graphs"] > 0, "other sizes are still compiled"
    finally:
        unet._compiled_call_impl = None
        torch._dynamo.reset()
