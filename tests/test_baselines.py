"""Stage 6: losses by hand, BOND against exact divergences, every method on a small random model."""

import copy
import dataclasses
import math

import pytest
import torch
from test_eval import make_world, read

import sandbox

METHODS = ("raft", "bond", "dpo", "ipo", "kto", "iterative_dpo")


# ----------------------------------------------------------------------------------- losses by hand

# Two pairs. Of the first the policy raised the chosen response by 1 nat and lowered the rejected
# one by 1: h = 1 - (-1) = 2. Of the second it raised the rejected one by 2: h = 0 - 2 = -2.
PAIRS = dict(
    chosen=torch.tensor([-2.0, -3.0]),
    rejected=torch.tensor([-4.0, -3.0]),
    ref_chosen=torch.tensor([-3.0, -3.0]),
    ref_rejected=torch.tensor([-3.0, -5.0]),
)


def test_dpo_loss_by_hand(baselines):
    # beta h = 1 and -1: log(1 + e^-1) = 0.3132617 and log(1 + e) = 1.3132617, mean 0.8132617
    assert baselines.dpo_loss(**PAIRS, beta=0.5).item() == pytest.approx(0.8132617, abs=1e-6)
    # beta h = 0.2 and -0.2: log(1 + e^-0.2) = 0.5981389 and 0.7981389, mean 0.6981389
    assert baselines.dpo_loss(**PAIRS, beta=0.1).item() == pytest.approx(0.6981389, abs=1e-6)


def test_ipo_loss_by_hand(baselines):
    # beta 0.5: the target is 1, (2 - 1)^2 = 1 and (-2 - 1)^2 = 9, mean 5
    assert baselines.ipo_loss(**PAIRS, beta=0.5).item() == pytest.approx(5.0)
    # beta 0.25: the target is 2, 0 and 16, mean 8
    assert baselines.ipo_loss(**PAIRS, beta=0.25).item() == pytest.approx(8.0)


def test_kto_loss_by_hand(baselines):
    logprobs, ref_logprobs = torch.tensor([-2.0, -4.0]), torch.tensor([-3.0, -3.0])  # r = 1 and -1
    # desirable: 1 - sigmoid(2 (1 - 0.5)) = 1 - sigmoid(1) = 0.2689414
    # undesirable: 1 - sigmoid(2 (0.5 + 1)) = 1 - sigmoid(3) = 0.0474259; mean 0.1581837
    for desirable in (torch.tensor([True, False]), torch.tensor([1.0, 0.0])):
        loss = baselines.kto_loss(logprobs, ref_logprobs, desirable, torch.tensor(0.5), 2.0)
        assert loss.item() == pytest.approx(0.1581837, abs=1e-6)
    # the labels swapped: 1 - sigmoid(-1) = 0.7310586 and 1 - sigmoid(-3) = 0.9525741
    swapped = baselines.kto_loss(logprobs, ref_logprobs, torch.tensor([False, True]), 0.5, 2.0)
    assert swapped.item() == pytest.approx(0.8418163, abs=1e-6)


def test_losses_at_the_reference(baselines):
    """DPO log 2, IPO the squared target, KTO one half; and the limits of a large h."""
    a, b = torch.tensor([-3.0, -50.0, -0.1]), torch.tensor([-7.0, -2.0, -0.1])
    labels = torch.tensor([True, False, True])
    for beta in (0.1, 2.0):
        assert baselines.dpo_loss(a, b, a, b, beta).item() == pytest.approx(math.log(2), abs=1e-6)
        assert baselines.ipo_loss(a, b, a, b, beta).item() == pytest.approx(
            (1 / (2 * beta)) ** 2, rel=1e-6
        )
        assert baselines.kto_loss(a, a, labels, 0.0, beta).item() == pytest.approx(0.5, abs=1e-6)
        assert baselines.ipo_loss(a + 1 / (2 * beta), b, a, b, beta).item() == pytest.approx(
            0.0, abs=1e-6
        )
    assert baselines.dpo_loss(a + 500, b, a, b, 1.0).item() == pytest.approx(0.0, abs=1e-6)
    assert baselines.dpo_loss(a - 500, b, a, b, 1.0).item() == pytest.approx(
        500.0
    )  # linear, not infinite
    assert baselines.kto_loss(a + 500, a, labels, 0.0, 1.0).item() == pytest.approx(
        1 / 3, abs=1e-6
    )  # one of three is wrong


