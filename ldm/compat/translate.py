"""Configurations of the first release and of LDM in this project's words: `translate`, called once.

Nothing else in the project knows the old names. What is listed here occurs in a published YAML file, or is how LDM's
command lines of Lightning 1 were written; any other key is an unknown key like every other.
"""

import logging
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from ldm.util import UserError

log = logging.getLogger(__name__)
# For the log file alone; see `ldm.bars`.
DETAIL = {"screen": False}

LOSS = "VQLPIPSWithDiscriminator"
TARGETS = {
    "ldm.models.diffusion.ddpm_enc.LatentDiffusion": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "ldm.modules.diffusionmodules.openaimodel_enc.UNetModel": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "ldm.modules.diffusionmodules.openaimodel_enc.Encoder4": "ldm.modules.encoders.concept.Encoder4",
    "ldm.modules.losses.LPIPSWithDiscriminator": "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator",
    f"taming.modules.losses.vqperceptual.{LOSS}": f"ldm.modules.losses.vqperceptual.{LOSS}",
    "main.DataModuleFromConfig": "ldm.data.module.DataModuleFromConfig",
    "main_val.DataModuleFromConfig": "ldm.data.module.DataModuleFromConfig",
    "main.ImageLogger": "ldm.callbacks.images.ImageLogger",
    "main_val.ImageLogger": "ldm.callbacks.images.ImageLogger",
    "main.LearningRateMonitor": "pytorch_lightning.callbacks.LearningRateMonitor",
    "main_val.LearningRateMonitor": "pytorch_lightning.callbacks.LearningRateMonitor",
    "pytorch_lightning.loggers.TestTubeLogger": "pytorch_lightning.loggers.TensorBoardLogger",  # the same files
    "ldm.tools.Record": "ldm.callbacks.record.Record",
    "ldm.data.disdata.Celebarain": "ldm.data.dis.CelebATrain",
    **{f"ldm.data.disdata.{name}Train": f"ldm.data.dis.{name}Train" for name in ("Cars3D", "Shapes3D", "MPI3D")},
    "ldm.data.disdata.CelebATrain": "ldm.data.dis.CelebATrain",
}
DATASETS = "ldm.data.disdata."
# LDM's main.py names them in its defaults; here every run does what they do.
LEFT_OUT = tuple(f"{module}.{name}" for module in ("main", "main_val") for name in ("SetupCallback", "CUDACallback"))


class Unused(NamedTuple):
    """A key that has no effect here: why, and the values for which that is true (None: all; others are refused)."""

    reason: str
    allowed: tuple[Any, ...] | None = None


UNUSED: dict[str, dict[str, Unused]] = {
    "ldm.models.diffusion.ddpm.LatentDiffusion": {
        "eval_name": Unused("the validation set brings the factors that scores need"),
        "num_timesteps_cond": Unused("the condition is not noised", (None, 1)),
        "concat_mode": Unused("concept tokens condition by cross attention", (False,)),
    },
    "ldm.modules.diffusionmodules.openaimodel.UNetModel": {
        "use_checkpoint": Unused("activations are kept, not computed again"),
        "legacy": Unused("both of its values mean the same heads"),
    },
    f"ldm.modules.losses.vqperceptual.{LOSS}": {
        "n_classes": Unused("used codes are counted and logged as codes_in_use"),
    },
    "ldm.lr_scheduler.LambdaLinearScheduler": {"verbosity_interval": Unused("the rate is logged anyway")},
    "ldm.lr_scheduler.LambdaWarmUpCosineScheduler": {"verbosity_interval": Unused("the rate is logged anyway")},
    "ldm.data.module.DataModuleFromConfig": {"wrap": Unused("data sets need no wrapping")},
    "ldm.callbacks.record.Record": {"plot_image": Unused("pictures are in images/")},
    "ldm.data.dis.": {  # every data set of the release
        "as_tensor": Unused("images are tensors", (True,)),
        "do_normalize": Unused("images are in [-1, 1]", (True,)),
        "do_augment": Unused("images are not augmented", (False,)),
        "crop_d2c": Unused("pictures are cut to Diff-AE's crop", (True,)),
        "split": Unused("the whole set is read", (None,)),
        "test": Unused("every image is there once, in training too"),
    },
    "ddconfig": {"attn_type": Unused("the first stage's attention is the plain one", ("vanilla",))},
}
# Switches of Lightning 1's Trainer and their names since. Zero and null mean off.
TRAINER = {
    "checkpoint_callback": "enable_checkpointing",
    "progress_bar_refresh_rate": "enable_progress_bar",
    "weights_summary": "enable_model_summary",
}
STRATEGIES = ("ddp", "ddp_spawn")  # Lightning 1 called them accelerators
# What LDM's main.py adds where a YAML file names this callback: weights, kept all along.
TRAIN_STEPS = {
    "target": "pytorch_lightning.callbacks.ModelCheckpoint",
    "params": {
        "filename": "trainstep_checkpoints/{epoch:06}-{step:09}",
        "save_top_k": -1,
        "every_n_train_steps": 10000,
        "save_weights_only": True,
    },
}
UNCONDITIONAL = "__is_unconditional__"


