"""The files of configs/ablations: each has its effect, they compose, or say why they do not.

All tests but that of known effects read the folder, so that a new file needs no entry here.
"""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from command_line import CHECKPOINT, ROOT
from omegaconf import OmegaConf
from overlays import (
    ABLATIONS,
    BASES,
    NAMES,
    SHAPES3D,
    composed,
    each_file_read_once,
    tiny_encdiff,
    without_checkpoint,
)

import ldm
from ldm.config import load_bases, load_yaml, merge
from ldm.data.dis import Shapes3DTrain
from ldm.evaluation.codes import encode
from ldm.metrics.evaluate import evaluate
from ldm.models.autoencoder import IdentityFirstStage
from ldm.models.diffusion.schedule import make_beta_schedule
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.concept import Encoder4
from ldm.targets import allowing
from ldm.util import UserError, instantiate_from_config
from ldm.variants.adagn import AdaGNUNet
from ldm.variants.euler import EulerTokens
from ldm.variants.no_diffusion import DecoderUNet, NoDiffusion
from ldm.variants.orthogonal_vectors import OrthogonalVectors
from ldm.variants.sparsity import SparseDiffusion
from ldm.variants.transformer_encoder import TransformerEncoder
from ldm.variants.vector import ChunkTokens


def schedule(name: str):
    """Whether a model has this schedule."""

    def holds(model, config) -> bool:
        start, end = config.model.params.linear_start, config.model.params.linear_end
        betas = torch.tensor(make_beta_schedule(name, model.num_timesteps, start, end), dtype=torch.float32)
        return torch.equal(model.betas, betas)

    return holds


def unet(model):
    return model.model.diffusion_model


def tokens(count: int):
    return lambda model, config: unet(model).latent_unit == model.cond_stage_model.latent_unit == count


def token_map(kind: type):
    return lambda model, config: type(model.cond_stage_model.net) is kind


def no_diffusion(model, config) -> bool:
    return isinstance(model, NoDiffusion) and isinstance(unet(model), DecoderUNet) and model.loss_type == "l2"


def adagn(model, config) -> bool:
    return isinstance(unet(model), AdaGNUNet)


# What files do to a model.
EFFECTS = {
    "paper": lambda model, config: (
        (model.ema_parameters, model.loss_type) == ("all", "l2")
        and unet(model).context_dim == model.cond_stage_model.context_dim == 32
        and config.model.params.unet_config.params.dropout == 0.1
        and not isinstance(model.cond_stage_model, Encoder4)
    ),
    "no_diffusion": no_diffusion,
    "adagn": adagn,
    "vector": token_map(ChunkTokens),
    "vector_no_diffusion": lambda model, config: no_diffusion(model, config) and token_map(ChunkTokens)(model, config),
    "vector_adagn": lambda model, config: adagn(model, config) and token_map(ChunkTokens)(model, config),
    **{f"schedule_{name}": schedule(name) for name in ("sqrt", "sqrt_linear", "linear", "cosine")},
    **{f"tokens_{count}": tokens(count) for count in (5, 10, 15, 30)},
    "orthogonal_euler": token_map(EulerTokens),
    "orthogonal_vectors": token_map(OrthogonalVectors),
    "sparsity": lambda model, config: isinstance(model, SparseDiffusion),
    "transformer_encoder": lambda model, config: isinstance(model.cond_stage_model, TransformerEncoder),
    "pixel": lambda model, config: isinstance(model.first_stage_model, IdentityFirstStage),
    "score_tokens": lambda model, config: OmegaConf.select(
        config, "lightning.callbacks.disentanglement.params.score_tokens", default=False
    ),
}


@pytest.fixture
def tiny(tmp_path) -> list[Path]:
    return tiny_encdiff(tmp_path)


def built(config):
    """The model, from seed 0, and its loss of two images, differentiated."""
    torch.manual_seed(0)
    model = instantiate_from_config(config.model, "model")
    size = model.cond_stage_model.image_size
    loss, _ = model.shared_step({"image": torch.rand(2, size, size, 3) * 2 - 1, "idx": torch.arange(2)})
    loss.backward()
    return model, loss


