"""`python 04_pf_ppo.py --plan` (tools/plan.py): what it counts from configs is what there is."""

import importlib.util
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load_script, tiny_config
from test_models import DEVICE, Tokens
from test_real_models import saved_bytes

PLAN = load_script("tools/plan.py")


@pytest.fixture(params=[(kind, rank) for kind in ("llama", "qwen2", "gpt2") for rank in (0, 4)],
                ids=lambda p: f"{p[0]}-lora{p[1]}")
def planned(request, ppo, tmp_path):
    """(cfg, its plan, the models as `main` builds them) for a policy and an RM of some size."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind, rank = request.param
    if rank and not importlib.util.find_spec("peft"):
        pytest.skip("peft is not installed: requirements-lora.txt")
    config = tiny_config(kind)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "policy")
    config.num_labels, config.reward_mean, config.reward_std = 1, 0.0, 1.0
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "rm")
    cfg = ppo.Config(policy=str(tmp_path / "policy"), reward_model=str(tmp_path / "rm"), lora_rank=rank, prompt_tokens=9,
                     max_new_tokens=15, micro_batch_size=6, minibatch_size=12, prompts_per_iteration=4)
    policy = ppo.load_model(AutoModelForCausalLM, cfg.policy, DEVICE, frozen=rank > 0)
    models = {"policy": ppo.add_adapters(policy, rank, torch.float32, 0) if rank else policy}
    models["reward model"] = ppo.load_model(AutoModelForSequenceClassification, cfg.reward_model, DEVICE, frozen=True)
    models["critic"] = ppo.load_critic(cfg, models["reward model"], DEVICE)
    return cfg, PLAN.memory_plan(ppo, cfg), models


def test_the_plan_counts_what_is_there(ppo, planned):
    """Weights, gradients and optimiser states exactly; activations within 15%, counted by autograd's own hooks."""
    cfg, plan, models = planned
    rng = torch.Generator().manual_seed(0)
    length = cfg.prompt_tokens + cfg.max_new_tokens
    ids = torch.randint(2, 50, (cfg.micro_batch_size, length), generator=rng)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padding, so that attention gets a mask
    tensors = {id(t): t for model in models.values() for t in (*model.parameters(), *model.buffers())}  # shared ones once
    weights = sum(t.numel() * t.element_size() for t in tensors.values())
    planned_weights = {name: role["weights"] for name, role in plan["roles"].items()}
    assert ("reference" in planned_weights) == (cfg.lora_rank == 0)
    assert sum(planned_weights.values()) - planned_weights.pop("reference", 0) == weights
    held, training = weights + plan["roles"].get("reference", {"weights": 0})["weights"], {}
    for role in ("policy", "critic"):
        model, row = models[role], plan["roles"][role]
        if role == "policy":
            forward = partial(ppo.response_logprobs_in_parts, model, ids, mask, cfg.max_new_tokens, 1.0, 50 * 8 / 2**18)
        else:
            forward = partial(ppo.response_values, model, ids, mask, cfg.max_new_tokens)
        counted, result = saved_bytes(forward, model)
        assert plan["parts"][f"train {role}: activations"] == pytest.approx(counted, rel=0.15)
        result.sum().backward()
        learned = [p for p in model.parameters() if p.requires_grad]
        assert row["gradients"] == sum(p.grad.numel() * p.grad.element_size() for p in learned)
        optimizer = torch.optim.AdamW(learned)
        optimizer.step()
        states = [t for state in optimizer.state.values() for t in state.values()]
        assert row["optimiser"] == sum(t.numel() * t.element_size() for t in states)
        assert row["learned"] == sum(p.numel() for p in learned)
        held += row["optimiser"]
        logits = 4 * 4 * cfg.micro_batch_size * cfg.max_new_tokens * 50 if role == "policy" else 0  # four float32 of each
        assert plan["parts"][f"train {role}: logits"] == logits
        training[role] = row["gradients"] + plan["parts"][f"train {role}: activations"] + logits
    for role, size in training.items():  # the peaks: what is always there, and what this phase adds
        assert plan["phases"][f"train {role}"] == held + size
    cache = 2 * config_numbers(models["policy"].config) * 4 * length * cfg.prompts_per_iteration * cfg.responses_per_prompt
    assert plan["parts"]["KV cache"] == cache
    assert held + cache < plan["phases"]["generate"] < held + cache + 2**20 and plan["phases"]["score"] > held


def config_numbers(config):
    """Numbers that a layer's keys have for a token, times the layers."""
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return config.num_hidden_layers * heads * config.hidden_size // config.num_attention_heads


