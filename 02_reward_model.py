"""Stage 2, the reward model (RM): learn from tested responses to tell passing from failing code.

The SFT policy writes five responses to each prompt, and unit tests label them. A copy of the policy
with a scalar head learns from (passing, failing) pairs of the same prompt by the Bradley-Terry loss
(paper, section 4):

    L = -log sigmoid(r(x, chosen) - r(x, rejected))

The paper takes one pair per prompt, the one with the largest edit distance (--pairs edit). By
default up to four random pairs per prompt are taken, from the same tested responses.

The policy also answers the validation problems, ten times each. Their rewards show what the RM is
worth on problems it has not seen: pair accuracy here, R2 of every filter in stage 3. Their mean and
standard deviation are the unit of the reward in later stages.

Reads data/tiny/rm.jsonl, data/tiny/validation.jsonl, out/sft.

Writes out/rm/: an ordinary Hugging Face folder (AutoModelForSequenceClassification, one label;
reward_mean and reward_std in its config), accuracy.json, and records of what was sampled:

samples.jsonl, validation_samples.jsonl:
{"task_id": "tiny/rm/0", "prompt": "...", "response": "...", "rm_score": 0.31, "actual_score": 0.0,
"passed_tests": 2, "total_tests": 6, "status": "failed", ...}

pairs.jsonl:
{"task_id": "tiny/rm/0", "prompt": "...", "chosen": "...", "rejected": "...", "edit_distance": 3}

While the stage runs, the folder holds the tested samples and state.pt for --resume instead.

Run: python 02_reward_model.py

Simplified against the paper (7k prompts, learning rate 1e-5): fewer and smaller programs.
"""

import copy
import json
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import tyro
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.optimization import get_cosine_schedule_with_warmup

import sandbox

SAMPLE_FILES = ("samples.jsonl", "validation_samples.jsonl")


@dataclass
class Config:
    data: str = "data/tiny/rm.jsonl"  # problems whose responses make the pairs, JSONL
    validation: str = "data/tiny/validation.jsonl"  # problems that measure the RM
    policy: str = "out/sft"  # SFT model: writes the responses; the RM starts from its weights
    out: str = "out/rm"  # folder for the reward model, its samples and pairs
    pairs: Literal["all", "edit"] = "all"  # up to four random pairs per prompt; or the paper's one
    max_pairs: int = 0  # train on that many random pairs: a worse RM, to study filters; 0: all
    label_noise: float = 0.0  # share of the pairs that are swapped, for the same purpose
    responses_per_prompt: int = 5  # responses to each problem of --data; paper: 5
    r2_responses: int = 10  # responses to each validation problem; paper: 10 (for R2)
    temperature: float = 1.0  # divides the logits of the sampler; not given in the paper
    max_new_tokens: int = 96  # longest response, tokens; authors' scripts: 2048
    epochs: int = 3  # passes over the pairs; paper: 1 (authors' scripts: 2), with many more pairs
    batch_size: int = 32  # pairs per optimiser step; authors' scripts: 64
    micro_batch_size: int = 32  # pairs per forward and backward pass; changes memory only
    lr: float = 5e-4  # peak learning rate of AdamW; paper: 1e-5 (6.7B parameters)
    warmup: float = 0.05  # share of the steps in which the learning rate rises; a cosine follows
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    log_every: int = 50  # steps between two lines of the log, each of which saves state.pt
    resume: bool = False  # go on from the last state.pt; tested responses are not sampled again
    generate_batch_size: int = 256  # responses generated at once
    score_batch_size: int = 64  # responses per forward pass where nothing is learned
    timeout: float = 1.0  # CPU seconds per program
    workers: int = 0  # sandbox processes, 0: one per core
    gradient_checkpointing: bool = False  # recompute activations: less memory, a third more time
    bf16: Literal["auto", "on", "off"] = "auto"  # autocast over float32 weights; auto: on a GPU
    lora_rank: int = 0  # train LoRA adapters of this rank (needs peft); 0: train all weights
    threads: int = 0  # PyTorch CPU threads, 0: PyTorch's choice
    seed: int = 0  # sampling, pairs, order of the batches, the head's first weights


# --------------------------------------------------------------------------- the loss, the pairs


def pairwise_loss(chosen_scores, rejected_scores):
    """Bradley-Terry loss, mean over pairs; both (B,). It is log 2 where the RM knows nothing."""
    return -F.logsigmoid(chosen_scores - rejected_scores).mean()


