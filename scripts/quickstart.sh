#!/usr/bin/env bash
# The paper in miniature, without a GPU: bash scripts/quickstart.sh [--seed N] [--fast] [--clean] [--output_dir FOLDER]
# Installs into a virtual environment ($VENV, default .venv), then runs scripts/quickstart.py there: about five minutes
# on two cores. Stopped at any time, the same command goes on. PYTHON names the Python (3.11 or newer) to install with.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
VENV=${VENV:-$root/.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
bash "$root/scripts/install.sh" "$VENV"
exec "$VENV/bin/python" "$root/scripts/quickstart.py" "$@"
