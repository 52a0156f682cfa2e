"""From `lightning.trainer` and `--gpus` to the arguments of Lightning's Trainer."""

import logging
from typing import Any, get_args, get_type_hints

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from ldm.util import UserError, check_keys, plain, used

log = logging.getLogger(__name__)

# Switches of Lightning 1 and what they are called since.
RENAMED_SWITCHES = {
    "checkpoint_callback": "enable_checkpointing",
    "progress_bar_refresh_rate": "enable_progress_bar",
    "weights_summary": "enable_model_summary",
}
WAYS = ("ddp", "ddp_spawn", "ddp_cpu")


def devices(gpus: str | int | list[int] | None, trainer: dict[str, Any]) -> dict[str, Any]:
    """Lightning's `accelerator` and `devices` for LDM's `--gpus`.

    Without `--gpus`, what `trainer` says, else one device of the best kind that there is.

    Raises:
        UserError: a value of another form, or more devices than there are.
    """
    if gpus is None:
        given = {key: trainer[key] for key in ("accelerator", "devices") if key in trainer}
        return {"accelerator": "auto", "devices": 1} | given
    listed = ",".join(map(str, gpus)) + "," if isinstance(gpus, list) else str(gpus)
    wanted = _parse_gpus(listed.strip()) if gpus != [] else 0
    if wanted in (0, []):
        return {"accelerator": "cpu", "devices": 1}
    if not torch.cuda.is_available():
        log.warning("=" * 78)
        log.warning("--gpus %s asks for a GPU, but PyTorch sees no CUDA device: TRAINING ON THE CPU, slowly", gpus)
        log.warning("=" * 78)
        return {"accelerator": "cpu", "devices": 1}
    found = torch.cuda.device_count()
    if (max(wanted) >= found) if isinstance(wanted, list) else wanted > found:
        raise UserError(f"--gpus {gpus}: there are {found} CUDA devices, numbered from 0")
    return {"accelerator": "gpu", "devices": wanted}


def _parse_gpus(text: str) -> int | list[int]:
    """A number of devices (-1: all), or a list of device numbers."""
    try:
        if "," not in text:
            count = int(text)
            if count < -1:
                raise ValueError
            return count
        numbers = [int(part) for part in text.split(",") if part.strip()]
        if any(number < 0 for number in numbers) or len(set(numbers)) != len(numbers):
            raise ValueError
        return numbers
    except ValueError as error:
        raise UserError(
            f"--gpus: expected device numbers such as 0, or 0,1 (with a comma), a count such as 2, or -1, got '{text}'"
        ) from error


def trainer_options(lightning: DictConfig) -> dict[str, Any]:
    """The Trainer's arguments from `lightning.trainer`.

    Raises:
        UserError: an unknown one, or a value of a wrong kind.
    """
    options: dict[str, Any] = _of_lightning_2(dict(plain(lightning.trainer)))
    gpus = options.pop("gpus", None)
    if "callbacks" in options:
        raise UserError("lightning.trainer.callbacks: give it as lightning.callbacks, beside lightning.trainer")
    if options.pop("plugins", None):
        raise UserError("lightning.trainer.plugins: plugins cannot be built from YAML; leave it out")
    check_keys(pl.Trainer, options, "lightning.trainer")
    options = used(pl.Trainer, options, "lightning.trainer")
    check_counts(options, "lightning.trainer.")
    options |= devices(gpus, options)
    if "max_epochs" not in options and "max_steps" not in options and "max_time" not in options:
        options["max_epochs"] = 1000  # Lightning's own default, without its warning
    return options


def _of_lightning_2(options: dict[str, Any]) -> dict[str, Any]:
    """The Trainer's arguments of LDM's time (Lightning 1.4) in today's names."""
    for old, new in RENAMED_SWITCHES.items():
        if old in options:
            options.setdefault(new, bool(options.pop(old)))
    # Lightning 1 took null for a default that is a number now. Where null means something, it stays.
    hints = get_type_hints(pl.Trainer.__init__)
    for name in [n for n, value in options.items() if value is None and n in hints]:
        if type(None) not in get_args(hints[name]):
            del options[name]
    # Then a way of working together; since Lightning 2 a kind of device.
    accelerator = options.get("accelerator")
    if accelerator in WAYS:
        del options["accelerator"]
        if accelerator == "ddp_cpu":
            options |= {"accelerator": "cpu", "devices": options.get("num_processes", 1)}
        log.warning("lightning.trainer.accelerator: %s has no effect: several devices train by ddp anyway", accelerator)
    elif accelerator in ("dp", "ddp2", "horovod"):
        raise UserError(f"lightning.trainer.accelerator: there is no '{accelerator}' since Lightning 2; leave it out")
    return options


def check_counts(options: dict[str, Any], prefix: str) -> None:
    """Refuse intervals and counts that are none.

    Raises:
        UserError: the first one; `prefix` and its name say where it is.
    """
    for name in ("check_val_every_n_epoch", "val_check_interval", "log_every_n_steps"):
        value = options.get(name)
        if isinstance(value, int | float) and (value < 0 or (value == 0 and name != "log_every_n_steps")):
            raise UserError(f"{prefix}{name}: expected a number above 0, got {value!r}")
    algorithm = options.get("gradient_clip_algorithm")
    if algorithm not in (None, "norm", "value"):
        raise UserError(f"{prefix}gradient_clip_algorithm: expected norm or value, got {algorithm!r}")
    for name in ("accumulate_grad_batches", "max_epochs", "max_steps"):
        value = options.get(name)
        least = 1 if name == "accumulate_grad_batches" else -1
        if value is not None and (not isinstance(value, int) or value < least or value == 0):
            raise UserError(f"{prefix}{name}: expected a whole number of at least 1, got {value!r}")
