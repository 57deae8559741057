#!/usr/bin/env bash
# The whole pipeline on the built-in tiny set: about a quarter of an hour on two cores, no GPU, no
# downloads but packages. A second call reuses finished stages; delete out/<stage> to run one again.
# Usage: bash runs/tiny.sh
set -eu -o pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
export TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg PYTHONUNBUFFERED=1
python=.venv/bin/python
seconds=""

note() {  # remember what a stage took
    seconds+="$(printf '%-32s %4d s' "$1" $((SECONDS - $2)))"$'\n'
}

stage() {
    echo; echo "== $*"
    local start=$SECONDS
    "$python" "$@"
    note "$1" "$start"
}

stage 00_data.py
stage 01_sft.py --resume
stage 02_reward_model.py --resume
stage 03_r2_analysis.py

# Two runs at a time with one thread each do more than one run with two threads.
ppo() {
    for strategy in "$@"; do
        "$python" 04_pf_ppo.py --strategy "$strategy" --threads 1 --resume \
            > >(sed -u "s/^/[$strategy] /") 2> "out/ppo_$strategy.log" ||
            { tail -n 5 "out/ppo_$strategy.log"; return 1; }
    done
}
echo; echo "== 04_pf_ppo.py, strategy none, and beside it bw, then random2"
start=$SECONDS
ppo none & pid=$!
ppo bw random2 || { wait; exit 1; }
wait $pid
note "04_pf_ppo.py" "$start"

stage 05_eval.py --policies out/sft out/ppo_{none,random2,bw}/last --samples 4 --ks 1 4

echo; echo "== R2 of each filter on the SFT policy"; cat out/r2/table.txt
echo; echo "== pass@1 on the test problems after the last iteration"; cat out/eval/table.txt
echo; echo "== seconds"; printf '%s' "$seconds"; printf '%-32s %4d s\n' "all stages" $SECONDS
