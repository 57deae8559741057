"""Stage 5, evaluation: pass@1 of the greedy response and pass@k of sampled ones, for several checkpoints side by side.

pass@k is the chance that at least one of k responses passes all tests. From n >= k samples of which c pass, the unbiased
estimate is 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, equation 1); the plain 1 - (1 - c/n)^k is biased. Intervals are
95% bootstrap intervals over problems, since responses to one problem are not independent; differences are paired by problem.

Reads   data/tiny/test.jsonl (or any other problems), checkpoints
Writes  out/eval/results.json, table.txt
        out/eval/samples.jsonl   every response with its verdict; the greedy one has "greedy": true. Read some!

Run     python 05_eval.py --policies out/sft out/ppo_none/best out/ppo_bw/best
        python 05_eval.py --policies canonical --problems data/humaneval/test.jsonl --out out/eval_canonical
        (`canonical` takes the solution of each problem for the response: it should give 1.000)
        python 05_eval.py --policies deepseek-ai/deepseek-coder-1.3b-base --problems data/humaneval/test.jsonl --samples 0 \\
            --max_new_tokens 512 --timeout 3 --plain --stop $'\\nclass' $'\\ndef' $'\\n#' $'\\nif' $'\\nprint'
        (a base model before stage 1, with the paper's stop strings)

Simplified against the paper (Table 2: greedy pass@1 on HumanEval, MBPP and LeetCode): the default is the tiny test set.
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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cache, DynamicLayer
from transformers.pytorch_utils import Conv1D

import sandbox

PROBLEM_FIELDS = {"task_id": str, "prompt": str, "prefix": str, "setup": str, "entry_point": (str, type(None)), "tests": list}


@dataclass
class Config:
    policies: list[str] = field(default_factory=lambda: ["out/sft"])  # checkpoints, or 'canonical' for the solutions
    problems: list[str] = field(default_factory=lambda: ["data/tiny/test.jsonl"])  # benchmarks, JSONL
    out: str = "out/eval"  # folder for results and samples
    samples: int = 10  # n, sampled responses a problem; 0: greedy only, as in the paper
    ks: list[int] = field(default_factory=lambda: [1, 5, 10])  # the k of pass@k; none may exceed --samples
    temperature: float = 1.0  # of the sampled responses; the PPO rollouts have the same
    max_new_tokens: int = 96  # longest response, tokens; paper: 2048
    stop: list[str] = field(default_factory=list)  # a response ends before the first of these; for base models only
    plain: bool = False  # prompts without the chat template, which some base models' tokenizers have, too
    generate_batch_size: int = 256  # responses generated at once
    timeout: float = 1.0  # CPU seconds a program may take over its tests; HumanEval and MBPP: 3, LeetCode: 10
    workers: int = 0  # sandbox processes, 0 = one a core
    threads: int = 0  # PyTorch CPU threads, 0 = PyTorch's choice
    seed: int = 0  # random seed: sampling, bootstrap


# -------------------------------------------------------------------------------------------------------------- estimates


def pass_at_k(n, c, k):
    """Unbiased estimate of pass@k from n samples of which c pass: 1 - C(n - c, k) / C(n, k). ValueError when n < k."""
    if n < k:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def bootstrap_interval(values, rng, resamples=10_000):
    """95% percentile interval of the mean of per-problem values, (P,): problems are drawn with replacement.

    It has no width where all values are equal: 20 of 20 gives [1, 1].
    """
    values = np.asarray(values, dtype=float)
    # Drawing counts is drawing problems, in a matrix of (resamples, P) small integers.
    counts = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=resamples)
    low, high = np.quantile(counts @ values / len(values), [0.025, 0.975])
    return float(low), float(high)


# ------------------------------------------------------------------------------------------------ where a response ends


def cut_at_stop(text, stop):
    """The text before the first of the stop strings, all of it where there is none.

    A base model has not learned to emit EOS after a function: it goes on with the next one, and an unfinished one is a
    syntax error. Only evaluation cuts. The other stages read models that stage 1 has taught EOS; to cut there, the tokens
    behind the cut would have to go as well: the RM scores the last token, and PPO trains on every token that it is given.
    """
    return text[:min((text.find(s) for s in stop if s in text), default=len(text))]


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


# ---------------------------------------------------------------------------------------------------------------- main


def main(cfg):
    started = time.time()
    out = Path(cfg.out)
    if finished(cfg, out):
        print((out / "table.txt").read_text(encoding="utf-8"))
        return
    if cfg.samples and max(cfg.ks) > cfg.samples:
        fail(f"pass@{max(cfg.ks)} needs at least {max(cfg.ks)} samples; raise --samples ({cfg.samples}) or lower --ks")
    benchmarks = {path: read_jsonl(path, PROBLEM_FIELDS) for path in cfg.problems}
    device = set_up(cfg.threads)
    for path in cfg.policies:  # what is wrong with the last one is said before the first one runs
        if path != "canonical":
            tokenizer, config = load_tokenizer(path, cfg.plain), AutoConfig.from_pretrained(path)
        for benchmark, problems in benchmarks.items():
            missing = [problem["task_id"] for problem in problems if not problem.get("solution")]
            if path != "canonical":
                check_lengths(problems, [encode_prompt(tokenizer, problem["prompt"]) for problem in problems], cfg.max_new_tokens, config)
            elif missing:
                fail(f"{benchmark}: {len(missing)} problems have no solution ({missing[0]} ...); leave out 'canonical'")
    results, records, greedy_outcomes = [], [], {}
    for path in cfg.policies:
        if path != "canonical":
            tokenizer = load_tokenizer(path, cfg.plain)
            policy = None  # the one before makes room: where one fits, two may not
            policy = load_model(AutoModelForCausalLM, path, device, len(tokenizer), frozen=True).eval()
        for benchmark, problems in benchmarks.items():
            rng = np.random.default_rng(cfg.seed)  # the same resampled problems for every policy

            # ---- responses: for each problem the greedy one, then the sampled ones
            if path == "canonical":
                groups = [[(problem["solution"], False)] for problem in problems]
            else:
                prompt_ids = [encode_prompt(tokenizer, problem["prompt"]) for problem in problems]
                generator = torch.Generator(device).manual_seed(cfg.seed)
                with autocast(device):
                    greedy = generate(policy, tokenizer, prompt_ids, 1, cfg.max_new_tokens, 0.0, None, cfg.generate_batch_size,
                                      stop=cfg.stop)
                    sampled = generate(policy, tokenizer, prompt_ids, cfg.samples, cfg.max_new_tokens, cfg.temperature, generator,
                                       cfg.generate_batch_size, stop=cfg.stop) if cfg.samples else [[] for _ in problems]
                groups = []  # of (text, truncated?)
                for first, others in zip(greedy, sampled):
                    texts = [decode_response(tokenizer, ids) for ids in first + others]
                    ended = [ids[-1] == tokenizer.eos_token_id or any(s in text for s in cfg.stop)
                             for ids, text in zip(first + others, texts)]
                    groups.append([(cut_at_stop(text, cfg.stop), not end) for text, end in zip(texts, ended)])

            # ---- run the tests
            flat = [(problem, text) for problem, group in zip(problems, groups) for text, _ in group]
            verdicts = run_tests(*zip(*flat), cfg.workers, cfg.timeout)
            size = len(groups[0])
            passed = np.array([verdict.passed for verdict in verdicts]).reshape(len(problems), size)
            records += [{"task_id": problem["task_id"], "prompt": problem["prompt"], "response": text, "rm_score": None,
                         "actual_score": float(verdict.passed), "passed_tests": verdict.passed_tests,
                         "total_tests": verdict.total_tests, "status": verdict.status,
                         "truncated": groups[k // size][k % size][1], "policy": path, "greedy": k % size == 0}
                        for k, ((problem, text), verdict) in enumerate(zip(flat, verdicts))]

            # ---- estimates, each with its interval over problems
            row = {"policy": path, "benchmark": benchmark, "problems": len(problems)}
            columns = {"greedy pass@1": passed[:, 0].astype(float)}
            if size > 1:
                columns.update({f"pass@{k}": np.array([pass_at_k(size - 1, int(c), k) for c in passed[:, 1:].sum(1)])
                                for k in cfg.ks})
            for name, values in columns.items():
                low, high = bootstrap_interval(values, rng)
                row[name] = {"mean": float(values.mean()), "low": low, "high": high}
            greedy_outcomes[benchmark, path] = columns["greedy pass@1"]
            results.append(row)
            print(f"{path} on {benchmark}: greedy pass@1 {row['greedy pass@1']['mean']:.3f}, "
                  f"{time.time() - started:.0f} s", flush=True)

    # ---- the table
    names = ["greedy pass@1"] + ([f"pass@{k}" for k in cfg.ks] if cfg.samples else [])
    width = max(len(row["policy"]) for row in results) + 2
    lines = []
    for benchmark, problems in benchmarks.items():
        lines.append(f"{benchmark}, {len(problems)} problems, {cfg.samples} samples at temperature {cfg.temperature}; "
                     "95% intervals")
        lines.append("policy".ljust(width) + "".join(f"{name:>24}" for name in names))
        for row in (row for row in results if row["benchmark"] == benchmark):
            cells = [f"{row[n]['mean']:.3f} [{row[n]['low']:.3f}, {row[n]['high']:.3f}]" if n in row else "-" for n in names]
            lines.append(row["policy"].ljust(width) + "".join(f"{cell:>24}" for cell in cells))
        # Paired by problem: hard problems are hard for both, so a difference is known better than its two terms.
        for row in (row for row in results if row["benchmark"] == benchmark):
            row["greedy minus"] = {}
            for other in cfg.policies[:cfg.policies.index(row["policy"])]:
                gain = greedy_outcomes[benchmark, row["policy"]] - greedy_outcomes[benchmark, other]
                low, high = bootstrap_interval(gain, np.random.default_rng(cfg.seed))
                row["greedy minus"][other] = {"mean": float(gain.mean()), "low": low, "high": high}
                lines.append(f"greedy pass@1, {row['policy']} minus {other}: {gain.mean():+.3f} [{low:+.3f}, {high:+.3f}]")
        lines.append("")
    print("\n" + "\n".join(lines))

    # ---- save: the folder gets its name when all is in it
    part = Path(f"{out}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write_jsonl(part / "samples.jsonl", records)
    (part / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (part / "table.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    save_config(cfg, part)
    os.replace(part, out)
    print(f"saved {out}; stage 05_eval took {cost(started)}")


if __name__ == "__main__":
    config = parse_config(Config, __doc__)
    with memory_advice(config):
        main(config)
