"""Stage 3, R2 analysis: which filter makes the reward model most reliable? Asked before the costly reinforcement learning.

A policy writes N responses to each prompt, the RM ranks them, the tests give their actual scores. A filter keeps some of
each prompt's responses. On what it kept, responses of similar reward are grouped, and R2 is that of a straight line through
the groups' mean reward and mean actual score (paper, section 3 and Table 1): near 1 where a higher reward reliably means
that more programs pass. The paper chooses the filter with the highest R2.
(It ranks by the RM's reward; stage 4 takes `truncation_penalty` off where a response has no EOS, which matters where many have none.)

That pooled R2 mixes two things: rewards that differ between prompts (some are easy) and rewards that differ within one
prompt. Only the latter trains the policy, so the same is also printed with rewards and scores centred by prompt.

Also printed: how many pairs of a prompt, one response passing and one failing, the RM puts in the right order. It was trained on
the SFT model's responses; on those of a policy that it has trained it is worth less (results/README.md: 0.90, at the end 0.72).

Reads   data/tiny/validation.jsonl (problems on which neither policy nor RM was trained), policies, out/rm
Writes  out/r2/r2.json, table.txt, samples.jsonl
        out/r2/reliability.png   mean actual score against reward, one line a repeat (the paper's Figure 1)
        out/r2/r2.png            R2 by strategy

Run     python 03_r2_analysis.py
        python 03_r2_analysis.py --policies out/sft out/ppo_none/iteration_10 out/ppo_none/last --out out/r2_table1

Simplified against the paper (Table 1: HumanEval, 164 prompts, 10 responses, 10 repeats): three repeats, each of newly
sampled responses, on validation problems: the test problems must not choose a filter.
"""

import argparse
import contextlib
import dataclasses
import inspect
import json
import math
import os
import re
import resource
import shutil
import sys
import time
import traceback
import typing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Cache,
                          DynamicLayer)
from transformers.pytorch_utils import Conv1D

import sandbox

PROBLEM_FIELDS = {"task_id": str, "prompt": str, "prefix": str, "setup": str, "entry_point": (str, type(None)), "tests": list}
STRATEGIES = ("none", "random2", "bon", "br", "bw", "top", "top_random", "top_bottom", "pow_1", "pow_2", "pow_3")


@dataclass
class Config:
    data: str = "data/tiny/validation.jsonl"  # problems with tests, JSONL
    policies: list[str] = field(default_factory=lambda: ["out/sft"])  # one or more policies; the first one decides
    reward_model: str = "out/rm"  # the RM whose rewards are judged
    out: str = "out/r2"  # folder for the table and figures
    responses_per_prompt: int = 10  # N, responses that a filter chooses from; paper: 10
    repeats: int = 3  # times that all responses are sampled anew, for the spread; paper: 10
    bins: int = 10  # groups of equal count; not given in the paper
    top: float = 0.5  # top*: rewards above are kept, in standard deviations of the RM's reward; not given in the paper
    bottom: float = -0.5  # top_bottom: rewards below are kept too
    temperature: float = 1.0  # sampling temperature; not given in the paper
    max_new_tokens: int = 96  # longest response, tokens
    generate_batch_size: int = 256  # responses generated at once
    score_batch_size: int = 64  # responses scored at once
    timeout: float = 1.0  # CPU seconds a program may take over its tests
    workers: int = 0  # sandbox processes, 0 = one a core
    threads: int = 0  # PyTorch CPU threads, 0 = PyTorch's choice
    seed: int = 0  # random seed: sampling, and filters that draw


# ---------------------------------------------------------------------------------------------- R2 and what it is taken of


def group_means(rm_scores, actual_scores, bins):
    """Sort by reward and split into groups of equal count -> mean reward, mean actual score of each group, (bins,) both."""
    order = np.argsort(rm_scores, kind="stable")
    groups = np.array_split(order, min(bins, len(order)))
    return (np.array([np.mean(np.asarray(rm_scores)[g]) for g in groups]),
            np.array([np.mean(np.asarray(actual_scores)[g]) for g in groups]))


def r_squared(rm_scores, actual_scores, bins):
    """Coefficient of determination of an unweighted line through the group means (paper, section 3).

    Args: rm_scores, actual_scores: sequences of equal length; bins: number of groups.
    Returns: float at most 1; nan where all rewards or all scores are equal, since no line is then better than another.
    """
    x, y = group_means(np.asarray(rm_scores, dtype=float), np.asarray(actual_scores, dtype=float), bins)
    if len(x) < 2 or np.ptp(rm_scores) == 0 or np.ptp(x) == 0 or np.ptp(y) == 0:  # means of equal numbers differ by rounding
        return float("nan")
    slope, intercept = np.polyfit(x, y, 1)
    return float(1 - np.sum((y - slope * x - intercept) ** 2) / np.sum((y - y.mean()) ** 2))


