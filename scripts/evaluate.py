"""Score representations for disentanglement: trained models, or anybody's codes.

  python scripts/evaluate.py logs/<run>                                    a model, on its validation set
  python scripts/evaluate.py --codes codes.npy --grid 10,10,10,8,4,15      codes of every row of a factor grid
  python scripts/evaluate.py --codes codes.npy --factors factors.csv       codes of a labelled sample
  python scripts/evaluate.py logs/<run> --reconstruction 1000 --fid 10000  and how well images come back

Prints a table; writes scores.json and heat-maps of what the dimensions know of the factors. With several models or
several files of codes each is scored, and all are ranked against each other by UDR.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.factors import FactorGrid, factors_of
from ldm.metrics.evaluate import METRICS, check_seed, check_settings, defined_metrics, evaluate
from ldm.metrics.files import read_codes, read_factors
from ldm.metrics.report import score_table, write_heatmaps, write_json
from ldm.metrics.sampling import Factors, scalar_codes, varying
from ldm.metrics.udr import udr


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", type=Path, help="log directories, checkpoints or safetensors files")
    codes = parser.add_argument_group("codes without a model")
    codes.add_argument("--codes", nargs="+", type=Path, metavar="FILE", help=".npy (m, n), or tokens (m, n, d)")
    codes.add_argument(
        "--grid", metavar="10,10,8", help="sizes of the factors; the rows are every combination in order"
    )
    codes.add_argument("--names", metavar="A,B,C", help="names of the factors of --grid")
    codes.add_argument("--factors", type=Path, metavar="FILE", help=".npy (m, k) or .csv: the factors of each row")
    scores = parser.add_argument_group("scores")
    scores.add_argument("--metrics", nargs="+", metavar="NAME", help=f"of {', '.join(METRICS)} (default: all defined)")
    scores.add_argument("--settings", nargs="+", default=[], metavar="metric.name=value", help="dci.num_train=2000 ...")
    scores.add_argument("--seed", type=int, default=0, help="of every metric's draws (default: 0)")
    scores.add_argument(
        "--out",
        type=Path,
        help="folder to write to (default: evaluation in the log directory, or <file>_scores beside codes)",
    )
    model = parser.add_argument_group("models")
    model.add_argument("--of", choices=("scalars", "tokens", "components"), default="scalars", help=(
        "what is scored: the scalars; the tokens, by their first principal components (Table 11); all components of"
        " the tokens, as the first release's TAD"
    ))  # fmt: skip
    model.add_argument("--split", choices=("validation", "train"), default="validation", help="of the model's data")
    model.add_argument("--weights", choices=("live", "ema"), default="live", help="live as released, or averaged")
    model.add_argument("--device", help="cpu, cuda:0, ... (default: cuda if there is one)")
    model.add_argument("--batch-size", type=positive, default=100, help="images at a time (default: 100)")
    model.add_argument("--save-codes", action="store_true", help="write codes.npy, to be scored again by --codes")
    images = parser.add_argument_group("reconstructions and samples of models (MSE, SSIM, LPIPS; FID)")
    images.add_argument("--reconstruction", type=positive, default=0, metavar="N", help="compare N images (Table 10)")
    images.add_argument("--fid", type=positive, default=0, metavar="N", help="FID of N samples; needs torch-fidelity")
    images.add_argument("--steps", type=positive, default=200, help="of DDIM (default: 200)")
    images.add_argument("--eta", type=float, default=1.0, help="of DDIM (default: 1)")
    images.add_argument("--lpips", choices=("alex", "vgg", "none"), default="alex", help="its backbone (default: alex)")
    images.add_argument("--lpips-weights", type=Path, metavar="FILE", help="the backbone's weights")
    images.add_argument("--inception-weights", type=Path, metavar="FILE", help="for FID")
    return parser.parse_args(argv)


def parse_settings(pairs: list[str]) -> dict[str, dict[str, Any]]:
    """`["dci.num_train=2000"]` -> `{"dci": {"num_train": 2000}}`.

    Raises:
        ValueError: names the pair.
    """
    settings: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        metric, dot, name = key.partition(".")
        if not (equals and dot and name):
            raise ValueError(f"--settings {pair}: expected metric.name=value, such as dci.num_train=2000")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--settings {pair}: '{value}' is no value of YAML") from error
        if isinstance(parsed, str):
            # YAML 1.1 takes 1e-2 for a text; other texts stay what they are.
            with suppress(ValueError):
                parsed = float(parsed)
        settings.setdefault(metric, {})[name] = parsed
    return settings


def parse_factors(options: argparse.Namespace) -> Factors:
    """The factors of `--grid` or `--factors`.

    Raises:
        ValueError: neither, both, or unusable ones.
    """
    if (options.grid is None) == (options.factors is None):
        raise ValueError(
            "--codes needs --grid 10,10,8 (the codes are of every combination, the last factor fastest) or"
            " --factors FILE (one row of factors per row of codes)"
        )
    if options.factors is not None:
        if options.names:
            raise ValueError("--names goes with --grid; a .csv of --factors has names in its first line")
        return read_factors(options.factors)
    names = tuple(name.strip() for name in options.names.split(",")) if options.names else ()
    try:
        sizes = tuple(int(size) for size in options.grid.split(","))
    except ValueError as error:
        raise ValueError(f"--grid {options.grid}: expected sizes such as 10,10,8") from error
    return FactorGrid(sizes, names)


def score(
    codes: np.ndarray, factors: Factors, options: argparse.Namespace, about: dict[str, Any], out: Path
) -> tuple[str, dict[str, str]]:
    """Score codes by each metric in turn, write everything down, give the table and what failed.

    A metric that cannot be computed for these codes costs its own scores only; why is in the table and in the record.
    """
    names = options.metrics or defined_metrics(factors)
    settings = check_settings(names, parse_settings(options.settings), factors)
    scalars = scalar_codes(codes, factors)
    scores: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    make_folder(out)
    constant = [int(n) for n in np.flatnonzero(~varying(scalars))]
    record = {
        **about,
        "rows": len(codes),
        "shape": list(codes.shape),
        "constant_dimensions": constant,
        "factors": dict(zip(factors.names, factors.sizes, strict=True)),
        "kind": "grid" if isinstance(factors, FactorGrid) else "labelled sample",
        "random_state": options.seed,
        "settings": settings,
        "scores": scores,
        "matrices": {},
        "seconds": seconds,
        "not_computed": failed,
    }
    bar = tqdm(settings, desc="scoring", leave=False)
    for name in bar:
        bar.set_postfix_str(name)
        start = time.perf_counter()
        try:
            scores |= evaluate(scalars, factors, [name], settings, options.seed)
        except ValueError as error:
            failed[name] = str(error)
        seconds[name] = round(time.perf_counter() - start, 3)
        record["matrices"] = {name: part.arrays for name, part in scores.items() if part.arrays}
        # After each metric, so that an interrupt costs none that is done.
        write_json(out / "scores.json", record)
    pictures = write_heatmaps(out, scores, factors.names)
    lines = [score_table(scores, factors, {name: settings[name] for name in scores})] if scores else []
    lines += [f"not computed: {name}: {message}" for name, message in failed.items()]
    lines += [f"dimensions with a single value: {', '.join(map(str, constant))}"] if constant else []
    lines += [f"time: {', '.join(f'{name} {spent:.1f} s' for name, spent in seconds.items())}"]
    return "\n".join([*lines, *(str(path) for path in (out / "scores.json", *pictures))]), failed


def make_folder(out: Path) -> None:
    """Make the folder to write to.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to the folder '{out}' ({error.strerror}): name another one by --out") from error


