"""Score representations for disentanglement: trained models, or anybody's codes.

  python scripts/evaluate.py logs/<run>                                    a model, on its validation set
  python scripts/evaluate.py --codes codes.npy --grid 10,10,10,8,4,15      codes of every row of a factor grid
  python scripts/evaluate.py --codes codes.npy --factors factors.csv       codes of a labelled sample
  python scripts/evaluate.py logs/<run> --reconstruction 1000 --fid 10000  and how well images are reconstructed

Prints a table; writes scores.json and heat-maps of what the dimensions know of the factors. Several models, or several
files of codes, are also ranked by UDR.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.bars import log_to_screen
from ldm.evaluation.files import read_codes, read_factors, write_codes
from ldm.evaluation.scores import CodeScores, package_versions, rank_codes, score_codes
from ldm.factors import FactorGrid, factors_of
from ldm.metrics.evaluate import METRICS, check_seed, check_settings
from ldm.metrics.sampling import Factors
from ldm.signals import as_command

MODEL_ONLY = {"reconstruction": 0, "fid": 0, "of": "scalars", "weights": "live", "split": "validation", "device": None,
              "save_codes": False, "bf16": False, "allow": [], "batch_size": 100, "sampler": "ddim", "steps": None,
              "eta": 1.0, "lpips": "alex", "lpips_weights": None, "inception_weights": None}  # fmt: skip


# Name, codes and scores of what was scored; without factors, no scores.
Scored = tuple[str, np.ndarray, CodeScores | None]


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        ValueError: flags that do not go together, or values that no metric takes.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", type=Path, help="log directories, checkpoints or safetensors files")
    codes = parser.add_argument_group("codes without a model")
    codes.add_argument("--codes", nargs="+", type=Path, metavar="FILE", help=".npy (m, n), or tokens (m, n, d)")
    codes.add_argument("--grid", metavar="10,10,8", help="sizes of the factors; rows are all combinations in order")
    codes.add_argument("--names", metavar="A,B,C", help="names of the factors of --grid")
    codes.add_argument("--factors", type=Path, metavar="FILE", help=".npy (m, k) or .csv: the factors of each row")
    scores = parser.add_argument_group("scores")
    scores.add_argument("--metrics", nargs="+", metavar="NAME", help=f"of {', '.join(METRICS)} (default: all defined)")
    scores.add_argument("--settings", nargs="+", default=[], metavar="metric.name=value", help="dci.num_train=2000 ...")
    scores.add_argument("--seed", type=int, default=0, help="of every metric's draws (default: 0)")
    scores.add_argument("--out", type=Path, help=(
        "folder to write to (default: evaluation in the log directory, or <file>_scores beside the codes)"
    ))  # fmt: skip
    model = parser.add_argument_group("models")
    model.add_argument("--of", choices=("scalars", "tokens", "components"), default="scalars", help=(
        "what is scored: the scalars; the tokens, by their first principal components (Table 11); all components of"
        " the tokens, as in the first release's TAD"
    ))  # fmt: skip
    model.add_argument("--split", choices=("validation", "train"), default="validation", help="of the model's data")
    model.add_argument("--weights", choices=("live", "ema"), default="live", help="live, as released, or EMA weights")
    model.add_argument("--allow", action="append", metavar="MODULE", default=[], help=(
        "also take classes from this module, once you trust it (may be repeated)"
    ))  # fmt: skip
    model.add_argument("--device", help="cpu, cuda:0, ... (default: cuda if there is one)")
    model.add_argument("--batch-size", type=positive, default=100, help="images at a time (default: 100)")
    model.add_argument(
        "--bf16", action="store_true", help="encode in bfloat16: several times as fast where it is native"
    )
    model.add_argument("--save-codes", action="store_true", help="write codes.npy, which --codes can score again")
    images = parser.add_argument_group("reconstructions and samples of models (MSE, SSIM, LPIPS; FID)")
    images.add_argument("--reconstruction", type=positive, default=0, metavar="N", help="compare N images (Table 10)")
    images.add_argument("--fid", type=positive, default=0, metavar="N", help="FID of N samples; needs torch-fidelity")
    images.add_argument("--sampler", choices=("ddim", "dpm"), default="ddim", help="dpm: DPM-Solver++ (default: ddim)")
    images.add_argument("--steps", type=positive, help="of the sampler (default: 200; with dpm 20)")
    images.add_argument("--eta", type=float, default=1.0, help="of the sampler, from 0 to 1 (default: 1)")
    images.add_argument("--lpips", choices=("alex", "vgg", "none"), default="alex", help="its backbone (default: alex)")
    images.add_argument("--lpips-weights", type=Path, metavar="FILE", help="the backbone's weights")
    images.add_argument("--inception-weights", type=Path, metavar="FILE", help="for FID")
    opt = parser.parse_args(argv)

    if bool(opt.codes) == bool(opt.model):
        raise ValueError("give trained models, or --codes FILE with --grid or --factors")
    arrays = [path for path in opt.model if path.suffix in (".npy", ".npz")]
    if arrays:
        raise ValueError(f"{arrays[0]} is not a model: give codes by --codes {arrays[0]}")
    if opt.model and (opt.grid or opt.names or opt.factors):
        raise ValueError("--grid, --names and --factors go with --codes: models are scored on their own data")
    given = [f"--{name.replace('_', '-')}" for name, usual in MODEL_ONLY.items() if getattr(opt, name) != usual]
    if opt.codes and given:
        raise ValueError(f"{', '.join(given)}: of models, not of --codes")
    if opt.metrics:
        opt.metrics = [name for text in opt.metrics for name in text.split(",") if name]
        if "udr" in opt.metrics:
            raise ValueError("--metrics udr: UDR ranks several models or files of codes, and needs no asking for")
    for pair in opt.settings:
        if "=" not in pair:
            raise ValueError(f"--settings {pair}: expected metric.name=value, such as dci.num_train=2000")
    try:
        opt.settings = OmegaConf.to_container(OmegaConf.from_dotlist(opt.settings))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"--settings {' '.join(opt.settings)}: {str(error).splitlines()[0]}") from error
    opt.lpips = None if opt.lpips == "none" else opt.lpips
    check_settings(opt.metrics or METRICS, opt.settings)
    check_seed(opt.seed)
    return opt


def parse_factors(opt: argparse.Namespace) -> Factors | None:
    """The factors of `--grid` or `--factors`; None if there are none, and several files of codes to be ranked."""
    if opt.grid is None and opt.factors is None and len(opt.codes) > 1:
        for name in ("names", "metrics", "settings"):
            if getattr(opt, name):
                raise ValueError(f"--{name} needs the factors of the codes: give --grid or --factors")
        return None
    if (opt.grid is None) == (opt.factors is None):
        raise ValueError(
            "--codes needs --grid 10,10,8 (the codes are of every combination, the last factor fastest) or"
            " --factors FILE (one row of factors per row of codes); without factors, give several files, to rank them"
        )
    if opt.factors is not None:
        if opt.names:
            raise ValueError("--names goes with --grid; a .csv of --factors has names in its first line")
        return read_factors(opt.factors)
    try:
        sizes = tuple(int(size) for size in opt.grid.split(","))
    except ValueError as error:
        raise ValueError(f"--grid {opt.grid}: expected sizes such as 10,10,8") from error
    return FactorGrid(sizes, tuple(name.strip() for name in opt.names.split(",")) if opt.names else ())


def evaluate_model(path: Path, out: Path, about: dict[str, Any], opt: argparse.Namespace) -> Scored | None:
    """Score a model's scalars or tokens, and its images if asked for."""
    import torch

    from ldm.api import load, load_config
    from ldm.evaluation.codes import encode, why_not_encoded, why_not_scored
    from ldm.evaluation.images import check_images, score_images
    from ldm.modules.speed import keep_memory
    from ldm.targets import allowing
    from ldm.util import instantiate_from_config

    model = load(path, opt.device or ("cuda" if torch.cuda.is_available() else "cpu"), opt.weights, opt.allow)
    if model.device.type == "cpu":
        keep_memory()
    with allowing(opt.allow):
        data = instantiate_from_config(load_config(path).data, "data", "data module")
        data.setup()
    if opt.split not in data.datasets:
        raise ValueError(f"its configuration has no data.params.{opt.split}; choose another --split")
    dataset, scored = data.datasets[opt.split], None
    check_images(model, dataset, opt.reconstruction, opt.fid, opt.steps, opt.eta, opt.lpips, opt.sampler)
    factors, reason = factors_of(dataset), why_not_scored(model, dataset, opt.weights)
    # Several models can be ranked without factors; not where scores or images were asked for.
    ranked = len(opt.model) > 1 and not (opt.metrics or opt.settings or opt.reconstruction or opt.fid)
    encoded = not reason or (factors is None and ranked and not why_not_encoded(model, opt.weights))
    if not encoded and not (opt.reconstruction or opt.fid):
        raise ValueError(f"{reason}: ask for --reconstruction N or --fid N")
    if reason:
        print(f"no scores for disentanglement: {reason}")
    if encoded:
        dtype = "bf16" if opt.bf16 else "float32"
        codes = encode(model, dataset, opt.batch_size, tokens=opt.of != "scalars", dtype=dtype)
        codes = codes.reshape(len(codes), -1) if opt.of == "components" else codes
        scored = evaluate_codes(codes, factors, out, about, opt) if factors else (about["source"], codes, None)
        if opt.save_codes:
            write_codes(out / "codes.npy", codes)
    if opt.reconstruction or opt.fid:
        files = {"lpips_weights": opt.lpips_weights, "inception_weights": opt.inception_weights}
        sampling = {name: getattr(opt, name) for name in ("batch_size", "sampler", "steps", "eta", "seed")}
        options: dict[str, Any] = {"lpips": opt.lpips, "about": about, **files, **sampling}
        print(score_images(model, dataset, out, opt.reconstruction, opt.fid, **options))
    return scored