def pair_accuracy(rm_scores, actual_scores):
    """Share of the pairs of a prompt (one passes, one fails) whose better one has the higher reward -> float, nan without
    pairs; a tie counts half. (P, N) tensors both. What the RM is worth on the responses of this policy."""
    better = actual_scores[:, :, None] > actual_scores[:, None, :]
    return (0.5 + 0.5 * torch.sign(rm_scores[:, :, None] - rm_scores[:, None, :])[better]).mean().item()


def draw_responses(rm_scores, strategy, generator, top, bottom):
    """What a strategy keeps of (P, N) rewards, as (rows, columns). pow_k keeps all and weights them in training; here, where
    responses are counted and not weighted, two of each prompt are drawn by these weights."""
    if not strategy.startswith("pow_"):
        return select_responses(rm_scores, strategy, generator, top, bottom)
    weights = filter_weights(rm_scores, strategy)
    columns = torch.multinomial(weights + 1e-6, min(2, weights.shape[1]), generator=generator)
    rows = torch.arange(len(weights)).repeat_interleave(columns.shape[1])
    return rows, columns.flatten()


def analyse(rm_scores, actual_scores, strategy, generator, cfg):
    """R2 of one strategy on one repeat: rm_scores (normalised), actual_scores, both (P, N) tensors."""
    rows, columns = draw_responses(rm_scores, strategy, generator, cfg.top, cfg.bottom)
    kept_rm, kept_actual = rm_scores[rows, columns].numpy(), actual_scores[rows, columns].numpy()
    # Centred over all N responses of the prompt, not only those kept: BoN keeps one, which would be its own mean.
    centred_rm = (rm_scores - rm_scores.mean(1, keepdim=True))[rows, columns].numpy()
    centred_actual = (actual_scores - actual_scores.mean(1, keepdim=True))[rows, columns].numpy()
    return {"r2": r_squared(kept_rm, kept_actual, cfg.bins), "r2_within": r_squared(centred_rm, centred_actual, cfg.bins),
            "kept_per_prompt": len(rows) / len(rm_scores), "pass_rate": float(kept_actual.mean())}


def recommendation(rows, policy):
    """The filter with the highest R2 and what is to be said of it -> its name, lines. rows: {strategy: {"r2": {"mean", "std"}}}; a
    mean is nan where few responses pass: in one of the repeats none of those that the filter keeps did."""
    means = {name: row["r2"]["mean"] for name, row in rows.items()}
    defined = [name for name in means if name not in ("none", "random2") and not math.isnan(means[name])]
    if not defined:
        fail("every R2 is undefined: all rewards or all actual scores are equal; check the policy and the reward model")
    choice = max(defined, key=means.get)
    lines = [f"recommended by R2 on {policy}: --strategy {choice} (R2 {means[choice]:.3f}; no filter has {means['none']:.3f}, "
             f"two at random {means['random2']:.3f})"]
    if not means[choice] - rows[choice]["r2"]["std"] > means["none"]:
        lines.append("R2 alone gives no reason to filter here: the best filter is not clearly above none")
    return choice, lines


# ------------------------------------------------------------------------------------------------------------ the figures


def plot_reliability(curves, path):
    """Mean actual score against reward: {policy: [(x, y) of each repeat]}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(1.4 + 5.2 * len(curves), 4.2), sharey=True, squeeze=False)
    for axis, (policy, repeats) in zip(axes[0], curves.items()):
        for number, (x, y) in enumerate(repeats, 1):
            axis.plot(x, y, "o-", alpha=0.7, label=f"repeat {number}")
        axis.set(title=f"responses of {policy}", xlabel="RM reward, mean of the group (standard deviations)")
        axis.grid(alpha=0.3)
    axes[0][0].set(ylabel="actual score: share that pass their tests", ylim=(0, 1))
    axes[0][0].legend(loc="upper left")
    figure.suptitle("Reliability: do programs with a higher reward pass more often?")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_r2(table, path):
    """Bars of R2 by strategy, pooled and within prompts, with the standard deviation over repeats."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True)
    for axis, key, title in zip(axes, ("r2", "r2_within"), ("pooled over prompts (the paper's)", "within prompts")):
        for number, (policy, rows) in enumerate(table.items()):
            width = 0.8 / len(table)
            places = np.arange(len(rows)) + (number - (len(table) - 1) / 2) * width
            axis.bar(places, [r[key]["mean"] for r in rows.values()], width, label=policy,
                     yerr=[r[key]["std"] for r in rows.values()], capsize=2)
            axis.set_xticks(range(len(rows)), rows, rotation=40, ha="right")
        axis.set(title=title, ylim=(0, 1.02))
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("R² of a line, reward to actual score")
    if len(table) > 1:
        axes[0].legend(loc="lower right")
    figure.suptitle("How well the reward explains the actual score of the responses that a filter keeps")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


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


