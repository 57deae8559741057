"""PF-PPO's filter in verl 0.9.1: a replay buffer that hands on the filtered responses only.

    trainer.v1.sampler.custom_sampler.path=scale/pf_verl.py
    trainer.v1.sampler.custom_sampler.name=FilteredReplayBuffer
    +trainer.v1.sampler.sampler_kwargs.strategy=bw

verl samples and scores N responses to each prompt and puts them into its TransferQueue. The trainer
then asks the replay buffer for a batch. Rows dropped here are gone before old and reference
logprobs, values, advantages and updates: none of these is computed for them, and advantages are
whitened over the kept rows. The log shows filter/kept, filter/seen and filter/score_seen.

The method overridden here is verl's internal one: keep the version pinned. See scale/README.md.
"""

from collections import defaultdict

import torch
import transfer_queue
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


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


class FilteredReplayBuffer(ReplayBuffer):
    """ReplayBuffer with a filter; sampler_kwargs.strategy: bw, br, bon, random2, or none."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.trainer_mode != "sync":
            raise ValueError(f"trainer_mode {self.trainer_mode!r}: the filter needs sync")
        self.strategy = self.sampler_kwargs["strategy"]
        select_fixed_number(torch.zeros(1, 2), self.strategy, torch.Generator())  # is it known?

    def sample(self, global_steps, partition_id, batch_size):
        batch, metrics = super().sample(global_steps, partition_id, batch_size)
        if partition_id == "val":  # validation counts every response
            return batch, metrics
        # A key is {uid}_{session}_{index}: the prompt, the response, its turn.
        if not all(key.endswith("_0") for key in batch.keys):
            raise ValueError("the filter takes responses of one turn: one key per response")
        data = transfer_queue.kv_batch_get(
            keys=batch.keys, partition_id=partition_id, select_fields=["rm_scores"]
        )
        scores = {key: row.sum().item() for key, row in zip(batch.keys, data["rm_scores"])}
        prompts = defaultdict(list)  # uid -> the keys of its responses
        for key in sorted(batch.keys):
            prompts[key.split("_")[0]].append(key)
        generator = torch.Generator().manual_seed(global_steps)
        kept = []
        for keys in prompts.values():
            prompt_scores = torch.tensor([[scores[key] for key in keys]])
            _, columns = select_fixed_number(prompt_scores, self.strategy, generator)
            kept += [keys[i] for i in columns]
        dropped = sorted(set(batch.keys) - set(kept))
        if dropped:
            transfer_queue.kv_clear(keys=dropped, partition_id=partition_id)
        metrics["filter/kept"] = len(kept)
        metrics["filter/seen"] = len(batch.keys)
        metrics["filter/score_seen"] = sum(scores.values()) / len(scores)
        return batch.select_keys(kept), metrics
