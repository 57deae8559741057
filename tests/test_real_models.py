"""What real models need, on small ones: --dtype, logits in parts, LoRA, a sampler that does not wait for the host.

Tests of LoRA are left out where peft is missing (runs/test.sh installs it).
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_script, tiny_config
from test_models import DEVICE, Tokens, logprobs_of, rows, training_batch
from test_pipeline import read, without_seconds

needs_peft = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="peft is not installed: requirements-lora.txt")


def policy_step(ppo, policy, optimizer, batch, logits_mb=0):
    """One optimiser step of `train_epoch` on `batch` -> its statistics."""
    def loss_of(mb):
        logprobs = ppo.response_logprobs_in_parts(policy, *ppo.model_inputs(mb), mb["response_ids"].shape[1], 1.0, logits_mb)
        return ppo.policy_loss(logprobs, mb["old_logprobs"], mb["advantages"], mb["response_mask"], 0.2)

    cfg = ppo.Config(minibatch_size=8, micro_batch_size=4)
    return ppo.train_epoch(policy, optimizer, loss_of, batch, torch.arange(8), cfg, torch.Generator().manual_seed(0), DEVICE)


def saved_bytes(function, model):
    """Bytes that autograd keeps for the backward pass of `function()`, without the model's own weights -> bytes, result."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that its address is not given away again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return sum(size for size, _ in kept.values()), result


# ------------------------------------------------------------------------------------------------------------- --dtype


class Saved:
    """A tokenizer that has nothing to save."""

    save_pretrained = staticmethod(lambda folder: None)


