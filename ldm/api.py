"""Trained models from Python: `ldm.load`, `ldm.match`, `ldm.score`. What a model does is in `ConceptMethods`."""

import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.cli.configure import logdir_of, without_checkpoints
from ldm.compat.translate import translate
from ldm.compat.whole import BROKEN, reason_of, training_step
from ldm.config import load_yaml
from ldm.evaluation.codes import encode, why_not_encoded, why_not_scored
from ldm.evaluation.matching import concepts_of_record
from ldm.evaluation.matching import match as match_codes
from ldm.evaluation.runs import newest_config, record_at
from ldm.evaluation.scores import score_codes
from ldm.factors import factors_of
from ldm.hub import located, read_concepts
from ldm.metrics.sampling import Scores
from ldm.models.checkpoint import load_weights
from ldm.models.diffusion.concepts import ConceptMethods, Concepts
from ldm.targets import allowing
from ldm.util import UserError, instantiate_from_config

log = logging.getLogger(__name__)


def load_config(path: str | Path) -> DictConfig:
    """The configuration of a run.

    Args:
        path: log directory, checkpoint in one, folder or address of an exported model (see `load`), or safetensors
            file with its configuration beside it (`model.yaml` beside `model.safetensors`).

    Raises:
        UserError: no such path, or no configuration there.
    """
    path = located(path)
    if path.suffix == ".safetensors" and path.is_file():
        if not path.with_suffix(".yaml").is_file():
            raise UserError(f"there is no configuration '{path.with_suffix('.yaml')}' beside '{path}'")
        return translate(load_yaml(path.with_suffix(".yaml"), "load"))
    if not path.exists():
        raise UserError(f"there is no log directory or checkpoint '{path}'")
    logdir = logdir_of(path)
    file = newest_config(logdir, "project")
    if file is None:
        raise UserError(f"'{logdir / 'configs'}' holds no *-project.yaml: give a log directory, or a checkpoint in one")
    return translate(load_yaml(file, "load"))


def model_node(config: DictConfig, path: str | Path) -> dict[str, Any]:
    """The node `model` of a configuration, without the files that its weights came from, and without its loss.

    Raises:
        UserError: there is none, or it cannot be resolved; names the path that it was read from.
    """
    try:
        node: Any = OmegaConf.to_container(config, resolve=True)["model"]  # type: ignore[index,call-overload]
    except (OmegaConfBaseException, KeyError) as error:
        raise UserError(f"the configuration of '{path}' is damaged: {' '.join(str(error).split())}", "model") from error
    params = node.get("params", {}) if isinstance(node, dict) else None
    if not isinstance(params, dict):
        raise UserError(f"the configuration of '{path}' is damaged: expected the keys target and params", "model")
    node = without_checkpoints(node)
    if "lossconfig" in node["params"]:  # using a model needs no loss
        node["params"]["lossconfig"] = {"target": "torch.nn.Identity"}
    return node


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    weights: str = "live",
    allow: str | Iterable[str] = (),
) -> Any:
    """A trained model, in evaluation mode. Nothing that lies in its folder is run.

    Args:
        path: log directory (its `checkpoints/last.ckpt` is taken), checkpoint in one, safetensors file with its
            configuration beside it, a folder that `scripts/export.py` wrote, or one on the Hugging Face Hub,
            `hf://user/name` or `hf://user/name@revision`.
        device: to put the model on.
        weights: `live`, or `ema` for the EMA weights in their place.
        allow: modules whose classes its configuration may name too; of the working directory's, only these.

    Returns:
        `VQModel`, `AutoencoderKL` or `LatentDiffusion`; the latter with its first stage.

    Raises:
        UserError: no configuration or checkpoint there, damaged ones, a class that is not allowed, a checkpoint of
            another model, no EMA weights in it, or a device that cannot be used.
    """
    if weights not in ("live", "ema"):
        raise UserError(f"'{weights}' is neither live nor ema", "weights")
    try:
        device = torch.device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"'{device}' cannot be used: {reason_of(error)}", "device") from error
    path = located(path)
    with allowing(allow):
        model: Any = instantiate_from_config(model_node(load_config(path), path), "model", "Lightning module")
    checkpoint = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    absent = load_weights(model, checkpoint)
    if weights == "ema":
        if not getattr(model, "use_ema", False) or any(prefix.endswith("_ema.") for prefix in absent):
            raise UserError(
                f"'{path}' has no EMA weights: it was trained with use_ema: false, or exported without them"
            )
        model.model_ema.copy_to(model.model if hasattr(model, "model") else model)
        if getattr(model, "ema_parameters", "") == "all":
            model.cond_stage_model_ema.copy_to(model.cond_stage_model)
    if isinstance(model, ConceptMethods):
        encoder: Any = model
        model.concepts = known_concepts(path, weights, encoder.cond_stage_model)
    return model.to(device).eval()


