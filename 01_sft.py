"""Stage 1, supervised fine-tuning (SFT): teach a causal language model to answer a prompt with code.

The loss is the usual next-token cross-entropy, on response tokens only, with the end-of-sequence token (EOS) among
them: a model that never saw EOS as a target never stops. The result is the policy that every later stage starts from.

Reads   data/tiny/sft.jsonl     {"task_id": "tiny/sft/0", "prompt": "...", "solution": "    return sum(xs)\\n", ...}
Writes  out/sft/                an ordinary Hugging Face folder (model and tokenizer), metrics.jsonl beside the weights
                                {"step": 50, "train_loss": 1.91, "validation_loss": 1.62, "lr": 0.002, "seconds": 11.8}
        out/sft.work/           what --resume needs, until the stage is finished

Run     python 01_sft.py                                        the tiny model, from scratch
        python 01_sft.py --model Qwen/Qwen2.5-Coder-0.5B --data data/magicoder/sft.jsonl --lr 1e-5 --epochs 5
        torchrun --nproc_per_node=2 01_sft.py ...               the same work shared by two GPUs (--shard: models split, too)

Simplified against the paper (section 4, full-parameter training of deepseek-coder-6.7b on 130k examples, 5 epochs,
lr 1e-5): the tiny setting builds a model of 0.9 million parameters and trains it on 6,000 small programs, many of
which are wrong on purpose, so that there is something left for the later stages to learn.
"""

import argparse
import contextlib
import dataclasses
import datetime
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

import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast, get_cosine_schedule_with_warmup)
from transformers.pytorch_utils import Conv1D

# What a resumed run may change, after an out-of-memory error, say: it bears on memory, speed or where to stop (and
# generate_batch_size on the order of random numbers).
RESUME_MAY_CHANGE = {"resume", "micro_batch_size", "score_batch_size", "generate_batch_size", "gradient_checkpointing",
                     "shard", "workers", "threads", "max_kl"}

@dataclass
class Config:
    data: str = "data/tiny/sft.jsonl"  # problems with a solution, JSONL
    out: str = "out/sft"  # folder for the fine-tuned model
    model: str = "scratch"  # 'scratch' builds the tiny model, else a Hugging Face name or folder; paper: deepseek-coder-6.7b
    epochs: float = 4.5  # passes over the training examples; paper: 5
    batch_size: int = 64  # examples per optimiser step; not given in the paper
    micro_batch_size: int = 64  # examples per forward pass; smaller needs less memory and changes nothing else
    lr: float = 2e-3  # peak learning rate of AdamW; paper: 1e-5 (a pretrained model)
    warmup: float = 0.05  # share of the steps in which the learning rate rises from 0; then half a cosine down to 0
    weight_decay: float = 0.1  # AdamW weight decay; not given in the paper
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm, over all parameters
    plain: bool = False  # prompts without the chat template, which some base models' tokenizers have, too; all stages follow
    max_length: int = 512  # tokens of prompt and response; longer examples are left out, and counted
    validation_share: float = 0.05  # share of the examples held out for the validation loss
    log_every: int = 50  # optimiser steps between two lines of the log; 0: the last alone
    save_every: int = 100  # optimiser steps between two saves for --resume, three times the model's size; 0: none
    resume: bool = False  # go on from the last save of an interrupted run
    vocab_size: int = 1024  # scratch only: tokens of the byte-level BPE tokenizer at most, at least 258
    hidden_size: int = 128  # scratch only: width of the model
    layers: int = 4  # scratch only: number of transformer blocks
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    dtype: typing.Literal["float32", "bfloat16"] = "float32"  # weights that learn; a GPU multiplies in bf16 either way
    lora_rank: int = 0  # learn adapters of this rank (peft), merged when saved; 0: learn all weights
    logits_mb: int = 512  # logits that take more than this in float32, MB, are computed in parts; 0: always at once
    shard: bool = False  # under torchrun: split weights and optimiser state over the processes (FSDP2), not the batch alone
    threads: int = 0  # PyTorch CPU threads, 0 = PyTorch's choice
    seed: int = 0  # random seed: held-out examples, order, initial weights


