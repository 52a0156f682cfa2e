"""Scalars are put into grid order and scored, and what cannot be scored is refused."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ldm.callbacks.disentanglement import DisentanglementCallback
from ldm.evaluation.scores import CodeScores
from ldm.factors import FactorGrid
from ldm.metrics.evaluate import METRICS
from ldm.metrics.sampling import Scores
from ldm.util import UserError

GRID = FactorGrid((3, 4), ("hue", "scale"))


class Encoder(nn.Module):
    """The two scalars are the mean of the image and its negative."""

    def encoding(self, image: torch.Tensor) -> torch.Tensor:
        mean = image.mean(dim=(1, 2, 3))
        return torch.stack([mean, -mean], dim=1)

    def warp(self, scalars: torch.Tensor) -> torch.Tensor:
        """Tokens of width 3: the scalar, its square, and 1."""
        return torch.stack([scalars, scalars**2, torch.ones_like(scalars)], dim=-1)


class Model(nn.Module):
    cond_stage_key = "image"

    def __init__(self) -> None:
        super().__init__()
        self.cond_stage_model = Encoder()
        self.logged: dict[str, float] = {}

    def get_input(self, batch, key):
        return batch[key]

    def all_gather(self, values):
        return values

    def log(self, name, value, **options):
        self.logged[name] = value


def dataset(grid=GRID):
    return SimpleNamespace(grid=grid)


def trainer(folder, sanity=False):
    strategy = SimpleNamespace(broadcast=lambda value: value)
    return SimpleNamespace(sanity_checking=sanity, is_global_zero=True, global_step=7, current_epoch=1, world_size=1,
                           strategy=strategy, default_root_dir=str(folder))  # fmt: skip


def batches(rows):
    """Batches of five images, each filled with its row's number."""
    for part in np.array_split(rows, len(rows) // 5):
        index = torch.as_tensor(part)
        yield {"image": index.float().view(-1, 1, 1, 1).expand(-1, 3, 4, 4), "idx": index}


@pytest.fixture
def callback(monkeypatch):
    """A callback that keeps the codes it is given to score, and fails for the kinds in `failing`."""
    made = DisentanglementCallback(metrics=["mig"], settings={"mig": {"num_train": 12}})
    made.seen, made.failing = [], ()

    def keep(codes, factors, metrics, settings, seed, tell):
        made.seen.append(codes)
        if codes.ndim in made.failing:
            raise ValueError("codes hold NaN")
        found = CodeScores(factors, dict(settings), seed, codes.shape, [])
        found.scores["mig"] = Scores(discrete_mig=0.5)
        return found

    monkeypatch.setattr("ldm.callbacks.disentanglement.score_codes", keep)
    return made


def validate(callback, model, trainer, rows):
    callback.check(model, {"validation": dataset()}, {})
    callback.on_validation_epoch_start(trainer, model)
    for number, batch in enumerate(batches(rows)):
        callback.on_validation_batch_end(trainer, model, None, batch, number)
    callback.on_validation_epoch_end(trainer, model)


@pytest.mark.parametrize("repeated", [0, 3])
def test_codes_are_in_grid_order(callback, tmp_path, repeated):
    """Whatever the order of validation, and with rows that a sampler repeats."""
    rows = np.random.RandomState(0).permutation(12)
    validate(callback, model := Model(), trainer(tmp_path), np.concatenate([rows, rows[:repeated]]))
    (codes,) = callback.seen
    assert np.array_equal(codes, np.stack([np.arange(12), -np.arange(12)], 1).astype(np.float32))
    assert model.logged == {"val/mig": 0.5}
    assert (tmp_path / "metrics" / "000007.json").is_file()


@pytest.mark.parametrize("processes", [1, 2])
def test_tokens_are_put_into_grid_order_too(callback, tmp_path, processes):
    """Also those from several processes, which have one more dimension in front."""
    callback.score_tokens = True
    model = Model()
    if processes == 2:
        model.all_gather = lambda values: tuple(v.unflatten(0, (2, -1)) for v in values)
    validate(callback, model, trainer(tmp_path), np.random.RandomState(0).permutation(12))
    scalars, tokens = callback.seen
    expected = np.stack([np.arange(12), -np.arange(12)], 1).astype(np.float32)
    assert np.array_equal(scalars, expected)
    assert np.array_equal(tokens, np.stack([expected, expected**2, np.ones_like(expected)], axis=-1))
    assert model.logged == {"val/mig": 0.5, "val/tokens_mig": 0.5}
    record = json.loads((tmp_path / "metrics" / "000007.json").read_text())
    assert record["scores"] == record["scores_of_tokens"] == {"mig": {"discrete_mig": 0.5}}


def test_scalars_of_the_averages_are_scored_too(callback, tmp_path):
    """EMA weights that double the scalars."""
    callback.score_ema = True
    model = Model()
    model.use_ema, model.ema_parameters = True, "all"

    @contextmanager
    def ema_scope():
        encoder, live = model.cond_stage_model, model.cond_stage_model.encoding
        encoder.encoding = lambda image: 2 * Encoder.encoding(encoder, image)
        yield
        encoder.encoding = live

    model.ema_scope = ema_scope
    validate(callback, model, trainer(tmp_path), np.random.RandomState(0).permutation(12))
    live, averaged = callback.seen
    assert np.array_equal(averaged, 2 * live) and live[3, 0] == 3
    assert model.logged == {"val/mig": 0.5, "val/ema_mig": 0.5} and callback.logged == ["mig", "ema_mig"]
    record = json.loads((tmp_path / "metrics" / "000007.json").read_text())
    assert record["scores"] == record["scores_of_ema"] == {"mig": {"discrete_mig": 0.5}}
    model.ema_parameters = "unet"
    with pytest.raises(UserError, match=r"params\.score_ema: ema needs EMA weights"):
        callback.check(model, {"validation": dataset()}, {})


@pytest.mark.parametrize(
    ("dtype", "precision", "used"),
    [
        ("bf16", "32-true", "bf16"),
        ("float32", "bf16-mixed", None),
        ("auto", "bf16-mixed", "bf16"),
        ("auto", "32-true", None),
        ("auto", "16-mixed", None),
    ],
)
def test_precision_of_the_scalars(callback, tmp_path, dtype, precision, used):
    """What is not float32 is written down. bf16 has eight bits: 1 + 1/512 is 1 there."""
    callback.dtype, mean, encoded = dtype, Encoder.encoding, []

    class Half(Encoder):
        def encoding(self, image):
            one = torch.ones(1, 1)
            encoded.append(float(one @ (one + 1 / 512)))
            return mean(self, image)

    model, fit = Model(), trainer(tmp_path)
    model.cond_stage_model, fit.precision = Half(), precision
    validate(callback, model, fit, np.arange(12))
    record = json.loads((tmp_path / "metrics" / "000007.json").read_text())
    assert record.get("dtype") == used and (encoded[0] == 1) == (used == "bf16")


def test_missing_rows_are_refused(callback, tmp_path):
    with pytest.raises(UserError, match="2 of the 12 rows"):
        validate(callback, Model(), trainer(tmp_path), np.arange(10))
    assert not callback.seen


def test_the_sanity_check_does_not_count(callback, tmp_path):
    validate(callback, Model(), trainer(tmp_path, sanity=True), np.arange(12))
    assert not callback.seen and callback.state_dict() == {"validations": 0}


def test_the_rhythm_survives_a_resume(callback, tmp_path):
    callback.every_n_validations = 2
    validate(callback, Model(), trainer(tmp_path), np.arange(12))
    other = DisentanglementCallback(metrics=["mig"], every_n_validations=2)
    other.load_state_dict(callback.state_dict())
    other.check(Model(), {"validation": dataset()}, {})
    assert len(callback.seen) == 1 and not other._scoring(trainer(tmp_path))


@pytest.mark.parametrize("limit", [0, 1, 5, 0.5])
def test_limits_are_refused(limit):
    options = {"limit_val_batches": limit, "overfit_batches": 0.0}
    with pytest.raises(UserError, match=f"limit_val_batches is {limit}"):
        DisentanglementCallback().check(Model(), {"validation": dataset()}, options)
    DisentanglementCallback(metrics=[]).check(Model(), {"validation": dataset()}, options)


@pytest.mark.parametrize("options", [{}, {"limit_val_batches": None}, {"limit_val_batches": 1.0}])
def test_the_whole_set_is_accepted(options):
    DisentanglementCallback().check(Model(), {"validation": dataset()}, options)


def test_what_could_not_be_scored_is_refused():
    datasets, callback = {"validation": dataset()}, DisentanglementCallback()
    with pytest.raises(UserError, match="no concept encoder"):
        callback.check(nn.Identity(), datasets, {})
    with pytest.raises(UserError, match=r"data\.params\.validation"):
        callback.check(Model(), {}, {})
    with pytest.raises(UserError, match="neither a factor grid nor attributes"):
        callback.check(Model(), {"validation": dataset(None)}, {})
    with pytest.raises(UserError, match="limit_val_batches is 3"):
        callback.check(Model(), datasets, {"overfit_batches": 3})
    model = Model()
    model.use_ema, model.ema_parameters = True, "unet"
    with pytest.raises(UserError, match=r"params\.weights: ema needs EMA weights of the encoder"):
        DisentanglementCallback(weights="ema").check(model, datasets, {})
    with pytest.raises(UserError, match=r"disentanglement\.params: tad needs a table of binary attributes"):
        DisentanglementCallback(metrics=["tad"]).check(Model(), datasets, {})
    for options, message in (
        ({"metrics": ["dcy"]}, "unknown metric 'dcy'"),
        ({"dtype": "fp16"}, "dtype: expected float32, bf16 or auto, got 'fp16'"),
        ({"weights": "averaged"}, "weights: expected live or ema, got 'averaged'"),
        ({"every_n_validations": 0}, "every_n_validations: expected at least 1, got 0"),
        ({"seed": -1}, "seed must be"),
    ):
        with pytest.raises(ValueError, match=message):
            DisentanglementCallback(**options)


def test_scalars_that_cannot_be_scored_end_the_run(callback, tmp_path):
    """Every process raises, so that none waits for the first one's scores."""
    callback.failing = (2,)
    with pytest.raises(UserError, match="the scalars of step 7 cannot be scored: codes hold NaN"):
        validate(callback, Model(), trainer(tmp_path), np.arange(12))
    other = trainer(tmp_path)
    other.is_global_zero, other.strategy = False, SimpleNamespace(broadcast=lambda value: ({}, "refused by the first"))
    with pytest.raises(UserError, match="refused by the first"):
        validate(callback, Model(), other, np.arange(12))
    assert not (tmp_path / "metrics").exists()


def test_tokens_that_cannot_be_scored_cost_their_own_scores_only(callback, tmp_path, caplog):
    callback.score_tokens, callback.failing = True, (3,)
    validate(callback, model := Model(), trainer(tmp_path), np.arange(12))
    assert model.logged == {"val/mig": 0.5} and "the tokens of step 7 cannot be scored: codes hold NaN" in caplog.text
    record = json.loads((tmp_path / "metrics" / "000007.json").read_text())
    assert record["scores"] == {"mig": {"discrete_mig": 0.5}} and "scores_of_tokens" not in record


def test_one_metric_that_fails_costs_no_other_scores(tmp_path, monkeypatch):
    """They are written and logged before the run ends."""

    def fail(*args, **options):
        raise ValueError("too few rows")

    monkeypatch.setitem(METRICS, "sap", fail)
    callback = DisentanglementCallback(metrics=["mig", "sap"], settings={"mig": {"num_train": 12}})
    with pytest.raises(UserError, match="the scalars of step 7 cannot be scored: sap: too few rows"):
        validate(callback, model := Model(), trainer(tmp_path), np.arange(12))
    record = json.loads((tmp_path / "metrics" / "000007.json").read_text())
    assert record["scores"] == {"mig": {"discrete_mig": pytest.approx(model.logged["val/mig"])}}
    assert record["not_computed"] == {"sap": "too few rows"}
    assert (tmp_path / "metrics" / "000007_mig_mutual_information.png").is_file()


class Pictures:
    """Twelve, with a table of two attributes."""

    attribute_names = ("hair", "glasses")
    rows = 12

    def __init__(self, attributes):
        self.attributes = np.array(attributes)

    def __len__(self):
        return 12

    def __getitem__(self, row):
        return {"idx": row % self.rows}


def test_a_rare_value_is_told_before_training(caplog):
    """It cannot be held fixed: metrics that are named are refused, of the usual ones those are left out."""
    attributes = [[k % 3, k % 2] for k in range(12)]
    datasets = {"validation": Pictures(attributes)}
    usual = DisentanglementCallback(metrics=None)
    usual.check(Model(), datasets, {})
    assert usual.metrics == ("beta_vae", "factor_vae", "dci", "mig")
    attributes[5][0] = 3
    datasets = {"validation": Pictures(attributes)}
    with caplog.at_level("INFO"):
        usual = DisentanglementCallback(metrics=None)
        usual.check(Model(), datasets, {})
    assert usual.metrics == ("dci", "mig") and "no beta_vae, factor_vae: value number 3 of factor 'hair'" in caplog.text
    with pytest.raises(UserError, match=r"metrics: factor_vae: value number 3 of factor 'hair' has a single row"):
        DisentanglementCallback(metrics=["mig", "factor_vae"]).check(Model(), datasets, {})


def test_a_grid_of_another_size_is_told_before_training():
    pictures = Pictures([[0, 1]] * 12)
    for grid, rows in ((FactorGrid((3, 5)), 15), (FactorGrid((2, 4)), 8)):
        pictures.grid = grid
        with pytest.raises(UserError, match=rf"validation: Pictures has 12 images, but factors of {rows} rows"):
            DisentanglementCallback().check(Model(), {"validation": pictures}, {})
    pictures.rows = 6  # each twice, as the first release's Cars3D has its images ten times
    pictures.grid = FactorGrid((2, 3))
    DisentanglementCallback().check(Model(), {"validation": pictures}, {})
