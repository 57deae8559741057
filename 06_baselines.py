"""Stage 6, the other families of the paper's Table 2: RAFT, BOND, DPO, IPO, KTO and iterative DPO.

They have what PF-PPO has: the SFT policy, the reward model (RM) as the only teacher, the same prompts in the same order,
and as many samples. Each iteration draws N responses for each of n prompts, ranks them by reward, and trains on some:

    sample -> score -> choose -> frozen log-probabilities -> measure -> train -> log -> save

    log pi(y) is summed over the tokens of a response, y+ is the best and y- the worst of N by reward,
    h = (log pi(y+) - log pi_ref(y+)) - (log pi(y-) - log pi_ref(y-))

    raft           L = -log pi(y+)                                           Dong et al. 2023, arXiv 2304.06767
    bond           L = KL(pi_BoN || pi) + KL(pi || pi_BoN)                   Sessa et al. 2024, arXiv 2407.14622
    dpo            L = -log sigmoid(beta h)                                  Rafailov et al. 2023, arXiv 2305.18290, eq. 7
    ipo            L = (h - 1 / (2 beta))^2                                  Azar et al. 2023, arXiv 2310.12036, eq. 17
    kto            L = 1 - sigmoid(+-beta (log pi(y) - log pi_ref(y) - KL))  Ethayarajh et al. 2024, arXiv 2402.01306
    iterative_dpo  as dpo, in three rounds, each on samples of the policy that the round before left

BOND. pi_BoN is the distribution of the best of N responses of an anchor policy: with p(y) the probability that an anchor
response has a reward of at most y's, pi_BoN(y) = N pi_anchor(y) p(y)^(N-1) up to a factor between 1/N and 1 for ties (its
section 3), which is dropped as in that paper. The forward KL is the log-likelihood of the best of N. The backward one is a
policy gradient with the reward log p(y)^(N-1), p counted among the N samples, minus the log-ratio to the anchor. Both have
weight 1 (PF-PPO's paper: coefficients 1), and the anchor moves to the current policy every `--anchor_every` iterations.
The anchor is all that holds the policy: a fixed one lets it go as far as the best of N, log N - (N-1)/N = 0.8 nats for N = 5,
and each move allows as much again. By default it does not move within the run; with a move every iteration KL and reward rise
together while the programs fail (tiny set, 10 iterations: KL 7.8 nats, validation pass@1 from 51 to 22%).

Where the samples come from. RAFT: the current policy. BOND: the anchor, with importance weights once the policy has left it.
DPO, IPO, KTO: the SFT policy throughout. They are drawn iteration by iteration, which is the same as drawing all of them
first and making one pass, since the SFT policy does not change; so every method has the same loop, prompts and seeds, and its
first iteration trains on the very rollouts that 04 starts from. Iterative DPO draws from the policy at the start of each of
its rounds; its reference stays the SFT model (as in Xiong et al. 2023, arXiv 2312.11456), so that beta means the same in
every round and the KL to SFT is what it pays for; with a reference that moved along, three rounds could go three times as
far. Where the samples are not the policy's own, one more response a prompt is drawn from it, for the log alone.

DPO, IPO and KTO see the same responses, the best and the worst of N, so that they differ in nothing but their loss. (KTO would
take any labelled response.) IPO is often used with the mean log-probability of a token instead of the sum (TRL's default); with
the sum, as in its equation, the target 1 / (2 beta) is a distance of whole responses: 5 nats for beta 0.1.

Reads   data/tiny/ppo.jsonl, data/tiny/validation.jsonl, out/sft, out/rm
Writes  out/<method>/best, last    ordinary Hugging Face folders: best by validation pass@1, and after the last iteration
                     metrics.jsonl {"iteration": 1, "rm_score": 0.1, "pass_rate": 0.31, "kl_per_token": 0.0, ...}, names as
                                   in 04; reward, pass rate, KL are the policy's, `sampler_*` those of the training samples
                     rollouts/     0001.jsonl ...: every sample of an iteration, its reward, verdict, whether it was kept
                     curves.png    reward and true pass rate side by side
                     state.pt      all that --resume needs

Run     python 06_baselines.py --method dpo

Simplified against the papers: constant learning rates, each sample used once (the offline methods usually make several
passes), KTO's two weights are 1. The learning rates are those that did best on the validation problems of the tiny set, of one
or two tried for each method (README); nothing else is tuned. RAFT's has not been run: at 1e-4 it peaks at iteration 5 (66%),
and after 25 it is at 7%, with a KL of 19 nats. Offline DPO and KTO go too far with larger ones, too: the log-likelihoods of
both responses fall, that of the worse one faster, what gains is neither (DPO at 5e-5: 64% after 5 iterations, 33% after 25).
"""