def edit_distance(a, b):
    """Levenshtein distance: characters inserted, deleted or replaced, each at cost 1.

    One row of the table at a time: d[j] is the distance to b[:j]. A new row is the minimum of
    replace or keep, delete, and insert. The last depends on its left neighbour in the same row:
    d[j] = min over k <= j of (c[k] + j - k), which is a running minimum of c[k] - k.
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


def all_pairs(responses, passed):
    """(index of passing, index of failing) pairs of one prompt; equal texts count once."""
    first = {}  # text -> its first index
    for i, response in enumerate(responses):
        first.setdefault(response, i)
    return [(i, j) for i in first.values() if passed[i] for j in first.values() if not passed[j]]


def pick_pair(responses, passed):
    """The paper's pair: the passing and the failing response that differ most by edit distance.

    Args: responses: texts of one prompt; passed: list of bool.
    Returns: (index of chosen, index of rejected), the first of equals; None where all pass or fail.
    """
    pairs = all_pairs(responses, passed)
    return max(pairs, key=lambda p: edit_distance(responses[p[0]], responses[p[1]]), default=None)


def clustered_interval(values, prompts, rng, resamples=1000):
    """95% bootstrap interval of the mean of `values`, drawing whole prompts.

    Pairs of one prompt share responses, so they are not independent.
    """
    _, place = np.unique(prompts, return_inverse=True)
    sums, sizes = np.bincount(place, values), np.bincount(place)
    draws = rng.integers(len(sums), size=(resamples, len(sums)))
    low, high = np.quantile(sums[draws].sum(1) / sizes[draws].sum(1), [0.025, 0.975])
    return float(low), float(high)


# ------------------------------------------------------------------------------------------- main


def main(cfg):
    started = time.time()
    sandbox.check_numbers(cfg)
    if min(cfg.responses_per_prompt, cfg.r2_responses) < 2:
        sandbox.fail("--responses_per_prompt and --r2_responses: a pair takes at least 2")
    out = Path(cfg.out)
    if sandbox.finished(cfg, out, cfg.resume):
        return
    problems, validation = sandbox.read_problems(cfg.data), sandbox.read_problems(cfg.validation)
    device, amp = set_up(cfg)
    rng = random.Random(cfg.seed)

    # ---- the RM is the SFT policy with a new scalar head
    tokenizer = sandbox.load_tokenizer(cfg.policy, policy=True)
    reward_model = load_model(
        AutoModelForSequenceClassification, cfg.policy, tokenizer, num_labels=1
    )
    if cfg.gradient_checkpointing:
        reward_model.activation_checkpointing_enable()
    if cfg.lora_rank:
        reward_model = add_adapters(reward_model, cfg.lora_rank, "SEQ_CLS")

    # ---- sample responses of the SFT policy, run the tests
    if out.exists():  # an interrupted run has done it
        groups = [sandbox.read_jsonl(out / f"state_{name}", {"ids": list}) for name in SAMPLE_FILES]
    else:
        policy = load_model(AutoModelForCausalLM, cfg.policy, tokenizer).to(device)
        room = cfg.max_new_tokens, policy.config
        prompt_ids = sandbox.encode_prompts(tokenizer, problems, *room)
        validation_ids = sandbox.encode_prompts(tokenizer, validation, *room)
        jobs = [
            (problems, prompt_ids, cfg.responses_per_prompt),
            (validation, validation_ids, cfg.r2_responses),
        ]
        groups = [sample_and_test(policy, tokenizer, *job, cfg, amp) for job in jobs]
        del policy
    samples, validation_samples = groups

    # ---- pairs
    pairs = choose_pairs(samples, cfg, rng)
    validation_pairs = [
        (a, b)
        for group in by_prompt(validation_samples)
        for a in group
        for b in group
        if a["actual_score"] > b["actual_score"]
    ]
    if not pairs or not validation_pairs:
        sandbox.fail(
            f"{len(pairs)} pairs from {cfg.data}, {len(validation_pairs)} from {cfg.validation}; a "
            "pair is a passing and a failing response: give other problems or another policy"
        )

    # ---- optimiser, start or resume. Pairs and batches follow from samples and seed, so that
    # samples, weights, optimiser and schedule are the whole state.
    reward_model.to(device).train()
    optimizer = torch.optim.AdamW(
        reward_model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    lengths = [max(len(chosen["ids"]), len(rejected["ids"])) for chosen, rejected in pairs]
    batches = []
    for _ in range(cfg.epochs):
        batches += length_grouped_batches(lengths, cfg.batch_size, rng)
    steps = len(batches)
    scheduler = get_cosine_schedule_with_warmup(optimizer, round(cfg.warmup * steps), steps)
    parts = {"reward_model": reward_model, "optimizer": optimizer, "scheduler": scheduler}
    done, losses, hits = 0, [], []
    if out.exists():
        done = load_state(out, parts)["step"]
        print(f"resuming {out} after step {done} of {steps}")
    else:
        start = Path(f"{out}.tmp")
        shutil.rmtree(start, ignore_errors=True)
        start.mkdir(parents=True)
        for name, group in zip(SAMPLE_FILES, groups):
            sandbox.write_jsonl(start / f"state_{name}", group)
        save_state(cfg, out, parts, step=0)

    # ---- train
    with sandbox.progress_bar(steps, "training") as bar:
        bar.update(done)
        for step in range(done + 1, steps + 1):
            batch = [pairs[k] for k in batches[step - 1]]
            step_loss = 0.0
            for start in range(0, len(batch), cfg.micro_batch_size):
                part = batch[start : start + cfg.micro_batch_size]
                sequences = [a["ids"] for a, _ in part] + [b["ids"] for _, b in part]
                with amp:
                    chosen, rejected = last_scores(reward_model, sequences).chunk(2)  # (B,) each
                loss = pairwise_loss(chosen, rejected) * len(part) / len(batch)
                loss.backward()
                step_loss += loss.item()
                hits += (chosen > rejected).tolist()
            torch.nn.utils.clip_grad_norm_(
                reward_model.parameters(), cfg.max_grad_norm, error_if_nonfinite=True
            )
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(step_loss)
            bar.update()
            if step % cfg.log_every == 0 or step == steps:
                save_state(cfg, out, parts, step=step)
                bar.clear()
                print(
                    f"step {step}/{steps}  loss {sum(losses) / len(losses):.3f}  "
                    f"training accuracy {sum(hits) / len(hits):.3f}  {time.time() - started:.0f} s",
                    flush=True,
                )
                losses, hits = [], []

    # ---- score every response. The unit of the reward comes from validation problems: on training
    # prompts the rewards are stretched by what was memorised.
    everything = samples + validation_samples
    with amp:
        sequences = [sample.pop("ids") for sample in everything]
        scores = score_responses(reward_model, sequences, cfg.score_batch_size, "scoring")
    for sample, score in zip(everything, scores.tolist()):
        sample["rm_score"] = score
    heldout = scores[len(samples) :]
    if not heldout.std() > 0:
        sandbox.fail("the reward model gives every validation response one score; change --lr")
    config = reward_model.config
    config.reward_mean, config.reward_std = heldout.mean().item(), heldout.std().item()
    accuracy = pair_accuracy(validation_pairs, cfg.seed)
    print_report(accuracy, validation_samples)

    # ---- save
    save_model(reward_model, tokenizer, out)
    for name, group in zip(SAMPLE_FILES, groups):
        sandbox.write_jsonl(out / name, group)
    sandbox.write_jsonl(out / "pairs.jsonl", map(pair_record, pairs))
    (out / "accuracy.json").write_text(json.dumps(accuracy, indent=2) + "\n", encoding="utf-8")
    sandbox.save_config(cfg, out)
    print(f"saved {out} after {time.time() - started:.0f} s")


# ------------------------------------------------------------------------ settings, state, models


def load_state(out, parts):
    """Put back what `save_state` has written -> the state, with the progress in it."""
    state = torch.load(out / "state.pt", map_location="cpu", mmap=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state


def save_state(cfg, out, parts, **progress):
    """Write state.pt, from which --resume goes on; with the first one <out>.tmp becomes <out>.

    Args: parts: {name: model, optimizer or scheduler}.
    """
    folder = out if out.exists() else Path(f"{out}.tmp")
    folder.mkdir(parents=True, exist_ok=True)
    state = progress | {name: part.state_dict() for name, part in parts.items()}
    torch.save(state, folder / "state.tmp")
    (folder / "state.tmp").replace(folder / "state.pt")
    sandbox.save_config(cfg, folder, "state_config.json")
    folder.replace(out)


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


# -------------------------------------------------------------------- sampled and tested responses


def sample_and_test(policy, tokenizer, problems, prompts, repeats, cfg, amp):
    """`repeats` tested responses to each problem -> samples, in order of problem.

    Until the end a sample has `ids`, the tokens of prompt and response: from the text, the
    tokenizer might make other tokens than the policy has sampled.
    """
    with amp:
        responses, _ = generate(
            policy, tokenizer, prompts, repeats, cfg.temperature, cfg, "sampling"
        )
    texts = [sandbox.decode_response(tokenizer, ids) for ids in responses]
    rows = [k for k in range(len(problems)) for _ in range(repeats)]
    row_problems = [problems[k] for k in rows]
    limits = {"timeout": cfg.timeout, "workers": cfg.workers, "progress": "testing"}
    results = sandbox.run_tests(row_problems, texts, **limits)
    samples = []
    for k, ids, text, result in zip(rows, responses, texts, results):
        sample = sandbox.sample_record(problems[k], text, result, rm_score=None, policy=cfg.policy)
        sample |= {"truncated": ids[-1] != tokenizer.eos_token_id, "ids": prompts[k] + ids}
        samples.append(sample)
    mixed = sum(len({s["actual_score"] for s in group}) == 2 for group in by_prompt(samples))
    rate = sum(sample["actual_score"] for sample in samples) / len(samples)
    print(
        f"{len(samples)} responses: pass rate {rate:.3f}, mixed outcomes for {mixed} of "
        f"{len(problems)} problems",
        flush=True,
    )
    return samples


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


# ----------------------------------------------------------------------------------------- pairs


def by_prompt(samples):
    """The samples of each prompt, list of lists in order."""
    groups = {}
    for sample in samples:
        groups.setdefault(sample["task_id"], []).append(sample)
    return list(groups.values())


def choose_pairs(samples, cfg, rng):
    """The (chosen, rejected) samples to train on."""
    pairs = []
    groups = by_prompt(samples)
    with sandbox.progress_bar(len(groups), "pairing") as bar:
        for group in groups:
            responses = [sample["response"] for sample in group]
            passed = [sample["actual_score"] == 1.0 for sample in group]
            if cfg.pairs == "edit":
                best = pick_pair(responses, passed)
                chosen = [best] if best else []
            else:
                candidates = all_pairs(responses, passed)
                chosen = rng.sample(candidates, min(4, len(candidates)))
            pairs += [(group[i], group[j]) for i, j in chosen]
            bar.update()
    if cfg.max_pairs:
        pairs = rng.sample(pairs, min(cfg.max_pairs, len(pairs)))
    return [(b, a) if rng.random() < cfg.label_noise else (a, b) for a, b in pairs]


def pair_record(pair):
    """A pair as it is saved."""
    chosen, rejected = pair
    return {
        "task_id": chosen["task_id"],
        "prompt": chosen["prompt"],
        "chosen": chosen["response"],
        "rejected": rejected["response"],
        "edit_distance": edit_distance(chosen["response"], rejected["response"]),
    }


def length_grouped_batches(lengths, batch_size, rng):
    """Indices in random batches of similar length, so that little is computed on padding.

    Only random windows of 16 batches are sorted: sorted as a whole, every epoch would show the
    same neighbours.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    window = 16 * batch_size
    batches = []
    for start in range(0, len(order), window):
        chunk = sorted(order[start : start + window], key=lambda i: lengths[i])
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    rng.shuffle(batches)
    return batches