def rank(names: list[str], codes: list[np.ndarray], factors: Factors, options: argparse.Namespace, out: Path) -> str:
    """UDR of several codes of the same images: writes udr.json, gives a table."""
    points = min(1000, len(factors))
    lines, record = [f"UDR, {points} points (no factor is used; models that agree score high)"], {"codes": names}
    for kind in ("lasso", "spearman"):
        result = udr(codes, factors, options.seed, kind, points)
        record[kind] = {key: value.tolist() for key, value in result.items()}
        best = np.argsort(-result["model_scores"], kind="stable")
        lines += [f"  {kind:<10}{result['model_scores'][i]:.4f}  {names[i]}" for i in best]
    write_json(out / "udr.json", record)
    return "\n".join([*lines, str(out / "udr.json")])


def model_codes(
    path: Path, options: argparse.Namespace
) -> tuple[np.ndarray | None, Factors | None, Callable[[], dict]]:
    """A model's codes and their factors, None for a first stage, and what compares its images when asked to."""
    import torch

    from ldm.api import encode, load, load_config
    from ldm.util import instantiate_from_config

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    model = load(path, device, options.weights)
    if options.weights == "ema" and getattr(model, "ema_parameters", "all") != "all":
        raise ValueError(
            f"{path}: its averages are of the U-Net alone (ema_parameters: {model.ema_parameters}), and the encoder is"
            " what is scored: leave --weights out"
        )
    data = instantiate_from_config(load_config(path).data, "data")
    data.setup()
    dataset = data.datasets.get(options.split)
    if dataset is None:
        raise ValueError(f"{path}: its configuration has no data.params.{options.split}; choose another --split")

    def images() -> dict:
        from ldm.fid import fid
        from ldm.reconstruction import reconstruction_scores

        common = {"batch_size": options.batch_size, "steps": options.steps, "eta": options.eta, "seed": options.seed}
        results = {}
        if options.reconstruction:
            lpips = None if options.lpips == "none" else options.lpips
            results["reconstruction"] = reconstruction_scores(
                model, dataset, options.reconstruction, lpips=lpips, lpips_weights=options.lpips_weights, **common
            )
        if options.fid:
            results["fid"] = fid(model, dataset, options.fid, weights=options.inception_weights, **common)
        return results

    if not hasattr(getattr(model, "cond_stage_model", None), "encoding"):
        if not options.reconstruction and not options.fid:
            raise ValueError(f"{path} is a first stage without codes to score: ask for --reconstruction N or --fid N")
        return None, None, images
    factors = factors_of(dataset)
    if factors is None and not options.reconstruction and not options.fid:
        raise ValueError(f"{path}: its data have neither a factor grid nor attributes to score against")
    codes = encode(model, dataset, options.batch_size, tokens=options.of != "scalars") if factors is not None else None
    if codes is not None and options.of == "components":
        codes = codes.reshape(len(codes), -1)
    return codes, factors, images