import argparse
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
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Cache,
                          DynamicLayer)
from transformers.pytorch_utils import Conv1D

import sandbox

PROBLEM_FIELDS = {"task_id": str, "prompt": str, "prefix": str, "setup": str, "entry_point": (str, type(None)), "tests": list}
LEARNING_RATES = {"raft": 2e-5, "bond": 1e-4, "dpo": 2e-5, "ipo": 5e-5, "kto": 2e-5, "iterative_dpo": 2e-5}


@dataclass
class Config:
    method: typing.Literal["raft", "bond", "dpo", "ipo", "kto", "iterative_dpo"] = "raft"  # which loss; paper: Table 2
    data: str = "data/tiny/ppo.jsonl"  # problems to train on, JSONL
    validation: str = "data/tiny/validation.jsonl"  # problems that choose the best checkpoint; never the test problems
    policy: str = "out/sft"  # the SFT model: the policy starts from it, and it is the reference
    reward_model: str = "out/rm"  # the RM, which ranks the responses of a prompt
    out: str = ""  # output folder; empty: out/<method>
    iterations: int = 25  # rounds of sample, choose, update, as in 04; not given in the paper
    prompts_per_iteration: int = 48  # n, prompts of an iteration, as in 04; not given in the paper
    responses_per_prompt: int = 5  # N, responses sampled for each prompt; paper: 5
    temperature: float = 1.0  # sampling temperature; it divides the logits in sampling, update and reference alike
    max_new_tokens: int = 96  # longest response, tokens; authors' scripts: 2048
    truncation_penalty: float = 1.0  # taken off the normalised score of a response without EOS; not given in the paper
    beta: float = 0.1  # dpo, ipo, kto: strength of the pull to the reference, reward per nat; not given in the paper
    rounds: int = 3  # iterative_dpo: rounds, each of ceil(iterations / rounds), with new samples of the policy; paper: 3
    anchor_every: int = 25  # bond: iterations after which the anchor moves to the policy; paper: iterative, interval not given
    epochs: int = 1  # passes over the chosen responses of an iteration; not given in the paper
    minibatch_size: int = 48  # responses per optimiser step (24 pairs; with bond all responses of 9 prompts)
    micro_batch_size: int = 48  # responses per forward pass; smaller needs less memory and changes nothing else
    lr: float = 0.0  # learning rate (AdamW, constant); 0: the method's in LEARNING_RATES; not given in the paper
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm, over all parameters
    eval_every: int = 5  # iterations between two validations (greedy pass@1); the last iteration always has one
    save_every: int = 0  # also keep the policy of every so many iterations as out/iteration_<i>; 0: none
    resume: bool = False  # go on from the last finished iteration of an interrupted run
    generate_batch_size: int = 256  # responses generated at once
    score_batch_size: int = 64  # responses scored, or passed through frozen models, at once
    timeout: float = 1.0  # CPU seconds a program may take over its tests
    workers: int = 1  # sandbox processes, 0 = one a core; they run while the policy trains
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    threads: int = 0  # PyTorch CPU threads, 0 = PyTorch's choice
    seed: int = 0  # random seed: order of the prompts, sampling, minibatches


# -------------------------------------------------------------------------------------------- the losses, pure functions
#
# All log-probabilities are sums over the tokens of a response, so that a difference of two is the log of a likelihood ratio.


