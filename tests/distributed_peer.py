"""One of the processes of tests/test_distributed.py: runs stages one after the other, then some optimiser steps by themselves.

torchrun --nproc_per_node=K tests/distributed_peer.py '[["01_sft.py", "--out", "out/sft", ...], ...]' steps.pt
"""

import json
import sys

import torch
import torch.distributed as dist
from conftest import ROOT, load_script, tiny_config


def optimiser_steps(ppo, folder, sharded):
    """Three epochs of stage 4's `train_epoch` on rows of different lengths, in minibatches that do not divide by two; the
    state goes through a file after the first -> {model: (statistics of each epoch, whole weights)}."""
    device = torch.device("cpu")
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 12, (2, 11), generator=generator).tolist()
    prompts, responses = ([torch.randint(3, 50, (length,), generator=generator).tolist() for length in column] for column in lengths)
    batch = ppo.make_batch(prompts, responses, 0)
    shape = batch["response_ids"].shape
    for name in ("old_logprobs", "advantages", "old_values", "returns"):
        batch[name] = torch.randn(shape, generator=generator) * batch["response_mask"]
    batch["old_logprobs"] -= 4.0  # about that of a random policy over 50 tokens
    cfg = ppo.Config(minibatch_size=7, micro_batch_size=2)
    results = {}
    for name, model_class in (("policy", ppo.AutoModelForCausalLM), ("policy, logits in parts", ppo.AutoModelForCausalLM),
                              ("critic", ppo.AutoModelForTokenClassification)):
        def fresh():
            torch.manual_seed(1)
            config = tiny_config("llama")
            config.tie_word_embeddings, config.num_labels, config.classifier_dropout = True, 1, 0.0
            model = model_class.from_config(config).train()
            if sharded:
                ppo.shard(model, device)
            return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

        def loss(mb):
            if name != "critic":
                logits_mb = 1e-3 if name.endswith("parts") else 0  # five positions at a time
                logprobs = ppo.response_logprobs_in_parts(model, *ppo.model_inputs(mb), mb["response_ids"].shape[1], 1.0, logits_mb)
                return ppo.policy_loss(logprobs, mb["old_logprobs"], mb["advantages"], mb["response_mask"], 0.2)
            values = ppo.response_values(model, *ppo.model_inputs(mb), mb["response_ids"].shape[1])
            return ppo.value_loss(values, mb["old_values"], mb["returns"], mb["response_mask"], 0.2)

        model, optimizer = fresh()
        statistics = []
        for epoch in range(3):
            order = torch.Generator().manual_seed(epoch)
            statistics.append(ppo.train_epoch(model, optimizer, loss, batch, torch.arange(11), cfg, order, device))
            if epoch == 0:  # as --resume does
                state = {"model": ppo.whole(model.state_dict()), "optimizer": ppo.whole(optimizer.state_dict())}
                if ppo.rank() == 0:
                    torch.save(state, folder / f"{name}.pt")
                if dist.is_initialized():
                    dist.barrier()
                model, optimizer = fresh()
                ppo.load_parts(model, optimizer, *torch.load(folder / f"{name}.pt").values())
        results[name] = statistics, ppo.whole(model.state_dict())
    return results


def main(stages, out):
    for sys.argv in stages:
        stage = load_script(sys.argv[0])
        stage.main(stage.parse_config(stage.Config, ""))
        dist.barrier()  # the next stage reads what rank 0 has just written
    ppo = load_script("04_pf_ppo.py")
    ppo.join_processes(torch.device("cpu"), ppo.Config())
    results = {kind: optimiser_steps(ppo, out.parent, kind == "sharded") for kind in ("shared", "sharded")}
    if dist.get_rank() == 0:
        torch.save(results, out)
    ppo.leave_processes()


if __name__ == "__main__":
    from pathlib import Path

    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
