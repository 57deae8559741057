"""Stage 2's reward model as a reward manager for verl 0.9.1; it scores token ids.

    reward.reward_manager.source=importlib
    reward.reward_manager.name=RewardModelManager
    reward.reward_manager.module.path=scale/reward_verl.py
    reward.reward_model.model_path=out/rm

Given reward.reward_model.enable=True instead, verl would score the decoded text. It has lost its
EOS, where the reward model was trained to give its score. verl's reward workers own no GPU: this
manager is for reward models that a CPU can carry.
"""

import torch
from transformers import AutoModelForSequenceClassification
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

TRUNCATION_PENALTY = 1.0  # as in stage 4


class RewardModelManager(RewardManagerBase):
    """The reward model's score in standard deviations, as stage 4 uses it."""

    def __init__(self, config, tokenizer, compute_score, **services):
        super().__init__(config, tokenizer, compute_score)
        path = config.reward.reward_model.model_path
        self.model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
        self.model.eval()

    @torch.no_grad()
    async def run_single(self, data):
        batch = data.batch[-1]  # the last turn, if there are several
        mask = batch["attention_mask"].bool()
        prompt_length = len(batch["prompts"])
        prompt = batch["prompts"][mask[:prompt_length]]
        response = batch["responses"][mask[prompt_length:]]
        score = self.model(torch.cat([prompt, response])[None]).logits[0, 0].item()
        score = (score - self.model.config.reward_mean) / self.model.config.reward_std
        if response[-1] != self.tokenizer.eos_token_id:
            score -= TRUNCATION_PENALTY
        return {"reward_score": score, "reward_extra_info": {}}
