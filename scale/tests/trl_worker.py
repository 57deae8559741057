"""One optimiser step of FilteredGRPOTrainer on a tiny random model; run by test_trl.py.

Saves what the test compares: all rows that were generated, the rows that were trained on, and the
gradient just before the optimiser's step.

Usage: torchrun --nproc_per_node 2 trl_worker.py OUT STRATEGY ACCUMULATION
"""

import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import GRPOConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pf_trl import FilteredGRPOTrainer
from reward_trl import reward_model

RESPONSES, PROMPTS, LENGTH = 5, 4, 8  # N, prompts in all, longest response


def tiny_models(folder):
    """A policy, a reward model and their tokenizer of 12 words, the same on every process."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *"abcdefghij"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, num_labels=1, bos_token_id=None,
        eos_token_id=1, pad_token_id=0, reward_mean=0.5, reward_std=2.0,
    )  # fmt: skip
    torch.manual_seed(0)
    policy, rm = LlamaForCausalLM(config), LlamaForSequenceClassification(config)
    for model in (policy, rm):
        for weight in model.parameters():
            weight.data.mul_(4 if weight.dim() == 2 else 1)  # outputs that differ clearly
    rm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return policy, tokenizer


class Recorder(TrainerCallback):
    """Keeps the gradients of the first optimiser step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {
            name.removeprefix("module."): weight.grad.clone()
            for name, weight in model.named_parameters()
        }


class RecordingTrainer(FilteredGRPOTrainer):
    """The trainer under test; what it generates and what it trains on is written down."""

    generated, trained = None, None

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        self.generated = {
            "prompts": prompts, "completion_ids": completion_ids, "rewards": rewards[:, 0]
        }  # fmt: skip
        return rewards

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.trained = [*(self.trained or []), {name: x.clone() for name, x in inputs.items()}]
        return super().compute_loss(model, inputs, *args, **kwargs)


def main(out, strategy, accumulation):
    out = Path(out)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    policy, tokenizer = tiny_models(out / f"rm{rank}")
    policy.save_pretrained(out / f"policy{rank}")
    args = GRPOConfig(
        output_dir=str(out), use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        gradient_checkpointing=False, num_generations=RESPONSES, max_completion_length=LENGTH,
        per_device_train_batch_size=PROMPTS * RESPONSES // world // accumulation,
        gradient_accumulation_steps=accumulation, max_steps=1, max_grad_norm=0.0, optim="sgd",
        logging_steps=1, seed=3, disable_tqdm=True,
    )  # fmt: skip
    recorder = Recorder()
    dataset = Dataset.from_dict({"prompt": ["a b c", "d e", "f", "g h i j a b"]})
    trainer = RecordingTrainer(
        policy, reward_model(out / f"rm{rank}"), args, train_dataset=dataset, strategy=strategy,
        processing_class=tokenizer, callbacks=[recorder],
    )  # fmt: skip
    trainer.train()
    torch.save(
        {
            "generated": trainer.generated,
            "trained": trainer.trained,
            "gradients": recorder.gradients,
            "log": trainer.state.log_history[0],
        },
        out / f"rank{rank}.pt",
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
