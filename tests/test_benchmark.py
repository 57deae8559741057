"""tools/benchmark.py on the CPU: its FLOPs, and that each phase runs both ways on the same work."""

from types import SimpleNamespace

import conftest
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCHMARK = conftest.load_script("tools/benchmark.py")


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_torch_counts(ppo, tied):
    """Attention as it is computed without a fused kernel: over all positions, which is twice the causal half that MFU counts."""
    shape = {**BENCHMARK.SHAPES["qwen2.5-narrow"], "num_hidden_layers": 3, "hidden_size": 64, "num_key_value_heads": 2,
             "intermediate_size": 96, "vocab_size": 500, "tie_word_embeddings": tied}
    config = ppo.AutoConfig.for_model(**shape, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    model = ppo.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.randint(2, 500, (4, 24))
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=5).logits
    assert counter.get_total_flops() == pytest.approx(BENCHMARK.flops(config, 4 * 24, 2 * 24, 4 * 5), rel=2e-3)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert backward.get_total_flops() == pytest.approx(2 * counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("phase", ["generate", "score", "train"])
def test_each_phase_runs_both_ways(ppo, phase, monkeypatch):
    monkeypatch.setitem(BENCHMARK.SHAPES, "small", {**BENCHMARK.SHAPES["qwen2.5-narrow"], "hidden_size": 32, "num_hidden_layers": 2,
                                                    "intermediate_size": 64, "vocab_size": 30000})
    monkeypatch.setattr(BENCHMARK, "load_script", conftest.load_script)  # the modules that other tests hold
    args = SimpleNamespace(threads=1, lora_rank=0, repeats=1, prompts=4, responses_per_prompt=3, batch_size=6, prompt_tokens=12,
                           max_new_tokens=20, scored=6, minibatch_size=4, micro_batch_size=2, logits_mb=1,
                           gradient_checkpointing=False)
    plain, ours = (BENCHMARK.measure("small", phase, way, args) for way in (True, False))
    for way in (plain, ours):
        assert way["seconds"] > 0 and way["tokens"] > 0 and way["teraflops"] > 0
    if phase != "generate":  # the two samplers draw different responses
        assert plain["tokens"] * plain["seconds"] == pytest.approx(ours["tokens"] * ours["seconds"])
    if phase == "train":
        assert 0 < BENCHMARK.planned_peak("small", args) < 2**28
