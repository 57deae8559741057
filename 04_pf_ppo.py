"""Stage 4, PF-PPO: PPO that learns only from the responses whose reward can be trusted.

Each iteration samples N responses for each of n prompts, scores them with the reward model (RM), keeps a subset of every
prompt's responses (the filter), and makes a PPO update of policy and critic on what was kept (paper, algorithm 1):

    generate -> score -> filter -> KL and GAE -> PPO epochs -> log -> save

    filter    rank y_1..y_N by reward within one prompt; BoN keeps the best, BR the best and one other at random, BW the
              best and the worst; `none` is PPO-M, `single` PPO-S (one response for each of 5n prompts), and `random2` the
              control of BR's and BW's size: without it nobody can tell the filter from the smaller batch
    reward    r_t = -kl_coef * (log pi(y_t) - log pi_ref(y_t)),  plus the normalised RM score at the last token
              (less `truncation_penalty` where the response has no EOS; the filter ranks by this score, too)
    GAE       delta_t = r_t + gamma V_{t+1} - V_t,   A_t = sum_k (gamma lam)^k delta_{t+k},   returns = A + V
    policy    L = mean max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)),   ratio = pi / pi_old
    critic    L = mean 1/2 max((V - R)^2, (clip(V, V_old +- eps) - R)^2)

Reads   data/tiny/ppo.jsonl, data/tiny/validation.jsonl, out/sft, out/rm
Writes  out/ppo_<strategy>/best, last    ordinary Hugging Face folders: best by validation pass@1, and after the last iteration
                           metrics.jsonl {"iteration": 1, "rm_score": 0.1, "pass_rate": 0.31, "kl_per_token": 0.0, ...}
                           rollouts/     0001.jsonl ...: every response of an iteration, its reward, verdict, whether it was kept
                           curves.png    reward and true pass rate side by side
                           state.pt      all that --resume needs

Run     python 04_pf_ppo.py --strategy bw
        torchrun --nproc_per_node=2 04_pf_ppo.py --strategy bw      the same work shared by two GPUs (--shard: models split, too)
        python 04_pf_ppo.py --policy out/sft-7b --reward_model out/rm-7b --lora_rank 16 --plan --card_gb 80    what it needs

To read it: the maths and the filter come first, `main` at the end is the loop above, and between them stand the parts that
it calls, in the order of an iteration. The sections on large models and on several processes can wait.

Simplified against the paper (section 4): the tiny setting makes one pass over each minibatch (paper: each response is used
three times on average), has larger learning rates (a model of 0.9M parameters), a larger KL coefficient (with 0.03
this small model's programs get worse while the reward rises: README), and rewards its policy for the RM score alone (and for ending: --truncation_penalty).
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import inspect
import itertools
import json
import math
import os
import random
import re
import resource
import runpy
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
import transformers
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification, AutoTokenizer, Cache, DynamicLayer)
from transformers.pytorch_utils import Conv1D

import sandbox

PROBLEM_FIELDS = {"task_id": str, "prompt": str, "prefix": str, "setup": str, "entry_point": (str, type(None)), "tests": list}
# What a resumed run may change, after an out-of-memory error, say: it bears on memory, speed or where to stop (and
# generate_batch_size on the order of random numbers).
RESUME_MAY_CHANGE = {"resume", "micro_batch_size", "score_batch_size", "generate_batch_size", "gradient_checkpointing",
                     "shard", "workers", "threads", "max_kl", "state_every"}

STRATEGIES = ("none", "random2", "bon", "br", "bw", "top", "top_random", "top_bottom", "pow_1", "pow_2", "pow_3")


@dataclass
class Config:
    strategy: typing.Literal["none", "single", "bon", "br", "bw", "random2", "top", "top_random", "top_bottom", "pow_1",
                             "pow_2", "pow_3", "auto", "learned"] = "bw"  # the filter; paper: br or bw
    data: str = "data/tiny/ppo.jsonl"  # problems to train on, JSONL
    validation: str = "data/tiny/validation.jsonl"  # problems that choose the best checkpoint; never the test problems
    policy: str = "out/sft"  # the SFT model: the policy starts from it and is held near it
    reward_model: str = "out/rm"  # the RM; the critic starts from it
    out: str = ""  # output folder; empty: out/ppo_<strategy>
    iterations: int = 25  # rounds of generate, filter, update; paper: 5 passes over 3k prompts
    prompts_per_iteration: int = 48  # n; authors' scripts: 1024 rollouts
    responses_per_prompt: int = 5  # N, responses sampled for each prompt; paper: 5
    top: float = 0.5  # top*: rewards above are kept, in standard deviations of the RM's reward; not given in the paper
    bottom: float = -0.5  # top_bottom: rewards below are kept too
    r2: typing.Literal["pooled", "within"] = "pooled"  # auto, learned: the R2 that chooses the filter; paper: pooled
    r2_every: int = 5  # auto, learned: iterations after which R2 is measured anew and the filter may change
    r2_prompts: int = 100  # auto, learned: validation problems that it is measured on, N more responses each
    bins: int = 10  # auto, learned: groups of equal count, as in 03; not given in the paper
    min_kept: int = 2  # learned: the least number of ranks that a filter keeps
    temperature: float = 1.0  # sampling temperature; it divides the logits in rollout, update and reference alike
    max_new_tokens: int = 96  # longest response, tokens; authors' scripts: 2048
    truncation_penalty: float = 1.0  # taken off the normalised score of a response without EOS; not given in the paper
    epochs: int = 1  # passes over the kept responses of an iteration; paper: 3 on average
    minibatch_size: int = 48  # responses per optimiser step; authors' scripts: 256
    micro_batch_size: int = 48  # responses per forward pass; smaller needs less memory and changes nothing else
    lr: float = 1e-4  # policy learning rate (AdamW, constant); paper: 5e-7 (a 6.7B model)
    critic_lr: float = 5e-4  # critic learning rate; paper: 9e-6
    critic_warmup: int = 2  # iterations in which only the critic learns: the policy should not follow a blind one
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm, over all parameters of a model
    advantage: typing.Literal["gae", "rloo", "grpo"] = "gae"  # gae: with a critic; the others compare a prompt's responses
    gamma: float = 1.0  # discount per token; authors' scripts: 1
    lam: float = 0.95  # GAE lambda; authors' scripts: 0.95
    clip: float = 0.2  # the ratio's trust region, 1 +- clip; authors' scripts: 0.2
    value_clip: float = 0.2  # the same for values, in standard deviations of the reward
    kl_coef: float = 0.3  # weight of the per-token KL penalty, reward per nat; authors' scripts: 0.01
    kl_control: typing.Literal["fixed", "adaptive"] = "fixed"  # adaptive: kl_coef follows kl_target
    kl_target: float = 1.0  # adaptive: the KL from the reference to aim at, nats per response
    kl_horizon: int = 1000  # adaptive: responses in which kl_coef changes by at most a fifth
    max_kl: float = 100.0  # nats per response; more stops the run. The over-optimised run of the README reaches 6, broken ones 600
    whiten_before_filter: bool = False  # the wrong order, for comparison: with bon all advantages come out positive
    critic_rows: typing.Literal["kept", "all"] = "kept"  # what the critic trains on; paper: the kept responses
    eval_every: int = 5  # iterations between two validations (greedy pass@1); the last iteration always has one
    save_every: int = 0  # also keep the policy of every so many iterations as out/iteration_<i>; 0: none
    state_every: int = 1  # iterations between two saves of state.pt, 12 bytes for each parameter that learns
    resume: bool = False  # go on from the last saved iteration of an interrupted run
    generate_batch_size: int = 256  # responses generated at once
    score_batch_size: int = 64  # responses scored, or passed through frozen models, at once
    timeout: float = 1.0  # CPU seconds a program may take over its tests
    workers: int = 1  # sandbox processes, 0 = one a core; they run while policy and critic train
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    dtype: typing.Literal["float32", "bfloat16"] = "float32"  # weights that learn; a GPU multiplies in bf16 either way
    lora_rank: int = 0  # learn adapters of this rank (peft) and hold two models instead of four; 0: learn all weights
    logits_mb: int = 512  # logits that take more than this in float32, MB, are computed in parts; 0: always at once
    plan: bool = False  # print what these flags need in memory, from the models' configs alone, and stop
    card_gb: float = 0.0  # --plan: memory of the GPU to plan for, GB; 0: the one that is there, or this machine without
    prompt_tokens: int = 512  # --plan: tokens of the longest prompt; authors' scripts: 1024
    shard: bool = False  # under torchrun: split weights and optimiser state over the processes (FSDP2), not the batch alone
    threads: int = 0  # PyTorch CPU threads, 0 = PyTorch's choice
    seed: int = 0  # random seed: order of the prompts, sampling, filter, minibatches


# -------------------------------------------------------------------------------------------- the maths, pure functions


def masked_mean(x, mask):
    """Mean of x over the positions where mask is 1; both of one shape. 0 where the mask is empty."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def whiten(x, mask, shift_mean=True):
    """x with variance 1 over the masked positions, and mean 0 (or its old mean: shift_mean=False); 0 elsewhere."""
    mean = masked_mean(x, mask)
    centred = x - mean
    whitened = centred * torch.rsqrt(masked_mean(centred**2, mask) + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


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


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """Reward of each token: the KL penalty everywhere, and the score on the last token (its EOS, where there is one).

    The penalty is the estimator k1 = log pi(y_t) - log pi_ref(y_t), positive when the policy gives the token more
    probability than the reference; its mean over samples is the KL divergence.

    Args: scores: (B,); logprobs, ref_logprobs: (B, T); mask: (B, T), 1 on response tokens. Returns: (B, T).
    """
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    # The last token is found from the mask, so a truncated response keeps its own last token: no EOS is made up.
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)  # (B,)
    ends = torch.zeros_like(rewards).scatter(1, last[:, None], scores[:, None].to(rewards.dtype))
    return rewards + ends * mask


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, equation 16).

    Args:
        rewards, mask: (B, T), padded on the right.
        values: (B, T), `values[:, t]` predicted before token t is seen; after the last token the value is 0.
    Returns: advantages, returns = advantages + values; both (B, T), 0 on padding.
    """
    advantages = torch.zeros_like(rewards)
    following_advantage = following_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        following_advantage = (delta + gamma * lam * following_advantage) * mask[:, t]
        following_value = values[:, t] * mask[:, t]
        advantages[:, t] = following_advantage
    return advantages, (advantages + values) * mask


def group_advantages(scores, kind):
    """Advantages without a critic: each response against the others of its prompt, over all N, before the filter.

    Args: scores: (P, N), N at least 2. kind: 'rloo', score minus the mean of the other N - 1 (Ahmadian et al. 2024), or
        'grpo', centred and divided by the prompt's standard deviation, 0 where all are equal (Shao et al. 2024).
    Returns: (P, N).
    """
    centred = scores - scores.mean(1, keepdim=True)
    if kind == "rloo":
        return centred * scores.shape[1] / (scores.shape[1] - 1)  # s - (sum - s) / (N - 1)
    if kind == "grpo":
        std = scores.std(1, keepdim=True)
        return torch.where(std > 1e-6, centred / std.clamp(min=1e-6), torch.zeros_like(scores))
    raise ValueError(f"unknown kind {kind!r}")


def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """PPO's clipped surrogate (Schulman et al. 2017, equation 7), mean over masked tokens.

    Args: all (B, T). Returns: scalar loss, {"ratio", "clip_fraction"}: means over masked tokens.
    """
    ratio = ((logprobs - old_logprobs) * mask).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    clipped = ((ratio - 1).abs() > clip).float()
    return masked_mean(loss, mask), {"ratio": masked_mean(ratio.detach(), mask).item(),
                                     "clip_fraction": masked_mean(clipped, mask).item()}


def value_loss(values, old_values, returns, mask, clip):
    """Half the squared error, or that of the values held within `clip` of the old ones, whichever is larger.

    Args: all (B, T). Returns: scalar loss, {"value_clip_fraction"}; means over masked tokens.
    """
    held = torch.clamp(values, old_values - clip, old_values + clip)
    loss = 0.5 * torch.maximum((values - returns) ** 2, (held - returns) ** 2)
    clipped = ((values - old_values).abs() > clip).float()
    return masked_mean(loss, mask), {"value_clip_fraction": masked_mean(clipped, mask).item()}


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns) over masked positions: 1 for a perfect critic, 0 for a constant one."""
    def variance(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    return 1 - variance(returns - values) / variance(returns).clamp(min=1e-8)


def adapt_kl_coef(kl_coef, kl, target, responses, horizon):
    """Adaptive KL control (Ziegler et al. 2019, section 2.2): raise the coefficient when the KL is above its target."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * responses / horizon)


# -------------------------------------------------------------------------- R2, for the strategies that measure it (03)


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


def candidate_filters(strategy, responses_per_prompt, min_kept):
    """The filters that `auto` and `learned` choose from: those of 03, or every set of at least `min_kept` ranks.

    A set of ranks is a weight vector with equal weights on them: `ranks_0_4` of five is BW. BoN (one rank) is what the floor
    keeps out; without one the search would end at single ranks, whose R2 is mostly luck.
    """
    if strategy == "auto":
        return [s for s in STRATEGIES if s != "random2"]  # which has none's R2, measured on fewer responses
    return ["_".join(["ranks", *map(str, kept)]) for size in range(min_kept, responses_per_prompt + 1)
            for kept in itertools.combinations(range(responses_per_prompt), size)]


def best_filter(rm_scores, actual_scores, generator, cfg):
    """The candidate with the highest R2 on (P, N) normalised rewards and actual scores -> its name, {name: R2}."""
    key = "r2" if cfg.r2 == "pooled" else "r2_within"
    table = {name: analyse(rm_scores, actual_scores, name, generator, cfg)[key]
             for name in candidate_filters(cfg.strategy, rm_scores.shape[1], cfg.min_kept)}
    defined = {name: value for name, value in table.items() if not math.isnan(value)}
    if not defined:
        fail("every R2 is undefined: all rewards or all actual scores are equal; check the policy and the reward model")
    return max(defined, key=defined.get), defined


# ------------------------------------------------------------------------------- rollouts in batches, policy and critic


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


def response_values(critic, input_ids, attention_mask, response_length):
    """The critic's value before each of the last `response_length` tokens is seen -> (B, T) float32."""
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    with autocast(input_ids.device):
        values = critic(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                        use_cache=False).logits[..., 0]
    return values[:, -response_length - 1:-1].float()


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


def load_critic(cfg, reward_model, device):
    """The critic: the RM with a value at every token, its head rescaled to the normalised reward that it will predict.

    With LoRA it is adapters and a head on the blocks of the RM itself, which takes its scores with the adapters off.
    """
    if cfg.lora_rank:
        with torch.device("meta"):  # no memory: the blocks are replaced
            critic = AutoModelForTokenClassification.from_config(reward_model.config, dtype=getattr(torch, cfg.dtype))
        setattr(critic, critic.base_model_prefix, reward_model.base_model)
        add_adapters(critic, cfg.lora_rank, getattr(torch, cfg.dtype), cfg.seed)
    else:
        critic = load_model(AutoModelForTokenClassification, cfg.reward_model, device, dtype=getattr(torch, cfg.dtype),
                            num_labels=1)
    head = critic.score if hasattr(critic, "score") else critic.classifier  # GPT-2 calls it classifier
    if cfg.lora_rank:
        head.to_empty(device=device).requires_grad_(True)
    mean, std = reward_model.config.reward_mean, reward_model.config.reward_std
    with torch.no_grad():
        head.weight.copy_(reward_model.score.weight / std)
        head.bias.fill_(-mean / std)
    return float32_head(critic).train()


def train_epoch(model, optimizer, loss_function, batch, rows, cfg, generator, device):
    """One pass over the rows in random minibatches, an optimiser step each -> statistics, means over tokens.

    `loss_function(mb)` returns (mean loss over the micro-batch's tokens, statistics). Each micro-batch counts by its
    share of the minibatch's tokens, so that the micro-batch size changes nothing but the memory.
    """
    lengths = batch["response_mask"].sum(1)
    totals, norms, seen = {}, 0.0, 0
    for minibatch in rows[torch.randperm(len(rows), generator=generator)].split(cfg.minibatch_size):
        minibatch = minibatch[lengths[minibatch].argsort()]  # micro-batches of similar length
        tokens = int(lengths[minibatch].sum())
        for micro_batch, counts in my_micro_batches(minibatch, cfg.micro_batch_size):
            mb = take_rows(batch, micro_batch, device)
            loss, statistics = loss_function(mb)
            share = counts * int(lengths[micro_batch].sum()) / tokens
            (loss * share).backward()
            for name, value in {**statistics, "loss": loss.item()}.items():
                totals[name] = totals.get(name, 0.0) + value * share * tokens
        norm = clip_gradients(model, cfg.max_grad_norm)
        if not math.isfinite(norm):
            raise FloatingPointError("a loss or gradient is not a finite number")
        norms += norm * tokens
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += tokens
    totals = {**dict(zip(totals, add_up(list(totals.values())))), "grad_norm": norms}
    return {name: total / seen for name, total in totals.items()}


def plot_curves(metrics, path, title):
    """Reward and true pass rate of the same rollouts, and KL: over-optimisation is where the first two part."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    steps = [m["iteration"] for m in metrics if m["iteration"]]
    panels = [("rm_score", "RM reward of the rollouts", "in standard deviations, SFT policy = 0", "tab:orange"),
              ("pass_rate", "share of programs that pass their tests", "pass rate", "tab:green"),
              ("kl_per_response", "distance from the SFT policy", "KL, nats per response", "tab:blue")]
    for axis, (name, heading, label, colour) in zip(axes, panels):
        axis.plot(steps, [m[name] for m in metrics if m["iteration"]], color=colour,
                  label="rollouts, sampled" if name == "pass_rate" else None)
        axis.set(title=heading, xlabel="iteration", ylabel=label)
        axis.grid(alpha=0.3)
    checks = [m for m in metrics if "validation_pass_at_1" in m]
    axes[1].plot([m["iteration"] for m in checks], [m["validation_pass_at_1"] for m in checks], "o--", color="tab:green",
                 label="validation problems, greedy")
    axes[1].set_ylim(0, 1)
    axes[1].legend(loc="lower left")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ------------------------------------------------------------- sample, score, test (same name, same code in every file)


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


# ----------------------------------------------------------------------- flags, files, models (same code in every file)


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


# ---------------------------------------------------------- large models: bf16, LoRA, logits in parts (same code in 01)
# At the first reading this section and the next can be left out: without their flags they do nothing.


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


def response_logprobs_in_parts(model, input_ids, attention_mask, response_length, temperature, logits_mb):
    """`response_logprobs`, but logits that would take more than `logits_mb` MB in float32 are computed in parts (0: never)."""
    targets = input_ids[:, -response_length:]
    if not logits_mb or targets.numel() * model.config.vocab_size <= logits_mb * 2**18:  # a float32 has four bytes
        return response_logprobs(model, input_ids, attention_mask, response_length, temperature)
    return target_logprobs(model, targets, attention_mask[:, -response_length:] == 1, temperature, logits_mb,
                           input_ids=input_ids, attention_mask=attention_mask,
                           position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0))


# ---------------------------- several processes, `torchrun --nproc_per_node=K`, share every batch (same code in 01, 02)
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


# ----------------------------------------------------------------------------------------------------------------- main


def rollout_shape(cfg):
    """n prompts and N responses to each of them, for the strategy; flags that do not go together are an error."""
    n, per_prompt = cfg.prompts_per_iteration, cfg.responses_per_prompt
    if cfg.strategy == "single":  # PPO-S: as many responses, each to a prompt of its own
        n, per_prompt = n * per_prompt, 1
    needed = 2 if cfg.strategy in ("br", "bw", "random2", "auto") or cfg.advantage != "gae" else 1
    needed = cfg.min_kept if cfg.strategy == "learned" else needed
    if per_prompt < needed:
        fail(f"--strategy {cfg.strategy} --advantage {cfg.advantage} needs {needed} responses of a prompt, there are "
             f"{per_prompt}; raise --responses_per_prompt or change the strategy")
    if cfg.kl_control == "adaptive" and (cfg.kl_target <= 0 or 5 * cfg.kl_horizon <= n * per_prompt):
        fail(f"--kl_control adaptive needs a --kl_target above 0 and a --kl_horizon above a fifth of the {n * per_prompt} responses "
             "of an iteration: with less, one step could take the coefficient below 0")
    if cfg.advantage != "gae" and cfg.critic_rows == "all":
        fail(f"--advantage {cfg.advantage} has no critic; --critic_rows all is for gae")
    if cfg.advantage == "gae" and cfg.iterations <= cfg.critic_warmup:
        print(f"note: --iterations {cfg.iterations} end within --critic_warmup {cfg.critic_warmup}: the policy does not learn", flush=True)
    if cfg.bins < 2 or min(cfg.min_kept, cfg.r2_every, cfg.r2_prompts, cfg.eval_every, cfg.state_every) < 1:
        fail("--min_kept, --r2_every, --r2_prompts, --eval_every and --state_every must be at least 1, --bins at least 2")
    return n, per_prompt


def load_models(cfg, tokenizer, device):
    """Four models -> {"policy", "critic"}, which learn (no critic without GAE), and two frozen ones, reference and RM.

    With LoRA two are held: the reference is the policy with its adapters off, the critic stands on the blocks of the RM.
    """
    home = torch.device("cpu") if cfg.shard else device  # a sharded model goes to the GPU block by block
    dtype = learning_dtype(cfg)
    policy = load_model(AutoModelForCausalLM, cfg.policy, home, len(tokenizer), dtype, frozen=cfg.lora_rank > 0)
    if cfg.lora_rank:
        policy = reference = add_adapters(policy, cfg.lora_rank, dtype, cfg.seed)
    else:
        reference = load_model(AutoModelForCausalLM, cfg.policy, home, len(tokenizer), dtype, frozen=True).eval()
    reward_model = load_model(AutoModelForSequenceClassification, cfg.reward_model, home, dtype=dtype, frozen=True)
    reward_model = float32_head(reward_model).eval()
    if not hasattr(reward_model.config, "reward_mean") or not hasattr(reward_model.config, "reward_std"):
        fail(f"{cfg.reward_model} has no reward_mean and reward_std in its config; train it with 02_reward_model.py")
    models = {"policy": policy.train()}
    if cfg.advantage == "gae":
        models["critic"] = load_critic(cfg, reward_model, home)
    if cfg.gradient_checkpointing:
        for model in models.values():
            model.activation_checkpointing_enable()
    if cfg.shard:
        for model in (reference, reward_model, *models.values()):
            shard(model, device)
    return models, reference, reward_model


def main(cfg):
    if cfg.plan:  # a tool beside this file, and no part of training
        tool = Path(__file__).parent / "tools/plan.py"
        if not tool.is_file():
            fail("--plan needs tools/plan.py beside this script, and it is not there; copy it, too")
        if cfg.card_gb < 0 or cfg.prompt_tokens < 1:
            fail(f"--card_gb {cfg.card_gb:g} --prompt_tokens {cfg.prompt_tokens}: a card has more than 0 GB, a prompt at least 1 token")
        return runpy.run_path(tool)["print_plan"](sys.modules[__name__], cfg)
    started = time.time()
    n, per_prompt = rollout_shape(cfg)
    out = Path(cfg.out or f"out/ppo_{cfg.strategy}")
    state_path = out / "state.pt"
    settings = dataclasses.replace(cfg, resume=False)
    if (out / "stage_config.json").is_file() or not cfg.resume:
        if finished(settings, out):
            return
    problems, validation = read_jsonl(cfg.data, PROBLEM_FIELDS), read_jsonl(cfg.validation, PROBLEM_FIELDS)
    device = set_up(cfg.threads)
    join_processes(device, cfg)

    # ---- four models: policy and critic learn, reference and reward model are frozen
    tokenizer = load_tokenizer(cfg.policy)
    models, reference, reward_model = load_models(cfg, tokenizer, device)
    policy, critic = models["policy"], models.get("critic")
    learning_rates = {"policy": cfg.lr, "critic": cfg.critic_lr}
    optimizers = {name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rates[name],
                                          weight_decay=0.0, fused=device.type == "cuda" or None)
                  for name, model in models.items()}
    logits_mb = cfg.logits_mb if logits_are_plain(policy) else 0  # else all at once
    prompt_ids = [encode_prompt(tokenizer, problem["prompt"]) for problem in problems]
    validation_ids = [encode_prompt(tokenizer, problem["prompt"]) for problem in validation]
    check_lengths(problems + validation, prompt_ids + validation_ids, cfg.max_new_tokens, policy.config)

    # ---- the steps of an iteration, on these models
    def sample(prompts, count, temperature, generator):
        """`count` responses of the policy to each prompt (token ids), row by row in order of prompt."""
        with autocast(device):
            groups = shared_generate(policy, tokenizer, prompts, count, cfg.max_new_tokens, temperature, generator,
                                     cfg.generate_batch_size)
        return [ids for group in groups for ids in group]

    def test(problems, responses):
        texts = [decode_response(tokenizer, ids) for ids in responses]
        return on_rank_0(run_tests, problems, texts, cfg.workers, cfg.timeout)

    def pass_at_1():
        """Share of validation problems solved by the greedy response."""
        results = test(validation, sample(validation_ids, 1, 0.0, None))
        return sum(result.passed for result in results) / len(results)

    def normalised_scores(prompts, responses):
        """RM rewards, normalised by their mean and standard deviation over responses of the SFT policy -> (B,).

        A text that is there twice has one reward: from two batches it would have two in bf16, and be ranked by the difference.
        """
        with adapters_off(reward_model):  # with LoRA it shares its blocks with the critic
            rewards = shared_rows(lambda rows: score_responses(reward_model, [prompts[k] + responses[k] for k in rows],
                                                               tokenizer.pad_token_id, cfg.score_batch_size),
                                  torch.arange(len(prompts)))
        first = {}
        twins = [first.setdefault((*prompt, *response), k) for k, (prompt, response) in enumerate(zip(prompts, responses))]
        return (rewards[twins] - reward_model.config.reward_mean) / reward_model.config.reward_std

    def ended(responses):
        """Whether each response has its EOS -> (B,) bool; the others were cut off at max_new_tokens."""
        return torch.tensor([ids[-1] == tokenizer.eos_token_id for ids in responses])

    def measured_filter(generator, cpu_generator):
        """`best_filter` on new responses of the policy to labelled problems."""
        labelled, prompts = validation[:cfg.r2_prompts], validation_ids[:cfg.r2_prompts]
        responses = sample(prompts, per_prompt, cfg.temperature, generator)
        scores = normalised_scores([ids for ids in prompts for _ in range(per_prompt)], responses)
        scores -= cfg.truncation_penalty * ~ended(responses)
        results = test([problem for problem in labelled for _ in range(per_prompt)], responses)
        actual_scores = torch.tensor([float(result.passed) for result in results])
        return best_filter(scores.view(-1, per_prompt), actual_scores.view(-1, per_prompt), cpu_generator, cfg)

    def logprobs_of(model, mb):
        return response_logprobs_in_parts(model, *model_inputs(mb), mb["response_ids"].shape[1], cfg.temperature, logits_mb)

    def values_of(mb):
        return response_values(critic, *model_inputs(mb), mb["response_ids"].shape[1])

    def policy_loss_of(mb):
        return policy_loss(logprobs_of(policy, mb), mb["old_logprobs"], mb["advantages"], mb["response_mask"], cfg.clip)

    def value_loss_of(mb):
        return value_loss(values_of(mb), mb["old_values"], mb["returns"], mb["response_mask"], cfg.value_clip)

    def forward(function, rows):
        """`forward_rows` of this iteration's batch -> (B, T), each process for a part of the rows."""
        result = torch.zeros(batch["response_mask"].shape)
        result[rows] = shared_rows(lambda part: forward_rows(function, batch, part, cfg.score_batch_size, device)[part], rows)
        return result

    # ---- start or resume. All that is random is seeded by the iteration's number: weights and metrics are the whole state.
    if cfg.resume and state_path.is_file():
        state = torch.load(state_path, map_location="cpu", weights_only=True, mmap=True)
        changed = [name for name, value in dataclasses.asdict(settings).items()
                   if state["config"].get(name) != value and name not in RESUME_MAY_CHANGE]
        if changed:
            fail(f"{out} was started with other settings ({', '.join(changed)}); use the same flags to resume it")
        for name, model in models.items():
            load_parts(model, optimizers[name], state["models"][name], state["optimizers"][name])
        metrics, kl_coef, best = state["metrics"], state["kl_coef"], state["best"]
        del state  # as large as the models and their optimisers
        if rank() == 0 and (out / "best.old").exists() and not (out / "best").exists():
            os.replace(out / "best.old", out / "best")  # killed between the two renames of save_model
        print(f"resuming {out} after iteration {metrics[-1]['iteration']}", flush=True)
    else:
        if rank() == 0:
            (out / "rollouts").mkdir(parents=True, exist_ok=True)
        kl_coef, best = cfg.kl_coef, pass_at_1()
        metrics = [{"iteration": 0, "validation_pass_at_1": best}]
        shared_save(policy, tokenizer, out / "best")
        print(f"before training: validation pass@1 {best:.3f}, {time.time() - started:.0f} s", flush=True)
    background = concurrent.futures.ThreadPoolExecutor(1)
    warmup = cfg.critic_warmup if cfg.advantage == "gae" else 0

    for iteration in range(metrics[-1]["iteration"] + 1, cfg.iterations + 1):
        clock = [time.time()]
        seed = cfg.seed * 1_000_003 + iteration
        generator = torch.Generator(device).manual_seed(seed)  # for the sampler
        # For filter and minibatches. With the sampler's seed, on a CPU, `random2` would keep a response by the very number
        # that had chosen its first token.
        cpu_generator = torch.Generator().manual_seed(-seed)
        strategy, r2 = metrics[-1].get("strategy", cfg.strategy), {}
        if cfg.strategy in ("auto", "learned") and (iteration - 1) % cfg.r2_every == 0:
            strategy, r2 = measured_filter(generator, cpu_generator)
            print(f"iteration {iteration:3d}  R2 {r2[strategy]:.3f}: filter {strategy}", flush=True)

        # ---- generate: N responses for each of n prompts, rows in order of prompt
        indices = iteration_prompts(len(problems), n, iteration, cfg.seed)
        responses = sample([prompt_ids[i] for i in indices], per_prompt, cfg.temperature, generator)
        row_problems = [problems[i] for i in indices for _ in range(per_prompt)]
        row_prompts = [prompt_ids[i] for i in indices for _ in range(per_prompt)]
        texts = [decode_response(tokenizer, ids) for ids in responses]
        # The tests label rollouts for the log alone, PPO never sees them; they run while the models train.
        tests = background.submit(run_tests, row_problems, texts, cfg.workers, cfg.timeout) if rank() == 0 else None
        batch = make_batch(row_prompts, responses, tokenizer.pad_token_id)  # n * N rows
        mask = batch["response_mask"]
        clock.append(time.time())

        # ---- score: RM rewards, normalised by their mean and standard deviation over responses of the SFT policy
        rm_scores = normalised_scores(row_prompts, responses)  # (n * N,)
        truncated = ~ended(responses)
        scores = rm_scores - cfg.truncation_penalty * truncated

        # ---- filter: within each prompt, on the scores without KL
        prompt_scores = scores.view(n, per_prompt)
        rows, columns = select_responses(prompt_scores, strategy, cpu_generator, cfg.top, cfg.bottom)
        kept = rows * per_prompt + columns  # row numbers of the kept responses
        every = torch.arange(n * per_prompt)
        critic_rows = every if cfg.critic_rows == "all" else kept
        # Only rows that somebody trains on pass through policy, reference and critic: that is what the filter saves.
        used = every if cfg.whiten_before_filter or cfg.critic_rows == "all" else kept
        clock.append(time.time())

        # ---- KL and GAE. Old logprobs come from the training forward pass, not from the sampler: the first ratio is 1.
        measured = every[::per_prompt]  # KL and entropy are logged over one response a prompt: kept ones are a biased sample
        either = torch.cat([used, measured]).unique()
        batch["old_logprobs"] = forward(lambda mb: logprobs_of(policy, mb), either)
        with adapters_off(reference):  # with LoRA it is the policy itself
            ref_logprobs = forward(lambda mb: logprobs_of(reference, mb), either)
        if cfg.advantage == "gae":
            batch["old_values"] = forward(values_of, used)
            rewards = token_rewards(scores, batch["old_logprobs"], ref_logprobs, mask, kl_coef)
            advantages, batch["returns"] = gae(rewards, batch["old_values"], mask, cfg.gamma, cfg.lam)
        else:  # the score against those of the same prompt, and the KL penalty of this token and of all that follow
            penalty = token_rewards(torch.zeros_like(scores), batch["old_logprobs"], ref_logprobs, mask, kl_coef)
            group = group_advantages(prompt_scores, cfg.advantage).view(-1, 1)
            advantages = (group + penalty.flip(1).cumsum(1).flip(1)) * mask
        # Filter first: whitened over all rows and filtered after, BoN would have almost only positive advantages.
        whitened_over = every if cfg.whiten_before_filter else kept
        whitened = whiten(advantages[whitened_over], mask[whitened_over])
        batch["advantages"] = torch.zeros_like(advantages).index_copy(0, whitened_over, whitened)
        if strategy.startswith("pow_"):
            weights = filter_weights(prompt_scores, strategy).flatten() * per_prompt  # mean 1
            batch["advantages"] *= weights[:, None]
        clock.append(time.time())

        # ---- PPO epochs
        kl = (batch["old_logprobs"] - ref_logprobs)[measured]
        policy_statistics, critic_statistics, problem = {}, {}, None
        try:
            if not all(values.isfinite().all() for values in (kl, scores, batch["advantages"])):
                raise FloatingPointError("a logprob, reward or value is not a finite number")
            if iteration == 1:  # a wrong mask, position or temperature shows here, before it costs a run
                with torch.no_grad():
                    _, first = policy_loss_of(take_rows(batch, kept[:cfg.micro_batch_size], device))
                # In bf16 a token's logprob may be off by some hundredths where kernels differ: on a GPU the mean decides.
                gap = kl.abs().max() if device.type == "cpu" else masked_mean(kl.abs(), mask[measured])
                allowed = 1e-2 if device.type == "cpu" else 5e-2
                if not (abs(first["ratio"] - 1) <= allowed and gap <= allowed):
                    raise FloatingPointError(f"before the first update the ratio is {first['ratio']:.4f} (must be 1) and the log-ratio "
                                             f"to the reference {gap:.4f} (must be 0): they are not the same model")
            if kl.sum(1).mean() > cfg.max_kl:
                raise FloatingPointError(f"KL from the reference is {kl.sum(1).mean():.0f} nats per response, above --max_kl "
                                         f"{cfg.max_kl:g}")
            for _ in range(cfg.epochs):
                if cfg.advantage == "gae":
                    critic_statistics = train_epoch(critic, optimizers["critic"], value_loss_of, batch,
                                                    critic_rows, cfg, cpu_generator, device)
                if iteration > warmup:
                    policy_statistics = train_epoch(policy, optimizers["policy"], policy_loss_of, batch, kept, cfg,
                                                    cpu_generator, device)
        except FloatingPointError as error:
            problem = error
        clock.append(time.time())

        # ---- log
        results = on_rank_0(lambda: tests.result())
        clock.append(time.time())
        passed = torch.tensor([float(result.passed) for result in results])
        kept_set = set(kept.tolist())
        records = [
            {"task_id": row_problems[k]["task_id"], "prompt": row_problems[k]["prompt"], "response": texts[k],
             "rm_score": rm_scores[k].item(), "score": scores[k].item(), "actual_score": passed[k].item(),
             "passed_tests": results[k].passed_tests, "total_tests": results[k].total_tests,
             "status": results[k].status, "truncated": truncated[k].item(), "policy": f"{out}/{iteration:04d}",
             "kept": k in kept_set} for k in range(len(texts))]
        if rank() == 0:
            write_jsonl(out / "rollouts" / f"{iteration:04d}.jsonl", records)
        if problem:
            fail(f"iteration {iteration}: {problem}; its rollouts are in {out}/rollouts, the best policy before in {out}/best. "
                 + ("Compare --policy and --reward_model with what the stages before have saved" if iteration == 1 else
                    "Start in another --out with a lower --lr or --critic_lr, or a higher --kl_coef"))
        line = {"iteration": iteration, "strategy": strategy, "rm_score": rm_scores.mean().item(),
                "pass_rate": passed.mean().item(), "pass_rate_kept": passed[kept].mean().item(),
                "kept": len(kept), "seen": len(texts),
                "kl_per_token": masked_mean(kl, mask[measured]).item(), "kl_per_response": kl.sum(1).mean().item(),
                "kl_coef": kl_coef, "entropy": -masked_mean(batch["old_logprobs"][measured], mask[measured]).item(),
                "truncated": truncated.float().mean().item(), "length": mask.sum(1).float().mean().item()}
        if r2:
            line.update(r2=r2, r2_responses=len(validation[:cfg.r2_prompts]) * per_prompt)
        line.update({f"policy_{name}": value for name, value in policy_statistics.items()})
        line.update({f"critic_{name}": value for name, value in critic_statistics.items()})
        if cfg.advantage == "gae":
            line["explained_variance"] = explained_variance(batch["old_values"][kept], batch["returns"][kept],
                                                            mask[kept]).item()
        if cfg.kl_control == "adaptive" and iteration > warmup + 1:  # before, the KL is 0 whatever the coefficient
            kl_coef = adapt_kl_coef(kl_coef, line["kl_per_response"], cfg.kl_target, len(texts), cfg.kl_horizon)
        if iteration % cfg.eval_every == 0 or iteration == cfg.iterations:
            line["validation_pass_at_1"] = pass_at_1()
            if line["validation_pass_at_1"] > best:
                best = line["validation_pass_at_1"]
                shared_save(policy, tokenizer, out / "best")
        clock.append(time.time())
        names = ("generate", "score", "forward", "train", "tests", "validate")
        line.update({f"seconds_{name}": round(b - a, 2) for name, a, b in zip(names, clock, clock[1:])})
        metrics.append(line)
        print(f"iteration {iteration:3d}  reward {line['rm_score']:+.2f}  pass rate {line['pass_rate']:.2f}  "
              f"KL {line['kl_per_response']:.2f}  kept {line['kept']}/{line['seen']}  "
              + (f"validation {line['validation_pass_at_1']:.3f}  " if "validation_pass_at_1" in line else "")
              + f"{time.time() - started:.0f} s", flush=True)

        # ---- save: state.pt is replaced last, so that a kill at any moment repeats what came after it and no more
        if cfg.save_every and iteration % cfg.save_every == 0:
            shared_save(policy, tokenizer, out / f"iteration_{iteration}")
        if rank() == 0:
            write_jsonl(out / "metrics.jsonl", metrics)
        if iteration % cfg.state_every == 0 or iteration == cfg.iterations:
            state = {"config": dataclasses.asdict(settings), "metrics": metrics, "kl_coef": kl_coef, "best": best,
                     "models": {name: whole(trained_weights(model)) for name, model in models.items()},
                     "optimizers": {name: whole(optimizer.state_dict()) for name, optimizer in optimizers.items()}}
            if rank() == 0:
                torch.save(state, f"{state_path}.tmp")
                os.replace(f"{state_path}.tmp", state_path)

    shared_save(policy, tokenizer, out / "last")
    if rank() == 0:
        plot_curves(metrics, out / "curves.png", f"strategy {cfg.strategy}, KL coefficient {cfg.kl_coef}, seed {cfg.seed}")
        save_config(settings, out)
    print(f"saved {out}: best validation pass@1 {best:.3f}; stage 04_pf_ppo ({cfg.strategy}) took {cost(started)}")


if __name__ == "__main__":
    config = parse_config(Config, __doc__)
    with memory_advice(config):
        main(config)
    leave_processes()