@pytest.mark.parametrize("name", ["dpo_loss", "ipo_loss"])
def test_pair_gradients_raise_the_chosen_and_lower_the_rejected_alike(baselines, name):
    chosen, rejected = (
        torch.tensor([-3.0, -4.0], requires_grad=True),
        torch.tensor([-5.0, -2.0], requires_grad=True),
    )
    getattr(baselines, name)(
        chosen, rejected, torch.tensor([-3.0, -4.0]), torch.tensor([-5.0, -2.0]), 0.1
    ).backward()
    assert (chosen.grad < 0).all() and torch.allclose(rejected.grad, -chosen.grad)
    # by hand, at h = 0 for each of two pairs: DPO -beta / 2 / 2 = -0.025, IPO -2 * 5 / 2 = -5
    assert chosen.grad.tolist() == pytest.approx([{"dpo_loss": -0.025, "ipo_loss": -5.0}[name]] * 2)


def test_ipo_comes_back_beyond_its_target_and_dpo_does_not(baselines):
    zero = torch.zeros(1)
    gradients = {}
    for name in ("dpo_loss", "ipo_loss"):
        chosen = torch.tensor([6.0], requires_grad=True)  # h = 6, beyond 1 / (2 * 0.1) = 5
        getattr(baselines, name)(chosen, zero, zero, zero, 0.1).backward()
        gradients[name] = chosen.grad.item()
    assert gradients["dpo_loss"] < 0 < gradients["ipo_loss"]


def test_kto_gradients_and_its_constant_reference_point(baselines):
    logprobs = torch.tensor([-3.0, -3.0], requires_grad=True)
    kl = torch.tensor(0.3, requires_grad=True)
    baselines.kto_loss(
        logprobs, torch.tensor([-3.0, -3.0]), torch.tensor([True, False]), kl, 0.1
    ).backward()
    assert logprobs.grad[0] < 0 < logprobs.grad[1] and kl.grad is None
    # the mean log-ratio, (1 + 2) / 2 = 1.5 here, and 0 where it is negative: (1 - 4) / 2
    reference = torch.tensor([-5.0, -5.0])
    policy = torch.tensor([-4.0, -3.0], requires_grad=True)
    estimate = baselines.mismatched_kl(policy, reference)
    assert estimate.item() == pytest.approx(1.5) and not estimate.requires_grad
    assert baselines.mismatched_kl(torch.tensor([-4.0, -9.0]), reference).item() == 0.0


def test_raft_loss_by_hand(baselines):
    logprobs = torch.tensor([-1.0, -4.0], requires_grad=True)
    loss = baselines.raft_loss(logprobs)
    loss.backward()
    assert loss.item() == 2.5 and logprobs.grad.tolist() == [-0.5, -0.5]


# --------------------------------------------------------------------------------------------- BOND


def test_bond_rewards_by_hand(baselines):
    rewards = baselines.bond_rewards(torch.tensor([[0.1, 0.5, 0.3], [7.0, 7.0, -2.0]]))
    # first prompt: at most 0.1 is one of three, at most 0.5 all, at most 0.3 two of them, so
    # (N - 1) log p = 2 log(1/3), 0, 2 log(2/3)
    # second: both 7s have all at or below them, -2 one of three
    expected = [[2 * math.log(1 / 3), 0.0, 2 * math.log(2 / 3)], [0.0, 0.0, 2 * math.log(1 / 3)]]
    assert torch.allclose(rewards, torch.tensor(expected), atol=1e-6)
    # a prompt's rewards depend on ranks alone, and on no other prompt
    assert torch.equal(baselines.bond_rewards(torch.tensor([[-100.0, 1000.0, 0.0]])), rewards[:1])


