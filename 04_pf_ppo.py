"""Stage 4, PF-PPO: PPO that learns only from the responses whose reward can be trusted.

Each iteration samples N responses to each of n prompts, scores them with the reward model (RM),
keeps a subset of every prompt's responses (the filter), and updates policy and critic on what was
kept (arXiv 2409.06957, algorithm 1):

    generate -> score -> filter -> KL penalty and GAE -> PPO epochs -> log, validate, save

    filter   rank y_1..y_N by reward within one prompt and keep some of the ranks
    reward   r_t = -kl_coef * (log pi(y_t) - log pi_ref(y_t)), plus the score at the last token
    GAE      delta_t = r_t + gamma V_{t+1} - V_t,  A_t = sum_k (gamma lam)^k delta_{t+k},  R = A + V
    policy   L = mean max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)),  ratio = pi / pi_old
    critic   L = mean 1/2 max((V - R)^2, (clip(V, V_old +- eps) - R)^2)

Reads data/tiny/ppo.jsonl, data/tiny/validation.jsonl, out/sft, out/rm.

Writes out/ppo_<strategy>/: best and last (ordinary Hugging Face folders, best by validation
pass@1), metrics.jsonl, rollouts/0001.jsonl ... (every response with its reward, its verdict and
whether it was kept), curves.png, and, while it runs, state.pt for --resume.

Run: python 04_pf_ppo.py --strategy bw

Simplified against the paper (section 4): one pass over the kept responses instead of three on
average; larger learning rates and a larger KL coefficient, which suit a model of a million
parameters. One GPU; scale/ puts the same filter into engines for several.
"""

import contextlib
import copy
import math
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers
import tyro
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.cache_utils import DynamicCache, DynamicLayer

import sandbox

# Those by rank read nothing of a reward but its place among the prompt's.
ByRank = Literal["none", "single", "random2", "bon", "br", "bw"]
Strategy = Literal[ByRank, "top", "top_random", "top_bottom", "pow_1", "pow_2", "pow_3"]

# Under over-optimisation the score rises and the pass rate falls.
PANELS = {
    "score of the rollouts": ["score"],
    "programs that pass their tests": ["pass_rate", "validation_pass_at_1"],
    "KL of the responses, nats": ["kl_per_response"],
}


