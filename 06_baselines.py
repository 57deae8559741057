"""Stage 6, the other methods of the paper's Table 2: RAFT, BOND, DPO, IPO, KTO, iterative DPO.

They have what PF-PPO has: the SFT policy, the reward model (RM) as the only teacher, the same
prompts in the same order, and as many samples. Each iteration draws N responses to each of n
prompts, ranks them by reward, and trains on some of them:

    sample -> score -> choose -> train -> log, validate, save

With log pi(y) summed over the tokens of a response, y+ the best and y- the worst of N, and
h = (log pi(y+) - log pi_ref(y+)) - (log pi(y-) - log pi_ref(y-)):

    raft   L = -log pi(y+)                                            arXiv 2304.06767
    bond   L = KL(pi_BoN || pi) + KL(pi || pi_BoN)                    arXiv 2407.14622
    dpo    L = -log sigmoid(beta h)                                   arXiv 2305.18290, eq. 7
    ipo    L = (h - 1 / (2 beta))^2                                   arXiv 2310.12036, eq. 17
    kto    L = 1 - sigmoid(+-beta (log pi(y) - log pi_ref(y) - KL))   arXiv 2402.01306
    iterative_dpo: dpo in rounds, each on samples of the policy that the round before left

Reads data/tiny/ppo.jsonl, data/tiny/validation.jsonl, out/sft, out/rm.

Writes out/<method>/: best, last, metrics.jsonl, rollouts and curves.png as 04 does.

Run: python 06_baselines.py --method dpo

Simplified against the papers: constant learning rates, each sample used once, KTO's two weights
are 1. IPO sums log-probabilities over tokens, as in its equation; TRL averages them.
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
import torch.nn.functional as F
import transformers
import tyro
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.cache_utils import DynamicCache, DynamicLayer

import sandbox

Method = Literal["raft", "bond", "dpo", "ipo", "kto", "iterative_dpo"]

# Chosen on the validation problems of the tiny set, of one or two tried for each method.
LEARNING_RATES = {"bond": 1e-4, "ipo": 5e-5}  # the others: 2e-5

PANELS = {  # of curves.png
    "score of the policy's responses": ["score"],
    "programs that pass their tests": ["pass_rate", "validation_pass_at_1"],
    "KL of the responses, nats": ["kl_per_response"],
}


@dataclass
class Config:
    method: Method = "dpo"  # which loss and which samples; paper: Table 2
    data: str = "data/tiny/ppo.jsonl"  # problems to train on, JSONL
    validation: str = "data/tiny/validation.jsonl"  # problems that choose the best checkpoint
    policy: str = "out/sft"  # SFT model: the policy starts from it, and it is the reference
    reward_model: str = "out/rm"  # RM, which ranks the responses to a prompt
    out: str = ""  # output folder; empty: out/<method>
    iterations: int = 15  # rounds of sample, choose, update, as in 04
    prompts_per_iteration: int = 48  # n, as in 04
    responses_per_prompt: int = 5  # N; paper: 5
    temperature: float = 1.0  # divides the logits in sampling, update and reference alike
    max_new_tokens: int = 96  # longest response, tokens; authors' scripts: 2048
    truncation_penalty: float = 1.0  # taken off the score of a response without EOS
    beta: float = 0.1  # dpo, ipo, kto: pull to the reference, reward per nat
    rounds: int = 3  # iterative_dpo: rounds of ceil(iterations / rounds); paper: 3
    anchor_every: int = 15  # bond: iterations until the anchor moves to the policy; here never
    epochs: int = 1  # passes over the chosen responses of an iteration
    minibatch_size: int = 48  # responses per optimiser step: 24 pairs, or 9 prompts of bond
    micro_batch_size: int = 48  # responses per forward and backward pass; changes memory only
    lr: float = 0.0  # learning rate (AdamW, constant); 0: the method's in LEARNING_RATES
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    eval_every: int = 5  # iterations between two validations
    generate_batch_size: int = 256  # responses generated at once
    score_batch_size: int = 64  # responses per forward pass where nothing is learned
    timeout: float = 1.0  # CPU seconds per program
    workers: int = 1  # sandbox processes, 0: one per core; they run while the policy trains
    gradient_checkpointing: bool = False  # recompute activations: less memory, a third more time
    bf16: Literal["auto", "on", "off"] = "auto"  # autocast, weights stay float32; auto: on a GPU
    lora_rank: int = 0  # train LoRA adapters of this rank (needs peft); 0: train all weights
    threads: int = 0  # PyTorch CPU threads, 0: PyTorch's choice
    seed: int = 0  # order of the prompts, sampling, minibatches


# ------------------------------------------------------------------------------------- the losses
#
# All log-probabilities are sums over the tokens of a response, so that a difference of two is the
# log of a likelihood ratio.


def raft_loss(logprobs):
    """Negative log-likelihood of the best of N, mean over responses; (B,) -> scalar."""
    return -logprobs.mean()


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """DPO (Rafailov et al. 2023, equation 7): -log sigmoid(beta h), mean over pairs; all (B,).

    h is how much further the policy has raised the chosen response over the reference than the
    rejected one. The loss is log 2 at the reference.
    """
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -F.logsigmoid(beta * h).mean()


def ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """IPO (Azar et al. 2023, equation 17): (h - 1 / (2 beta))^2, mean over pairs; all (B,).

    DPO's loss falls for ever as h grows, even where the preference was certain. This one rises
    again beyond 1 / (2 beta).
    """
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    return ((h - 1 / (2 * beta)) ** 2).mean()


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


def bond_rewards(scores):
    """log p(y)^(N-1), p(y) the share of the prompt's responses that score at most as high as y.

    Args: scores: (P, N). Returns: (P, N), 0 for the best, (N - 1) log(1 / N) for the worst. Only
        ranks matter, so no reward is too large, and equal scores get equal rewards.
    """
    n = scores.shape[1]
    share = (scores[:, None, :] <= scores[:, :, None]).float().mean(2)  # (P, N)
    return (n - 1) * share.log()


def bond_loss(logprobs, anchor_logprobs, rewards):
    """BOND (Sessa et al. 2024): forward and backward KL to the anchor's best of N, 1 : 1.

    The best of N responses of the anchor is distributed as pi_BoN(y) = N pi_anchor(y) p(y)^(N-1),
    up to a factor for ties that is dropped as in the paper (section 3).

    Forward: -log pi of the best of N, a sample of pi_BoN. Backward: the expectation under the
    policy of log(pi / pi_anchor) - log p^(N-1) - log N. Its gradient is that of the mean of
    -w A log pi, where A = log p^(N-1) - log(pi / pi_anchor) less the mean of the prompt's other
    responses (a baseline). w = pi / pi_anchor, since the samples are the anchor's; it stops at N,
    the largest value that it has for pi_BoN.

    Args: logprobs, anchor_logprobs: (P, N), N at least 2; rewards: (P, N), from `bond_rewards`.
    Returns: scalar loss, mean over prompts; {"forward_nll", "backward_kl"} without the baseline.
    """
    n = rewards.shape[1]
    forward = -logprobs.gather(1, rewards.argmax(1, keepdim=True)).mean()
    log_ratio = (logprobs - anchor_logprobs).detach()
    weight = log_ratio.exp().clamp(max=n)
    gain = rewards - log_ratio
    advantage = (gain - gain.mean(1, keepdim=True)) * n / (n - 1)  # = g - (sum - g) / (N - 1)
    backward = -(weight * advantage * logprobs).mean()
    statistics = {
        "forward_nll": forward.item(),
        "backward_kl": -(weight * gain).mean().item() - math.log(n),
    }
    return forward + backward, statistics


def choose(scores, method):
    """Which responses to a prompt a method trains on: (P, N) -> (P, R) columns, the best first.

    DPO, IPO and KTO see the same two responses, the best and the worst, so that they differ in
    nothing but their loss. KTO could take any labelled response. Ties rank in order of appearance.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    if method == "bond":
        return order
    return order[:, :1] if method == "raft" else order[:, [0, -1]]


