"""Stage 2's reward model as a reward function for TRL 1.16.0: reward_model("out/rm")."""

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def reward_model(folder, truncation_penalty=1.0):
    """A reward function for TRL: stage 2's score in standard deviations, as stage 4 uses it.

    Given the folder itself, TRL would score the decoded text. It has lost its EOS, where the
    reward model was trained to give its score, and other responses come out best.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def reward(prompts, completion_ids, **columns):
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        if isinstance(prompts[0], str):
            prompt_ids = tokenizer(prompts).input_ids
        else:
            prompt_ids = tokenizer.apply_chat_template(
                prompts, add_generation_prompt=True, return_dict=False
            )
        ids = [prompt + completion for prompt, completion in zip(prompt_ids, completion_ids)]
        batch = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
        scores = model(**batch.to(model.device)).logits[:, 0].float().cpu()
        scores = (scores - model.config.reward_mean) / model.config.reward_std
        truncated = torch.tensor([row[-1] != tokenizer.eos_token_id for row in completion_ids])
        return (scores - truncation_penalty * truncated).tolist()

    return reward
