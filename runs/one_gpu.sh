#!/usr/bin/env bash
# PF-PPO with a real model on one GPU: LeetCodeDataset trains stages 1 to 4, HumanEval, HumanEval+
# and MBPP test it. A second call goes on where the first stopped. docs/gpu.md says which flag saves
# what; add such flags in FLAGS.
#
#   bash runs/one_gpu.sh
#   MODEL=Qwen/Qwen2.5-Coder-1.5B FLAGS="--gradient_checkpointing --micro_batch_size 4" bash runs/one_gpu.sh
#
# The learning rates are the paper's for 6.7B parameters, times four for a smaller model: a rule of
# thumb, not tuned. With --lora_rank in FLAGS, multiply them by ten: set LR_SFT, LR_RM, LR, LR_CRITIC.
set -eu -o pipefail
cd "$(dirname "$0")/.."
model=${MODEL:-Qwen/Qwen2.5-Coder-0.5B}
out=${OUT:-out/$(basename "$model")}
flags="--micro_batch_size 8 ${FLAGS:-}"
sampling="--max_new_tokens 512 --timeout 5 --workers 0 --generate_batch_size 320 --score_batch_size 16"
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || { python3 -m venv .venv; .venv/bin/pip install --quiet -r requirements.txt -r requirements-lora.txt; }
export TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg PYTORCH_ALLOC_CONF=expandable_segments:True

for dataset in leetcodedataset humaneval humaneval_plus mbpp; do
    "$python" 00_data.py --dataset "$dataset"
done
"$python" 01_sft.py --model "$model" --data data/leetcodedataset/sft.jsonl --out "$out/sft" --epochs 3 \
    --max_length 1024 --lr "${LR_SFT:-4e-5}" --resume $flags
"$python" 02_reward_model.py --policy "$out/sft" --data data/leetcodedataset/rm.jsonl --out "$out/rm" \
    --validation data/leetcodedataset/validation.jsonl --responses_per_prompt 10 --lr "${LR_RM:-4e-5}" \
    --resume $sampling $flags
"$python" 03_r2_analysis.py --samples "$out/rm/validation_samples.jsonl" --out "$out/r2"
for strategy in none random2 bw; do
    "$python" 04_pf_ppo.py --strategy "$strategy" --policy "$out/sft" --reward_model "$out/rm" \
        --data data/leetcodedataset/ppo.jsonl --validation data/leetcodedataset/validation.jsonl \
        --out "$out/ppo_$strategy" --iterations 30 --prompts_per_iteration 64 --minibatch_size 64 --epochs 3 \
        --lr "${LR:-2e-6}" --critic_lr "${LR_CRITIC:-4e-5}" --kl_coef 0.01 --resume $sampling $flags
done
"$python" 05_eval.py --policies "$out"/{sft,ppo_none/last,ppo_random2/last,ppo_bw/last} --samples 0 \
    --problems data/{humaneval,humaneval_plus,mbpp}/test.jsonl --out "$out/eval" $sampling