def raft_loss(logprobs):
    """Negative log-likelihood of the best of N, mean over responses (B,): the forward KL from pi_BoN, up to a constant."""
    return -logprobs.mean()


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """DPO (Rafailov et al. 2023, equation 7): -log sigmoid(beta h), mean over pairs; all (B,). log 2 at the reference.

    h is how much further the policy has raised the chosen response over the reference than the rejected one.
    """
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -F.logsigmoid(beta * h).mean()


def ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """IPO (Azar et al. 2023, equation 17): (h - 1 / (2 beta))^2, mean over pairs; all (B,).

    DPO's loss falls for ever as h grows, even where the preference was certain; this one comes back beyond 1 / (2 beta).
    """
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    return ((h - 1 / (2 * beta)) ** 2).mean()


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


def bond_rewards(scores):
    """log p(y)^(N-1), where p(y) is the share of the prompt's responses with a score of at most y's, itself among them.

    Args: scores: (P, N). Returns: (P, N): 0 for the best, (N - 1) log(1 / N) for the worst. Only ranks matter, so no
        reward is too large, and equal scores get equal rewards.
    """
    n = scores.shape[1]
    share = (scores[:, None, :] <= scores[:, :, None]).float().mean(2)  # (P, N)
    return (n - 1) * share.log()


def bond_loss(logprobs, anchor_logprobs, rewards):
    """The forward and the backward KL between policy and best-of-N policy of the anchor, 1 : 1, mean over prompts.

    Forward: -log pi of the best of N, a sample of the best-of-N policy. Backward: the expectation under the policy of
    log(pi / pi_BoN) = log(pi / pi_anchor) - log p^(N-1) - log N. Its gradient is that of the mean of -w A log pi, with
    A = log p^(N-1) - log(pi / pi_anchor), less the mean of the prompt's other responses (a baseline), and the importance
    weight w = pi / pi_anchor, since the samples are the anchor's; w stops at N, the largest value it has for pi_BoN.

    Args: logprobs, anchor_logprobs: (P, N), N at least 2; rewards: (P, N) from `bond_rewards`.
    Returns: scalar loss, {"forward_nll", "backward_kl"}: the two parts, without the baseline.
    """
    n = rewards.shape[1]
    forward = -logprobs.gather(1, rewards.argmax(1, keepdim=True)).mean()
    log_ratio = (logprobs - anchor_logprobs).detach()
    weight = log_ratio.exp().clamp(max=n)
    gain = rewards - log_ratio
    advantage = (gain - gain.mean(1, keepdim=True)) * n / (n - 1)  # g - (sum - g) / (N - 1)
    backward = -(weight * advantage * logprobs).mean()
    return forward + backward, {"forward_nll": forward.item(), "backward_kl": -(weight * gain).mean().item() - math.log(n)}


