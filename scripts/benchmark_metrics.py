"""Time the release's validation suite on the grids of the real data sets, and DCI against scikit-learn.

python scripts/benchmark_metrics.py                        all three grids, with our gradient boosting
python scripts/benchmark_metrics.py --sklearn shapes3d     scikit-learn's DCI too, on one core: 6 to 22 minutes
python scripts/benchmark_metrics.py --samples shapes3d     time of DCI by number of training points
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.factors import FactorGrid
from ldm.metrics.evaluate import SUITE, evaluate
from ldm.metrics.sampling import Scores, available_cores

GRIDS = {"shapes3d": (10, 10, 10, 8, 4, 15), "mpi3d": (6, 6, 2, 3, 3, 40, 40), "cars3d": (4, 24, 183)}


def example_codes(grid: FactorGrid, width: int = 20) -> np.ndarray:
    """Codes (m, width) float32: a noisy dimension for each factor, one mixture of two factors, and noise."""
    random, codes = np.random.RandomState(11), np.empty((len(grid), width), dtype=np.float32)
    # In pieces, so that the peak of memory is that of the metrics.
    for rows in np.array_split(np.arange(len(grid)), 1 + len(grid) // 10000):
        factors = grid.factors(rows) / np.array(grid.sizes)
        part = 0.25 * random.standard_normal((len(rows), width))
        part[:, : grid.num_factors] += factors
        part[:, grid.num_factors] += factors[:, 0] * factors[:, 1]
        codes[rows] = part
    return codes


def timed(codes: np.ndarray, grid: FactorGrid, metric: str, **settings: object) -> tuple[Scores, float]:
    """Scores of one metric, and its time in seconds."""
    start = time.perf_counter()
    scores = evaluate(codes, grid, [metric], {metric: settings})[metric]
    return scores, time.perf_counter() - start


def peak_memory() -> float:
    """Peak resident memory of this process in MiB, libraries and codes included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", nargs="*", default=list(GRIDS), metavar="GRID", help=f"any of {', '.join(GRIDS)}")
    parser.add_argument("--sklearn", action="store_true", help="also time scikit-learn's DCI on one core")
    parser.add_argument("--samples", action="store_true", help="also time DCI for several numbers of training points")
    options = parser.parse_args()
    for name in options.grids:
        if name not in GRIDS:
            parser.error(f"unknown grid '{name}'; known are {', '.join(GRIDS)}")
    small = FactorGrid((3, 4))
    start = time.perf_counter()
    # Numba compiles at first use and keeps the result on disk.
    evaluate(example_codes(small, 4), small, SUITE, {m: {"num_train": 50} for m in SUITE})
    print(f"compiling or loading: {time.perf_counter() - start:.1f} s; {available_cores()} cores")
    for name in options.grids:
        grid = FactorGrid(GRIDS[name])
        codes = example_codes(grid)
        results = {metric: timed(codes, grid, metric) for metric in SUITE}
        total = sum(seconds for _, seconds in results.values())
        parts = ", ".join(f"{metric} {seconds:.2f}" for metric, (_, seconds) in results.items())
        print(
            f"{name}: {total:.1f} s ({parts}); peak {peak_memory():.0f} MiB, of which codes {codes.nbytes / 2**20:.0f}"
        )
        if options.samples:
            for count in (2500, 5000, 10000, 20000, 40000):
                seconds = timed(codes, grid, "dci", num_train=count)[1]
                print(f"  {count:>6} training points: {seconds:6.2f} s, {1e3 * seconds / count:.3f} ms each")
        if options.sklearn:
            theirs, seconds = timed(codes, grid, "dci", backend="sklearn", num_jobs=1)
            ours, own = results["dci"]
            print(f"  scikit-learn's DCI on one core: {seconds:.1f} s, {seconds / own:.1f} times ours")
            for entry, value in ours.items():
                print(f"    {entry:<24}{value:.4f}, scikit-learn's {theirs[entry]:.4f}")
            rest = total - own
            print(f"  with {rest:.1f} s for the other metrics: {(seconds + rest) / total:.1f} times ours")


if __name__ == "__main__":
    main()
