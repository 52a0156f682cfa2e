"""Write a trained model into a folder that can be shared: weights, configuration, model card, figures.

    python scripts/export.py logs/<run> my-model
    python -c "import ldm; model = ldm.load('my-model')"

The folder holds `model.safetensors`, `model.yaml`, `concepts.json` (which concept stands for which factor, and how far
each scalar goes, where the run knows it), `README.md`, a model card as the Hugging Face Hub shows it, and the run's
figures. No paths and no names of your machine are among it. To upload it:

    hf upload user/name my-model
    python -c "import ldm; model = ldm.load('hf://user/name')"
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import yaml
from convert_checkpoint import write, write_safetensors
from omegaconf import OmegaConf
from pytorch_lightning import LightningModule

import ldm
from ldm.api import load_config, model_node
from ldm.cli.configure import logdir_of
from ldm.data.images import evenly_spaced
from ldm.evaluation.matching import match, ranges_of
from ldm.evaluation.runs import figures_of, newest_config, read_json, record_at
from ldm.factors import FactorGrid, FactorTable, factors_of
from ldm.hub import CONCEPTS, CONFIG, WEIGHTS, concepts_text, located
from ldm.metrics.evaluate import main_entry
from ldm.models.diffusion.concepts import Concepts
from ldm.signals import as_command
from ldm.signatures import parameters_of
from ldm.targets import allowing
from ldm.util import UserError, instantiate_from_config

CARD = "README.md"
ROWS = 5000  # images of the run's data on which concepts are matched, at most
# Of a data set's arguments, those that say where it is on this machine.
PLACES = ("path", "table")
TRAINING = ("scheduler_config", "optimizer_config", "monitor", "ema_decay", "ema_parameters", "cache_latents")
AVERAGES = ("model_ema.", "cond_stage_model_ema.")


def export(
    source: Path, folder: Path, weights: str = "live", allow: tuple[str, ...] = (), force: bool = False
) -> list[str]:
    """Export a model; returns lines that report what was done.

    Raises:
        UserError: no such run, an exported model, damaged files, no EMA weights, a folder that is not empty, or an
            export that would not be loaded as the same model.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file: give a folder")
    if folder.exists() and any(folder.iterdir()) and not force:
        raise UserError(f"'{folder}' is not empty: give another folder, or --force to write over an earlier export")
    config = load_config(source)
    if located(source).suffix == ".safetensors" and "data" not in config:
        raise UserError(f"'{source}' is an exported model already: copy its folder, whose card tells more")
    model = ldm.load(source, weights=weights, allow=allow)
    node = plain_node(model_node(config, source), model)
    state = {name: value.contiguous().clone() for name, value in model.state_dict().items()
             if not name.startswith((*AVERAGES, "loss."))}  # fmt: skip
    about = {"format": "pt", "weights": weights, **{k: str(v) for k, v in steps_of(source).items()}}
    logdir = logdir_of(source)
    scored = scores_of(logdir, weights, about.get("global_step"))
    pictures = [path for paths in figures_of(logdir).values() for path in paths]
    unknown = "" if not hasattr(model, "scalars") else add_concepts(model, config, allow)
    concepts = getattr(model, "concepts", None)
    card = model_card(folder.resolve().name, model, config, weights, about, scored, pictures, run_of(logdir))
    files: dict[Path, Callable[[Path], Any]] = {
        folder / WEIGHTS: lambda path: write_safetensors(path, state, about),
        folder / CONFIG: lambda path: OmegaConf.save(OmegaConf.create({"model": node}), path),
        folder / CARD: lambda path: path.write_text(card, encoding="utf-8"),
    }
    if concepts is not None:
        files[folder / CONCEPTS] = lambda path: path.write_text(concepts_text(concepts), encoding="utf-8")
    for picture in pictures:
        files[folder / "figures" / picture.name] = partial(copied, picture)
    earlier = exported(folder)
    write(files)
    for path in earlier - set(files):
        path.unlink(missing_ok=True)
    compare(model, ldm.load(folder, allow=allow))
    size = (folder / WEIGHTS).stat().st_size
    return [
        f"{folder}: {len(state)} weights ({weights}, {size / 1e6:.1f} MB), {len(pictures)} figures",
        "loaded it back: the same, bit by bit",
        *([] if scored else [f"the card has no scores: those of the {weights} weights are not in the run's metrics/"]),
        *([unknown] if unknown else []),
        f"say in {CARD} under which license you share it",
    ]


