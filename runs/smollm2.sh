#!/usr/bin/env bash
# The pipeline with a pretrained model, SmolLM2-135M-Instruct: about three hours on two CPU cores,
# minutes on a GPU, 16 GB of memory. A second call goes on where the first stopped. The tiny set's
# problems train it, since their tests are exact; HumanEval and MBPP show whether anything gets lost.
# Usage: bash runs/smollm2.sh    (FILES: a folder with HumanEval.jsonl.gz and mbpp.jsonl.gz, without a hub;
# GRPO=1: a second part, tests as reward: MBPP trains the instruct model, without stages 1 to 3)
set -eu -o pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt gguf==0.19.0 accelerate==1.15.0
export TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg PYTHONUNBUFFERED=1
python=.venv/bin/python data=data/smollm2 out=out/smollm2
bf16=$(grep -qE "amx_bf16|avx512_bf16" /proc/cpuinfo && echo on || echo auto)
flags="--bf16 $bf16 --max_new_tokens 96"

mkdir -p models out
"$python" tools/fetch_smollm2.py --out models/smollm2
"$python" 00_data.py --out "$data" --sft 1500 --rm 800 --ppo 300 --validation 80 --test 200
"$python" 01_sft.py --model ./models/smollm2 --plain --data "$data/sft.jsonl" --out "$out/sft" --epochs 2 \
    --lr 2e-4 --batch_size 32 --micro_batch_size 32 --bf16 "$bf16" --resume
"$python" 02_reward_model.py --policy "$out/sft" --data "$data/rm.jsonl" --validation "$data/validation.jsonl" \
    --out "$out/rm" --epochs 1 --lr 5e-5 --batch_size 8 --micro_batch_size 8 $flags --resume
"$python" 03_r2_analysis.py --samples "$out/rm/validation_samples.jsonl" --out "$out/r2"

ppo() {
    for strategy in "$@"; do
        "$python" 04_pf_ppo.py --strategy $strategy --policy "$out/sft" --reward_model "$out/rm" \
            --data "$data/ppo.jsonl" --validation "$data/validation.jsonl" --out "$out/ppo_$strategy" \
            --iterations 10 --eval_every 5 --prompts_per_iteration 16 --minibatch_size 16 --micro_batch_size 8 \
            --lr 1e-5 --critic_lr 3e-5 --kl_coef 0.1 --threads 1 $flags --resume
    done
}
# Two runs at a time with one thread each do more than one run with two threads.
ppo none & pid=$!
ppo random2 bw
wait $pid
"$python" 05_eval.py --policies "$out"/{sft,ppo_none/last,ppo_random2/last,ppo_bw/last} --samples 2 --ks 1 \
    --problems "$data/test.jsonl" --out "$out/eval" $flags

# ---- what the instruct model could do before, and what is left of it
for name in humaneval mbpp; do
    file=$([ -n "${FILES:-}" ] && ls "$FILES"/*.jsonl.gz | grep -iE "/$name\.jsonl" || true)
    "$python" 00_data.py --dataset $name --out "data/$name" ${file:+--file "$file"}
done
"$python" 05_eval.py --policies ./models/smollm2 "$out/ppo_bw/last" --samples 0 --timeout 3 \
    --problems data/humaneval/test.jsonl data/mbpp/test.jsonl --out "$out/eval_public" --bf16 "$bf16" \
    --max_new_tokens 256 --generate_batch_size 64

# ---- a second part, with GRPO=1: the tests as reward, from the instruct model itself
if [ "${GRPO:-0}" = 1 ]; then  # $file is still MBPP's, the last of the loop above
    "$python" 00_data.py --dataset mbpp --show_one_test --out data/mbpp_one_test ${file:+--file "$file"}
    "$python" 04_pf_ppo.py --reward tests --advantage grpo --strategy none --policy ./models/smollm2 \
        --data data/mbpp_one_test/ppo.jsonl --validation data/mbpp_one_test/validation.jsonl --out "$out/grpo" \
        --iterations 10 --eval_every 5 --prompts_per_iteration 8 --responses_per_prompt 8 --minibatch_size 32 \
        --micro_batch_size 8 --lr 1e-5 --kl_coef 0.03 --timeout 3 --max_new_tokens 160 --bf16 "$bf16" --resume
fi