@dataclass
class Config:
    strategy: Strategy = "bw"  # the filter, see filter_weights; paper: br or bw
    reward: Literal["rm", "tests"] = "rm"  # tests: share of unit tests passed, no RM is needed
    # gae: with a critic. rloo, grpo: a response against the others of its prompt, gamma and lam 1.
    # Unlike in their papers the KL penalty to go is added, and the sum is whitened over the batch.
    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    data: str = "data/tiny/ppo.jsonl"  # problems to train on, JSONL
    validation: str = "data/tiny/validation.jsonl"  # problems that choose the best checkpoint
    policy: str = "out/sft"  # SFT model: the policy starts here, and the KL penalty keeps it close
    reward_model: str = "out/rm"  # RM; the critic starts from it
    out: str = ""  # output folder; empty: out/ppo_<strategy>
    iterations: int = 15  # rounds of generate, filter, update; paper: 5 passes over 3k prompts
    prompts_per_iteration: int = 48  # n; authors' scripts: 1024 responses in all
    responses_per_prompt: int = 5  # N; paper: 5
    top: float = 0.5  # top*: scores above are kept; in standard deviations of the RM's reward
    bottom: float = -0.5  # top_bottom: scores below are kept, too (--reward tests: test shares)
    temperature: float = 1.0  # divides the logits in rollout, update and reference alike
    max_new_tokens: int = 96  # longest response, tokens; authors' scripts: 2048
    truncation_penalty: float = 1.0  # off the score (in its unit) of a response without EOS
    epochs: int = 1  # passes over the kept responses of an iteration; paper: 3 on average
    minibatch_size: int = 48  # responses per optimiser step, at most; authors' scripts: 256
    micro_batch_size: int = 48  # responses per forward and backward pass; changes memory only
    lr: float = 1e-4  # policy learning rate (AdamW, constant); paper: 5e-7 (6.7B parameters)
    critic_lr: float = 5e-4  # critic learning rate; paper: 9e-6
    critic_warmup: int = 2  # iterations, not steps, in which only the critic learns
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    gamma: float = 1.0  # discount per token; authors' scripts: 1
    lam: float = 0.95  # GAE lambda; authors' scripts: 0.95
    clip: float = 0.2  # the ratio's trust region, 1 +- clip; authors' scripts: 0.2
    value_clip: float = 0.2  # the same for values, in standard deviations of the reward
    kl_coef: float = 0.3  # weight of the per-token KL penalty, per nat; authors' scripts: 0.01
    kl_control: Literal["fixed", "adaptive"] = "fixed"  # adaptive: kl_coef follows kl_target
    kl_target: float = 1.0  # adaptive: KL of kept responses to aim at, nats per response
    kl_horizon: int = 1000  # adaptive: responses in which kl_coef changes by at most a fifth
    eval_every: int = 5  # iterations between validations, each of which saves state.pt
    resume: bool = False  # go on from the last state.pt of an interrupted run
    generate_batch_size: int = 256  # responses per generation batch
    score_batch_size: int = 64  # responses per forward pass without gradient
    timeout: float = 1.0  # CPU seconds per program
    workers: int = 1  # sandbox processes, 0: one per core; they run while the models train
    gradient_checkpointing: bool = False  # recompute activations: less memory, a third more time
    bf16: Literal["auto", "on", "off"] = "auto"  # autocast over float32 weights; auto: on a GPU
    lora_rank: int = 0  # train LoRA adapters of this rank (needs peft); 0: train all weights
    threads: int = 0  # PyTorch CPU threads, 0: PyTorch's choice
    seed: int = 0  # order of the prompts, sampling, filter, minibatches


# ------------------------------------------------------------------------------------- the filter
#
#   strategy             weight of rank 1..N within a prompt         kept for training
#   none (PPO-M)         1/N each                                    all
#   single (PPO-S)       1                                           all; N n prompts, one each
#   random2              1/N each                                    two at random: the control
#   bon (best of N)      1, 0, .., 0                                 the best
#   br (best-random)     1/2, 1/(2(N-1)), .., 1/(2(N-1))             the best and another at random
#   bw (best-worst)      1/2, 0, .., 0, 1/2                          the best and the worst
#   top                  equal where score > top                     those; if none, the best
#   top_random           twice as much where score > top             those, and each other by a coin
#   top_bottom           equal where score > top or < bottom         those; if none, the best
#   pow_1, pow_2, pow_3  |r|^k, r stretched to [-1, 1]               all, advantages times N weight
#
# select_responses draws what the weights describe. The numbers serve pow_k and stage 3.


def filter_weights(rm_scores, strategy, top=0.5, bottom=-0.5):
    """Weight of each response under a filter (paper, section 3: weights over ranks).

    Args:
        rm_scores: (..., N) normalised rewards. The last dimension holds the responses to one
            prompt, never a batch: a filter over the batch would keep two rows in all.
        top, bottom: thresholds of the `top*` strategies, in standard deviations of the reward.
    Returns: (..., N) weights that sum to 1. Ties are ranked in order of appearance.
    """
    scores = torch.as_tensor(rm_scores, dtype=torch.float32)
    n = scores.shape[-1]
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)  # 0 is the best
    best, worst = (rank == 0).float(), (rank == n - 1).float()
    if strategy in ("none", "single", "random2"):
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
    elif strategy.startswith("pow_"):
        # Rewards have no natural zero: unstretched, a prompt with only good responses would be
        # weighted like one end of the scale.
        low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
        stretched = (2 * (scores - low) / (high - low).clamp(min=1e-9) - 1).abs()
        weights = torch.where(high > low, stretched ** int(strategy[-1]), torch.ones_like(scores))
    else:
        raise ValueError(f"unknown strategy {strategy!r}")
    weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, best)
    return weights / weights.sum(-1, keepdim=True)


