"""What verl needs besides out/sft and out/rm: problems in its format, and a critic.

The problems become chat prompts: verl always applies the tokenizer's chat template. The critic is
stage 4's: the reward model read at every token, in standard deviations of the reward.

Reads data/tiny/ppo.jsonl, data/tiny/validation.jsonl, out/rm.
Writes out/verl/ppo.jsonl, out/verl/validation.jsonl, out/verl/critic.

Run: python scale/to_verl.py
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForTokenClassification, AutoTokenizer


@dataclass
class Config:
    data: str = "data/tiny/ppo.jsonl"  # problems to train on
    validation: str = "data/tiny/validation.jsonl"  # problems to validate on
    reward_model: str = "out/rm"  # RM of stage 2
    out: str = "out/verl"  # output folder


def main(cfg):
    out = Path(cfg.out)
    out.mkdir(parents=True)
    for name, path in (("ppo", cfg.data), ("validation", cfg.validation)):
        with open(path, encoding="utf-8") as source, open(out / f"{name}.jsonl", "w") as target:
            for index, problem in enumerate(map(json.loads, source)):
                record = {
                    "prompt": [{"role": "user", "content": problem["prompt"]}],
                    "data_source": name,
                    "reward_model": {"style": "model", "ground_truth": problem["task_id"]},
                    "extra_info": {"index": index},
                }
                print(json.dumps(record), file=target)

    critic = AutoModelForTokenClassification.from_pretrained(cfg.reward_model, dtype=torch.float32)
    mean, std = critic.config.reward_mean, critic.config.reward_std
    critic.score.weight.data /= std
    critic.score.bias.data.fill_(-mean / std)  # this head has a bias, the reward model's has none
    critic.save_pretrained(out / "critic")
    AutoTokenizer.from_pretrained(cfg.reward_model).save_pretrained(out / "critic")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