def add_concepts(model: Any, config: Any, allow: tuple[str, ...]) -> str:
    """Let the model know what its concepts stand for, and how far its scalars go over its data, unless it does.

    Who loads the export may not have the data, and can neither name concepts nor go along a scalar without this.

    Returns:
        Why it stays unknown; "" otherwise.
    """
    known = model.concepts or Concepts()
    if known.low and known.tokens:
        return ""
    try:
        with allowing(allow):
            data = instantiate_from_config(config.data, "data", "data module")
            data.setup()
        dataset = data.datasets.get("validation") or data.datasets["train"]
        rows = evenly_spaced(len(dataset), ROWS)
        codes = model.scalars(dataset.fetch(rows)["image"].numpy()).numpy()
    except (UserError, OSError, AttributeError, KeyError) as error:
        told = "how far each scalar goes is" if known.tokens else "names and ranges of the concepts are"
        return f"{told} not in {CONCEPTS}, as the run's data cannot be read: {error}"
    low, high = (known.low, known.high) if known.low else ranges_of(codes)
    model.concepts = dataclasses.replace(known, low=low, high=high)
    factors = factors_of(dataset)
    if known.tokens or factors is None:
        return ""
    try:
        values = factors.factors(rows) if isinstance(factors, FactorGrid) else factors.values[rows]
        match(model, codes, FactorTable(values, factors.names))
    except ValueError as error:  # such as an attribute of a single value
        return f"the concepts have no names: {error}"
    return ""


def exported(folder: Path) -> set[Path]:
    """Files of an earlier export that this one may not have: concepts, and the figures that its card shows."""
    card = folder / CARD
    text = card.read_text("utf-8", "replace") if card.is_file() else ""
    shown = re.findall(r"\]\(figures/(\w+\.(?:png|gif))\)", text)
    return {folder / CONCEPTS, *(folder / "figures" / name for name in shown)}


def copied(source: Path, path: Path) -> None:
    """Copy a file's content."""
    path.write_bytes(source.read_bytes())


def plain_node(node: dict[str, Any], model: LightningModule) -> dict[str, Any]:
    """The node `model` without what only training needs: averages of weights, schedules, monitors."""
    params = {key: value for key, value in node["params"].items() if key not in TRAINING}
    if "use_ema" in parameters_of(type(model))[0]:
        params["use_ema"] = False
    return {"target": node["target"], "params": params}


@torch.no_grad()
def compare(model: Any, again: Any) -> None:
    """Compare what two models compute of the same images, bit by bit.

    Raises:
        UserError: it differs.
    """
    generator = torch.Generator().manual_seed(0)
    if hasattr(model, "scalars"):
        encoder: Any = model.cond_stage_model
        size = (4, encoder.num_channels, encoder.image_size, encoder.image_size)
        images = torch.rand(size, generator=generator) * 2 - 1
        pairs = [(getattr(model, what)(images), getattr(again, what)(images)) for what in ("scalars", "tokens")]
        pairs.append((model.reconstruct(images[:1], steps=1), again.reconstruct(images[:1], steps=1)))
    else:
        images = torch.rand((2, model.encoder.conv_in.in_channels, 64, 64), generator=generator) * 2 - 1
        pairs = [(model(images)[0], again(images)[0])]
    if not all(torch.equal(one, other) for one, other in pairs):
        raise UserError("the export, loaded back, computes other numbers than the model: do not share it")


# ---- the model card


def steps_of(source: Path) -> dict[str, Any]:
    """Step and epoch of the checkpoint that is exported, as far as it tells them."""
    from ldm.compat.checkpoints import read_checkpoint

    file = source / "checkpoints" / "last.ckpt" if source.is_dir() else source
    if file.suffix != ".ckpt" or not file.is_file():
        return {}
    content, _ = read_checkpoint(file)
    return {key: content[key] for key in ("global_step", "epoch") if key in content}


def scores_of(logdir: Path, weights: str, step: str | None = None) -> dict[str, Any]:
    """The scores of these weights at a step, or the latest before it; empty without any.

    Raises:
        UserError: they are damaged.
    """
    record = record_at(logdir, None if step is None else int(step), strict=True)
    if record.get("weights") == weights:
        return record
    return {**record, "scores": record["scores_of_ema"]} if weights == "ema" and "scores_of_ema" in record else {}


def run_of(logdir: Path) -> dict[str, Any]:
    """The record of the run's latest start."""
    config = newest_config(logdir, "project")
    return {} if config is None else read_json(config.with_name(config.name.replace("-project.yaml", "-run.json")))


def model_card(
    name: str,
    model: Any,
    config: Any,
    weights: str,
    about: Mapping[str, str],
    scored: Mapping[str, Any],
    pictures: list[Path],
    run: Mapping[str, Any],
) -> str:
    """The text of the card: a header for the hub, and sections for people."""
    header = {"library_name": "encdiff", "tags": ["encdiff", "disentanglement", "representation-learning", "diffusion"]}
    lines = ["---", yaml.safe_dump(header, sort_keys=False).strip(), "# license: the one that you choose", "---", ""]
    lines += [f"# {name}", "", *what_it_is(model), "", "## Load it", "", *how_to_load(name, model), ""]
    lines += ["## Trained on", "", *trained_on(config, weights, about), ""]
    if scored:
        lines += ["## Scores", "", *score_lines(scored), ""]
    if getattr(model, "concepts", None) is not None and model.concepts.tokens:
        lines += ["## Concepts", "", *concept_lines(model.concepts), ""]
    if pictures:
        lines += ["## Figures", "", figure_words(model, weights), ""]
    for picture in pictures:
        title = picture.stem.replace("_", " ").capitalize() + (", moving" if picture.suffix == ".gif" else "")
        lines += [f"*{title}*", "", f"![{title}](figures/{picture.name})", ""]
    made = made_with(run)
    return "\n".join([*lines, *(["## Made with", "", *made, ""] if made else [])])


