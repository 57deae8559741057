"""Stage 2, the reward model (RM): sample responses, run the tests, learn to tell passing from failing code.

The SFT policy writes five responses to each prompt, the unit tests label them, and a copy of the policy with a scalar
head learns from pairs (passing, failing) of the same prompt by the Bradley-Terry loss (paper, section 4):

    loss = -log sigmoid(r(x, chosen) - r(x, rejected))

Reads   data/tiny/rm.jsonl, out/sft
Writes  out/rm/                  an ordinary Hugging Face folder (AutoModelForSequenceClassification, one label); the mean
                                 and standard deviation of its reward are in config.json (reward_mean, reward_std)
        out/rm/samples.jsonl     {"task_id": "tiny/rm/0", "prompt": "...", "response": "    return max(xs)\\n", "rm_score": 0.31,
                                  "actual_score": 0.0, "passed_tests": 2, "total_tests": 6, "status": "failed", ...}
        out/rm/pairs.jsonl       {"task_id": "tiny/rm/0", "prompt": "...", "chosen": "...", "rejected": "...",
                                  "edit_distance": 3}
        out/rm/accuracy.json     accuracy on held-out prompts, over all pairs, over largest-edit pairs, by kind of flaw, by whether
                                 the program is new
        out/rm.work/             what --resume needs, until the stage is finished: the tested responses, the state of training

Run     python 02_reward_model.py
        python 02_reward_model.py --policy out/sft-0.5b --data data/mbpp/rm.jsonl --pairs edit --lr 1e-5 --epochs 1

Which pairs to train on. The paper takes one pair a prompt, the one with the largest edit distance (`--pairs edit`);
`--pairs all` takes up to four random pairs a prompt, three times as many from the same tested responses. On the tiny set
accuracy on held-out pairs is 0.84 with one pair a prompt and two epochs (108 steps), 0.88 with five epochs (270), and 0.89 with all
pairs and two epochs (312): most of the difference is the number of steps.

Held-out prompts are new texts; some ask for a program that a training prompt asks for in other words, and have a row of their own.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import difflib
import inspect
import json
import math
import os
import random
import re
import resource
import shutil
import sys
import time
import traceback
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification, AutoTokenizer, Cache, DynamicLayer, get_cosine_schedule_with_warmup)
from transformers.pytorch_utils import Conv1D

import sandbox

PROBLEM_FIELDS = {"task_id": str, "prompt": str, "prefix": str, "setup": str, "entry_point": (str, type(None)), "tests": list}
# What a resumed run may change, after an out-of-memory error, say: it bears on memory, speed or where to stop (and
# generate_batch_size on the order of random numbers).
RESUME_MAY_CHANGE = {"resume", "micro_batch_size", "score_batch_size", "generate_batch_size", "gradient_checkpointing",
                     "shard", "workers", "threads", "max_kl"}

@dataclass
class Config:
    data: str = "data/tiny/rm.jsonl"  # problems with tests, JSONL; disjoint from those of the other stages
    policy: str = "out/sft"  # the SFT model: it writes the responses, and the RM starts from its weights
    out: str = "out/rm"  # folder for the reward model, its samples and pairs
    pairs: typing.Literal["all", "edit"] = "all"  # 'all': up to four random pairs a prompt; 'edit': the paper's one pair
    max_pairs: int = 0  # train on so many of the pairs, drawn at random: a worse RM, to study filters with; 0: all
    label_noise: float = 0.0  # share of the training pairs with chosen and rejected swapped, for the same purpose
    responses_per_prompt: int = 5  # responses sampled for each prompt; paper: 5
    temperature: float = 1.0  # sampling temperature; not given in the paper
    max_new_tokens: int = 96  # longest response, tokens; authors' scripts: 2048
    holdout_share: float = 0.15  # share of the prompts kept from training to measure accuracy
    epochs: int = 2  # passes over the pairs; paper: 1 (authors' scripts: 2), with many more pairs
    batch_size: int = 32  # pairs per optimiser step; authors' scripts: 64
    micro_batch_size: int = 32  # pairs per forward pass; smaller needs less memory and changes nothing else
    lr: float = 5e-4  # peak learning rate of AdamW; paper: 1e-5 (a 6.7B model)
    warmup: float = 0.05  # share of the steps in which the learning rate rises from 0; then half a cosine down to 0
    weight_decay: float = 0.0  # AdamW weight decay; not given in the paper
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm, over all parameters
    save_every: int = 100  # optimiser steps between two saves for --resume, three times the model's size; 0: none
    resume: bool = False  # go on from the last save of an interrupted run; responses are not sampled again
    generate_batch_size: int = 256  # responses generated at once
    score_batch_size: int = 64  # responses scored at once
    timeout: float = 1.0  # CPU seconds a program may take over its tests
    workers: int = 0  # sandbox processes, 0 = one a core
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    dtype: typing.Literal["float32", "bfloat16"] = "float32"  # weights that learn; a GPU multiplies in bf16 either way
    lora_rank: int = 0  # learn adapters of this rank (peft), merged when saved; 0: learn all weights
    shard: bool = False  # under torchrun: split weights and optimiser state over the processes (FSDP2), not the batch alone
    threads: int = 0  # PyTorch CPU threads, 0 = PyTorch's choice
    seed: int = 0  # random seed: sampling, held-out prompts, pairs, order


# -------------------------------------------------------------------------------------------------- the loss, the pairs


def pairwise_loss(chosen_scores, rejected_scores):
    """Bradley-Terry loss, -log sigmoid(chosen - rejected), mean over pairs; both (B,). log 2 where the RM knows nothing."""
    return -F.logsigmoid(chosen_scores - rejected_scores).mean()


def edit_distance(a, b):
    """Levenshtein distance of two strings: characters inserted, deleted or replaced, each at cost 1.

    A row at a time. With d[j] the distance to b[:j], a new row is min(replace or keep, delete, insert). The last of these
    depends on its left neighbour in the same row: d[j] = min over k <= j of (c[k] + j - k), a running minimum of c[k] - k.
    """
    if len(a) < len(b):
        a, b = b, a
    steps = np.arange(len(b) + 1)
    letters = np.array([ord(letter) for letter in b], dtype=np.int64)
    row = steps.copy()
    for number, letter in enumerate(a, 1):
        new = np.empty_like(row)
        new[0] = number
        new[1:] = np.minimum(row[:-1] + (letters != ord(letter)), row[1:] + 1)
        row = np.minimum.accumulate(new - steps) + steps
    return int(row[-1])


def pick_pair(responses, passed):
    """The paper's pair: among (passing, failing) responses of one prompt the two that differ most by edit distance.

    Args: responses: list of strings; passed: list of bool.
    Returns: (index of chosen, index of rejected), the first of equals; None where all pass or all fail.
    """
    best, best_distance = None, -1
    for i, j in all_pairs(responses, passed):
        distance = edit_distance(responses[i], responses[j])
        if distance > best_distance:
            best, best_distance = (i, j), distance
    return best


def all_pairs(responses, passed):
    """All (index of passing, index of failing) pairs of one prompt; a text sampled twice counts once."""
    first = {}  # text -> its first index
    for i, response in enumerate(responses):
        first.setdefault(response, i)
    return [(i, j) for i in first.values() if passed[i] for j in first.values() if not passed[j]]


def clustered_interval(values, prompts, rng, resamples=1000):
    """95% bootstrap interval of the mean of `values`, drawing whole prompts: pairs of one prompt are not independent. Like every
    percentile bootstrap it has no width where all values are equal, and is too narrow for a handful of prompts."""
    _, place = np.unique(prompts, return_inverse=True)
    sums, sizes = np.bincount(place, values), np.bincount(place)
    draws = rng.integers(len(sums), size=(resamples, len(sums)))
    low, high = np.quantile(sums[draws].sum(1) / sizes[draws].sum(1), [0.025, 0.975])
    return float(low), float(high)


def flaw_kind(chosen, rejected):
    """How a failing response differs from a passing one of the same prompt, by lines."""
    changes = [c for c in difflib.SequenceMatcher(None, chosen.split("\n"), rejected.split("\n"), False).get_opcodes()
               if c[0] != "equal"]
    missing = sum(max(0, (c[2] - c[1]) - (c[4] - c[3])) for c in changes)
    extra = sum(max(0, (c[4] - c[3]) - (c[2] - c[1])) for c in changes)
    wrong = sum(min(c[2] - c[1], c[4] - c[3]) for c in changes)
    if wrong == 1 and not missing and not extra:
        return "one wrong line"
    if missing and not wrong and not extra:
        return "missing lines"
    if extra and not wrong and not missing:
        return "extra lines"
    return "several"


# ---------------------------------------------------------------- shared helpers (same name, same code in every file)


def fail(message):
    """Bad input: one line that says what to do, exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_config(config_class, description):
    """Read the command line into a `config_class`: every field is a flag, its comment the flag's help."""
    source = inspect.getsource(config_class)
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    for setting in dataclasses.fields(config_class):
        comment = re.search(rf"^    {setting.name}: [^#]*  # (.*)$", source, re.MULTILINE)
        options = {"default": getattr(config_class(), setting.name), "help": comment[1].replace("%", "%%")}
        if setting.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(setting.type) is typing.Literal:
            options["choices"] = typing.get_args(setting.type)
        elif typing.get_origin(setting.type) is list:
            options.update(nargs="+", type=typing.get_args(setting.type)[0])
        else:
            options["type"] = setting.type
        parser.add_argument(f"--{setting.name}", **options)
    values = vars(parser.parse_args())
    for name, value in values.items():
        if name.endswith("batch_size") and value < 1:
            fail(f"--{name} {value}: it must be at least 1")
    return config_class(**values)


