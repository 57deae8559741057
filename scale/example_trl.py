"""A smoke test of the filter under TRL: a few steps from out/sft with the reward of out/rm.

It shows that two processes, TRL, our checkpoints and the filter work together and that the reward
rises. Twenty steps say nothing about which filter is better.

Run: torchrun --nproc_per_node 2 scale/example_trl.py --strategy bw
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from datasets import Dataset
from pf_trl import FilteredGRPOTrainer
from reward_trl import reward_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

Strategy = Literal["bw", "br", "bon", "random2", "none"]


@dataclass
class Config:
    strategy: Strategy = "bw"  # the filter
    data: str = "data/tiny/ppo.jsonl"  # problems to train on
    validation: str = "data/tiny/validation.jsonl"  # the reward is compared on the first 48
    policy: str = "out/sft"  # SFT model
    reward_model: str = "out/rm"  # RM of stage 2
    out: str = "out/trl"  # TRL's output folder; nothing is saved in it here
    steps: int = 20  # optimiser steps, one for each batch of responses
    prompts: int = 12  # per process and step, 5 responses each
    lr: float = 1e-4  # policy learning rate; stage 4: 1e-4
    kl_coef: float = 0.1  # weight of the KL penalty in the loss (stage 4 has it in the reward)
    seed: int = 0  # prompts, sampling, filter


def read_prompts(path):
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return Dataset.from_list([{"prompt": json.loads(line)["prompt"]} for line in lines])


def main(cfg):
    args = GRPOConfig(
        output_dir=cfg.out,
        per_device_train_batch_size=cfg.prompts * 5,
        per_device_eval_batch_size=cfg.prompts * 5,
        num_generations=5,
        max_completion_length=96,
        max_steps=cfg.steps,
        learning_rate=cfg.lr,
        lr_scheduler_type="constant",
        beta=cfg.kl_coef,
        seed=cfg.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    trainer = FilteredGRPOTrainer(
        AutoModelForCausalLM.from_pretrained(cfg.policy, dtype=torch.float32),
        reward_model(cfg.reward_model),
        args,
        train_dataset=read_prompts(cfg.data),
        eval_dataset=read_prompts(cfg.validation).select(range(48)),
        processing_class=AutoTokenizer.from_pretrained(cfg.policy),
        strategy=cfg.strategy,
    )
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    after = trainer.evaluate()["eval_reward"]
    first = next(line for line in trainer.state.log_history if "filter/kept" in line)
    if trainer.is_world_process_zero():
        print(
            f"{cfg.strategy}: kept {first['filter/kept']:.0f} of {first['filter/seen']:.0f}, "
            f"validation reward {before:+.2f} before, {after:+.2f} after {cfg.steps} steps"
        )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
