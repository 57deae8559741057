"""What depends on the device: on the CPU always, on a GPU where there is one, all under bf16.

bf16 has eight bits. Computed in two ways, a logprob of these small models moves by some thousandths
of a nat; what a wrong mask or a wrong weight does to it is shown beside each bound.
"""

import copy
import random
import shutil

import pytest
import torch
from conftest import load_script
from test_models import config, draw_rows, load_policy, load_rm, sample

import sandbox

ROUNDING = 0.02  # nats, or standard deviations of the reward; mean over tokens
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request):
    torch.backends.cuda.enable_cudnn_sdp(False)  # as `set_up` of 04 does
    return torch.device(request.param)


def bf16(device):
    return torch.autocast(device.type, torch.bfloat16)


def forward(ppo, function, model, batch, device):
    """`logprobs_of` or `values_of` of a batch in bf16, all rows in one forward pass -> (B, T)."""
    cfg = config(ppo, score_batch_size=100)
    return ppo.forward_rows(function, model.to(device), batch, cfg, bf16(device))


def gap(ppo, one, other, batch):
    """Mean absolute difference over response tokens."""
    return ppo.masked_mean((one - other).abs(), batch["response_mask"]).item()


def test_ratio_one_and_kl_zero_at_the_first_step(ppo, model_folder, device, capsys):
    """The check that 04 makes: it passes, and it fails where a weight has moved since."""
    policy, cfg, amp = load_policy(ppo, model_folder).to(device).train(), config(ppo), bf16(device)
    prompts = draw_rows(6)[0]
    torch.manual_seed(0)
    with amp:
        responses, sampled = sample(ppo, policy, prompts, 2)
    batch = ppo.make_batch([prompt for prompt in prompts for _ in range(2)], responses)
    old, ref = ppo.policy_and_reference(policy, copy.deepcopy(policy), batch, cfg, amp)
    batch |= {"old_logprobs": old, "advantages": torch.ones(old.shape)}
    assert not (old - ref).any()  # the same weights in the same parts: not even rounding
    ppo.check_first_step(policy, batch, old - ref, sampled, cfg, amp)
    rows = ppo.take_rows(batch, torch.arange(len(old)), device)
    with amp, torch.no_grad():
        _, statistics = ppo.actor_loss(policy, rows, cfg)
    assert statistics["ratio"] == pytest.approx(1, abs=ROUNDING)
    with torch.no_grad():
        next(policy.parameters()).mul_(1.5)
    with pytest.raises(SystemExit):
        ppo.check_first_step(policy, batch, old - ref, sampled, cfg, amp)
    assert "the ratio is off 1" in capsys.readouterr().err


def test_padding_changes_nothing_beyond_rounding(ppo, model_folder, device):
    """Rows of very different lengths in one batch, and each row alone."""
    rng = random.Random(0)

    def draw(length):
        return [rng.randrange(2, 50) for _ in range(length)]

    prompts = [draw(length) for length in (2, 3, 5, 9, 14, 20, 27, 30)]
    responses = [draw(length) + [1] for length in (6, 2, 9, 4, 12, 7, 3, 10)]
    batch = ppo.make_batch(prompts, responses)
    no_mask = batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}
    models = {ppo.logprobs_of: load_policy(ppo, model_folder)}
    models[ppo.values_of] = load_rm(ppo, model_folder)
    for function, model in models.items():
        together = forward(ppo, function, model, batch, device)
        alone = torch.zeros(together.shape)
        for i, (prompt, response) in enumerate(zip(prompts, responses)):
            row = ppo.make_batch([prompt], [response])
            alone[i, : len(response)] = forward(ppo, function, model, row, device)[0]
        assert gap(ppo, together, alone, batch) < ROUNDING
        unmasked = forward(ppo, function, model, no_mask, device)
        assert gap(ppo, together, unmasked, batch) > 2 * ROUNDING


def test_a_merged_folder_is_the_policy_with_its_adapters(ppo, llama_folder, device, tmp_path):
    pytest.importorskip("peft")
    torch.manual_seed(0)
    policy = ppo.add_adapters(load_policy(ppo, llama_folder), 4, "CAUSAL_LM").to(device)
    batch, cfg = ppo.make_batch(*draw_rows(8, seed=3)), config(ppo)
    before = forward(ppo, ppo.logprobs_of, policy, batch, device)
    batch |= {"old_logprobs": before, "advantages": torch.ones(before.shape)}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    ppo.train_epoch(policy, optimizer, ppo.actor_loss, batch, cfg, generator, bf16(device))

    class Saver:
        def save_pretrained(self, folder):
            pass

    ppo.save_model(policy, Saver(), tmp_path / "merged")
    merged = load_policy(ppo, tmp_path / "merged")
    after = forward(ppo, ppo.logprobs_of, policy, batch, device)
    assert gap(ppo, after, forward(ppo, ppo.logprobs_of, merged, batch, device), batch) < ROUNDING
    assert gap(ppo, after, before, batch) > 2 * ROUNDING


def test_a_resumed_run_ends_as_the_unbroken_one(ppo, tmp_path, monkeypatch):
    """04 itself, on the device that it chooses. On a GPU the order of additions may change."""
    benchmark = load_script("tools/benchmark.py")
    sizes = benchmark.Config(prompts=4, prompt_tokens=12)
    policy, reward_model, problems = benchmark.prepare("tiny", tmp_path, sizes)
    tokenizer = sandbox.load_tokenizer(policy)
    names = {"policy": ppo.AutoModelForCausalLM}
    names["reward_model"] = ppo.AutoModelForSequenceClassification
    for name, model_class in names.items():
        torch.manual_seed(0)
        model = model_class.from_config(ppo.AutoConfig.from_pretrained(policy))
        ppo.save_model(model, tokenizer, tmp_path / name)
    sandbox.write_jsonl(tmp_path / "problems.jsonl", problems)
    flags = {name: str(tmp_path / name) for name in names}
    flags |= {name: str(tmp_path / "problems.jsonl") for name in ("data", "validation")}
    flags |= {"iterations": 2, "eval_every": 1, "critic_warmup": 0, "max_new_tokens": 8}
    flags |= {"prompts_per_iteration": 4, "minibatch_size": 4, "lr": 1e-2, "bf16": "on"}
    out, killed, unbroken = (tmp_path / name for name in ("out", "killed", "unbroken"))

    def copy_first(path, records, write=sandbox.write_jsonl):
        if path.name == "0002.jsonl":  # what a run leaves that is killed here, in iteration 2
            shutil.copytree(out, killed)
        write(path, records)

    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "write_jsonl", copy_first)
        ppo.main(ppo.Config(out=str(out), **flags))
    out.rename(unbroken)
    killed.rename(out)
    ppo.main(ppo.Config(out=str(out), resume=True, **flags))
    texts, weights = [], [load_policy(ppo, tmp_path / "policy")]
    for run in (unbroken, out):
        rows = sandbox.read_jsonl(run / "rollouts/0002.jsonl", {"response": str})
        texts.append([row["response"] for row in rows])
        weights.append(load_policy(ppo, run / "last"))
    assert texts[0] == texts[1]
    start, end, resumed = (
        torch.cat([p.detach().flatten() for p in model.parameters()]) for model in weights
    )
    assert (resumed - end).abs().mean() < 0.05 * (end - start).abs().mean()