def read_jsonl(path, fields):
    """Read records from a JSONL file.

    Args:
        fields: {name: type or tuple of types}; a record without one of them, or with another type, is an error
            that names file, line and field (exit code 2), as are a missing and an empty file.
    """
    if not Path(path).is_file():
        fail(f"{path} does not exist; run the stage that writes it first (README, the table of stages)")
    records = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                fail(f"{path}, line {number}: not JSON ({error}); repair or delete the line")
            if not isinstance(record, dict):
                fail(f"{path}, line {number}: not a JSON object; repair or delete the line")
            for name, types in fields.items():
                if not isinstance(record.get(name), types):
                    fail(f"{path}, line {number}: field '{name}' is missing or has the wrong type")
            records.append(record)
    if not records:
        fail(f"{path} is empty; write at least one record to it")
    return records


def write_jsonl(path, records):
    """Write records to a JSONL file, whole or not at all: a temporary file takes its place when it is complete."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def finished(cfg, directory):
    """True if `directory` holds this stage's output, made with the same settings; made with others, an error.

    `stage_config.json` is the last file that a stage writes, so it marks the output as complete.
    """
    path = Path(directory) / "stage_config.json"
    if not path.is_file():
        if Path(directory).exists():
            fail(f"{directory} exists but holds no finished run; delete it or choose another --out")
        return False
    old, new = json.loads(path.read_text(encoding="utf-8")), dataclasses.asdict(cfg)
    changed = [f"{name} was {old.get(name)!r}, now {new[name]!r}" for name in new if old.get(name) != new[name]]
    if changed:
        fail(f"{directory} holds a run with other settings ({'; '.join(changed)}); delete it or choose another --out")
    print(f"{directory} is finished; delete it to run this stage again")
    return True


def save_config(cfg, directory):
    """Save the resolved settings next to the output, as the mark that it is complete."""
    path = Path(directory) / "stage_config.json"
    path.with_suffix(".tmp").write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n", encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


def set_up(threads):
    """Where to compute: the GPU where there is one, else the CPU with `threads` threads (0: PyTorch's choice)."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    # On Hopper PyTorch 2.13 prefers cuDNN's attention, whose backward pass gives nan for some lengths with a mask
    # (pytorch issue 196678), and which plans anew for each length: that is, for each token generated.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cost(started):
    """Seconds since `started` and the largest memory of this process so far, for the last line of a stage."""
    memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB"  # Linux counts kilobytes
    if torch.cuda.is_available():
        memory += f", GPU {torch.cuda.max_memory_allocated() / 2**30:.1f} GB"
    return f"{time.time() - started:.0f} s, peak memory {memory}"


def autocast(device):
    """bf16 matrix products on a GPU, with float32 master weights: at lr 5e-7 an update to a bf16 weight rounds away."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()  # on most CPUs bf16 is slower than float32


@contextlib.contextmanager
def memory_advice(cfg):
    """Out of memory: one line that names what to lower, exit code 2. The traceback tells in which phase it was."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError; the CPU has none of its own
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory|ALLOC_FAILED", str(error)):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        places = {frame.name for frame in frames}
        if "load_model" in places or any("/torch/optim/" in frame.filename for frame in frames):
            fail("out of memory: the weights, or the optimiser's state, do not fit; take a smaller model, or "
                 + ("--lora_rank 16" if getattr(cfg, "lora_rank", None) == 0 else "a larger card"))
        if "generate" in places:
            flag = "generate_batch_size"
        elif places & {"score_responses", "forward_rows"}:
            flag = "score_batch_size"
        else:
            flag = "micro_batch_size"
        if not hasattr(cfg, flag):
            raise
        more = "" if flag != "micro_batch_size" or cfg.gradient_checkpointing else ", or add --gradient_checkpointing"
        fail(f"out of memory: lower --{flag} ({getattr(cfg, flag)}){more}")


def check_model_path(path):
    """A missing folder is an error at once; taken for a name on the hub it would cost a minute without a network."""
    if str(path).startswith(("/", ".", "out/")) and not Path(path).is_dir():
        fail(f"no model at {path}; run the stage that writes it first (README, the table of stages)")


def load_tokenizer(path, plain=False):
    """A tokenizer whose EOS closes a response, with a pad token that is not EOS: else a mask made from ids would hide the
    EOS that we train.

    A chat template may close a turn with another token than the tokenizer's EOS (Gemma <end_of_turn>, Phi-3 <|end|>, ChatML
    <|im_end|>). An instruction-tuned model emits that one, so it becomes the EOS. plain: without the template.
    """
    check_model_path(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        fail(f"no tokenizer at {path}; run the stage that writes it first ({str(error).splitlines()[0]})")
    if plain:
        tokenizer.chat_template = None
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "RESPONSE"}]
        _, found, behind = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("RESPONSE")
        special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
        closing = [i for i in tokenizer(behind, add_special_tokens=False).input_ids if i in special]
        if found and closing:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(closing[0])
    if tokenizer.eos_token_id is None:
        fail(f"the tokenizer of {path} has no EOS token; set tokenizer.eos_token and save it")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "<|pf_ppo_pad|>"})
    return tokenizer