def test_bond_loss_by_hand(baselines):
    # One prompt, N = 2, policy at the anchor: rewards log(1/2) and 0, w = 1,
    # A = (g - mean) * 2 = (-log 2, log 2).
    logprobs = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    rewards = baselines.bond_rewards(torch.tensor([[0.0, 1.0]]))
    loss, statistics = baselines.bond_loss(logprobs, logprobs.detach(), rewards)
    loss.backward()
    # forward: -log pi(best) = 3. Backward: -(A1 * -1 + A2 * -3) / 2 = log 2
    assert loss.item() == pytest.approx(3 + math.log(2), abs=1e-6)
    # gradient: forward -1 for the best; backward -A / 2, log 2 / 2 for the worst
    assert logprobs.grad[0].tolist() == pytest.approx(
        [math.log(2) / 2, -1 - math.log(2) / 2], abs=1e-6
    )
    # the divergence itself: -mean(g) - log N = log 2 / 2 - log 2
    assert statistics == {
        "forward_nll": 3.0,
        "backward_kl": pytest.approx(-math.log(2) / 2, abs=1e-6),
    }


def test_bond_gradient_is_that_of_the_exact_divergences(baselines):
    """Four outcomes, each once, from a uniform anchor: means over samples are expectations.

    The gradient of the backward part must then be that of KL(pi || N pi_anchor p^(N-1)), times
    N / (N - 1): the baseline takes the other responses for independent draws, which an enumeration
    is not.
    """
    torch.manual_seed(0)
    logits = (0.5 * torch.randn(1, 4)).requires_grad_()
    anchor = torch.full((1, 4), math.log(1 / 4))
    rewards = baselines.bond_rewards(torch.tensor([[0.3, -1.0, 2.0, 0.9]]))
    policy = torch.log_softmax(logits, 1)
    loss, statistics = baselines.bond_loss(policy, anchor, rewards)
    (ours,) = torch.autograd.grad(
        loss + policy[0, 2], logits, retain_graph=True
    )  # without the forward part, -log pi(best)
    divergence = (policy.exp() * (policy - (math.log(4) + anchor + rewards))).sum()
    (exact,) = torch.autograd.grad(divergence, logits)
    assert torch.allclose(ours, exact * 4 / 3, atol=1e-6) and exact.abs().max() > 0.1
    assert statistics["backward_kl"] == pytest.approx(divergence.item(), abs=1e-5)


def test_bond_stops_at_the_best_of_n_policy(baselines):
    """At pi = N pi_anchor p^(N-1) / Z all responses have the same gain: no backward gradient."""
    rewards = baselines.bond_rewards(torch.tensor([[0.3, -1.0, 2.0, 0.9]]))
    anchor = torch.full((1, 4), math.log(1 / 4))
    target = torch.log_softmax(anchor + rewards, 1).requires_grad_()
    loss, _ = baselines.bond_loss(target, anchor, rewards)
    (loss + target[0, 2]).backward()
    assert target.grad.abs().max() < 1e-6


# ---------------------------------------------------------------------------- choosing and training


def test_choice_with_ties(baselines):
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    # the first of the best, the last of the worst
    assert baselines.choose(scores, "dpo").tolist() == [[1, 4], [0, 4]]
    assert baselines.choose(scores, "raft").tolist() == [[1], [0]]
    assert baselines.choose(scores, "bond").sort(1).values.tolist() == [list(range(5))] * 2


def test_where_the_samples_come_from(baselines):
    def schedule(method, anchor_every=1):
        return [baselines.sampler_iteration(method, i, 20, 3, anchor_every) for i in range(1, 21)]

    assert schedule("raft") == schedule("bond") == list(range(20))
    assert schedule("dpo") == schedule("ipo") == schedule("kto") == [0] * 20
    assert schedule("iterative_dpo") == [0] * 7 + [7] * 7 + [14] * 6  # three rounds
    assert schedule("bond", 5) == [0] * 5 + [5] * 5 + [10] * 5 + [15] * 5


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    make_world(folder)
    return folder


