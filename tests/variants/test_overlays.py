"""The files of configs/ablations: each builds, trains, scores and resumes; they compose, or say why they do not."""

import json
import re
from pathlib import Path

import pytest
import torch
from command_line import CHECKPOINT, ROOT, encdiff_config
from omegaconf import OmegaConf

import ldm
from ldm.api import encode
from ldm.config import check_config, load_bases, load_yaml, merge
from ldm.data.dis import Shapes3DTrain
from ldm.metrics.evaluate import evaluate
from ldm.models.autoencoder import IdentityFirstStage
from ldm.models.diffusion.schedule import make_beta_schedule
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.concept import Encoder4
from ldm.util import UserError, instantiate_from_config
from ldm.variants.adagn import AdaGNUNet
from ldm.variants.euler import EulerTokens
from ldm.variants.no_diffusion import DecoderUNet, NoDiffusion
from ldm.variants.orthogonal_vectors import OrthogonalVectors
from ldm.variants.sparsity import SparseDiffusion
from ldm.variants.transformer_encoder import TransformerEncoder
from ldm.variants.vector import ChunkTokens

ABLATIONS = ROOT / "configs" / "ablations"
NAMES = sorted(path.stem for path in ABLATIONS.glob("*.yaml"))
DATASETS = ("cars3d", "shapes3d", "mpi3d", "celeba")


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


# What each file does to a model.
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
    "score_tokens": lambda model, config: config.lightning.callbacks.disentanglement.params.score_tokens,
}


@pytest.fixture
def tiny(tmp_path) -> Path:
    """The tiny EncDiff of these tests, without a first stage's checkpoint."""
    config = OmegaConf.create(encdiff_config(tmp_path))
    OmegaConf.update(config, CHECKPOINT, None)
    path = tmp_path / "enc.yaml"
    OmegaConf.save(config, path)
    return path


def combined(base: Path, *names: str):
    """A configuration with overlays, as the command line merges them."""
    return merge(load_bases([base, *(ABLATIONS / f"{name}.yaml" for name in names)]))


def loss_of(config):
    """The model, and its loss of two images, differentiated."""
    torch.manual_seed(0)
    model = instantiate_from_config(config.model, "model")
    size = model.cond_stage_model.image_size
    loss, _ = model.shared_step({"image": torch.rand(2, size, size, 3) * 2 - 1, "idx": torch.arange(2)})
    loss.backward()
    return model, loss


def test_every_file_is_known_here():
    assert set(EFFECTS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_does_what_it_says_and_nothing_without_it_does(tiny, name):
    model, loss = loss_of(combined(tiny, name))
    config = combined(tiny, name)
    assert loss.isfinite() and EFFECTS[name](model, config)
    plain = combined(tiny)
    OmegaConf.update(plain, "lightning.callbacks.disentanglement.params.score_tokens", False, force_add=True)
    if name != "schedule_linear":  # the release's, which the base has
        assert not EFFECTS[name](loss_of(plain)[0], plain)


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_with_every_dataset_and_the_quickstart(name):
    for base in (*(f"latent-diffusion/{dataset}-vq-4-16" for dataset in DATASETS), "quickstart/encdiff"):
        config = combined(ROOT / "configs" / f"{base}.yaml", name)
        if name != "pixel":
            OmegaConf.update(config, CHECKPOINT, "last.ckpt")
        check_config(config)
        assert not {"excludes", "precedes"} & set(config)


def together(base: Path, *names: str):
    """The configuration with these files, or None if they are refused, with a reason."""
    try:
        config = combined(base, *names)
        check_config(config)
    except UserError as error:
        assert re.search(r"do not go together: \w|must come before .*: \w|two variants of \w", str(error)), error
        return None
    return config


@pytest.mark.parametrize("name", NAMES)
def test_no_pair_loses_an_effect_silently(tiny, name):
    """Two files are refused with a reason, or both have their effect; in the other order they mean the same."""
    goes_with = set()
    for other in NAMES:
        if other <= name:
            continue
        orders = [together(tiny, *names) for names in ((name, other), (other, name))]
        allowed = [config for config in orders if config is not None]
        if not allowed:
            continue
        goes_with.add(other)
        assert all(config == allowed[0] for config in allowed), f"{name} and {other} mean something else in each order"
        model, loss = loss_of(allowed[0])
        assert loss.isfinite()
        for effect in (name, other):
            assert EFFECTS[effect](model, allowed[0]), f"{name}, {other}: {effect} is lost"
    assert {"pixel", "score_tokens"} & {other for other in NAMES if other > name} <= goes_with, "go with everything"


@pytest.mark.parametrize(
    "names, reason",
    [
        (("no_diffusion", "adagn"), "cross attention"),
        (("schedule_sqrt", "no_diffusion"), "no noise"),
        (("no_diffusion", "schedule_sqrt"), "no noise"),
        (("orthogonal_euler", "orthogonal_vectors"), "how a scalar becomes a token"),
        (("vector", "orthogonal_vectors"), "makes tokens of scalars"),
        (("sparsity", "no_diffusion"), "loss of the diffusion"),
        (("tokens_5", "tokens_10"), "one number of tokens"),
        (("tokens_5", "paper"), "number of tokens too"),
        (("vector", "transformer_encoder"), "features are to be cut"),
    ],
)
def test_refusals_name_both_files_and_the_reason(tiny, names, reason):
    with pytest.raises(UserError, match=reason) as error:
        combined(tiny, *names)
    for name in names:
        assert f"{name}.yaml" in str(error.value)


def test_five_at_once(tiny):
    model, loss = loss_of(combined(tiny, "paper", "transformer_encoder", "vector", "no_diffusion", "tokens_5"))
    assert loss.isfinite() and model.cond_stage_model.encoding(torch.zeros(1, 3, 16, 16)).shape == (1, 5, 32)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "paper"])  # which has its own test
