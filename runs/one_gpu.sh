#!/usr/bin/env bash
# PF-PPO with a real model on one GPU of 24, 48 or 80 GB: fine-tuning, reward model, R2, PPO with and without the filter,
# greedy pass@1 on HumanEval and MBPP. A second call goes on where the first one stopped.
#
#   bash runs/one_gpu.sh                                   Qwen2.5-Coder-0.5B
#   MODEL=Qwen/Qwen2.5-Coder-1.5B bash runs/one_gpu.sh     any causal language model of the hub, or a folder
#   PLAN=1 CARD_GB=24 bash runs/one_gpu.sh                 what such a card would run, and its memory; nothing is run
#   GPUS=2 bash runs/one_gpu.sh                            stages 1, 2 and 4 shared by two GPUs of one machine
#
# More variables: OUT, DATA (folders), FILES (a folder with magicoder.jsonl, mbpp.jsonl and humaneval.jsonl, where there is no
# hub), PYTHON (an environment of your own instead of .venv), TOKENS (longest response), and flags that come last in a
# stage's command: SFT_FLAGS, RM_FLAGS, R2_FLAGS, PPO_FLAGS, EVAL_FLAGS.
#
# The learning rates are the paper's for its 6.7B model, scaled with one over the square root of the size, ten times larger for
# LoRA. They are rules of thumb, not tuned, and no GPU was at hand: see the README for what has been checked.
set -eu -o pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-Qwen/Qwen2.5-Coder-0.5B}
DATA=${DATA:-data}
OUT=${OUT:-out/$(basename "$MODEL")}
GPUS=${GPUS:-1}
TOKENS=${TOKENS:-512}
python=${PYTHON:-.venv/bin/python}
if [ -z "${PYTHON:-}" ]; then
    [ -x "$python" ] || python3 -m venv .venv
    "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
fi
export TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg PYTHONUNBUFFERED=1
export PYTORCH_ALLOC_CONF=expandable_segments:True  # widths change with every batch: fragments would fill the card
if [ -z "${PLAN:-}" ] && command -v nvidia-smi > /dev/null && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "one_gpu.sh: error: PyTorch cannot use this GPU; update its driver, or set PYTHON to an environment with a CUDA build that fits" >&2
    exit 2
fi
"$python" -c 'import torch
for i in range(torch.cuda.device_count()): p = torch.cuda.get_device_properties(i); print(f"{p.name}, {p.total_memory / 2**30:.0f} GB")
if not torch.cuda.is_available(): print("no GPU: this will take very long")'

# ---- the first of these that fits: rows in training, rows in generation, other flags
# (320 rows are all responses of an iteration at once: a pass costs its number of tokens, hardly its number of rows)
settings=("8 320" "8 320 --gradient_checkpointing" "4 160 --gradient_checkpointing"
          "8 320 --gradient_checkpointing --lora_rank 16" "4 160 --gradient_checkpointing --lora_rank 16"
          "4 30 --gradient_checkpointing --lora_rank 16")
ppo="--max_new_tokens $TOKENS --prompts_per_iteration 64 --responses_per_prompt 5 --minibatch_size 64 --score_batch_size 16"
for setting in "${settings[@]}"; do
    read -r micro rows memory <<< "$setting"
    if [[ $memory == *lora* ]] && ! "$python" -c "import peft" 2> /dev/null; then
        "$python" -m pip install --quiet --disable-pip-version-check -r requirements-lora.txt
    fi
    plan=$("$python" 04_pf_ppo.py --plan ${CARD_GB:+--card_gb "$CARD_GB"} --policy "$MODEL" --reward_model "$MODEL" $ppo \
        --micro_batch_size "$micro" --generate_batch_size "$rows" $memory)
    if [[ $plan == *"it fits"* ]]; then break; fi
done
echo "$plan"
if [[ $plan != *"it fits"* ]]; then echo "one_gpu.sh: error: $MODEL does not fit; take a smaller MODEL" >&2; exit 2; fi
echo "flags: --micro_batch_size $micro --generate_batch_size $rows $memory"

