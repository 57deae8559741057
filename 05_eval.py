"""Stage 5, evaluation: greedy pass@1 and sampled pass@k of any policies on any problems.

Each policy answers every problem once greedily and n times by sampling, and the sandbox runs the
tests. pass@k is the chance that at least one of k samples passes all of them. From n samples of a
problem, of which c pass, its unbiased estimate is (Chen et al. 2021, equation 1)

    pass@k = 1 - C(n - c, k) / C(n, k)

Responses to one problem are not independent, so the 95% intervals come from a bootstrap over
problems. Differences to the first policy are paired by problem. With --reward_model the reward
model (RM) scores the same responses, and 03_r2_analysis.py can read them.

Reads data/tiny/test.jsonl or other problems, and policies: folders, hub names, or `canonical`,
which takes the solution of each problem for the response and should give 1.000.

Writes out/eval/: table.txt, results.json, and samples.jsonl, every response with its verdict:
{"task_id": "test/0", "response": ..., "actual_score": 1.0, "policy": "out/sft", "greedy": true, ..}

Run: python 05_eval.py --policies out/sft out/ppo_none/best out/ppo_bw/best --out out/eval_best

A base model, before stage 1, with the paper's stop strings: python 05_eval.py --samples 0 --plain
--policies deepseek-ai/deepseek-coder-1.3b-base --problems data/humaneval/test.jsonl --timeout 3
--max_new_tokens 512 --out out/eval_base --stop $'\\nclass' $'\\ndef' $'\\n#' $'\\nif' $'\\nprint'

Simplified against the paper (Table 2: HumanEval, MBPP and LeetCode): the default is the tiny set.
"""

import json
import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
import tyro
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.cache_utils import DynamicCache, DynamicLayer

import sandbox


@dataclass
class Config:
    policies: list[str] = field(default_factory=lambda: ["out/sft"])  # folders or hub names
    problems: list[str] = field(default_factory=lambda: ["data/tiny/test.jsonl"])  # JSONL files
    reward_model: str = ""  # RM that scores the responses, too; empty: none
    out: str = "out/eval"  # output folder
    samples: int = 10  # n, sampled responses per problem; 0: greedy only, as in the paper
    ks: list[int] = field(default_factory=lambda: [1, 5, 10])  # the k of pass@k, at most --samples
    temperature: float = 1.0  # of the sampled responses; PPO's rollouts have the same
    max_new_tokens: int = 96  # longest response, tokens; paper: 2048
    stop: list[str] = field(default_factory=list)  # a response ends before the first of these
    plain: bool = False  # prompts without the chat template, which some base models have, too
    generate_batch_size: int = 256  # responses generated at once
    score_batch_size: int = 64  # responses per forward pass of the RM
    timeout: float = 1.0  # CPU seconds per program; HumanEval and MBPP: 3, LeetCode: 10
    workers: int = 0  # sandbox processes, 0: one per core
    bf16: Literal["auto", "on", "off"] = "auto"  # autocast, weights stay float32; auto: on a GPU
    threads: int = 0  # PyTorch CPU threads, 0: PyTorch's choice
    seed: int = 0  # sampling and bootstrap


# -------------------------------------------------------------------------------------- estimates