def test_it_trains_scores_and_resumes(cli, first_stage, name):
    stage = [] if name == "pixel" else [f"{CHECKPOINT}={first_stage}"]
    run = cli.run("--base", cli.enc, ABLATIONS / f"{name}.yaml", "-t", "--gpus", 0, "--max_steps", 2,
                  "--val_check_interval", 2, *stage, score=True)  # fmt: skip
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


def parameters(name: str) -> tuple[int, int]:
    """Numbers of parameters of the U-Net and the encoder at Shapes3D's size."""
    base = ROOT / "configs" / "latent-diffusion" / "shapes3d-vq-4-16.yaml"
    names = [] if name == "" else [name]
    config = merge([*load_bases([base, *(ABLATIONS / f"{n}.yaml" for n in names)])])
    params = config.model.params
    unet = instantiate_from_config(params.unet_config, "model.params.unet_config")
    encoder = instantiate_from_config(params.cond_stage_config, "model.params.cond_stage_config")
    return tuple(sum(p.numel() for p in module.parameters()) for module in (unet, encoder))


def test_the_readmes_numbers_of_parameters():
    """The table in README.md, in millions to two digits."""
    lines = re.findall(
        r"^\| `(\w+)`[^|]*\|[^|]*\| (\d+\.\d\d) \| (\d+\.\d\d) \|$", (ROOT / "README.md").read_text(), re.M
    )
    assert {name for name, _, _ in lines} == set(NAMES) - {"score_tokens"} - {
        n for n in NAMES if n.startswith("schedule")
    }
    for name, *shown in lines:
        assert [f"{count / 1e6:.2f}" for count in parameters(name)] == shown, name


def test_a_variant_takes_over_the_parameters_of_its_class(tiny):
    """The one exception to the rule that another target replaces `params`."""
    config = combined(tiny, "adagn")
    plain = load_yaml(tiny).model.params.unet_config.params
    assert {key: config.model.params.unet_config.params[key] for key in plain} == dict(plain)
    back = merge([config, OmegaConf.create({"model": {"params": {"unet_config": {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": {"image_size": 8}}}}})])  # fmt: skip
    assert back.model.params.unet_config.params == {"image_size": 8}, "from variant to class they are replaced"


def test_a_class_of_ones_own_keeps_what_it_takes(tiny):
    """Derived, with a signature of its own: the rest is replaced, as between any two classes."""
    own = {"target": "test_overlays.OwnUNet", "params": {"width": 4}}
    config = merge([load_yaml(tiny), OmegaConf.create({"model": {"params": {"unet_config": own}}})])
    assert config.model.params.unet_config.params == {"width": 4, "image_size": 8}


class OwnUNet(UNetModel):
    """Somebody's variant."""

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


def test_files_of_other_folders_are_not_meant(tiny, tmp_path):
    """A file of one's own may be called as it likes."""
    (tmp_path / "vector_shapes.yaml").write_text("model: {params: {loss_type: l2}}\n")
    load_bases([tiny, tmp_path / "vector_shapes.yaml", ABLATIONS / "orthogonal_euler.yaml"])


def test_relations_of_a_wrong_form_are_told(tiny, tmp_path):
    (tmp_path / "o.yaml").write_text("excludes: [a]\nmodel: {params: {loss_type: l2}}\n")
    with pytest.raises(UserError, match=r"o\.yaml.*excludes: expected names of files and reasons"):
        load_bases([tiny, tmp_path / "o.yaml"])


def test_a_token_map_of_other_sizes_is_refused(tiny):
    config = combined(tiny, "orthogonal_euler")
    OmegaConf.update(config, "model.params.cond_stage_config.params.tokens_config.params.latent_unit", 7)
    with pytest.raises(UserError, match=r"latent_unit 7 .* the encoder 4"):
        instantiate_from_config(config.model, "model")
