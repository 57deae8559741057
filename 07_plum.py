"""Stage 7, PLUM: preference learning from tests that the policy writes itself, without an RM.

Each round samples K responses to each of n prompts, asks the model for tests of these prompts,
keeps the tests that a majority of the responses agrees with, labels the responses by them, and
trains on pairs of a passing and a failing response (arXiv 2406.06887):

    sample -> write tests -> vote -> label and pair -> train -> log, validate, save

    vote   a(t) = 1/K sum_k [o_k(t) = e(t)],  o_k: output of response k,  e: expected output
           kept where 1/2 < a(t) < 1: a majority agrees, and the test tells responses apart
    label  y+ passes all kept tests of its prompt, y- fails one
    DPO    L = -log sigmoid(beta h),  h = log pi/pi_ref(y+) - log pi/pi_ref(y-)
    KTO    L = 1 - sigmoid(+-beta (log pi/pi_ref(y) - KL)),  + for y+, - for y-

A small model must first learn to write tests: stage 1 fine-tunes it on solutions and tests, mixed.
The result starts the policy, is the reference and writes all tests. An instruction-tuned model
needs only a request: see the third command.

Reads data/tiny/ppo.jsonl, data/tiny/validation.jsonl, out/plum/sft. True tests and solutions of
ppo.jsonl serve the log alone: are tests and labels right?

Writes out/plum/<loss>_<online or offline>/: best and last (ordinary Hugging Face folders, best by
validation pass@1), metrics.jsonl, curves.png, tests/0001.jsonl ... and rollouts/0001.jsonl ...
(every test with its votes, every response).

Run:
    python 01_sft.py --model out/sft --data data/tiny/plum.jsonl --epochs 2 --lr 1e-3 \\
        --out out/plum/sft
    python 07_plum.py --online
    python 07_plum.py --policy MODEL --outputs model --ask $'{prompt}\\nWrite ..'

Different from the paper: the policy writes the tests, not a stronger model. A model of a million
parameters computes few outputs right, so by default it writes inputs and the vote gives outputs.
"""

import ast
import contextlib
import copy
import random
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import transformers
import tyro
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer

import sandbox

ASK_FOR_TESTS = "{prompt}# tests\n"  # as in plum.jsonl, which 00_data.py writes
MARK = "@plum@"  # starts the lines in which a program prints its outputs
PANELS = {  # of curves.png
    "against the true tests and solutions": [
        "precision_written",
        "precision_kept",
        "recall",
        "label_accuracy",
    ],
    "programs that pass the true tests": ["pass_rate", "validation_pass_at_1"],
}


@dataclass
class Config:
    loss: Literal["dpo", "kto"] = "dpo"  # the preference loss; paper: both
    online: bool = False  # responses of the policy as it stands, not of the starting policy
    # majority: the most common output of the responses is the expected one; model: the test's own,
    # as in the paper
    outputs: Literal["majority", "model"] = "majority"
    agreement: float = 0.5  # a kept test agrees with a larger share of the K responses
    data: str = "data/tiny/ppo.jsonl"  # problems to train on, JSONL
    validation: str = "data/tiny/validation.jsonl"  # problems that choose the best checkpoint
    policy: str = "out/plum/sft"  # model that can write solutions and tests
    ask: str = ASK_FOR_TESTS  # request for tests; {prompt} and {entry_point} are the problem's
    out: str = ""  # output folder; empty: out/plum/<loss>_<online or offline>
    iterations: int = 15  # rounds of sample, write tests, vote, train
    prompts_per_iteration: int = 24  # n; n (K + test_responses) = 240 samples, as in stage 4
    responses_per_prompt: int = 8  # K, responses sampled for each prompt
    test_responses: int = 2  # responses sampled for each prompt that write tests
    pairs_per_prompt: int = 2  # pairs of a passing and a failing response, at most
    temperature: float = 1.0  # divides the logits in sampling, update and reference alike
    max_new_tokens: int = 128  # longest response of either kind, tokens
    beta: float = 0.1  # strength of the pull to the reference, per nat
    epochs: int = 1  # passes over the pairs of a round
    minibatch_size: int = 48  # responses per optimiser step, two to a pair
    micro_batch_size: int = 48  # responses per forward and backward pass; changes memory only
    lr: float = 0.0  # AdamW, constant; 0: 5e-5 online, 2e-5 offline, where responses grow old
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    eval_every: int = 5  # rounds between two validations; the last round has one, too
    generate_batch_size: int = 256  # responses generated at once
    score_batch_size: int = 64  # responses per forward pass where nothing is learned
    timeout: float = 1.0  # CPU seconds per program
    workers: int = 1  # sandbox processes, 0: one per core
    gradient_checkpointing: bool = False  # recompute activations: less memory, a third more time
    bf16: Literal["auto", "on", "off"] = "auto"  # autocast, weights stay float32; auto: on a GPU
    lora_rank: int = 0  # train LoRA adapters of this rank (needs peft); 0: train all weights
    threads: int = 0  # PyTorch CPU threads, 0: PyTorch's choice
    seed: int = 0  # order of the prompts, sampling, pairs, minibatches