def evaluate_codes(
    codes: np.ndarray, factors: Any, out: Path, about: dict[str, Any], opt: argparse.Namespace
) -> Scored:
    """Score codes, and print the table."""
    found = score_codes(codes, factors, opt.metrics, opt.settings, opt.seed, out, about, progress=True)
    seconds = ", ".join(f"{metric} {spent:.1f} s" for metric, spent in found.seconds.items())
    print("\n".join([found.table(), f"time: {seconds}", *map(str, found.files)]))
    return about["source"], codes, found


def folders(paths: list[Path], opt: argparse.Namespace) -> list[Path]:
    """The folder to write to for each model or file of codes."""
    stems = [path.stem if path.is_file() else path.resolve().name for path in paths]
    if opt.out:
        # Files of one name, such as last.ckpt of several runs, must not overwrite each other's scores.
        own = [stem if stems.count(stem) == 1 else f"{number}_{stem}" for number, stem in enumerate(stems)]
        return [opt.out / name for name in own] if len(paths) > 1 else [opt.out]
    if opt.codes:
        return [path.with_name(f"{stem}_scores") for path, stem in zip(paths, stems, strict=True)]
    # Scores of different things go to different folders.
    marks = [getattr(opt, name) for name in ("of", "weights", "split") if getattr(opt, name) != MODEL_ONLY[name]]
    name = "-".join(["evaluation", *marks, *(["bf16"] if opt.bf16 else [])])
    return [path / name if path.is_dir() else path.with_name(f"{path.stem}_{name}") for path in paths]


