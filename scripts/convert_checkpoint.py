"""Convert a checkpoint of LDM or of the first release to ours, or any checkpoint to safetensors.

    python scripts/convert_checkpoint.py OLD.ckpt NEW.ckpt
    python scripts/convert_checkpoint.py logs/<run> model.safetensors

A `.ckpt` holds tensors and plain values only: the weights, and, where the source has it, the state of training, so
that `--resume_from_checkpoint NEW.ckpt` continues from there. A `.safetensors` holds the weights. The configuration,
from the source's log directory or from --config, is written next to it; `ldm.load("model.safetensors")` reads both.
"""

import argparse
import pickle
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from pytorch_lightning.utilities.migration import migrate_checkpoint
from safetensors import SafetensorError
from safetensors.torch import save

from ldm.api import load_config
from ldm.compat.checkpoints import read_checkpoint, read_state_dict, state_dict_of
from ldm.compat.whole import Inert, damage, instead_of, sealed
from ldm.config import load_yaml
from ldm.data.files import atomic_output
from ldm.signals import as_command
from ldm.util import UserError

TRAINING = ("optimizer_states", "lr_schedulers", "epoch", "global_step")
# Weights of VGG16, which LPIPS reads from its own file here.
FIXED = "loss.perceptual_loss."
FAILED = (OSError, RuntimeError, ValueError, SafetensorError)


