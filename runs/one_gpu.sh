#!/usr/bin/env bash
# PF-PPO with a real model on one GPU: LeetCodeDataset trains stages 1 to 4, HumanEval and MBPP test
# it. A second call goes on where the first stopped. FLAGS goes to every stage that trains, see
# docs/gpu.md: MODEL=Qwen/Qwen2.5-Coder-1.5B FLAGS="--micro_batch_size 4" bash runs/one_gpu.sh
# Learning rates are the paper's for 6.7B parameters times four, not tuned; LoRA needs ten times more.
set -eu -o pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-lora.txt
export TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg PYTORCH_ALLOC_CONF=expandable_segments:True
python=.venv/bin/python model=${MODEL:-Qwen/Qwen2.5-Coder-0.5B} data=data/leetcodedataset
out=${OUT:-out/$(basename "$model")}
flags="--resume --micro_batch_size 8 ${FLAGS:-}"
sampling="--max_new_tokens 512 --timeout 5 --workers 0 --generate_batch_size 320 --score_batch_size 16"

for name in leetcodedataset humaneval humaneval_plus mbpp; do "$python" 00_data.py --dataset $name; done
"$python" 01_sft.py --model "$model" --data $data/sft.jsonl --out "$out/sft" --epochs 3 \
    --max_length 1024 --lr "${LR_SFT:-4e-5}" $flags
"$python" 02_reward_model.py --policy "$out/sft" --data $data/rm.jsonl --out "$out/rm" \
    --validation $data/validation.jsonl --responses_per_prompt 10 --epochs 2 \
    --lr "${LR_RM:-4e-5}" $sampling $flags
"$python" 03_r2_analysis.py --samples "$out/rm/validation_samples.jsonl" --out "$out/r2"
for strategy in none random2 bw; do
    "$python" 04_pf_ppo.py --strategy $strategy --policy "$out/sft" --reward_model "$out/rm" \
        --data $data/ppo.jsonl --validation $data/validation.jsonl --out "$out/ppo_$strategy" \
        --iterations 30 --prompts_per_iteration 64 --minibatch_size 64 --epochs 3 --kl_coef 0.01 \
        --lr "${LR:-2e-6}" --critic_lr "${LR_CRITIC:-4e-5}" $sampling $flags
done
"$python" 05_eval.py --policies "$out"/{sft,ppo_none/last,ppo_random2/last,ppo_bw/last} --samples 0 \
    --problems data/{humaneval,humaneval_plus,mbpp}/test.jsonl --out "$out/eval" $sampling