@pytest.mark.parametrize("name", NAMES)
def test_it_builds_and_no_parameter_is_idle(tiny, name):
    config = composed(tiny, name)
    assert config != composed(tiny), "it changes something"
    model, loss = built(config)
    assert loss.isfinite()
    idle = [key for key, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not idle
    if name in EFFECTS:
        assert EFFECTS[name](model, config)


@pytest.mark.parametrize("modulation", ["scale", "embedding"])
def test_other_kinds_of_adagn(tiny, modulation):
    config = composed([*tiny, ROOT / "configs" / "studies" / "adagn" / f"{modulation}.yaml"])
    model, loss = built(config)
    assert loss.isfinite() and adagn(model, config) and unet(model).modulation == modulation
    assert all(parameter.grad is not None for parameter in unet(model).parameters() if parameter.requires_grad)


def test_without_overlays_no_effect_shows(tiny):
    config = composed(tiny)
    model, _ = built(config)
    found = [name for name, effect in EFFECTS.items() if effect(model, config)]
    assert found == ["schedule_linear"], "the release's"


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_with_every_dataset_and_the_quickstart(name, tmp_path):
    for base in BASES:
        config = composed(without_checkpoint(tmp_path, base), name)
        assert set(config) <= {"model", "data", "lightning"}, "relations are not part of the configuration"


def together(bases: list[Path], *names: str):
    """The configuration with these overlays, or None if they are refused, with a reason."""
    try:
        return composed(bases, *names)
    except UserError as error:
        reasons = r"do not go together: \w|must come (before|after) .*: \w|two variants of \w"
        assert re.search(reasons, str(error)), error
        return None


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The base, and its configuration with each overlay alone."""
    base = tiny_encdiff(tmp_path_factory.mktemp("pairs"))
    return base, {name: composed(base, name) for name in NAMES}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_pair_loses_an_effect_silently(name, alone):
    """In every pair both files have their effect, whatever the order; or they are refused, with a reason."""
    base, single = alone
    for other in NAMES[: NAMES.index(name)]:
        with each_file_read_once():
            orders = {order: together(base, *order) for order in ((name, other), (other, name))}
        allowed = {order: config for order, config in orders.items() if config is not None}
        first, *others = allowed.values() if allowed else [None]
        assert all(config == first for config in others), f"{name} and {other} mean different things in each order"
        for earlier, later in allowed:
            # One may contain the other, as vector_adagn contains vector: it is still there.
            kept = first != single[later] or merge([first, load_yaml(ABLATIONS / f"{earlier}.yaml")]) == first
            assert kept, f"{later} undoes {earlier}"


@pytest.mark.parametrize(
    "names, reason",
    [
        (("no_diffusion", "adagn"), "cross attention"),
        (("schedule_sqrt", "no_diffusion"), "no noise"),
        (("vector", "orthogonal_vectors"), "no scalars"),
        (("tokens_5", "tokens_10"), "one number of tokens"),
        (("tokens_5", "paper"), "number of tokens too"),
        (("vector", "transformer_encoder"), "feature vector is cut"),
    ],
)
def test_refusals_name_both_files_and_the_reason(tiny, names, reason):
    with pytest.raises(UserError, match=reason) as error:
        composed(tiny, *names)
    for name in names:
        assert f"{name}.yaml" in str(error.value)


def test_five_at_once(tiny):
    model, loss = built(composed(tiny, "paper", "transformer_encoder", "vector", "no_diffusion", "tokens_5"))
    assert loss.isfinite() and model.cond_stage_model.encoding(torch.zeros(1, 3, 16, 16)).shape == (1, 5, 32)


@pytest.mark.parametrize(
    "relation, order",
    [
        ("excludes", ("own", "other")),
        ("excludes", ("other", "own")),
        ("precedes", ("other", "own")),
        ("follows", ("own", "other")),
    ],
)
def test_a_new_overlay_speaks_for_itself(tmp_path, relation, order):
    """Its relations are stated in its own file, by name or pattern, and hold in its own folder."""
    change = "model: {params: {loss_type: l2}}\n"
    (tmp_path / "other.yaml").write_text(change)
    for pattern in ("other", "oth*"):
        (tmp_path / "own.yaml").write_text(f"{relation}: {{{pattern}: for this reason}}\n" + change)
        paths = [tmp_path / f"{name}.yaml" for name in order]
        with pytest.raises(UserError, match="for this reason") as error:
            load_bases(paths)
        assert all(str(path) in str(error.value) for path in paths)
        if relation != "excludes":
            assert len(load_bases(paths[::-1])) == 2
    (tmp_path / "elsewhere").mkdir()
    other = (tmp_path / "other.yaml").rename(tmp_path / "elsewhere" / "other.yaml")
    paths = [other if name == "other" else tmp_path / "own.yaml" for name in order]
    assert len(load_bases(paths)) == 2
    (tmp_path / "own.yaml").write_text(f"{relation}: [other]\n" + change)
    with pytest.raises(UserError, match=rf"own\.yaml': {relation}: expected .*reason"):
        load_bases(paths)


def groups() -> list[list[str]]:
    """All overlays, in few groups of overlays that go together, each in an order that is allowed."""
    base = OmegaConf.load(SHAPES3D)
    found: list[list[str]] = []

    def fits(names: list[str]) -> bool:
        try:
            merge([base, *load_bases([ABLATIONS / f"{name}.yaml" for name in names])])
        except UserError:
            return False
        return True

    for name in NAMES:
        longer = ([*group[:k], name, *group[k:]] for group in found for k in range(len(group), -1, -1))
        group = next(filter(fits, longer), [name])
        found = [known for known in found if not set(known) < set(group)] + [group]
    return found


with each_file_read_once():
    GROUPS = groups()


def test_every_overlay_is_in_a_group():
    assert sorted(itertools.chain(*GROUPS)) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("names", GROUPS, ids="+".join)
def test_they_train_score_resume_and_draw(cli, first_stage, names):
    stage = [] if "pixel" in names else [f"{CHECKPOINT}={first_stage}"]
    run = cli.run("--base", cli.enc, *(ABLATIONS / f"{name}.yaml" for name in names), "-t", "--gpus", 0,
                  "--max_steps", 2, "--val_check_interval", 2, "data.params.batch_size=16", *stage,
                  score=True)  # fmt: skip
    assert run.status == 0, run.err
    scored = json.loads((run.logdir / "metrics" / "000002.json").read_text())
    assert 0 <= scored["scores"]["factor_vae"]["eval_accuracy"] <= 1
    before = ldm.load(run.logdir)
    resumed = cli.run("-r", run.logdir, "-t", "--max_steps", 4, score=True)
    assert resumed.status == 0, resumed.err
    assert sorted(path.stem for path in (run.logdir / "metrics").glob("*.json")) == ["000002", "000004"]
    after = ldm.load(run.logdir)
    assert type(after) is type(before)
    moved = [k for k, v in after.state_dict().items() if not torch.equal(v, before.state_dict()[k])]
    assert any(k.startswith("model.") for k in moved) and any(k.startswith("cond_stage_model.") for k in moved)
    pictures = after.log_images({"image": torch.zeros(2, 16, 16, 3)}, N=2, ddim_steps=2)
    assert pictures["samples"].shape == (2, 3, 16, 16)


@pytest.mark.slow
def test_tokens_are_scored_beside_the_scalars(cli, rooms, first_stage):
    """Table 11: both in one run, and both are `evaluate`'s scores of what the saved model gives."""
    run = cli.run("--base", cli.enc, ABLATIONS / "score_tokens.yaml", "-t", "--gpus", 0, "--max_steps", 4,
                  "model.params.monitor=val/tokens_mig", f"{CHECKPOINT}={first_stage}", score=True)  # fmt: skip
    assert run.status == 0, run.err
    record = json.loads((run.logdir / "metrics" / "000004.json").read_text())
    model, dataset = ldm.load(run.logdir), Shapes3DTrain(path=str(rooms))
    for kind, wanted in (("scores", False), ("scores_of_tokens", True)):
        codes = encode(model, dataset, progress=False, tokens=wanted)
        expected = evaluate(codes, dataset.grid, record["settings"], record["settings"], record["random_state"])
        for metric, entries in record[kind].items():
            assert entries == pytest.approx(dict(expected[metric]), abs=1e-6)
    assert record["scores"] != record["scores_of_tokens"]
    assert list((run.logdir / "metrics").glob("000004_tokens_*.png")), "heat-maps of both"


@pytest.mark.slow
def test_numbers_of_parameters_in_the_docs(tmp_path):
    """In docs/ablations.md, the rows that state them: U-Net and encoder, in millions, at Shapes3D's size."""
    page = (ROOT / "docs" / "ablations.md").read_text()
    rows = re.findall(r"^\| `?(\w+)`? \|.*\| (\d+\.\d\d) \| (\d+\.\d\d) \|$", page, re.M)
    assert len(rows) > 10
    for name, *shown in rows:
        params = composed(without_checkpoint(tmp_path), *([] if name == "none" else [name])).model.params
        with torch.device("meta"):
            networks = [instantiate_from_config(params[key], key) for key in ("unet_config", "cond_stage_config")]
        counts = [sum(p.numel() for p in network.parameters()) for network in networks]
        assert [f"{count / 1e6:.2f}" for count in counts] == shown, name


def test_examples_in_the_docs(tmp_path, monkeypatch):
    """Every class of docs/ablations.md with the overlay after it, on the quickstart."""
    page = (ROOT / "docs" / "ablations.md").read_text()
    examples = re.findall(r"```python\n(.*?)```.*?```yaml\n(.*?)```", page, re.S)
    assert len(examples) == 2
    monkeypatch.syspath_prepend(tmp_path)
    for code, overlay in examples:
        module, name = re.search(r"target: (\w+)\.(\w+)", overlay).groups()
        (tmp_path / f"{module}.py").write_text(code)
        (tmp_path / f"{module}.yaml").write_text(overlay)
        bases = without_checkpoint(tmp_path, ROOT / "configs" / "quickstart" / "encdiff.yaml")
        config = composed([*bases, tmp_path / f"{module}.yaml"])
        with allowing(module):
            encoder = instantiate_from_config(config.model.params.cond_stage_config, "cond_stage_config", "network")
        assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 20, 16)
        assert name in {type(part).__name__ for part in encoder.modules()}


