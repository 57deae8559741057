#!/usr/bin/env bash
# The whole pipeline on the built-in tiny set: about a quarter of an hour on two cores, no GPU, no downloads but packages.
# A second call reuses finished stages; delete out/<stage> to run that stage again. Usage: bash runs/tiny.sh
set -eu -o pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
export TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg PYTHONUNBUFFERED=1
python=.venv/bin/python
shares=""

stage() {  # run one stage and note its share of the time
    echo; echo "== $*"
    local start=$SECONDS
    "$python" "$@"
    shares="$shares$(printf '%-28s %4d s' "$1" $((SECONDS - start)))"$'\n'
}

started=$SECONDS
stage 00_data.py
stage 01_sft.py --resume
stage 02_reward_model.py --resume
stage 03_r2_analysis.py

# Four strategies: two runs at a time with one thread each do more than one run with two threads.
for pair in "none bw" "br random2"; do
    echo; echo "== 04_pf_ppo.py, strategies $pair, side by side"
    start=$SECONDS
    jobs=""
    for strategy in $pair; do
        "$python" 04_pf_ppo.py --strategy "$strategy" --threads 1 --resume > >(sed -u "s/^/[$strategy] /") &
        jobs="$jobs $!"
    done
    for job in $jobs; do wait "$job"; done
    shares="$shares$(printf '%-28s %4d s' "04_pf_ppo.py ($pair)" $((SECONDS - start)))"$'\n'
done

stage 05_eval.py --policies out/sft out/ppo_none/best out/ppo_random2/best out/ppo_br/best out/ppo_bw/best

echo; echo "== R2 of each filter on the SFT policy"; cat out/r2/table.txt
echo; echo "== pass@1 on the test problems (best: the checkpoint with the best validation pass@1)"; cat out/eval/table.txt
echo "== seconds"; printf '%s' "$shares"; printf '%-28s %4d s\n' "all stages" $((SECONDS - started))
