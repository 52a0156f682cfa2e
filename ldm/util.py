"""From configuration to objects, and what the original release's YAML files say: names of classes, and keys."""

import difflib
import importlib
import inspect
import logging
import numbers
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf

log = logging.getLogger(__name__)


class UserError(ValueError):
    """A mistake in what the user gave: a file, a key, a flag.

    The message names it, says what was expected and found, and what to do. The command line prints it as one line.
    """

    # TEMPORARY, like `check_params` below, until this branch is merged with the new util.
    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(f"{key}: {message}" if key else message)
        self.message, self.key = message, key


# Names of LDM's and of the release's YAML files, and what they mean here.
RENAMED = {
    "ldm.models.diffusion.ddpm_enc.LatentDiffusion": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "ldm.modules.diffusionmodules.openaimodel_enc.UNetModel": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "ldm.modules.diffusionmodules.openaimodel_enc.Encoder4": "ldm.modules.encoders.concept.Encoder4",
    "ldm.modules.losses.LPIPSWithDiscriminator": "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator",
    "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": (
        "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
    ),
    "main.DataModuleFromConfig": "ldm.data.module.DataModuleFromConfig",
    "main.ImageLogger": "ldm.callbacks.images.ImageLogger",
    "main_val.DataModuleFromConfig": "ldm.data.module.DataModuleFromConfig",
    "main_val.ImageLogger": "ldm.callbacks.images.ImageLogger",
    # What the original builds by itself; see `ldm.cli_build`, which leaves it out of what is built here.
    **{
        f"{m}.{c}": "pytorch_lightning.Callback"
        for m in ("main", "main_val")
        for c in ("SetupCallback", "CUDACallback")
    },
    "main.LearningRateMonitor": "pytorch_lightning.callbacks.LearningRateMonitor",
    "main_val.LearningRateMonitor": "pytorch_lightning.callbacks.LearningRateMonitor",
    "pytorch_lightning.loggers.TestTubeLogger": "pytorch_lightning.loggers.TensorBoardLogger",  # the same files
    "ldm.tools.Record": "ldm.callbacks.record.Record",
    "ldm.data.disdata.Celebarain": "ldm.data.dis.CelebATrain",
}
RENAMED_MODULES = {"ldm.data.disdata": "ldm.data.dis"}


class Unused(NamedTuple):
    """A key of LDM's or the release's YAML files that does nothing here.

    Attributes:
        reason: why, for the warning.
        allowed: the values for which that is true; others are refused. None: all.
    """

    reason: str
    allowed: tuple[Any, ...] | None = None