@pytest.mark.parametrize("method", ["raft", "bond", "kto", "ipo"])
def test_micro_batches_change_nothing_and_groups_stay_together(
    baselines, world, monkeypatch, method
):
    """Weights after one pass, for micro-batches of one group up to all; each group comes once."""
    monkeypatch.chdir(world)
    tokenizer = sandbox.load_tokenizer("./policy")
    start = baselines.load_model(baselines.AutoModelForCausalLM, "./policy", tokenizer)
    size = {"raft": 1, "bond": 5}.get(method, 2)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 6, (30,), generator=generator).tolist()
    tokens = [torch.randint(3, 8, (n,), generator=generator).tolist() for n in lengths]
    batch = baselines.make_batch([[6] * (1 + i // size % 3) for i in range(30)], tokens)
    # The numbers of the rows travel along in a field, as the rewards of BOND do.
    batch["bond_rewards"] = torch.arange(30.0)[:, None]
    batch["frozen_logprobs"] = -torch.rand(batch["response_mask"].shape) * batch["response_mask"]
    batch["kl_point"] = torch.full((30, 1), 0.1)
    original, seen, weights = baselines.method_loss, [], []

    def method_loss(policy, mb, cfg):
        seen.append(mb["bond_rewards"].view(-1, size))
        return original(policy, mb, cfg)

    for micro_batch_size in (1, 5, 10, 30):
        policy = copy.deepcopy(start)
        cfg = baselines.Config(method=method, minibatch_size=20, micro_batch_size=micro_batch_size)
        seen.clear()
        statistics = baselines.train_groups(
            policy,
            torch.optim.SGD(policy.parameters(), lr=0.1),
            method_loss,
            batch,
            size,
            cfg,
            torch.Generator().manual_seed(2),
            torch.autocast("cpu", enabled=False),
        )
        assert all(p.grad is None for p in policy.parameters())  # a step starts from zero
        rows = torch.cat(seen)
        assert sorted(rows.tolist()) == torch.arange(30.0).view(-1, size).tolist()
        flat = torch.cat([p.detach().flatten() for p in policy.parameters()])
        weights.append(torch.cat([flat, torch.tensor([statistics["loss"]])]))
    assert not torch.allclose(weights[0][:-1], torch.cat([p.flatten() for p in start.parameters()]))
    assert all(torch.allclose(weights[0], other, atol=1e-4) for other in weights[1:])


# --------------------------------------------------------------------------------------- whole runs


def config(baselines, method, out, **flags):
    settings = dict(
        data="problems.jsonl",
        validation="problems.jsonl",
        policy="./policy",
        reward_model="./rm",
        iterations=2,
        prompts_per_iteration=8,
        minibatch_size=80,
        micro_batch_size=20,
        max_new_tokens=6,
        eval_every=2,
        lr=1e-3,
        anchor_every=1,
        rounds=2,
        threads=1,
    )
    return baselines.Config(method=method, out=str(out), **{**settings, **flags})


@pytest.fixture(scope="session")
def finished_runs(world, baselines):
    """Each method for two iterations of one optimiser step: {method: folder}."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        for method in METHODS:
            baselines.main(config(baselines, method, f"out/{method}"))
    return {method: world / f"out/{method}" for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_logs(finished_runs, world, method):
    from transformers import AutoModelForCausalLM

    folder = finished_runs[method]
    metrics = read(folder / "metrics.jsonl")
    assert [m["iteration"] for m in metrics] == [0, 1, 2]
    for m in metrics[1:]:
        assert m["seen"] == 40 and 0 < m["kept"] <= 40
        assert all(math.isfinite(value) for value in m.values())
    # Before the first update the policy is its reference, after it no longer.
    assert metrics[1]["kl_per_response"] == pytest.approx(0.0, abs=1e-5)
    assert abs(metrics[2]["kl_per_response"]) > 1e-4
    on_policy = method in ("raft", "bond", "iterative_dpo")  # two rounds in two iterations
    assert [m["sampled_after"] for m in metrics[1:]] == [0, 1 if on_policy else 0]
    assert "validation_pass_at_1" in metrics[0] and "validation_pass_at_1" in metrics[2]
    start, last = (
        AutoModelForCausalLM.from_pretrained(path) for path in (world / "policy", folder / "last")
    )
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), last.parameters()))
    assert (folder / "best/config.json").is_file()
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_first_loss_is_the_one_at_the_reference(finished_runs, baselines):
    """One step an iteration: the first loss is that of a policy equal to reference or anchor."""
    first = {name: read(path / "metrics.jsonl")[1] for name, path in finished_runs.items()}
    for method in ("dpo", "iterative_dpo"):
        assert first[method]["policy_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["ipo"]["policy_loss"] == pytest.approx(25.0, rel=1e-4)  # (1 / (2 * 0.1))^2
    assert first["kto"]["policy_loss"] == pytest.approx(0.5, abs=1e-5)
    records = read(finished_runs["bond"] / "rollouts/0001.jsonl")
    rewards = baselines.bond_rewards(torch.tensor([r["score"] for r in records]).view(8, 5))
    expected = -rewards.mean().item() - math.log(5)
    assert first["bond"]["policy_backward_kl"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("method", ["raft", "ipo", "kto"])
def test_a_step_lowers_the_loss_of_its_own_samples(
    finished_runs, world, baselines, monkeypatch, tmp_path, method
):
    """A second pass over the samples of iteration 1 (the last pass is logged) against the first."""
    monkeypatch.chdir(world)
    baselines.main(config(baselines, method, tmp_path / "o", iterations=1, epochs=2))
    first = read(finished_runs[method] / "metrics.jsonl")[1]["policy_loss"]
    second = read(tmp_path / "o/metrics.jsonl")[1]
    assert second["policy_loss"] < first
    if method != "raft":  # it has raised the better response over the worse one, not the other way
        assert second["policy_chosen_logratio"] > second["policy_rejected_logratio"]


@pytest.mark.parametrize("method", METHODS)
def test_the_kept_responses_are_the_right_ones_of_their_prompt(finished_runs, method):
    for path in sorted((finished_runs[method] / "rollouts").iterdir()):
        records = read(path)
        assert len(records) == 40
        for start in range(0, 40, 5):
            group = records[start : start + 5]
            assert len({r["task_id"] for r in group}) == 1
            for r in group:  # normalised, with the penalty of 1 for a response without EOS
                expected = (r["rm_score"] - 0.1) / 0.5 - r["truncated"]
                assert r["score"] == pytest.approx(expected, abs=1e-5)
            scores = [r["score"] for r in group]
            kept = [r["score"] for r in group if r["kept"]]
            if method == "raft":
                assert kept == [max(scores)]
            elif method == "bond":
                assert len(kept) == 5
            elif len({r["response"] for r in group}) > 1:
                assert sorted(kept) == [min(scores), max(scores)]


def test_all_methods_start_from_the_rollouts_of_stage_4(
    finished_runs, world, baselines, ppo, monkeypatch
):
    """Same prompts, same seeds: differences between methods and PF-PPO are paired."""
    monkeypatch.chdir(world)
    shared = vars(config(baselines, "dpo", "out/ppo")).items()  # the flags that 04 has, too
    fields = ppo.Config.__dataclass_fields__
    ppo.main(ppo.Config(**{k: v for k, v in shared if k in fields}, critic_warmup=1))

    def texts(folder, number):
        return [
            (r["task_id"], r["response"]) for r in read(folder / f"rollouts/{number:04d}.jsonl")
        ]

    for folder in finished_runs.values():
        assert texts(folder, 1) == texts(world / "out/ppo", 1)
        assert [t for t, _ in texts(folder, 2)] == [t for t, _ in texts(world / "out/ppo", 2)]
    # The offline methods still sample from SFT, RAFT from its policy.
    assert texts(finished_runs["dpo"], 2) == texts(finished_runs["kto"], 2)
    assert texts(finished_runs["dpo"], 2) != texts(finished_runs["raft"], 2)


@pytest.mark.parametrize("method", ["dpo", "bond"])
def test_lora_and_checkpointing(finished_runs, world, baselines, monkeypatch, tmp_path, method):
    """With LoRA the reference is the policy without its adapters, the anchor a copy with them."""
    pytest.importorskip("peft")
    monkeypatch.chdir(world)
    flags = dict(lora_rank=2, gradient_checkpointing=True, lr=1e-2, anchor_every=2, iterations=3)
    baselines.main(config(baselines, method, tmp_path / "o", **flags))
    metrics = read(tmp_path / "o/metrics.jsonl")
    full = read(finished_runs[method] / "metrics.jsonl")
    # The first loss sees the weights that the full run sees.
    assert metrics[1]["policy_loss"] == pytest.approx(full[1]["policy_loss"], abs=1e-4)
    assert abs(metrics[2]["kl_per_response"]) > 1e-4  # the adapters have moved, the reference not
    # Iteration 2 samples from SFT (dpo) or from the anchor that has not moved yet (bond).
    second = read(tmp_path / "o/rollouts/0002.jsonl")
    offline = read(finished_runs["dpo"] / "rollouts/0002.jsonl")
    assert [r["response"] for r in second] == [r["response"] for r in offline]
    if method == "dpo":  # with adapters on the reference, too, nothing would ever be apart
        assert abs(metrics[2]["policy_chosen_logratio"]) > 1e-4
    if method == "bond":  # in iteration 3 the anchor is the policy: its divergence is that of ranks
        scores = torch.tensor([r["score"] for r in read(tmp_path / "o/rollouts/0003.jsonl")])
        expected = -baselines.bond_rewards(scores.view(8, 5)).mean().item() - math.log(5)
        assert metrics[3]["policy_backward_kl"] == pytest.approx(expected, abs=1e-3)
    assert not (tmp_path / "o/last/adapter_config.json").exists()  # merged


def test_a_pair_is_the_best_and_the_worst_behind_their_prompt_and_for_kl_behind_another(
    world, baselines, monkeypatch, tmp_path
):
    """What KTO's loss and its reference point see, against the records."""
    monkeypatch.chdir(world)
    make_batch, policy_and_reference = baselines.make_batch, baselines.policy_and_reference
    calls, seen = [], []

    def recorded(prompts, responses):
        batch = make_batch(prompts, responses)
        calls.append((prompts, responses, batch))
        return batch

    def both(policy, reference, batch, cfg, amp):
        seen.append(next((p, r) for p, r, b in calls if b is batch))
        return policy_and_reference(policy, reference, batch, cfg, amp)

    monkeypatch.setattr(baselines, "make_batch", recorded)
    monkeypatch.setattr(baselines, "policy_and_reference", both)
    baselines.main(config(baselines, "kto", tmp_path / "o", iterations=1))
    prompts, responses = seen[1]  # the first is the policy's own batch
    pairs = [p for p, r, _ in calls if r == responses and p != prompts]
    assert len(pairs) == 1
    assert prompts == [pairs[0][k - 2] for k in range(len(prompts))]

    tokenizer = sandbox.load_tokenizer("./policy")
    records = read(tmp_path / "o/rollouts/0001.jsonl")
    expected = []
    for start in range(0, 40, 5):
        group = sorted(records[start : start + 5], key=lambda r: -r["score"])
        expected += [(r["prompt"], r["response"]) for r in (group[0], group[-1]) if r["kept"]]
    texts = [sandbox.decode_response(tokenizer, ids) for ids in responses]
    assert expected == list(zip([tokenizer.decode(ids) for ids in pairs[0]], texts))


def test_bond_gives_each_response_the_reward_of_its_own_rank(
    world, baselines, monkeypatch, tmp_path
):
    monkeypatch.chdir(world)
    train_groups, batches = baselines.train_groups, []

    def recorded(policy, optimizer, loss, batch, *rest):
        batches.append(batch)
        return train_groups(policy, optimizer, loss, batch, *rest)

    monkeypatch.setattr(baselines, "train_groups", recorded)
    baselines.main(config(baselines, "bond", tmp_path / "o", iterations=1))
    tokenizer = sandbox.load_tokenizer("./policy")
    records = read(tmp_path / "o/rollouts/0001.jsonl")
    scores = torch.tensor([r["score"] for r in records]).view(8, 5)
    rewards = baselines.bond_rewards(scores).flatten().tolist()
    expected = {(r["prompt"], r["response"]): reward for r, reward in zip(records, rewards)}
    names = ("input_ids", "attention_mask", "response_mask", "bond_rewards")
    for ids, whole, mask, reward in zip(*(batches[0][name] for name in names)):
        ids, length = ids[whole == 1].tolist(), int(mask.sum())
        prompt, text, reward = tokenizer.decode(ids[:-length]), ids[-length:], reward.item()
        assert expected[prompt, sandbox.decode_response(tokenizer, text)] == pytest.approx(reward)


def test_the_log_is_about_the_policy_not_the_sampler(world, baselines, monkeypatch, tmp_path):
    monkeypatch.chdir(world)
    generate, calls = baselines.generate, []

    def recorded(model, tokenizer, prompts, repeats, temperature, *rest):
        calls.append((repeats if temperature else 0, id(model)))
        return generate(model, tokenizer, prompts, repeats, temperature, *rest)

    monkeypatch.setattr(baselines, "generate", recorded)
    baselines.main(config(baselines, "dpo", tmp_path / "o"))
    policy = calls[0][1]  # of the first validation
    assert [repeats for repeats, _ in calls] == [0, 5, 5, 1, 0]
    assert [model == policy for _, model in calls] == [True, False, False, True, True]


def test_prompts_without_a_pair_are_left_out(world, baselines, monkeypatch, tmp_path):
    """Near temperature 0 all responses to a prompt are the same: no pair, and no crash."""
    monkeypatch.chdir(world)
    flags = dict(iterations=1, temperature=1e-4, prompts_per_iteration=4)
    baselines.main(config(baselines, "kto", tmp_path / "o", **flags))
    assert read(tmp_path / "o/metrics.jsonl")[1]["kept"] == 0


BAD = {
    "one response": (dict(responses_per_prompt=1), "--responses_per_prompt 1"),
    "no rounds": (dict(rounds=0), "--rounds 0"),
    "never": (dict(eval_every=0), "--eval_every 0"),
    "no pull": (dict(beta=0.0), "--beta 0.0"),
    "no RM": (dict(reward_model="out/nothing"), "no model at out/nothing"),
    "no data": (dict(data="nothing.jsonl"), "nothing.jsonl does not exist"),
    "not an RM": (dict(reward_model="./policy"), "reward_mean"),
    "a folder in the way": (dict(out="rm"), "rm holds no finished run"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(world, baselines, monkeypatch, capsys, name):
    monkeypatch.chdir(world)
    flags, words = BAD[name]
    before = sorted(world.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        baselines.main(config(baselines, "dpo", **{"out": "out/bad", **flags}))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert sorted(world.rglob("*")) == before


def test_a_finished_run_is_reused_and_other_settings_refused(
    finished_runs, world, baselines, monkeypatch, capsys
):
    monkeypatch.chdir(world)
    cfg = config(baselines, "dpo", "out/dpo", workers=2, micro_batch_size=4)
    before = (world / "out/dpo/metrics.jsonl").stat().st_mtime_ns
    baselines.main(cfg)
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        baselines.main(dataclasses.replace(cfg, beta=0.5))
    assert stop.value.code == 2 and "beta was 0.1, now 0.5" in capsys.readouterr().err
    assert (world / "out/dpo/metrics.jsonl").stat().st_mtime_ns == before