def test_pure_bf16_weights_do_not_move_at_the_papers_learning_rate(ppo, model_folder, tmp_path):
    """A step at lr 5e-7, made and saved as stage 4 does: float32 weights move, those of --dtype bfloat16 stay to the last bit."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        policy = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE, dtype=dtype)
        assert {p.dtype for p in policy.parameters()} == {dtype}
        batch = training_batch(ppo, policy)
        before = [p.detach().clone() for p in policy.parameters()]
        policy_step(ppo, policy, torch.optim.AdamW(policy.parameters(), lr=5e-7, weight_decay=0.0), batch)
        ppo.shared_save(policy, Saved, tmp_path / str(dtype))
        saved = ppo.load_model(ppo.AutoModelForCausalLM, tmp_path / str(dtype), DEVICE)
        assert all(torch.equal(a.float(), b) for a, b in zip(policy.parameters(), saved.parameters()))
        large = [(a, b) for a, b in zip(before, saved.parameters())]
        changed = sum(((a != b) & (a.abs() > 1e-3)).sum().item() for a, b in large)
        moved[dtype] = changed / sum((a.abs() > 1e-3).sum().item() for a, _ in large)
    assert moved[torch.float32] > 0.5 and moved[torch.bfloat16] == 0.0


def test_bfloat16_warns_in_one_line_and_runs_through_all_stages(pipeline, sft, rm, ppo, monkeypatch, capsys):
    monkeypatch.chdir(pipeline["folder"])
    for folder in ("out/bf16_sft", "out/bf16_rm", "out/bf16_ppo"):
        shutil.rmtree(folder, ignore_errors=True)
    sft.main(sft.Config(model="out/sft", out="out/bf16_sft", dtype="bfloat16", epochs=0.2, lr=1e-3))
    rm.main(rm.Config(policy="out/sft", out="out/bf16_rm", dtype="bfloat16", epochs=1))
    ppo.main(ppo.Config(dtype="bfloat16", out="out/bf16_ppo", iterations=2, prompts_per_iteration=8, minibatch_size=8,
                        critic_warmup=1))
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: --dtype bfloat16")]
    assert len(warnings) == 3 and "rounded away" in warnings[0]
    for folder in ("out/bf16_sft", "out/bf16_rm", "out/bf16_ppo/last"):
        assert json.loads((pipeline["folder"] / folder / "config.json").read_text())["dtype"] == "bfloat16"
    metrics = read(pipeline["folder"] / "out/bf16_ppo/metrics.jsonl")
    assert metrics[1]["kl_per_response"] == 0.0 and metrics[2]["policy_ratio"] == pytest.approx(1, abs=0.05)


def test_frozen_in_bf16_gives_what_autocast_gives_the_float32_model(ppo, model_folder):
    """A reference held in bf16 must not differ from the policy before the first update: same logprobs to the last bit."""
    policy = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE)
    assert {p.dtype for p in ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE, frozen=True).parameters()} == {torch.float32}
    reference = ppo.freeze(ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE), in_bf16=True)
    batch = ppo.make_batch(*rows(), 0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logprobs_of(ppo, policy, batch), logprobs_of(ppo, reference, batch))
    assert not any(p.requires_grad for p in reference.parameters())
    halves = [p.numel() for p in reference.parameters() if p.dtype == torch.bfloat16]
    embeddings = sum(m.weight.numel() for m in reference.modules() if isinstance(m, torch.nn.Embedding))
    assert sum(halves) > 0.9 * (sum(p.numel() for p in reference.parameters()) - embeddings)  # all but embeddings and norms
    plain = reference.to(torch.bfloat16)  # what it is not: the residual stream rounded, too
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert (logprobs_of(ppo, policy, batch) - logprobs_of(ppo, plain, batch)).abs().max() > 1e-2


def test_on_a_gpu_products_are_bf16_and_frozen_models_half_as_large(ppo, model_folder, monkeypatch):
    """What the flags of a GPU choose, as far as it shows without one: the model stays where it is."""
    monkeypatch.setattr(ppo.transformers.PreTrainedModel, "to", lambda model, *args, **options: model)
    gpu = torch.device("cuda")
    kinds = {frozen: {m.weight.dtype for m in ppo.load_model(ppo.AutoModelForCausalLM, model_folder, gpu, frozen=frozen).modules()
                      if isinstance(m, (torch.nn.Linear, ppo.Conv1D)) and m.weight.shape[0] != 50} for frozen in (True, False)}
    assert kinds == {True: {torch.bfloat16}, False: {torch.float32}}
    with pytest.warns(UserWarning) if not torch.cuda.is_available() else nullcontext():
        context = ppo.autocast(gpu)
    assert isinstance(context, torch.autocast) and context.device == "cuda" and context.fast_dtype == torch.bfloat16
    assert isinstance(ppo.autocast(DEVICE), nullcontext)


def test_rewards_and_values_are_float32_under_autocast(ppo, model_folder):
    """As on a GPU, frozen in bf16: from 2 to 4 bf16 knows 128 numbers, and rewards would tie in the filter."""
    reward_model = ppo.load_model(ppo.AutoModelForSequenceClassification, model_folder, DEVICE, num_labels=1)
    reward_model.config.reward_mean, reward_model.config.reward_std = 0.0, 1.0
    reward_model.save_pretrained(model_folder.parent / "rm")
    critic = ppo.load_critic(ppo.Config(reward_model=str(model_folder.parent / "rm")), reward_model, DEVICE)
    prompts, responses = rows(100)
    sequences, batch = [p + r for p, r in zip(prompts, responses)], ppo.make_batch(prompts, responses, 0)
    exact = ppo.score_responses(reward_model, sequences, 0, batch_size=64)
    ppo.freeze(reward_model, in_bf16=True)
    assert reward_model.score.weight.dtype == torch.float32
    in_bf16 = lambda x: (x == x.bfloat16().float()).float().mean()  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        assert in_bf16(ppo.score_responses(reward_model, sequences, 0, batch_size=64)) == 1  # what it is like without
        scores = ppo.score_responses(ppo.float32_head(reward_model), sequences, 0, batch_size=64)
        values = ppo.response_values(critic, *ppo.model_inputs(batch), batch["response_ids"].shape[1])
    assert in_bf16(scores) < 0.1 and in_bf16(values[batch["response_mask"] == 1]) < 0.1
    assert (scores - exact).abs().max() < 0.1 * exact.std()


# -------------------------------------------------------------------------------------------------------- logits in parts


@pytest.mark.parametrize("positions, in_bf16", [(1, False), (7, False), (7, True), (1000, False)])
def test_logits_in_parts_give_the_same_logprobs_and_gradients(ppo, model_folder, positions, in_bf16):
    policy = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE)
    assert ppo.logits_are_plain(policy)
    batch = ppo.make_batch(*rows(9), 0)
    mask = batch["response_mask"]
    torch.manual_seed(0)
    weights = torch.randn(mask.shape) * mask
    results = []
    for logits_mb in (0, 50 * positions / 2**18):  # the vocabulary has 50 tokens
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):  # as on a GPU
            logprobs = ppo.response_logprobs_in_parts(policy, *ppo.model_inputs(batch), mask.shape[1], 0.7, logits_mb)
        (logprobs * weights).sum().backward()
        results.append((logprobs.detach() * mask, [p.grad.clone() for p in policy.parameters()]))
        policy.zero_grad()
    (plain, gradients), (parts, gradients_of_parts) = results
    assert logprobs.dtype == torch.float32 and torch.allclose(plain, parts, atol=1e-5)
    for a, b in zip(gradients, gradients_of_parts):
        assert torch.allclose(a, b, atol=(0.02 if in_bf16 else 1e-5) * max(1.0, a.abs().max().item()))


def test_sft_loss_in_parts_is_the_same(sft, model_folder):
    model = sft.load_model(sft.AutoModelForCausalLM, model_folder, DEVICE)
    input_ids, labels = sft.collate([(p, r) for p, r in zip(*rows(9))], 0)
    results = []
    for logits_mb in (0, 50 * 5 / 2**18):
        loss = sft.batch_loss(model, input_ids, labels, logits_mb)
        loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
        model.zero_grad()
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5 * max(1.0, a.abs().max().item())) for a, b in zip(results[0][1], results[1][1]))


def test_logits_in_parts_keep_less(ppo):
    """A vocabulary of 20,000: what autograd keeps falls by the logits, to a part's size and less."""
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama")
    config.vocab_size = 20_000
    policy = AutoModelForCausalLM.from_config(config)
    batch = ppo.make_batch(*rows(16), 0)
    count = batch["response_mask"].numel()

    def keeps(logits_mb):
        length = batch["response_mask"].shape[1]
        return saved_bytes(lambda: ppo.response_logprobs_in_parts(policy, *ppo.model_inputs(batch), length, 1.0, logits_mb),
                           policy)[0]

    assert keeps(0) - keeps(1) > 0.9 * 4 * 20_000 * count  # at least the float32 log-probabilities of all positions