# -------------------------------------------------------------------- tests: out of a text, votes


def parse_tests(response, entry_point):
    """The tests in a response -> [(call, expected)], both source code, each once.

    A test is an assert statement of one form: a call of the entry point with literal arguments,
    compared with a literal by == or `is`, or the bare or negated call, which stand for True and
    False. Everything else says nothing about the entry point, or nothing at all
    (`assert f(x) == f(x)`), and is passed over.
    """
    code = sandbox.program({}, response)
    trees = [parsed(code)]
    if trees[0] is None:  # a last line that was cut, or words between the tests: line by line
        trees = [parsed(line.strip()) for line in code.splitlines()]
    tests = []
    for statement in (node for tree in trees if tree for node in ast.walk(tree)):
        if not isinstance(statement, ast.Assert) or not entry_point:
            continue
        left, right = statement.test, ast.Constant(True)
        if isinstance(left, ast.UnaryOp) and isinstance(left.op, ast.Not):
            left, right = left.operand, ast.Constant(False)
        elif isinstance(left, ast.Compare) and isinstance(left.ops[0], (ast.Eq, ast.Is)):
            if len(left.ops) > 1:
                continue
            left, right = left.left, left.comparators[0]
            if literal(left):
                left, right = right, left
        if is_call(left, entry_point) and literal(right):
            tests.append((ast.unparse(left), ast.unparse(right)))
    return list(dict.fromkeys(tests))


