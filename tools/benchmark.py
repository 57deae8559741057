"""Speed of a rollout: `generate` of 04_pf_ppo.py beside `model.generate` of transformers, on the same prompts and rows.

Both sample at temperature 1 from the whole distribution. The two take turns, so that a machine that slows down slows both.

Run     python tools/benchmark.py                         the tiny model of out/sft, 1,280 responses
"""

import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def load_script(name):
    """A numbered script as a module; dataclasses look for it in sys.modules."""
    sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location("script_" + name.removesuffix(".py"), ROOT / name)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="out/sft")
    parser.add_argument("--data", default="data/tiny/ppo.jsonl")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--responses_per_prompt", type=int, default=5)
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=256, help="rows at once, for both")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()

    ppo = load_script("04_pf_ppo.py")
    device = ppo.set_up(args.threads)
    problems = ppo.read_jsonl(args.data, ppo.PROBLEM_FIELDS)[:args.prompts]
    tokenizer = ppo.load_tokenizer(args.policy)
    policy = ppo.load_model(ppo.AutoModelForCausalLM, args.policy, device).eval()
    prompts = [ppo.encode_prompt(tokenizer, problem["prompt"]) for problem in problems]

    def ours(seed):
        groups = ppo.generate(policy, tokenizer, prompts, args.responses_per_prompt, args.max_new_tokens, 1.0,
                              torch.Generator(device).manual_seed(seed), args.batch_size)
        return sum(len(ids) for group in groups for ids in group)

    def plain(seed):
        torch.manual_seed(seed)
        rows = [ids for ids in prompts for _ in range(args.responses_per_prompt)]
        tokens = 0
        for start in range(0, len(rows), args.batch_size):
            part = rows[start:start + args.batch_size]
            batch = ppo.make_batch(part, [[0]] * len(part), tokenizer.pad_token_id)
            out = policy.generate(batch["prompt_ids"].to(device), attention_mask=batch["prompt_mask"].to(device), do_sample=True,
                                  temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=args.max_new_tokens,
                                  eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
            responses = out[:, batch["prompt_ids"].shape[1]:].tolist()
            tokens += sum(len(ppo.cut_at_eos(ids, tokenizer.eos_token_id)) for ids in responses)
        return tokens

    times = {"model.generate": [], "generate of 04": []}
    counts = {}
    for seed in range(args.repeats):
        for name, function in (("model.generate", plain), ("generate of 04", ours)):
            start = time.perf_counter()
            counts[name] = function(seed)
            times[name].append(time.perf_counter() - start)
    print(f"{len(prompts) * args.responses_per_prompt} responses, {args.batch_size} rows at once, {device}, "
          f"{torch.get_num_threads()} threads, median of {args.repeats}")
    print(f"{'':<18}{'seconds':>9}{'tokens/s':>10}{'ratio':>7}")
    slow = statistics.median(times["model.generate"])
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"{name:<18}{middle:>9.2f}{counts[name] / middle:>10.0f}{slow / middle:>7.2f}")


if __name__ == "__main__":
    main()