def filter_weights(rm_scores, strategy, top=0.5, bottom=-0.5):
    """Weight of each response of one prompt under a filter (paper, section 3: weights over ranks).

    Args:
        rm_scores: (..., N) normalised rewards; the last dimension holds the responses of one prompt, never a batch.
        top, bottom: thresholds of the `top*` strategies, in standard deviations of the reward.
    Returns: (..., N) weights that sum to 1; ties are ranked in order of appearance. A threshold that no response of a
        prompt passes leaves its best one. pow_k: proportional to |r|^k, r stretched to [-1, 1] within the prompt; without
        the centring a prompt with only good rewards would be weighted like one end.
    """
    scores = torch.as_tensor(rm_scores, dtype=torch.float32)
    n = scores.shape[-1]
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1)  # 0 is the best
    best, worst = (rank == 0).float(), (rank == n - 1).float()
    if strategy in ("none", "single", "random2"):  # random2 in expectation
        weights = torch.ones_like(scores)
    elif strategy == "bon":
        weights = best
    elif strategy == "br":
        weights = (n - 1) * best + (1 - best) if n > 1 else best
    elif strategy == "bw":
        weights = best + worst
    elif strategy == "top":
        weights = (scores > top).float()
    elif strategy == "top_random":
        weights = 0.5 + 0.5 * (scores > top).float()
    elif strategy == "top_bottom":
        weights = ((scores > top) | (scores < bottom)).float()
    elif strategy in ("pow_1", "pow_2", "pow_3"):
        low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
        stretched = (2 * (scores - low) / (high - low).clamp(min=1e-9) - 1).abs() ** int(strategy[-1])
        weights = torch.where(high > low, stretched, torch.ones_like(scores))
    elif strategy.startswith("ranks_"):  # ranks_0_4 of five is bw
        weights = torch.isin(rank, torch.tensor([int(r) for r in strategy.split("_")[1:]])).float()
    else:
        raise ValueError(f"unknown strategy {strategy!r}")
    weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, best)
    return weights / weights.sum(-1, keepdim=True)


def select_responses(rm_scores, strategy, generator, top=0.5, bottom=-0.5):
    """Which responses PPO trains on: the filter, applied within each prompt and without duplicates.

    Args: rm_scores: (P, N) normalised rewards; generator: CPU torch.Generator for the strategies that draw.
    Returns: (rows, columns), two int64 tensors in order of prompt, then of response. BoN keeps the best, BR the best and
        one other at random, BW the best and the worst, random2 two at random; pow_k keeps all (it weights them).
    """
    scores = torch.as_tensor(rm_scores, dtype=torch.float32)
    noise = torch.rand(scores.shape, generator=generator)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1)
    weights = filter_weights(scores, strategy, top, bottom)
    if strategy == "br":
        noise = noise.masked_fill(rank == 0, 2.0)  # the best one first, then whichever has the largest noise
    if strategy in ("br", "random2"):
        keep = noise.argsort(-1, descending=True).argsort(-1) < 2
    elif strategy == "top_random":
        keep = (scores > top) | (noise < 0.5)
        keep |= ~keep.any(-1, keepdim=True) & (rank == 0)
    elif strategy.startswith("pow_"):
        keep = torch.ones_like(scores, dtype=torch.bool)
    else:
        keep = weights > 0
    return keep.nonzero(as_tuple=True)


# ---------------------------------------------------------------------------------------------------------------- main


