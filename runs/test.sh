#!/usr/bin/env bash
# Set up a virtual environment and run all tests. Usage: bash runs/test.sh [pytest arguments]
set -eu
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-lora.txt
# Two test processes with one PyTorch thread each: a second thread, or a third process, would slow two cores down.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 MPLBACKEND=Agg
# The tests of a file stay together: many of them share what the first one makes.
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