# ------------------------------------------------------------------------------------------------- the loss, the data


def response_loss(logits, labels):
    """Cross-entropy summed over response tokens.

    Args:
        logits: (B, L, V); `logits[:, t]` predicts token t + 1.
        labels: (B, L) token ids, -100 on the prompt and on padding.
    Returns: a scalar, nats.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100,
                           reduction="sum")


def batch_loss(model, input_ids, labels, logits_mb):
    """`response_loss` of a batch, both (B, L); logits of more than `logits_mb` MB in float32 come in parts (0: never)."""
    if logits_mb and labels.numel() * model.config.vocab_size > logits_mb * 2**18:  # a float32 has four bytes
        targets = labels[:, 1:]  # neither the prompt nor padding needs logits
        return -target_logprobs(model, targets, targets != -100, 1.0, logits_mb, input_ids=input_ids).sum()
    return response_loss(model(input_ids=input_ids).logits, labels)


def collate(examples, pad_id):
    """Pad (prompt ids, response ids) pairs on the right -> input_ids, labels, both (B, L).

    Padding stands behind every real token, where causal attention never looks: no attention mask is needed.
    """
    length = max(len(prompt) + len(response) for prompt, response in examples)
    input_ids = torch.full((len(examples), length), pad_id)
    labels = torch.full((len(examples), length), -100)
    for row, (prompt, response) in enumerate(examples):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor(prompt + response)
        labels[row, len(prompt):end] = torch.tensor(response)  # EOS is the last label: the model learns to stop
    return input_ids, labels


# ---------------------------------------------------------------------------------------------- the model from scratch


def build_tokenizer(texts, vocab_size):
    """A byte-level BPE tokenizer trained on `texts`: any text can be encoded, and decoding gives it back exactly."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "<eos>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
                                   clean_up_tokenization_spaces=False)


def build_model(cfg, tokenizer):
    """A small Llama with random weights; heads of 32 dimensions, an MLP three times as wide as the model."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=cfg.hidden_size, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.hidden_size // 32, intermediate_size=3 * cfg.hidden_size,
        max_position_embeddings=cfg.max_length, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


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


def decode_response(tokenizer, ids):
    """The text of a response without its EOS, as it continues a prompt.

    SentencePiece tokenizers (Llama 2, CodeLlama, Mistral) drop a space at the start of a text: of "    return x" three would
    be left, and no program would run. Behind a line break they drop nothing.
    """
    ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    start = tokenizer("\n", add_special_tokens=False).input_ids
    return tokenizer.decode(start + ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).removeprefix("\n")


def encode_response(tokenizer, response):
    """Token ids of a response with its EOS, as they continue a prompt: SentencePiece tokenizers would put a space first."""
    ids = tokenizer(response, add_special_tokens=False).input_ids
    if decode_response(tokenizer, ids) == " " + response:
        start = tokenizer("\n", add_special_tokens=False).input_ids  # they never merge a line break with what follows
        ids = tokenizer("\n" + response, add_special_tokens=False).input_ids[len(start):]
    return ids + [tokenizer.eos_token_id]


def target_logprobs(model, targets, real, temperature, logits_mb, **inputs):
    """Log-probability of each target under softmax(logits / temperature), without all logits at once.

    In float32 the logits of 48 responses of 512 tokens and a vocabulary of 152k take 15 GB, their gradient as much again, and
    more than the model. Here a part of them is computed, used and forgotten, and computed once more in the backward pass.

    Args: targets, real: (B, T) token ids that follow the last T positions but one of `inputs`, and where they count;
        logits_mb: size of a part in float32, MB. `logits_are_plain(model)` must hold. Returns: (B, T) float32, 0 where not real.
    """
    head = model.get_output_embeddings()
    logits_of = head.forward
    size = max(1, int(logits_mb * 2**18 / head.weight.shape[0]))  # rows; a float32 has four bytes

    def part(hidden, targets):
        return -torch.nn.functional.cross_entropy(logits_of(hidden).float() / temperature, targets, reduction="none")

    def in_parts(hidden):  # (B, T + 1, D); it stands in for the lm_head, as part of the model's own forward pass
        parts = zip(hidden[:, :-1][real].split(size), targets[real].split(size))
        logprobs = torch.cat([checkpoint(part, *each, use_reentrant=False, preserve_rng_state=False) for each in parts])
        return torch.zeros(real.shape, device=real.device).masked_scatter(real, logprobs)

    head.forward = in_parts
    try:
        with autocast(targets.device):
            return model(**inputs, use_cache=False, logits_to_keep=targets.shape[1] + 1).logits
    finally:
        del head.forward


def logits_are_plain(model):
    """Whether logits are what the model's head puts out, and nothing else: Gemma 2 caps them, Granite and Cohere scale them."""
    outputs = []
    hook = model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: outputs.append(output.clone()))
    input_ids = torch.arange(8, device=model.device)[None]
    with torch.no_grad(), autocast(model.device):
        logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits
    hook.remove()
    return torch.equal(logits, outputs[0].to(logits.dtype))


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