def select_responses(rm_scores, strategy, generator, top=0.5, bottom=-0.5):
    """Which responses PPO trains on: the filter's draw within each prompt, no row twice.

    Args: rm_scores: (n, N) normalised rewards; generator: CPU torch.Generator of the draws.
    Returns: (rows, columns), two int64 tensors in order of prompt, then of response.
    """
    scores = torch.as_tensor(rm_scores, dtype=torch.float32)
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    noise = torch.rand(scores.shape, generator=generator)  # by all strategies: one stream per seed
    if strategy in ("br", "random2"):
        if strategy == "br":
            noise = noise.masked_fill(rank == 0, 2.0)  # the best first, then the largest noise
        keep = noise.argsort(-1, descending=True).argsort(-1) < 2
    elif strategy == "top_random":
        keep = (scores > top) | (noise < 0.5)
        keep |= ~keep.any(-1, keepdim=True) & (rank == 0)
    elif strategy.startswith("pow_"):
        keep = torch.ones_like(scores, dtype=torch.bool)
    else:
        keep = filter_weights(scores, strategy, top, bottom) > 0
    return keep.nonzero(as_tuple=True)


# ---------------------------------------------------------------------------------- the equations


def masked_mean(x, mask):
    """Mean of x over the positions where mask is 1, 0 where there are none; both of one shape."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def masked_variance(x, mask):
    """Variance of x over the positions where mask is 1."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x, mask, shift_mean=True):
    """x with variance 1 over the masked positions and mean 0 (shift_mean=False: its own mean)."""
    mean = masked_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_variance(x, mask) + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """Reward of each token: the KL penalty everywhere, plus the score on the last token.

    The penalty is the estimator k1 = log pi(y_t) - log pi_ref(y_t): its mean over samples of the
    policy is the KL divergence.

    Args: scores: (B,); logprobs, ref_logprobs: (B, T); mask: (B, T), 1 on response tokens.
    Returns: (B, T), 0 on padding.
    """
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    # The mask says where a response ends: a truncated one keeps its own last token, and no EOS is
    # appended to it.
    last = (mask.sum(1).long() - 1).clamp(min=0)[:, None]  # (B, 1)
    ends = torch.zeros_like(rewards).scatter(1, last, scores[:, None].to(rewards.dtype))
    return rewards + ends * mask


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, equation 16).

    Args:
        rewards, mask: (B, T), padded on the right.
        values: (B, T), `values[:, t]` predicted before token t is seen. The value after the last
            token counts as 0.
    Returns: advantages, returns = advantages + values; both (B, T), 0 on padding.
    """
    advantages = torch.zeros_like(rewards)
    next_advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * mask


def group_advantages(scores, kind):
    """Advantages without a critic: each response against the others of its prompt.

    Args: scores: (n, N), N at least 2. kind: 'rloo', the score less the mean of the other N - 1
        (Ahmadian et al. 2024), or 'grpo', centred and divided by the prompt's standard deviation,
        0 where all scores are equal (Shao et al. 2024).
    Returns: (n, N).
    """
    centred = scores - scores.mean(1, keepdim=True)
    if kind == "rloo":
        return centred * scores.shape[1] / (scores.shape[1] - 1)  # = s - (sum - s) / (N - 1)
    if kind == "grpo":
        std = scores.std(1, keepdim=True)
        return torch.where(std > 1e-6, centred / std.clamp(min=1e-6), torch.zeros_like(scores))
    raise ValueError(f"unknown kind {kind!r}")


def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """PPO's clipped surrogate (Schulman et al. 2017, equation 7), mean over masked tokens.

    Args: all (B, T). Returns: scalar loss, {"ratio", "clip_fraction"}, means over masked tokens.
    """
    ratio = ((logprobs - old_logprobs) * mask).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    clipped = ((ratio - 1).abs() > clip).float()
    statistics = {"ratio": ratio.detach(), "clip_fraction": clipped}
    return masked_mean(loss, mask), {k: masked_mean(v, mask).item() for k, v in statistics.items()}


def value_loss(values, old_values, returns, mask, clip):
    """Half the squared error, or that of values clipped to within `clip` of the old if larger.

    Args: all (B, T). Returns: scalar loss, {"clip_fraction"}, means over masked tokens.
    """
    clipped_values = torch.clamp(values, old_values - clip, old_values + clip)
    loss = 0.5 * torch.maximum((values - returns) ** 2, (clipped_values - returns) ** 2)
    clipped = ((values - old_values).abs() > clip).float()
    return masked_mean(loss, mask), {"clip_fraction": masked_mean(clipped, mask).item()}


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant one."""
    unexplained = masked_variance(returns - values, mask)
    return 1 - unexplained / masked_variance(returns, mask).clamp(min=1e-8)


