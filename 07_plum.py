"""Stage 7, PLUM: preference learning from tests that the policy writes itself; no reward model, no label from outside.

arXiv 2406.06887 (Zhang et al. 2024), whose three stages are the phases of each round here:

    write tests -> sample K responses -> vote: keep consistent tests -> pass or fail -> pairs -> train -> log -> save

    (a) tests     The policy is asked for tests of a problem and answers with lines `assert solve(input) == output`. With o_k(t)
                  the output of sampled response k on the input of test t, and e(t) the output that the test expects,
                  a(t) = 1/K sum_k [o_k(t) = e(t)]: test t is kept where --agreement < a(t) < 1. So the call runs, a
                  majority of the responses agrees with the test, and it tells some responses apart.
    (b) verdicts  The K responses run against the kept tests in the sandbox: one that passes all of them is desirable, y+,
                  one that fails any is undesirable, y-. Each y+ is paired with one y- of its prompt.
    (c) training  On these pairs, h = (log pi(y+) - log pi_ref(y+)) - (log pi(y-) - log pi_ref(y-)), as in 06_baselines.py:
                  dpo  L = -log sigmoid(beta h)                                  Rafailov et al. 2023, arXiv 2305.18290, eq. 7
                  kto  L = 1 - sigmoid(+-beta (log pi(y) - log pi_ref(y) - KL))  Ethayarajh et al. 2024, arXiv 2402.01306
                  offline: the responses are those of the policy before training; --online: of the policy as it stands.

The policy must know both tasks, to solve a problem and to write tests. A small model has to be taught: before the first round
the policy is fine-tuned on a mixture of both (stage 1's data and plum.jsonl), and this model is the policy to start from, the
reference, the writer of the tests in all rounds, and the baseline to compare with. An instruction-tuned model needs no
such lesson, only an instruction (--sft_epochs 0 --ask "...").

How good are the tests? No loss sees the true tests and solutions; for the log alone,

    precision         share of tests that the problem's own solution passes; of those written and of those kept
    recall            of the responses that fail the true tests, the share that the kept tests reject (none where none are kept)
    false_rejections  the same share of the responses that pass the true tests
    label_accuracy    share of the verdicts of (b) that are those of the true tests

--outputs majority is a known variant: the model writes the inputs, and the most common output of the K responses is the
expected one. It is the default: of the tests whose outputs our model of a million parameters writes itself, 18% are right. The
vote finds them (92% of the kept ones are right), but leaves tests for a third of the prompts only; with majority it is three
quarters, 74% right before the vote (which then only has to tell responses apart) and 82% after it.

--outputs reference --agreement 0 is a control and no PLUM: the problem's own solution says what a test expects, and no majority
is asked for. What it gains over the others is what the vote costs.

What to expect of it: what most responses get wrong, the vote calls right. On the tiny set, where some kinds of step are mostly
wrong, about half of the responses that PLUM prefers fail the true tests (of those that it rejects, 92%). So it makes the policy
surer of what it mostly does: sampled pass rates rise a little, greedy decoding hardly changes. The methods with a reward model
have what it has not: 15,000 responses that were labelled by true tests.

Reads   data/tiny/ppo.jsonl, data/tiny/validation.jsonl, out/sft; for the lesson data/tiny/sft.jsonl, data/tiny/plum.jsonl:
            {"task_id": "tiny/plum/0", "prompt": "...# tests\\n", "solution": "assert solve('a I') == 1\\n"}
Writes  out/plum/sft     the model that knows both tasks, metrics.jsonl beside its weights
        out/plum/<run>/  where <run> is dpo_offline, dpo_online, kto_offline or kto_online
            best, last      ordinary Hugging Face folders: best by validation pass@1, and after the last round
            metrics.jsonl   {"iteration": 1, "precision_kept": 0.6, "recall": 0.5, "pass_rate": 0.31, ...}, a line a round
            tests/          0001.jsonl ...: every test written in a round, its share of the votes, whether it was kept
            rollouts/       0001.jsonl ...: every response of a round with both verdicts
            curves.png      quality of the tests, pass rate, KL
            state.pt        all that --resume needs

Run     python 07_plum.py --online
        python 07_plum.py --policy Qwen/Qwen2.5-Coder-0.5B-Instruct --sft_epochs 0 --outputs model --data data/mbpp/ppo.jsonl \\
            --validation data/mbpp/validation.jsonl --lr 5e-7 --max_new_tokens 512 --test_tokens 512 --timeout 3 \\
            --ask $'Write five tests of {entry_point}, each an assert statement with literal values.\\n\\n{prompt}'
        (MBPP's prompts show their tests, which a model may copy: expect a precision that other problems will not have)

Different from the paper: there a stronger model wrote the tests (GPT-4, by the reviews on OpenReview), here the policy does. A
round has K responses of each of a few prompts, where the paper samples for all prompts before it trains; offline that is the
same (06_baselines.py says why). The votes are those of the K responses that are then judged, so that none is sampled for the
vote alone: programs and tests together are the 240 samples a round that the other methods have. What the paper does about
hyperparameters we have not seen; our learning rates are the better of two at most, by validation.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import dataclasses
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
import typing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cache, DynamicLayer, get_cosine_schedule_with_warmup
from transformers.pytorch_utils import Conv1D

import sandbox

PROBLEM_FIELDS = {"task_id": str, "prompt": str, "prefix": str, "setup": str, "entry_point": (str, type(None)), "tests": list}
EXAMPLE_FIELDS = {"task_id": str, "prompt": str, "solution": str}
ASK_FOR_TESTS = "{prompt}# tests\n"  # as in plum.jsonl, which 00_data.py writes
MARK = "@plum@"  # starts the lines in which a program prints its outputs


@dataclass
class Config:
    policy: str = "out/sft"  # the model that is taught both tasks, then trained
    sft_data: str = "data/tiny/sft.jsonl"  # lesson: problems with solutions, JSONL
    tests_data: str = "data/tiny/plum.jsonl"  # lesson: instructions that ask for tests, with tests, JSONL
    both_tasks: str = "out/plum/sft"  # folder of the model that knows both tasks; made where it does not exist
    sft_epochs: float = 2.0  # lesson: passes over the examples of both tasks; 0: none, the policy is taken as it is
    sft_lr: float = 1e-3  # lesson: peak learning rate of AdamW, warmed up and brought down as in stage 1
    sft_batch_size: int = 64  # lesson: examples per optimiser step
    sft_seed: int = 0  # lesson: order of the examples; apart from --seed, so that all seeds start from one model
    max_length: int = 512  # lesson: tokens of an example; longer ones are left out, and counted
    ask: str = ASK_FOR_TESTS  # how tests are asked for; {prompt} and {entry_point} are the problem's
    data: str = "data/tiny/ppo.jsonl"  # problems to train on, JSONL; their true tests and solutions serve the log alone
    validation: str = "data/tiny/validation.jsonl"  # problems that choose the best checkpoint; never the test problems
    out: str = ""  # output folder; empty: out/plum/<loss>_<online or offline>
    loss: typing.Literal["dpo", "kto"] = "dpo"  # the preference loss; paper: both
    online: bool = False  # fresh responses of the trained policy each round, instead of the starting policy's; paper: both
    outputs: typing.Literal["model", "majority", "reference"] = "majority"  # expected output: its text, the vote, the solution
    agreement: float = 0.5  # a kept test agrees with more than this share of the K responses; 0.5: a majority
    iterations: int = 25  # rounds of write, sample, vote, train; as in 04
    prompts_per_iteration: int = 24  # n, prompts of a round; n (K + test_responses) = 240 samples, as in 04
    responses_per_prompt: int = 8  # K, responses sampled for each prompt
    test_responses: int = 2  # responses sampled for each prompt that write tests
    pairs_per_prompt: int = 2  # pairs of a passing and a failing response, at most; not given in the paper
    temperature: float = 1.0  # sampling temperature; it divides the logits in sampling, update and reference alike
    max_new_tokens: int = 96  # longest response, tokens
    test_tokens: int = 128  # longest response that writes tests, tokens
    beta: float = 0.1  # strength of the pull to the reference, reward per nat
    epochs: int = 1  # passes over the pairs of a round
    minibatch_size: int = 48  # responses per optimiser step, 24 pairs
    micro_batch_size: int = 48  # responses per forward pass; smaller needs less memory and changes nothing else
    lr: float = 0.0  # learning rate (AdamW, constant); 0: 5e-5 online, 2e-5 offline, where responses grow old; not given
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm, over all parameters
    eval_every: int = 5  # rounds between two validations (greedy pass@1); the last round always has one
    save_every: int = 0  # also keep the policy of every so many rounds as <out>/iteration_<i>; 0: none
    resume: bool = False  # go on from the last finished round of an interrupted run
    generate_batch_size: int = 256  # responses generated at once
    forward_batch_size: int = 64  # responses passed through frozen models at once
    timeout: float = 1.0  # CPU seconds a program may take over its tests
    workers: int = 1  # sandbox processes, 0 = one a core
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    threads: int = 0  # PyTorch CPU threads, 0 = PyTorch's choice
    seed: int = 0  # random seed: order of the prompts, sampling, pairs, minibatches


# ------------------------------------------------------------------------- tests: out of a text, votes on them, quality


def parse_tests(response, entry_point):
    """The tests in a response -> [(call, expected)], both source code; in order of appearance, each once.

    A test is an assert statement at the top level of the response, or of its fenced blocks where it has any, of one form:
    a call of the entry point with literal arguments, equal to a literal (`==` or `is`, either way round), or the bare call,
    or `not` and the call, which stand for True and False. Everything else tests nothing about the entry point, or nothing
    at all (`assert True`, `assert f(x) == f(x)`, `assert f(x) or 1`), and is passed over, as is text that is no Python.
    A problem without an entry point has no tests.
    """
    blocks = re.findall(r"^[ \t]*```[^\n`]*\n(.*?)(?=^[ \t]*```|\Z)(?:[ \t]*```[^\n]*)?", response, re.S | re.M)
    text = "\n".join(blocks) if blocks else response
    trees = [parsed(text)]
    if trees[0] is None:  # a cut last line, or words between the tests: line by line
        trees = [parsed(line.strip()) for line in text.splitlines()]
    tests = []
    for statement in (statement for tree in trees if tree for statement in tree.body):
        if not isinstance(statement, ast.Assert) or not entry_point:
            continue
        left, right = statement.test, ast.Constant(True)
        if isinstance(left, ast.UnaryOp) and isinstance(left.op, ast.Not):
            left, right = left.operand, ast.Constant(False)
        elif isinstance(left, ast.Compare) and len(left.ops) == 1 and isinstance(left.ops[0], (ast.Eq, ast.Is)):
            left, right = left.left, left.comparators[0]
            if is_literal(left):
                left, right = right, left
        if calls(left, entry_point) and is_literal(right):
            tests.append((ast.unparse(left), ast.unparse(right)))
    return list(dict.fromkeys(tests))


def parsed(text):
    """The syntax tree of a text, None where it is no Python: a model can write anything."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def is_literal(node):
    """True for a number, string, list and the like, written out."""
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return False
    return True