def known_concepts(path: Path, weights: str, encoder: Any = None) -> Concepts | None:
    """What an exported folder, or the latest scores of a run, say of a model's concepts; None where they say nothing.

    Raises:
        UserError: an exported folder names concepts that its encoder does not have.
    """
    if path.suffix == ".safetensors" and (fields := read_concepts(path.parent)) is not None:
        count = getattr(encoder, "latent_unit", 0)
        named = [number for numbers in fields["tokens"].values() for number in numbers]
        if len(fields["low"]) not in (0, count) or any(number >= count for number in named):
            raise UserError(f"'{path.parent}' names other concepts than its model's {count}: export it again")
        return Concepts(**fields)
    step = None
    if path.suffix == ".ckpt":
        with suppress(*BROKEN):  # a format without it
            step = training_step(path)
    try:
        return concepts_of_record(record_at(logdir_of(path), step), weights)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("the scores of '%s' are damaged, so concepts have no names: %s", logdir_of(path), error)
        return None


def _set_of(model: Any, dataset: Any, path: Path | None = None) -> Any:
    """The data set given, or the validation set of a run."""
    if dataset is not None:
        return dataset
    if path is None:
        raise UserError("is needed with a model; with the path of a run, its validation set is taken", "dataset")
    config = load_config(path)
    if "data" not in config:
        raise UserError(f"the configuration of '{path}' has no data: give dataset=", "dataset")
    data = instantiate_from_config(config.data, "data", "data module")
    data.setup()
    found = data.datasets.get("validation") or data.datasets.get("train")
    if found is None:
        raise UserError(f"the configuration of '{path}' has no validation set: give dataset=", "dataset")
    return found


def match(model: Any, dataset: Any, progress: bool = True) -> Concepts:
    """Find which concepts of a model stand for which factor of a data set, and how far the scalars go.

    Afterwards `model.swap`, `model.traverse` and the like take factors' names for concepts. Without factors, the
    ranges alone are found.

    Args:
        model: a `LatentDiffusion`; gets the attribute `concepts`.
        dataset: of `ldm.data`.
        progress: show a bar.

    Raises:
        UserError: no concept encoder.
    """
    if reason := why_not_encoded(model):
        raise UserError(reason)
    return match_codes(model, encode(model, dataset, progress=progress), factors_of(dataset))


def score(
    model: Any,
    dataset: Any = None,
    metrics: Iterable[str] | None = None,
    settings: Mapping[str, Mapping[str, Any] | None] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Scores]:
    """Scores of a model's scalars on a data set.

    Args:
        model: a `LatentDiffusion`, or what `load` takes.
        dataset: of `ldm.data`, with factors; by default, with a path, the run's validation set.
        metrics: names; all that are defined for the factors if left out.
        settings, seed: see `ldm.metrics.evaluate.evaluate`.
        progress: show bars.

    Returns:
        By metric, its entries; one that cannot be computed for these codes is left out, with a warning.

    Raises:
        UserError: no such run, no concept encoder, no factors, a single one, or unknown metrics or settings.
    """
    path = located(model) if isinstance(model, str | Path) else None
    if path is not None:
        model = load(path)
    dataset = _set_of(model, dataset, path)
    if reason := why_not_scored(model, dataset):
        raise UserError(reason)
    factors = factors_of(dataset)
    assert factors is not None
    codes = encode(model, dataset, progress=progress)
    try:
        found = score_codes(codes, factors, metrics, settings, seed, progress=progress)
    except ValueError as error:
        raise UserError(str(error)) from error
    for metric, why in found.not_computed.items():
        log.warning("not computed: %s: %s", metric, why)
    return found.scores
