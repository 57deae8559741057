"""Stage 1, supervised fine-tuning (SFT): teach a causal language model to answer prompts with code.

The loss is the cross-entropy of the response tokens alone. The end-of-sequence token (EOS) is one
of them: a model that never saw it as a target would never stop.

    L = -mean over response tokens of log pi(y_t | x, y_<t)

Reads data/tiny/sft.jsonl:
{"task_id": "tiny/sft/0", "prompt": "...", "solution": "    return sum(xs)\\n"}

Writes out/sft/: an ordinary Hugging Face folder (model and tokenizer) with metrics.jsonl:
{"step": 50, "train_loss": 1.91, "validation_loss": 1.62, "lr": 0.002}

While the stage runs, the folder holds state.pt for --resume instead.

Run: python 01_sft.py

or: python 01_sft.py --model Qwen/Qwen2.5-Coder-0.5B --data data/leetcodedataset/sft.jsonl
    --lr 1e-5 --max_length 1024 --out out/qwen/sft

Simplified against the paper (section 4: deepseek-coder-6.7b, 130k examples, learning rate 1e-5):
the tiny setting builds a model of a million parameters and trains it on 6,000 small programs. Many
of them are wrong on purpose, so that the later stages have something to improve.
"""

import copy
import math
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tokenizers
import torch
import torch.nn.functional as F
import transformers
import tyro
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.optimization import get_cosine_schedule_with_warmup

import sandbox


@dataclass
class Config:
    data: str = "data/tiny/sft.jsonl"  # examples, JSONL; 5% are held out for the validation loss
    out: str = "out/sft"  # folder for the fine-tuned model
    model: str = "scratch"  # builds the tiny model; or a Hugging Face name or folder
    plain: bool = False  # leave the tokenizer's chat template out, here and in all later stages
    epochs: float = 4.5  # passes over the examples; paper: 5
    batch_size: int = 64  # examples per optimiser step; not given in the paper
    micro_batch_size: int = 64  # examples per forward and backward pass; changes memory only
    lr: float = 2e-3  # peak learning rate of AdamW; paper: 1e-5 (a pretrained model)
    warmup: float = 0.05  # share of the steps in which the learning rate rises; a cosine follows
    weight_decay: float = 0.1  # of AdamW, on matrices only; not given in the paper
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    max_length: int = 512  # longest prompt and response together, tokens; longer ones are left out
    log_every: int = 50  # steps between two lines of the log, each of which saves state.pt
    resume: bool = False  # go on from the last state.pt of an interrupted run
    vocab_size: int = 1024  # scratch only: most tokens of the byte-level BPE, at least 258
    hidden_size: int = 128  # scratch only: width of the model, a multiple of 32
    layers: int = 4  # scratch only: transformer blocks
    gradient_checkpointing: bool = False  # recompute activations: less memory, a third more time
    bf16: Literal["auto", "on", "off"] = "auto"  # autocast over float32 weights; auto: on a GPU
    lora_rank: int = 0  # train LoRA adapters of this rank (needs peft); 0: train all weights
    threads: int = 0  # PyTorch CPU threads, 0: PyTorch's choice
    seed: int = 0  # initial weights, held-out examples, order of the batches


# ------------------------------------------------------------------------------------- the loss


def response_loss(logits, labels):
    """Cross-entropy summed over response tokens, nats.

    Args:
        logits: (B, L, V), `logits[:, t]` predicts token t + 1.
        labels: (B, L) token ids, -100 on the prompt and on padding.
    """
    targets = labels[:, 1:].flatten()
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=-100, reduction="sum"
    )


def collate(examples, pad_id):
    """Pad (prompt ids, response ids) pairs on the right -> input_ids, labels, both (B, L).

    Padding comes after every real token, where causal attention never looks, so that no attention
    mask is needed.
    """
    input_ids = [torch.tensor(prompt + response) for prompt, response in examples]
    labels = [torch.tensor([-100] * len(p) + response) for p, response in examples]  # EOS is last
    return pad_sequence(input_ids, True, pad_id), pad_sequence(labels, True, -100)


# ------------------------------------------------------------------------ the model from scratch


def build_tokenizer(texts, vocab_size):
    """A byte-level BPE tokenizer trained on `texts`. It encodes any text and gives it back."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def build_model(cfg, tokenizer):
    """A small Llama with random weights: heads of 32 dimensions, an MLP three times as wide."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=cfg.hidden_size,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.hidden_size // 32,
        intermediate_size=3 * cfg.hidden_size,
        max_position_embeddings=cfg.max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


# ------------------------------------------------------------------------------------------- main


