#!/usr/bin/env bash
# Sets up the environment, then renders the built-in data, trains both stages, scores and draws. Arguments: see
# `python scripts/quickstart.py --help`.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh "" # without it, the sourced script would take this one's arguments for its own
python scripts/quickstart.py "$@"