def freeze(model, in_bf16):
    """No gradients; with `in_bf16` the weights of matrix products in bf16, as autocast would make them at each use.

    Embeddings and norms stay float32: they carry the residual stream, and a reference that rounds it has other logprobs
    than the policy before the first update.
    """
    model.requires_grad_(False)
    embeddings = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    for module in model.modules() if in_bf16 else ():
        product = isinstance(module, (torch.nn.Linear, Conv1D)) and id(module.weight) not in embeddings  # a head may be tied
        if product and module.weight.shape[0] > 1:  # a head that gives one number stays float32
            module.to(torch.bfloat16)
    return model


def load_model(model_class, path, device, tokens=0, dtype=torch.float32, frozen=False, **options):
    """A float32 model with every dropout at 0: rollout and update must see the same policy, or ratios start off 1.

    Args: tokens: rows that the embedding must have, len(tokenizer). A pad token that `load_tokenizer` had to add gets the
        mean of the other rows: policy and reference get the same one, and no other token's logit changes.
        dtype: of the weights, where not float32. frozen: without gradients, on a GPU half as large (`freeze`).
    """
    check_model_path(path)
    try:
        config = AutoConfig.from_pretrained(path, **options)
        for name, value in config.to_dict().items():  # every architecture has names of its own for them
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        config.classifier_dropout = 0.0  # where it is not set, the token classification head would take 0.1
        model = model_class.from_pretrained(path, config=config, dtype=dtype)
    except (OSError, ValueError) as error:
        if "Unrecognized configuration class" in str(error):
            fail(f"transformers has no {model_class.__name__} of the architecture of {path}, {config.model_type}; take another model")
        fail(f"no model at {path}; run the stage that writes it first ({str(error).splitlines()[0]})")
    rows = model.get_input_embeddings().num_embeddings
    if rows < tokens:
        model.resize_token_embeddings(tokens, mean_resizing=False)
        for layer in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
            layer.weight.data[rows:] = layer.weight.data[:rows].mean(0)
    if frozen:
        freeze(model, device.type == "cuda")  # before it goes to the GPU
    return model.to(device)


def learning_dtype(cfg):
    """--dtype as a torch.dtype, with a warning where it is bfloat16."""
    if cfg.dtype == "bfloat16":
        print(f"warning: --dtype bfloat16: a bf16 weight of 0.02 has neighbours 1e-4 away, and AdamW moves it by about --lr "
              f"({cfg.lr:g}) a step: smaller steps are rounded away and nothing is learned", flush=True)
    return getattr(torch, cfg.dtype)


def add_adapters(model, rank, dtype, seed):
    """Freeze a model and add to each weight matrix W of its blocks a trainable B A of rank `rank` (LoRA, Hu et al. 2022).

    B starts at 0, so the model is at first what it was. The update counts twice (alpha = 2 rank, a common choice).
    """
    if rank < 1:
        fail(f"--lora_rank {rank} is no rank; take 8 to 64, or 0 to learn all weights")
    try:
        import peft
    except ImportError:
        fail("--lora_rank needs the package peft; install it with: pip install -r requirements-lora.txt")
    model.requires_grad_(False)
    torch.manual_seed(seed)  # A is random
    lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear",
                           fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()))
    peft.inject_adapter_in_model(lora, model.base_model)  # the blocks, without the head
    adapted = [module.get_base_layer() for module in model.modules() if hasattr(module, "get_delta_weight")]
    if not all(isinstance(layer, (torch.nn.Linear, Conv1D)) for layer in adapted):  # experts, say: no matrix to merge into
        fail(f"--lora_rank cannot be merged into all layers of {model.config.model_type}; train all weights, or take another model")
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft gives adapters the type of W, and in bf16 small steps would round away
            parameter.data = parameter.data.to(dtype)
    return model


@contextlib.contextmanager
def adapters_off(model):
    """The model as it was before `add_adapters`; one that has none is left alone."""
    adapted = [module for module in model.modules() if hasattr(module, "get_delta_weight")]
    for module in adapted:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in adapted:
            module.enable_adapters(True)