class Notes:
    """What is translated or left out. Each is a line for the log file; the screen gets one line on all of them."""

    def __init__(self) -> None:
        self.targets, self.renamed, self.without_effect = 0, list[str](), list[str]()

    def target(self, where: str, old: str, new: str) -> None:
        """A class has another name here."""
        self.targets += 1
        log.info("%s.target: %s is %s here", where, old, new, extra=DETAIL)

    def rename(self, key: str, meaning: str) -> None:
        """A key is written in another way here."""
        self.renamed.append(key)
        log.info("%s %s", key, meaning, extra=DETAIL)

    def leave_out(self, key: str, reason: str) -> None:
        """A key has no effect here."""
        self.without_effect.append(key)
        log.info("%s has no effect: %s", key, reason, extra=DETAIL)

    def tell(self) -> None:
        """One line on everything."""
        renamed, without = (
            list(dict.fromkeys(key.rpartition(".")[2] for key in keys)) for keys in (self.renamed, self.without_effect)
        )
        targets = [f"{self.targets} target{'s' if self.targets > 1 else ''}"] if self.targets else []
        parts = [f"{', '.join([*targets, *renamed])} translated"] if targets or renamed else []
        if without:
            parts.append(f"{', '.join(without)} left out, without effect here (docs/differences.md says why)")
        if parts:
            log.warning("names of the first release, LDM or Lightning 1: %s", "; ".join(parts))


def rename(config: DictConfig, notes: Notes | None = None) -> DictConfig:
    """A copy of one YAML file with today's targets, so that files can be merged.

    Args:
        config: of one file.
        notes: collects what was translated; without it, that is logged at once.

    Raises:
        UserError: a data set of the release that this project does not have.
    """
    config, own = config.copy(), notes or Notes()
    for where, node in _nodes(config):
        target = str(_plain(node, "target"))
        if target in TARGETS:
            node.target = TARGETS[target]
            own.target(where, target, node.target)
        elif target.startswith(DATASETS):
            message = f"'{target}' is a data set of the first release that this project does not have"
            raise UserError(message, f"{where}.target")
    if notes is None:
        own.tell()
    return config


def translate(config: DictConfig, notes: Notes | None = None) -> DictConfig:
    """A configuration in this project's words; one warning line says what is translated or left out.

    Args:
        config: all files, merged; it is not changed.
        notes: of `rename`, for each of the files, which the line tells too.

    Returns:
        A copy with today's targets and Trainer arguments, and without keys that have no effect.

    Raises:
        UserError: see `rename`; or a key with a value that would mean something that is not built here.
    """
    notes = notes or Notes()
    config = rename(config, notes)
    _lightning(config, notes)
    for where, node in _nodes(config):
        params, target = _plain(node, "params"), str(_plain(node, "target"))
        if not isinstance(params, DictConfig):
            continue
        kind = "ldm.data.dis." if target.startswith("ldm.data.dis.") else target
        _drop(params, UNUSED.get(kind), f"{where}.params", notes)
        _drop(_plain(params, "ddconfig"), UNUSED["ddconfig"], f"{where}.params.ddconfig", notes)
        if _plain(params, "cond_stage_config") == UNCONDITIONAL:
            params.update({"cond_stage_config": None, "conditioning_key": "none"})
            notes.rename(f"{where}.params.cond_stage_config", f"{UNCONDITIONAL} is conditioning_key none here")
    notes.tell()
    return config


def _plain(node: Any, key: str) -> Any:
    """A node's value, or None where it is absent, open (`???`) or an interpolation."""
    if not isinstance(node, DictConfig) or key not in node:
        return None
    return None if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key) else node[key]


def _nodes(config: DictConfig, where: str = "") -> list[tuple[str, DictConfig]]:
    """All nodes with a target, and their keys."""
    found = [(where, config)] if "target" in config else []
    for key in map(str, config):
        child = _plain(config, key)
        if isinstance(child, DictConfig):
            found += _nodes(child, f"{where}.{key}".lstrip("."))
    return found


def _drop(params: Any, unused: dict[str, Unused] | None, where: str, notes: Notes) -> None:
    """Leave out keys that have no effect."""
    for key in [key for key in unused or {} if isinstance(params, DictConfig) and key in params]:
        reason, allowed = unused[key]  # type: ignore[index]
        value = params.pop(key)
        if allowed is not None and value not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise UserError(f"{value!r} is not supported: {reason}; leave it out, or give {expected}", f"{where}.{key}")
        notes.leave_out(f"{where}.{key}", reason)


def _lightning(config: DictConfig, notes: Notes) -> None:
    """Callbacks that LDM's YAML files write out, and Lightning 1's arguments of the Trainer."""
    callbacks = OmegaConf.select(config, "lightning.callbacks")
    for name in list(map(str, callbacks)) if isinstance(callbacks, DictConfig) else []:
        if _plain(callbacks[name], "target") in LEFT_OUT:
            del callbacks[name]
            notes.leave_out(f"lightning.callbacks.{name}", "every run has what it does")
        elif name == "metrics_over_trainsteps_checkpoint":
            callbacks[name] = OmegaConf.merge(TRAIN_STEPS, callbacks[name] or {})
            notes.rename(f"lightning.callbacks.{name}", "keeps weights every N steps, as LDM's main.py does")
    trainer = OmegaConf.select(config, "lightning.trainer")
    if not isinstance(trainer, DictConfig):
        return
    for old, new in TRAINER.items():
        if old in trainer:
            trainer[new] = bool(trainer.pop(old))
            notes.rename(f"lightning.trainer.{old}", f"is {new} here")
    accelerator = _plain(trainer, "accelerator")
    if accelerator in STRATEGIES:
        del trainer["accelerator"]
        reason = "several devices train by DDP anyway"
        notes.leave_out(f"lightning.trainer.accelerator: {accelerator}", reason)
