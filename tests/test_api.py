"""`ldm.load`, `ldm.match` and `ldm.score` on a trained run."""

import json
import shutil

import numpy as np
import pytest
import torch

import ldm
from ldm.api import load_config
from ldm.evaluation.codes import encode
from ldm.evaluation.matching import information_of, match_concepts
from ldm.metrics.evaluate import evaluate
from ldm.util import UserError, instantiate_from_config


@pytest.fixture(scope="module")
def model(trained_encdiff):
    return ldm.load(trained_encdiff.logdir)


@pytest.fixture(scope="module")
def dataset(trained_encdiff):
    data = instantiate_from_config(load_config(trained_encdiff.logdir).data, "data")
    data.setup()
    return data.datasets["validation"]


def test_a_scored_run_names_its_concepts(model, dataset, trained_encdiff):
    record = json.loads(sorted((trained_encdiff.logdir / "metrics").glob("*.json"))[-1].read_text())
    expected = match_concepts(np.array(record["information"]), list(record["factors"]))
    assert model.concepts.tokens == expected.tokens and list(expected.tokens) == list(dataset.grid.names)
    codes = encode(model, dataset, progress=False)
    np.testing.assert_allclose(record["information"], information_of(codes, dataset.grid), atol=0.02)
    np.testing.assert_allclose(model.concepts.low, np.percentile(codes, 1, axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.concepts.high, np.percentile(codes, 99, axis=0), rtol=1e-4, atol=1e-5)
    image = torch.as_tensor(dataset[3]["image"]).permute(2, 0, 1)
    np.testing.assert_allclose(model.scalars(image)[0], codes[3], rtol=1e-4, atol=1e-5)
    assert model.traverse(image, dataset.grid.names[0], steps=1).shape == (1, 11, *image.shape)


def test_damaged_scores_cost_the_names_alone(trained_encdiff, tmp_path, caplog):
    logdir = shutil.copytree(trained_encdiff.logdir, tmp_path / "run")
    path = sorted((logdir / "metrics").glob("*.json"))[-1]
    path.write_text("{")
    assert ldm.load(logdir).concepts is None
    path.write_text('{"factors": 3, "information": [[1]]}')
    assert ldm.load(logdir).concepts is None
    assert "are damaged, so concepts have no names" in caplog.text


def test_score(model, dataset, trained_encdiff):
    settings = {"mig": {"num_train": 60}}
    expected = evaluate(encode(model, dataset, progress=False), dataset.grid, ["mig"], settings)
    for given in ((model, dataset), (trained_encdiff.logdir,)):
        assert ldm.score(*given, metrics=["mig"], settings=settings, progress=False) == expected
    with pytest.raises(UserError, match="dataset: is needed"):
        ldm.score(model)


def test_a_first_stage_has_no_scalars(trained, dataset):
    with pytest.raises(UserError, match="first stage, without scalars"):
        ldm.score(ldm.load(trained.logdir), dataset)
    with pytest.raises(UserError, match="first stage, without scalars"):
        ldm.match(ldm.load(trained.logdir), dataset)


def test_match(model, dataset):
    before = model.concepts
    try:
        found = ldm.match(model, dataset, progress=False)
        assert found is model.concepts and list(found.tokens) == list(dataset.grid.names) and len(found.high) > 0
    finally:
        model.concepts = before