class TrustingUnpickler(pickle.Unpickler):
    """Imports and calls what a pickle names, as Python does, but leaves out what is not installed."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return Inert


def read_trusted(path: Path) -> Any:
    """The content of a checkpoint, running whatever code it holds.

    Raises:
        UserError: it cannot be read.
    """
    lenient = ModuleType("lenient_pickle")
    vars(lenient).update(
        vars(pickle) | {"Unpickler": TrustingUnpickler, "load": lambda f, **k: TrustingUnpickler(f, **k).load()}
    )
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=lenient)
    except Exception as error:  # the file's code may raise anything
        raise UserError(f"'{path}' cannot be read as a checkpoint ({error})") from error


def plainly(value: Any) -> Any:
    """A value as tensors, numbers, strings, lists, tuples and dicts.

    Raises:
        TypeError: it holds anything else.
    """
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, dict):
        return {plainly(key): plainly(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(map(plainly, value))
    if isinstance(value, np.generic):
        return value.item()
    if value is None or type(value) in (int, float, bool, str) or isinstance(value, torch.Tensor):
        return value
    raise TypeError(type(value).__name__)


def counted(value: Any) -> int:
    """A number of epochs or steps.

    Raises:
        TypeError: the value is not one.
    """
    value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else plainly(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"{value!r} is not a count")
    return value


def converted(content: dict[str, Any], state: dict[str, torch.Tensor]) -> tuple[dict[str, Any], str]:
    """Our checkpoint from the content of another one, and a line on its training state."""
    new: dict[str, Any] = {"state_dict": {k: v.detach() for k, v in state.items()}}
    lacking = [key for key in TRAINING if key not in content]
    if lacking:
        return new, f"weights only: the source has no {', '.join(lacking)}"
    training: dict[str, Any] = {}
    for key in TRAINING:
        try:
            training[key] = (counted if key in ("epoch", "global_step") else plainly)(content[key])
        except TypeError as error:
            return new, f"weights only: {key} of the source holds other objects ({error})"
    new |= training
    new["pytorch-lightning_version"] = str(content.get("pytorch-lightning_version", "1.4.0"))
    for key in ("loops", "callbacks"):
        with suppress(TypeError):  # callbacks of Lightning 1 are left out
            if content.get(key):
                new[key] = plainly(content[key])
    if not new["optimizer_states"]:
        return {"state_dict": new["state_dict"]}, "weights only: the source has no optimiser state"
    try:
        # Moves the counters of Lightning 1 to where Lightning 2 looks for them.
        new, _ = migrate_checkpoint(new)
    except Exception as error:  # it assumes a complete file
        return {"state_dict": new["state_dict"]}, f"weights only: Lightning cannot migrate the source ({error!r})"
    return new, f"with the state of training at step {new['global_step']}"


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, str]) -> None:
    """Write a safetensors file with a checksum; `save_file` would make one that only its owner can read."""
    with path.open("wb") as file:
        file.writelines(sealed(save(tensors, about)))


def write(files: dict[Path, Callable[[Path], Any]]) -> None:
    """Write all of the files, or none of them if one fails.

    Raises:
        UserError: names the file that cannot be written.
    """
    path = Path()
    try:
        with ExitStack() as outputs:
            for path, save in files.items():
                if path.is_dir():
                    raise IsADirectoryError("it is a folder")
                save(outputs.enter_context(atomic_output(path)))
    except UserError:
        raise
    except FAILED as error:
        raise UserError(f"cannot write '{path}': {str(error).splitlines()[0]}") from error


def convert(source: Path, target: Path, config: Path | None, trust: bool, force: bool) -> list[str]:
    """Convert a checkpoint; returns lines that report what was done.

    Raises:
        UserError: a file that does not exist, cannot be read, or would be overwritten; no configuration.
    """
    if target.suffix not in (".ckpt", ".safetensors"):
        raise UserError(f"'{target}': expected a name that ends in .ckpt or .safetensors")
    beside = target.with_suffix(".yaml") if target.suffix == ".safetensors" else None
    for path in (target, beside):
        if path is not None and path.exists() and not force:
            raise UserError(f"'{path}' exists: give another name, or --force to overwrite it")
    if not source.exists():
        raise UserError(f"there is no log directory or checkpoint '{source}'")
    file = source / "checkpoints" / "last.ckpt" if source.is_dir() else source
    if not file.is_file():
        raise UserError(f"'{source}' has no checkpoint: there is no '{file}'{instead_of(file)}")
    if target.exists() and file.samefile(target):
        raise UserError(f"'{target}' is the checkpoint itself: give another name")
    project: DictConfig | None = None
    if beside is not None:
        project = load_yaml(config, "--config") if config is not None else load_config(source)
        if OmegaConf.select(project, "model.target") is None:
            raise UserError(f"'{config or source}': the configuration has no model.target")
    elif config is not None:
        raise UserError("--config is for targets that end in .safetensors")

    said = []
    if file.suffix == ".safetensors":
        content: Any = {"state_dict": read_state_dict(file)}
    elif problem := damage(file):  # a copy would have checksums that hold
        raise UserError(f"'{file}' {problem}{instead_of(file)}", "SOURCE")
    elif trust:
        content = read_trusted(file)
    else:
        content, left_out = read_checkpoint(file, "SOURCE")
        if left_out:
            said.append(f"left out, not run: {', '.join(sorted(left_out))}")
    state = {k: v for k, v in state_dict_of(content, file, "SOURCE").items() if FIXED not in k}
    if beside is None:
        new, training = converted(content, state)
        write({target: lambda path: torch.save(new, path)})
        said.append(f"{target}: {len(new['state_dict'])} weights, {training}")
    else:
        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}
        about = {key: str(content[key]) for key in ("global_step", "epoch") if key in content}
        write(
            {
                target: lambda path: write_safetensors(path, tensors, {"format": "pt", **about}),
                beside: lambda path: OmegaConf.save(project, path),
            }
        )
        said.append(f"{target}: {len(tensors)} weights; {beside}: the configuration")
    return said


def main(argv: list[str] | None = None) -> int:
    """Parse and convert; gives the exit status: 0, or 2 after a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a checkpoint, or a log directory, whose last.ckpt is taken")
    parser.add_argument("target", type=Path, help="a name that ends in .ckpt or .safetensors")
    parser.add_argument("--config", type=Path, help="the configuration, if the source is not in a log directory")
    parser.add_argument(
        "--trust", action="store_true", help="run the code pickled in the source: only for files from people you trust"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the target")
    options = parser.parse_args(argv)
    try:
        print("\n".join(convert(options.source, options.target, options.config, options.trust, options.force)))
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(as_command(main))