def main(cfg):
    started = time.time()
    out = Path(cfg.out)
    if finished(cfg, out):
        print((out / "table.txt").read_text(encoding="utf-8"))
        return
    problems = read_jsonl(cfg.data, PROBLEM_FIELDS)
    n = cfg.responses_per_prompt
    if n < 2 or cfg.repeats < 1 or cfg.bins < 2:
        fail("--responses_per_prompt and --bins must be at least 2, --repeats at least 1")
    device = set_up(cfg.threads)
    reward_model = float32_head(load_model(AutoModelForSequenceClassification, cfg.reward_model, device, frozen=True)).eval()
    if not hasattr(reward_model.config, "reward_mean") or not hasattr(reward_model.config, "reward_std"):
        fail(f"{cfg.reward_model} has no reward_mean and reward_std in its config; train it with 02_reward_model.py")

    table, curves, records, accuracy = {}, {}, [], {}
    for path in cfg.policies:
        # ---- sample, score, run the tests: repeats x N responses a prompt
        tokenizer = load_tokenizer(path)
        policy = None  # the one before makes room: where one fits, two may not
        policy = load_model(AutoModelForCausalLM, path, device, len(tokenizer), frozen=True).eval()
        prompt_ids = [encode_prompt(tokenizer, problem["prompt"]) for problem in problems]
        check_lengths(problems, prompt_ids, cfg.max_new_tokens, policy.config)
        generator = torch.Generator(device).manual_seed(cfg.seed)
        with autocast(device):
            groups = generate(policy, tokenizer, prompt_ids, cfg.repeats * n, cfg.max_new_tokens, cfg.temperature, generator,
                              cfg.generate_batch_size)
        sequences = [prompt_ids[p] + ids for p, group in enumerate(groups) for ids in group]
        scores = score_responses(reward_model, sequences, tokenizer.pad_token_id, cfg.score_batch_size)
        scores = (scores - reward_model.config.reward_mean) / reward_model.config.reward_std
        flat = [(problem, decode_response(tokenizer, ids)) for problem, group in zip(problems, groups) for ids in group]
        results = run_tests(*zip(*flat), cfg.workers, cfg.timeout)
        actual = torch.tensor([float(result.passed) for result in results])
        records += [{"task_id": problem["task_id"], "prompt": problem["prompt"], "response": text, "rm_score": score,
                     "actual_score": float(result.passed), "passed_tests": result.passed_tests,
                     "total_tests": result.total_tests, "status": result.status,
                     "truncated": sequence[-1] != tokenizer.eos_token_id, "policy": path}
                    for (problem, text), score, result, sequence in zip(flat, scores.tolist(), results, sequences)]
        accuracy[path] = pair_accuracy(scores.view(len(problems), -1), actual.view(len(problems), -1))
        scores, actual = scores.view(len(problems), cfg.repeats, n), actual.view(len(problems), cfg.repeats, n)

        # ---- R2 of each strategy, its mean and spread over the repeats
        draws = torch.Generator().manual_seed(cfg.seed)
        table[path] = {}
        for strategy in STRATEGIES:
            runs = [analyse(scores[:, r], actual[:, r], strategy, draws, cfg) for r in range(cfg.repeats)]
            table[path][strategy] = {key: {"mean": float(np.mean([run[key] for run in runs])),
                                           "std": float(np.std([run[key] for run in runs]))} for key in runs[0]}
        curves[path] = [group_means(scores[:, r].flatten().numpy(), actual[:, r].flatten().numpy(), cfg.bins)
                        for r in range(cfg.repeats)]

    # ---- the table and the recommendation
    lines = []
    for path, rows in table.items():
        lines += [f"policy {path}, {len(problems)} prompts, N = {n}, {cfg.repeats} repeats, {cfg.bins} groups; "
                  f"{accuracy[path]:.3f} of the pairs of a prompt in the right order",
                  f"{'strategy':<12}{'kept':>6}{'pass rate':>11}{'R2 pooled':>18}{'R2 within prompts':>21}"]
        for name, row in rows.items():
            lines.append(f"{name:<12}{row['kept_per_prompt']['mean']:>6.1f}{row['pass_rate']['mean']:>11.3f}"
                         f"{row['r2']['mean']:>11.3f} ± {row['r2']['std']:.3f}"
                         f"{row['r2_within']['mean']:>13.3f} ± {row['r2_within']['std']:.3f}")
        lines.append("")
    choice, words = recommendation(table[cfg.policies[0]], cfg.policies[0])
    lines += words
    print("\n".join(lines))

    # ---- save: the folder gets its name when all is in it
    part = Path(f"{out}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write_jsonl(part / "samples.jsonl", records)
    (part / "r2.json").write_text(json.dumps({"recommended": choice, "table": table, "pair_accuracy": accuracy}, indent=2) + "\n", encoding="utf-8")
    (part / "table.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot_reliability(curves, part / "reliability.png")
    plot_r2(table, part / "r2.png")
    save_config(cfg, part)
    os.replace(part, out)
    print(f"saved {out}; stage 03_r2_analysis took {cost(started)}")


if __name__ == "__main__":
    config = parse_config(Config, __doc__)
    with memory_advice(config):
        main(config)