def test_the_plan_of_a_gpu(ppo, planned):
    """With --card_gb: frozen matrices, the cache and the copies for autocast in bf16; with checkpointing fewer activations; one
    response a prompt means more prompts at once."""
    cfg, cpu, models = planned
    gpu = PLAN.memory_plan(ppo, ppo.dataclasses.replace(cfg, card_gb=1.0))
    assert gpu["parts"]["KV cache"] * 2 == cpu["parts"]["KV cache"]
    frozen = "policy" if cfg.lora_rank else "reference"
    matrices = sum(2 * m.weight.numel() for m in models["policy"].modules() if isinstance(m, (torch.nn.Linear, ppo.Conv1D))
                   and getattr(m, "weight", None) is not None and m.weight.shape[0] != 50 and min(m.weight.shape) > 4)
    saved = cpu["roles"][frozen]["weights"] - gpu["roles"][frozen]["weights"]
    assert saved == pytest.approx(matrices, rel=0.1)
    assert gpu["roles"]["critic"]["optimiser"] == cpu["roles"]["critic"]["optimiser"]  # what learns stays float32
    assert cfg.lora_rank or gpu["parts"]["bf16 copies"] >= matrices
    less = PLAN.memory_plan(ppo, ppo.dataclasses.replace(cfg, gradient_checkpointing=True))
    name = "train policy: activations"
    length = cfg.prompt_tokens + cfg.max_new_tokens
    block = PLAN.activation_bytes(PLAN.empty_models(ppo, cfg, False, layers=1)["policy"], cfg.micro_batch_size, length, False)
    inputs = 4 * 2 * cfg.micro_batch_size * length * 32  # of two layers of width 32
    assert less["parts"][name] == block + inputs < cpu["parts"][name]
    single = PLAN.memory_plan(ppo, ppo.dataclasses.replace(cfg, strategy="single"))
    assert single["parts"]["KV cache"] == cpu["parts"]["KV cache"]
    assert single["parts"]["prefill"] == pytest.approx(cfg.responses_per_prompt * cpu["parts"]["prefill"], rel=0.01)


def test_the_plan_counts_the_cache(ppo, planned):
    """The KV cache as `generate` allocates it, all rows at their longest."""
    cfg, plan, models = planned
    sizes = []
    select = ppo.PreallocatedLayer.batch_select_indices

    def spy(layer, indices):
        select(layer, indices)
        sizes.append(sum(buffer.untyped_storage().nbytes() for buffer in layer.buffers))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo.PreallocatedLayer, "batch_select_indices", spy)
        prompts = [[5] * cfg.prompt_tokens] * cfg.prompts_per_iteration
        ppo.generate(models["policy"], Tokens, prompts, cfg.responses_per_prompt, cfg.max_new_tokens, 1.0,
                     torch.Generator().manual_seed(0), cfg.generate_batch_size)
    assert plan["parts"]["KV cache"] == sum(sizes[:models["policy"].config.num_hidden_layers])


def test_the_plan_of_a_1_5b_model_is_printed_and_judged(ppo, tmp_path, monkeypatch, capsys):
    """Qwen2.5-Coder-1.5B, from its config: 1.54 billion parameters, too much for 24 GB, and fine on 80 GB."""
    from transformers import Qwen2Config

    Qwen2Config(vocab_size=151936, hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
                intermediate_size=8960, tie_word_embeddings=True, eos_token_id=151643).save_pretrained(tmp_path / "qwen")
    monkeypatch.chdir(tmp_path)
    output = {}
    for card in (24, 80):
        ppo.main(ppo.Config(plan=True, policy=str(tmp_path / "qwen"), reward_model=str(tmp_path / "qwen"), max_new_tokens=512,
                            micro_batch_size=4, gradient_checkpointing=True, card_gb=card))
        output[card] = capsys.readouterr().out
    assert "1543.7 M" in output[24] and "does NOT fit" in output[24] and "--lora_rank" in output[24]
    assert "it fits" in output[80] and "KV cache" in output[80]
    assert not (tmp_path / "out").exists()  # a plan writes nothing


def test_the_plan_of_a_model_that_is_not_there_is_refused(ppo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        ppo.main(ppo.Config(plan=True, policy="out/nothing"))
    assert stopped.value.code == 2 and "no model at out/nothing" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [{"card_gb": -24.0}, {"prompt_tokens": 0}])
def test_a_plan_for_no_card_or_no_prompt_is_refused(ppo, capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        ppo.main(ppo.Config(plan=True, **flags))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "a card has more than 0 GB" in error and error.count("\n") == 1


def test_without_the_tools_the_plan_says_what_is_missing(tmp_path):
    for name in ("04_pf_ppo.py", "sandbox.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run([sys.executable, "04_pf_ppo.py", "--plan"], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and "tools/plan.py" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_a_gpu_the_plan_is_the_measured_peak_and_less_than_the_plain_way(checkpointing):
    """A PPO step of the shape of Qwen2.5-Coder-0.5B, as tools/benchmark.py makes it."""
    benchmark = load_script("tools/benchmark.py")
    args = SimpleNamespace(threads=0, lora_rank=0, repeats=1, prompt_tokens=256, max_new_tokens=256, minibatch_size=16,
                           micro_batch_size=8, logits_mb=512, gradient_checkpointing=checkpointing)
    ours, plain = (benchmark.measure("qwen2.5-coder-0.5b", "train", way, args)["peak"] for way in (False, True))
    assert benchmark.planned_peak("qwen2.5-coder-0.5b", args) == pytest.approx(ours, rel=0.15)
    assert ours < 0.85 * plain
