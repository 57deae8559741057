#!/usr/bin/env bash
# Set up a virtual environment, check the format, run all tests: about five minutes on two cores.
# Usage: bash runs/test.sh [pytest arguments]
set -eu
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-lora.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# One PyTorch thread and one sandbox worker on two cores do not slow each other down.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 MPLBACKEND=Agg
# loadgroup, without groups, hands out one test at a time: the shortest way with few long tests.
exec .venv/bin/python -m pytest -n 2 --dist loadgroup "$@"
