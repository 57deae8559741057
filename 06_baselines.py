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
import dataclasses
import math
import random
import resource
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
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
)
from transformers.cache_utils import DynamicLayer

import sandbox

Method = Literal["raft", "bond", "dpo", "ipo", "kto", "iterative_dpo"]

# Chosen on the validation problems of the tiny set, of one or two tried for each method.
LEARNING_RATES = {
    "raft": 2e-5,
    "bond": 1e-4,
    "dpo": 2e-5,
    "ipo": 5e-5,
    "kto": 2e-5,
    "iterative_dpo": 2e-5,
}


@dataclass
class Config:
    method: Method = "dpo"  # which loss and which samples; paper: Table 2
    data: str = "data/tiny/ppo.jsonl"  # problems to train on, JSONL
    validation: str = "data/tiny/validation.jsonl"  # problems that choose the best checkpoint
    policy: str = "out/sft"  # SFT model: the policy starts from it, and it is the reference
    reward_model: str = "out/rm"  # RM, which ranks the responses to a prompt
    out: str = ""  # output folder; empty: out/<method>
    iterations: int = 25  # rounds of sample, choose, update, as in 04
    prompts_per_iteration: int = 48  # n, as in 04
    responses_per_prompt: int = 5  # N; paper: 5
    temperature: float = 1.0  # divides the logits in sampling, update and reference alike
    max_new_tokens: int = 96  # longest response, tokens; authors' scripts: 2048
    truncation_penalty: float = 1.0  # taken off the score of a response without EOS
    beta: float = 0.1  # dpo, ipo, kto: pull to the reference, reward per nat
    rounds: int = 3  # iterative_dpo: rounds of ceil(iterations / rounds); paper: 3
    anchor_every: int = 25  # bond: iterations after which the anchor moves to the policy
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
    out = Path(cfg.out or f"out/{cfg.method}")
    if sandbox.finished(cfg, out):
        return
    check_settings(cfg, out)
    device, amp = set_up(cfg)
    n, per_prompt = cfg.prompts_per_iteration, cfg.responses_per_prompt
    count = n * per_prompt  # samples per iteration
    offline, pairs = cfg.method in ("dpo", "ipo", "kto"), cfg.method not in ("raft", "bond")

    # ---- problems, models, optimiser
    problems, validation = sandbox.read_problems(cfg.data), sandbox.read_problems(cfg.validation)
    tokenizer = load_tokenizer(cfg.policy)
    policy, reference = load_policy(cfg, tokenizer, device)
    reward_model = load_reward_model(cfg.reward_model, tokenizer).requires_grad_(False).to(device)
    sampler = reference if offline else policy
    if cfg.method in ("bond", "iterative_dpo"):  # it follows the policy from time to time
        sampler = copy.deepcopy(policy).requires_grad_(False)
    prompt_ids = encode_prompts(tokenizer, problems, cfg.max_new_tokens, policy.config)
    validation_ids = encode_prompts(tokenizer, validation, cfg.max_new_tokens, policy.config)
    optimizer = make_optimizer(policy, cfg.lr or LEARNING_RATES[cfg.method])

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
                own, _ = generate(policy, tokenizer, prompts, 1, cfg.temperature, cfg)
        rows = [i for i in tasks for _ in range(per_prompt)] + tasks  # problem of each response
        texts = [decode_response(tokenizer, ids) for ids in responses + own]
        limits = {"timeout": cfg.timeout, "workers": cfg.workers}
        verdicts = background.submit(
            sandbox.run_tests, [problems[i] for i in rows], texts, **limits
        )

        # ---- score: one number per response, in standard deviations of the SFT policy's
        truncated = torch.tensor([ids[-1] != tokenizer.eos_token_id for ids in responses + own])
        sequences = [prompt_ids[i] + ids for i, ids in zip(rows, responses + own)]
        with amp:
            rm_scores = score_responses(reward_model, sequences, cfg.score_batch_size)
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
            for _ in range(cfg.epochs):
                kl_point = 0.0
                if cfg.method == "kto":  # each response behind the prompt of the pair before
                    others = make_batch(kept_prompts[-2:] + kept_prompts[:-2], kept_responses)
                    both = policy_and_reference(policy, reference, others, cfg, amp)
                    kl_point = mismatched_kl(*(x.sum(1) for x in both))
                statistics = train_groups(
                    policy, optimizer, batch, groups.shape[1], kl_point, cfg, generator, amp
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
            {
                "task_id": problems[rows[k]]["task_id"],
                "prompt": problems[rows[k]]["prompt"],
                "response": texts[k],
                "rm_score": rm_scores[k].item(),
                "score": scores[k].item(),
                **sandbox.verdict(results[k]),
                "truncated": truncated[k].item(),
                "policy": f"{out}/{sampled_after + 1:04d}",
                "iteration": iteration,
                "kept": k in kept,
            }
            for k in range(count)
        ]
        sandbox.write_jsonl(out / "rollouts" / f"{iteration:04d}.jsonl", rollouts)

        # ---- validate and save
        if iteration % cfg.eval_every == 0 or iteration == cfg.iterations:
            line["validation_pass_at_1"] = validate(
                policy, tokenizer, validation, validation_ids, cfg, amp
            )
            if line["validation_pass_at_1"] > best:
                best = line["validation_pass_at_1"]
                save_model(policy, tokenizer, out / "best")
        line["seconds_iteration"] = time.time() - begun
        metrics.append(line)
        sandbox.write_jsonl(out / "metrics.jsonl", metrics)
        print_line(line, started)

    save_model(policy, tokenizer, out / "last")
    plot_curves(metrics, out / "curves.png", f"{cfg.method}, seed {cfg.seed}")
    sandbox.save_config(cfg, out)
    print(f"saved {out}: best validation pass@1 {best:.3f}; 06_baselines took {cost(started)}")


