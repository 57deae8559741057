r"""Speed and memory of stage 4: the phases of an iteration, and its sampler beside others.

    iteration  04 with --strategy random2, which trains on as many rows as br and bw and prefers no
               length: seconds per phase, trained tokens per second, model FLOPs utilisation (mfu)
    samplers   N responses to each prompt at temperature 1, all in one batch: tokens per second;
               ms per step, all seconds of a call over the tokens of its longest response; and
               greedy_equal, the share of a greedy response before it differs from that of
               transformers' generate (1 in float32; in bf16 rounding decides near ties)

mfu is 6 N FLOPs per trained token (with LoRA 4 N) over the card's bf16 peak. N counts the weights
of all layers without embedding and head, and padding is not counted: a lower bound.

A line holds medians of --rounds turns. As soon as it is measured, it is printed and appended to
--out (JSONL, with device, versions and flags). What fails becomes a line with its error. On a CPU
samplers are measured in CPU seconds, which busy neighbours lengthen less; an iteration is not.

Run: python tools/benchmark.py --policy out/sft

A name in SHAPES instead of a folder stands for random weights and random prompts; no file is
needed. docs/gpu.md has the command for a GPU. To see on a CPU that all parts run:

    python tools/benchmark.py --policy tiny --prompts 4 --prompt_tokens 32 --max_new_tokens 16 \
        --mean_length 8 --rounds 1 --bf16 on
"""

import contextlib
import copy
import functools
import gc
import importlib
import json
import math
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import tokenizers
import torch
import transformers
import tyro
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sandbox  # noqa: E402

ppo = importlib.import_module("04_pf_ppo")

PHASES = ("generate", "score", "forward", "train", "tests")
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16 FLOPs per second, SXM cards
# All are built as Llama models: Qwen2 has biases in its attention besides.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "intermediate_size")
SHAPES = {
    "qwen2.5-coder-0.5b": (151_936, 896, 24, 14, 2, 4864),
    "qwen2.5-coder-1.5b": (151_936, 1536, 28, 12, 2, 8960),
    "smollm2-135m": (49_152, 576, 30, 9, 3, 1536),
    "tiny": (2000, 64, 2, 4, 2, 128),
}


@dataclass
class Config:
    policy: tuple[str, ...] = ("out/sft",)  # model folders, or names in SHAPES
    reward_model: str = "out/rm"  # RM of a folder's iteration
    data: str = "data/tiny/ppo.jsonl"  # problems for a folder, JSONL; the first ones are used
    prompts: int = 64  # n, prompts per iteration, as in 04
    responses_per_prompt: int = 5  # N, as in 04
    prompt_tokens: int = 256  # longest random prompt; the shortest has half as many tokens
    max_new_tokens: int = 96  # longest response, tokens, as in 04
    mean_length: int = 128  # random weights end a response with probability 1/this per token
    micro_batch_size: int = 48  # responses per forward and backward pass, as in 04
    score_batch_size: int = 64  # responses per forward pass without gradient, as in 04
    gradient_checkpointing: bool = False  # as in 04
    lora_rank: int = 0  # as in 04
    bf16: Literal["auto", "on", "off"] = "auto"  # as in 04; on adds samplers on a copy in bf16
    rounds: int = 3  # turns of each sampler, and iterations of 04; a first one more warms up
    budget_minutes: float = 60.0  # after it nothing new is started
    out: str = "out/benchmark.jsonl"  # results are appended to it
    threads: int = 0  # PyTorch CPU threads, 0: PyTorch's choice
    seed: int = 0  # random weights, prompts, sampling


