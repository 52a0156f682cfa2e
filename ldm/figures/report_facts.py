"""What was trained on what, in words and numbers, for the head of a report."""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.bars import duration
from ldm.evaluation.runs import as_dict


def facts_of(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and text, of all that is known.

    Args:
        run: of `report_data.gather`.
    """
    config, starts = run["config"], run["starts"]
    first, latest = (starts[0], starts[-1]) if starts else ({}, {})
    rows = [
        ("Model", model_words(config, latest)),
        ("Variant", ", ".join(variant_words(config, run["overlays"]))),
        ("First stage", first_stage_words(config)),
        ("Data", data_words(config, latest, run["records"])),
        ("Factors", factor_words(latest, run["records"])),
        ("Trained", trained_words(run)),
        ("Time", time_words(run)),
        ("Machine", machine_words(latest)),
        ("Seed", str(latest.get("seed", ""))),
        ("Started", str(first.get("started", "")).replace("T", " ").replace("Z", " UTC")),
    ]
    return [(label, text) for label, text in rows if text]


def compared(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Facts of several runs: `common` ones, labels of `differing` ones, and of `each` of these texts by run."""
    each = [dict(run["facts"]) for run in runs]
    labels = dict.fromkeys(label for facts in each for label in facts)
    common = [label for label in labels if all(facts.get(label) == each[0].get(label) for facts in each)]
    differing = [label for label in labels if label not in common]
    texts = [{run["title"]: facts.get(label, "") for run, facts in zip(runs, each, strict=True)} for label in differing]
    return {"common": [(label, each[0][label]) for label in common], "differing": differing, "each": texts}


def chosen(config: DictConfig, key: str) -> Any:
    """A value of the configuration; None where it is not there, or cannot be resolved."""
    try:
        return OmegaConf.select(config, key)
    except Exception:  # an interpolation of a damaged file
        return None


def class_of(config: DictConfig, key: str) -> str:
    """The name of the class of a node, without its modules."""
    target = chosen(config, f"{key}.target")
    return target.rpartition(".")[2] if isinstance(target, str) else ""


def stage_of(config: DictConfig) -> str:
    """Which of the two models a run trains."""
    if chosen(config, "model.params.cond_stage_config") is not None:
        return "EncDiff"
    if chosen(config, "model.params.first_stage_config") is not None:
        return "latent diffusion"
    return "first stage" if chosen(config, "model") is not None else ""


def model_words(config: DictConfig, start: Mapping[str, Any]) -> str:
    """`EncDiff (LatentDiffusion), 20 concepts, tokens of 16 numbers, 1,234,567 parameters`."""
    name, stage = class_of(config, "model"), stage_of(config)
    parts = [f"{stage} ({name})" if stage and name else stage or name]
    encoder = "model.params.cond_stage_config.params"
    count, width = chosen(config, f"{encoder}.latent_unit"), chosen(config, f"{encoder}.context_dim")
    parts += [f"{count} concepts"] if isinstance(count, int) else []
    parts += [f"tokens of {width} numbers"] if isinstance(width, int) else []
    codes = chosen(config, "model.params.n_embed")
    parts += [f"codebook of {codes:,}"] if isinstance(codes, int) else []
    schedule = chosen(config, "model.params.beta_schedule")
    parts += [f"{schedule} noise schedule"] if isinstance(schedule, str) else []
    parameters = start.get("parameters")
    parts += [f"{parameters:,} parameters"] if isinstance(parameters, int) else []
    return ", ".join(part for part in parts if part)


def variant_words(config: DictConfig, overlays: list[str]) -> list[str]:
    """Overlays that the command named, and classes of the variants."""
    classes = set()

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            target = node.get("target")
            if isinstance(target, str) and target.startswith("ldm.variants."):
                classes.add(target.rpartition(".")[2])
            for value in node.values():
                visit(value)

    visit(OmegaConf.to_container(config, resolve=False))
    return [*overlays, *sorted(classes)]


def first_stage_words(config: DictConfig) -> str:
    """Class and weights of EncDiff's first stage."""
    name = class_of(config, "model.params.first_stage_config")
    weights = chosen(config, "model.params.first_stage_config.params.ckpt_path")
    return f"{name}, {weights}" if name and isinstance(weights, str) else name


def data_words(config: DictConfig, start: Mapping[str, Any], records: list[dict[str, Any]]) -> str:
    """`RenderedTrain, 4,096 images of 32 × 32; validated on 4,096`."""
    data = as_dict(start.get("data"))
    train, validation = as_dict(data.get("train")), as_dict(data.get("validation"))
    name = class_of(config, "data.params.train") or str(train.get("class", ""))
    images = train.get("images")
    if not isinstance(images, int) and records and records[-1].get("kind") == "grid":
        images = 1
        for size in records[-1]["factors"].values():
            images *= size
    size = chosen(config, "data.params.train.params.image_size") or chosen(
        config, "model.params.cond_stage_config.params.image_size"
    )
    pixels = f" of {size} × {size}" if isinstance(size, int) else ""
    words = [name, f"{images:,} images{pixels}" if isinstance(images, int) else f"images{pixels}" if pixels else ""]
    other = validation.get("images")
    words += [f"validated on {other:,}"] if isinstance(other, int) and other != images else []
    return ", ".join(word for word in words if word)


def factor_words(start: Mapping[str, Any], records: list[dict[str, Any]]) -> str:
    """`floor hue 4 × wall hue 4 × …`."""
    data = as_dict(start.get("data"))
    split = as_dict(data.get("validation")) or as_dict(data.get("train"))
    factors = as_dict(split.get("factors"))
    if not factors and records:
        factors = records[-1]["factors"]
    attributes = split.get("attributes")
    if not factors and isinstance(attributes, list):
        return f"{len(attributes)} attributes: {', '.join(map(str, attributes))}"
    grid = not records or records[-1].get("kind", "grid") == "grid"
    return (" × " if grid else ", ").join(f"{name} {size}" for name, size in factors.items())


def trained_words(run: Mapping[str, Any]) -> str:
    """`4,000 of 4,000 steps, 256,000 images seen`."""
    most = chosen(run["config"], "lightning.trainer.max_steps")
    of = f" of {most:,}" if isinstance(most, int) and most > 0 else ""
    words = f"{run['steps']:,}{of} step{'s' if run['steps'] != 1 or of else ''}" if run["steps"] else ""
    if words and run["images"]:
        each = run["images"] // run["steps"]
        words += f" of {each:,} image{'s' if each != 1 else ''}: {run['images']:,} seen"
    return words


def time_words(run: Mapping[str, Any]) -> str:
    """`14 min in 2 starts, from command to end, 310 images/s in training`."""
    words = [duration(run["seconds"])] if run["seconds"] else []
    if words and len(run["starts"]) > 1:
        words[0] += f" in {len(run['starts'])} starts"
    words += ["from command to end"] if words else []
    return ", ".join([*words, *([f"{speed_words(run['speed'])} in training"] if run["speed"] else [])])


def speed_words(speed: float) -> str:
    """Images per second."""
    return f"{speed:,.0f} images/s" if speed >= 10 else f"{speed:.3g} images/s"


def machine_words(start: Mapping[str, Any]) -> str:
    """Processor or GPUs, and the number of processes."""
    cpu, gpus = as_dict(start.get("cpu")), start.get("gpus")
    cores = f", {cpu['cores']} cores" if isinstance(cpu.get("cores"), int) else ""
    names = ", ".join(map(str, gpus)) if isinstance(gpus, list) else ""
    words = [names or (f"{cpu['model']}{cores}" if cpu.get("model") else "")]
    processes = start.get("processes")
    words += [f"{processes} processes"] if isinstance(processes, int) and processes > 1 else []
    return ", ".join(word for word in words if word)


def record_rows(start: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and text of what the record of a start says: when, what, from where, by which versions, on what."""
    end, commit = as_dict(start.get("end")), as_dict(start.get("commit"))
    changed = " with changes that are not committed" if commit.get("changed") else ""
    ended = [end.get("at"), end.get("how"), f"step {end['steps']:,}" if isinstance(end.get("steps"), int) else None]
    host, machine = start.get("host"), machine_words(start)
    rows = [
        ("Started", start.get("started")),
        ("Ended", ", ".join(str(part) for part in ended if part)),
        ("Command", start.get("command")),
        ("Resumed from", start.get("checkpoint")),
        ("Commit", f"{commit['hash']}{changed}" if commit.get("hash") else ""),
        ("Versions", ", ".join(f"{name} {version}" for name, version in as_dict(start.get("versions")).items())),
        ("Machine", f"{host}: {machine}" if host and machine else machine),
    ]
    return [(label, str(text)) for label, text in rows if text]