def best_and_worst(scores):
    """Indices of the best and the worst response of each prompt: scores (P, N) -> two (P,); ties in order of appearance."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[:, 0], order[:, -1]


def sampler_iteration(method, iteration, iterations, rounds, anchor_every):
    """After which iteration (0: SFT) the policy stood that gives an iteration (from 1) its samples.

    raft: the one before. bond: the anchor's last move. dpo, ipo, kto: never trained. iterative_dpo: the end of the round
    before, in rounds of equal length, of which the last may be shorter.
    """
    if method == "raft":
        return iteration - 1
    if method == "bond":
        return (iteration - 1) // anchor_every * anchor_every
    if method == "iterative_dpo":
        length = math.ceil(iterations / rounds)
        return (iteration - 1) // length * length
    return 0


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


# ---------------------------------------------------------------------------------------------------------------- main


def main(cfg):
    started = time.time()
    n, per_prompt = cfg.prompts_per_iteration, cfg.responses_per_prompt
    for name, least in (("responses_per_prompt", 2), ("rounds", 1), ("anchor_every", 1), ("iterations", 1), ("eval_every", 1)):
        if getattr(cfg, name) < least:
            fail(f"--{name} is {getattr(cfg, name)}; give at least {least}")
    if cfg.beta <= 0:
        fail(f"--beta is {cfg.beta}; give a positive number")
    pairs = cfg.method not in ("raft", "bond")
    out = Path(cfg.out or f"out/{cfg.method}")
    state_path = out / "state.pt"
    settings = dataclasses.replace(cfg, resume=False)
    if (out / "stage_config.json").is_file() or not cfg.resume:
        if finished(settings, out):
            return
    problems, validation = read_jsonl(cfg.data, PROBLEM_FIELDS), read_jsonl(cfg.validation, PROBLEM_FIELDS)
    device = set_up(cfg.threads)

    # ---- the policy learns; reference and reward model are frozen, and so is the sampler between its moves
    tokenizer = load_tokenizer(cfg.policy)
    policy = load_model(AutoModelForCausalLM, cfg.policy, device, len(tokenizer)).train()
    reference = load_model(AutoModelForCausalLM, cfg.policy, device, len(tokenizer), frozen=True).eval()
    reward_model = float32_head(load_model(AutoModelForSequenceClassification, cfg.reward_model, device, frozen=True)).eval()
    if not hasattr(reward_model.config, "reward_mean") or not hasattr(reward_model.config, "reward_std"):
        fail(f"{cfg.reward_model} has no reward_mean and reward_std in its config; train it with 02_reward_model.py")
    models = {"policy": policy}
    sampler = policy if cfg.method == "raft" else reference
    if cfg.method in ("bond", "iterative_dpo"):
        sampler = load_model(AutoModelForCausalLM, cfg.policy, device, len(tokenizer), frozen=True).eval()
        models["sampler"] = sampler
    if cfg.gradient_checkpointing:
        policy.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr or LEARNING_RATES[cfg.method], weight_decay=0.0)
    prompt_ids = [encode_prompt(tokenizer, problem["prompt"]) for problem in problems]
    validation_ids = [encode_prompt(tokenizer, problem["prompt"]) for problem in validation]
    check_lengths(problems + validation, prompt_ids + validation_ids, cfg.max_new_tokens, policy.config)

    def pass_at_1():
        """Share of validation problems solved by the greedy response."""
        with autocast(device):
            ids = generate(policy, tokenizer, validation_ids, 1, cfg.max_new_tokens, 0.0, None, cfg.generate_batch_size)
        texts = [decode_response(tokenizer, group[0]) for group in ids]
        results = run_tests(validation, texts, cfg.workers, cfg.timeout)
        return sum(result.passed for result in results) / len(results)

    def normalised_scores(prompts, responses):
        """RM rewards, normalised by their mean and standard deviation over responses of the SFT policy -> (B,).

        A text that is there twice has one reward: from two batches it would have two in bf16, and be ranked by the difference.
        """
        rewards = score_responses(reward_model, [p + r for p, r in zip(prompts, responses)], tokenizer.pad_token_id,
                                  cfg.score_batch_size)
        first = {}
        twins = [first.setdefault((*prompt, *response), k) for k, (prompt, response) in enumerate(zip(prompts, responses))]
        return (rewards[twins] - reward_model.config.reward_mean) / reward_model.config.reward_std

    def logprobs_of(model, mb):
        return response_logprobs(model, *model_inputs(mb), mb["response_ids"].shape[1], cfg.temperature)

    def summed_logprobs(model, mb):
        return (logprobs_of(model, mb) * mb["response_mask"]).sum(1)

    def token_logprobs(model, rows_batch, rows):
        """(B, T) without gradient, 0 on padding and on all other rows."""
        return forward_rows(lambda mb: logprobs_of(model, mb), rows_batch, rows, cfg.score_batch_size, device)

    def loss_of(mb, kl):
        """The method's loss on the groups of a micro-batch, whose rows stand one group after the other."""
        logprobs = summed_logprobs(policy, mb)
        if cfg.method == "raft":
            return raft_loss(logprobs), {}
        if cfg.method == "bond":
            return bond_loss(*(x.view(-1, per_prompt) for x in (logprobs, mb["frozen_logprobs"], mb["quantile_rewards"])))
        chosen, rejected = logprobs.view(-1, 2).unbind(1)
        ref_chosen, ref_rejected = mb["frozen_logprobs"].view(-1, 2).unbind(1)
        if cfg.method == "kto":
            loss = kto_loss(logprobs, mb["frozen_logprobs"], mb["desirable"], kl, cfg.beta)
        elif cfg.method == "ipo":
            loss = ipo_loss(chosen, rejected, ref_chosen, ref_rejected, cfg.beta)
        else:
            loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, cfg.beta)
        raised, lowered = (chosen - ref_chosen).detach(), (rejected - ref_rejected).detach()
        # That the chosen responses, too, become less probable is a known way in which these losses go wrong.
        statistics = {"chosen_logratio": raised.mean().item(), "rejected_logratio": lowered.mean().item(),
                      "accuracy": (raised > lowered).float().mean().item()}
        return loss, {**statistics, "kl": float(kl)} if cfg.method == "kto" else statistics

    # ---- start or resume. All that is random is seeded by the iteration's number: weights and metrics are the whole state.
    if cfg.resume and state_path.is_file():
        state = torch.load(state_path, map_location="cpu", weights_only=True, mmap=True)
        changed = [name for name, value in dataclasses.asdict(settings).items() if state["config"].get(name) != value]
        if changed:
            fail(f"{out} was started with other settings ({', '.join(changed)}); use the same flags to resume it")
        for name, model in models.items():
            model.load_state_dict(state["models"][name])
        optimizer.load_state_dict(state["optimizer"])
        metrics, best = state["metrics"], state["best"]
        if (out / "best.old").exists() and not (out / "best").exists():
            os.replace(out / "best.old", out / "best")  # killed between the two renames of save_model
        print(f"resuming {out} after iteration {metrics[-1]['iteration']}", flush=True)
    else:
        (out / "rollouts").mkdir(parents=True, exist_ok=True)
        best = pass_at_1()
        metrics = [{"iteration": 0, "validation_pass_at_1": best}]
        save_model(policy, tokenizer, out / "best")
        print(f"before training: validation pass@1 {best:.3f}, {time.time() - started:.0f} s", flush=True)
    background = concurrent.futures.ThreadPoolExecutor(1)

    for iteration in range(metrics[-1]["iteration"] + 1, cfg.iterations + 1):
        clock = [time.time()]
        seed = cfg.seed * 1_000_003 + iteration
        generator, cpu_generator = torch.Generator(device).manual_seed(seed), torch.Generator().manual_seed(seed)

        # ---- sample: N responses for each of n prompts, rows in order of prompt
        sampled_after = sampler_iteration(cfg.method, iteration, cfg.iterations, cfg.rounds, cfg.anchor_every)
        on_policy = sampled_after == iteration - 1
        if on_policy and "sampler" in models:
            sampler.load_state_dict(policy.state_dict())
        indices = iteration_prompts(len(problems), n, iteration, cfg.seed)
        with autocast(device):
            sampled = generate(sampler, tokenizer, [prompt_ids[i] for i in indices], per_prompt, cfg.max_new_tokens,
                               cfg.temperature, generator, cfg.generate_batch_size)
        row_problems = [problems[i] for i in indices for _ in range(per_prompt)]
        row_prompts = [prompt_ids[i] for i in indices for _ in range(per_prompt)]
        responses = [ids for group in sampled for ids in group]
        texts = [decode_response(tokenizer, ids) for ids in responses]
        # The tests label samples for the log alone, no loss ever sees them; they run while the policy trains.
        tests = background.submit(run_tests, row_problems, texts, cfg.workers, cfg.timeout)
        batch = make_batch(row_prompts, responses, tokenizer.pad_token_id)  # n * N rows
        clock.append(time.time())

        # ---- score
        rm_scores = normalised_scores(row_prompts, responses)  # (n * N,)
        truncated = torch.tensor([ids[-1] != tokenizer.eos_token_id for ids in responses])
        scores = rm_scores - cfg.truncation_penalty * truncated
        prompt_scores = scores.view(n, per_prompt)

        # ---- choose: within each prompt, the best, the best and the worst, or all
        every = torch.arange(n * per_prompt)
        chosen, rejected = (torch.arange(n) * per_prompt + columns for columns in best_and_worst(prompt_scores))
        if cfg.method == "raft":
            groups = chosen[:, None]
        elif cfg.method == "bond":
            groups = every.view(n, per_prompt)
        else:  # a prompt whose responses are all the same has no pair
            different = [responses[a] != responses[b] for a, b in zip(chosen.tolist(), rejected.tolist())]
            groups = torch.stack([chosen, rejected], 1)[torch.tensor(different)]  # (G, 2)
        kept = groups.flatten()
        batch["desirable"] = torch.zeros(len(every)).index_fill(0, chosen, 1.0)
        batch["quantile_rewards"] = bond_rewards(prompt_scores).flatten()
        clock.append(time.time())

        # ---- log-probabilities of the frozen models: the reference of the pairs, the anchor of BOND
        if cfg.method != "raft" and len(groups):
            batch["frozen_logprobs"] = token_logprobs(reference if pairs else sampler, batch, kept).sum(1)  # (n * N,)
        if cfg.method == "kto" and len(groups):  # the response of each row to the prompt of the pair before; row k is kept[k]
            shifted = groups.roll(1, 0).flatten()
            mismatched = make_batch([row_prompts[k] for k in shifted], [responses[k] for k in kept],
                                    tokenizer.pad_token_id)
            mismatched["frozen_logprobs"] = token_logprobs(reference, mismatched, torch.arange(len(kept))).sum(1)

        @torch.no_grad()
        def reference_point(numbers):
            """KTO's KL over the pairs of a minibatch; nothing to prepare for the other methods."""
            if cfg.method != "kto" or len(groups) < 2:  # with one pair there is no other prompt
                return 0.0
            rows = torch.stack([2 * numbers, 2 * numbers + 1], 1).flatten()
            logprobs = torch.cat([summed_logprobs(policy, take_rows(mismatched, part, device))
                                  for part in rows.split(cfg.score_batch_size)])
            return mismatched_kl(logprobs.cpu(), mismatched["frozen_logprobs"][rows]).item()

        clock.append(time.time())

        # ---- measure the policy on rollouts of its own, before the update: one response a prompt for KL and entropy
        own, own_rows, own_scores, own_truncated, own_tests = batch, every[::per_prompt], rm_scores, truncated, tests
        if not on_policy:
            own_prompts = [prompt_ids[i] for i in indices]
            with autocast(device):
                own_responses = [group[0] for group in generate(policy, tokenizer, own_prompts, 1, cfg.max_new_tokens,
                                                                cfg.temperature, generator, cfg.generate_batch_size)]
            own_texts = [decode_response(tokenizer, ids) for ids in own_responses]
            own_tests = background.submit(run_tests, [problems[i] for i in indices], own_texts, cfg.workers, cfg.timeout)
            own, own_rows = make_batch(own_prompts, own_responses, tokenizer.pad_token_id), torch.arange(n)
            own_scores = normalised_scores(own_prompts, own_responses)
            own_truncated = torch.tensor([ids[-1] != tokenizer.eos_token_id for ids in own_responses])
        own_mask = own["response_mask"]
        own_logprobs = token_logprobs(policy, own, own_rows)
        kl = (own_logprobs - token_logprobs(reference, own, own_rows))[own_rows]
        if iteration == 1 and not kl.abs().max() <= 1e-2:  # a wrong mask, position or temperature shows here
            fail(f"before the first update the largest log-ratio to the reference is {kl.abs().max():.4f} (must be 0): policy "
                 "and reference are not the same model")
        clock.append(time.time())

        # ---- train
        statistics, problem = {}, None
        try:
            if not (scores.isfinite().all() and kl.isfinite().all()):
                raise FloatingPointError("a reward or logprob is not a finite number")
            for _ in range(cfg.epochs if len(groups) else 0):
                statistics = train_groups(policy, optimizer, loss_of, batch, groups, cfg, cpu_generator, device,
                                          reference_point)
        except FloatingPointError as error:
            problem = error
        clock.append(time.time())

        # ---- log
        results, own_results = tests.result(), own_tests.result()
        clock.append(time.time())
        passed = torch.tensor([float(result.passed) for result in results])
        kept_set = set(kept.tolist())
        write_jsonl(out / "rollouts" / f"{iteration:04d}.jsonl", [
            {"task_id": row_problems[k]["task_id"], "prompt": row_problems[k]["prompt"], "response": texts[k],
             "rm_score": rm_scores[k].item(), "score": scores[k].item(), "actual_score": passed[k].item(),
             "passed_tests": results[k].passed_tests, "total_tests": results[k].total_tests,
             "status": results[k].status, "truncated": truncated[k].item(), "policy": f"{out}/{sampled_after + 1:04d}",
             "kept": k in kept_set, "best": bool(batch["desirable"][k])} for k in range(len(texts))])
        if problem:
            fail(f"iteration {iteration}: {problem}; its rollouts are in {out}/rollouts. Lower --lr")
        own_passed = sum(result.passed for result in own_results) / len(own_results)
        line = {"iteration": iteration, "rm_score": own_scores.mean().item(), "pass_rate": own_passed,
                "sampler_rm_score": rm_scores.mean().item(), "sampler_pass_rate": passed.mean().item(),
                "sampled_after": sampled_after, "pass_rate_kept": passed[kept].mean().item() if len(kept) else None,
                "kept": len(kept), "seen": len(texts), "only_measured": 0 if on_policy else len(own_results),
                "kl_per_token": masked_mean(kl, own_mask[own_rows]).item(), "kl_per_response": kl.sum(1).mean().item(),
                "entropy": -masked_mean(own_logprobs[own_rows], own_mask[own_rows]).item(),
                "truncated": own_truncated.float().mean().item(), "length": own_mask.sum(1).float().mean().item()}
        line.update({f"policy_{name}": value for name, value in statistics.items()})
        if iteration % cfg.eval_every == 0 or iteration == cfg.iterations:
            line["validation_pass_at_1"] = pass_at_1()
            if line["validation_pass_at_1"] > best:
                best = line["validation_pass_at_1"]
                save_model(policy, tokenizer, out / "best")
        clock.append(time.time())
        names = ("generate", "score", "forward", "measure", "train", "tests", "validate")
        line.update({f"seconds_{name}": round(b - a, 2) for name, a, b in zip(names, clock, clock[1:])})
        metrics.append(line)
        print(f"iteration {iteration:3d}  reward {line['rm_score']:+.2f}  pass rate {line['pass_rate']:.2f}  "
              f"KL {line['kl_per_response']:.2f}  kept {line['kept']}/{line['seen']}  "
              + (f"validation {line['validation_pass_at_1']:.3f}  " if "validation_pass_at_1" in line else "")
              + f"{time.time() - started:.0f} s", flush=True)

        # ---- save: state.pt is replaced last, so that a kill at any moment repeats this iteration and no more
        write_jsonl(out / "metrics.jsonl", metrics)
        if cfg.save_every and iteration % cfg.save_every == 0:
            save_model(policy, tokenizer, out / f"iteration_{iteration}")
        torch.save({"config": dataclasses.asdict(settings), "metrics": metrics, "best": best,
                    "models": {name: model.state_dict() for name, model in models.items()},
                    "optimizer": optimizer.state_dict()}, f"{state_path}.tmp")
        os.replace(f"{state_path}.tmp", state_path)

    save_model(policy, tokenizer, out / "last")
    plot_curves(metrics, out / "curves.png", f"{cfg.method}, seed {cfg.seed}")
    save_config(settings, out)
    print(f"saved {out}: best validation pass@1 {best:.3f}; stage 06_baselines ({cfg.method}) took {cost(started)}")


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