# ------------------------------------------------------------------------------ settings and models


def check_settings(cfg, out):
    """What cannot work is refused before anything is loaded."""
    if out.exists():
        sandbox.fail(f"{out} holds no finished run; delete it or choose another --out")
    for name, value in dataclasses.asdict(cfg).items():
        counts = ("_size", "_every", "_iteration", "epochs", "rounds", "iterations")
        if name.endswith(counts) and value < 1:
            sandbox.fail(f"--{name} {value}: it must be at least 1")
    if cfg.responses_per_prompt < 2:
        sandbox.fail(
            f"--responses_per_prompt {cfg.responses_per_prompt}: the best needs another beside it"
        )
    if cfg.beta <= 0:
        sandbox.fail(f"--beta {cfg.beta}: it must be above 0")


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


def check_folder(path):
    """Fail at once where a model folder is missing, instead of looking its name up on the hub."""
    if (Path(path) / "adapter_config.json").is_file():
        sandbox.fail(f"{path} holds LoRA adapters only; merge them into their base model first")
    if str(path).startswith(("/", ".", "out/")) and not (Path(path) / "config.json").is_file():
        sandbox.fail(f"no model at {path}; run the stage that writes it first")


def load_tokenizer(path, plain=False):
    """A tokenizer whose EOS closes a response and whose pad token is another.

    A chat template may close a turn with another token than the tokenizer's EOS (ChatML
    <|im_end|>, Gemma <end_of_turn>). An instruction-tuned model emits that one, so it becomes the
    EOS. A pad token equal to EOS would hide the EOS that we train.

    Args: plain: drop the chat template, in saved copies, too.
    """
    check_folder(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if plain:
        tokenizer.chat_template = None
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "QUESTION"}]
        chat.append({"role": "assistant", "content": "RESPONSE"})
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False)
        except Exception as error:  # templates raise what they like
            sandbox.fail(f"the chat template of {path} refuses a plain question ({error})")
        if "QUESTION" not in text:
            sandbox.fail(f"the chat template of {path} does not show the user's message")
        behind = text.rpartition("RESPONSE")[2]
        special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
        closing = [i for i in tokenizer(behind, add_special_tokens=False).input_ids if i in special]
        if closing:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(closing[0])
    if tokenizer.eos_token_id is None:
        sandbox.fail(
            f"the tokenizer of {path} has no EOS token; set tokenizer.eos_token and save it"
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "<|pf_ppo_pad|>"})
    return tokenizer


