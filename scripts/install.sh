#!/usr/bin/env bash
# Make a virtual environment with what a laptop or CI needs: bash scripts/install.sh FOLDER [more requirement files ...]
# Does nothing where it is up to date. Needs Python 3.11 or newer; PYTHON names one.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
shift
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "error: Python 3.11 or newer is needed, and '$python' is not; set PYTHON=/path/to/python3.11" >&2
  exit 2
fi
requirements=(requirements-cpu.txt "$@")
wanted=$(cat "${requirements[@]}" | cksum)
if [ "$(cat "$venv/.installed" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi
echo "Installing ${requirements[*]} into $venv (torch and friends, about 1.5 GB)"
if [ ! -x "$venv/bin/python" ] && ! "$python" -m venv "$venv"; then
  echo "error: '$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
  exit 2
fi
install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
# The CPU build first: where PyPI's torch would bring CUDA packages, set TORCH_INDEX=https://download.pytorch.org/whl/cpu
"${install[@]}" "$(grep -E '^torch==' requirements-cpu.txt)" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
"${install[@]}" ${requirements[@]/#/-r }
"${install[@]}" --no-deps --no-build-isolation --editable . 2>/dev/null || "${install[@]}" --no-deps --editable .
echo "$wanted" > "$venv/.installed"