def parsed(text):
    """The syntax tree of a text, None where it is no Python: a model can write anything."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def literal(source):
    """The value of a literal (text or syntax tree) as a one-tuple, None where it is none."""
    try:
        return (ast.literal_eval(source),)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def is_call(node, entry_point):
    """True for `f(...)`, or `C(...).method(...)` of a class, with literal arguments only."""
    if not isinstance(node, ast.Call):
        return False
    if not all(map(literal, node.args + [keyword.value for keyword in node.keywords])):
        return False
    if isinstance(node.func, ast.Attribute):
        return is_call(node.func.value, entry_point)
    return isinstance(node.func, ast.Name) and node.func.id == entry_point


def majority_output(outputs):
    """The most common of K outputs (one-tuples, None for a call that failed), the first at a tie.

    None where all calls failed.
    """
    found = [output for output in outputs if output is not None]
    return max(found, key=found.count, default=None)


def agreement_share(outputs, expected):
    """a(t): the share of the K responses whose output is the expected one.

    Args: outputs: one-tuples, None for a call that failed and agrees with nothing.
    """
    return sum(output is not None and output == expected for output in outputs) / len(outputs)


def is_consistent(share, agreement):
    """True for a test that enough responses agree with, and that tells some of them apart."""
    return agreement < share < 1


def share_of(flags):
    """The share that is true, None where there is nothing to count."""
    return sum(flags) / len(flags) if flags else None


def label_quality(labels, passed):
    """How the labels by the kept tests stand to the true tests.

    Args: labels: True, False, or None where the prompt has no test; passed: by the true tests.
    Returns: {"recall": share of the failing responses that are labelled False,
        "label_accuracy": share of the labels that are right}.
    """
    return {
        "recall": share_of([label is False for label, truth in zip(labels, passed) if not truth]),
        "label_accuracy": share_of(
            [label == truth for label, truth in zip(labels, passed) if label is not None]
        ),
    }


def pair_up(labels, count, generator):
    """At most `count` pairs (passing, failing) of the responses to one prompt, none used twice.

    Args: labels: for each response True, False or None.
    """
    order = torch.randperm(len(labels), generator=generator).tolist()
    passing, failing = ([k for k in order if labels[k] is label] for label in (True, False))
    return list(zip(passing, failing))[:count]


# ----------------------------------------------------------------------------------------- losses
#
# All log-probabilities are sums over the tokens of a response.


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """DPO (Rafailov et al. 2023, equation 7): -log sigmoid(beta h), mean over pairs; all (B,).

    h is how much further the policy has raised the chosen response over the reference than the
    rejected one. The loss is log 2 at the reference.
    """
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -F.logsigmoid(beta * h).mean()


def kto_loss(logprobs, ref_logprobs, desirable, kl, beta):
    """KTO (Ethayarajh et al. 2024) with both weights 1, mean over responses.

    1 - sigmoid(beta (r - kl)) for desirable responses and 1 - sigmoid(beta (kl - r)) for
    undesirable ones, r = logprobs - ref_logprobs: a gain or loss against where the policy stands.

    Args: logprobs, ref_logprobs, desirable (bool or 0 and 1): (B,); kl: scalar, from
        `mismatched_kl`, taken as a constant.
    """
    kl = torch.as_tensor(kl, dtype=logprobs.dtype, device=logprobs.device).detach()
    sign = 2.0 * desirable.to(logprobs.dtype) - 1.0
    return (1 - torch.sigmoid(sign * beta * (logprobs - ref_logprobs - kl))).mean()


def mismatched_kl(logprobs, ref_logprobs):
    """KTO's reference point: max(0, mean log-ratio) of responses to other prompts; all (B,).

    The matched responses would not do: training raises and lowers them, and the point would move
    with them.
    """
    return (logprobs - ref_logprobs).detach().mean().clamp(min=0)


# ------------------------------------------------------------------------------------------- main


def main(cfg):
    started = time.time()
    check_flags(cfg)
    n, per_prompt = cfg.prompts_per_iteration, cfg.responses_per_prompt
    out = Path(cfg.out or f"out/plum/{cfg.loss}_{'online' if cfg.online else 'offline'}")
    if sandbox.finished(cfg, out):
        return
    problems, validation = sandbox.read_problems(cfg.data), sandbox.read_problems(cfg.validation)
    if not any(problem["entry_point"] for problem in problems):
        sandbox.fail(f"{cfg.data}: no problem has an entry_point, which a test must call")
    device, amp = set_up(cfg)

    # ---- models: the starting policy is also reference, writer of tests and offline sampler
    tokenizer = sandbox.load_tokenizer(cfg.policy, policy=True)
    policy, reference = load_policy(cfg.policy, tokenizer, cfg, device)
    lr = cfg.lr or (5e-5 if cfg.online else 2e-5)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    room = cfg.max_new_tokens, policy.config
    prompt_ids = sandbox.encode_prompts(tokenizer, problems, *room)
    validation_ids = sandbox.encode_prompts(tokenizer, validation, *room)
    asking = [{**problem, "prompt": request_for_tests(problem, cfg)} for problem in problems]
    request_ids = sandbox.encode_prompts(tokenizer, asking, *room)

    best = validate(policy, tokenizer, validation, validation_ids, cfg, amp)
    metrics = [{"iteration": 0, "validation_pass_at_1": best}]
    for name in ("tests", "rollouts"):
        (out / name).mkdir(parents=True)
    save_model(policy, tokenizer, out / "best")
    print(f"before training: validation pass@1 {best:.3f}, {time.time() - started:.0f} s")
    background = ThreadPoolExecutor(1)

    for iteration in range(1, cfg.iterations + 1):
        clock = [time.time()]
        torch.manual_seed(cfg.seed * 1_000_003 + iteration)  # of the sampler
        generator = torch.Generator().manual_seed(-(cfg.seed * 1_000_003 + iteration))  # the rest

        # ---- sample K responses to each of n prompts, and write tests
        tasks = prompts_of_iteration(len(problems), n, iteration, cfg.seed)
        tasks = list(dict.fromkeys(tasks))  # one may end a pass over the data and start the next
        prompts = [prompt_ids[i] for i in tasks]
        requests = [request_ids[i] for i in tasks]
        task_problems = [problems[i] for i in tasks]
        row_problems = [problem for problem in task_problems for _ in range(per_prompt)]
        sampler = policy if cfg.online else reference
        with amp, contextlib.nullcontext() if cfg.online else without_adapters(reference):
            responses, _ = generate(
                sampler, tokenizer, prompts, per_prompt, cfg.temperature, cfg, "sampling"
            )
        with amp, without_adapters(reference):
            written, _ = generate(
                reference, tokenizer, requests, cfg.test_responses, cfg.temperature, cfg, "asking"
            )
        own = responses[::per_prompt]  # of the policy, one per prompt, for the log
        if not cfg.online:
            with amp:
                own, _ = generate(policy, tokenizer, prompts, 1, cfg.temperature, cfg, "sampling")
        texts = [sandbox.decode_response(tokenizer, ids) for ids in responses]  # n * K
        own_texts = [sandbox.decode_response(tokenizer, ids) for ids in own]
        written = [sandbox.decode_response(tokenizer, ids) for ids in written]  # n * test_responses
        clock.append(time.time())

        # ---- vote: which tests a majority agrees with
        tests = vote(task_problems, texts, written, cfg)
        clock.append(time.time())

        # ---- label and pair. The true tests run while the policy trains, for the log alone.
        labels = label(row_problems, texts, tests, cfg)
        limits = {"timeout": cfg.timeout, "workers": cfg.workers}
        verdicts = background.submit(
            sandbox.run_tests, row_problems + task_problems, texts + own_texts, **limits
        )
        rows = []  # pair after pair, the passing response first
        for first in range(0, len(texts), per_prompt):
            group = labels[first : first + per_prompt]
            for pair in pair_up(group, cfg.pairs_per_prompt, generator):
                rows += [first + k for k in pair]
        clock.append(time.time())

        # ---- the policy before its update, on responses of its own
        own_batch = make_batch(prompts, own)
        own_mask = own_batch["response_mask"]
        logprobs, ref_logprobs = policy_and_reference(policy, reference, own_batch, cfg, amp)
        kl = logprobs - ref_logprobs  # (n, T), 0 on padding
        clock.append(time.time())

        # ---- train on the pairs
        statistics = {}
        if rows:
            row_prompts = [prompts[k // per_prompt] for k in rows]
            row_responses = [responses[k] for k in rows]
            batch = make_batch(row_prompts, row_responses)
            with without_adapters(reference):
                batch["ref_logprobs"] = forward_rows(logprobs_of, reference, batch, cfg, amp)
            batch["kl_point"] = torch.zeros(len(rows), 1)
            for _ in range(cfg.epochs):
                if cfg.loss == "kto":
                    batch["kl_point"][:] = reference_point(
                        policy, reference, row_prompts, row_responses, cfg, amp
                    )
                statistics = train_groups(
                    policy, optimizer, pair_loss, batch, 2, cfg, generator, amp
                )
        clock.append(time.time())

        # ---- log
        results = verdicts.result()
        passed = [result.passed for result in results]
        passed, own_passed = passed[: len(texts)], passed[len(texts) :]
        known = [test for test in tests if test["right"] is not None]
        line = {
            "iteration": iteration,
            "seen": len(texts),
            "test_responses": len(written),
            "tests_written": len(tests),
            "tests_kept": sum(test["kept"] for test in tests),
            "prompts_with_tests": len({test["task_id"] for test in tests if test["kept"]}),
            "precision_written": share_of([test["right"] for test in known]),
            "precision_kept": share_of([test["right"] for test in known if test["kept"]]),
            **label_quality(labels, passed),
            "pairs": len(rows) // 2,
            "kept": len(rows),
            "pass_rate": share_of(own_passed),
            "sampler_pass_rate": share_of(passed),
            "kl_per_response": kl.sum(1).mean().item(),
            "kl_per_token": masked_mean(kl, own_mask).item(),
            "entropy": -masked_mean(logprobs, own_mask).item(),
            "length": own_mask.sum(1).float().mean().item(),
        }
        line |= {f"policy_{name}": value for name, value in statistics.items()}
        rollouts = [
            sandbox.sample_record(
                problem,
                texts[k],
                results[k],
                rm_score=None,
                truncated=responses[k][-1] != tokenizer.eos_token_id,
                policy=f"{out}/{iteration:04d}" if cfg.online else cfg.policy,
                iteration=iteration,
                label=labels[k],
                kept=k in rows,
            )
            for k, problem in enumerate(row_problems)
        ]
        sandbox.write_jsonl(out / "tests" / f"{iteration:04d}.jsonl", tests)
        sandbox.write_jsonl(out / "rollouts" / f"{iteration:04d}.jsonl", rollouts)
        clock.append(time.time())

        # ---- validate and save
        if iteration % cfg.eval_every == 0 or iteration == cfg.iterations:
            accuracy = validate(policy, tokenizer, validation, validation_ids, cfg, amp)
            line["validation_pass_at_1"] = accuracy
            if accuracy > best:
                best = accuracy
                save_model(policy, tokenizer, out / "best")
        clock.append(time.time())
        phases = ("generate", "vote", "label", "forward", "train", "tests", "validate")
        line |= {f"seconds_{name}": b - a for name, a, b in zip(phases, clock, clock[1:])}
        metrics.append(line)
        sandbox.write_jsonl(out / "metrics.jsonl", metrics)
        print_round(line, started)

    save_model(policy, tokenizer, out / "last")
    sandbox.plot_curves(metrics, out / "curves.png", PANELS)
    sandbox.save_config(cfg, out)
    print(f"saved {out}: best validation pass@1 {best:.3f}, {time.time() - started:.0f} s")


# --------------------------------------------------------------------------------- settings, models


def check_flags(cfg):
    """Settings with which nothing would be learned are refused."""
    sandbox.check_numbers(cfg)
    if cfg.responses_per_prompt < 2:
        sandbox.fail("--responses_per_prompt 1: one alone makes no pair")
    if not 0 <= cfg.agreement < 1:
        sandbox.fail(f"--agreement {cfg.agreement}: it must be a share, less than 1")
    if "{prompt}" not in cfg.ask:
        sandbox.fail(f"--ask {cfg.ask!r} has no {{prompt}}, where the problem goes")


def load_policy(path, tokenizer, cfg, device):
    """The policy that learns and its frozen reference: with LoRA, the policy without adapters."""
    policy = load_model(AutoModelForCausalLM, path, tokenizer)
    reference = None if cfg.lora_rank else copy.deepcopy(policy).requires_grad_(False)
    if cfg.gradient_checkpointing:
        policy.activation_checkpointing_enable()
    if cfg.lora_rank:
        policy = reference = add_adapters(policy, cfg.lora_rank, "CAUSAL_LM")
    return policy.to(device), reference.to(device)


def request_for_tests(problem, cfg):
    """The prompt that asks for tests of a problem."""
    request = cfg.ask.replace("{entry_point}", problem["entry_point"] or "")
    return request.replace("{prompt}", problem["prompt"])


def set_up(cfg):
    """The device to compute on, and the autocast context of forward passes and losses.

    Weights stay float32 under it: at learning rate 5e-7 an update to a bf16 weight rounds away.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    # On Hopper, PyTorch 2.13 prefers cuDNN's attention, whose backward pass gives nan for some
    # lengths with a mask (pytorch issue 196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = cfg.bf16 == "on" or (cfg.bf16 == "auto" and device.type == "cuda")
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def load_model(model_class, path, tokenizer, **options):
    """A float32 model with every dropout at 0: rollout and update must see the same policy.

    A pad token that `load_tokenizer` had to add gets a row in the embedding, the mean of the
    others. EOS and pad are also written to the config, where other programs look for them.
    """
    config = AutoConfig.from_pretrained(path, **options)
    config.update({name: 0.0 for name in config.to_dict() if "drop" in name})
    with sandbox.one_line_error(f"no model at {path}"):
        model = model_class.from_pretrained(path, config=config, dtype=torch.float32)
    rows = model.get_input_embeddings().num_embeddings
    if rows < len(tokenizer):  # drawn by transformers, the row would differ from load to load
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for layer in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
            layer.weight.data[rows:] = layer.weight.data[:rows].mean(0)
    for place in filter(None, (model.config, getattr(model, "generation_config", None))):
        place.eos_token_id, place.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return model


