#!/usr/bin/env bash
# Tests of the two plug-ins in their engines, on the CPU, each in an environment of its own.
# Not part of runs/test.sh. Usage: bash scale/test.sh [pytest arguments]
set -eu
cd "$(dirname "$0")"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export RAY_USAGE_STATS_ENABLED=0 MPLBACKEND=Agg

# environment NAME PACKAGES...: torch comes first and is named again, so that pip keeps it.
environment() {
    local name=$1
    shift
    [ -x "$name/bin/python" ] || python3 -m venv "$name"
    "$name/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
    "$name/bin/pip" install --quiet --disable-pip-version-check \
        torch==2.13.0 tyro==1.0.17 tqdm pytest "$@"
}

environment .venv_trl trl==1.16.0 transformers==5.23.0
# verl's CPU extra pins torch 2.11 and pulls packages that need a GPU: what the tests need, by name.
environment .venv_verl verl==0.9.1 TransferQueue==0.1.11 transformers==5.10.4 \
    "hydra-core>=1.3" uvicorn fastapi cachetools

.venv_trl/bin/python -m pytest tests/test_trl.py "$@"
.venv_verl/bin/python -m pytest tests/test_verl.py "$@"