def test_a_variant_takes_over_the_parameters_of_its_class(tiny):
    """The one exception to the rule that another target replaces `params`."""
    config = composed(tiny, "adagn")
    plain = load_yaml(tiny[0]).model.params.unet_config.params
    assert {key: config.model.params.unet_config.params[key] for key in plain} == dict(plain)
    back = merge([config, OmegaConf.create({"model": {"params": {"unet_config": {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": {"image_size": 8}}}}})])  # fmt: skip
    assert back.model.params.unet_config.params == {"image_size": 8}, "from variant to class they are replaced"


def test_your_own_class_keeps_what_it_takes(tiny):
    """Derived, with a signature of its own: the rest is replaced, as between any two classes."""
    own = {"target": "test_overlays.OwnUNet", "params": {"width": 4}}
    config = merge([load_yaml(tiny[0]), OmegaConf.create({"model": {"params": {"unet_config": own}}})])
    assert config.model.params.unet_config.params == {"width": 4, "image_size": 8}


class OwnUNet(UNetModel):
    """A user's variant."""

    def __init__(self, width: int, image_size: int) -> None:
        raise AssertionError("never built")


def test_other_classes_of_ours_are_completed_by_later_files():
    """Only the paper's variants refuse each other: here the parameters come in a third file."""
    for old, new in (
        ("ldm.data.dis.Shapes3DTrain", "ldm.data.dis.ImageFolder"),
        ("ldm.models.autoencoder.VQModel", "ldm.models.autoencoder.AutoencoderKL"),
        ("ldm.modules.encoders.concept.Encoder4", "ldm.variants.transformer_encoder.TransformerEncoder"),
    ):
        nodes = [{"x": {"target": old, "params": {"a": 1}}}, {"x": {"target": new}}, {"x": {"params": {"b": 2}}}]
        assert merge([OmegaConf.create(node) for node in nodes]).x == {"target": new, "params": {"b": 2}}


def test_a_token_map_of_other_sizes_is_refused(tiny):
    config = composed(tiny, "orthogonal_euler")
    OmegaConf.update(config, "model.params.cond_stage_config.params.tokens_config.params.latent_unit", 7)
    with pytest.raises(UserError, match=r"latent_unit 7 .* the encoder's, 4"):
        instantiate_from_config(config.model, "model")