def calls(node, entry_point):
    """True for `f(..)` or, where the entry point is a class, `C(..).method(..)`, with literal arguments only."""
    if not isinstance(node, ast.Call) or not all(map(is_literal, node.args + [keyword.value for keyword in node.keywords])):
        return False
    if isinstance(node.func, ast.Attribute):
        return calls(node.func.value, entry_point)
    return isinstance(node.func, ast.Name) and node.func.id == entry_point


def value_of(source):
    """The value of a literal as a one-tuple, so that a None that was returned differs from None, no value."""
    try:
        return (ast.literal_eval(source),)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def majority_output(outputs):
    """The most common of K outputs (one-tuples, None for a call that failed); None if all failed; the first one at a tie."""
    found = [output for output in outputs if output is not None]
    return max(found, key=lambda output: sum(other == output for other in found), default=None)


def agreement_share(outputs, expected):
    """a(t): the share of the K responses whose output is the expected one. A failed call agrees with nothing."""
    return sum(output is not None and output == expected for output in outputs) / len(outputs)


def is_consistent(share, agreement):
    """True for a test that a majority agrees with, and that tells some responses apart."""
    return agreement < share < 1


def precision(right):
    """The share of tests that are right; None where there is none to judge."""
    return sum(right) / len(right) if right else None


