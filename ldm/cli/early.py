"""What can be checked before PyTorch and Lightning are imported, which takes seconds: names, kinds, and files."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.signatures import stand_in
from ldm.targets import refusal
from ldm.util import UserError, check_params, get_obj_from_str

TRAINER = "pytorch_lightning.Trainer"
ABOVE_ZERO = ("check_val_every_n_epoch", "val_check_interval", "accumulate_grad_batches")
FIRST_STAGE = "ldm.models.autoencoder.FirstStage"
NETWORKS = "ldm.modules.diffusionmodules.model.Encoder"  # takes what a first stage's `ddconfig` holds


def constructor(target: str) -> Any:
    """What tells the signature of a class of Lightning's or ours: a stand-in, or the class if its source is not read.

    Raises:
        UserError: there is no such class.
    """
    return stand_in(target) or get_obj_from_str(target)


def check_names(config: Mapping[str, Any], resumed: bool) -> None:
    """Check the arguments of every class that a configuration names, as far as the source of the class shows them.

    What is built later is checked there again, and completely.

    Args:
        config: the sections `model`, `data` and `lightning`, resolved.
        resumed: the weights come from a checkpoint of the run; files that the model's node names may be gone.

    Raises:
        UserError: a target that is not allowed, an unknown key, a value of another kind, or a checkpoint that does not
            exist.
    """
    check_trainer(config["lightning"]["trainer"])
    for where, node in nodes(config):
        if reason := refusal(node["target"]):
            raise UserError(reason, f"{where}.target")
        params, found = node.get("params") or {}, stand_in(node["target"])
        if found is not None:
            check_params(found, params, f"{where}.params")
        if FIRST_STAGE in bases(found) and isinstance(params.get("ddconfig"), dict):
            check_params(constructor(NETWORKS), params["ddconfig"], f"{where}.params.ddconfig")
    stage = config["model"].get("params") or {}
    where = "model.params"
    while isinstance(stage, dict) and not resumed:
        path = stage.get("ckpt_path")
        if isinstance(path, str) and not Path(path).is_file():
            message = f"there is no file '{path}': give the path of a checkpoint (…/checkpoints/last.ckpt)"
            raise UserError(message, f"{where}.ckpt_path")
        stage, where = (stage.get("first_stage_config") or {}).get("params"), f"{where}.first_stage_config.params"


def nodes(config: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """All mappings with a target, and their keys."""
    if isinstance(config.get("target"), str):
        yield where, dict(config)
    for key, value in config.items():
        if isinstance(value, dict):
            yield from nodes(value, f"{where}.{key}".lstrip("."))


def bases(cls: Any) -> set[str]:
    """Dotted names of a class and of the classes it derives from."""
    return {f"{base.__module__}.{base.__name__}" for base in getattr(cls, "__mro__", ())}


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Check the section `lightning.trainer`.

    Raises:
        UserError: an unknown argument, or a value of another kind.
    """
    for name in ("callbacks", "plugins"):
        if trainer.get(name) is not None:
            raise UserError("give callbacks as lightning.callbacks, and leave plugins out", f"lightning.trainer.{name}")
    if not isinstance(trainer.get("logger"), bool | None):
        raise UserError(f"expected true or false, got {trainer['logger']!r}", "lightning.trainer.logger")
    options = {name: value for name, value in trainer.items() if name != "gpus"}
    check_params(constructor(TRAINER), options, "lightning.trainer")
    for name in ABOVE_ZERO:
        if isinstance(options.get(name), int | float) and options[name] <= 0:
            raise UserError(f"expected a number above 0, got {options[name]!r}", f"lightning.trainer.{name}")
    if options.get("gradient_clip_algorithm") not in (None, "norm", "value"):
        found = options["gradient_clip_algorithm"]
        raise UserError(f"expected norm or value, got {found!r}", "lightning.trainer.gradient_clip_algorithm")
    if trainer.get("gpus") is not None:
        device_numbers(trainer["gpus"])


def device_numbers(gpus: str | int | list[int]) -> int | list[int]:
    """LDM's `--gpus`: device numbers with a comma (0, or 0,1), or a count, -1 for all.

    Raises:
        UserError: a value of another form.
    """
    text = ",".join(map(str, gpus)) + "," if isinstance(gpus, list) else str(gpus).strip()
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
        wanted: Any = numbers if "," in text else int(text)
        if min(numbers, default=0) < (0 if wanted is numbers else -1) or len(set(numbers)) < len(numbers):
            raise ValueError
    except ValueError as error:
        raise UserError(
            f"expected device numbers such as 0, or 0,1 (with a comma), a count such as 2, or -1, got '{text}'",
            "--gpus",
        ) from error
    return wanted


def check_writable(folder: Path, key: str) -> None:
    """Refuse a folder that cannot be made or written to; `key` names it in the message."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write to '{parent}' ({error.strerror}): give another folder", key) from error