def test_models_with_logits_of_their_own_are_noticed(ppo):
    """Gemma 2 caps its logits, Granite scales them: what their head puts out is not what they predict with."""
    from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig

    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    for config in (Gemma2Config(**sizes, head_dim=8), GraniteConfig(**sizes, logits_scaling=8.0)):
        assert not ppo.logits_are_plain(AutoModelForCausalLM.from_config(config).eval())


def test_a_head_with_a_bias_comes_in_parts_too(ppo):
    """Phi adds a bias to its logits, random here: 0 would not show."""
    from transformers import AutoModelForCausalLM, PhiConfig

    policy = AutoModelForCausalLM.from_config(PhiConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                                        intermediate_size=64, pad_token_id=0, bos_token_id=None, eos_token_id=1))
    torch.nn.init.normal_(policy.lm_head.bias)
    assert ppo.logits_are_plain(policy.eval())
    batch = ppo.make_batch(*rows(5), 0)
    length = batch["response_ids"].shape[1]
    plain, parts = (ppo.response_logprobs_in_parts(policy, *ppo.model_inputs(batch), length, 1.0, mb) for mb in (0, 50 * 3 / 2**18))
    assert torch.allclose(plain * batch["response_mask"], parts, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- sampler


@pytest.mark.parametrize("look_every", [2, 5, 100])
def test_looking_less_often_changes_no_greedy_response(ppo, model_folder, look_every):
    """As on a GPU: rows that have finished stay for a while, and the mask has four dimensions."""
    policy = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE).eval()
    prompts, _ = rows(9)
    greedy = lambda eos, **options: [r for group in ppo.generate(  # noqa: E731
        policy, SimpleNamespace(pad_token_id=0, eos_token_id=eos), prompts, 1, 14, 0.0, None, 4, **options) for r in group]
    unbroken = greedy(-1)  # a greedy random model repeats itself and rarely says 1: take another token for EOS
    places = {token: {r.index(token) if token in r else 99 for r in unbroken} for token in range(2, 50)}
    eos = max(places, key=lambda token: len(places[token]))
    every = greedy(eos)
    assert len({len(r) for r in every}) > 2  # some finish early
    assert greedy(eos, look_every=look_every) == every