def verdict_quality(verdicts, passed):
    """How the verdicts of the kept tests stand to those of the true ones.

    Args: verdicts: for each response True (passes the kept tests of its prompt), False, or None (its prompt has none);
        passed: for each response whether it passes the true tests.
    Returns {"recall", "false_rejections", "label_accuracy"}, None where there is nothing to count: the share of failing
        responses that the kept tests reject, that share of passing ones, and the share of verdicts that are right.
    """
    return {"recall": precision([verdict is False for verdict, truth in zip(verdicts, passed) if not truth]),
            "false_rejections": precision([verdict is False for verdict, truth in zip(verdicts, passed) if truth]),
            "label_accuracy": precision([verdict == truth for verdict, truth in zip(verdicts, passed)
                                         if verdict is not None])}


def pair_up(verdicts, count, generator):
    """At most `count` pairs of a passing and a failing response of one prompt, none of them twice -> [(passing, failing)].

    Args: verdicts: for each response True, False or None.
    """
    order = torch.randperm(len(verdicts), generator=generator).tolist()
    passing, failing = ([k for k in order if verdicts[k] is verdict] for verdict in (True, False))
    return list(zip(passing, failing))[:count]


# -------------------------------------------------------------------------------------------- the losses, pure functions
#
# All log-probabilities are sums over the tokens of a response, so that a difference of two is the log of a likelihood ratio.


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """DPO (Rafailov et al. 2023, equation 7): -log sigmoid(beta h), mean over pairs; all (B,). log 2 at the reference.

    h is how much further the policy has raised the chosen response over the reference than the rejected one.
    """
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -F.logsigmoid(beta * h).mean()


def kto_loss(logprobs, ref_logprobs, desirable, kl, beta):
    """KTO (Ethayarajh et al. 2024) with both weights 1, mean over responses.

    1 - sigmoid(beta (r - kl)) for desirable responses and 1 - sigmoid(beta (kl - r)) for undesirable ones, with
    r = logprobs - ref_logprobs: a gain or a loss against the point where the policy stands on the whole.

    Args: logprobs, ref_logprobs, desirable (bool or 0 and 1): (B,); kl: scalar from `mismatched_kl`, taken as a constant.
    """
    kl = torch.as_tensor(kl, dtype=logprobs.dtype, device=logprobs.device).detach()
    sign = 2.0 * desirable.to(logprobs.dtype) - 1.0
    return (1 - torch.sigmoid(sign * beta * (logprobs - ref_logprobs - kl))).mean()


def mismatched_kl(logprobs, ref_logprobs):
    """KTO's reference point: max(0, mean log-ratio) of responses, each to the prompt of another one (B,); no gradient.

    The matched responses would not do: training raises and lowers them, the point of reference would move with them.
    """
    return (logprobs - ref_logprobs).detach().mean().clamp(min=0)


def pairs_of_other_prompts(groups, pairs_per_prompt):
    """For each pair of rows in `groups` (G, 2), which stand in order of prompt, one of another prompt -> (G, 2).

    With fewer than twice `pairs_per_prompt` pairs there may be no other prompt: None.
    """
    return groups.roll(pairs_per_prompt, 0) if len(groups) >= 2 * pairs_per_prompt else None


def response_loss(logits, labels):
    """Cross-entropy summed over response tokens.

    Args:
        logits: (B, L, V); `logits[:, t]` predicts token t + 1.
        labels: (B, L) token ids, -100 on the prompt and on padding.
    Returns: a scalar, nats.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100,
                           reduction="sum")


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


def encode_response(tokenizer, response):
    """Token ids of a response with its EOS, as they continue a prompt: SentencePiece tokenizers would put a space first."""
    ids = tokenizer(response, add_special_tokens=False).input_ids
    if decode_response(tokenizer, ids) == " " + response:
        start = tokenizer("\n", add_special_tokens=False).input_ids  # they never merge a line break with what follows
        ids = tokenizer("\n" + response, add_special_tokens=False).input_ids[len(start):]
    return ids + [tokenizer.eos_token_id]


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


# ------------------------------------------------------------------------------------------------------ rollout batches


def masked_mean(x, mask):
    """Mean of x over the positions where mask is 1; both of one shape. 0 where the mask is empty."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def make_batch(prompts, responses, pad_id):
    """Token id lists -> prompt_ids (B, P) padded left, response_ids (B, T) padded right, and their masks."""
    width, length = max(map(len, prompts)), max(map(len, responses))
    return {
        "prompt_ids": torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts]),
        "prompt_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
        "response_ids": torch.tensor([r + [pad_id] * (length - len(r)) for r in responses]),
        "response_mask": torch.tensor([[1] * len(r) + [0] * (length - len(r)) for r in responses]),
    }


def take_rows(batch, rows, device):
    """The rows of a batch, every field of a row together, without the columns that are padding in all of them."""
    part = {name: field[rows] for name, field in batch.items()}
    first = part["prompt_mask"].shape[1] - int(part["prompt_mask"].sum(1).max())
    length = int(part["response_mask"].sum(1).max())
    for name, field in part.items():
        if field.dim() == 2:
            part[name] = field[:, first:] if name.startswith("prompt") else field[:, :length]
    return {name: field.to(device) for name, field in part.items()}


def model_inputs(mb):
    """input_ids and attention_mask, both (B, P + T), of a batch from `take_rows`."""
    return (torch.cat([mb["prompt_ids"], mb["response_ids"]], 1),
            torch.cat([mb["prompt_mask"], mb["response_mask"]], 1))