def main(cfg):
    started = time.time()
    out, work = Path(cfg.out), Path(f"{cfg.out}.work")
    settings = dataclasses.replace(cfg, resume=False)
    if not (cfg.resume and work.exists()) or (out / "stage_config.json").is_file():  # nothing of another's is written over
        if finished(settings, out):
            shutil.rmtree(work, ignore_errors=True)  # a kill at the very end leaves it
            return
    resuming = resumable(cfg, work)
    records = read_jsonl(cfg.data, {"task_id": str, "prompt": str, "solution": str})
    random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    rng = random.Random(cfg.seed)
    device = set_up(cfg.threads)
    join_processes(device, cfg)
    home = torch.device("cpu") if cfg.shard else device  # a sharded model goes to the GPU block by block

    # ---- model and tokenizer
    if cfg.model == "scratch" and cfg.lora_rank:
        fail("--lora_rank adapts a trained model; name one with --model, or leave the flag out to train the tiny one")
    if cfg.model == "scratch":
        tokenizer = build_tokenizer([r["prompt"] + r["solution"] for r in records], cfg.vocab_size)
        model = build_model(cfg, tokenizer).to(home, learning_dtype(cfg))
    else:
        tokenizer = load_tokenizer(cfg.model, cfg.plain)  # plain: saved without the template, every later stage goes without
        model = load_model(AutoModelForCausalLM, cfg.model, home, len(tokenizer), learning_dtype(cfg), cfg.lora_rank > 0)
        if cfg.lora_rank:
            add_adapters(model, cfg.lora_rank, getattr(torch, cfg.dtype), cfg.seed)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id  # where servers look for it
    model.train()  # gradient checkpointing works in this mode only; dropout is 0
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if cfg.shard:
        shard(model, device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters, {len(tokenizer)} tokens, {device}")

    # ---- examples
    examples = [(encode_prompt(tokenizer, r["prompt"]), encode_response(tokenizer, r["solution"])) for r in records]
    limit = min(cfg.max_length, getattr(model.config, "max_position_embeddings", cfg.max_length))
    kept = [e for e in examples if len(e[0]) + len(e[1]) <= limit]
    if len(kept) < len(examples):
        print(f"left out {len(examples) - len(kept)} of {len(examples)} examples longer than {limit} tokens")
    rng.shuffle(kept)
    validation_count = max(1, round(cfg.validation_share * len(kept)))
    validation, train = kept[:validation_count], kept[validation_count:]
    if not train:
        fail(f"{cfg.data} leaves no example to train on; give more examples or raise --max_length ({limit})")
    lengths = [len(prompt) + len(response) for prompt, response in train]

    # ---- optimiser: weight decay on matrices only
    decay = [p for p in model.parameters() if p.dim() >= 2 and p.requires_grad]
    rest = [p for p in model.parameters() if p.dim() < 2 and p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": cfg.weight_decay},
                                   {"params": rest, "weight_decay": 0.0}], lr=cfg.lr, betas=(0.9, 0.95),
                                  fused=device.type == "cuda" or None)
    logits_mb = cfg.logits_mb if logits_are_plain(model) else 0  # else all at once
    steps = math.ceil(cfg.epochs * math.ceil(len(train) / cfg.batch_size))
    scheduler = get_cosine_schedule_with_warmup(optimizer, round(cfg.warmup * steps), steps)

    def validation_loss():
        """Mean loss per response token on the held-out examples, nats."""
        total, tokens = 0.0, 0
        with torch.no_grad(), autocast(device):
            for part, counts in my_micro_batches(validation, cfg.micro_batch_size):
                input_ids, labels = collate(part, tokenizer.pad_token_id)
                total += counts * batch_loss(model, input_ids.to(device), labels.to(device), logits_mb).item()
                tokens += counts * (labels != -100).sum().item()
        total, tokens = add_up([total, tokens])
        return total / tokens

    # ---- start or resume
    done, metrics, batches, losses = 0, [], [], []
    if resuming and (work / "state.pt").is_file():
        progress = load_state(work / "state.pt", model, optimizer, scheduler)
        done, metrics, losses = progress["step"], progress["metrics"], progress["losses"]
        started -= progress["seconds"]
        print(f"resuming {out} after step {done} of {steps}", flush=True)
    if rank() == 0:
        work.mkdir(parents=True, exist_ok=True)
        save_config(settings, work)

    # ---- train
    for step in range(1, steps + 1):
        if not batches:  # a new epoch
            batches = length_grouped_batches(lengths, cfg.batch_size, rng)
        batch = [train[i] for i in batches.pop()]
        if step <= done:  # trained on before the interruption; drawn once more, so that the same ones follow
            continue
        # One token count for the whole optimiser step: the micro-batch size changes nothing.
        tokens = sum(len(response) for _, response in batch)
        step_loss = 0.0
        for part, counts in my_micro_batches(batch, cfg.micro_batch_size):
            input_ids, labels = collate(part, tokenizer.pad_token_id)
            with autocast(device):
                loss = counts * batch_loss(model, input_ids.to(device), labels.to(device), logits_mb) / tokens
            loss.backward()
            step_loss += loss.item()
        step_loss, = add_up([step_loss])
        norm = clip_gradients(model, cfg.max_grad_norm)
        if not math.isfinite(step_loss + norm):  # a finite loss may have a gradient that is not
            fail(f"the loss is {step_loss}, its gradient's norm {norm} at step {step}; lower --lr ({cfg.lr}) in another --out")
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(step_loss)
        if (cfg.log_every and step % cfg.log_every == 0) or step == steps:
            metrics.append({"step": step, "train_loss": sum(losses) / len(losses), "validation_loss": validation_loss(),
                            "lr": scheduler.get_last_lr()[0], "seconds": round(time.time() - started, 1)})
            losses = []
            print("step {step}/{steps}  train loss {train_loss:.3f}  validation loss {validation_loss:.3f}  "
                  "lr {lr:.1e}  {seconds:.0f} s".format(steps=steps, **metrics[-1]), flush=True)
        if cfg.save_every and step % cfg.save_every == 0:
            save_state(work / "state.pt", model, optimizer, scheduler, step=step, metrics=metrics, losses=losses,
                       seconds=time.time() - started)

    # ---- save
    out.parent.mkdir(parents=True, exist_ok=True)
    shared_save(model, tokenizer, out)
    if rank() == 0:
        write_jsonl(out / "metrics.jsonl", metrics)
        save_config(settings, out)
        shutil.rmtree(work)
    print(f"saved {out}; stage 01_sft took {cost(started)}")


if __name__ == "__main__":
    config = parse_config(Config, __doc__)
    with memory_advice(config):
        main(config)
    leave_processes()