def adapt_kl_coef(kl_coef, kl, target, responses, horizon):
    """Adaptive KL control (Ziegler et al. 2019, section 2.2): more weight above the target."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * responses / horizon)


# ------------------------------------------------------------------------------------------- main


def main(cfg):
    started = time.time()
    n, per_prompt = rollout_shape(cfg)
    out = Path(cfg.out or f"out/ppo_{cfg.strategy}")
    if sandbox.finished(cfg, out, cfg.resume):
        return
    device, amp = set_up(cfg)

    # ---- problems, models, optimisers
    problems, validation = sandbox.read_problems(cfg.data), sandbox.read_problems(cfg.validation)
    tokenizer = sandbox.load_tokenizer(cfg.policy, policy=True)
    policy, reference = load_policy(cfg.policy, tokenizer, cfg, device)
    critic, reward_model = load_critic(cfg, tokenizer, device)
    room = cfg.max_new_tokens, policy.config
    prompt_ids = sandbox.encode_prompts(tokenizer, problems, *room)
    validation_ids = sandbox.encode_prompts(tokenizer, validation, *room)
    policy_optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=0.0)
    parts = {"policy": policy, "policy_optimizer": policy_optimizer}
    if critic is not None:
        critic_optimizer = torch.optim.AdamW(
            critic.parameters(), lr=cfg.critic_lr, weight_decay=0.0
        )
        parts |= {"critic": critic, "critic_optimizer": critic_optimizer}

    # ---- start or resume. Each iteration seeds what is random in it, so the state holds no random
    # number generator.
    if out.exists():
        state = load_state(out, parts)
        metrics, kl_coef, best = state["metrics"], state["kl_coef"], state["best"]
        print(f"resuming {out} after iteration {metrics[-1]['iteration']}")
    else:
        best = validate(policy, tokenizer, validation, validation_ids, cfg, amp)
        metrics, kl_coef = [{"iteration": 0, "validation_pass_at_1": best}], cfg.kl_coef
        start = Path(f"{out}.tmp")
        shutil.rmtree(start, ignore_errors=True)
        (start / "rollouts").mkdir(parents=True)
        save_model(policy, tokenizer, start / "best")
        save_state(cfg, out, parts, metrics=metrics, kl_coef=kl_coef, best=best)
        print(f"before training: validation pass@1 {best:.3f}, {time.time() - started:.0f} s")
    background = ThreadPoolExecutor(1)  # it runs the tests while the models work

    for iteration in range(metrics[-1]["iteration"] + 1, cfg.iterations + 1):
        clock = [time.time()]
        validating = iteration % cfg.eval_every == 0 or iteration == cfg.iterations
        # Two streams: from one, the filter would draw the very numbers that chose the tokens.
        torch.manual_seed(cfg.seed * 1_000_003 + iteration)  # the sampler's
        generator = torch.Generator().manual_seed(-(cfg.seed * 1_000_003 + iteration))  # the rest's

        # ---- generate: N responses to each of n prompts
        tasks = prompts_of_iteration(len(problems), n, iteration, cfg.seed)  # (n,) indices
        prompts = [prompt_ids[i] for i in tasks]
        with amp:
            responses, sampler_logprobs = generate(
                policy, tokenizer, prompts, per_prompt, cfg.temperature, cfg, "sampling"
            )
        row_prompts = [ids for ids in prompts for _ in range(per_prompt)]  # n * N
        row_problems = [problems[i] for i in tasks for _ in range(per_prompt)]
        texts = [sandbox.decode_response(tokenizer, ids) for ids in responses]
        truncated = torch.tensor([ids[-1] != tokenizer.eos_token_id for ids in responses])
        limits = {"timeout": cfg.timeout, "workers": cfg.workers}
        limits["progress"] = "testing" if cfg.reward == "tests" else None  # waited for
        verdicts = background.submit(sandbox.run_tests, row_problems, texts, **limits)
        clock.append(time.time())

        # ---- score: one number per response, in order of prompt, then of response. RM scores are
        # normalised by mean and standard deviation over responses of the SFT policy; the verdicts
        # of the tests are then only logged.
        if cfg.reward == "rm":
            sequences = [prompt + ids for prompt, ids in zip(row_prompts, responses)]
            with amp, without_adapters(reward_model):
                rm_scores = score_responses(
                    reward_model, sequences, cfg.score_batch_size, "scoring"
                )
            scores = normalised(rm_scores, reward_model)
        else:
            rm_scores = None
            scores = torch.tensor([v.passed_tests / v.total_tests for v in verdicts.result()])
        scores = scores - cfg.truncation_penalty * truncated  # (n * N,)

        # ---- filter: within each prompt, before anything is computed for the rows that go
        prompt_scores = scores.view(n, per_prompt)
        rows, columns = select_responses(
            prompt_scores, cfg.strategy, generator, cfg.top, cfg.bottom
        )
        kept = (rows * per_prompt + columns).tolist()  # B row numbers
        batch = make_batch([row_prompts[k] for k in kept], [responses[k] for k in kept])
        mask = batch["response_mask"]  # (B, T)
        clock.append(time.time())

        # ---- KL penalty and GAE. Old logprobs come from the training forward pass, not from the
        # sampler, so that the first ratio is exactly 1.
        old_logprobs, ref_logprobs = policy_and_reference(policy, reference, batch, cfg, amp)
        batch["old_logprobs"] = old_logprobs
        if critic is not None:
            values = forward_rows(values_of, critic, batch, cfg, amp)
            rewards = token_rewards(scores[kept], old_logprobs, ref_logprobs, mask, kl_coef)
            advantages, returns = gae(rewards, values, mask, cfg.gamma, cfg.lam)
            batch |= {"old_values": values, "returns": returns}
        else:  # with no values and lambda 1 GAE is the reward to go
            group_scores = group_advantages(prompt_scores, cfg.advantage)[rows, columns]
            rewards = token_rewards(group_scores, old_logprobs, ref_logprobs, mask, kl_coef)
            advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
        # Whitened after the filter: whitened over all rows before it, BoN's kept ones would nearly
        # all be positive.
        batch["advantages"] = whiten(advantages, mask)
        # pow_k weights the policy's gradient; times N, so that equal weights change nothing.
        if cfg.strategy.startswith("pow_"):
            weights = filter_weights(prompt_scores, cfg.strategy)[rows, columns]
            batch["advantages"] *= per_prompt * weights[:, None]
        kl = (old_logprobs - ref_logprobs) * mask  # that of the policy before this update
        line = {
            "iteration": iteration,
            "kl_per_response": kl.sum(1).mean().item(),  # of the kept responses
            "kl_per_token": masked_mean(kl, mask).item(),
            "kl_coef": kl_coef,
        }
        if cfg.kl_control == "adaptive" and "policy_loss" in metrics[-1]:
            # While only the critic has learned, the KL is 0 and would lower the coefficient.
            kl_coef = adapt_kl_coef(
                kl_coef, line["kl_per_response"], cfg.kl_target, len(texts), cfg.kl_horizon
            )
        if iteration == 1:
            check_first_step(policy, batch, kl, [sampler_logprobs[k] for k in kept], cfg, amp)
        if validating:
            # Kept responses are a biased sample of the policy's. The first of each prompt is not.
            unfiltered = make_batch(prompts, responses[::per_prompt])
            logprobs, refs = policy_and_reference(policy, reference, unfiltered, cfg, amp)
            line["unfiltered_kl_per_response"] = (logprobs - refs).sum(1).mean().item()
            line["entropy"] = -masked_mean(logprobs, unfiltered["response_mask"]).item()
        clock.append(time.time())

        # ---- PPO epochs; the log has the statistics of the last one
        rest = batch, cfg, generator, amp
        for _ in range(cfg.epochs):
            if critic is not None:
                statistics = train_epoch(critic, critic_optimizer, critic_loss, *rest)
                line |= {f"critic_{name}": value for name, value in statistics.items()}
            if critic is None or iteration > cfg.critic_warmup:
                statistics = train_epoch(policy, policy_optimizer, actor_loss, *rest)
                line |= {f"policy_{name}": value for name, value in statistics.items()}
        clock.append(time.time())

        # ---- log
        results = verdicts.result()
        passed = torch.tensor([float(result.passed) for result in results])
        line |= {
            "rm_score": None if rm_scores is None else rm_scores.mean().item(),
            "score": scores.mean().item(),
            "pass_rate": passed.mean().item(),
            "pass_rate_kept": passed[kept].mean().item(),
            "kept": len(kept),
            "seen": len(texts),
            "truncated": truncated.float().mean().item(),
            "length": sum(map(len, responses)) / len(responses),
        }
        if critic is not None:
            line["explained_variance"] = explained_variance(values, returns, mask).item()
        rollouts = [
            sandbox.sample_record(
                row_problems[k],
                texts[k],
                results[k],
                rm_score=None if rm_scores is None else rm_scores[k].item(),
                score=scores[k].item(),
                truncated=truncated[k].item(),
                policy=str(out),
                iteration=iteration,  # stage 3 groups by both
                kept=k in kept,
            )
            for k in range(len(texts))
        ]
        sandbox.write_jsonl(out / "rollouts" / f"{iteration:04d}.jsonl", rollouts)
        clock.append(time.time())

        # ---- validate and save
        if validating:
            accuracy = validate(policy, tokenizer, validation, validation_ids, cfg, amp)
            line["validation_pass_at_1"] = accuracy
            if accuracy > best:
                best = accuracy
                save_model(policy, tokenizer, out / "best")
        clock.append(time.time())
        phases = ("generate", "score", "forward", "train", "tests", "validate")
        line |= {f"seconds_{name}": b - a for name, a, b in zip(phases, clock, clock[1:])}
        metrics.append(line)
        sandbox.write_jsonl(out / "metrics.jsonl", metrics)
        if validating:
            save_state(cfg, out, parts, metrics=metrics, kl_coef=kl_coef, best=best)
        print_line(line, started)

    save_model(policy, tokenizer, out / "last")
    sandbox.plot_curves(metrics, out / "curves.png", PANELS)
    sandbox.save_config(cfg, out)
    print(f"saved {out}: best validation pass@1 {best:.3f}, {time.time() - started:.0f} s")


# ------------------------------------------------------------------------ settings, state, models
# From here to "train", most helpers are the same in every stage: skip them on a first reading.


def rollout_shape(cfg):
    """n prompts and N responses to each, after a look at the settings: bad ones are refused."""
    sandbox.check_numbers(cfg)
    n, per_prompt = cfg.prompts_per_iteration, cfg.responses_per_prompt
    if cfg.strategy == "single":  # PPO-S: as many responses, each to a prompt of its own
        n, per_prompt = n * per_prompt, 1
    pairs = cfg.strategy in ("br", "bw", "random2") or cfg.advantage != "gae"
    if pairs and per_prompt < 2:
        sandbox.fail(
            f"--strategy {cfg.strategy} --advantage {cfg.advantage} needs two responses to a "
            "prompt: raise --responses_per_prompt or change the strategy"
        )
    if cfg.kl_control == "adaptive" and 5 * cfg.kl_horizon <= n * per_prompt:
        sandbox.fail(
            f"--kl_horizon {cfg.kl_horizon}: it must be above a fifth of the {n * per_prompt} "
            "responses of an iteration, or one step could make the coefficient negative"
        )
    return n, per_prompt


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


def load_state(out, parts):
    """Put back what `save_state` has written -> the state, with the progress in it."""
    state = torch.load(out / "state.pt", map_location="cpu", mmap=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state


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


def load_policy(path, tokenizer, cfg, device):
    """The policy that learns and its frozen reference: with LoRA, the policy without adapters."""
    policy = load_model(AutoModelForCausalLM, path, tokenizer)
    reference = None if cfg.lora_rank else copy.deepcopy(policy).requires_grad_(False)
    if cfg.gradient_checkpointing:
        policy.activation_checkpointing_enable()
    if cfg.lora_rank:
        policy = reference = add_adapters(policy, cfg.lora_rank, "CAUSAL_LM")
    return policy.to(device), reference.to(device)


def load_critic(cfg, tokenizer, device):
    """The critic that learns, and the reward model; either or both can be None.

    With LoRA they are one model: the reward model is the critic without its adapters.
    """
    reward_model = critic = None
    if cfg.reward == "rm":
        reward_model = load_reward_model(cfg.reward_model, tokenizer).to(device)
    if cfg.advantage == "gae" and cfg.reward == "rm":
        critic = reward_model if cfg.lora_rank else copy.deepcopy(reward_model)
    elif cfg.advantage == "gae":  # no RM to start from: the policy's backbone, values 0
        critic = load_model(AutoModelForSequenceClassification, cfg.policy, tokenizer, num_labels=1)
        torch.nn.init.zeros_(critic.score.weight)
        critic.config.reward_mean, critic.config.reward_std = 0.0, 1.0
    if critic is None:
        return None, reward_model
    if cfg.gradient_checkpointing:
        critic.activation_checkpointing_enable()
    if cfg.lora_rank:
        critic = add_adapters(critic, cfg.lora_rank, "SEQ_CLS")
        reward_model = reward_model and critic
    return critic.to(device), reward_model


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
        columns = used if whole else answered[: field.shape[1]]  # (B, 1): in stages 6, 7
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


def normalised(rm_scores, reward_model):
    """RM scores in standard deviations over responses of the SFT policy, whose mean becomes 0."""
    config = reward_model.config
    return (rm_scores - config.reward_mean) / config.reward_std


def logprobs_of(model, mb, cfg):
    """`response_logprobs` of a batch -> (B, T)."""
    length = mb["response_mask"].shape[1]
    inputs = mb["input_ids"], mb["attention_mask"]
    return response_logprobs(model, *inputs, length, cfg.temperature)


def values_of(critic, mb, cfg):
    """The critic is the RM read at every token: its value before each response token -> (B, T)."""
    length = mb["response_mask"].shape[1]
    scores = token_scores(critic, mb["input_ids"], mb["attention_mask"])
    return normalised(scores, critic)[:, -length - 1 : -1]


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


def policy_and_reference(policy, reference, batch, cfg, amp):
    """Logprobs of a batch under the policy and under the frozen reference, both (B, T)."""
    logprobs = forward_rows(logprobs_of, policy, batch, cfg, amp)
    with without_adapters(reference):
        return logprobs, forward_rows(logprobs_of, reference, batch, cfg, amp)


def check_first_step(policy, batch, kl, sampler_logprobs, cfg, amp):
    """Before the first update the ratio is 1 and the KL 0, and the sampler saw the same policy.

    A wrong mask, position or temperature shows here, before it costs a run. Ratio and KL alone
    would be blind to what policy, old policy and reference have in common.
    """
    mask, old_logprobs = batch["response_mask"], batch["old_logprobs"]
    mb = take_rows(batch, torch.arange(len(mask))[: cfg.micro_batch_size], policy.device)
    with torch.no_grad(), amp:
        ratio_gap = (logprobs_of(policy, mb, cfg) - mb["old_logprobs"]).abs()
        bf16 = torch.is_autocast_enabled(policy.device.type)  # inside amp: is it on?
    sampled = pad_sequence([torch.tensor(row) for row in sampler_logprobs], batch_first=True)
    gaps = {
        "the ratio is off 1": masked_mean(ratio_gap, mb["response_mask"]),
        "the KL is off 0": masked_mean(kl.abs(), mask),
        "the sampler's logprobs differ": masked_mean((sampled - old_logprobs).abs(), mask),
    }
    for what, gap in gaps.items():
        if not gap <= (0.05 if bf16 else 0.001):  # bf16 has three digits
            sandbox.fail(f"before the first update {what} by {gap:.4f}: not the same policy")


# ------------------------------------------------------------------------------------------ train


def actor_loss(policy, mb, cfg):
    """`policy_loss` of a batch."""
    logprobs = logprobs_of(policy, mb, cfg)
    mask = mb["response_mask"]
    return policy_loss(logprobs, mb["old_logprobs"], mb["advantages"], mask, cfg.clip)


def critic_loss(critic, mb, cfg):
    """`value_loss` of a batch."""
    values = values_of(critic, mb, cfg)
    return value_loss(values, mb["old_values"], mb["returns"], mb["response_mask"], cfg.value_clip)


def train_epoch(model, optimizer, loss_function, batch, cfg, generator, amp):
    """One pass over the batch in random minibatches, one optimiser step each -> mean statistics.

    Each micro-batch counts by its share of the minibatch's tokens, so that the micro-batch size
    changes nothing but the memory.
    """
    lengths = batch["response_mask"].sum(1)
    totals = {}
    model.train()  # for gradient checkpointing; the sampler's cache needs eval mode
    order = torch.randperm(len(lengths), generator=generator)
    with sandbox.progress_bar(len(order), "training") as bar:
        # Of nearly equal size: a last minibatch of one row would move the weights as far as others.
        for minibatch in order.tensor_split(math.ceil(len(order) / cfg.minibatch_size)):
            minibatch = minibatch[lengths[minibatch].argsort()]  # rows of similar length together
            tokens = int(lengths[minibatch].sum())
            for rows in minibatch.split(cfg.micro_batch_size):
                mb = take_rows(batch, rows, model.device)
                with amp:
                    loss, statistics = loss_function(model, mb, cfg)
                share = int(lengths[rows].sum()) / tokens
                (loss * share).backward()
                for name, value in {**statistics, "loss": loss.item()}.items():
                    totals[name] = totals.get(name, 0.0) + value * share * tokens
                bar.update(len(rows))
            norm = torch.nn.utils.clip_grad_norm_(
                model.parameters(), cfg.max_grad_norm, error_if_nonfinite=True
            )
            totals["grad_norm"] = totals.get("grad_norm", 0.0) + norm.item() * tokens
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    model.eval()
    return {name: total / int(lengths.sum()) for name, total in totals.items()}


def print_line(line, started):
    """One line per iteration: reward beside true pass rate, since they part when PPO goes wrong."""
    validation = ""
    if "validation_pass_at_1" in line:
        validation = f"validation {line['validation_pass_at_1']:.3f}  "
    print(
        f"iteration {line['iteration']:3d}  score {line['score']:+.2f}  "
        f"pass rate {line['pass_rate']:.2f}  KL {line['kl_per_response']:.2f}  "
        f"kept {line['kept']}/{line['seen']}  {validation}{time.time() - started:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