def load_model(model_class, path, tokenizer, **options):
    """A float32 model with every dropout at 0: rollout and update must see the same policy.

    A pad token that `load_tokenizer` had to add gets a row in the embedding, the mean of the
    others. EOS and pad are also written to the config, where other programs look for them.
    """
    check_folder(path)
    config = AutoConfig.from_pretrained(path, **options)
    for name, value in config.to_dict().items():  # every architecture has names of its own
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    model = model_class.from_pretrained(path, config=config, dtype=torch.float32)
    rows = model.get_input_embeddings().num_embeddings
    if rows < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for layer in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
            layer.weight.data[rows:] = layer.weight.data[:rows].mean(0)
    for place in filter(None, (model.config, getattr(model, "generation_config", None))):
        place.eos_token_id, place.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return model


def load_reward_model(path, tokenizer):
    """The reward model of stage 2, refused where it reads other tokens than the policy writes."""
    other = load_tokenizer(path)
    same_prompt = encode_prompt(other, "QUESTION") == encode_prompt(tokenizer, "QUESTION")
    if other.get_vocab() != tokenizer.get_vocab() or not same_prompt:
        sandbox.fail(f"the tokenizer of {path} is not the policy's; train the RM from this policy")
    model = load_model(AutoModelForSequenceClassification, path, tokenizer)
    if not getattr(model.config, "reward_std", 0) > 0:
        sandbox.fail(
            f"{path} has no reward_mean and positive reward_std in its config; "
            "train it with 02_reward_model.py"
        )
    return model


def load_policy(cfg, tokenizer, device):
    """The policy that learns and its frozen reference, which with LoRA is the same model."""
    policy = load_model(AutoModelForCausalLM, cfg.policy, tokenizer)
    if cfg.lora_rank:
        policy = reference = add_adapters(policy, cfg.lora_rank, "CAUSAL_LM")
    else:
        reference = copy.deepcopy(policy).requires_grad_(False)
    if cfg.gradient_checkpointing:
        unwrapped(policy).activation_checkpointing_enable()
    return policy.train().to(device), reference.to(device)


def add_adapters(model, rank, task_type):
    """The model with LoRA adapters (Hu et al. 2022) on all linear layers of its backbone.

    A SEQ_CLS model keeps a trainable copy of its `score` head beside the frozen one.
    """
    try:
        import peft
    except ImportError:
        sandbox.fail("--lora_rank needs peft: pip install -r requirements-lora.txt")
    lora = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=task_type
    )
    return peft.get_peft_model(model, lora)


def unwrapped(model):
    """The transformers model itself, which peft wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def without_adapters(model):
    """A context in which a model with LoRA adapters is what it was before training."""
    if hasattr(model, "disable_adapter"):
        return model.disable_adapter()
    return contextlib.nullcontext()


def make_optimizer(model, lr):
    """AdamW over the trainable parameters, without weight decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)