def main(cfg):
    started = time.time()
    sandbox.check_numbers(cfg)
    out = Path(cfg.out)
    if sandbox.finished(cfg, out, cfg.resume):
        return
    records = sandbox.read_jsonl(cfg.data, {"task_id": str, "prompt": str, "solution": str})
    device, amp = set_up(cfg)

    # ---- model and tokenizer
    if cfg.model == "scratch":
        if cfg.hidden_size % 32:
            sandbox.fail(f"--hidden_size {cfg.hidden_size}: it must be a multiple of 32")
        if cfg.lora_rank:
            sandbox.fail("--lora_rank adapts a trained model; name one with --model")
        tokenizer = build_tokenizer([r["prompt"] + r["solution"] for r in records], cfg.vocab_size)
        model = build_model(cfg, tokenizer)
    else:
        tokenizer = sandbox.load_tokenizer(cfg.model, cfg.plain, policy=True)
        model = load_model(AutoModelForCausalLM, cfg.model, tokenizer)
    context = getattr(model.config, "max_position_embeddings", None) or cfg.max_length
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if cfg.lora_rank:
        model = add_adapters(model, cfg.lora_rank, "CAUSAL_LM")
    model.to(device).train()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} million parameters, {len(tokenizer)} tokens, {device}")

    # ---- examples
    rng, batches = random.Random(cfg.seed), []
    train, validation = split_examples(records, tokenizer, min(cfg.max_length, context), rng)
    lengths = [len(prompt) + len(response) for prompt, response in train]
    steps = math.ceil(cfg.epochs * math.ceil(len(train) / cfg.batch_size))
    while len(batches) < steps:
        batches += length_grouped_batches(lengths, cfg.batch_size, rng)  # one epoch

    # ---- optimiser, start or resume. The batches follow from the seed and dropout is 0, so that
    # weights, optimiser and schedule are the whole state.
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95))
    scheduler = get_cosine_schedule_with_warmup(optimizer, round(cfg.warmup * steps), steps)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    done, metrics, losses = 0, [], []
    if out.exists():
        state = load_state(out, parts)
        done, metrics = state["step"], state["metrics"]
        print(f"resuming {out} after step {done} of {steps}")
    else:
        shutil.rmtree(f"{out}.tmp", ignore_errors=True)  # of a run that was killed

    # ---- train
    pad_id = tokenizer.pad_token_id
    with sandbox.progress_bar(steps, "training") as bar:
        bar.update(done)
        for step in range(done + 1, steps + 1):
            batch = [train[i] for i in batches[step - 1]]
            # One token count per optimiser step, so that the micro-batch size changes nothing.
            tokens = sum(len(response) for _, response in batch)
            step_loss = 0.0
            for start in range(0, len(batch), cfg.micro_batch_size):
                part = batch[start : start + cfg.micro_batch_size]
                with amp:
                    loss = batch_loss(model, part, pad_id) / tokens
                loss.backward()
                step_loss += loss.item()
            torch.nn.utils.clip_grad_norm_(
                model.parameters(), cfg.max_grad_norm, error_if_nonfinite=True
            )
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(step_loss)
            bar.update()

            # ---- log and save
            if step % cfg.log_every == 0 or step == steps:
                line = {
                    "step": step,
                    "train_loss": sum(losses) / len(losses),
                    "validation_loss": mean_loss(model, validation, pad_id, cfg, amp),
                    "lr": scheduler.get_last_lr()[0],
                }
                metrics.append(line)
                losses = []
                save_state(cfg, out, parts, step=step, metrics=metrics)
                bar.clear()
                print(
                    f"step {step}/{steps}  train loss {line['train_loss']:.3f}  "
                    f"validation loss {line['validation_loss']:.3f}  lr {line['lr']:.1e}  "
                    f"{time.time() - started:.0f} s",
                    flush=True,
                )

    save_model(model, tokenizer, out)
    sandbox.write_jsonl(out / "metrics.jsonl", metrics)
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


# --------------------------------------------------------------------------- examples and batches


def split_examples(records, tokenizer, limit, rng):
    """(prompt ids, response ids) pairs of at most `limit` tokens -> training, validation (5%)."""
    examples = [
        (
            sandbox.encode_prompt(tokenizer, r["prompt"]),
            sandbox.encode_response(tokenizer, r["solution"]),
        )
        for r in records
    ]
    kept = [e for e in examples if len(e[0]) + len(e[1]) <= limit]
    if len(kept) < len(examples):
        print(
            f"left out {len(examples) - len(kept)} of {len(examples)} examples: over {limit} tokens"
        )
    if len(kept) < 2:
        sandbox.fail(f"it takes two examples of at most {limit} tokens; raise --max_length")
    rng.shuffle(kept)
    held_out = max(1, round(0.05 * len(kept)))
    return kept[held_out:], kept[:held_out]


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


def batch_loss(model, examples, pad_id):
    """`response_loss` of some examples."""
    input_ids, labels = collate(examples, pad_id)
    logits = model(input_ids=input_ids.to(model.device), use_cache=False).logits
    return response_loss(logits, labels.to(model.device))


@torch.no_grad()
def mean_loss(model, examples, pad_id, cfg, amp):
    """Mean loss per response token, nats."""
    total = 0.0
    for start in range(0, len(examples), cfg.micro_batch_size):
        part = examples[start : start + cfg.micro_batch_size]
        with amp:
            total += batch_loss(model, part, pad_id).item()
    return total / sum(len(response) for _, response in examples)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