def response_logprobs(model, input_ids, attention_mask, response_length, temperature):
    """Log-probability of each of the last `response_length` tokens under the model's sampling distribution.

    Args: input_ids, attention_mask: (B, P + T), prompts padded left, responses right; response_length: T.
    Returns: (B, T) float32; on padding the values mean nothing and are to be masked.
    """
    # Left padding shifts a row to the right: without positions from the mask the same row would differ by its neighbours.
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    with autocast(input_ids.device):
        logits = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False,
                       logits_to_keep=response_length + 1).logits  # (B, T + 1, V)
    logits = logits[:, :-1].float() / temperature  # position t predicts token t + 1
    targets = input_ids[:, -response_length:]
    return torch.log_softmax(logits, -1).gather(-1, targets[..., None]).squeeze(-1)


@torch.no_grad()
def forward_rows(function, batch, rows, batch_size, device):
    """`function(mb) -> (b, T_mb)` on some rows of a batch, in order of length -> (B, T) on the CPU, 0 everywhere else."""
    result = torch.zeros(batch["response_mask"].shape)
    lengths = batch["prompt_mask"].sum(1) + batch["response_mask"].sum(1)
    for part in rows[lengths[rows].argsort()].split(batch_size):
        mb = take_rows(batch, part, device)
        values = function(mb) * mb["response_mask"]
        result[part, :values.shape[1]] = values.cpu()
    return result


