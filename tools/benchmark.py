"""Speed and memory of stage 4 beside the plain way, on the same prompts, rows and random weights, as ratios of one run.

generate  `model.generate` of transformers                       `generate` of 04_pf_ppo.py
score     a float32 RM, batches in any order                     `score_responses`, frozen weights in bf16, by length
train     float32 reference and RM, all logits at once, AdamW    frozen models in bf16, logits in parts, fused AdamW

`train` holds all four models and makes one optimiser step of critic and policy on the same minibatch. The two ways take
turns, so that a machine that slows down slows both. FLOPs are the model's: 2 for each weight and token of a forward pass, 4
more for the backward pass, and attention; what gradient checkpointing computes again does not count.

The models have random weights, so that nothing is downloaded, and the shapes of real ones; EOS is made as likely as it takes
for responses of 200 tokens on average.

Run     python tools/benchmark.py                         no GPU: the rollout of out/sft, and a PPO step of a small model
                                                          GPU: four real shapes; give it ten minutes
        python tools/benchmark.py --models qwen2.5-coder-1.5b --phases train
"""

import argparse
import concurrent.futures
import gc
import importlib.util
import math
import multiprocessing
import os
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as in runs/one_gpu.sh
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
QWEN = {"model_type": "qwen2", "vocab_size": 151936, "num_key_value_heads": 2, "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
DEEPSEEK = {"model_type": "llama", "vocab_size": 32256, "max_position_embeddings": 16384, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}, "tie_word_embeddings": False}
SHAPES = {  # config.json of the model of that name, as far as shapes go
    "qwen2.5-coder-0.5b": {**QWEN, "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
                           "intermediate_size": 4864},
    "qwen2.5-coder-1.5b": {**QWEN, "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
                           "intermediate_size": 8960},
    "deepseek-coder-1.3b": {**DEEPSEEK, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
                            "num_key_value_heads": 16, "intermediate_size": 5504},
    "deepseek-coder-6.7b": {**DEEPSEEK, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                            "num_key_value_heads": 32, "intermediate_size": 11008},
    # For a CPU: the vocabulary of Qwen2.5 on four narrow blocks, 42 million parameters.
    "qwen2.5-narrow": {**QWEN, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
}
# bf16, dense, from the data sheets; the first name that is in the card's
TERAFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "A100": 312, "L40S": 362, "L40": 181,
             "L4": 121, "4090": 165, "3090": 71}
TOKENS = SimpleNamespace(pad_token_id=0, eos_token_id=1)  # what `generate` asks a tokenizer for


def load_script(name):
    """A numbered script as a module; dataclasses look for it in sys.modules."""
    sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location("script_" + name.removesuffix(".py"), ROOT / name)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_model(ppo, model_class, shape, device, plain, frozen=False, lora_rank=0):
    """A model of this shape on the device. The plain way holds frozen models in float32, too."""
    config = ppo.AutoConfig.for_model(**shape, pad_token_id=0, eos_token_id=1, bos_token_id=None, num_labels=1)
    torch.manual_seed(0)
    with torch.device(device):
        model = model_class.from_config(config)
    if frozen or lora_rank:
        ppo.freeze(model, in_bf16=device.type == "cuda" and (lora_rank > 0 or not plain))
    if lora_rank:
        ppo.add_adapters(model, lora_rank, torch.float32, 0)
    return model


def flops(config, tokens, length, head_tokens):
    """Of a forward pass: every weight of the blocks once for each token, the lm_head once for each of `head_tokens`, and
    causal attention over `length` tokens."""
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    shared = config.num_key_value_heads / config.num_attention_heads
    block = width * width * (2 + 2 * shared) + 3 * width * inner
    return 2 * layers * (block + width * length / 2 * 2) * tokens + 2 * width * config.vocab_size * head_tokens


def sampler(ppo, policy, prompts, args, device):
    """Two functions that sample responses to all prompts and return their tokens: plain, ours."""
    def ours(seed):
        with ppo.autocast(device):
            groups = ppo.generate(policy, args.tokenizer, prompts, args.responses_per_prompt, args.max_new_tokens, 1.0,
                                  torch.Generator(device).manual_seed(seed), args.batch_size)
        return sum(len(ids) for group in groups for ids in group)

    def plain(seed):
        torch.manual_seed(seed)
        rows = [ids for ids in prompts for _ in range(args.responses_per_prompt)]
        tokens = 0
        for start in range(0, len(rows), args.batch_size):
            part = rows[start:start + args.batch_size]
            batch = ppo.make_batch(part, [[0]] * len(part), args.tokenizer.pad_token_id)
            with ppo.autocast(device):
                out = policy.generate(batch["prompt_ids"].to(device), attention_mask=batch["prompt_mask"].to(device), top_p=1.0,
                                      do_sample=True, temperature=1.0, top_k=0, max_new_tokens=args.max_new_tokens,
                                      eos_token_id=args.tokenizer.eos_token_id, pad_token_id=args.tokenizer.pad_token_id)
            responses = out[:, batch["prompt_ids"].shape[1]:].tolist()
            tokens += sum(len(ppo.cut_at_eos(ids, args.tokenizer.eos_token_id)) for ids in responses)
        return tokens

    return plain, ours


