"""One table of speeds: the release's way of doing each thing against the fast path, timed in turns.

python scripts/bench.py                         all rows, on the GPU if there is one
python scripts/bench.py --quick --json FILE     in under five minutes on two cores
python scripts/bench.py --only train sample     some rows
python scripts/bench.py --growth                by batch size, image size, tokens and number of images

The release's way is in bench_release.py: eager, float32, contiguous, with the operations of LDM in 2022. The fast path
is what configs/fast.yaml turns on. Images and weights are random. A ratio is the median over pairs of turns, with the
least and the largest of them.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench_growth import growth, growth_table
from bench_machine import describe
from bench_process import first_step_seconds, help_seconds
from bench_rows import RELEASED_STEPS, codes, loader, operations, sample
from bench_training import compare, lpips_parameters

RATIOS = ("train", "first_stage", "sample", "encode", "encode_bf16")
COMPARED = (*RATIOS, "loader")
ROWS = (*COMPARED, "startup", "flops")


def comparisons(options: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Any]]:
    """What computes each row that has a ratio."""
    device, size, quick = options.device, options.batch_size, options.quick
    cuda = device == "cuda"
    pairs, budget = (3, 20.0) if quick else (7, 120.0)
    images, encoded = max(4 * size, 512 if quick else 4096), 2048 if quick else 8192
    # On a CPU one epoch is over before turns count: latents are kept from then on, as in all but the first epoch.
    known = images if cuda else 3 * size
    lpips = lpips_parameters(options.lpips, folder)
    steps = 20 if quick and not cuda else RELEASED_STEPS
    return {
        "train": lambda: compare("train", device, size, pairs, budget, images=known),
        "first_stage": lambda: compare("first_stage", device, size, pairs, budget, images=images, extra=lpips),
        "sample": lambda: sample(device, folder, pairs, budget, 64 if cuda else 8, steps),
        "encode": lambda: codes(device, folder, pairs, budget, encoded),
        "encode_bf16": lambda: codes(device, folder, pairs, budget, encoded, half=True),
        "loader": lambda: loader(folder, pairs, budget, size, 4096),
    }


def _summary(compute: Callable[[], Any]) -> Any:
    return compute().summary()


def measure(options: argparse.Namespace, folder: Path, report: Callable[[str, dict[str, Any]], None]) -> dict[str, Any]:
    """All rows that were asked for, by name; reports after each. A row that fails holds its `error`."""
    found: dict[str, Any] = {}
    device, size = options.device, options.batch_size
    rows: dict[str, Callable[[], Any]] = {}
    for name, compute in comparisons(options, folder).items():
        rows[name] = partial(_summary, compute)
    rows["startup"] = lambda: {
        "help": help_seconds(1 if options.quick else 3),
        "first_step_plain": first_step_seconds(device, size, folder, fast=False),
        "first_step_fast": first_step_seconds(device, size, folder, fast=True),
    }
    rows["flops"] = lambda: operations(device, folder, found.get("train"))
    for name in options.only or ROWS:
        start = time.perf_counter()
        try:
            found[name] = rows[name]()
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        report(f"{name}: {found[name].get('error', 'done')}, {time.perf_counter() - start:.0f} s", found)
    return found


def table(rows: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| | release's way | fast | ratio (least to largest) | |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | | failed | | {' '.join(row['error'].split())[-200:]} |")
        elif name in COMPARED:
            cells = [f"{row['plain']:.4g} {row['unit']}", f"{row['fast']:.4g} {row['unit']}"]
            cells += [f"{row['ratio']:.2f} ({row['least']:.2f} to {row['largest']:.2f})", row["note"]]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    for stage in ("train", "first_stage"):
        if memory := rows.get(stage, {}).get("memory"):
            plain, fast = memory["plain"], memory["fast"]
            lines.append(f"| peak memory, {stage} | {plain:.0f} MiB | {fast:.0f} MiB | {plain / fast:.2f} | |")
    startup, flops = ({} if "error" in rows.get(name, {}) else rows.get(name, {}) for name in ("startup", "flops"))
    if startup:
        lines.append(f"| main_val.py --help | | {startup['help']:.1f} s | | |")
        without, fast = startup["first_step_plain"], startup["first_step_fast"]
        lines.append(f"| first step of EncDiff, 512 images | | {fast:.1f} s | | without fast.yaml {without:.1f} s |")
    if flops:
        products = [f"{kind} {flops[f'product_{kind}_gflops']:.0f}" for kind in ("float32", "bfloat16")]
        done = [
            f"{flops[key]:.0f} GFLOP/s" if (key := f"train_{way}_gflops") in flops else "" for way in ("plain", "fast")
        ]
        lines.append(f"| operations of train | {' | '.join(done)} | | matrix product: {', '.join(products)} GFLOP/s |")
    return lines


def machine_line(machine: dict[str, Any]) -> str:
    """The machine and the versions, in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    what = machine.get("gpu") or f"{machine['processor']} ({', '.join(machine['flags'])})"
    return f"{what}, {machine['cores']} cores, {machine['threads']} threads; Python {machine['python']}, {versions}"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"default here: {default}")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=f"any of {', '.join(ROWS)}")
    parser.add_argument("--batch-size", type=int, help="of training and loading: 32 on a CPU, 128 on a GPU")
    parser.add_argument("--quick", action="store_true", help="fewer turns, and 20 of DDIM's 200 steps on a CPU")
    parser.add_argument(
        "--lpips", metavar="FILE", help="train the first stage with LPIPS: VGG16's weights, or 'random'"
    )
    parser.add_argument("--growth", action="store_true", help="the second table instead of the first")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything there too")
    options = parser.parse_args(argv)
    if options.batch_size is None:
        options.batch_size = 128 if options.device == "cuda" else 32
    if options.batch_size < 4:
        parser.error("argument --batch-size: expected at least 4")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    options = parse(argv)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    result: dict[str, Any] = {"machine": describe(options.device)}
    start = time.perf_counter()
    print(machine_line(result["machine"]))

    def write() -> None:
        result["seconds"] = time.perf_counter() - start
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=2) + "\n")

    def report(line: str, rows: dict[str, Any]) -> None:
        print(line, file=sys.stderr, flush=True)
        result["ratios"] = {row: rows[row]["ratio"] for row in RATIOS if "ratio" in rows.get(row, {})}
        result["rows"] = rows
        write()  # after each row, so that what was measured stays if the next one fails

    with tempfile.TemporaryDirectory() as name:
        if options.growth:
            result["growth"] = growth(options.device, Path(name), options.batch_size, 10.0 if options.quick else 60.0)
            lines = growth_table(result["growth"])
        else:
            lines = table(measure(options, Path(name), report))
    write()
    print("\n".join(["", *lines, "", f"in {result['seconds']:.0f} s"]))
    if any("error" in row for row in result.get("rows", {}).values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