def trained_weights(model):
    """What training changes and --resume needs: the whole state dict, or with LoRA the adapters and the new head."""
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def merged_weights(model):
    """State dict of a model with LoRA adapters as if it had none: W + B A in float32, under the plain names. None without."""
    adapted = {name: m for name, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    if not adapted:
        return None  # save_pretrained then takes the model's own
    weights, copies = {}, {}
    for name, weight in model.state_dict().items():
        module, _, kind = name.rpartition(".base_layer.")
        if ".lora_" in name:
            continue
        weight = copies.setdefault(weight.data_ptr(), weight.float().cpu())  # tied weights stay one tensor
        if module and kind == "weight":
            weight = weight + adapted[module].get_delta_weight("default").float().cpu()
        weights[f"{module}.{kind}" if module else name] = weight
    return weights


def float32_head(model):
    """A reward model or critic that computes its last layer in float32, on a GPU too.

    In bf16 rewards between 2 and 4 are multiples of 1/64: responses would tie in the filter, and the small differences of
    values from token to token, which GAE is made of, would be lost.
    """
    head = model.score if hasattr(model, "score") else model.classifier  # GPT-2 calls that of a critic classifier

    def forward(hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if head.bias is None else head.bias.float()
            return torch.nn.functional.linear(hidden.float(), head.weight.float(), bias)

    head.forward = forward
    return model


def save_model(model, tokenizer, directory, weights=None):
    """Save an ordinary Hugging Face folder, whole or not at all: it gets its name when it is complete.

    weights: a state dict to save in place of the model's own.
    """
    temporary = Path(f"{directory}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, state_dict=weights)
    tokenizer.save_pretrained(temporary)
    if Path(directory).exists():
        shutil.rmtree(f"{directory}.old", ignore_errors=True)  # a kill may have left it
        os.replace(directory, f"{directory}.old")  # never a moment without a whole checkpoint on disk
    os.replace(temporary, directory)
    shutil.rmtree(f"{directory}.old", ignore_errors=True)


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt up to the first response token: chat template for an instruction-tuned model, else plain.

    BOS comes from one place only, the template or the tokenizer. A tokenizer that appends EOS is not heeded: the
    response is yet to come.
    """
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        # Llama 3 would write today's date into each prompt: the reward model of today would see others tomorrow.
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, date_string="26 Jul 2024")
    ids = tokenizer(prompt).input_ids
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def resumable(cfg, work):
    """True if --resume finds an interrupted run in the folder `work`; one with other settings, or no --resume, is an error."""
    path = work / "stage_config.json"
    if not path.is_file():
        return False
    if not cfg.resume:
        fail(f"{work} holds an interrupted run; go on with --resume, or delete it to start again")
    old, new = json.loads(path.read_text(encoding="utf-8")), dataclasses.asdict(cfg)
    changed = [name for name in new if old.get(name) != new[name] and name not in RESUME_MAY_CHANGE]
    if changed:
        fail(f"{work} was started with other settings ({', '.join(changed)}); use the same flags to resume it")
    return True


def save_state(path, model, optimizer, scheduler, **progress):
    """Save what --resume needs, whole or not at all. The order of the batches follows from the seed, and dropout is 0: no
    state of a random generator is needed."""
    state = {"model": whole(trained_weights(model)), "optimizer": whole(optimizer.state_dict()),
             "scheduler": scheduler.state_dict(), **progress}
    if rank() == 0:
        torch.save(state, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)


def load_state(path, model, optimizer, scheduler):
    """Put back what `save_state` has saved -> its progress."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    load_parts(model, optimizer, state.pop("model"), state.pop("optimizer"))
    scheduler.load_state_dict(state.pop("scheduler"))
    return state


def length_grouped_batches(lengths, batch_size, rng):
    """Indices in random batches of similar length, so that little is computed on padding.

    Sorting happens within random windows of 16 batches: a global sort would show the same neighbours every epoch.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    window = 16 * batch_size
    batches = []
    for start in range(0, len(order), window):
        chunk = sorted(order[start:start + window], key=lambda i: lengths[i])
        batches += [chunk[i:i + batch_size] for i in range(0, len(chunk), batch_size)]
    rng.shuffle(batches)
    return batches


class PreallocatedLayer(DynamicLayer):
    """The keys and values of one layer, in buffers made once for `capacity` tokens.

    The default cache of transformers grows by concatenation: it copies itself at every token, which for a small
    model is most of the time.
    """

    def __init__(self, capacity):
        super().__init__()
        self.capacity = capacity

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            heads, width, kind = key_states.shape[1], key_states.shape[3], key_states.device.type
            # Under autocast attention reads bf16: kept in float32, the whole cache would be cast again at every token.
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else key_states.dtype
            self.buffers = [s.new_empty(s.shape[0], heads, self.capacity, width, dtype=dtype)
                            for s in (key_states, value_states)]
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states)):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        """Rows repeated (a prompt's responses share its prefix) or dropped (in place); only what is filled is copied."""
        end = self.get_seq_length()
        for i, filled in enumerate((self.keys, self.values)):
            if len(indices) > len(filled):
                self.buffers[i] = filled.new_empty(len(indices), filled.shape[1], self.capacity, filled.shape[3])
            self.buffers[i] = self.buffers[i][:len(indices)]
            self.buffers[i][:, :, :end] = filled.index_select(0, indices)
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)


@torch.no_grad()
def generate(model, tokenizer, prompts, responses_per_prompt, max_new_tokens, temperature, generator, batch_size,
             look_every=0, stop=()):
    """Sample responses; faster than `model.generate` by a preallocated cache, prompts sorted by length and computed
    once for all their responses, and finished rows dropped from the batch.

    Args:
        prompts: list of token id lists; temperature: divides the logits, 0 for greedy.
        batch_size: rows (responses) computed at once; generator: torch.Generator on the model's device, or
            the uniform numbers to use, one for each prompt, response and token.
        look_every: tokens between two looks at which rows have finished. A look makes the host wait for the GPU, so 0 means
            1 on the CPU and 16 on a GPU; what a finished row writes in between is cut off.
        stop: strings that finish a row, too, at the next look; what follows them, be it an EOS, is for the caller to cut off.
    Returns: for each prompt a list of `responses_per_prompt` token id lists; one that does not end in EOS is truncated.
    """
    if responses_per_prompt > batch_size:  # the responses of a prompt in parts
        spans = [slice(at, min(at + batch_size, responses_per_prompt)) for at in range(0, responses_per_prompt, batch_size)]
        parts = [generate(model, tokenizer, prompts, span.stop - span.start, max_new_tokens, temperature,
                          generator[:, span] if isinstance(generator, torch.Tensor) else generator, batch_size, look_every, stop)
                 for span in spans]
        return [sum(groups, []) for groups in zip(*parts)]
    device, eos, training = model.device, tokenizer.eos_token_id, model.training
    model.eval()  # gradient checkpointing, which works in train() mode only, would switch the cache off
    look_every = look_every or (1 if device.type == "cpu" else 16)
    tail = look_every + max((len(string.encode()) for string in stop), default=0)  # tokens that may hold a new stop string
    # A mask of two dimensions makes transformers look, too (is there any padding?); one of four it takes as it is.
    four_dimensions = (look_every > 1 and model.config._attn_implementation == "sdpa"
                       and not getattr(model.config, "sliding_window", None))
    responses = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    prompts_per_batch = batch_size // responses_per_prompt
    for first in range(0, len(order), prompts_per_batch):
        batch = order[first:first + prompts_per_batch]
        width = len(prompts[batch[-1]])
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)  # (P, width), padded left
        mask = torch.zeros(len(batch), width + max_new_tokens, dtype=torch.long)
        for row, i in enumerate(batch):
            ids[row, width - len(prompts[i]):] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]):] = 1
        ids, mask = ids.to(device), mask.to(device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = Cache(layers=[PreallocatedLayer(mask.shape[1]) for _ in range(model.config.num_hidden_layers)])
        logits = model(input_ids=ids, attention_mask=mask[:, :width], position_ids=positions[:, :width],
                       past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        rows = torch.arange(len(batch), device=device).repeat_interleave(responses_per_prompt)
        tokens = torch.full((len(rows), max_new_tokens), eos, device=device)
        active = torch.arange(len(rows), device=device)  # the rows of `tokens` that are still in the batch
        going = torch.ones_like(active, dtype=torch.bool)  # of these, the ones that have not met EOS
        cache.batch_select_indices(rows)
        logits, mask, positions = logits[rows], mask[rows], positions[rows]
        drawn = generator[batch].flatten(0, 1) if isinstance(generator, torch.Tensor) else None  # (rows, max_new_tokens)
        for t in range(max_new_tokens):
            if temperature > 0:  # a uniform number falls into a token's share of the cumulative distribution
                cumulative = torch.softmax(logits.float() / temperature, -1).cumsum(-1)
                uniform = (torch.rand(len(cumulative), 1, generator=generator, device=device) if drawn is None else
                           drawn[active, t, None]) * cumulative[:, -1:]
                chosen = torch.searchsorted(cumulative, uniform, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
            else:
                chosen = logits.argmax(-1)
            tokens[active, t] = chosen
            going = going & (chosen != eos)
            if t + 1 == max_new_tokens:
                break
            if (t + 1) % look_every == 0:
                if stop:
                    ends = [decode_response(tokenizer, ids) for ids in tokens[active, max(0, t + 1 - tail):t + 1].tolist()]
                    going = going & torch.tensor([not any(s in end for s in stop) for end in ends], device=device)
                count = int(going.sum())
                if count == 0:
                    break
                if count <= 0.8 * len(active):  # dropping costs a copy of the cache, so not for every single row
                    keep = going.nonzero().squeeze(1)
                    cache.batch_select_indices(keep)
                    active, going, chosen = active[keep], going[keep], chosen[keep]
                    mask, positions = mask[keep], positions[keep]
            seen = mask[:, :width + t + 1]
            logits = model(input_ids=chosen[:, None], attention_mask=seen[:, None, None].bool() if four_dimensions else seen,
                           past_key_values=cache, position_ids=positions[:, width + t, None], use_cache=True).logits[:, -1]
        tokens = tokens.tolist()
        for row, i in enumerate(batch):
            responses[i] = [cut_at_eos(r, eos) for r in tokens[row * responses_per_prompt:][:responses_per_prompt]]
    model.train(training)
    return responses


def cut_at_eos(ids, eos):
    """Token ids up to and including the first EOS; all of them where there is none (a truncated response)."""
    return ids[:ids.index(eos) + 1] if eos in ids else ids


def decode_response(tokenizer, ids):
    """The text of a response without its EOS, as it continues a prompt.

    SentencePiece tokenizers (Llama 2, CodeLlama, Mistral) drop a space at the start of a text: of "    return x" three would
    be left, and no program would run. Behind a line break they drop nothing.
    """
    ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    start = tokenizer("\n", add_special_tokens=False).input_ids
    return tokenizer.decode(start + ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).removeprefix("\n")


def run_tests(problems, responses, workers, timeout):
    """Run responses against the tests of their problems, identical programs once -> list of sandbox.Result."""
    programs = [sandbox.program(problem, response) for problem, response in zip(problems, responses)]
    jobs, index = [], {}
    for problem, code in zip(problems, programs):
        if index.setdefault((problem["task_id"], code), len(jobs)) == len(jobs):
            jobs.append({"code": code, "tests": problem["tests"], "setup": problem["setup"],
                         "entry_point": problem["entry_point"], "timeout": timeout})
    results = sandbox.run_many(jobs, workers=workers or None)
    return [results[index[problem["task_id"], code]] for problem, code in zip(problems, programs)]


def check_lengths(problems, prompt_ids, max_new_tokens, model_config):
    """A prompt that leaves no room for a response in the model's context is an error, named before work begins."""
    context = getattr(model_config, "max_position_embeddings", None) or math.inf
    longest = max(range(len(problems)), key=lambda i: len(prompt_ids[i]))
    if len(prompt_ids[longest]) + max_new_tokens > context:
        fail(f"the prompt of {problems[longest]['task_id']} has {len(prompt_ids[longest])} tokens, and with "
             f"--max_new_tokens {max_new_tokens} exceeds the model's context of {context}; lower the flag or drop the problem")


def pad_right(sequences, pad_id):
    """Token id lists -> (B, L) tensor, padded on the right."""
    length = max(len(sequence) for sequence in sequences)
    return torch.tensor([sequence + [pad_id] * (length - len(sequence)) for sequence in sequences])


@torch.no_grad()
def score_responses(reward_model, sequences, pad_id, batch_size):
    """Reward of each sequence (prompt ids + response ids) -> (B,) float32 on the CPU, computed in order of length.

    The score stands on the last token, so right padding is never looked at and needs no attention mask.
    """
    scores = torch.zeros(len(sequences))
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start:start + batch_size]
        input_ids = pad_right([sequences[i] for i in batch], pad_id).to(reward_model.device)
        with autocast(reward_model.device):
            scores[batch] = reward_model(input_ids=input_ids, use_cache=False).logits[:, 0].float().cpu()
    return scores


# ----------------------------- several processes, `torchrun --nproc_per_node=K`, share every batch (same code in 01, 02 and 04)
# One process alone passes through these functions as if they were not there.


def join_processes(device, cfg):
    """Join the processes that torchrun has started, each with a GPU of its own, or on the CPU; alone: nothing.

    Every process computes the same numbers and decides the same; the one with rank 0 writes the files and prints.
    """
    if cfg.shard and cfg.lora_rank:
        fail("--shard and --lora_rank do not go together: with adapters there is little to split; leave one out")
    if not dist.is_torchelastic_launched():
        if cfg.shard:
            fail("--shard splits models over several processes; start them with torchrun --nproc_per_node=K")
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        # Numbers and token ids are gathered on the CPU, gradients on the GPU; the others wait while rank 0 runs the tests.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=12))
    dist.barrier()  # nobody writes before all have seen that nothing is in the way
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")


def leave_processes():
    """Wait for the others and end the group. A process that just exits may abort, and torchrun then kills rank 0 at its work."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank():
    """The number of this process; 0 is the one that writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def my_micro_batches(rows, size):
    """This process's part of a minibatch, in micro-batches of at most `size` rows -> [(rows, 1.0)].

    All processes get equally many, since those of a sharded model meet in each forward pass: one too many has 0.0.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1
    size = min(size, math.ceil(len(rows) / processes))
    parts = [rows[start:start + size] for start in range(0, len(rows), size)]
    turns = range(rank(), math.ceil(len(parts) / processes) * processes, processes)
    return [(parts[k % len(parts)], float(k < len(parts))) for k in turns]


def add_up(numbers):
    """The sums of a list of numbers over all processes."""
    if not dist.is_initialized():
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def clip_gradients(model, max_norm):
    """Sum the gradients over all processes, then scale them down to `max_norm` -> their norm before."""
    if dist.is_initialized() and not isinstance(model, FSDPModule):  # a sharded model sums them in its backward pass
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def on_rank_0(function, *arguments):
    """Call a function in one process only and give its result to all."""
    result = [function(*arguments) if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    return result[0]


def shared_rows(function, rows):
    """function(rows) -> (len(rows), ...) on the CPU; each process computes a part -> all of it, in every process.

    All processes take equally many rows, some of them twice: those of a sharded model meet in each forward pass.
    """
    if not dist.is_initialized():
        return function(rows)
    processes = dist.get_world_size()
    count = math.ceil(len(rows) / processes)
    part = function(rows[torch.arange(rank(), count * processes, processes) % len(rows)]).contiguous()
    parts = [torch.empty_like(part) for _ in range(processes)]
    dist.all_gather(parts, part)
    return torch.stack(parts, 1).flatten(0, 1)[:len(rows)]


@torch.no_grad()
def shared_generate(model, tokenizer, prompts, responses_per_prompt, max_new_tokens, temperature, generator, batch_size):
    """`generate`, each process for a part of the prompts -> the responses to all, in every process.

    Under torchrun every response has random numbers of its own, drawn beforehand: it is the same for any number of
    processes. (One process alone draws them as it goes, as ever.)
    """
    if not dist.is_initialized():
        return generate(model, tokenizer, prompts, responses_per_prompt, max_new_tokens, temperature, generator, batch_size)
    uniform = torch.rand(len(prompts), responses_per_prompt, max_new_tokens, generator=generator, device=model.device)

    def tokens(rows):
        groups = generate(model, tokenizer, [prompts[i] for i in rows], responses_per_prompt, max_new_tokens, temperature,
                          uniform[rows], batch_size)
        return torch.tensor([[ids + [-1] * (max_new_tokens - len(ids)) for ids in group] for group in groups])

    # A sharded model would gather its weights for each token anew; it does so once, and holds them while it generates.
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    groups = shared_rows(tokens, torch.arange(len(prompts))).tolist()
    for module in sharded:
        module.reshard()
        module.set_reshard_after_forward(module is not model, recurse=False)
    return [[[token for token in ids if token >= 0] for ids in group] for group in groups]


def shard(model, device):
    """Split weights, gradients and optimiser state over the processes, block by block (FSDP2); bf16 products on a GPU."""
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
    blocks = max((module for module in model.modules() if isinstance(module, torch.nn.ModuleList)), key=len)
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=precision)
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)  # a sum, not a mean: the losses are divided by the tokens of all processes
    return model


def whole(state):
    """A state dict for a file, the parts of sharded tensors put together; all processes take part, rank 0 gets it."""
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    if isinstance(state, DTensor):
        state = state.full_tensor()
        return state.cpu() if rank() == 0 else None
    return state


def load_parts(model, optimizer, weights, state):
    """Load state dicts of a file into a model and its optimiser; of a sharded tensor each process takes its part."""
    def part(full, like):
        return distribute_tensor(full, like.device_mesh, like.placements) if isinstance(like, DTensor) and full.dim() else full

    own = model.state_dict()
    # Not strict: with LoRA the frozen weights are not in the file.
    model.load_state_dict({name: part(tensor, own[name]) for name, tensor in weights.items()}, strict=False)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state["state"] = {i: {name: part(value, parameters[i]) for name, value in values.items()}
                      for i, values in state["state"].items()}
    optimizer.load_state_dict(state)


def shared_save(model, tokenizer, directory):
    """`save_model` by rank 0; the parts of a sharded model come together first."""
    weights = merged_weights(model) if rank() == 0 else None
    if isinstance(model, FSDPModule):
        first = {name for name, _ in model.named_parameters()}  # of tied weights one, as safetensors wants it
        tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - first
        weights = whole({name: tensor for name, tensor in model.state_dict().items() if name not in tied})
    if rank() == 0:
        save_model(model, tokenizer, directory, weights)


# ---------------------------------------------------------------------------------------------------------------- main


def check_architecture(path):
    """transformers has no reward model, or no critic, of some architectures: said before the samples are paid for."""
    config = AutoConfig.from_pretrained(path)
    for model_class in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        try:
            with torch.device("meta"):  # no memory
                model_class.from_config(config)
        except ValueError:
            missing = f"transformers has no {model_class.__name__} of the architecture of {path}, {config.model_type}"
            if model_class is AutoModelForSequenceClassification:
                fail(f"{missing}, which a reward model is; take another model")
            print(f"warning: {missing}: stage 4 will have no critic, and needs --advantage rloo or grpo", flush=True)


def sample_and_test(problems, prompt_ids, tokenizer, part_size, sample, cfg):
    """Responses to all prompts with their verdicts; the programs of a part are tested while the next part is sampled.

    A part is `part_size` prompts, in order of length, as `generate` takes them: if that is a multiple of its batch, or all,
    parts change nothing. `sample(prompts)` gives for each prompt its responses, lists of token ids.
    Returns: (problem, token ids, text, sandbox.Result) of each response, in order of prompt.
    """
    order = sorted(range(len(problems)), key=lambda p: len(prompt_ids[p]))
    background, sampled, tests, started = concurrent.futures.ThreadPoolExecutor(1), [], [], time.time()
    for start in range(0, len(order), part_size):
        part = order[start:start + part_size]
        groups = sample([prompt_ids[p] for p in part])
        rows = [(p, ids, decode_response(tokenizer, ids)) for p, group in zip(part, groups) for ids in group]
        if rank() == 0:
            tests.append(background.submit(run_tests, [problems[p] for p, _, _ in rows], [text for _, _, text in rows],
                                           cfg.workers, cfg.timeout))
        sampled += rows
    print(f"{len(sampled)} responses, {time.time() - started:.0f} s", flush=True)
    results = on_rank_0(lambda: [result for part in tests for result in part.result()])
    rows = sorted(zip(sampled, results), key=lambda row: row[0][0])  # stable: the responses of a prompt stay in their order
    return [(problems[p], ids, text, result) for (p, ids, text), result in rows]


def main(cfg):
    started = time.time()
    out, work = Path(cfg.out), Path(f"{cfg.out}.work")
    settings = dataclasses.replace(cfg, resume=False)
    if not (cfg.resume and work.exists()) or (out / "stage_config.json").is_file():  # nothing of another's is written over
        if finished(settings, out):
            shutil.rmtree(work, ignore_errors=True)  # a kill at the very end leaves it
            return
    resuming = resumable(cfg, work)
    problems = read_jsonl(cfg.data, PROBLEM_FIELDS)
    n = cfg.responses_per_prompt
    if n < 2:
        fail(f"--responses_per_prompt {n} gives no pairs; take at least 2")
    if not (0 < cfg.holdout_share < 1 and 0 <= cfg.label_noise <= 1 and cfg.max_pairs >= 0):
        fail("--holdout_share must be between 0 and 1, --label_noise from 0 to 1, --max_pairs at least 0")
    rng = random.Random(cfg.seed)
    device = set_up(cfg.threads)
    join_processes(device, cfg)
    home = torch.device("cpu") if cfg.shard else device  # a sharded model goes to the GPU block by block
    tokenizer = load_tokenizer(cfg.policy)
    check_architecture(cfg.policy)
    prompt_ids = [encode_prompt(tokenizer, problem["prompt"]) for problem in problems]

    # ---- sample responses of the SFT policy, run the tests
    if resuming:
        records = read_jsonl(work / "samples.jsonl", {"response_ids": list})
        print(f"resuming {out} with the {len(records)} responses in {work}", flush=True)
    else:
        policy = load_model(AutoModelForCausalLM, cfg.policy, home, len(tokenizer), frozen=True).eval()
        check_lengths(problems, prompt_ids, cfg.max_new_tokens, policy.config)
        if cfg.shard:
            shard(policy, device)
        generator = torch.Generator(device).manual_seed(cfg.seed)
        # A CPU does one after the other: sandbox and PyTorch would only take its cores from each other.
        part_size = len(problems) if device.type == "cpu" else 4 * max(1, cfg.generate_batch_size // n)

        def sample(prompts):
            with autocast(device):
                return shared_generate(policy, tokenizer, prompts, n, cfg.max_new_tokens, cfg.temperature, generator,
                                       cfg.generate_batch_size)

        tested = sample_and_test(problems, prompt_ids, tokenizer, part_size, sample, cfg)
        del policy
        records = [{"task_id": problem["task_id"], "prompt": problem["prompt"], "response": text, "rm_score": None,
                    "actual_score": float(result.passed), "passed_tests": result.passed_tests,
                    "total_tests": result.total_tests, "status": result.status,
                    "truncated": ids[-1] != tokenizer.eos_token_id, "policy": cfg.policy, "response_ids": ids}
                   for problem, ids, text, result in tested]
    grouped = [records[i:i + n] for i in range(0, len(records), n)]  # the records of each prompt
    response_ids = [[record["response_ids"] for record in group] for group in grouped]
    responses = [[record["response"] for record in group] for group in grouped]
    passed = [[record["actual_score"] == 1.0 for record in group] for group in grouped]
    mixed = {p for p, group in enumerate(passed) if any(group) and not all(group)}
    print(f"pass rate {sum(map(sum, passed)) / len(records):.3f}, mixed outcomes for {len(mixed)} of {len(problems)} prompts, "
          f"{time.time() - started:.0f} s", flush=True)

    # ---- whole prompts are held out, so that no pair of a training prompt measures accuracy
    order = list(range(len(problems)))
    rng.shuffle(order)
    heldout = set(order[:max(1, round(cfg.holdout_share * len(order)))])
    if not mixed - heldout or not mixed & heldout:
        fail(f"{cfg.data} gives {len(mixed - heldout)} training and {len(mixed & heldout)} held-out prompts with both a passing "
             "and a failing response; give more problems, or a policy that solves some of them")
    if not resuming and rank() == 0:
        work.mkdir(parents=True, exist_ok=True)
        write_jsonl(work / "samples.jsonl", records)
        save_config(settings, work)  # as in the output: written last, it marks the samples as complete

    # ---- pick pairs
    pairs, train, test = [], [], []  # train, test: (prompt index, passing response, failing response, largest edit?)
    for p in sorted(mixed):
        candidates, edit_pair = all_pairs(responses[p], passed[p]), pick_pair(responses[p], passed[p])
        if p in heldout:
            test += [(p, i, j, (i, j) == edit_pair) for i, j in candidates]
            continue
        for i, j in [edit_pair] if cfg.pairs == "edit" else rng.sample(candidates, min(4, len(candidates))):
            train.append((p, i, j, (i, j) == edit_pair))
            pairs.append({"task_id": problems[p]["task_id"], "prompt": problems[p]["prompt"], "chosen": responses[p][i],
                          "rejected": responses[p][j], "edit_distance": edit_distance(responses[p][i], responses[p][j])})
    if cfg.max_pairs and cfg.max_pairs < len(train):
        drawn = sorted(rng.sample(range(len(train)), cfg.max_pairs))
        train, pairs = [train[k] for k in drawn], [pairs[k] for k in drawn]
    for k, (p, i, j, largest) in enumerate(train if cfg.label_noise else []):
        if rng.random() < cfg.label_noise:
            train[k] = (p, j, i, largest)
            pairs[k].update(chosen=pairs[k]["rejected"], rejected=pairs[k]["chosen"])
    print(f"{len(train)} training pairs, {len(test)} pairs of held-out prompts, {time.time() - started:.0f} s", flush=True)

    # ---- train; the RM starts as the SFT model with a new scalar head
    torch.manual_seed(cfg.seed)  # the head's first weights
    reward_model = float32_head(load_model(AutoModelForSequenceClassification, cfg.policy, home, len(tokenizer),
                                           learning_dtype(cfg), frozen=cfg.lora_rank > 0, num_labels=1))
    if cfg.lora_rank:
        add_adapters(reward_model, cfg.lora_rank, getattr(torch, cfg.dtype), cfg.seed)
        reward_model.score.to(getattr(torch, cfg.dtype)).requires_grad_(True)  # the new head learns as it is
    reward_model.config.pad_token_id = tokenizer.pad_token_id
    reward_model.train()  # gradient checkpointing works in this mode only; dropout is 0
    if cfg.gradient_checkpointing:
        reward_model.activation_checkpointing_enable()
    if cfg.shard:
        shard(reward_model, device)
    optimizer = torch.optim.AdamW([p for p in reward_model.parameters() if p.requires_grad], lr=cfg.lr,
                                  weight_decay=cfg.weight_decay, betas=(0.9, 0.95), fused=device.type == "cuda" or None)
    lengths = [len(prompt_ids[p]) + max(len(response_ids[p][i]), len(response_ids[p][j])) for p, i, j, _ in train]
    batches = [b for _ in range(cfg.epochs) for b in length_grouped_batches(lengths, cfg.batch_size, rng)]
    scheduler = get_cosine_schedule_with_warmup(optimizer, round(cfg.warmup * len(batches)), len(batches))
    done, losses, hits, seen = 0, [], 0, 0
    if resuming and (work / "state.pt").is_file():
        progress = load_state(work / "state.pt", reward_model, optimizer, scheduler)
        done, losses, hits, seen = (progress[name] for name in ("step", "losses", "hits", "seen"))
        started -= progress["seconds"]
        print(f"resuming after step {done} of {len(batches)}", flush=True)
    for step, batch in enumerate(batches[done:], done + 1):
        step_loss, step_hits = 0.0, 0
        for part, counts in my_micro_batches(batch, cfg.micro_batch_size):
            mb = [train[k] for k in part]
            sequences = [prompt_ids[p] + response_ids[p][i] for p, i, _, _ in mb]
            sequences += [prompt_ids[p] + response_ids[p][j] for p, _, j, _ in mb]
            with autocast(device):
                input_ids = pad_right(sequences, tokenizer.pad_token_id).to(device)
                scores = reward_model(input_ids=input_ids, use_cache=False).logits[:, 0]
            chosen, rejected = scores.float().chunk(2)  # (B,) each
            loss = counts * pairwise_loss(chosen, rejected) * len(mb) / len(batch)
            loss.backward()
            step_loss += loss.item()
            step_hits += counts * (chosen > rejected).sum().item()
        step_loss, step_hits = add_up([step_loss, step_hits])
        norm = clip_gradients(reward_model, cfg.max_grad_norm)
        if not math.isfinite(step_loss + norm):  # a finite loss may have a gradient that is not
            fail(f"the loss is {step_loss}, its gradient's norm {norm} at step {step}; lower --lr ({cfg.lr}) in another --out")
        losses, hits, seen = losses + [step_loss], hits + step_hits, seen + len(batch)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == len(batches):
            print(f"step {step}/{len(batches)}  loss {sum(losses) / len(losses):.3f}  "
                  f"training accuracy {hits / seen:.3f}  {time.time() - started:.0f} s", flush=True)
            losses, hits, seen = [], 0, 0
        if cfg.save_every and step % cfg.save_every == 0:
            save_state(work / "state.pt", reward_model, optimizer, scheduler, step=step, losses=losses, hits=hits,
                       seen=seen, seconds=time.time() - started)

    # ---- score every response once more: statistics for reward normalisation, accuracy on held-out prompts
    sequences = [prompt_ids[p] + ids for p in range(len(problems)) for ids in response_ids[p]]
    scores = shared_rows(lambda rows: score_responses(reward_model, [sequences[k] for k in rows], tokenizer.pad_token_id,
                                                      cfg.score_batch_size), torch.arange(len(sequences)))
    scores = scores.view(len(problems), n)
    # Over held-out prompts only: on training prompts the rewards are stretched by what was memorised.
    heldout_scores = scores[sorted(heldout)]
    reward_model.config.reward_mean = heldout_scores.mean().item()
    reward_model.config.reward_std = heldout_scores.std().item()

    def accuracy(subset):
        """Share of pairs in which the passing response has the higher reward, beside 'the shorter one is better'."""
        right = [float(scores[p, i] > scores[p, j]) for p, i, j, _ in subset]
        shorter = [float(len(responses[p][i]) < len(responses[p][j]))
                   + 0.5 * (len(responses[p][i]) == len(responses[p][j])) for p, i, j, _ in subset]
        low, high = clustered_interval(right, [p for p, _, _, _ in subset], np.random.default_rng(cfg.seed))
        return {"pairs": len(subset), "accuracy": float(np.mean(right)), "low": low, "high": high,
                "shorter_is_better": float(np.mean(shorter))}

    groups = {"all pairs": test, "largest-edit pairs": [t for t in test if t[3]]}
    for t in test:
        groups.setdefault(flaw_kind(responses[t[0]][t[1]], responses[t[0]][t[2]]), []).append(t)
    # Prompts are held out, not programs: the tiny set asks for some of them again in other words.
    known = {problem.get("solution") for p, problem in enumerate(problems) if p not in heldout} - {None}
    seen = [t for t in test if problems[t[0]].get("solution") in known]
    if 0 < len(seen) < len(test):
        groups.update({"program in training": seen, "new program": [t for t in test if problems[t[0]].get("solution") not in known]})
    table = {name: accuracy(subset) for name, subset in groups.items()}
    print(f"\naccuracy on {len({t[0] for t in test})} held-out prompts (pairs: {cfg.pairs})")
    print(f"{'pairs':<22}{'number':>7}{'RM, 95% interval':>24}{'shorter is better':>20}")
    for name, row in table.items():
        print(f"{name:<22}{row['pairs']:>7}{row['accuracy']:>10.3f} [{row['low']:.2f}, {row['high']:.2f}]"
              f"{row['shorter_is_better']:>20.3f}")

    # ---- save
    for record, score in zip(records, scores.flatten().tolist()):
        record["rm_score"] = score
        del record["response_ids"]
    out.parent.mkdir(parents=True, exist_ok=True)
    shared_save(reward_model, tokenizer, out)
    if rank() == 0:
        write_jsonl(out / "samples.jsonl", records)
        write_jsonl(out / "pairs.jsonl", pairs)
        (out / "accuracy.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        save_config(settings, out)
        shutil.rmtree(work)
    print(f"saved {out}; stage 02_reward_model took {cost(started)}")


if __name__ == "__main__":
    config = parse_config(Config, __doc__)
    with memory_advice(config):
        main(config)
    leave_processes()
