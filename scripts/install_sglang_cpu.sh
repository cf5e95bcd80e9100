#!/usr/bin/env bash
# The real SGLang engine, its HTTP server and sglang-router in a virtual environment for a machine without a GPU:
#   bash scripts/install_sglang_cpu.sh FOLDER
# For tests only (2.2 GB, two to five minutes). Once it is there, a second call returns at once.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${1:?usage: bash scripts/install_sglang_cpu.sh FOLDER}
HARNESS=$PWD/tests/sglang_cpu
PYTHON=${PYTHON:-$(command -v python3.11 || command -v python3)}

STAMP="$VENV/installed-sglang-cpu"
WANTED=$(cat "$0" "$HARNESS"/requirements*.txt <(echo "$HARNESS") | sha256sum)
if [ -x "$VENV/bin/python" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$WANTED" ]; then
  exit 0
fi

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
# Linux wheels of torch on PyPI bring CUDA packages of 2 GB and more; TORCH_INDEX names an index with CPU ones.
"$VENV/bin/pip" install --quiet --disable-pip-version-check ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
"$VENV/bin/pip" install --quiet --disable-pip-version-check --no-deps -r "$HARNESS/requirements-nodeps.txt"
# pip then says that sglang misses packages: those are for GPUs.
"$VENV/bin/pip" install --quiet --disable-pip-version-check -r "$HARNESS/requirements.txt"

# Every Python of this environment, sglang's child processes too, finds the stand-ins for what cannot be installed.
SITE=$("$VENV/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
printf '%s\nimport sglang_cpu_shims\n' "$HARNESS/shims" > "$SITE/sglang_cpu.pth"
"$VENV/bin/python" -W ignore -c "import sglang; print('sglang', sglang.__version__, 'for the CPU in $VENV')"
echo "$WANTED" > "$STAMP"
