"""Figures of a trained model, as in the paper.

  python scripts/figures.py logs/<run>                       all of them
  python scripts/figures.py logs/<run> swaps attention       those that are named
  python scripts/figures.py my-model --data my-pictures      of an exported model (scripts/export.py), on pictures

Writes <log directory>/figures/<name>.png, also .pdf of plots and .gif of what moves. An exported model, be it a folder,
its model.safetensors or hf://user/name, has no data with it: give some by --data.

  reconstructions  images, the first stage's and EncDiff's reconstructions
  swaps            images with one factor's concepts from other images (Figure 4)
  traversals       one scalar at a time, from its 1st to its 99th percentile
  attention        cross attention to each factor's tokens, over the image (Figure 5)
  interpolation    from one image to another, in all concepts and in one factor's
  denoising        the way from noise to an image
  matrices         DCI's importances and mutual information
  bottleneck       the divergence of Eq. 5 over t, for four schedules (Figure 2b)
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.signals import as_command
from ldm.util import UserError


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", type=Path, help="log directory, checkpoint, or an exported model: folder, file or hf://user/name"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="figures (default: all)")
    parser.add_argument("--out", type=Path, help=(
        "folder to write to (default: figures in the log directory or exported folder; of an address, ./figures)"
    ))  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="RUN_OR_YAML_OR_FOLDER", help=(
        "images to draw: a log directory or YAML file with `data`, or a folder of pictures (default: the run's own)"
    ))  # fmt: skip
    parser.add_argument("--images", type=positive, default=8, help="images that are shown (default: 8)")
    parser.add_argument("--steps", type=positive, default=20, help="of DPM-Solver++ (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--weights", choices=("ema", "live"), default="ema", help=(
        "EMA weights where there are some (default), or live ones"
    ))  # fmt: skip
    parser.add_argument("--split", choices=("validation", "train"), help="of the model's data (default: validation)")
    parser.add_argument("--device", help="cpu, cuda:0, ... (default: cuda if there is one)")
    parser.add_argument("--allow", action="append", metavar="MODULE", default=[], help=(
        "also take classes from this module, once you trust it (may be repeated)"
    ))  # fmt: skip
    return parser.parse_args(argv)


def load_model(opt: argparse.Namespace, path: Path) -> tuple[Any, bool]:
    """The model on its device, and whether its live weights are drawn: those of a file without EMA weights."""
    import torch

    from ldm.api import load
    from ldm.modules.speed import keep_memory

    device = opt.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(device).type == "cpu":
        keep_memory()
    if opt.weights == "ema":
        try:
            return load(path, device, "ema", opt.allow), False
        except UserError as error:
            if "no EMA weights" not in str(error):
                raise
    return load(path, device, "live", opt.allow), True


def load_data(opt: argparse.Namespace, config: Any) -> Any:
    """The data set whose images are drawn.

    Args:
        opt: of which `data`, `split` and `allow` count.
        config: of the model.

    Raises:
        UserError: there is none, or not that split of it.
    """
    from ldm.api import load_config
    from ldm.config import load_yaml
    from ldm.data.dis import ImageFolder
    from ldm.targets import allowing
    from ldm.util import instantiate_from_config

    if opt.data is not None:
        if opt.data.is_dir() and not (opt.data / "configs").is_dir():
            return ImageFolder(opt.data, image_size_of(config))
        is_yaml = opt.data.suffix in (".yaml", ".yml") and opt.data.is_file()
        config = load_yaml(opt.data) if is_yaml else load_config(opt.data)
    if "data" not in config:
        raise UserError(
            f"'{opt.data or opt.model}' has no data with it: give a log directory, a YAML file with the key data, or a"
            " folder of pictures",
            "--data",
        )
    with allowing(opt.allow):
        data = instantiate_from_config(config.data, "data", "data module")
        data.setup()
    splits = [opt.split] if opt.split else ["validation", "train"]
    dataset = next((data.datasets[split] for split in splits if split in data.datasets), None)
    if dataset is None:
        raise UserError(f"its configuration has no data.params.{splits[0]}", "--split")
    return dataset


def image_size_of(config: Any) -> int:
    """Of a model's images, in pixels.

    Raises:
        UserError: its configuration does not say.
    """
    from omegaconf import OmegaConf

    params = "model.params"
    for key in (f"{params}.cond_stage_config.params.image_size", f"{params}.ddconfig.resolution",
                f"{params}.first_stage_config.params.ddconfig.resolution"):  # fmt: skip
        if isinstance(size := OmegaConf.select(config, key), int):
            return size
    raise UserError("the model does not say how large its images are: give a YAML file with the key data", "--data")


def run(opt: argparse.Namespace) -> None:
    """Draw, and say where."""
    from ldm.figures.draw import FIGURES, check_names

    names = check_names(opt.names or FIGURES, "NAME")  # a mistake is told before anything is loaded

    from ldm.api import load_config
    from ldm.cli.configure import logdir_of
    from ldm.compat.whole import training_step
    from ldm.evaluation.runs import record_at
    from ldm.figures.draw import draw_figures
    from ldm.figures.subject import make_subject
    from ldm.hub import located

    path = located(opt.model)
    dataset = load_data(opt, load_config(path))
    model, live = load_model(opt, path)
    exported = path.suffix == ".safetensors"
    logdir = path.parent if exported else logdir_of(path)
    step = None if exported else training_step(checkpoint_of(path))
    record = record_at(logdir, step, strict=True) if opt.data is None else {}  # scores are of the run's own data
    about = {"step": step, "steps": opt.steps, "seed": opt.seed, "bars": True, "run": logdir.resolve().name}
    out = opt.out or logdir / "figures"
    if str(opt.model).startswith("hf:"):  # what it was downloaded into is the hub's
        about["run"], out = opt.model.name, opt.out or Path("figures")
    files = draw_figures(make_subject(model, dataset, record, opt.images, live, **about), names, out)
    if not files:
        raise UserError("none of these figures can be drawn of this model", "NAME")
    print("\n".join(str(file) for paths in files.values() for file in paths))


def checkpoint_of(path: Path) -> Path:
    """The checkpoint that a path stands for."""
    return path / "checkpoints" / "last.ckpt" if path.is_dir() else path


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after a mistake."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        run(arguments(argv))
    except (ValueError, OSError) as error:  # UserError is a ValueError
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(as_command(main))