def train_groups(model, optimizer, loss_function, batch, groups, cfg, generator, device, prepare):
    """One pass over groups of rows in random minibatches, an optimiser step each -> statistics, means over groups.

    A group is what a loss compares: a response, a pair, or all responses of a prompt; `groups` is (G, R), rows of `batch`.
    `prepare(numbers)` gets the numbers of the groups of a minibatch, and `loss_function(mb, prepared)` its result;
    it returns (mean loss over the groups of the micro-batch, statistics). Each micro-batch counts by its share of the
    minibatch's groups, so that the micro-batch size changes nothing but the memory.
    """
    size = groups.shape[1]
    lengths = batch["response_mask"].sum(1)[groups].amax(1)  # (G,)
    totals = {}
    for minibatch in torch.randperm(len(groups), generator=generator).split(max(1, cfg.minibatch_size // size)):
        minibatch = minibatch[lengths[minibatch].argsort()]  # micro-batches of similar length
        prepared = prepare(minibatch)
        for micro_batch in minibatch.split(max(1, cfg.micro_batch_size // size)):
            loss, statistics = loss_function(take_rows(batch, groups[micro_batch].flatten(), device), prepared)
            (loss * (len(micro_batch) / len(minibatch))).backward()
            for name, value in {**statistics, "loss": loss.item()}.items():
                totals[name] = totals.get(name, 0.0) + value * len(micro_batch)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm).item()
        if not math.isfinite(norm):
            raise FloatingPointError("a loss or gradient is not a finite number")
        totals["grad_norm"] = totals.get("grad_norm", 0.0) + norm * len(minibatch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: total / len(groups) for name, total in totals.items()}


def iteration_prompts(count, per_iteration, iteration, seed):
    """Indices of the problems of an iteration (from 1): slices of an endless sequence of shuffled passes.

    It depends on nothing else, so every strategy of a seed sees the same prompts in the same order, and so does --resume.
    """
    first, last = (iteration - 1) * per_iteration, iteration * per_iteration
    indices = []
    for epoch in range(first // count, (last - 1) // count + 1):
        order = list(range(count))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        indices += order[max(first - epoch * count, 0):last - epoch * count]
    return indices


# ------------------------------------------------------------------------------------------------- running, fine-tuning


def call_outputs(problems, codes, calls, workers, timeout):
    """What programs give for some calls -> for each program a list of outputs, one-tuples, None where a call failed or
    stands behind one that used up the program's time.

    The program itself prints them, so they are its own word: good enough for a vote, where a lie costs one voice. Verdicts
    come from the sandbox's tests.
    Args: problems, codes: one of each for a program; calls: for each program the source code of its calls.
    """
    jobs, index = [], {}
    for problem, code, sources in zip(problems, codes, calls):
        key = problem["task_id"], code, tuple(sources)
        if sources and index.setdefault(key, len(jobs)) == len(jobs):
            probes = [f"\ntry: print('\\n{MARK} {number} ' + repr({source}), flush=True)\nexcept BaseException: pass\n"
                      for number, source in enumerate(sources)]
            jobs.append({"code": code + "\n" + "".join(probes), "tests": ["pass"], "setup": "",
                         "entry_point": problem["entry_point"], "timeout": timeout})
    results = sandbox.run_many(jobs, workers=workers or None)
    outputs = []
    for problem, code, sources in zip(problems, codes, calls):
        printed = results[index[problem["task_id"], code, tuple(sources)]].stdout if sources else ""
        found = dict(re.findall(rf"^{MARK} (\d+) (.*)$", printed, re.M))
        outputs.append([value_of(found[str(number)]) if str(number) in found else None for number in range(len(sources))])
    return outputs


def pass_rate_of(model, tokenizer, problems, prompt_ids, cfg, device):
    """Share of problems solved by the greedy response."""
    with autocast(device):
        ids = generate(model, tokenizer, prompt_ids, 1, cfg.max_new_tokens, 0.0, None, cfg.generate_batch_size)
    texts = [decode_response(tokenizer, group[0]) for group in ids]
    results = run_tests(problems, texts, cfg.workers, cfg.timeout)
    return sum(result.passed for result in results) / len(results)


@dataclass(frozen=True)
class Lesson:
    """The settings that the model of both tasks depends on; they are saved in its folder."""
    policy: str
    sft_data: str
    tests_data: str
    sft_epochs: float
    sft_lr: float
    sft_batch_size: int
    sft_seed: int
    max_length: int
    max_grad_norm: float
    ask: str


def teach_both_tasks(cfg, device):
    """Fine-tune the policy on solutions and tests, mixed -> saved in cfg.both_tasks, whole or not at all; or reuse that."""
    started = time.time()
    lesson = Lesson(**{field.name: getattr(cfg, field.name) for field in dataclasses.fields(Lesson)})
    if finished(lesson, cfg.both_tasks):
        return
    form = re.escape(cfg.ask)
    for name in ("{prompt}", "{entry_point}"):
        form = form.replace(re.escape(name), ".*")
    tasks = {"solve": read_jsonl(cfg.sft_data, EXAMPLE_FIELDS), "tests": read_jsonl(cfg.tests_data, EXAMPLE_FIELDS)}
    for number, record in enumerate(tasks["tests"], 1):
        if not re.fullmatch(form, record["prompt"], re.S):
            fail(f"{cfg.tests_data}, line {number}: the prompt is not of the form of --ask {cfg.ask!r}; the policy would be "
                 "taught one way of asking and asked in another")
    tokenizer = load_tokenizer(cfg.policy)
    model = load_model(AutoModelForCausalLM, cfg.policy, device, len(tokenizer)).train()
    model.config.pad_token_id = tokenizer.pad_token_id
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable()
    rng = random.Random(cfg.sft_seed)

    # ---- examples of both tasks; a twentieth of each is held out for the validation loss
    limit = min(cfg.max_length, getattr(model.config, "max_position_embeddings", cfg.max_length))
    train, held_out = [], {}
    for task, records in tasks.items():
        examples = [(encode_prompt(tokenizer, r["prompt"]), encode_response(tokenizer, r["solution"])) for r in records]
        kept = [e for e in examples if len(e[0]) + len(e[1]) <= limit]
        if len(kept) < len(examples):
            print(f"{task}: left out {len(examples) - len(kept)} of {len(examples)} examples longer than {limit} tokens")
        if len(kept) < 2:
            path = cfg.sft_data if task == "solve" else cfg.tests_data
            fail(f"{path} leaves {len(kept)} examples, of which one is held out; give more or raise --max_length ({limit})")
        rng.shuffle(kept)
        count = max(1, len(kept) // 20)
        held_out[task], train = kept[:count], train + kept[count:]
    lengths = [len(prompt) + len(response) for prompt, response in train]

    # ---- train as stage 1 does
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                                  lr=cfg.sft_lr, betas=(0.9, 0.95))
    steps = math.ceil(cfg.sft_epochs * math.ceil(len(train) / cfg.sft_batch_size))
    scheduler = get_cosine_schedule_with_warmup(optimizer, round(0.05 * steps), steps)
    metrics, batches = [], []
    for step in range(1, steps + 1):
        if not batches:  # a new epoch
            batches = length_grouped_batches(lengths, cfg.sft_batch_size, rng)
        batch = [train[i] for i in batches.pop()]
        tokens = sum(len(response) for _, response in batch)
        step_loss = 0.0
        for start in range(0, len(batch), cfg.micro_batch_size):
            input_ids, labels = collate(batch[start:start + cfg.micro_batch_size], tokenizer.pad_token_id)
            with autocast(device):
                logits = model(input_ids=input_ids.to(device)).logits  # (B, L, V)
            loss = response_loss(logits, labels.to(device)) / tokens
            loss.backward()
            step_loss += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm).item()
        if not math.isfinite(step_loss + norm):  # a finite loss may have a gradient that is not
            fail(f"the loss is {step_loss}, its gradient's norm {norm} at step {step}; lower --sft_lr ({cfg.sft_lr})")
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps:
            line = {"step": step, "train_loss": step_loss, "seconds": round(time.time() - started, 1)}
            for task, examples in held_out.items():  # nats a token
                losses, counts = 0.0, 0
                for start in range(0, len(examples), cfg.forward_batch_size):
                    input_ids, labels = collate(examples[start:start + cfg.forward_batch_size], tokenizer.pad_token_id)
                    with torch.no_grad(), autocast(device):
                        losses += response_loss(model(input_ids=input_ids.to(device)).logits, labels.to(device)).item()
                    counts += (labels != -100).sum().item()
                line[f"validation_loss_{task}"] = losses / counts
            metrics.append(line)
            print("both tasks, step {step}/{steps}  validation loss: solve {validation_loss_solve:.3f}, tests "
                  "{validation_loss_tests:.3f}  {seconds:.0f} s".format(steps=steps, **line), flush=True)

    # ---- save: the folder gets its name when all is in it
    part = Path(f"{cfg.both_tasks}.{os.getpid()}")
    part.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, tokenizer, part)
    write_jsonl(part / "metrics.jsonl", metrics)
    save_config(lesson, part)
    try:
        os.rename(part, cfg.both_tasks)
    except OSError:  # a run beside this one was quicker; the same settings made the same model
        shutil.rmtree(part)
        if not finished(lesson, cfg.both_tasks):
            raise


def plot_rounds(metrics, path, title):
    """Quality of the tests and of the verdicts, pass rate, and KL over the rounds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    rounds = [m for m in metrics if m["iteration"]]
    for name, label in (("precision_written", "precision, tests written"), ("precision_kept", "precision, tests kept"),
                        ("recall", "recall of the kept tests"), ("label_accuracy", "verdicts that are right")):
        points = [(m["iteration"], m[name]) for m in rounds if m[name] is not None]
        axes[0].plot(*zip(*points) if points else ([], []), label=label)
    axes[1].plot([m["iteration"] for m in rounds], [m["pass_rate"] for m in rounds], color="tab:green",
                 label="rollouts of the policy (sampled)")
    checks = [m for m in metrics if "validation_pass_at_1" in m]
    axes[1].plot([m["iteration"] for m in checks], [m["validation_pass_at_1"] for m in checks], "o--", color="tab:green",
                 label="validation problems, greedy")
    axes[2].plot([m["iteration"] for m in rounds], [m["kl_per_response"] for m in rounds], color="tab:blue")
    headings = [("tests and verdicts against the true ones", "share"), ("programs that pass their tests", "pass rate"),
                ("distance from the starting policy", "KL, nats per response")]
    for axis, (heading, label) in zip(axes, headings):
        axis.set(title=heading, xlabel="round", ylabel=label)
        axis.grid(alpha=0.3)
    for axis in axes[:2]:
        axis.set_ylim(0, 1)
        axis.legend(loc="lower right", fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------- main


def main(cfg):
    started = time.time()
    per_prompt = cfg.responses_per_prompt
    for name, least in (("responses_per_prompt", 2), ("test_responses", 1), ("pairs_per_prompt", 1), ("iterations", 1),
                        ("prompts_per_iteration", 1), ("eval_every", 1)):
        if getattr(cfg, name) < least:
            fail(f"--{name} is {getattr(cfg, name)}; give at least {least}")
    if cfg.beta <= 0:
        fail(f"--beta is {cfg.beta}; give a positive number")
    if not 0 <= cfg.agreement < 1:
        fail(f"--agreement is {cfg.agreement}; give a share of at least 0 and less than 1")
    if "{prompt}" not in cfg.ask:
        fail(f"--ask {cfg.ask!r} does not hold {{prompt}}, where the problem goes")
    run = f"{cfg.loss}_{'online' if cfg.online else 'offline'}"
    out = Path(cfg.out or f"out/plum/{run}")
    state_path = out / "state.pt"
    settings = dataclasses.replace(cfg, resume=False)
    if (out / "stage_config.json").is_file() or not cfg.resume:
        if finished(settings, out):
            return
    problems, validation = read_jsonl(cfg.data, PROBLEM_FIELDS), read_jsonl(cfg.validation, PROBLEM_FIELDS)
    if not any(problem["entry_point"] for problem in problems):
        fail(f"{cfg.data}: no problem names its entry_point, so that no test can be told to be about it")
    if cfg.outputs == "reference" and not any(problem.get("solution") for problem in problems):
        fail(f"{cfg.data}: no problem has a solution, which --outputs reference runs")
    device = set_up(cfg.threads)

    # ---- the lesson; then the policy learns, and the model it starts from is reference, writer and, offline, sampler
    start_from = cfg.policy
    if cfg.sft_epochs:
        teach_both_tasks(cfg, device)
        start_from = cfg.both_tasks
    tokenizer = load_tokenizer(start_from)
    policy = load_model(AutoModelForCausalLM, start_from, device, len(tokenizer)).train()
    reference = load_model(AutoModelForCausalLM, start_from, device, len(tokenizer), frozen=True).eval()
    sampler = policy if cfg.online else reference
    if cfg.gradient_checkpointing:
        policy.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr or (5e-5 if cfg.online else 2e-5), weight_decay=0.0)
    prompt_ids = [encode_prompt(tokenizer, problem["prompt"]) for problem in problems]
    ask_ids = [encode_prompt(tokenizer, cfg.ask.replace("{entry_point}", problem["entry_point"] or "").replace(
        "{prompt}", problem["prompt"])) for problem in problems]
    validation_ids = [encode_prompt(tokenizer, problem["prompt"]) for problem in validation]
    check_lengths(problems + validation, prompt_ids + validation_ids, cfg.max_new_tokens, policy.config)
    check_lengths(problems, ask_ids, cfg.test_tokens, policy.config)

    def logprobs_of(model, mb):
        return response_logprobs(model, *model_inputs(mb), mb["response_ids"].shape[1], cfg.temperature)

    def summed_logprobs(model, mb):
        return (logprobs_of(model, mb) * mb["response_mask"]).sum(1)

    def token_logprobs(model, rows_batch, rows):
        """(B, T) without gradient, 0 on padding and on all other rows."""
        return forward_rows(lambda mb: logprobs_of(model, mb), rows_batch, rows, cfg.forward_batch_size, device)

    def loss_of(mb, kl):
        """The loss on the pairs of a micro-batch, whose rows stand one pair after the other, the passing response first."""
        logprobs = summed_logprobs(policy, mb)
        chosen, rejected = logprobs.view(-1, 2).unbind(1)
        ref_chosen, ref_rejected = mb["ref_logprobs"].view(-1, 2).unbind(1)
        if cfg.loss == "kto":
            loss = kto_loss(logprobs, mb["ref_logprobs"], mb["desirable"], kl, cfg.beta)
        else:
            loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, cfg.beta)
        raised, lowered = (chosen - ref_chosen).detach(), (rejected - ref_rejected).detach()
        statistics = {"chosen_logratio": raised.mean().item(), "rejected_logratio": lowered.mean().item(),
                      "accuracy": (raised > lowered).float().mean().item()}
        return loss, {**statistics, "kl": float(kl)} if cfg.loss == "kto" else statistics

    # ---- start or resume. All that is random is seeded by the round's number: weights and metrics are the whole state.
    if cfg.resume and state_path.is_file():
        state = torch.load(state_path, map_location="cpu", weights_only=True, mmap=True)
        changed = [name for name, value in dataclasses.asdict(settings).items() if state["config"].get(name) != value]
        if changed:
            fail(f"{out} was started with other settings ({', '.join(changed)}); use the same flags to resume it")
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        metrics, best = state["metrics"], state["best"]
        if (out / "best.old").exists() and not (out / "best").exists():
            os.replace(out / "best.old", out / "best")  # killed between the two renames of save_model
        print(f"resuming {out} after round {metrics[-1]['iteration']}", flush=True)
    else:
        for name in ("rollouts", "tests"):
            (out / name).mkdir(parents=True, exist_ok=True)
        best = pass_rate_of(policy, tokenizer, validation, validation_ids, cfg, device)
        metrics = [{"iteration": 0, "validation_pass_at_1": best}]
        save_model(policy, tokenizer, out / "best")
        print(f"before training: validation pass@1 {best:.3f}, {time.time() - started:.0f} s", flush=True)
    background = concurrent.futures.ThreadPoolExecutor(1)

    for iteration in range(metrics[-1]["iteration"] + 1, cfg.iterations + 1):
        clock = [time.time()]
        seed = cfg.seed * 1_000_003 + iteration
        generator, cpu_generator = torch.Generator(device).manual_seed(seed), torch.Generator().manual_seed(seed)

        # ---- sample K responses for each of n prompts, rows in order of prompt; write tests
        indices = list(dict.fromkeys(iteration_prompts(len(problems), cfg.prompts_per_iteration, iteration, cfg.seed)))
        n = len(indices)  # one fewer where a problem ends a pass over the data and starts the next
        round_problems = [problems[i] for i in indices]
        with autocast(device):
            sampled = generate(sampler, tokenizer, [prompt_ids[i] for i in indices], per_prompt, cfg.max_new_tokens,
                               cfg.temperature, generator, cfg.generate_batch_size)
            written = generate(reference, tokenizer, [ask_ids[i] for i in indices], cfg.test_responses, cfg.test_tokens,
                               cfg.temperature, generator, cfg.generate_batch_size)
        row_problems = [problem for problem in round_problems for _ in range(per_prompt)]
        row_prompts = [prompt_ids[i] for i in indices for _ in range(per_prompt)]
        responses = [ids for group in sampled for ids in group]
        texts = [decode_response(tokenizer, ids) for ids in responses]
        batch = make_batch(row_prompts, responses, tokenizer.pad_token_id)  # n * K rows
        found = [[parse_tests(decode_response(tokenizer, ids), problem["entry_point"]) for ids in group]
                 for problem, group in zip(round_problems, written)]
        tests = [list(dict.fromkeys(test for response in group for test in response)) for group in found]
        if cfg.outputs != "model":  # the expected values are not asked for, so two of them for one call are one test
            tests = [[(call, None) for call in dict.fromkeys(call for call, _ in group)] for group in tests]
        clock.append(time.time())

        # ---- vote. The reference solutions, last, have no voice: they say which tests are right, for the log
        solved = [problem for problem in round_problems if problem.get("solution")]
        calls_of = {problem["task_id"]: [call for call, _ in group] for problem, group in zip(round_problems, tests)}
        programs = [sandbox.program(problem, text) for problem, text in zip(row_problems, texts)]
        programs += [sandbox.program(problem, problem["solution"]) for problem in solved]
        judged = row_problems + solved
        outputs = background.submit(call_outputs, judged, programs, [calls_of[problem["task_id"]] for problem in judged],
                                    cfg.workers, cfg.timeout).result()
        truth = {problem["task_id"]: values for problem, values in zip(solved, outputs[len(texts):])}
        kept, test_records = {}, []
        for number, (problem, group) in enumerate(zip(round_problems, tests)):
            votes = outputs[number * per_prompt:(number + 1) * per_prompt]  # K lists, an output a test
            for t, (call, expected) in enumerate(group):
                column = [vote[t] for vote in votes]
                if cfg.outputs == "reference":
                    value = truth[problem["task_id"]][t] if problem["task_id"] in truth else None
                else:
                    value = majority_output(column) if cfg.outputs == "majority" else value_of(expected)
                share = agreement_share(column, value) if value is not None else 0.0
                keep = is_consistent(share, cfg.agreement)
                right = value is not None and truth[problem["task_id"]][t] == value if problem["task_id"] in truth else None
                test = f"assert {call} == {expected or repr(value[0])}" if value is not None else None
                if keep:
                    kept.setdefault(problem["task_id"], []).append(test)
                test_records.append({"task_id": problem["task_id"], "prompt": problem["prompt"], "call": call, "test": test,
                                     "agreement": share, "kept": keep, "right": right})
        clock.append(time.time())

        # ---- pass or fail: the kept tests decide; the true ones, run while the policy trains, are for the log
        tested = [k for k, problem in enumerate(row_problems) if problem["task_id"] in kept]
        verdicts = [None] * len(texts)
        for k, result in zip(tested, background.submit(
                run_tests, [{**row_problems[k], "tests": kept[row_problems[k]["task_id"]]} for k in tested],
                [texts[k] for k in tested], cfg.workers, cfg.timeout).result()):
            verdicts[k] = result.passed
        true_tests = background.submit(run_tests, row_problems, texts, cfg.workers, cfg.timeout)
        pairs = [(start + a, start + b) for start in range(0, len(texts), per_prompt)
                 for a, b in pair_up(verdicts[start:start + per_prompt], cfg.pairs_per_prompt, cpu_generator)]
        groups = torch.tensor(pairs, dtype=torch.long).view(-1, 2)  # (G, 2)
        rows = groups.flatten()
        batch["desirable"] = torch.zeros(len(texts)).index_fill(0, groups[:, 0], 1.0)
        clock.append(time.time())

        # ---- log-probabilities of the reference
        if len(groups):
            batch["ref_logprobs"] = token_logprobs(reference, batch, rows).sum(1)  # (n * K,)
        others = pairs_of_other_prompts(groups, cfg.pairs_per_prompt) if cfg.loss == "kto" else None
        if others is not None:  # the response of each row to the prompt of another pair; row k is rows[k]
            mismatched = make_batch([row_prompts[k] for k in others.flatten()], [responses[k] for k in rows], tokenizer.pad_token_id)
            mismatched["ref_logprobs"] = token_logprobs(reference, mismatched, torch.arange(len(rows))).sum(1)

        @torch.no_grad()
        def reference_point(numbers):
            """KTO's KL over the pairs of a minibatch; nothing to prepare for DPO."""
            if others is None:
                return 0.0
            part = torch.stack([2 * numbers, 2 * numbers + 1], 1).flatten()
            logprobs = torch.cat([summed_logprobs(policy, take_rows(mismatched, some, device))
                                  for some in part.split(cfg.forward_batch_size)])
            return mismatched_kl(logprobs.cpu(), mismatched["ref_logprobs"][part]).item()

        # ---- measure the policy on rollouts of its own, before the update: one response a prompt for KL and entropy
        on_policy = cfg.online or iteration == 1
        own, own_rows, own_tests = batch, torch.arange(0, n * per_prompt, per_prompt), true_tests
        if not on_policy:
            own_prompts = [prompt_ids[i] for i in indices]
            with autocast(device):
                own_responses = [group[0] for group in generate(policy, tokenizer, own_prompts, 1, cfg.max_new_tokens,
                                                                cfg.temperature, generator, cfg.generate_batch_size)]
            own_texts = [decode_response(tokenizer, ids) for ids in own_responses]
            own_tests = background.submit(run_tests, round_problems, own_texts, cfg.workers, cfg.timeout)
            own, own_rows = make_batch(own_prompts, own_responses, tokenizer.pad_token_id), torch.arange(n)
        own_mask = own["response_mask"]
        own_logprobs = token_logprobs(policy, own, own_rows)
        kl = (own_logprobs - token_logprobs(reference, own, own_rows))[own_rows]
        if iteration == 1 and kl.abs().max() > 1e-2:  # a wrong mask, position or temperature shows here
            fail(f"before the first update the largest log-ratio to the reference is {kl.abs().max():.4f} (must be 0): policy "
                 "and reference are not the same model")
        clock.append(time.time())

        # ---- train
        statistics, trouble = {}, None
        try:
            for _ in range(cfg.epochs if len(groups) else 0):
                statistics = train_groups(policy, optimizer, loss_of, batch, groups, cfg, cpu_generator, device,
                                          reference_point)
        except FloatingPointError as error:
            trouble = error
        clock.append(time.time())

        # ---- log
        results, own_results = true_tests.result(), own_tests.result()
        clock.append(time.time())
        passed = [result.passed for result in results]
        chosen, rejected = set(groups[:, 0].tolist()), set(groups[:, 1].tolist())
        write_jsonl(out / "tests" / f"{iteration:04d}.jsonl", test_records)
        write_jsonl(out / "rollouts" / f"{iteration:04d}.jsonl", [
            {"task_id": row_problems[k]["task_id"], "prompt": row_problems[k]["prompt"], "response": texts[k],
             "verdict": verdicts[k], "actual_score": float(passed[k]), "passed_tests": results[k].passed_tests,
             "total_tests": results[k].total_tests, "status": results[k].status,
             "truncated": responses[k][-1] != tokenizer.eos_token_id, "kept": k in chosen or k in rejected,
             "best": k in chosen} for k in range(len(texts))])
        if trouble:
            fail(f"round {iteration}: {trouble}; its rollouts are in {out}/rollouts. Lower --lr")
        judged_tests = [record for record in test_records if record["right"] is not None]
        line = {"iteration": iteration, "seen": len(texts), "test_responses": n * cfg.test_responses,
                "test_responses_parsed": sum(bool(response) for group in found for response in group),
                "tests_written": len(test_records), "tests_kept": sum(record["kept"] for record in test_records),
                "prompts_with_tests": len(kept), "prompts": n,
                "precision_written": precision([record["right"] for record in judged_tests]),
                "precision_kept": precision([record["right"] for record in judged_tests if record["kept"]]),
                **verdict_quality(verdicts, passed), "pairs": len(groups), "kept": len(rows),
                "pass_rate": sum(result.passed for result in own_results) / len(own_results),
                "sampler_pass_rate": sum(passed) / len(passed), "only_measured": 0 if on_policy else len(own_results),
                "kl_per_token": masked_mean(kl, own_mask[own_rows]).item(), "kl_per_response": kl.sum(1).mean().item(),
                "entropy": -masked_mean(own_logprobs[own_rows], own_mask[own_rows]).item(),
                "length": own_mask.sum(1).float().mean().item()}
        line.update({f"policy_{name}": value for name, value in statistics.items()})
        if iteration % cfg.eval_every == 0 or iteration == cfg.iterations:
            line["validation_pass_at_1"] = pass_rate_of(policy, tokenizer, validation, validation_ids, cfg, device)
            if line["validation_pass_at_1"] > best:
                best = line["validation_pass_at_1"]
                save_model(policy, tokenizer, out / "best")
        clock.append(time.time())
        names = ("generate", "vote", "verdicts", "measure", "train", "tests", "validate")
        line.update({f"seconds_{name}": round(b - a, 2) for name, a, b in zip(names, clock, clock[1:])})
        metrics.append(line)
        shown = {name: "-" if line[name] is None else f"{line[name]:.2f}"
                 for name in ("precision_written", "precision_kept", "recall")}
        print(f"round {iteration:3d}  tests {line['tests_kept']}/{line['tests_written']}  precision "
              f"{shown['precision_written']} -> {shown['precision_kept']}  recall {shown['recall']}  pairs {line['pairs']}  "
              f"pass rate {line['pass_rate']:.2f}  KL {line['kl_per_response']:.2f}  "
              + (f"validation {line['validation_pass_at_1']:.3f}  " if "validation_pass_at_1" in line else "")
              + f"{time.time() - started:.0f} s", flush=True)

        # ---- save: state.pt is replaced last, so that a kill at any moment repeats this round and no more
        write_jsonl(out / "metrics.jsonl", metrics)
        if cfg.save_every and iteration % cfg.save_every == 0:
            save_model(policy, tokenizer, out / f"iteration_{iteration}")
        torch.save({"config": dataclasses.asdict(settings), "metrics": metrics, "best": best,
                    "policy": policy.state_dict(), "optimizer": optimizer.state_dict()}, f"{state_path}.tmp")
        os.replace(f"{state_path}.tmp", state_path)

    save_model(policy, tokenizer, out / "last")
    plot_rounds(metrics, out / "curves.png", f"PLUM, {run.replace('_', ', ')}, seed {cfg.seed}")
    save_config(settings, out)
    print(f"saved {out}: best validation pass@1 {best:.3f}; stage 07_plum ({run}) took {cost(started)}")


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