def add_adapters(model, rank, task_type):
    """The model with LoRA adapters (Hu et al. 2022) on all linear layers of its backbone.

    A SEQ_CLS model keeps a trainable copy of its `score` head beside the frozen one.
    """
    try:
        import peft
    except ImportError:
        sandbox.fail("--lora_rank needs peft: pip install -r requirements-lora.txt")
    options = {"target_modules": "all-linear", "task_type": task_type}
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, **options))


def without_adapters(model):
    """A context in which a model with LoRA adapters is what it was before training."""
    return getattr(model, "disable_adapter", contextlib.nullcontext)()


def save_model(model, tokenizer, directory):
    """Save an ordinary Hugging Face folder, LoRA merged in float32; no file is half written."""
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    temporary = Path(f"{directory}.tmp")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    directory.mkdir(exist_ok=True)
    for file in temporary.iterdir():
        shutil.rmtree(directory / file.name, ignore_errors=True)  # a folder cannot be replaced
        file.replace(directory / file.name)
    temporary.rmdir()


# -------------------------------------------------------------------------- generate and validate


def prompts_of_iteration(count, per_iteration, iteration, seed):
    """Problem indices of an iteration (from 1): slices of endlessly repeated, reshuffled passes.

    They depend on nothing else, so every strategy of a seed sees the same prompts in the same
    order, and so does a resumed run.
    """
    start, indices = (iteration - 1) * per_iteration, []
    for number in range(start // count, (start + per_iteration - 1) // count + 1):
        order = list(range(count))
        random.Random(f"{seed}/{number}").shuffle(order)
        indices += order
    return indices[start % count :][:per_iteration]


@torch.no_grad()
def generate(model, tokenizer, prompts, repeats, temperature, cfg, progress=None):
    """Sample responses with PyTorch's global random numbers.

    Faster than `model.generate`: a prompt is computed once for all of its responses, prompts of
    similar length share a batch, finished rows leave it, and the cache is seldom copied.

    Args:
        prompts: list of token id lists; repeats: responses to each.
        temperature: divides the logits; 0 is greedy.
        cfg: has max_new_tokens, and generate_batch_size, the most responses computed at once.
        progress: label of a progress bar, or None for silence.
    Returns: responses and their logprobs under the sampling distribution, two lists of
        len(prompts) * repeats lists, in order of prompt. A response without EOS is truncated.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    rows = [i for i in order for _ in range(repeats)]
    size = cfg.generate_batch_size
    size = (size - size % repeats) or size  # whole prompts, where they fit
    done = [[] for _ in prompts]
    with sandbox.progress_bar(len(rows) * cfg.max_new_tokens, progress, " tokens") as bar:
        while rows:
            # Longest first. One long prompt would pad all that share its batch, so a batch ends
            # where prompts are 256 tokens shorter.
            part = [i for i in rows[:size] if len(prompts[i]) > len(prompts[rows[0]]) - 256]
            rows = rows[len(part) :]
            batch = [prompts[i] for i in part]
            sampled = generate_batch(model, tokenizer, batch, temperature, cfg, bar)
            for i, response in zip(part, sampled):
                done[i].append(response)
    responses, logprobs = zip(*(response for group in done for response in group))
    return list(responses), list(logprobs)


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, (rows, heads, tokens, width), with room for later tokens.

    `DynamicLayer` copies all of them for each new token: the more, the longer the responses.
    """

    room = None

    def update(self, keys, values, *args, **kwargs):
        start = self.get_seq_length()
        end = start + keys.shape[2]
        if start == 0:
            return super().update(keys, values)
        if self.room is None or len(self.room[0]) != len(keys) or self.room[0].shape[2] < end:
            pad = torch.nn.functional.pad
            self.room = [pad(x, (0, 0, 0, 8)) for x in (self.keys, self.values)]  # gaps cost, too
        self.room[0][:, :, start:end], self.room[1][:, :, start:end] = keys, values
        self.keys, self.values = (x[:, :, :end] for x in self.room)
        return self.keys, self.values


def generate_batch(model, tokenizer, prompts, temperature, cfg, bar):
    """One response to each prompt, all at once -> list of (token ids, logprobs)."""
    eos, device = tokenizer.eos_token_id, model.device
    row_of = {ids: k for k, ids in enumerate(dict.fromkeys(map(tuple, prompts)))}  # each once
    batch = make_batch(list(row_of), [[]] * len(row_of))
    inputs, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    tokens = torch.full((len(prompts), cfg.max_new_tokens), eos, device=device)
    logprobs = torch.zeros(tokens.shape, device=device)
    rows = torch.arange(len(prompts), device=device)  # of `tokens`, that are still in the batch
    for t in range(cfg.max_new_tokens):
        logits = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -inputs.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        if t == 0:  # from prompts to responses
            places = torch.tensor([row_of[tuple(ids)] for ids in prompts], device=device)
            cache.batch_select_indices(places)
            logits, mask = logits[places], mask[places]
        all_logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
        if temperature > 0:  # invert the cumulative distribution: torch.multinomial is slow on CPUs
            cumulative = all_logprobs.exp().cumsum(-1)
            uniform = torch.rand(len(cumulative), 1, device=device) * cumulative[:, -1:]
            chosen = torch.searchsorted(cumulative, uniform, right=True)
            chosen = chosen.clamp(max=cumulative.shape[1] - 1)  # (b, 1)
        else:
            chosen = all_logprobs.argmax(-1, keepdim=True)
        tokens[rows, t] = chosen[:, 0]
        logprobs[rows, t] = all_logprobs.gather(-1, chosen)[:, 0]
        going = (tokens[rows, : t + 1] != eos).all(1)
        unfinished = int(going.sum())  # a GPU waits here: once per token
        bar.update(len(rows))
        if unfinished == 0:
            break
        if unfinished <= 0.8 * len(rows):  # it costs a copy of the cache: not for every row
            bar.update((len(rows) - unfinished) * (cfg.max_new_tokens - t - 1))
            cache.batch_select_indices(going.nonzero()[:, 0])
            rows, chosen, mask = rows[going], chosen[going], mask[going]
        inputs, mask = chosen, torch.cat([mask, torch.ones_like(chosen)], 1)
    bar.update(len(rows) * (cfg.max_new_tokens - t - 1))
    ids = [row[: row.index(eos) + 1] if eos in row else row for row in tokens.tolist()]
    return [(row, probs[: len(row)]) for row, probs in zip(ids, logprobs.tolist())]


def validate(policy, tokenizer, problems, prompts, cfg, amp):
    """Greedy pass@1 on the validation problems."""
    with amp:
        responses, _ = generate(policy, tokenizer, prompts, 1, 0.0, cfg, "validating")
    texts = [sandbox.decode_response(tokenizer, ids) for ids in responses]
    limits = {"timeout": cfg.timeout, "workers": cfg.workers, "progress": "testing"}
    results = sandbox.run_tests(problems, texts, **limits)
    return sum(result.passed for result in results) / len(results)


# --------------------------------------------------------------------------------- vote and label


def vote(problems, texts, written, cfg):
    """Let the responses vote on the tests.

    The problem's own solution, run beside them, has no voice: it says which tests are right.

    Args:
        problems: n; texts: n * K responses, written: n * test_responses texts with tests, both in
            order of prompt.
    Returns: a record for each test: task_id, prompt, call, test (None where no response gave an
        output), agreement, kept, right (None for a problem without a solution).
    """
    per_prompt = cfg.responses_per_prompt
    tests, runs = [], []
    for i, problem in enumerate(problems):
        found = []
        for text in written[i * cfg.test_responses : (i + 1) * cfg.test_responses]:
            found += parse_tests(text, problem["entry_point"])
        if cfg.outputs == "majority":  # two opinions on one call are one test
            found = [(call, None) for call, _ in found]
        tests.append(list(dict.fromkeys(found)))
        calls = [call for call, _ in tests[i]]
        solution = problem.get("solution") or ""
        for text in [*texts[i * per_prompt : (i + 1) * per_prompt], solution]:
            runs.append((problem["entry_point"], sandbox.program(problem, text), calls))
    outputs = iter(call_outputs(runs, cfg))
    records = []
    for problem, group in zip(problems, tests):
        votes = [next(outputs) for _ in range(per_prompt)]  # of each response, one per test
        truth, solved = next(outputs), bool(problem.get("solution"))
        for t, (call, expected) in enumerate(group):
            column = [vote[t] for vote in votes]
            value = majority_output(column) if cfg.outputs == "majority" else literal(expected)
            share = agreement_share(column, value)
            records.append(
                {
                    "task_id": problem["task_id"],
                    "prompt": problem["prompt"],
                    "call": call,
                    "test": f"assert {call} == {value[0]!r}" if value else None,
                    "agreement": share,
                    "kept": is_consistent(share, cfg.agreement),
                    "right": value is not None and value == truth[t] if solved else None,
                }
            )
    return records


def call_outputs(runs, cfg):
    """What programs give for some calls.

    The program itself prints its outputs: good enough for a vote, where a lie costs one voice.
    Labels come from tests in the sandbox.

    Args: runs: for each program (entry point, code, calls); calls as source code.
    Returns: for each program a list of outputs: one-tuples, None where a call failed or came after
        the program's time was up.
    """
    jobs = {}
    for entry_point, code, calls in runs:
        probes = [
            f"\ntry: print('\\n{MARK} {number} ' + repr({call}), flush=True)\n"
            "except BaseException: pass\n"
            for number, call in enumerate(calls)
        ]
        if calls:
            jobs[code, *calls] = {
                "code": code + "\n" + "".join(probes),
                "tests": [f"assert {entry_point}"],
                "entry_point": entry_point,
                "timeout": cfg.timeout,
            }
    with sandbox.progress_bar(len(jobs), "voting") as bar:
        results = sandbox.run_many(
            list(jobs.values()), cfg.workers or None, on_result=lambda index, result: bar.update()
        )
    printed = {key: result.stdout for key, result in zip(jobs, results)}
    outputs = []
    for _, code, calls in runs:
        text = printed.get((code, *calls), "")
        found = dict(re.findall(rf"^{MARK} (\d+) (.*)$", text, re.M))
        outputs.append([literal(found.get(str(number), "")) for number in range(len(calls))])
    return outputs


def label(problems, texts, tests, cfg):
    """True for a response that passes all kept tests of its prompt, False, None without tests."""
    kept = {problem["task_id"]: [] for problem in problems}
    for test in tests:
        if test["kept"]:
            kept[test["task_id"]].append(test["test"])
    tested = [k for k, problem in enumerate(problems) if kept[problem["task_id"]]]
    results = sandbox.run_tests(
        [{**problems[k], "tests": kept[problems[k]["task_id"]]} for k in tested],
        [texts[k] for k in tested],
        timeout=cfg.timeout,
        workers=cfg.workers,
        progress="labelling",
    )
    labels = [None] * len(texts)
    for k, result in zip(tested, results):
        labels[k] = result.passed
    return labels


# ---------------------------------------------------------------------- batches and forward passes


def make_batch(prompts, responses):
    """Token ids -> input_ids and attention_mask, (B, P + T), and response_mask, (B, T).

    Prompts are padded on the left, responses on the right. The masks come from lengths; padding
    ids are never read.
    """
    width, length = max(map(len, prompts)), max(map(len, responses))
    batch = {"input_ids": [], "attention_mask": [], "response_mask": []}
    for prompt, response in zip(prompts, responses):
        left, right = [0] * (width - len(prompt)), [0] * (length - len(response))
        ids = [*prompt, *response]
        batch["input_ids"].append(left + ids + right)
        batch["attention_mask"].append(left + [1] * len(ids) + right)
        batch["response_mask"].append([1] * len(response) + right)
    return {name: torch.tensor(rows, dtype=torch.long) for name, rows in batch.items()}


def take_rows(batch, rows, device):
    """Some rows of a batch, all fields of a row together, without columns of padding alone."""
    part = {name: field[rows] for name, field in batch.items()}
    used, answered = part["attention_mask"].any(0), part["response_mask"].any(0)
    for name, field in part.items():
        whole = name in ("input_ids", "attention_mask")  # prompt and response
        columns = used if whole else answered[: field.shape[1]]  # all of a (B, 1) field
        part[name] = field[:, columns].to(device)
    return part


def response_logprobs(model, input_ids, attention_mask, response_length, temperature):
    """Log-probability of each of the last `response_length` tokens under the sampling distribution.

    Args: input_ids, attention_mask: (B, P + T), prompts padded left, responses right.
    Returns: (B, T) float32; on padding the values mean nothing and are to be masked.
    """
    # Without positions from the mask, left padding would shift a row by its neighbours' lengths.
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=False,
        logits_to_keep=response_length + 1,
    ).logits  # (B, T + 1, V)
    logits = logits[:, :-1].float() / temperature  # position t predicts token t + 1
    targets = input_ids[:, -response_length:, None]
    return torch.log_softmax(logits, -1).gather(-1, targets)[..., 0]