def main(cfg):
    for name in cfg.policy:
        if name not in SHAPES and not Path(name, "config.json").is_file():
            sandbox.fail(f"{name} is neither a model folder nor one of {', '.join(SHAPES)}")
    deadline = time.monotonic() + 60 * cfg.budget_minutes
    device, amp = ppo.set_up(cfg)
    info = {"device": "CPU", "torch": torch.__version__, "transformers": transformers.__version__}
    if device.type == "cuda":
        info["device"] = torch.cuda.get_device_name()
    print(info)
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, open(cfg.out, "a", encoding="utf-8") as file:
        for model, name, job in list_jobs(Path(folder), cfg, device, amp):
            if time.monotonic() > deadline:
                print("the rest is left out: --budget_minutes are over")
                break
            numbers = attempt(job, device)
            line = info | {"model": model, "measured": name} | numbers | {"flags": asdict(cfg)}
            file.write(json.dumps(line) + "\n")
            file.flush()  # a run that is cut off keeps what it has measured
            cells = [f"{key} {x:.4g}" for key, x in numbers.items() if isinstance(x, float)]
            print(f"{model:<20}{name:<37}", *cells, numbers.get("error", ""), flush=True)


def list_jobs(folder, cfg, device, amp):
    """Yield (model, what is measured, function that measures it), in order of worth."""
    models = []
    for number, name in enumerate(cfg.policy):
        place = folder / str(number)
        place.mkdir()
        models.append((name, place, *prepare(name, place, cfg)))
    for name, place, *job in models:
        yield name, "iteration", functools.partial(time_iterations, place, *job, cfg)
    for name, _, policy, _, problems in models:
        for label, job in sampler_jobs(policy, problems, cfg, device, amp):
            yield name, label, job


def attempt(job, device):
    """The numbers that a job measures, or its error: one that fails must not end the rest."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        numbers = job()
    except (Exception, SystemExit) as error:
        numbers = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
    if device.type == "cuda":
        numbers["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return numbers


# ---------------------------------------------------------------------------- models and problems


def prepare(name, folder, cfg):
    """-> policy folder, RM folder, problems. A shape gets a folder that holds no weights."""
    if name not in SHAPES:
        return name, cfg.reward_model, sandbox.read_problems(cfg.data)[: cfg.prompts]
    config = transformers.LlamaConfig(
        **dict(zip(SIZES, SHAPES[name])),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        num_labels=1,
        pad_token_id=0,
        eos_token_id=1,
    )
    config.reward_mean, config.reward_std = 0.0, 1.0
    config.save_pretrained(folder)
    words = ["<pad>", "<eos>"] + [f"w{i}" for i in range(1000)]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)
    rng, problems = random.Random(cfg.seed), []
    for i in range(cfg.prompts):
        length = rng.randint(cfg.prompt_tokens // 2, cfg.prompt_tokens)
        prompt = " ".join(rng.choices(words[2:], k=length))
        problems.append({"task_id": str(i), "prompt": prompt, "tests": ["assert False"]})
    return str(folder), str(folder), problems


def load_model(model_class, path, tokenizer, load=ppo.load_model, **options):
    """04's `load_model`; where a folder holds no weights, random ones, made on the device."""
    if list(Path(path).glob("*.safetensors")):
        return load(model_class, path, tokenizer, **options)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = model_class.from_config(transformers.AutoConfig.from_pretrained(path))
        if model_class is AutoModelForCausalLM:  # a bias on the chance of each token, see end_after
            bias = torch.zeros(model.config.vocab_size)
            model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return model


def end_after(model, length):
    """Random weights give all tokens about equal chances: let EOS have 1 / length. 0: none."""
    bias = model.get_output_embeddings().bias
    if bias is not None and not bias.requires_grad:  # the one that load_model has added
        bias.data[1] = math.log(len(bias) / length) if length else 0.0


# ------------------------------------------------------------------------------------- iteration