def save_model(model, tokenizer, directory):
    """Save an ordinary Hugging Face folder, LoRA merged in float32; it is complete or absent."""
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    temporary = Path(f"{directory}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(directory, ignore_errors=True)
    temporary.replace(directory)


# ----------------------------------------------------------------------------- sample and validate


def prompts_of_iteration(count, per_iteration, iteration, seed):
    """Problem indices of an iteration (from 1): slices of endlessly repeated, reshuffled passes.

    They depend on nothing else, so every strategy of a seed sees the same prompts in the same
    order, and so does a resumed run.
    """
    first, last = (iteration - 1) * per_iteration, iteration * per_iteration
    indices = []
    for number in range(first // count, (last - 1) // count + 1):
        order = list(range(count))
        random.Random(f"{seed}/{number}").shuffle(order)
        indices += order[max(first - number * count, 0) : last - number * count]
    return indices


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt up to the first response token, by the chat template if there is one.

    BOS comes from one place only, the template or the tokenizer. An EOS that the tokenizer appends
    is removed, since the response follows.
    """
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        # Llama 3 would write today's date into each prompt: the RM would see others tomorrow.
        return tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False, date_string="26 Jul 2024"
        )
    ids = tokenizer(prompt).input_ids
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_prompts(tokenizer, problems, max_new_tokens, model_config):
    """Token ids of the prompts; one that leaves no room for a response is refused."""
    prompts = [encode_prompt(tokenizer, problem["prompt"]) for problem in problems]
    context = getattr(model_config, "max_position_embeddings", None) or 10**9
    for problem, ids in zip(problems, prompts):
        if len(ids) + max_new_tokens > context:
            sandbox.fail(
                f"the prompt of {problem['task_id']} has {len(ids)} tokens: with --max_new_tokens "
                f"{max_new_tokens} that exceeds the model's context of {context}"
            )
    return prompts


@torch.no_grad()
def generate(model, tokenizer, prompts, repeats, temperature, cfg, progress=None):
    """Sample responses with PyTorch's global random numbers.

    Faster than `model.generate` for three reasons: a prompt is computed once for all of its
    responses, prompts of similar length share a batch, and finished rows leave it.

    Args:
        prompts: list of token id lists; repeats: responses to each.
        temperature: divides the logits; 0 is greedy.
        cfg: has max_new_tokens, and generate_batch_size, the responses computed at once.
        progress: label of a progress bar, or None for silence.
    Returns: responses and their logprobs under the sampling distribution, two lists of
        len(prompts) * repeats lists, in order of prompt. A response without EOS is truncated.
    """
    training = model.training
    model.eval()  # in training mode gradient checkpointing would switch the cache off
    count = min(repeats, cfg.generate_batch_size)  # responses to a prompt in one batch
    order = sorted(
        list(range(len(prompts))) * math.ceil(repeats / count), key=lambda i: -len(prompts[i])
    )
    width = cfg.generate_batch_size // count  # prompts in one batch
    done = [[] for _ in prompts]
    with sandbox.progress_bar(len(prompts) * repeats, progress) as bar:
        for start in range(0, len(order), width):
            batch = order[start : start + width]
            rows = generate_batch(
                model, tokenizer, [prompts[i] for i in batch], count, temperature, cfg
            )
            for k, row in enumerate(rows):
                done[batch[k // count]].append(row)
            bar.update(len(rows))
    model.train(training)
    rows = [row for group in done for row in group[:repeats]]
    return [ids for ids, _ in rows], [logprobs for _, logprobs in rows]


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer with room for later tokens: (rows, heads, tokens, width).

    `DynamicLayer` copies all of them for each new token. With a real model and long responses that
    takes longer than the model itself.
    """

    room = None

    def update(self, keys, values, *args, **kwargs):
        start = self.get_seq_length()
        end = start + keys.shape[2]
        if start == 0:
            return super().update(keys, values)
        if self.room is None or len(self.room[0]) != len(keys) or self.room[0].shape[2] < end:
            self.room = [
                torch.nn.functional.pad(x, (0, 0, 0, 64)) for x in (self.keys, self.values)
            ]
        self.room[0][:, :, start:end], self.room[1][:, :, start:end] = keys, values
        self.keys, self.values = (x[:, :, :end] for x in self.room)
        return self.keys, self.values


def generate_batch(model, tokenizer, prompts, repeats, temperature, cfg):
    """`repeats` responses to each prompt, all at once -> list of (token ids, logprobs)."""
    device, eos = model.device, tokenizer.eos_token_id
    batch = make_batch(prompts, [[]] * len(prompts))
    mask = batch["prompt_mask"].to(device)  # (P, width), 0 on left padding
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    logits = model(
        input_ids=batch["prompt_ids"].to(device),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    cache.batch_repeat_interleave(repeats)
    logits, mask = logits.repeat_interleave(repeats, 0), mask.repeat_interleave(repeats, 0)
    tokens = torch.full((len(mask), cfg.max_new_tokens), eos, device=device)
    logprobs = torch.zeros(tokens.shape, device=device)
    active = torch.arange(len(mask), device=device)  # rows of `tokens` that are in the batch
    going = torch.ones_like(active, dtype=torch.bool)  # of these, the ones without EOS
    for t in range(cfg.max_new_tokens):
        distribution = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
        if temperature > 0:  # invert the cumulative distribution: torch.multinomial is slow on CPUs
            cumulative = distribution.exp().cumsum(-1)
            uniform = torch.rand(len(cumulative), 1, device=device) * cumulative[:, -1:]
            chosen = torch.searchsorted(cumulative, uniform, right=True)
            chosen = chosen.clamp(max=cumulative.shape[1] - 1)  # (b, 1)
        else:
            chosen = distribution.argmax(-1, keepdim=True)
        tokens[active, t] = chosen[:, 0]
        logprobs[active, t] = distribution.gather(-1, chosen)[:, 0]
        going = going & (chosen[:, 0] != eos)
        unfinished = int(going.sum())
        if unfinished == 0 or t + 1 == cfg.max_new_tokens:
            break
        if unfinished <= 0.8 * len(active):  # it costs a copy of the cache: not for every row
            keep = going.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            active, going, chosen, mask = active[keep], going[keep], chosen[keep], mask[keep]
        mask = torch.cat([mask, torch.ones_like(chosen)], 1)
        logits = model(
            input_ids=chosen,
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    ids = [row[: row.index(eos) + 1] if eos in row else row for row in tokens.tolist()]
    return [(row, probs[: len(row)]) for row, probs in zip(ids, logprobs.tolist())]


def decode_response(tokenizer, ids):
    """The text of a response without its EOS, as it continues a prompt.

    SentencePiece tokenizers drop a space at the start of a text: of "    return x" three would be
    left, and no program would run. After a line break they keep all spaces.
    """
    ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    start = tokenizer("\n", add_special_tokens=False).input_ids
    text = tokenizer.decode(start + ids, clean_up_tokenization_spaces=False)
    return text.removeprefix("\n")


def validate(policy, tokenizer, problems, prompts, cfg, amp):
    """Greedy pass@1 on the validation problems."""
    with amp:
        responses, _ = generate(policy, tokenizer, prompts, 1, 0.0, cfg, "validating")
    texts = [decode_response(tokenizer, ids) for ids in responses]
    results = sandbox.run_tests(problems, texts, timeout=cfg.timeout, workers=cfg.workers)
    return sum(result.passed for result in results) / len(results)


# ----------------------------------------------------------------------- batches and forward passes


def make_batch(prompts, responses):
    """Token id lists -> prompt_ids (B, P) padded left, response_ids (B, T) right, and their masks.

    The masks come from lengths; padding ids are never read.
    """
    width, length = max(map(len, prompts)), max(map(len, responses))
    batch = {
        "prompt_ids": [[0] * (width - len(p)) + p for p in prompts],
        "prompt_mask": [[0] * (width - len(p)) + [1] * len(p) for p in prompts],
        "response_ids": [r + [0] * (length - len(r)) for r in responses],
        "response_mask": [[1] * len(r) + [0] * (length - len(r)) for r in responses],
    }
    return {name: torch.tensor(rows, dtype=torch.long) for name, rows in batch.items()}


def take_rows(batch, rows, device):
    """Some rows of a batch, all fields of a row together, without columns of padding alone."""
    part = {name: field[rows] for name, field in batch.items()}
    width, length = (int(part[f"{kind}_mask"].sum(1).max()) for kind in ("prompt", "response"))
    for name, field in part.items():
        trimmed = field[:, -width:] if name.startswith("prompt") else field[:, :length]
        part[name] = trimmed.to(device)
    return part


def model_inputs(mb):
    """input_ids and attention_mask, both (B, P + T)."""
    return (
        torch.cat([mb["prompt_ids"], mb["response_ids"]], 1),
        torch.cat([mb["prompt_mask"], mb["response_mask"]], 1),
    )


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
    model = unwrapped(model)
    hidden = model.base_model(
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
            part = [list(ids) for ids in unique[start : start + batch_size]]
            inputs = model_inputs(make_batch([ids[:1] for ids in part], [ids[1:] for ids in part]))
            outputs = token_scores(reward_model, *(x.to(reward_model.device) for x in inputs))
            for ids, row in zip(part, outputs.tolist()):
                scores[tuple(ids)] = row[len(ids) - 1]
            bar.update(len(part))
    return torch.tensor([scores[tuple(ids)] for ids in sequences])


def normalised(rm_scores, reward_model):
    """RM scores in standard deviations over responses of the SFT policy, whose mean becomes 0."""
    config = unwrapped(reward_model).config
    return (rm_scores - config.reward_mean) / config.reward_std


def masked_mean(x, mask):
    """Mean of x over the positions where mask is 1, 0 where there are none; both of one shape."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def logprobs_of(model, mb, cfg):
    """`response_logprobs` of a batch -> (B, T)."""
    length = mb["response_ids"].shape[1]
    return response_logprobs(model, *model_inputs(mb), length, cfg.temperature)


@torch.no_grad()
def forward_rows(function, model, batch, cfg, amp):
    """`function(model, mb, cfg)` over a batch, in parts of similar length -> (B, T) on the CPU."""
    mask = batch["response_mask"]
    result = torch.zeros(mask.shape)
    lengths = batch["prompt_mask"].sum(1) + mask.sum(1)
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


def method_loss(policy, mb, kl_point, cfg):
    """The method's loss on a micro-batch of whole groups, the rows of a group side by side.

    Args: kl_point: KTO's reference point. Returns: scalar loss, statistics.
    """
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
        loss = kto_loss(logprobs, frozen, desirable, kl_point, cfg.beta)
    elif cfg.method == "ipo":
        loss = ipo_loss(chosen, rejected, ref_chosen, ref_rejected, cfg.beta)
    else:
        loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, cfg.beta)
    raised, lowered = (chosen - ref_chosen).detach(), (rejected - ref_rejected).detach()
    # That the chosen responses become less probable, too, is a known way in which these fail.
    return loss, {
        "chosen_logratio": raised.mean().item(),
        "rejected_logratio": lowered.mean().item(),
        "accuracy": (raised > lowered).float().mean().item(),
        "kl_point": float(kl_point),
    }


def train_groups(policy, optimizer, batch, size, kl_point, cfg, generator, amp):
    """One pass over the batch in random minibatches, one optimiser step each -> mean statistics.

    A group of `size` rows is what a loss compares: a response, a pair, or all responses to a
    prompt. Each micro-batch counts by its share of the minibatch's groups, so that the micro-batch
    size changes nothing but the memory.
    """
    rows = torch.arange(len(batch["response_mask"])).view(-1, size)  # (G, R)
    lengths = batch["response_mask"].sum(1)[rows].amax(1)  # (G,)
    totals = {}
    for minibatch in torch.randperm(len(rows), generator=generator).split(
        max(1, cfg.minibatch_size // size)
    ):
        minibatch = minibatch[lengths[minibatch].argsort()]  # groups of similar length together
        for part in minibatch.split(max(1, cfg.micro_batch_size // size)):
            mb = take_rows(batch, rows[part].flatten(), policy.device)
            with amp:
                loss, statistics = method_loss(policy, mb, kl_point, cfg)
            (loss * (len(part) / len(minibatch))).backward()
            for name, value in {**statistics, "loss": loss.item()}.items():
                totals[name] = totals.get(name, 0.0) + value * len(part)
        norm = torch.nn.utils.clip_grad_norm_(
            policy.parameters(), cfg.max_grad_norm, error_if_nonfinite=True
        )
        totals["grad_norm"] = totals.get("grad_norm", 0.0) + norm.item() * len(minibatch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: total / len(rows) for name, total in totals.items()}


# ------------------------------------------------------------------------------------ log and plot


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


def cost(started):
    """Seconds since `started` and the peak memory of this process, for a stage's last line."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts kilobytes
    if torch.cuda.is_available():
        return (
            f"{time.time() - started:.0f} s, GPU {torch.cuda.max_memory_allocated() / 2**30:.1f} GB"
        )
    return f"{time.time() - started:.0f} s, peak memory {peak:.1f} GB"


def plot_curves(metrics, path, title):
    """Score, true pass rate and KL: under over-optimisation the first rises, the second falls."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [m for m in metrics if m["iteration"]]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    panels = [
        ("score", "score of the rollouts", "score", "tab:orange"),
        ("pass_rate", "programs that pass their tests", "pass rate", "tab:green"),
        ("kl_per_response", "KL of the kept responses", "nats per response", "tab:blue"),
    ]
    for axis, (name, heading, label, colour) in zip(axes, panels):
        steps, values = [m["iteration"] for m in lines], [m[name] for m in lines]
        axis.plot(steps, values, color=colour, label="rollouts, sampled")
        axis.set(title=heading, xlabel="iteration", ylabel=label)
        axis.grid(alpha=0.3)
    checks = [m for m in metrics if "validation_pass_at_1" in m]
    steps = [m["iteration"] for m in checks]
    greedy = [m["validation_pass_at_1"] for m in checks]
    axes[1].plot(steps, greedy, "o--", color="tab:green", label="validation problems, greedy")
    axes[1].set_ylim(0, 1)
    axes[1].legend(loc="lower right")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