def check_models(paths: list[Path], device: str) -> None:
    """Refuse a path without a configuration, or without data, and a device that cannot be used."""
    import torch

    from ldm.api import load_config

    for path in paths:
        if "data" not in load_config(path):
            raise ValueError(f"'{path}' is an exported model, without data: in Python, ldm.score(model, dataset)")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error


def run(opt: argparse.Namespace) -> None:
    """Evaluate every model or file of codes; a ValueError says in one line what is wrong with the input."""
    paths = opt.codes or opt.model
    # All are looked up before the first is evaluated.
    if opt.codes:
        factors, given = parse_factors(opt), [read_codes(path) for path in paths]
    else:
        check_models(paths, opt.device or "cpu")
    about: dict[str, Any] = {"versions": package_versions()}
    if not opt.codes:
        about |= {"of": opt.of, "weights": opt.weights, "split": opt.split, "dtype": "bf16" if opt.bf16 else "float32"}
    scored: list[Scored] = []
    for number, (path, out) in enumerate(zip(paths, folders(paths, opt), strict=True)):
        print(f"\n{path}")
        own = {"source": str(path), **about}
        try:
            if opt.codes and factors is None:
                found: Scored | None = (str(path), given[number], None)
            elif opt.codes:
                found = evaluate_codes(given[number], factors, out, own, opt)
            else:
                found = evaluate_model(path, out, own, opt)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        scored += [found] if found else []
    if len(scored) > 1:
        names, codes, results = zip(*scored, strict=True)
        path = (opt.out or paths[0].resolve().parent) / "udr.json"
        print(f"\n{rank_codes(names, codes, results[0].factors if results[0] else None, opt.seed, path)}")
    failed = [f"{name}: {key}: {why}" for name, _, s in scored for key, why in (s.not_computed if s else {}).items()]
    if opt.metrics and failed:  # asked for by name: the rest is written, but this is a mistake
        raise ValueError("; ".join(failed))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 after a mistake, or 130 after an interruption."""
    log_to_screen(logging.WARNING)
    try:
        run(arguments(argv))
    except (ValueError, OSError) as error:  # UserError is a ValueError
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(as_command(main))