_CONDITION = "concept tokens condition by cross attention"
_LEVELS = {
    "resamp_with_conv": Unused("the first stage resamples by convolutions", (True,)),
    "attn_type": Unused("the first stage's attention is the plain one", ("vanilla",)),
    "use_linear_attn": Unused("the first stage's attention is the plain one", (False,)),
    "give_pre_end": Unused("the decoder gives images", (False,)),
    "tanh_out": Unused("the decoder gives images as they are", (False,)),
}
_COLORS = {"colorize_nlabels": Unused("there are no segmentation maps to colour", (None,))}
# By the class or function here that the keys are given to; those derived from a class know its keys too.
UNUSED: dict[str, dict[str, Unused]] = {
    "ldm.models.diffusion.ddpm.LatentDiffusion": {
        "eval_name": Unused("the validation set brings the factor grid that scores need"),
        "num_timesteps_cond": Unused("the condition is not noised", (None, 1)),
        "concat_mode": Unused(_CONDITION, (False,)),
        "cond_stage_forward": Unused("the concept encoder is called itself", (None,)),
        "clip_denoised": Unused("latents are never clipped, as in the original"),
        "use_positional_encodings": Unused("the original reads it nowhere"),
        "given_betas": Unused("the schedule is computed from beta_schedule", (None,)),
        "load_only_unet": Unused("ckpt_path holds the whole model", (False,)),
    },
    "ldm.modules.diffusionmodules.openaimodel.UNetModel": {
        "dims": Unused("latents are maps of two dimensions", (2,)),
        "num_classes": Unused(_CONDITION, (None,)),
        "n_embed": Unused("the U-Net predicts noise, not codes", (None,)),
        "use_fp16": Unused("precision is lightning.trainer.precision", (False,)),
        "use_checkpoint": Unused("activations are kept, not computed again"),
        "use_new_attention_order": Unused("it is of attention blocks that the tokens do not reach"),
        "num_heads_upsample": Unused("it is of attention blocks that the tokens do not reach"),
        "legacy": Unused("both of its values mean the same heads"),
    },
    "ldm.modules.encoders.concept.Encoder4": {"bn": Unused("Encoder4 has batch norm", (True,))},
    "ldm.modules.diffusionmodules.model.Encoder": _LEVELS,
    "ldm.models.autoencoder.VQModel": {
        **_COLORS,
        "batch_resize_range": Unused("images keep their size", (None,)),
    },
    "ldm.models.autoencoder.AutoencoderKL": _COLORS,
    "ldm.modules.losses.adversarial.AdversarialLoss": {
        "pixelloss_weight": Unused("the original reads it nowhere: the pixel term's weight is 1"),
        "perceptual_loss": Unused("the perceptual loss is LPIPS", ("lpips",)),
        "n_classes": Unused("it was for counting used codes, which is logged as codes_in_use"),
    },
    "ldm.data.images.ImageDataset": {
        "as_tensor": Unused("images are tensors", (True,)),
        "do_normalize": Unused("images are in [-1, 1]", (True,)),
        "do_augment": Unused("images are not augmented", (False,)),
        "split": Unused("the whole set is read", (None,)),
        "degradation": Unused("images are not degraded"),
    },
    "ldm.data.dis.Cars3D": {"test": Unused("every image is there once, in training too")},
    "ldm.data.folders.CelebA": {"crop_d2c": Unused("pictures are cut to Diff-AE's crop", (True,))},
    "ldm.data.module.DataModuleFromConfig": {
        "wrap": Unused("data sets need no wrapping"),
        "use_worker_init_fn": Unused("PyTorch and Lightning seed the workers"),
    },
    "ldm.callbacks.images.ImageLogger": {"log_on_batch_idx": Unused("pictures are made by step", (False,))},
    "ldm.callbacks.record.Record": {"plot_image": Unused("pictures are in images/, and there is none of the record")},
    "ldm.models.diffusion.visuals.diffusion_images": {
        "return_keys": Unused("all pictures that were asked for are made", (None,))
    },
    "pytorch_lightning.trainer.trainer.Trainer": {
        "replace_sampler_ddp": Unused("the loaders share the data among processes"),
        "prepare_data_per_node": Unused("one process of each machine converts files"),
        "flush_logs_every_n_steps": Unused("TensorBoard's writer flushes by the clock"),
        "terminate_on_nan": Unused("codes that are not finite end a run when they are scored"),
        "log_gpu_memory": Unused("Lightning 2 has it no more"),
        "process_position": Unused("there is one progress bar"),
        "move_metrics_to_cpu": Unused("Lightning 2 has it no more"),
        "num_processes": Unused("the number of processes is that of devices"),
        "auto_select_gpus": Unused("devices are chosen by --gpus"),
        "tpu_cores": Unused("devices are chosen by --gpus", (None,)),
        "ipus": Unused("devices are chosen by --gpus", (None,)),
        "distributed_backend": Unused("several devices train by ddp", ("ddp", "ddp_spawn", None)),
        "amp_level": Unused("Lightning 2 has one kind of mixed precision"),
        "weights_save_path": Unused("checkpoints are in the log directory", (None,)),
        "truncated_bptt_steps": Unused("there are no sequences", (None,)),
        "reload_dataloaders_every_epoch": Unused("the data do not change", (False,)),
        "multiple_trainloader_mode": Unused("there is one loader"),
        "stochastic_weight_avg": Unused("weights are averaged by model.params.use_ema", (False,)),
        "amp_backend": Unused("Lightning 2 has one kind of mixed precision", ("native",)),
        "track_grad_norm": Unused("Lightning 2 has it no more", (-1,)),
        "auto_lr_find": Unused("the rate is model.base_learning_rate", (False,)),
        "auto_scale_batch_size": Unused("the size is data.params.batch_size", (False, None)),
        "resume_from_checkpoint": Unused("it is the argument --resume_from_checkpoint", (None,)),
    },
    **{
        f"ldm.lr_scheduler.{name}": {"verbosity_interval": Unused("the rate is in the log anyway")}
        for name in ("_Cycles", "LambdaWarmUpCosineScheduler")
    },
}


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` if a known name is close to `name`, else the known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known here: {', '.join(known)}" if known else ""


def resolve_target(target: str) -> str:
    """The full name of a class here for a `target`, which may be one of the original release's names."""
    if target in RENAMED:
        return RENAMED[target]
    module, _, name = target.rpartition(".")
    return f"{RENAMED_MODULES.get(module, module)}.{name}"


def get_obj_from_str(target: str, where: str = "target") -> Any:
    """Import the object that a dotted name means.

    Args:
        target: e.g. `ldm.models.autoencoder.VQModel`; names of the original release are translated.
        where: the key in the configuration, for the error message.

    Raises:
        UserError: no such module, or nothing of that name in it.
    """
    named = isinstance(target, str) and all(part.isidentifier() for part in target.split("."))
    if not named or "." not in target:
        raise UserError(f"{where}: expected a dotted name such as ldm.models.autoencoder.VQModel, got {target!r}")
    module_name, _, name = resolve_target(target).rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UserError(f"{where}: there is no module '{module_name}' for target '{target}'") from error
        raise
    if not hasattr(module, name):
        if target.rpartition(".")[0] in RENAMED_MODULES:
            raise UserError(f"{where}: '{target}' is a data set of the release that is not part of this version")
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        raise UserError(f"{where}: module '{module_name}' has no '{name}' (target '{target}'){nearest(name, classes)}")
    found = getattr(module, name)
    if not callable(found):
        raise UserError(f"{where}: '{target}' is no class or function: expected the name of one")
    return found


SIMPLE = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
LISTS = (Sequence, Iterable, list, tuple)
# What constructors raise for values that they cannot use.
FAILURES = (
    ValueError,
    TypeError,
    RuntimeError,
    AssertionError,
    LookupError,
    ArithmeticError,
    OSError,
    AttributeError,
    ImportError,  # a logger whose package is not installed
)


def _hints(function: Any) -> dict[str, Any]:
    """Type hints of a function's parameters, without those that cannot be resolved."""
    try:
        return get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        # A name that is known to type checkers alone; the other annotations stand.
        found = getattr(function, "__annotations__", {})
        return {name: hint for name, hint in found.items() if not isinstance(hint, str)}


def check_value(hint: Any, value: Any, where: str) -> None:
    """Refuse a value that is not of the kinds that a type hint allows: numbers, truth values, texts, or a list; other
    hints allow everything.

    Raises:
        UserError: the value is of another kind.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    listed = [get_origin(kind) in LISTS for kind in kinds if kind is not type(None)]
    if listed and all(listed) and (isinstance(value, str | numbers.Number) or (value is None and len(kinds) == 1)):
        raise UserError(f"{where}: expected a list, got {value!r}")
    if not all(kind in SIMPLE for kind in kinds):
        return
    if isinstance(value, bool):
        fits = bool in kinds
    elif isinstance(value, numbers.Integral):
        fits = int in kinds or float in kinds
    elif isinstance(value, numbers.Real):
        fits = float in kinds
    else:
        fits = isinstance(value, tuple(kind for kind in kinds if kind in (str, type(None))))
    if not fits:
        shown = plain(value)
        raise UserError(f"{where}: expected {' or '.join(SIMPLE[kind] for kind in kinds)}, got {shown!r}")


def unused_keys(callable_: Any) -> dict[str, Unused]:
    """The keys that a class (with those of its bases) or a function takes by name without using them."""
    found: dict[str, Unused] = {}
    for owner in reversed(getattr(callable_, "__mro__", (callable_,))):
        found |= UNUSED.get(f"{owner.__module__}.{owner.__qualname__}", {})
    return found


@cache
def _warn_once(message: str) -> None:
    log.warning(message)


def used(callable_: Any, params: Mapping[str, Any] | DictConfig, where: str) -> dict[str, Any]:
    """Parameters without those that do nothing here, each of which is warned of, once.

    Args:
        callable_: a class or a function.
        params: names and values, checked by `check_keys`.
        where: the node's name in the configuration, for the warning.
    """
    unused = unused_keys(callable_)
    for key in params:
        if key in unused:
            _warn_once(f"{where}.{key} has no effect: {unused[str(key)].reason}")
    return {str(key): value for key, value in params.items() if key not in unused}


def check_keys(callable_: Any, keys: Iterable[str] | Mapping[str, Any], where: str) -> None:
    """Refuse keys that are no parameter of `callable_`, naming the nearest that is, and values of a wrong kind.

    Args:
        callable_: a class or a function.
        keys: names, or names and values; values are compared with the type hints.
        where: the node's name in the configuration, for the message.

    Raises:
        UserError: an unknown key, or a value of a wrong kind.
    """
    target = callable_.__init__ if inspect.isclass(callable_) else callable_
    parameters = dict(inspect.signature(target).parameters)
    hints = _hints(target)
    accepts_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    known = set(parameters) - {"self", "args", "kwargs"}
    if inspect.isclass(callable_) and accepts_any:
        # Keywords handed on to a base class are known by the base class.
        for base in callable_.__mro__[1:]:
            if base is object or "__init__" not in vars(base):
                continue
            initialise: Any = vars(base)["__init__"]
            inherited = inspect.signature(initialise).parameters
            known |= set(inherited) - {"self", "args", "kwargs"}
            parameters, hints = {**inherited, **parameters}, _hints(initialise) | hints
            accepts_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inherited.values())
            if not accepts_any:
                break
    unused = unused_keys(callable_)
    for key in keys:
        if key in unused:
            allowed, value = unused[key].allowed, keys[key] if isinstance(keys, Mapping | DictConfig) else None
            if allowed is not None and isinstance(keys, Mapping | DictConfig) and value not in allowed:
                expected = " or ".join(repr(choice) for choice in allowed)
                raise UserError(
                    f"{where}.{key}: {plain(value)!r} is not supported: {unused[key].reason}; leave it out (the"
                    f" original's {expected})"
                )
            continue
        if key not in known and not accepts_any:
            raise UserError(f"{where}: unknown key '{key}' for {callable_.__name__}{nearest(str(key), known)}")
        if isinstance(keys, Mapping | DictConfig) and key in hints and key in parameters:
            if isinstance(keys, DictConfig) and OmegaConf.is_missing(keys, key):
                continue
            if keys[key] is not None or parameters[key].default is not None:
                check_value(hints[key], keys[key], f"{where}.{key}")


def instantiate_from_config(config: Any, where: str = "config", **extra: Any) -> Any:
    """Build the object that a node with `target` and, optionally, `params` describes.

    Args:
        config: mapping with `target` (dotted name) and `params` (keyword arguments).
        where: the node's name in the configuration, for error messages.
        extra: keyword arguments beside `params`.

    Raises:
        UserError: no target, an unknown target or key, or a mandatory value left as `???`.
    """
    if not isinstance(config, Mapping | DictConfig) or "target" not in config:
        found = f"the keys {sorted(map(str, config))}" if isinstance(config, Mapping | DictConfig) else repr(config)
        raise UserError(f"{where}: expected a node with 'target' and 'params', found {found}")
    if isinstance(config, DictConfig):
        for key in OmegaConf.missing_keys(config):
            raise UserError(f"{where}.{key} is left as ???: give it a value in the YAML file or as {where}.{key}=VALUE")
    cls = get_obj_from_str(config["target"], f"{where}.target")
    params = config.get("params") or {}
    check_keys(cls, params, f"{where}.params")
    params = used(cls, params, f"{where}.params")
    try:
        return cls(**params, **extra)
    except UserError:
        raise
    except FAILURES as error:
        raise UserError(f"{where} ({cls.__name__}): {str(error) or type(error).__name__}") from error


def require_at_least(least: float, where: str, **values: Any) -> None:
    """Refuse values that are too small.

    Args:
        least: the smallest value allowed.
        where: the node's name in the configuration, for the message.
        values: by key; None is let through.

    Raises:
        UserError: the first value that is smaller.
    """
    for key, value in values.items():
        if value is not None and value < least:
            raise UserError(f"{where}.{key}: expected at least {least}, got {value!r}")


def plain(config: Any) -> Any:
    """A configuration node as plain dicts, lists and scalars."""
    return OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig | ListConfig) else config


def check_params(function, params, where=""):
    check_keys(function, params, where)