def test_under_autocast_the_cache_is_bf16(ppo, model_folder):
    policy = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE).eval()
    dtypes = set()
    update = ppo.PreallocatedLayer.update

    def spy(layer, *args, **kwargs):
        result = update(layer, *args, **kwargs)
        dtypes.update(buffer.dtype for buffer in layer.buffers)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo.PreallocatedLayer, "update", spy)
        for context, expected in ((nullcontext(), torch.float32), (torch.autocast("cpu", torch.bfloat16), torch.bfloat16)):
            dtypes.clear()
            with context:
                ppo.generate(policy, Tokens, rows(3)[0], 2, 4, 1.0, torch.Generator().manual_seed(0), 4)
            assert dtypes == {expected}


# ------------------------------------------------------------------------------------------------------------------ LoRA


@pytest.fixture
def lora_policy(ppo, model_folder):
    policy = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE, frozen=True)
    return ppo.add_adapters(policy, 4, torch.float32, 0)


@needs_peft
def test_lora_starts_at_ratio_one_and_kl_zero_and_leaves_the_reference_alone(ppo, lora_policy, model_folder, tmp_path):
    plain = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE)
    batch = training_batch(ppo, lora_policy)
    with torch.no_grad(), ppo.adapters_off(lora_policy):
        reference = logprobs_of(ppo, lora_policy, batch)
    assert torch.equal(reference, batch["old_logprobs"])  # KL 0
    assert torch.equal(reference, logprobs_of(ppo, plain, batch).detach())  # and it is the model of the folder
    frozen = {name: p.detach().clone() for name, p in lora_policy.named_parameters() if not p.requires_grad}
    assert len(frozen) == len(list(plain.parameters()))
    learned = [p for p in lora_policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-2)
    statistics = policy_step(ppo, lora_policy, optimizer, batch)
    assert statistics["ratio"] == pytest.approx(1.0, abs=1e-5) and statistics["clip_fraction"] == 0.0
    for _ in range(3):
        policy_step(ppo, lora_policy, optimizer, batch, logits_mb=50 * 7 / 2**18)
    after = logprobs_of(ppo, lora_policy, batch).detach()
    assert ((after - reference) * batch["response_mask"]).abs().max() > 0.05  # the policy has moved
    with torch.no_grad(), ppo.adapters_off(lora_policy):
        assert torch.equal(logprobs_of(ppo, lora_policy, batch), reference)  # the reference has not
    for name, p in lora_policy.named_parameters():
        if name in frozen:
            assert p.detach().numpy().tobytes() == frozen[name].numpy().tobytes(), name
    assert all(p.requires_grad for p in learned)  # `adapters_off` has put everything back

    # Saved, it is an ordinary folder that gives the same logprobs, with the tensors of the folder that it came from.
    ppo.shared_save(lora_policy, Saved, tmp_path / "merged")
    merged = ppo.load_model(ppo.AutoModelForCausalLM, tmp_path / "merged", DEVICE)
    assert torch.allclose(logprobs_of(ppo, merged, batch), after, atol=1e-4)
    assert merged.state_dict().keys() == plain.state_dict().keys() and not list((tmp_path / "merged").glob("*adapter*"))
    assert (tmp_path / "merged/model.safetensors").stat().st_size == (model_folder / "model.safetensors").stat().st_size
    assert torch.equal(logprobs_of(ppo, lora_policy, batch).detach(), after)  # saving has not changed the policy


@needs_peft
def test_lora_merged_into_a_bf16_model_is_saved_in_float32(ppo, model_folder, tmp_path):
    """As on a GPU, where the frozen matrices are bf16: a small update is not rounded away in the saved folder."""
    policy = ppo.freeze(ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE), in_bf16=True)
    ppo.add_adapters(policy, 4, torch.float32, 0)
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.fill_(1e-6)
    ppo.shared_save(policy, Saved, tmp_path / "merged")
    merged, plain = (ppo.load_model(ppo.AutoModelForCausalLM, folder, DEVICE).state_dict()
                     for folder in (tmp_path / "merged", model_folder))
    name = next(name for name, _ in policy.named_modules() if name.endswith(("q_proj", "c_attn"))) + ".weight"
    update = merged[name] - plain[name].to(torch.bfloat16).float()
    assert 1e-8 < update.abs().max() < 1e-4 and (update != 0).float().mean() > 0.5