scaled() {  # a learning rate of the paper's 6.7B model, for a model of so many million parameters
    awk -v rate="$1" -v lora="$([[ $memory == *lora* ]] && echo 10 || echo 1)" \
        '$1 == "policy" { printf "%.1e", rate * sqrt(6700 / ($2 < 1 ? 1 : $2)) * lora; exit }' <<< "$plan"
}

stage() {
    echo; echo "== $*"
    [ -n "${PLAN:-}" ] || "$python" "$@"
}

shared() {  # a stage that several GPUs can share
    if [ "$GPUS" -gt 1 ]; then stage -m torch.distributed.run --standalone --nproc_per_node="$GPUS" "$@"; else stage "$@"; fi
}

# ---- 0: MBPP's training problems (halves for the reward model and PPO), its validation problems choose the best checkpoint;
#         HumanEval and MBPP's test problems choose nothing
for dataset in magicoder mbpp humaneval; do
    stage 00_data.py --dataset $dataset --out "$DATA/$dataset" ${FILES:+--file "$FILES/$dataset.jsonl"}
done
# The solutions of HumanEval must pass: if they do not, the sandbox cannot work on this machine.
stage 05_eval.py --policies canonical --problems "$DATA/humaneval/test.jsonl" --samples 0 --timeout 3 --out "$OUT/eval_canonical"
if [ -z "${PLAN:-}" ] && ! grep -q "^canonical  *1.000" "$OUT/eval_canonical/table.txt"; then
    rm -rf "$OUT/eval_failed"; mv "$OUT/eval_canonical" "$OUT/eval_failed"    # so that the next call asks again
    echo "one_gpu.sh: error: solutions of HumanEval fail in the sandbox ($OUT/eval_failed/samples.jsonl); no label can be trusted" >&2
    exit 2
fi

# ---- 1 to 3
shared 01_sft.py --model "$MODEL" --data "$DATA/magicoder/sft.jsonl" --out "$OUT/sft" --lr "$(scaled 1e-5)" --epochs 2 \
    --max_length 1024 --batch_size 64 --micro_batch_size "$micro" $memory --resume ${SFT_FLAGS:-}
shared 02_reward_model.py --policy "$OUT/sft" --data "$DATA/mbpp/rm.jsonl" --out "$OUT/rm" --lr "$(scaled 1e-5)" --pairs all \
    --responses_per_prompt 10 --max_new_tokens "$TOKENS" --timeout 3 --micro_batch_size $((micro / 2)) \
    --generate_batch_size "$rows" --score_batch_size 16 $memory --resume ${RM_FLAGS:-}
stage 03_r2_analysis.py --policies "$OUT/sft" --reward_model "$OUT/rm" --data "$DATA/mbpp/validation.jsonl" --out "$OUT/r2" \
    --max_new_tokens "$TOKENS" --timeout 3 --generate_batch_size "$rows" --score_batch_size 16 ${R2_FLAGS:-}

# ---- 4: five passes over the 187 prompts, each response used three times, as in the paper; none is the control without a filter
for strategy in bw none; do
    shared 04_pf_ppo.py --strategy $strategy --policy "$OUT/sft" --reward_model "$OUT/rm" --data "$DATA/mbpp/ppo.jsonl" \
        --validation "$DATA/mbpp/validation.jsonl" --out "$OUT/ppo_$strategy" --iterations 15 --epochs 3 \
        --eval_every 3 --state_every 3 --lr "$(scaled 5e-7)" --critic_lr "$(scaled 9e-6)" --kl_coef 0.01 --timeout 3 --workers 0 $ppo \
        --micro_batch_size "$micro" --generate_batch_size "$rows" $memory --resume ${PPO_FLAGS:-}
done

# ---- 5: greedy, as in the paper's Table 2
stage 05_eval.py --policies "$OUT/sft" "$OUT/ppo_none/best" "$OUT/ppo_bw/best" --out "$OUT/eval" --samples 0 \
    --problems "$DATA/humaneval/test.jsonl" "$DATA/mbpp/test.jsonl" --max_new_tokens "$TOKENS" --timeout 3 \
    --generate_batch_size "$rows" ${EVAL_FLAGS:-}