def figure_words(model: Any, weights: str) -> str:
    """Of which weights the figures are."""
    told = "The line at the bottom of a figure says of which weights it is"
    if weights == "live" and getattr(model, "use_ema", False):
        return f"{told}: unless it says live, of averages (EMA), which this folder does not hold."
    return f"{told}."


def what_it_is(model: Any) -> list[str]:
    """One paragraph."""
    count = sum(parameter.numel() for name, parameter in model.named_parameters() if "_ema." not in name) / 1e6
    if not hasattr(model, "scalars"):
        return [f"A first stage (`{type(model).__name__}`) of EncDiff: {count:.1f} million parameters."]
    encoder = model.cond_stage_model
    return [
        "EncDiff ([arXiv 2402.09712](https://arxiv.org/abs/2402.09712)): an image becomes scalars, each scalar becomes"
        " a concept token, and the tokens steer a latent diffusion U-Net by cross attention.",
        "",
        f"Images of {encoder.image_size}×{encoder.image_size} pixels, {encoder.latent_unit} concepts, tokens of"
        f" {encoder.context_dim} numbers, {count:.1f} million parameters.",
    ]


def how_to_load(name: str, model: Any) -> list[str]:
    """One line, and what to do with it."""
    lines = ["```python", "import ldm", "", f'model = ldm.load("{name}")  # this folder, or "hf://user/name"']
    if hasattr(model, "scalars"):
        lines += ["scalars = model.scalars(images)  # PIL images, arrays or tensors",
                  "swapped = model.swap(a, b, concepts=[0])"]  # fmt: skip
    return [*lines, "```"]


def trained_on(config: Any, weights: str, about: Mapping[str, str]) -> list[str]:
    """Data, steps, batch size."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    data = plain.get("data", {}).get("params", {})
    train = data.get("train") or {}
    params = {
        key: value for key, value in (train.get("params") or {}).items() if key not in PLACES and value is not None
    }
    told = f" ({', '.join(f'{key}: {value}' for key, value in params.items())})" if params else ""
    lines = [f"- data: `{train.get('target', 'not known').rpartition('.')[2]}`{told}"]
    lines += [f"- steps: {about['global_step']}"] if "global_step" in about else []
    lines += [f"- images per batch and process: {data['batch_size']}"] if "batch_size" in data else []
    return [*lines, f"- weights: {'averages (EMA)' if weights == 'ema' else 'the live ones'}"]


def score_lines(scored: Mapping[str, Any]) -> list[str]:
    """A table of the entries that papers report."""
    lines = [f"Of the scalars, at step {scored['step']}; factors: {', '.join(map(str, scored['factors']))}.", "",
             "| metric | entry | score |", "|---|---|---|"]  # fmt: skip
    for metric, entries in scored["scores"].items():
        entry = main_entry(metric, entries)
        if entry is not None:
            score = "not finite" if entries[entry] is None else f"{entries[entry]:.3f}"
            lines.append(f"| {metric} | {entry} | {score} |")
    return lines


def concept_lines(concepts: Any) -> list[str]:
    """A table of factors and their concepts."""
    rows = [f"| {name} | {', '.join(map(str, numbers))} | {concepts.share[name]:.0%} |"
            for name, numbers in concepts.tokens.items()]  # fmt: skip
    return ["| factor | concepts, the strongest first | part of its importance |", "|---|---|---|", *rows]


def made_with(run: Mapping[str, Any]) -> list[str]:
    """Commit and versions."""
    commit = run.get("commit") or {}
    changed = " (with changes)" if commit.get("changed") else ""
    lines = [f"- commit {commit['hash']}{changed}"] if commit.get("hash") else []
    return lines + [f"- {package} {version}" for package, version in (run.get("versions") or {}).items()]


def main(argv: list[str] | None = None) -> int:
    """Parse and export; gives the exit status: 0, or 2 after a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a log directory, or a checkpoint in one")
    parser.add_argument("folder", type=Path, help="to write; its name is the model's name on the card")
    parser.add_argument("--weights", choices=("live", "ema"), default="live", help="which to share (default: live)")
    parser.add_argument("--allow", action="append", default=[], metavar="MODULE", help="whose classes it may name too")
    parser.add_argument("--force", action="store_true", help="write over what the folder holds")
    options = parser.parse_args(argv)
    try:
        print("\n".join(export(options.source, options.folder, options.weights, tuple(options.allow), options.force)))
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(as_command(main))
