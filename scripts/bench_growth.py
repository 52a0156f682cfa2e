"""Second table of `bench.py`: how times grow with batch size, image size, tokens and number of images."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_rows import loader
from bench_training import compare

from ldm.factors import FactorGrid
from ldm.metrics.evaluate import SUITE, evaluate

GRIDS = ((10, 10, 4, 5, 3), (10, 10, 10, 8, 8), (10, 10, 10, 8, 4, 15))  # 6,000, 64,000 and 480,000 images


def scoring_seconds(sizes: tuple[int, ...]) -> float:
    """Seconds to score random codes (images, 20) of a factor grid by the metrics of the shipped configurations."""
    grid = FactorGrid(sizes)
    codes = np.random.default_rng(0).standard_normal((len(grid), 20), dtype=np.float32)
    start = time.perf_counter()
    evaluate(codes, grid, SUITE)
    return time.perf_counter() - start


def growth(device: str, folder: Path, batch_size: int, budget: float) -> list[dict[str, Any]]:
    """Rows `what`, `size`, and the summary of a comparison; of scoring, only its `seconds`.

    Args:
        device: cpu or cuda.
        folder: for synthetic images.
        batch_size: where it is not what grows.
        budget: seconds for each comparison.
    """
    pairs, images = 3, 4 * batch_size
    tokens = "model.params.{}.params.latent_unit={}"
    sizes: list[tuple[str, int, dict[str, Any]]] = []
    sizes += [("batch size", size, {"batch_size": size, "images": 4 * size}) for size in (batch_size // 4, batch_size)]
    sizes += [("batch size", 2 * batch_size, {"batch_size": 2 * batch_size, "images": 8 * batch_size})]
    sizes += [("image size", size, {"image_size": size}) for size in (32, 64, 128)]
    for count in (5, 20, 80):
        extra = [tokens.format(part, count) for part in ("unet_config", "cond_stage_config")]
        sizes.append(("tokens", count, {"extra": extra}))
    found = []
    for what, size, settings in sizes:
        settings = {"batch_size": batch_size, "images": images, **settings}
        timing = compare("train", device, pairs=pairs, budget=budget, **settings)
        found.append({"what": f"training, {what}", "size": size, **timing.summary()})
    for count in (4096, 65536):
        timing = loader(folder, pairs, budget, batch_size, count)
        found.append({"what": "loading, images", "size": count, **timing.summary()})
    scoring_seconds(GRIDS[0])  # compiles
    found += [
        {"what": "scoring, images", "size": int(np.prod(sizes)), "seconds": scoring_seconds(sizes)} for sizes in GRIDS
    ]
    return found


def growth_table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| | size | release's way | fast | ratio |", "|---|---|---|---|---|"]
    for row in rows:
        if "seconds" in row:
            cells = ["", f"{row['seconds']:.2f} s", ""]
        else:
            cells = [f"{row['plain']:.4g} {row['unit']}", f"{row['fast']:.4g} {row['unit']}", f"{row['ratio']:.2f}"]
        lines.append(f"| {row['what']} | {row['size']:,} | {' | '.join(cells)} |")
    return lines