def sampler_iteration(method, iteration, iterations, rounds, anchor_every):
    """After which iteration (0: SFT) the policy stood that samples in `iteration` (from 1).

    raft: the one before. bond: the anchor's last move; the anchor is all that holds the policy, so
    each move allows as much distance again. dpo, ipo, kto: SFT, so to sample iteration by
    iteration is to sample everything first. iterative_dpo: the end of the round before, while the
    reference stays SFT (as in Xiong et al. 2023), so that beta means the same in every round.
    """
    if method == "raft":
        return iteration - 1
    if method == "bond":
        return (iteration - 1) // anchor_every * anchor_every
    if method == "iterative_dpo":
        length = math.ceil(iterations / rounds)
        return (iteration - 1) // length * length
    return 0


# ------------------------------------------------------------------------------------------- main


def main(cfg):
    started = time.time()
    sandbox.check_numbers(cfg)
    out = Path(cfg.out or f"out/{cfg.method}")
    if sandbox.finished(cfg, out):
        return
    if cfg.responses_per_prompt < 2:
        sandbox.fail("--responses_per_prompt 1: the best needs another beside it")
    device, amp = set_up(cfg)
    n, per_prompt = cfg.prompts_per_iteration, cfg.responses_per_prompt
    count = n * per_prompt  # samples per iteration
    offline, pairs = cfg.method in ("dpo", "ipo", "kto"), cfg.method not in ("raft", "bond")

    # ---- problems, models, optimiser
    problems, validation = sandbox.read_problems(cfg.data), sandbox.read_problems(cfg.validation)
    tokenizer = sandbox.load_tokenizer(cfg.policy, policy=True)
    policy, reference = load_policy(cfg.policy, tokenizer, cfg, device)
    reward_model = load_reward_model(cfg.reward_model, tokenizer).to(device)
    sampler = reference if offline else policy
    if cfg.method in ("bond", "iterative_dpo"):  # it follows the policy from time to time
        sampler = copy.deepcopy(policy).requires_grad_(False)
    room = cfg.max_new_tokens, policy.config
    prompt_ids = sandbox.encode_prompts(tokenizer, problems, *room)
    validation_ids = sandbox.encode_prompts(tokenizer, validation, *room)
    lr = cfg.lr or LEARNING_RATES.get(cfg.method, 2e-5)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)

    best = validate(policy, tokenizer, validation, validation_ids, cfg, amp)
    metrics = [{"iteration": 0, "validation_pass_at_1": best}]
    (out / "rollouts").mkdir(parents=True)
    save_model(policy, tokenizer, out / "best")
    print(f"before training: validation pass@1 {best:.3f}, {time.time() - started:.0f} s")
    background = ThreadPoolExecutor(1)

    for iteration in range(1, cfg.iterations + 1):
        begun = time.time()
        torch.manual_seed(cfg.seed * 1_000_003 + iteration)  # the first samples are those of 04
        generator = torch.Generator().manual_seed(-(cfg.seed * 1_000_003 + iteration))

        # ---- sample: N responses to each of n prompts, and for the log one of the policy's own
        sampled_after = sampler_iteration(
            cfg.method, iteration, cfg.iterations, cfg.rounds, cfg.anchor_every
        )
        on_policy = sampled_after == iteration - 1
        if on_policy and sampler is not policy and not offline:
            sampler.load_state_dict(policy.state_dict())
        tasks = prompts_of_iteration(len(problems), n, iteration, cfg.seed)  # (n,) indices
        prompts = [prompt_ids[i] for i in tasks]
        with amp, without_adapters(sampler) if offline else contextlib.nullcontext():
            responses, _ = generate(
                sampler, tokenizer, prompts, per_prompt, cfg.temperature, cfg, "sampling"
            )
        own = responses[::per_prompt]
        if not on_policy:
            with amp:
                own, _ = generate(policy, tokenizer, prompts, 1, cfg.temperature, cfg, "sampling")
        rows = [i for i in tasks for _ in range(per_prompt)] + tasks  # problem of each response
        row_problems = [problems[i] for i in rows]
        texts = [sandbox.decode_response(tokenizer, ids) for ids in responses + own]
        limits = {"timeout": cfg.timeout, "workers": cfg.workers}
        verdicts = background.submit(sandbox.run_tests, row_problems, texts, **limits)

        # ---- score: one number per response, in standard deviations of the SFT policy's
        truncated = torch.tensor([ids[-1] != tokenizer.eos_token_id for ids in responses + own])
        sequences = [prompt_ids[i] + ids for i, ids in zip(rows, responses + own)]
        with amp:
            rm_scores = score_responses(reward_model, sequences, cfg.score_batch_size, "scoring")
        scores = normalised(rm_scores, reward_model) - cfg.truncation_penalty * truncated

        # ---- choose: within each prompt the best, the best and the worst, or all
        prompt_scores = scores[:count].view(n, per_prompt)
        columns = choose(prompt_scores, cfg.method)  # (n, R)
        groups = torch.arange(n)[:, None] * per_prompt + columns  # (G, R) row numbers
        if pairs:  # a prompt whose responses are all the same has no pair
            differ = [responses[a] != responses[b] for a, b in groups.tolist()]
            groups = groups[torch.tensor(differ)]
        kept = groups.flatten().tolist()  # B row numbers, group after group

        # ---- the policy before its update, on responses of its own
        own_batch = make_batch(prompts, own)
        own_mask = own_batch["response_mask"]
        logprobs, ref_logprobs = policy_and_reference(policy, reference, own_batch, cfg, amp)
        kl = (logprobs - ref_logprobs) * own_mask

        # ---- train
        statistics = {}
        if kept:
            kept_prompts = [prompt_ids[rows[k]] for k in kept]
            kept_responses = [responses[k] for k in kept]
            batch = make_batch(kept_prompts, kept_responses)
            if cfg.method == "bond":
                batch["frozen_logprobs"] = forward_rows(logprobs_of, sampler, batch, cfg, amp)
                batch["bond_rewards"] = bond_rewards(prompt_scores).flatten()[kept, None]
            elif pairs:
                with without_adapters(reference):
                    batch["frozen_logprobs"] = forward_rows(logprobs_of, reference, batch, cfg, amp)
            batch["kl_point"] = torch.zeros(len(kept), 1)
            for _ in range(cfg.epochs):
                if cfg.method == "kto":  # each response behind the prompt of the pair before
                    others = make_batch(kept_prompts[-2:] + kept_prompts[:-2], kept_responses)
                    both = policy_and_reference(policy, reference, others, cfg, amp)
                    batch["kl_point"][:] = mismatched_kl(*(x.sum(1) for x in both))
                size = groups.shape[1]
                statistics = train_groups(
                    policy, optimizer, method_loss, batch, size, cfg, generator, amp
                )

        # ---- log: the policy by its own responses, which stand behind the samples
        results = verdicts.result()
        passed = torch.tensor([float(result.passed) for result in results])
        line = {
            "iteration": iteration,
            "rm_score": rm_scores[count:].mean().item(),
            "score": scores[count:].mean().item(),
            "pass_rate": passed[count:].mean().item(),
            "kl_per_response": kl.sum(1).mean().item(),
            "kl_per_token": masked_mean(kl, own_mask).item(),
            "entropy": -masked_mean(logprobs, own_mask).item(),
            "truncated": truncated[count:].float().mean().item(),
            "length": own_mask.sum(1).float().mean().item(),
            "sampled_after": sampled_after,
            "sampler_score": scores[:count].mean().item(),
            "sampler_pass_rate": passed[:count].mean().item(),
            "pass_rate_kept": passed[kept].mean().item() if kept else None,
            "kept": len(kept),
            "seen": count,
        }
        line |= {f"policy_{name}": value for name, value in statistics.items()}
        rollouts = [
            sandbox.sample_record(
                row_problems[k],
                texts[k],
                results[k],
                rm_score=rm_scores[k].item(),
                score=scores[k].item(),
                truncated=truncated[k].item(),
                policy=f"{out}/{sampled_after + 1:04d}",
                iteration=iteration,
                kept=k in kept,
            )
            for k in range(count)
        ]
        sandbox.write_jsonl(out / "rollouts" / f"{iteration:04d}.jsonl", rollouts)

        # ---- validate and save
        if iteration % cfg.eval_every == 0 or iteration == cfg.iterations:
            accuracy = validate(policy, tokenizer, validation, validation_ids, cfg, amp)
            line["validation_pass_at_1"] = accuracy
            if accuracy > best:
                best = accuracy
                save_model(policy, tokenizer, out / "best")
        line["seconds_iteration"] = time.time() - begun
        metrics.append(line)
        sandbox.write_jsonl(out / "metrics.jsonl", metrics)
        print_line(line, started)

    save_model(policy, tokenizer, out / "last")
    sandbox.plot_curves(metrics, out / "curves.png", PANELS)
    sandbox.save_config(cfg, out)
    print(f"saved {out}: best validation pass@1 {best:.3f}, {time.time() - started:.0f} s")