def about(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a record says of its source: whose codes, of which weights and images, by which versions."""
    packages = ("encdiff", "numpy", "scikit-learn", "scipy", "numba")
    versions = {package: version(package) for package in packages if package_installed(package)}
    model = {"of": options.of, "weights": options.weights, "split": options.split} if options.model else {}
    return {"source": name, **model, "versions": versions}


def package_installed(package: str) -> bool:
    """Whether a package's version is known: of a plain checkout it may not be."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def sources(options: argparse.Namespace) -> Iterator[tuple[str, Path, Any]]:
    """Name, folder to write to, and codes, factors and images of each model or file."""
    paths = options.codes or options.model
    factors = parse_factors(options) if options.codes else None
    stems = [path.stem if path.is_file() else path.resolve().name for path in paths]
    for number, (path, stem) in enumerate(zip(paths, stems, strict=True)):
        if options.codes:
            content: Any = (read_codes(path), factors, dict)
            default = path.with_name(f"{stem}_scores")
        else:
            content = model_codes(path, options)
            # What is not the same is not written to the same place.
            kinds = [options.of, options.weights, options.split]
            marks = [k for k, usual in zip(kinds, ("scalars", "live", "validation"), strict=True) if k != usual]
            folder = "-".join(["evaluation", *marks])
            default = path / folder if path.is_dir() else path.parent / f"{stem}_{folder}"
        # Files of one name, such as last.ckpt of several runs, must not overwrite each other's scores.
        own = stem if stems.count(stem) == 1 else f"{number}_{stem}"
        yield str(path), options.out / own if options.out and len(paths) > 1 else options.out or default, content


def run(options: argparse.Namespace) -> None:
    """Score everything that was asked for.

    Raises:
        ValueError: bad input; one line that says what to do.
    """
    if bool(options.codes) == bool(options.model):
        raise ValueError("give trained models, or --codes FILE with --grid or --factors")
    plain = {"reconstruction": 0, "fid": 0, "of": "scalars", "weights": "live", "split": "validation", "device": None}
    given = [f"--{name}" for name, value in plain.items() if getattr(options, name) != value]
    given += ["--save-codes"] if options.save_codes else []
    arrays = [path for path in options.model if path.suffix in (".npy", ".npz")]
    if arrays:
        raise ValueError(f"{arrays[0]} is no model: give codes by --codes {arrays[0]}")
    if options.model and (options.grid or options.names or options.factors):
        raise ValueError(
            "--grid, --names and --factors go with --codes: a model is scored on the data of its configuration"
        )
    if options.codes and given:
        raise ValueError(f"{', '.join(given)}: of models, not of --codes")
    if options.metrics:
        options.metrics = [name for text in options.metrics for name in text.split(",") if name]
        if "udr" in options.metrics:
            raise ValueError("--metrics udr: UDR ranks several models or files of codes; it comes with them by itself")
    check_settings(options.metrics or METRICS, parse_settings(options.settings))
    check_seed(options.seed)
    scored: list[tuple[str, np.ndarray, Factors]] = []
    failures: list[str] = []
    for name, out, (codes, factors, images) in sources(options):
        print(f"\n{name}")
        if codes is not None and factors is not None:
            try:
                text, failed = score(codes, factors, options, about(name, options), out)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            print(text)
            failures += [f"{name}: {metric}: {message}" for metric, message in failed.items()]
            scored.append((name, codes, factors))
            if options.save_codes:
                np.save(out / "codes.npy", codes)
        results = images()
        if results:
            make_folder(out)
            path = out / "images.json"
            earlier = json.loads(path.read_text()) if path.is_file() else {}
            write_json(path, {**earlier, **about(name, options), **results})
            for kind, values in results.items():
                numbers = [f"{key} {value:.6g}" for key, value in values.items() if isinstance(value, float)]
                print(f"{kind}: {', '.join(numbers)}\n  {values['protocol']}")
            print(path)
    if len(scored) > 1:
        lengths = {len(codes) for _, codes, _ in scored}
        if len(lengths) > 1:
            raise ValueError(f"UDR compares codes of the same images, but there are {sorted(lengths)} rows")
        out = options.out or Path(scored[0][0]).resolve().parent
        print(f"\n{rank([s[0] for s in scored], [s[1] for s in scored], scored[0][2], options, out)}")

    if options.metrics and failures:
        # Asked for by name: the rest is written, but this is a mistake.
        raise ValueError("; ".join(failures))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after a mistake."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
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
    sys.exit(main())
