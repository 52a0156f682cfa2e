#!/usr/bin/env bash
# Sets up the environment, then runs lint, types and tests. More arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh dev
echo "lint"; ruff check . && ruff format --check .
echo "types"; mypy
echo "tests"
# One thread per process: tiny tensors lose more by sharing work than they gain.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
python -m pytest -n "$(python -c 'import os; print(max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)))')" "$@"