def logprobs_of(model, mb, cfg):
    """`response_logprobs` of a batch -> (B, T)."""
    length = mb["response_mask"].shape[1]
    inputs = mb["input_ids"], mb["attention_mask"]
    return response_logprobs(model, *inputs, length, cfg.temperature)


@torch.no_grad()
def forward_rows(function, model, batch, cfg, amp):
    """`function(model, mb, cfg)` over a batch, in parts of similar length -> (B, T) on the CPU."""
    result = torch.zeros(batch["response_mask"].shape)
    lengths = batch["attention_mask"].sum(1)
    for rows in lengths.argsort().split(cfg.score_batch_size):
        mb = take_rows(batch, rows, model.device)
        with amp:
            values = function(model, mb, cfg) * mb["response_mask"]
        result[rows, : values.shape[1]] = values.float().cpu()
    return result


def masked_mean(x, mask):
    """Mean of x over the positions where mask is 1, 0 where there are none; both of one shape."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def policy_and_reference(policy, reference, batch, cfg, amp):
    """Logprobs of a batch under the policy and under the frozen reference, both (B, T)."""
    logprobs = forward_rows(logprobs_of, policy, batch, cfg, amp)
    with without_adapters(reference):
        return logprobs, forward_rows(logprobs_of, reference, batch, cfg, amp)


def reference_point(policy, reference, prompts, responses, cfg, amp):
    """KTO's KL, once per pass: each response to the prompt of another pair, in both models.

    Rows stand in order of prompt, and a prompt has at most 2 * pairs_per_prompt of them, so those
    that many rows away belong to another prompt. With fewer rows there may be no other: 0.
    """
    shift = 2 * cfg.pairs_per_prompt
    if len(prompts) < 2 * shift:
        return 0.0
    mismatched = make_batch(prompts[-shift:] + prompts[:-shift], responses)
    logprobs, ref_logprobs = policy_and_reference(policy, reference, mismatched, cfg, amp)
    return mismatched_kl(logprobs.sum(1), ref_logprobs.sum(1)).item()


# ------------------------------------------------------------------------------------------ train


def pair_loss(policy, mb, cfg):
    """The loss of pairs that stand one after the other, the passing response first."""
    mask = mb["response_mask"]
    logprobs = (logprobs_of(policy, mb, cfg) * mask).sum(1)  # (B,)
    ref_logprobs = (mb["ref_logprobs"] * mask).sum(1)
    chosen, rejected = logprobs.view(-1, 2).unbind(1)  # (B / 2,)
    ref_chosen, ref_rejected = ref_logprobs.view(-1, 2).unbind(1)
    if cfg.loss == "kto":
        desirable = torch.arange(len(mask), device=mask.device) % 2 == 0
        loss = kto_loss(logprobs, ref_logprobs, desirable, mb["kl_point"][0], cfg.beta)
    else:
        loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, cfg.beta)
    return loss, pair_statistics(chosen - ref_chosen, rejected - ref_rejected, mb["kl_point"][0])


def pair_statistics(raised, lowered, kl_point):
    """How far pairs have moved from the reference; raised, lowered: (B,) log-ratios.

    That the chosen responses become less probable, too, is a known way in which these fail.
    """
    return {
        "chosen_logratio": raised.mean().item(),
        "rejected_logratio": lowered.mean().item(),
        "accuracy": (raised > lowered).float().mean().item(),
        "kl_point": kl_point.item(),
    }


def train_groups(policy, optimizer, loss_function, batch, size, cfg, generator, amp):
    """One pass over the batch in random minibatches, one optimiser step each -> mean statistics.

    A group of `size` rows is what a loss compares: a response, a pair, or all responses to a
    prompt. Each micro-batch counts by its share of the minibatch's groups, so that the micro-batch
    size changes nothing but the memory.
    """
    rows = torch.arange(len(batch["response_mask"])).view(-1, size)  # (G, R)
    lengths = batch["response_mask"].sum(1)[rows].amax(1)  # (G,)
    totals = {}
    policy.train()  # for gradient checkpointing; the sampler's cache needs eval mode
    order = torch.randperm(len(rows), generator=generator)
    with sandbox.progress_bar(len(order), "training") as bar:
        for minibatch in order.split(max(1, cfg.minibatch_size // size)):
            minibatch = minibatch[lengths[minibatch].argsort()]  # similar lengths together
            for part in minibatch.split(max(1, cfg.micro_batch_size // size)):
                mb = take_rows(batch, rows[part].flatten(), policy.device)
                with amp:
                    loss, statistics = loss_function(policy, mb, cfg)
                (loss * (len(part) / len(minibatch))).backward()
                for name, value in {**statistics, "loss": loss.item()}.items():
                    totals[name] = totals.get(name, 0.0) + value * len(part)
                bar.update(len(part))
            norm = torch.nn.utils.clip_grad_norm_(
                policy.parameters(), cfg.max_grad_norm, error_if_nonfinite=True
            )
            totals["grad_norm"] = totals.get("grad_norm", 0.0) + norm.item() * len(minibatch)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    policy.eval()
    return {name: total / len(rows) for name, total in totals.items()}


def print_round(line, started):
    """One line per round: are the tests right, and do the labels catch wrong responses?"""
    names = ("precision_written", "precision_kept", "recall", "pass_rate")
    shown = {name: "-" if line[name] is None else f"{line[name]:.2f}" for name in names}
    validation = ""
    if "validation_pass_at_1" in line:
        validation = f"validation {line['validation_pass_at_1']:.3f}  "
    print(
        f"round {line['iteration']:3d}  tests {line['tests_kept']}/{line['tests_written']}  "
        f"precision {shown['precision_written']} -> {shown['precision_kept']}  "
        f"recall {shown['recall']}  pairs {line['pairs']}  pass rate {shown['pass_rate']}  "
        f"KL {line['kl_per_response']:.2f}  {validation}{time.time() - started:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