# ------------------------------------------------------------------------------ scores and report


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


def last_scores(reward_model, sequences):
    """The RM's output at the last token of each sequence, with gradients -> (B,)."""
    batch = make_batch([[]] * len(sequences), sequences)
    inputs = (batch[name].to(reward_model.device) for name in ("input_ids", "attention_mask"))
    scores = token_scores(reward_model, *inputs)  # (B, L)
    return torch.stack([row[len(ids) - 1] for row, ids in zip(scores, sequences)])


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


def pair_accuracy(pairs, seed):
    """Share of pairs in which the passing response has the higher reward, with its 95% interval.

    Beside it the share that 'the shorter is better' gets right: an RM may have learned only that.
    A tie counts half.
    """
    rewards = [a["rm_score"] - b["rm_score"] for a, b in pairs]
    lengths = [len(b["response"]) - len(a["response"]) for a, b in pairs]
    rewards, lengths = 0.5 + 0.5 * np.sign([rewards, lengths])  # 1, 0.5 or 0
    prompts = [a["task_id"] for a, _ in pairs]
    low, high = clustered_interval(rewards, prompts, np.random.default_rng(seed))
    return {
        "pairs": len(pairs),
        "prompts": len(set(prompts)),
        "accuracy": rewards.mean(),
        "low": low,
        "high": high,
        "shorter_is_better": lengths.mean(),
    }


def print_report(accuracy, samples):
    """Accuracy, and the pass rate in each tenth of the validation responses by reward."""
    print(
        "{accuracy:.3f} [{low:.3f}, {high:.3f}] of {pairs} pairs of {prompts} validation problems "
        "in the right order; 'the shorter is better' {shorter_is_better:.3f}".format(**accuracy)
    )
    ranked = sorted(samples, key=lambda sample: sample["rm_score"])
    tenths = np.array_split([sample["actual_score"] for sample in ranked], 10)
    print("pass rate by tenth of the reward:", *(f"{tenth.mean():.2f}" for tenth in tenths))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