@needs_peft
def test_the_lora_critic_learns_on_the_reward_models_blocks_and_leaves_its_scores_alone(ppo, model_folder):
    reward_model = ppo.load_model(ppo.AutoModelForSequenceClassification, model_folder, DEVICE, frozen=True, num_labels=1)
    reward_model.config.reward_mean, reward_model.config.reward_std = 2.0, 0.5
    prompts, responses = rows(8, seed=3)
    sequences = [p + r for p, r in zip(prompts, responses)]
    scores = ppo.score_responses(reward_model, sequences, 0, 4)
    cfg = ppo.Config(lora_rank=4, minibatch_size=8, micro_batch_size=4)
    critic = ppo.load_critic(cfg, reward_model, DEVICE)
    blocks = {id(p) for p in reward_model.base_model.parameters()}
    assert blocks <= {id(p) for p in critic.parameters()}  # two roles, one backbone
    batch = ppo.make_batch(prompts, responses, 0)
    values = lambda mb: ppo.response_values(critic, *ppo.model_inputs(mb), mb["response_ids"].shape[1])  # noqa: E731
    batch["old_values"] = values(batch).detach()
    # As without LoRA it starts as the RM: the value before the last token is the normalised reward without that token.
    for i, sequence in enumerate(sequences):
        with ppo.adapters_off(reward_model):
            before = reward_model(torch.tensor([sequence[:-1]])).logits[0, 0]
        assert torch.allclose(batch["old_values"][i, len(responses[i]) - 1], (before - 2.0) / 0.5, atol=1e-3)
    batch["returns"] = (batch["old_values"] + 1.0) * batch["response_mask"]
    loss_of = lambda mb: ppo.value_loss(values(mb), mb["old_values"], mb["returns"], mb["response_mask"], 10.0)  # noqa: E731
    optimizer = torch.optim.AdamW([p for p in critic.parameters() if p.requires_grad], lr=1e-2)
    losses = [ppo.train_epoch(critic, optimizer, loss_of, batch, torch.arange(8), cfg, torch.Generator().manual_seed(0),
                              DEVICE)["loss"] for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]
    head = critic.score if hasattr(critic, "score") else critic.classifier
    assert not torch.allclose(head.weight, reward_model.score.weight / 0.5)  # the head learns, too
    with ppo.adapters_off(reward_model):
        assert torch.equal(ppo.score_responses(reward_model, sequences, 0, 4), scores)
    assert not torch.equal(ppo.score_responses(reward_model, sequences, 0, 4), scores)  # the adapters would have changed them


@needs_peft
def test_lora_with_gradient_checkpointing_takes_the_same_step(ppo, model_folder):
    results = []
    for checkpointing in (False, True):
        policy = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE, frozen=True)
        ppo.add_adapters(policy, 4, torch.float32, 0).train()
        if checkpointing:
            policy.activation_checkpointing_enable()
        learned = [p for p in policy.parameters() if p.requires_grad]
        batch = training_batch(ppo, policy)
        statistics = policy_step(ppo, policy, torch.optim.SGD(learned, lr=0.1), batch)
        assert statistics["grad_norm"] > 0
        results.append([p.detach().clone() for p in learned])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results))


LORA_FLAGS = ("--strategy", "bw", "--iterations", 3, "--prompts_per_iteration", 8, "--minibatch_size", 8, "--eval_every", 1,
              "--threads", 1, "--critic_warmup", 1, "--lora_rank", 4, "--lr", 1e-2)