def prepare_generate(ppo, args, shape, device, plain):
    """-> a function of the repeat's number that returns (tokens, FLOPs). Both ways have the same model: samplers are compared."""
    policy = random_model(ppo, ppo.AutoModelForCausalLM, shape, device, False, args.lora_rank > 0).eval()
    likely = math.log(policy.config.vocab_size / 199)  # added to EOS's logit: one token in 200

    def raise_eos(module, inputs, logits):
        logits[..., TOKENS.eos_token_id] += likely
        return logits

    policy.get_output_embeddings().register_forward_hook(raise_eos)
    rng = random.Random(0)
    prompts = [[rng.randrange(2, 30000) for _ in range(rng.randrange(args.prompt_tokens // 4, args.prompt_tokens))]
               for _ in range(args.prompts)]
    function = sampler(ppo, policy, prompts, args, device)[0 if plain else 1]

    def run(seed):
        tokens = function(seed)
        work = sum(flops(policy.config, len(ids), len(ids), 1) for ids in prompts)  # once a prompt: that is what is needed
        return tokens, work + flops(policy.config, tokens, 2 * args.prompt_tokens, tokens)  # attention to a prompt and more

    return run


def prepare_score(ppo, args, shape, device, plain):
    reward_model = random_model(ppo, ppo.AutoModelForSequenceClassification, shape, device, plain, True).eval()
    reward_model = reward_model if plain else ppo.float32_head(reward_model)
    rng = random.Random(0)
    longest = args.prompt_tokens + args.max_new_tokens
    sequences = [[rng.randrange(2, 30000) for _ in range(rng.randrange(longest // 8, longest))] for _ in range(args.scored)]
    tokens = sum(map(len, sequences))

    def run(seed):
        if plain:  # in the order of sampling
            with torch.no_grad(), ppo.autocast(device):
                for start in range(0, len(sequences), 64):
                    ids = ppo.pad_right(sequences[start:start + 64], 0).to(device)
                    reward_model(input_ids=ids, attention_mask=(ids != 0).long()).logits.float().cpu()
        else:
            ppo.score_responses(reward_model, sequences, 0, 64)
        return tokens, sum(flops(reward_model.config, len(s), len(s), 0) for s in sequences)

    return run


def prepare_train(ppo, args, shape, device, plain):
    """One optimiser step of critic and policy on a minibatch of full-length rows, beside a reference and an RM."""
    rank = args.lora_rank
    policy = random_model(ppo, ppo.AutoModelForCausalLM, shape, device, plain, lora_rank=rank).train()
    reward_model = random_model(ppo, ppo.AutoModelForSequenceClassification, shape, device, plain, True).eval()
    reward_model.config.reward_mean, reward_model.config.reward_std = 0.0, 1.0
    if rank:
        reference, critic = policy, ppo.load_critic(ppo.Config(lora_rank=rank), reward_model, device)
    else:
        reference = random_model(ppo, ppo.AutoModelForCausalLM, shape, device, plain, True).eval()
        critic = random_model(ppo, ppo.AutoModelForTokenClassification, shape, device, plain).train()
        critic = critic if plain else ppo.float32_head(critic)
    for module in (*critic.modules(), *policy.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if args.gradient_checkpointing:
        policy.activation_checkpointing_enable()
        critic.activation_checkpointing_enable()
    options = {"fused": True} if device.type == "cuda" and not plain else {}
    optimizers = [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, weight_decay=0.0, **options)
                  for model in (critic, policy)]
    rng = torch.Generator().manual_seed(0)
    count, prompt, response = args.minibatch_size, args.prompt_tokens, args.max_new_tokens
    batch = ppo.make_batch([[2] * prompt] * count, [[2] * response] * count, 0)
    batch["prompt_ids"] = torch.randint(2, 30000, (count, prompt), generator=rng)
    batch["response_ids"] = torch.randint(2, 30000, (count, response), generator=rng)
    cfg = ppo.Config(minibatch_size=count, micro_batch_size=args.micro_batch_size)
    logits_mb = 0 if plain else args.logits_mb
    logprobs = lambda model, mb: ppo.response_logprobs_in_parts(model, *ppo.model_inputs(mb), response, 1.0, logits_mb)  # noqa: E731
    values = lambda mb: ppo.response_values(critic, *ppo.model_inputs(mb), response)  # noqa: E731
    rows = torch.arange(count)
    with ppo.adapters_off(reference):
        batch["old_logprobs"] = ppo.forward_rows(lambda mb: logprobs(reference, mb), batch, rows, args.micro_batch_size, device)
    batch["old_values"] = ppo.forward_rows(values, batch, rows, args.micro_batch_size, device)
    batch["advantages"] = torch.randn(count, response, generator=rng)
    batch["returns"] = batch["old_values"] + batch["advantages"]

    def losses():
        mask = "response_mask"
        yield critic, lambda mb: ppo.value_loss(values(mb), mb["old_values"], mb["returns"], mb[mask], 0.2)
        yield policy, lambda mb: ppo.policy_loss(logprobs(policy, mb), mb["old_logprobs"], mb["advantages"], mb[mask], 0.2)

    tokens, length = count * (prompt + response), prompt + response

    def run(seed):
        for optimizer, (model, loss) in zip(optimizers, losses()):
            ppo.train_epoch(model, optimizer, loss, batch, rows, cfg, torch.Generator().manual_seed(seed), device)
        forward = flops(policy.config, tokens, length, count * response) + flops(critic.config, tokens, length, 0)
        return tokens, (2 if rank else 3) * forward  # LoRA: no gradients of the frozen weights

    return run


def resident(name):
    """VmRSS, the resident memory of this process now, or VmHWM, the largest since the mark was reset; bytes, Linux only."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measure(name, phase, plain, args):
    """Median seconds, tokens a second, TFLOPs a second and peak memory of one way -> dict; {"error"} when memory runs out.

    On a GPU peak memory is that of its allocator; without one it is the largest resident memory of this process, less what it
    had before there were models.
    """
    ppo = load_script("04_pf_ppo.py")
    device = ppo.set_up(args.threads)
    args.tokenizer = TOKENS
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    importlib.import_module("torch._dynamo")  # the first optimiser imports it
    if args.lora_rank:
        importlib.import_module("peft")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew: imports have peaks of their own
    before = resident("VmRSS")
    prepare = {"generate": prepare_generate, "score": prepare_score, "train": prepare_train}[phase]
    try:
        run = prepare(ppo, args, SHAPES[name], device, plain)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # here models are made in float32; stage 4 halves frozen ones before they come
        seconds, rates = [], []
        for repeat in range(args.repeats + (device.type == "cuda")):  # a GPU's first turn is for warming up
            start = time.perf_counter()
            tokens, work = run(repeat)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            rates.append((tokens / seconds[-1], work / seconds[-1] / 1e12))
        rates = rates[-args.repeats:]
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resident("VmHWM") - before
    return {"seconds": statistics.median(seconds[-args.repeats:]), "tokens": statistics.median(r for r, _ in rates),
            "teraflops": statistics.median(f for _, f in rates), "peak": peak}


def planned_peak(name, args):
    """What `04_pf_ppo.py --plan` expects of the training step, bytes."""
    ppo = load_script("04_pf_ppo.py")
    with tempfile.TemporaryDirectory() as folder:
        ppo.AutoConfig.for_model(**SHAPES[name], pad_token_id=0, eos_token_id=1, bos_token_id=None).save_pretrained(folder)
        phases = load_script("tools/plan.py").memory_plan(ppo, ppo.Config(
            policy=folder, reward_model=folder, prompt_tokens=args.prompt_tokens, max_new_tokens=args.max_new_tokens,
            minibatch_size=args.minibatch_size, micro_batch_size=args.micro_batch_size, logits_mb=args.logits_mb,
            lora_rank=args.lora_rank, gradient_checkpointing=args.gradient_checkpointing))["phases"]
    return max(size for phase, size in phases.items() if phase.startswith("train"))


def compare(name, args, device):
    """The table of one shape: each phase, plain and ours, in turn."""
    peak_rate = args.peak_teraflops or next((rate for card, rate in TERAFLOPS.items() if device.type == "cuda"
                                             and card in torch.cuda.get_device_name()), 0)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads or torch.get_num_threads()} threads"
    shape, args = SHAPES[name], argparse.Namespace(**vars(args))
    cache = 4 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["hidden_size"] // shape["num_attention_heads"]
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
        while args.batch_size * (args.prompt_tokens + args.max_new_tokens) * cache * 2 > 0.5 * memory:  # plain copies its cache
            args.batch_size //= 2
        args.prompts = min(args.prompts, args.batch_size // args.responses_per_prompt)
        if not args.lora_rank and planned_peak(name, args) > 0.95 * memory:
            args.lora_rank, args.gradient_checkpointing = 16, True
    print(f"\n{name}, random weights, {where}; generate {args.prompts * args.responses_per_prompt} responses, "
          f"{args.batch_size} rows at once; train {args.minibatch_size} rows of {args.prompt_tokens} + {args.max_new_tokens} "
          f"tokens, {args.micro_batch_size} at once" + (f", LoRA rank {args.lora_rank}" if args.lora_rank else "")
          + (", gradient checkpointing" if args.gradient_checkpointing else ""))
    print(f"{'':<10}{'':<8}{'seconds':>9}{'tokens/s':>10}{'TFLOP/s':>9}{'MFU':>7}{'peak GB':>9}{'speed':>8}{'memory':>8}")
    for phase in args.phases:
        results = {}
        for way in ("plain", "ours"):
            if device.type == "cuda":
                results[way] = measure(name, phase, way == "plain", args)
            else:  # a process of its own, for its peak memory
                with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    results[way] = process.submit(measure, name, phase, way == "plain", args).result()
            r, plain = results[way], results["plain"]
            if "error" in r:
                print(f"{phase:<10}{way:<8}  {r['error']}", flush=True)
                continue
            mfu = f"{100 * r['teraflops'] / peak_rate:6.1f}%" if peak_rate else "      -"
            print(f"{phase:<10}{way:<8}{r['seconds']:>9.2f}{r['tokens']:>10.0f}{r['teraflops']:>9.2f}{mfu}"
                  f"{r['peak'] / 2**30:>9.2f}" + ("" if "error" in plain else
                  f"{r['tokens'] / plain['tokens']:>7.2f}x{100 * r['peak'] / plain['peak']:>7.0f}%"), flush=True)
        if phase == "train":
            print(f"{'':<10}{'--plan':<8}{'':<35}{planned_peak(name, args) / 2**30:>9.2f}", flush=True)


def compare_rollouts(args):
    """The rollout of a trained model, in this process: a model that has learned to end is what `generate` is for."""
    ppo = load_script("04_pf_ppo.py")
    device = ppo.set_up(args.threads)
    problems = ppo.read_jsonl(args.data, ppo.PROBLEM_FIELDS)[:args.prompts]
    args.tokenizer = ppo.load_tokenizer(args.policy)
    policy = ppo.load_model(ppo.AutoModelForCausalLM, args.policy, device).eval()
    prompts = [ppo.encode_prompt(args.tokenizer, problem["prompt"]) for problem in problems]
    plain, ours = sampler(ppo, policy, prompts, args, device)
    times = {"model.generate": [], "generate of 04": []}
    counts = {}
    for seed in range(args.repeats):
        for name, function in (("model.generate", plain), ("generate of 04", ours)):
            start = time.perf_counter()
            counts[name] = function(seed)
            times[name].append(time.perf_counter() - start)
    print(f"{args.policy}: {len(prompts) * args.responses_per_prompt} responses, {args.batch_size} rows at once, {device}, "
          f"{torch.get_num_threads()} threads, median of {args.repeats}")
    print(f"{'':<18}{'seconds':>9}{'tokens/s':>10}{'ratio':>7}")
    slow = statistics.median(times["model.generate"])
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"{name:<18}{middle:>9.2f}{counts[name] / middle:>10.0f}{slow / middle:>7.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--policy", default="out/sft", help="without --models, on a CPU: the model of the rollout")
    parser.add_argument("--data", default="data/tiny/ppo.jsonl")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=[n for n in SHAPES if "narrow" not in n] if gpu else [])
    parser.add_argument("--phases", nargs="+", choices=["generate", "score", "train"], default=["generate", "score", "train"])
    parser.add_argument("--prompts", type=int, default=64 if gpu else 256)
    parser.add_argument("--responses_per_prompt", type=int, default=4 if gpu else 5)
    parser.add_argument("--prompt_tokens", type=int, default=512 if gpu else 64, help="longest prompt")
    parser.add_argument("--max_new_tokens", type=int, default=512 if gpu else 96)
    parser.add_argument("--batch_size", type=int, default=256, help="rows at once when sampling, for both")
    parser.add_argument("--scored", type=int, default=512 if gpu else 64, help="sequences to score")
    parser.add_argument("--minibatch_size", type=int, default=16, help="rows of a training step")
    parser.add_argument("--micro_batch_size", type=int, default=4 if gpu else 8)
    parser.add_argument("--logits_mb", type=int, default=512 if gpu else 64)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--lora_rank", type=int, default=0, help="where all weights do not fit on the GPU: 16")
    parser.add_argument("--peak_teraflops", type=float, default=0, help="bf16 peak of the device, for MFU; 0: from its name")
    parser.add_argument("--repeats", type=int, default=1 if gpu else 3, help="on a GPU after one turn that does not count")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    device = torch.device("cuda" if gpu else "cpu")
    if not args.models:
        compare_rollouts(args)
        args.models, args.phases = ["qwen2.5-narrow"], ["train"]
    for name in args.models:
        compare(name, args, device)


if __name__ == "__main__":
    main()
