"""pf_trl.py in the real TRL: what is trained on, and with which gradient."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from pf_trl import FilteredGRPOTrainer  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402
from trl import GRPOConfig  # noqa: E402
from trl_worker import LENGTH, PROMPTS, RESPONSES, tiny_models  # noqa: E402

WORKER = Path(__file__).with_name("trl_worker.py")


def rows_of(batches):
    """(prompt ids, response ids, advantage) of each row that was trained on, without padding."""
    rows = []
    for batch in batches:
        for i, advantage in enumerate(batch["advantages"].tolist()):
            parts = [
                tuple(batch[f"{part}_ids"][i][batch[f"{part}_mask"][i].bool()].tolist())
                for part in ("prompt", "completion")
            ]
            rows.append((*parts, round(advantage, 4)))
    return sorted(rows)


@pytest.mark.parametrize(
    ("strategy", "processes", "accumulation"),
    [("bw", 1, 1), ("bw", 2, 1), ("br", 2, 2), ("random2", 2, 1), ("bon", 1, 2)],
)
def test_one_step(ppo, tmp_path, strategy, processes, accumulation):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc_per_node", processes, WORKER, tmp_path, strategy, accumulation,
    ]  # fmt: skip
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{i}.pt", weights_only=False) for i in range(processes)]

    # The rewards are stage 4's: read at the EOS, normalised, less 1 for a truncated response.
    _, tokenizer = tiny_models(tmp_path / "tokenizer")
    prompts = [tokenizer(p).input_ids for r in ranks for p in r["generated"]["prompts"]]
    responses = [ids for r in ranks for ids in r["generated"]["completion_ids"]]
    assert len(prompts) == len(responses) == PROMPTS * RESPONSES
    rm = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm0")
    scores = ppo.score_responses(rm, [p + r for p, r in zip(prompts, responses)], 64)
    truncated = torch.tensor([row[-1] != tokenizer.eos_token_id for row in responses])
    assert 0 < truncated.sum() < len(truncated)
    rewards = ppo.normalised(scores, rm) - truncated.float()
    for rank in ranks:  # each process knows the rewards of all
        torch.testing.assert_close(rank["generated"]["rewards"], rewards, atol=1e-5, rtol=1e-5)

    # Trained on: exactly the rows that stage 4's filter keeps, each with its own prompt, response
    # and advantage; advantages are over all N of a prompt.
    groups = ranks[0]["generated"]["rewards"].view(PROMPTS, RESPONSES)
    generator = torch.Generator().manual_seed(3)
    rows, columns = ppo.select_responses(groups, strategy, generator)
    kept = (rows * RESPONSES + columns).tolist()
    if strategy == "bw":  # by hand: the best, and of equal worst ones the last
        order = [sorted(range(RESPONSES), key=lambda i: -group[i]) for group in groups.tolist()]
        ends = [[RESPONSES * p + o[0], RESPONSES * p + o[-1]] for p, o in enumerate(order)]
        assert sorted(kept) == sorted(sum(ends, []))
    mean, std = groups.mean(1, keepdim=True), groups.std(1, keepdim=True)
    advantages = ((groups - mean) / (std + 1e-4)).flatten()
    expected = [(tuple(prompts[k]), tuple(responses[k]), advantages[k].item()) for k in kept]
    trained = rows_of([batch for r in ranks for batch in r["trained"]])
    assert trained == sorted((p, r, round(a, 4)) for p, r, a in expected)
    assert ranks[0]["log"]["filter/kept"] == len(kept)
    assert ranks[0]["log"]["filter/seen"] == PROMPTS * RESPONSES

    # The gradient is that of stage 4's loss on these rows, however they are split.
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy0")
    batch = ppo.make_batch([prompts[k] for k in kept], [responses[k] for k in kept])
    mask = batch["response_mask"]
    logprobs = ppo.response_logprobs(policy, *ppo.model_inputs(batch), mask.shape[1], 1.0)
    repeated = advantages[kept][:, None].expand(mask.shape)
    loss, _ = ppo.policy_loss(logprobs, logprobs.detach(), repeated, mask, 0.2)
    loss.backward()
    gradients = {name: weight.grad for name, weight in policy.named_parameters()}
    assert gradients.keys() == ranks[0]["gradients"].keys()
    for rank in ranks:
        for name, gradient in rank["gradients"].items():
            torch.testing.assert_close(gradient, gradients[name], atol=2e-6, rtol=1e-4)


def make_trainer(tmp_path, strategy, **settings):
    policy, tokenizer = tiny_models(tmp_path / "rm")
    args = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none",
        num_generations=RESPONSES, max_completion_length=LENGTH, **settings,
    )  # fmt: skip
    return FilteredGRPOTrainer(
        policy, lambda completion_ids, **columns: [0.0 for _ in completion_ids], args,
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}), strategy=strategy,
        processing_class=tokenizer,
    )  # fmt: skip


@pytest.mark.parametrize("strategy", ["top", "top_random", "top_bottom", "pow_2", "best"])
def test_other_strategies_are_refused_by_name(tmp_path, strategy):
    with pytest.raises(ValueError, match=f"'{strategy}'"):
        make_trainer(tmp_path, strategy, per_device_train_batch_size=RESPONSES)


def test_rows_that_trl_would_drop_are_refused(tmp_path):
    # Three prompts of five in five micro-batches: bon keeps three rows, and 3 // 5 is 0 rows each.
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}
    with pytest.raises(ValueError, match="multiple of steps_per_generation 5"):
        make_trainer(tmp_path, "bon", **sizes)
    make_trainer(tmp_path, "none", **sizes)
