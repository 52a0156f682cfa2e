# Sourced by the other scripts: an environment with the project in it. Usage: . scripts/setup.sh [EXTRA]
# Takes the active virtual or conda environment; makes .venv if there is none. Installs only what has changed.
extra="${1:-}"

find_python() {
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: no Python from 3.11 to 3.13 found: install one, or activate an environment that has it" >&2
    return 1
}

if [ -z "${VIRTUAL_ENV:-}" ] && { [ -z "${CONDA_PREFIX:-}" ] || [ "${CONDA_DEFAULT_ENV:-}" = base ]; }; then
    if [ ! -x .venv/bin/python ]; then
        base_python="$(find_python)" || exit 1
        echo "making .venv with $("$base_python" --version)"
        "$base_python" -m venv .venv || { rm -rf .venv; exit 1; }
    fi
    . .venv/bin/activate
fi

# The stamp says which pyproject.toml was installed, with which extras.
environment="$(python -c 'import sys; print(sys.prefix)')"
stamp="$environment/.encdiff-installed"
wanted="$(cksum < pyproject.toml) $PWD"
if ! { [ -f "$stamp" ] && grep -qxF "$wanted" "$stamp" && { [ -z "$extra" ] || grep -qxF "extra $extra" "$stamp"; }; }; then
    echo "installing into $environment (a few minutes: PyTorch is large)"
    # A PyTorch that is there and new enough stays as it is, such as the build for CPUs (docs/training.md).
    python -c '
import re
from importlib.metadata import PackageNotFoundError, version
for name, least in ("torch", (2, 9)), ("torchvision", (0, 24)):
    try:
        if tuple(map(int, re.findall(r"\d+", version(name))[:2])) >= least:
            print(f"{name}=={version(name)}")
    except PackageNotFoundError:
        pass
' > "$stamp-constraints" || exit 1
    python -m pip install --disable-pip-version-check -c "$stamp-constraints" -e ".${extra:+[$extra]}" || exit 1
    { [ -f "$stamp" ] && grep -qxF "$wanted" "$stamp"; } || echo "$wanted" > "$stamp"
    [ -z "$extra" ] || echo "extra $extra" >> "$stamp"
fi