def time_iterations(folder, policy, reward_model, problems, cfg):
    """Run 04 without its checkpoints -> medians; the first iteration is not counted."""
    sandbox.write_jsonl(folder / "problems.jsonl", problems)
    sandbox.write_jsonl(folder / "few.jsonl", problems[:4])
    own = {key: value for key, value in vars(cfg).items() if key in ppo.Config.__annotations__}
    own |= {"policy": policy, "reward_model": reward_model, "strategy": "random2", "workers": 0}
    own |= {"data": str(folder / "problems.jsonl"), "validation": str(folder / "few.jsonl")}
    own |= {"prompts_per_iteration": cfg.prompts, "minibatch_size": cfg.prompts}
    own |= {"generate_batch_size": cfg.prompts * cfg.responses_per_prompt, "critic_warmup": 0}
    own |= {"iterations": cfg.rounds + 1, "eval_every": cfg.rounds + 1, "out": str(folder / "ppo")}

    weights = []  # N of the policy; the critic's is the same

    def load(model_class, *arguments, **options):
        model = load_model(model_class, *arguments, **options)
        if model_class is AutoModelForCausalLM:
            end_after(model, cfg.mean_length)
            weights.append(model.base_model.num_parameters(exclude_embeddings=True))
        return model

    def save_state(cfg, out, *arguments, **progress):  # 37 GB at 1.5B parameters, and not timed
        if not out.exists():
            Path(f"{out}.tmp").replace(out)

    with (
        mock.patch.multiple(ppo, load_model=load, save_model=mock.DEFAULT, save_state=save_state),
        contextlib.redirect_stdout(sys.stderr),
    ):
        ppo.main(ppo.Config(**own))

    lines = sandbox.read_jsonl(folder / "ppo/metrics.jsonl", {"iteration": int})[2:]
    numbers = {}
    for phase in PHASES:
        numbers[f"{phase}_s"] = statistics.median(line[f"seconds_{phase}"] for line in lines)
    tokenizer = sandbox.load_tokenizer(policy)
    prompts = [len(sandbox.encode_prompt(tokenizer, problem["prompt"])) for problem in problems]
    length = statistics.mean(prompts) + statistics.mean(line["length"] for line in lines)
    numbers["trained_tokens_per_s"] = lines[-1]["kept"] * length / numbers["train_s"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = next((PEAK[card] for card in PEAK if card in device), None)
    if peak and cfg.bf16 != "off":
        flops = (4 if cfg.lora_rank else 6) * 2 * weights[0]  # policy and critic
        numbers["mfu"] = flops * numbers["trained_tokens_per_s"] / peak
    return numbers


# -------------------------------------------------------------------------------------- samplers


def ours(model, tokenizer, prompts, temperature, cfg):
    """Responses by 04's sampler, `responses_per_prompt` to each prompt."""
    rows = len(prompts) * cfg.responses_per_prompt
    settings = ppo.Config(max_new_tokens=cfg.max_new_tokens, generate_batch_size=rows)
    job = (model, tokenizer, prompts, cfg.responses_per_prompt, temperature, settings)
    return ppo.generate(*job)[0]


def plain(model, tokenizer, prompts, temperature, cfg, **options):
    """The same by transformers' generate."""
    rows = [ids for ids in prompts for _ in range(cfg.responses_per_prompt)]
    batch = ppo.make_batch(rows, [[]] * len(rows))
    output = model.generate(
        batch["input_ids"].to(model.device),
        attention_mask=batch["attention_mask"].to(model.device),
        generation_config=sampling(tokenizer, temperature, cfg, **options),
    )
    responses, eos = [], tokenizer.eos_token_id
    for ids in output[:, batch["input_ids"].shape[1] :].tolist():
        responses.append(ids[: ids.index(eos) + 1] if eos in ids else ids)
    return responses


def continuous(model, tokenizer, prompts, temperature, cfg):
    """generate_batch: continuous batching, with its CUDA graphs kept from call to call."""
    rows = [ids for ids in prompts for _ in range(cfg.responses_per_prompt)]
    pages = len(rows) * (2 + (max(map(len, rows)) + cfg.max_new_tokens) // 256)  # of 256 tokens
    settings = ContinuousBatchingConfig(use_cuda_graph=True, num_blocks=pages)
    results = model.generate_batch(
        rows,
        generation_config=sampling(tokenizer, temperature, cfg),
        continuous_batching_config=settings,
        persistent_manager=temperature > 0,  # one kept would stay greedy
    ).values()
    errors = [result.error for result in results if result.error]
    if errors or len(results) < len(rows):
        raise RuntimeError(errors[0] if errors else f"{len(results)} of {len(rows)} responses")
    return [list(result.generated_tokens) for result in results]


def sampling(tokenizer, temperature, cfg, **options):
    """A GenerationConfig that leaves the distribution as it is; temperature 0 is greedy."""
    if temperature:
        options |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return GenerationConfig(max_new_tokens=cfg.max_new_tokens, **ends, **options)


# Label, function, and whether it runs under autocast like 04, or on a copy of the weights in bf16:
# generate_batch works in a thread of its own, which autocast does not reach. With a static cache,
# transformers compiles the model on a GPU.
SAMPLERS = (
    ("generate of transformers", plain, True),  # the others are compared with this one
    ("generate of 04", ours, True),
    ("static cache, compiled", functools.partial(plain, cache_implementation="static"), False),
    ("generate_batch", continuous, False),
    ("generate of 04, bf16 copy", ours, False),
    ("generate of transformers, bf16 copy", plain, False),
)


def sampler_jobs(policy, problems, cfg, device, amp):
    """Yield (label, job) of each sampler. Without bf16 nothing is measured twice."""
    tokenizer = sandbox.load_tokenizer(policy)
    prompts = [sandbox.encode_prompt(tokenizer, problem["prompt"]) for problem in problems]
    model = load_model(AutoModelForCausalLM, policy, tokenizer).to(device).eval()
    model.generation_config = GenerationConfig()  # a folder's may have a repetition penalty
    with amp:
        bf16 = torch.is_autocast_enabled(device.type)
    half = copy.deepcopy(model) if bf16 else model
    for parameter in half.parameters() if bf16 else ():
        parameter.data = parameter.data.bfloat16()  # half.bfloat16() would round positions, too
    expected = {}
    for label, sampler, autocast in SAMPLERS:
        if bf16 or "bf16" not in label:
            own = (model, amp) if autocast else (half, contextlib.nullcontext())
            job = (sampler, *own, tokenizer, prompts, expected, cfg)
            yield label, functools.partial(time_sampler, *job)
            half.destroy_cached_continuous_batching_manager()


def time_sampler(sampler, model, context, tokenizer, prompts, expected, cfg):
    """Greedy responses, which warm up and are compared, then rounds at temperature 1."""
    torch.manual_seed(cfg.seed)
    clock = time.perf_counter if model.device.type == "cuda" else time.process_time
    seconds, rates, steps = [], [], []
    for temperature in (0.0, *[1.0] * cfg.rounds):
        end_after(model, cfg.mean_length if temperature else 0)
        start = clock()
        with context:
            responses = sampler(model, tokenizer, prompts, temperature, cfg)
        seconds.append(clock() - start)
        rates.append(sum(map(len, responses)) / seconds[-1])
        steps.append(1000 * seconds[-1] / max(map(len, responses)))
        if temperature == 0:
            greedy = responses
    rate = statistics.median(rates[1:])
    expected.setdefault("greedy", greedy)
    expected.setdefault("rate", rate)
    return {
        "tokens_per_s": rate,
        "times_generate": rate / expected["rate"],
        "ms_per_step": statistics.median(steps[1:]),
        "greedy_equal": statistics.mean(map(equal_share, expected["greedy"], greedy)),
        "seconds": seconds,
    }


def equal_share(one, other):
    """Share of the longer of two responses before they differ."""
    equal = 0
    while equal < min(len(one), len(other)) and one[equal] == other[equal]:
        equal += 1
    return equal / max(len(one), len(other))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
