"""Speed of stage 4: its sampler against `model.generate`, and the seconds of a PPO iteration.

    greedy     the same prompts by both samplers: share of equal responses (1 in float32; in bf16
               rounding decides near ties) and their speed
    sampled    N responses to each prompt at temperature 1
    iteration  seconds of each phase of 04, --strategy bw

The two samplers take turns, so that a machine that slows down slows both. The ratio is that of the
medians of tokens per second. Tokens behind EOS do not count.

Run: python tools/benchmark.py --policy out/sft

or, for a shape alone: python tools/benchmark.py --config_only --policy FOLDER
where FOLDER holds a tokenizer and a config.json. Random weights end a response by chance only, so
that nearly all have --max_new_tokens.
"""

import importlib.util
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sandbox  # noqa: E402

PHASES = ("generate", "score", "forward", "train", "tests")


@dataclass
class Config:
    policy: str = "out/sft"  # model folder
    reward_model: str = "out/rm"  # RM of the iteration; not read with --config_only
    data: str = "data/tiny/ppo.jsonl"  # problems, JSONL; the first ones are used
    config_only: bool = False  # random weights of the shape in --policy, whose weights are not read
    prompts: int = 48  # n, prompts per iteration, as in 04
    responses_per_prompt: int = 5  # N, as in 04
    max_new_tokens: int = 96  # longest response, tokens, as in 04
    generate_batch_size: int = 256  # responses generated at once, by both samplers
    micro_batch_size: int = 48  # responses per forward and backward pass, as in 04
    gradient_checkpointing: bool = False  # as in 04
    lora_rank: int = 0  # as in 04
    bf16: Literal["auto", "on", "off"] = "auto"  # autocast, weights stay float32; auto: on a GPU
    rounds: int = 3  # turns of each sampler, and PPO iterations, of which the median is given
    threads: int = 0  # PyTorch CPU threads, 0: PyTorch's choice
    seed: int = 0  # sampling, random weights


def load_script(name):
    """A numbered script as a module; dataclasses look for it in sys.modules."""
    module_name = "script_" + name.removesuffix(".py")
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, ROOT / name)
        sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module_name])
    return sys.modules[module_name]


ppo = load_script("04_pf_ppo.py")


def plain_generate(model, tokenizer, prompts, repeats, temperature, cfg):
    """The responses of transformers' own sampler, in the order of `ppo.generate`."""
    rows = [ids for ids in prompts for _ in range(repeats)]
    sampling = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    responses, eos = [], tokenizer.eos_token_id
    for start in range(0, len(rows), cfg.generate_batch_size):
        part = rows[start : start + cfg.generate_batch_size]
        batch = ppo.make_batch(part, [[]] * len(part))
        output = model.generate(
            batch["prompt_ids"].to(model.device),
            attention_mask=batch["prompt_mask"].to(model.device),
            max_new_tokens=cfg.max_new_tokens,
            eos_token_id=eos,
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )
        for ids in output[:, batch["prompt_ids"].shape[1] :].tolist():
            responses.append(ids[: ids.index(eos) + 1] if eos in ids else ids)
    return responses


def compare_samplers(model, tokenizer, prompts, repeats, temperature, cfg):
    """Both samplers in turn -> {name: tokens per second, median}, share of equal responses."""
    job = (model, tokenizer, prompts, repeats, temperature, cfg)
    rates = {"model.generate": [], "generate of 04": []}
    for number in range(cfg.rounds + 1):
        texts = []
        for name, rate in rates.items():
            torch.manual_seed(cfg.seed + number)
            start = time.perf_counter()
            texts.append(
                plain_generate(*job) if name == "model.generate" else ppo.generate(*job)[0]
            )
            rate.append(sum(map(len, texts[-1])) / (time.perf_counter() - start))
    equal = sum(a == b for a, b in zip(*texts)) / len(texts[0])
    return {
        name: statistics.median(rate[1:]) for name, rate in rates.items()
    }, equal  # [0] warms up


def time_iterations(cfg, problems, folder):
    """Some iterations of 04 -> {phase: seconds, median}; the first one is not counted."""
    sandbox.write_jsonl(folder / "few.jsonl", problems[:4])
    own = {name: getattr(cfg, name) for name in vars(cfg) if name in ppo.Config.__annotations__}
    own |= {"prompts_per_iteration": cfg.prompts, "iterations": cfg.rounds + 1, "strategy": "bw"}
    own |= {"critic_warmup": 0, "out": str(folder / "ppo"), "validation": str(folder / "few.jsonl")}
    ppo.main(ppo.Config(**own))
    lines = sandbox.read_jsonl(folder / "ppo/metrics.jsonl", {"iteration": int})[2:]
    return {name: statistics.median(line[f"seconds_{name}"] for line in lines) for name in PHASES}


def random_models(cfg, folder):
    """Set cfg.policy and cfg.reward_model to folders with random weights of the policy's shape."""
    tokenizer, config = ppo.load_tokenizer(cfg.policy), AutoConfig.from_pretrained(cfg.policy)
    config.num_labels, config.reward_mean, config.reward_std = 1, 0.0, 1.0
    for model_class in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        ppo.save_model(model_class.from_config(config), tokenizer, folder / model_class.__name__)
    cfg.policy = str(folder / "AutoModelForCausalLM")
    cfg.reward_model = str(folder / "AutoModelForSequenceClassification")


def main(cfg):
    device, amp = ppo.set_up(cfg)
    problems = sandbox.read_problems(cfg.data)
    with tempfile.TemporaryDirectory() as folder:
        if cfg.config_only:
            random_models(cfg, Path(folder))
        tokenizer = ppo.load_tokenizer(cfg.policy)
        model = ppo.load_model(AutoModelForCausalLM, cfg.policy, tokenizer).to(device).eval()
        prompts = [ppo.encode_prompt(tokenizer, p["prompt"]) for p in problems[: cfg.prompts]]
        where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        print(f"{cfg.policy} on {where}, {torch.get_num_threads()} threads, {len(prompts)} prompts")
        for kind, repeats, temperature in (
            ("greedy", 1, 0.0),
            ("sampled", cfg.responses_per_prompt, 1.0),
        ):
            with amp:
                rates, equal = compare_samplers(
                    model, tokenizer, prompts, repeats, temperature, cfg
                )
            plain, ours = rates.values()
            for name, rate in rates.items():
                print(f"{kind:<10}{name:<18}{rate:>10.0f} tokens/s")
            same = f", {equal:.3f} of the responses equal" if kind == "greedy" else ""
            print(f"{kind:<10}{'ratio':<18}{ours / plain:>10.2f}{same}", flush=True)
        del model
        for phase, seconds in time_iterations(cfg, problems, Path(folder)).items():
            print(f"{'iteration':<10}{phase:<18}{seconds:>10.2f} s")
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
            print(f"{'iteration':<10}{'peak memory':<18}{peak:>10.1f} GB")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
