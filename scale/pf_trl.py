"""PF-PPO's filter in TRL 1.16.0: a GRPOTrainer that trains on the filtered responses only.

    FilteredGRPOTrainer(policy, reward_function, args, train_dataset, strategy="bw")

TRL samples and scores N responses to each prompt and computes their advantages over all N. Then
the filter drops rows, before the policy is trained. The log shows filter/kept and filter/seen.

The method overridden here is TRL's internal one: keep the version pinned. See scale/README.md.
"""

import torch
from trl import GRPOTrainer


def select_fixed_number(rm_scores, strategy, generator):
    """Stage 4's `select_responses`, for the strategies that keep equally many of each prompt.

    Args: rm_scores: (n, N); generator: CPU torch.Generator of the draws.
    Returns: (rows, columns), two int64 tensors in order of prompt, then of response.
    """
    scores = torch.as_tensor(rm_scores, dtype=torch.float32)
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)  # 0 is the best
    noise = torch.rand(scores.shape, generator=generator)
    if strategy in ("br", "random2"):
        if strategy == "br":
            noise = noise.masked_fill(rank == 0, 2.0)  # the best first, then the largest noise
        keep = noise.argsort(-1, descending=True).argsort(-1) < 2
    elif strategy in ("bon", "bw"):
        keep = (rank == 0) | ((rank == scores.shape[-1] - 1) & (strategy == "bw"))
    elif strategy == "none":
        keep = torch.ones_like(scores, dtype=torch.bool)
    else:
        raise ValueError(
            f"strategy {strategy!r}: this engine needs one that keeps equally many responses of "
            "each prompt: bw, br, bon, random2, or none for all"
        )
    return keep.nonzero(as_tuple=True)


class FilteredGRPOTrainer(GRPOTrainer):
    """GRPOTrainer with a filter; strategy: bw, br, bon, random2, or none."""

    def __init__(self, *args, strategy, **kwargs):
        super().__init__(*args, **kwargs)
        self.strategy = strategy
        # Every process draws from one seed over the rewards of all, so all draw the same.
        self.generator = torch.Generator().manual_seed(self.args.seed)
        steps = self.args.steps_per_generation
        prompts, rest = divmod(self.args.per_device_train_batch_size * steps, self.num_generations)
        _, kept = select_fixed_number(
            torch.zeros(prompts, self.num_generations), strategy, torch.Generator()
        )
        if rest or len(kept) % steps:  # TRL would leave the odd rows out without a word
            raise ValueError(
                f"per_device_train_batch_size * steps_per_generation must be whole prompts of "
                f"{self.num_generations} responses, and what {strategy} keeps of them a multiple "
                f"of steps_per_generation {steps}"
            )

    def _calculate_rewards(self, *args):
        rewards_per_func = super()._calculate_rewards(*args)
        weights = self.reward_weights.to(rewards_per_func.device)
        self.rewards = (rewards_per_func * weights).nansum(1)  # of the rows of all processes
        return rewards_per_func

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:  # an evaluation counts every response
            return output
        if "num_images" in output:
            raise ValueError("the filter takes text only: images are not stored row by row")
        scores = self.rewards.view(-1, self.num_generations).cpu()
        rows, columns = select_fixed_number(scores, self.strategy, self.generator)
        kept = rows * self.num_generations + columns
        first = self.accelerator.process_index * len(inputs)
        local = kept[(kept >= first) & (kept < first + len(inputs))] - first
        output = {name: x[local] if x.ndim else x for name, x in output.items()}
        # The loss divides by this number of tokens: left as it was, gradients would be too small.
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        output["num_items_in_batch"] = self.accelerator.gather(mask.sum()).sum()
        self._metrics["train"]["filter/kept"].append(len(kept))
        self._metrics["train"]["filter/seen"].append(scores.numel())
        return output
