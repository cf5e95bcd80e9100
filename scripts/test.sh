#!/usr/bin/env bash
# Install what the tests need, then check the code and run every test: bash scripts/test.sh [pytest arguments]
#   VENV=folder         virtual environment (default .venv); SGLANG_VENV=folder, the one with SGLang (default .venv-sglang)
#   NO_SGLANG=1         leave out the tests on the real SGLang engine and its 2.2 GB installation
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
SGLANG_VENV=${SGLANG_VENV:-.venv-sglang}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

bash scripts/install.sh "$VENV" requirements-dev.txt
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"

if [ $# -gt 0 ]; then
  exec "$VENV/bin/python" -m pytest "$@"
fi
"$VENV/bin/python" -m pytest -n 2 --dist loadfile

if [ -z "${NO_SGLANG:-}" ]; then
  bash scripts/install_sglang_cpu.sh "$SGLANG_VENV"
  "$SGLANG_VENV/bin/python" -m pytest tests/engine_lib/test_sglang_{local,runs,readme,seeded,value_local,value_remote,value_runs}.py
fi