def pass_at_k(n, c, k):
    """Unbiased estimate of pass@k from n samples of which c pass; ValueError when n < k.

    The plain 1 - (1 - c/n)^k is biased: it draws one sample more than once.
    """
    if n < k:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def bootstrap_mean(values, seed, resamples=10_000):
    """Mean of per-problem values, (P,), with its 95% percentile interval over problems.

    One seed draws the same problems each time. The interval has no width where all values are
    equal: 20 of 20 gives [1, 1].
    """
    values = np.asarray(values, dtype=float)
    shares = np.full(len(values), 1 / len(values))
    # To draw how often each problem comes is to draw problems with replacement.
    counts = np.random.default_rng(seed).multinomial(len(values), shares, size=resamples)
    low, high = np.quantile(counts @ values / len(values), [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def cut_at_stop(text, stop):
    """The text before the first of the stop strings, all of it where there is none.

    A base model has not learned to emit EOS after a function. It goes on with the next one, and an
    unfinished one is a syntax error. Only evaluation cuts: models of the other stages know EOS.
    """
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]


# ------------------------------------------------------------------------------------------- main


def main(cfg):
    started = time.time()
    sandbox.check_numbers(cfg)
    out = Path(cfg.out)
    if sandbox.finished(cfg, out):
        print((out / "table.txt").read_text(encoding="utf-8"))
        return
    device, amp = set_up(cfg)
    benchmarks, encoded, reward_model = read_inputs(cfg)
    results, records, first = [], [], {}

    for path in cfg.policies:
        if path != "canonical":
            tokenizer, prompt_ids = encoded[path]
            policy = None  # the one before makes room
            policy = load_model(AutoModelForCausalLM, path, tokenizer).to(device)
        for benchmark, problems in benchmarks.items():
            # ---- responses: for each problem the greedy one, then the sampled ones
            label = f"{path} on {benchmark}"
            if path == "canonical":
                texts = [problem["solution"] for problem in problems]
                truncated = [False] * len(texts)
            else:
                responses = respond(policy, tokenizer, prompt_ids[benchmark], cfg, amp, label)
                full = [sandbox.decode_response(tokenizer, ids) for ids in responses]
                texts = [cut_at_stop(text, cfg.stop) for text in full]
                truncated = [
                    ids[-1] != tokenizer.eos_token_id and text == cut
                    for ids, text, cut in zip(responses, full, texts)
                ]
            size = len(texts) // len(problems)  # 1 + n
            row_problems = [problem for problem in problems for _ in range(size)]

            # ---- scores and verdicts
            rm_scores = [None] * len(texts)
            if reward_model is not None and path != "canonical":
                prompts = [ids for ids in prompt_ids[benchmark] for _ in range(size)]
                sequences = [prompt + ids for prompt, ids in zip(prompts, responses)]
                with amp:
                    rm_scores = score_responses(
                        reward_model.to(device), sequences, cfg.score_batch_size, "scoring"
                    ).tolist()
            limits = {"timeout": cfg.timeout, "workers": cfg.workers}
            verdicts = sandbox.run_tests(row_problems, texts, **limits, progress="testing")
            records += [
                sandbox.sample_record(
                    problem,
                    texts[k],
                    verdicts[k],
                    rm_score=rm_scores[k],
                    truncated=truncated[k],
                    policy=path,
                    benchmark=benchmark,
                    greedy=k % size == 0,
                )
                for k, problem in enumerate(row_problems)
            ]

            # ---- estimates over problems
            passed = np.array([v.passed for v in verdicts]).reshape(len(problems), size)
            columns = {"greedy pass@1": passed[:, 0].astype(float)}
            for k in cfg.ks if size > 1 else []:
                counts = passed[:, 1:].sum(1).tolist()
                columns[f"pass@{k}"] = np.array([pass_at_k(size - 1, c, k) for c in counts])
            if rm_scores[0] is not None:  # of the sampled responses, or else of the greedy one
                by_problem = np.array(rm_scores).reshape(len(problems), size)
                columns["rm_score"] = by_problem[:, -cfg.samples :].mean(1)
            row = {"policy": path, "benchmark": benchmark, "problems": len(problems)}
            row |= {name: bootstrap_mean(values, cfg.seed) for name, values in columns.items()}
            # Hard problems are hard for both, so a difference is known better than its two terms.
            base = first.setdefault(benchmark, columns)
            row["gain"] = {
                name: bootstrap_mean(values - base[name], cfg.seed)
                for name, values in columns.items()
                if base is not columns and name in base
            }
            results.append(row)
            mean = row["greedy pass@1"]["mean"]
            print(f"{label}: greedy pass@1 {mean:.3f}, {time.time() - started:.0f} s", flush=True)

    # ---- save: the folder gets its name when all is in it
    table = "\n".join(results_table(results, benchmark, cfg) for benchmark in benchmarks)
    print("\n" + table)
    part = Path(f"{out}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    sandbox.write_jsonl(part / "samples.jsonl", records)
    (part / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (part / "table.txt").write_text(table, encoding="utf-8")
    sandbox.save_config(cfg, part)
    part.replace(out)
    print(f"saved {out} after {time.time() - started:.0f} s")


# ----------------------------------------------------------------------------------------- inputs


def read_inputs(cfg):
    """Check everything, so that what is wrong with the last policy is said before the first runs.

    Returns: {file: problems}, {policy: (tokenizer, {file: prompt ids})}, reward model or None.
    """
    if not cfg.policies or not cfg.problems or "" in cfg.stop:
        sandbox.fail("--policies and --problems need a name, --stop no empty string")
    for k in cfg.ks if cfg.samples else []:
        if not 1 <= k <= cfg.samples:
            sandbox.fail(f"pass@{k} needs 1 to --samples {cfg.samples} samples; change --ks")
    if cfg.stop and cfg.reward_model:
        sandbox.fail("--reward_model scores whole responses; leave out --stop, which cuts them")
    benchmarks = {path: sandbox.read_problems(path) for path in cfg.problems}
    encoded, reward_model = {}, None
    for policy in cfg.policies:
        if policy == "canonical":
            for problem in sum(benchmarks.values(), []):
                if not isinstance(problem.get("solution"), str):
                    sandbox.fail(f"{problem['task_id']} has no solution; leave out canonical")
            continue
        tokenizer = sandbox.load_tokenizer(policy, cfg.plain, policy=True)
        config = AutoConfig.from_pretrained(policy)
        prompt_ids = {
            path: sandbox.encode_prompts(tokenizer, problems, cfg.max_new_tokens, config)
            for path, problems in benchmarks.items()
        }
        encoded[policy] = tokenizer, prompt_ids
        if cfg.reward_model:
            reward_model = load_reward_model(cfg.reward_model, tokenizer)
    return benchmarks, encoded, reward_model


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


def load_reward_model(path, tokenizer):
    """The reward model of stage 2, refused where it reads other tokens than the policy writes."""
    other = sandbox.load_tokenizer(path)
    theirs, ours = (sandbox.encode_prompt(t, "QUESTION") for t in (other, tokenizer))
    if other.get_vocab() != tokenizer.get_vocab() or theirs != ours:
        sandbox.fail(f"the tokenizer of {path} is not the policy's; train the RM from this policy")
    model = load_model(AutoModelForSequenceClassification, path, tokenizer)
    unit = [getattr(model.config, name, None) for name in ("reward_mean", "reward_std")]
    if not (all(isinstance(x, (int, float)) and math.isfinite(x) for x in unit) and unit[1] > 0):
        sandbox.fail(f"{path}: reward_mean and reward_std are {unit}; train it with stage 2")
    return model


# ----------------------------------------------------------------------------- generate and score


def respond(policy, tokenizer, prompts, cfg, amp, label):
    """Token ids of 1 + n responses to each prompt, in order of prompt: greedy, then sampled."""
    torch.manual_seed(cfg.seed)
    with amp:
        greedy, _ = generate(policy, tokenizer, prompts, 1, 0.0, cfg, f"{label}, greedy")
        sampled = []
        if cfg.samples:
            sampled, _ = generate(
                policy, tokenizer, prompts, cfg.samples, cfg.temperature, cfg, f"{label}, sampled"
            )
    groups = [
        [first, *sampled[i * cfg.samples : (i + 1) * cfg.samples]] for i, first in enumerate(greedy)
    ]
    return [ids for group in groups for ids in group]


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


def token_scores(model, input_ids, attention_mask):
    """The reward model's output after each token -> (B, L) float32; the RM's score is the last.

    The head is computed in float32 under autocast, too: in bf16, rewards between 2 and 4 are
    multiples of 1/64, and responses would tie.
    """
    hidden = model.get_decoder()(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
    ).last_hidden_state
    with torch.autocast(hidden.device.type, enabled=False):
        return model.score(hidden.float())[..., 0]


@torch.no_grad()
def score_responses(reward_model, sequences, batch_size, progress=None):
    """The RM's own output for each sequence of prompt ids + response ids -> (B,) on the CPU.

    Equal sequences are scored once: from two batches they would get scores that differ by
    rounding, and the filter would rank them by it.
    """
    scores = {}
    unique = sorted({tuple(ids) for ids in sequences}, key=len)
    with sandbox.progress_bar(len(unique), progress) as bar:
        for start in range(0, len(unique), batch_size):
            part = unique[start : start + batch_size]
            batch = make_batch([[]] * len(part), part)
            inputs = [batch[k].to(reward_model.device) for k in ("input_ids", "attention_mask")]
            for ids, row in zip(part, token_scores(reward_model, *inputs).tolist()):
                scores[ids] = row[len(ids) - 1]
            bar.update(len(part))
    return torch.tensor([scores[tuple(ids)] for ids in sequences])


# ----------------------------------------------------------------------------------------- report


def results_table(results, benchmark, cfg):
    """The text of one benchmark's table: a row per policy, and its gain over the first one."""
    rows = [row for row in results if row["benchmark"] == benchmark]
    names = list(dict.fromkeys(n for row in rows for n in row if isinstance(row[n], dict)))
    names.remove("gain")
    width = max(len(row["policy"]) for row in rows) + 2

    def line(head, cells):
        return head.ljust(width) + "".join(f"{cell:>26}" for cell in cells)

    def cell(value, sign):
        if value is None:
            return "-"
        return "{mean:{s}.3f} [{low:{s}.3f}, {high:{s}.3f}]".format(s=sign, **value)

    lines = [
        f"{benchmark}, {rows[0]['problems']} problems, {cfg.samples} samples at temperature "
        f"{cfg.temperature}; 95% intervals",
        line("policy", names),
        *[line(row["policy"], [cell(row.get(n), "") for n in names]) for row in rows],
    ]
    if len(rows) > 1:
        lines.append(f"minus {rows[0]['policy']}, paired by problem:")
        lines += [
            line(row["policy"], [cell(row["gain"].get(n), "+") for n in names]) for row in rows[1:]
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