# ------------------------------------------------------------------------------ settings and models


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


# ----------------------------------------------------------------------------- sample and validate


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


# ----------------------------------------------------------------------- batches and forward passes


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


def masked_mean(x, mask):
    """Mean of x over the positions where mask is 1, 0 where there are none; both of one shape."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


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


def policy_and_reference(policy, reference, batch, cfg, amp):
    """Logprobs of a batch under the policy and under the frozen reference, both (B, T)."""
    logprobs = forward_rows(logprobs_of, policy, batch, cfg, amp)
    with without_adapters(reference):
        return logprobs, forward_rows(logprobs_of, reference, batch, cfg, amp)


# ------------------------------------------------------------------------------------------- train


def method_loss(policy, mb, cfg):
    """The method's loss on a micro-batch of whole groups, the rows of a group side by side."""
    logprobs = (logprobs_of(policy, mb, cfg) * mb["response_mask"]).sum(1)  # (B,)
    if cfg.method == "raft":
        return raft_loss(logprobs), {}
    frozen = mb["frozen_logprobs"].sum(1)
    if cfg.method == "bond":
        rows = logprobs, frozen, mb["bond_rewards"]
        return bond_loss(*(x.view(-1, cfg.responses_per_prompt) for x in rows))
    chosen, rejected = logprobs.view(-1, 2).unbind(1)
    ref_chosen, ref_rejected = frozen.view(-1, 2).unbind(1)
    if cfg.method == "kto":
        desirable = torch.arange(len(logprobs), device=logprobs.device) % 2 == 0
        loss = kto_loss(logprobs, frozen, desirable, mb["kl_point"][0], cfg.beta)
    elif cfg.method == "ipo":
        loss = ipo_loss(chosen, rejected, ref_chosen, ref_rejected, cfg.beta)
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
