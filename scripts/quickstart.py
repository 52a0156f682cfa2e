"""The whole job on the built-in data: render, train both stages, score before and after, draw, and print a table."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.api import load, load_config
from ldm.bars import log_to_screen
from ldm.cli.main import main as train
from ldm.config import load_yaml, merge
from ldm.data.files import atomic_output
from ldm.evaluation.codes import encode
from ldm.evaluation.reconstruction import reconstruction_scores
from ldm.evaluation.runs import figures_of, newest_run, record_at
from ldm.metrics.evaluate import evaluate
from ldm.util import UserError, instantiate_from_config

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "quickstart"
FAST = ROOT / "configs" / "fast.yaml"
CKPT_KEY = "model.params.first_stage_config.params.ckpt_path"
ROWS = (
    ("FactorVAE score", "factor_vae", "eval_accuracy"),
    ("DCI disentanglement", "dci", "disentanglement"),
    ("DCI completeness", "dci", "completeness"),
    ("beta-VAE score", "beta_vae", "eval_accuracy"),
    ("MIG", "mig", "discrete_mig"),
)


def run_stage(configs: list[Path], logdir: Path, seed: int, score: bool, overrides: list[str]) -> Path:
    """Train one stage; gives its log directory. Ends the program if training was stopped or refused."""
    before = set(logdir.glob("*"))
    bases = [str(config) for config in configs]
    name = ["-n", configs[0].stem]
    argv = ["--base", *bases, "-t", *name, "-l", str(logdir), "-s", str(seed), *overrides]
    status = train(argv, score=score, summary=False)  # the table at the end says it all
    if status:
        sys.exit(status)
    made = newest_run(sorted(set(logdir.glob("*")) - before))
    assert made is not None
    return made


def untrained(config: Any, seed: int) -> Any:
    """The model as training finds it."""
    pl.seed_everything(seed, verbose=False)
    return instantiate_from_config(config.model, "model", "Lightning module").eval()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--logdir", type=Path, default=Path("logs/quickstart"), help="folder of the log directories")
    parser.add_argument("--seed", type=int, default=23)
    parser.add_argument("--first-stage", type=Path, default=CONFIGS / "first_stage.yaml", help="its configuration")
    parser.add_argument("--encdiff", type=Path, default=CONFIGS / "encdiff.yaml", help="its configuration")
    parser.add_argument("--longer", action="store_true",
                        help="more steps, on 128,000 rooms; takes .4 GB of disk more")  # fmt: skip
    parser.add_argument("--plain", action="store_true", help="without configs/fast.yaml, in float32")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for the configuration of EncDiff")
    return parser.parse_args()


def main() -> None:
    """Run the quickstart."""
    opt = arguments()
    log_to_screen()
    start = time.perf_counter()
    first_stage, encdiff = [opt.first_stage], [opt.encdiff]
    if opt.longer:
        first_stage.append(CONFIGS / "longer" / "first_stage.yaml")
        encdiff.append(CONFIGS / "longer" / "encdiff.yaml")
    if not opt.plain:
        first_stage.append(FAST)
        encdiff.append(FAST)
    data = instantiate_from_config(merge([load_yaml(path) for path in encdiff]).data, "data", "data module")
    data.setup()
    dataset = data.datasets["validation"]
    marks = [("data", time.perf_counter())]

    first_config = load_yaml(opt.first_stage)
    mse = [reconstruction_scores(untrained(first_config, opt.seed), dataset, lpips=None)["mse"]]
    first = run_stage(first_stage, opt.logdir, opt.seed, False, [])
    mse.append(reconstruction_scores(load(first), dataset, lpips=None)["mse"])
    marks.append(("first stage", time.perf_counter()))

    checkpoint = f"{CKPT_KEY}={first / 'checkpoints' / 'last.ckpt'}"
    second = run_stage(encdiff, opt.logdir, opt.seed, True, [checkpoint, *opt.overrides])
    marks.append(("EncDiff", time.perf_counter()))

    record = record_at(second, strict=True)
    if not record:
        raise UserError(f"{second} holds no scores: the quickstart's configuration must have metrics")
    # The same points, settings, seed and precision for the model before its training.
    scalars = encode(untrained(load_config(second), opt.seed), dataset, dtype=record.get("dtype", "float32"))
    before = evaluate(scalars, dataset.grid, record["settings"], record["settings"], record["random_state"])
    marks.append(("scores before", time.perf_counter()))
    report(opt, dataset, first, second, mse, before, record, start, marks)


def report(opt, dataset, first, second, mse, before, record, start, marks) -> None:
    """Print the table and the paths, and write them down."""
    lines = [f"{'':<34}{'before':>10}{'after':>10}"]
    lines.append(f"{'first stage: MSE, images in [0, 1]':<34}{mse[0]:>10.5f}{mse[1]:>10.5f}")
    for title, metric, entry in ROWS:
        if metric in record["scores"]:
            lines.append(f"{title:<34}{before[metric][entry]:>10.3f}{record['scores'][metric][entry]:>10.3f}")
    counts = [
        f"{name} " + "/".join(f"{values[key]:,}" for key in ("num_train", "num_test", "num_eval") if key in values)
        for name, values in record["settings"].items()
    ]
    lines += [
        "",
        f"grid: {dataset.grid.describe()} = {len(dataset):,} images of {dataset.image_size} x {dataset.image_size}",
        f"samples: {', '.join(counts)}; MSE on {min(1000, len(dataset)):,} images",
    ]
    previous, parts = start, []
    for name, moment in marks:
        parts.append(f"{name} {moment - previous:.0f} s")
        previous = moment
    lines.append(f"time: {', '.join(parts)}; {(previous - start) / 60:.1f} minutes in all")
    lines += [
        "",
        f"{'first stage':<16}{first / 'checkpoints' / 'last.ckpt'}",
        f"{'EncDiff':<16}{second / 'checkpoints' / 'last.ckpt'}",
    ]
    drawn = figures_of(second)
    for name in ("reconstructions", "swaps", "traversals", "attention", "matrices"):
        lines += [f"{name:<16}{drawn[name][0]}"] if name in drawn else []
    if (second / "report.html").is_file():
        lines.append(f"{'report':<16}{second / 'report.html'}")
    lines.append(f"{'scores':<16}{second / 'metrics'}")
    lines.append(f"{'TensorBoard':<16}tensorboard --logdir {opt.logdir}")
    text = "\n".join(lines)
    with atomic_output(second / "quickstart.txt") as part:
        part.write_text(text + "\n")
    print(f"\n{text}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