@needs_peft
def test_lora_in_every_stage_and_resumed(pipeline, ppo, sft, rm, monkeypatch):
    """01, 02 and 04 with --lora_rank; 04 stopped after two of three iterations and resumed ends as the unbroken run."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    folder = pipeline["folder"]
    monkeypatch.chdir(folder)
    for name in ("lora_sft", "lora_rm", "lora_ppo", "lora_stopped"):
        shutil.rmtree(f"out/{name}", ignore_errors=True)
    sft.main(sft.Config(model="out/sft", out="out/lora_sft", lora_rank=4, epochs=0.3, lr=1e-3))
    rm.main(rm.Config(policy="out/lora_sft", out="out/lora_rm", lora_rank=4, epochs=2, lr=1e-2))
    before, after = (AutoModelForCausalLM.from_pretrained(f"out/{name}").state_dict() for name in ("sft", "lora_sft"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed == {name for name in before if name.endswith("proj.weight")}
    reward_model = AutoModelForSequenceClassification.from_pretrained("out/lora_rm")
    assert reward_model.config.reward_std > 0 and reward_model.score.weight.shape == (1, 64)
    assert json.loads((folder / "out/lora_rm/accuracy.json").read_text())["all pairs"]["accuracy"] > 0.6

    run_script("04_pf_ppo.py", *LORA_FLAGS, "--out", "out/lora_ppo", "--reward_model", "out/lora_rm", cwd=folder)
    metrics = read(folder / "out/lora_ppo/metrics.jsonl")
    assert metrics[1]["kl_per_response"] == metrics[2]["kl_per_response"] == 0.0 != metrics[3]["kl_per_response"]
    last = AutoModelForCausalLM.from_pretrained("out/lora_ppo/last").state_dict()
    assert {name for name in before if not torch.equal(before[name], last[name])} == changed
    state = folder / "out/lora_stopped/state.pt"
    stop = ppo.torch.save

    def save_twice(content, path):  # the third save does not come: as if killed in the third iteration
        if len(content["metrics"]) == 4:
            raise KeyboardInterrupt
        stop(content, path)

    cfg = dict(strategy="bw", iterations=3, prompts_per_iteration=8, minibatch_size=8, eval_every=1, threads=1, critic_warmup=1,
               lora_rank=4, lr=1e-2, out="out/lora_stopped", reward_model="out/lora_rm")
    monkeypatch.setattr(ppo.torch, "save", save_twice)
    with pytest.raises(KeyboardInterrupt):
        ppo.main(ppo.Config(**cfg))
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert state.stat().st_size < (folder / "out/sft/model.safetensors").stat().st_size * 2  # adapters only, not two models
    ppo.main(ppo.Config(**cfg, resume=True))
    assert without_seconds(read(folder / "out/lora_stopped/metrics.jsonl")) == without_seconds(metrics)
    a, b = ((folder / f"out/{run}/last/model.safetensors").read_bytes() for run in ("lora_ppo", "lora_stopped"))
    assert a == b


@needs_peft
def test_with_lora_two_backbones_serve_four_roles_and_the_critic_does_not_change_rewards(pipeline, ppo, monkeypatch):
    monkeypatch.chdir(pipeline["folder"])
    cfg = ppo.Config(strategy="bw", iterations=2, prompts_per_iteration=8, minibatch_size=8, eval_every=2, threads=1,
                     critic_warmup=2, lora_rank=4)
    models, reference, reward_model = ppo.load_models(cfg, ppo.load_tokenizer("out/sft"), DEVICE)
    assert reference is models["policy"]
    large = {id(p): p.numel() for model in (*models.values(), reference, reward_model) for p in model.parameters() if not p.requires_grad}
    one = sum(p.numel() for p in ppo.load_model(ppo.AutoModelForCausalLM, "out/sft", DEVICE).parameters())
    assert sum(large.values()) == pytest.approx(2 * one, rel=0.01)
    scores, values = [], []
    load_critic = ppo.load_critic

    def noted(*args):
        values.append(load_critic(*args))
        return values[-1]

    monkeypatch.setattr(ppo, "load_critic", noted)
    for critic_lr in (0.0, 0.3):  # the policy waits for two iterations: its responses are the same in both runs
        out = f"out/lora_critic_{critic_lr}"
        shutil.rmtree(out, ignore_errors=True)
        ppo.main(ppo.dataclasses.replace(cfg, out=out, critic_lr=critic_lr))
        scores.append([record["rm_score"] for record in read(pipeline["folder"] / out / "rollouts/0002.jsonl")])
        losses = [line["critic_loss"] for line in read(pipeline["folder"] / out / "metrics.jsonl")[1:]]
    assert losses[1] > 2 * losses[0]  # at this rate the critic has changed a lot
    still, moved = ({name: p for name, p in critic.named_parameters() if p.requires_grad} for critic in values)
    assert still.keys() == moved.keys() and all((moved[name] - still[name]).abs().max() > 0.05 for name in still)
    assert scores[0] == scores[1]


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_gradient_checkpointing_reaches_the_model_that_learns(request, stage, pipeline, ppo, monkeypatch):
    module = request.getfixturevalue(stage)
    monkeypatch.chdir(pipeline["folder"])
    shutil.rmtree("out/recomputed", ignore_errors=True)
    load_model, seen = module.load_model, []

    def with_a_hook(*args, **options):
        model = load_model(*args, **options)
        if next(model.parameters()).requires_grad:
            model.register_forward_hook(lambda model, *_: seen.append(model.is_activation_checkpointing) if model.training else None)
        return model

    monkeypatch.setattr(module, "load_model", with_a_hook)
    flags = {"sft": dict(model="out/sft", epochs=0.1), "rm": dict(epochs=1),
             "ppo": dict(iterations=1, prompts_per_iteration=4, critic_warmup=0)}[stage]
    module.main(module.Config(**flags, out="out/recomputed", threads=1, gradient_checkpointing=True))
    assert seen and all(seen)


def test_gradient_checkpointing_keeps_less(ppo, model_folder):
    kept = []
    for checkpointing in (False, True):
        policy = ppo.load_model(ppo.AutoModelForCausalLM, model_folder, DEVICE).train()
        if checkpointing:
            policy.activation_checkpointing_enable()
        batch = ppo.make_batch([[5] * 8] * 8, [[6] * 30] * 8, 0)
        kept.append(saved_bytes(lambda: policy.base_model(input_ids=ppo.model_inputs(batch)[0]).last_hidden_state, policy)[0])  # noqa: B023
    assert kept[1] < 0.3 * kept[0]


@needs_peft
def test_adapters_that_cannot_be_merged_are_refused_before_training(ppo, capsys):
    """The experts of Mixtral are one tensor, not a layer: merged under plain names they would be lost."""
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(MixtralConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                             num_key_value_heads=2, intermediate_size=32, num_local_experts=2))
    with pytest.raises(SystemExit) as stopped:
        ppo.add_adapters(model, 4, torch.float32, 0)
    assert stopped.value.code == 2 and "cannot be merged into all layers of mixtral" in capsys.readouterr().err


def test_an_architecture_without_a_reward_model_or_a_critic_is_named_before_the_samples(rm, ppo, tmp_path, capsys):
    from transformers import Gemma3TextConfig, GraniteConfig

    small = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16)
    for config, word in ((GraniteConfig(**small), "SequenceClassification"), (Gemma3TextConfig(**small, head_dim=8), "TokenClassification")):
        config.save_pretrained(tmp_path / "model")
        if word == "SequenceClassification":
            with pytest.raises(SystemExit) as stopped:
                rm.check_architecture(tmp_path / "model")
            assert stopped.value.code == 2
        else:
            rm.check_architecture(tmp_path / "model")
        printed = capsys.readouterr()
        assert f"no AutoModelFor{word} of the architecture of {tmp_path / 'model'}" in printed.out + printed.err
        with pytest.raises(SystemExit):
            ppo.load_model(getattr(ppo, f"AutoModelFor{word}"), tmp_path / "model", DEVICE, num_labels=1)
        assert f"no AutoModelFor{word}" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            ppo.main(ppo.Config(plan=True, policy=str(tmp_path / "model"), reward_model=str(tmp_path / "model")))
        assert f"no AutoModelFor{word}" in capsys.readouterr().err


def test_no_stage_imports_peft_without_lora():
    code = "import runpy, sys; sys.modules['peft'] = None; [runpy.run_path(path) for path in sys.argv[1:]]"
    scripts = [str(ROOT / name) for name in ("01_sft.py", "02_reward_model.py", "04_pf_ppo.py")]
    done = subprocess.run([sys.executable, "-c", code, *scripts], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-1000:]


def test_lora_without_peft_says_what_to_install(pipeline, ppo, monkeypatch, capsys):
    monkeypatch.chdir(pipeline["folder"])
    monkeypatch.setitem(sys.modules, "peft", None)  # import peft raises ImportError
    with pytest.raises(SystemExit) as stopped:
        ppo.main(ppo.Config(lora_rank=4, out="out/no_peft"))
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "pip install -r requirements-lora.txt" in message and message.count("\n") == 1
    assert not (pipeline["folder"] / "out/no_peft").exists()


def test_lora_without_sense_is_refused(sft, ppo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft.jsonl").write_text('{"task_id": "a", "prompt": "b", "solution": "c"}\n')
    for run, words in ((lambda: sft.main(sft.Config(data="sft.jsonl", lora_rank=4)), "--model"),
                       (lambda: ppo.add_adapters(torch.nn.Linear(2, 2), -1, torch.float32, 0), "--lora_rank -1")):
        with pytest.raises(SystemExit) as stopped:
            run()
        message = capsys.readouterr().err
        assert stopped.value.code == 2 and words in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()
