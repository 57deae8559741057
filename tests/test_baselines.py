"""The baselines of Table 2: losses by hand, BOND against exact divergences, and every method on the small pipeline."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import load_script

METHODS = ("raft", "bond", "dpo", "ipo", "kto", "iterative_dpo")


# ------------------------------------------------------------------------------------------------------ losses by hand

# Two pairs: the policy raised the chosen response of the first by 1 nat and lowered its rejected one by 1: h = 1 - (-1) = 2;
# of the second it left the chosen as it was and raised the rejected one by 2: h = 0 - 2 = -2.
PAIRS = dict(chosen=torch.tensor([-2.0, -3.0]), rejected=torch.tensor([-4.0, -3.0]), ref_chosen=torch.tensor([-3.0, -3.0]),
             ref_rejected=torch.tensor([-3.0, -5.0]))


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
    # the labels swapped: 1 - sigmoid(-1) = 0.7310586 and 1 - sigmoid(-3) = 0.9525741; mean 0.8418163; the KL as a number
    swapped = baselines.kto_loss(logprobs, ref_logprobs, torch.tensor([False, True]), 0.5, 2.0)
    assert swapped.item() == pytest.approx(0.8418163, abs=1e-6)


def test_losses_at_the_reference(baselines):
    """A policy that equals its reference: DPO log 2, IPO the squared target, KTO one half; and the limits of a large h."""
    a, b = torch.tensor([-3.0, -50.0, -0.1]), torch.tensor([-7.0, -2.0, -0.1])
    labels = torch.tensor([True, False, True])
    for beta in (0.1, 2.0):
        assert baselines.dpo_loss(a, b, a, b, beta).item() == pytest.approx(math.log(2), abs=1e-6)
        assert baselines.ipo_loss(a, b, a, b, beta).item() == pytest.approx((1 / (2 * beta)) ** 2, rel=1e-6)
        assert baselines.kto_loss(a, a, labels, 0.0, beta).item() == pytest.approx(0.5, abs=1e-6)
        assert baselines.ipo_loss(a + 1 / (2 * beta), b, a, b, beta).item() == pytest.approx(0.0, abs=1e-6)
    assert baselines.dpo_loss(a + 500, b, a, b, 1.0).item() == pytest.approx(0.0, abs=1e-6)
    assert baselines.dpo_loss(a - 500, b, a, b, 1.0).item() == pytest.approx(500.0)  # linear, not infinite
    assert baselines.kto_loss(a + 500, a, labels, 0.0, 1.0).item() == pytest.approx(1 / 3, abs=1e-6)  # one of three is wrong


@pytest.mark.parametrize("name", ["dpo_loss", "ipo_loss"])
def test_pair_gradients_raise_the_chosen_and_lower_the_rejected_alike(baselines, name):
    chosen, rejected = torch.tensor([-3.0, -4.0], requires_grad=True), torch.tensor([-5.0, -2.0], requires_grad=True)
    getattr(baselines, name)(chosen, rejected, torch.tensor([-3.0, -4.0]), torch.tensor([-5.0, -2.0]), 0.1).backward()
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
    baselines.kto_loss(logprobs, torch.tensor([-3.0, -3.0]), torch.tensor([True, False]), kl, 0.1).backward()
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


# --------------------------------------------------------------------------------------------------------------- BOND


def test_bond_rewards_by_hand(baselines):
    rewards = baselines.bond_rewards(torch.tensor([[0.1, 0.5, 0.3], [7.0, 7.0, -2.0]]))
    # first prompt: at most 0.1 is one of three, 0.5 all, 0.3 two; (N - 1) log p = 2 log(1/3), 0, 2 log(2/3)
    # second: both 7s have all at or below them, -2 one of three
    expected = [[2 * math.log(1 / 3), 0.0, 2 * math.log(2 / 3)], [0.0, 0.0, 2 * math.log(1 / 3)]]
    assert torch.allclose(rewards, torch.tensor(expected), atol=1e-6)
    # a prompt's rewards depend on ranks alone, and on no other prompt
    assert torch.equal(baselines.bond_rewards(torch.tensor([[-100.0, 1000.0, 0.0]])), rewards[:1])


def test_bond_loss_by_hand(baselines):
    # One prompt, N = 2, policy at the anchor: rewards log(1/2) and 0; w = 1; A = (g - mean) * 2 = (-log 2, log 2).
    logprobs = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    rewards = baselines.bond_rewards(torch.tensor([[0.0, 1.0]]))
    loss, statistics = baselines.bond_loss(logprobs, logprobs.detach(), rewards)
    loss.backward()
    # forward: -log pi(best) = 3. Backward: -(A1 * -1 + A2 * -3) / 2 = -(log 2 - 3 log 2) / 2 = log 2
    assert loss.item() == pytest.approx(3 + math.log(2), abs=1e-6)
    # gradient: forward -1 for the best; backward -A / 2 = +log 2 / 2 for the worst, -log 2 / 2 for the best
    assert logprobs.grad[0].tolist() == pytest.approx([math.log(2) / 2, -1 - math.log(2) / 2], abs=1e-6)
    # the divergence itself: -mean(g) - log N = log 2 / 2 - log 2
    assert statistics == {"forward_nll": 3.0, "backward_kl": pytest.approx(-math.log(2) / 2, abs=1e-6)}


def test_bond_gradient_is_that_of_the_exact_divergences(baselines):
    """Four outcomes, each sampled once from a uniform anchor: means over samples are expectations under the anchor.

    The gradient of the backward part must then be that of KL(pi || N pi_anchor p^(N-1)), times N / (N - 1): the baseline of
    the other responses takes them for independent draws, which an enumeration is not.
    """
    torch.manual_seed(0)
    logits = (0.5 * torch.randn(1, 4)).requires_grad_()
    anchor = torch.full((1, 4), math.log(1 / 4))
    rewards = baselines.bond_rewards(torch.tensor([[0.3, -1.0, 2.0, 0.9]]))
    policy = torch.log_softmax(logits, 1)
    loss, statistics = baselines.bond_loss(policy, anchor, rewards)
    ours, = torch.autograd.grad(loss + policy[0, 2], logits, retain_graph=True)  # without the forward part, -log pi(best)
    divergence = (policy.exp() * (policy - (math.log(4) + anchor + rewards))).sum()
    exact, = torch.autograd.grad(divergence, logits)
    assert torch.allclose(ours, exact * 4 / 3, atol=1e-6) and exact.abs().max() > 0.1
    assert statistics["backward_kl"] == pytest.approx(divergence.item(), abs=1e-5)


def test_bond_stops_at_the_best_of_n_policy(baselines):
    """At pi = N pi_anchor p^(N-1) / Z, all responses have the same gain and the backward part no gradient."""
    rewards = baselines.bond_rewards(torch.tensor([[0.3, -1.0, 2.0, 0.9]]))
    anchor = torch.full((1, 4), math.log(1 / 4))
    target = torch.log_softmax(anchor + rewards, 1).requires_grad_()
    loss, _ = baselines.bond_loss(target, anchor, rewards)
    (loss + target[0, 2]).backward()
    assert target.grad.abs().max() < 1e-6


# ------------------------------------------------------------------------------------------------- choosing and training


def test_best_and_worst_with_ties(baselines):
    best, worst = baselines.best_and_worst(torch.tensor([[1.0, 3.0, 3.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]]))
    assert best.tolist() == [1, 0] and worst.tolist() == [4, 4]  # the first of the best, the last of the worst


def test_where_the_samples_come_from(baselines):
    def schedule(method, anchor_every=1):
        return [baselines.sampler_iteration(method, i, 20, 3, anchor_every) for i in range(1, 21)]

    assert schedule("raft") == schedule("bond") == list(range(20))
    assert schedule("dpo") == schedule("ipo") == schedule("kto") == [0] * 20
    assert schedule("iterative_dpo") == [0] * 7 + [7] * 7 + [14] * 6  # three rounds
    assert schedule("bond", 5) == [0] * 5 + [5] * 5 + [10] * 5 + [15] * 5


def test_micro_batches_change_nothing_and_groups_stay_together(baselines):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 6, (12,), generator=generator)
    mask = (torch.arange(5) < lengths[:, None]).long()
    batch = {"prompt_ids": torch.ones(12, 1, dtype=torch.long), "prompt_mask": torch.ones(12, 1, dtype=torch.long),
             "response_ids": torch.randint(0, 9, (12, 5), generator=generator) * mask, "response_mask": mask,
             "number": torch.arange(12)}
    groups = torch.tensor([[0, 7], [3, 2], [9, 4], [11, 5], [6, 10]])
    weights, seen = [], []

    def loss_of(mb, prepared):
        numbers = mb["number"].view(-1, 2)
        seen.append(numbers)
        assert set(map(tuple, numbers.tolist())) <= set(map(tuple, groups.tolist())) and prepared == "prepared"
        sums = (model(mb["response_ids"]).squeeze(2) * mb["response_mask"]).sum(1).view(-1, 2)
        return ((sums[:, 0] - sums[:, 1] - 1) ** 2).mean(), {"one": 1.0}

    for micro_batch_size in (1, 2, 4, 8):
        torch.manual_seed(1)
        model = torch.nn.Embedding(9, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        cfg = SimpleNamespace(minibatch_size=6, micro_batch_size=micro_batch_size, max_grad_norm=1.0)
        seen.clear()
        statistics = baselines.train_groups(model, optimizer, loss_of, batch, groups, cfg, torch.Generator().manual_seed(2),
                                            torch.device("cpu"), lambda numbers: "prepared")
        assert sorted(torch.cat(seen).tolist()) == sorted(groups.tolist())  # each group once
        assert statistics["one"] == pytest.approx(1.0)
        weights.append(torch.tensor([*model.weight.flatten().tolist(), statistics["loss"], statistics["grad_norm"]]))
    assert all(torch.allclose(weights[0], other, atol=1e-5) for other in weights[1:])


# --------------------------------------------------------------------------------------------- on the small pipeline


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def config(baselines, method, out, **flags):
    shutil.rmtree(out, ignore_errors=True)
    settings = dict(iterations=2, prompts_per_iteration=8, minibatch_size=80, micro_batch_size=20, eval_every=2, lr=1e-3,
                    anchor_every=1)
    return baselines.Config(method=method, out=str(out), **{**settings, **flags})


@pytest.fixture(scope="session")
def finished_runs(pipeline, baselines):
    """Each method for two iterations of one optimiser step: {method: folder}."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(pipeline["folder"])
        for method in METHODS:
            baselines.main(config(baselines, method, f"out/base_{method}", rounds=2))
    return {method: pipeline["folder"] / f"out/base_{method}" for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_logs(finished_runs, pipeline, method):
    from transformers import AutoModelForCausalLM

    folder = finished_runs[method]
    metrics = read(folder / "metrics.jsonl")
    assert [m["iteration"] for m in metrics] == [0, 1, 2]
    on_policy = method in ("raft", "bond", "iterative_dpo")  # two rounds in two iterations
    for m in metrics[1:]:
        assert m["seen"] == 40
        for name in ("rm_score", "pass_rate", "sampler_rm_score", "sampler_pass_rate", "pass_rate_kept", "kl_per_token",
                     "entropy", "truncated", "length", "policy_loss", "policy_grad_norm", "seconds_generate", "seconds_train"):
            assert math.isfinite(m[name]), name
    # before the first update the policy is its reference, and its rollouts are the samples; after it, neither
    assert metrics[1]["kl_per_response"] == 0.0 and metrics[1]["only_measured"] == 0
    assert metrics[1]["pass_rate"] == metrics[1]["sampler_pass_rate"]
    assert metrics[2]["kl_per_response"] != 0.0 and metrics[2]["only_measured"] == (0 if on_policy else 8)
    assert metrics[2]["sampled_after"] == (1 if on_policy else 0)
    start, last = (AutoModelForCausalLM.from_pretrained(path) for path in (pipeline["folder"] / "out/sft", folder / "last"))
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), last.parameters()))
    assert (folder / "best/config.json").is_file() and (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_first_loss_is_the_one_at_the_reference(finished_runs, baselines):
    """One step an iteration: the loss of the first is that of a policy equal to its reference or anchor."""
    losses = {method: [m["policy_loss"] for m in read(folder / "metrics.jsonl")[1:]]
              for method, folder in finished_runs.items()}
    assert losses["dpo"][0] == losses["iterative_dpo"][0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses["ipo"][0] == pytest.approx(25.0, rel=1e-4)  # (1 / (2 * 0.1))^2
    assert losses["kto"][0] == pytest.approx(0.5, abs=1e-5)
    scores = torch.tensor([r["score"] for r in read(finished_runs["bond"] / "rollouts/0001.jsonl")]).view(8, 5)
    backward = read(finished_runs["bond"] / "metrics.jsonl")[1]["policy_backward_kl"]
    assert backward == pytest.approx(-baselines.bond_rewards(scores).mean().item() - math.log(5), abs=1e-4)


@pytest.mark.parametrize("method", ["raft", "dpo", "ipo", "kto"])
def test_a_step_lowers_the_loss_of_its_own_samples(finished_runs, pipeline, baselines, monkeypatch, method):
    """A second pass over the samples of iteration 1 (the logged loss is that of the last pass) against the first."""
    monkeypatch.chdir(pipeline["folder"])
    baselines.main(config(baselines, method, "out/second_pass", iterations=1, epochs=2, lr=1e-4))
    first = read(finished_runs[method] / "metrics.jsonl")[1]["policy_loss"]
    assert read(pipeline["folder"] / "out/second_pass/metrics.jsonl")[1]["policy_loss"] < first


def test_a_reward_that_is_not_a_number_stops_the_run(pipeline, baselines, monkeypatch, capsys):
    """argsort puts nan first: it would be the chosen response."""
    monkeypatch.chdir(pipeline["folder"])
    monkeypatch.setattr(baselines, "score_responses", lambda model, sequences, *_: torch.tensor([math.nan] + [0.5] * (len(sequences) - 1)))
    with pytest.raises(SystemExit):
        baselines.main(config(baselines, "dpo", "out/nan_reward", iterations=1))
    assert "not a finite number" in capsys.readouterr().err
    assert len(read(pipeline["folder"] / "out/nan_reward/rollouts/0001.jsonl")) == 40


@pytest.mark.parametrize("method", METHODS)
def test_the_kept_responses_are_the_right_ones_of_their_prompt(finished_runs, method):
    for path in sorted((finished_runs[method] / "rollouts").iterdir()):
        records = read(path)
        assert len(records) == 40
        for start in range(0, 40, 5):
            group = records[start:start + 5]
            assert len({r["task_id"] for r in group}) == 1
            scores = [r["score"] for r in group]
            kept = [r["score"] for r in group if r["kept"]]
            assert [r["score"] for r in group if r["best"]] == [max(scores)]
            if method == "raft":
                assert kept == [max(scores)]
            elif method == "bond":
                assert len(kept) == 5
            elif len({r["response"] for r in group}) > 1:
                assert sorted(kept) == [min(scores), max(scores)]
            else:
                assert not kept


def test_all_methods_start_from_the_rollouts_of_stage_4(finished_runs, pipeline):
    """Same prompts, same seeds: differences between methods and PF-PPO are paired."""
    def texts(folder, number):
        return [(r["task_id"], r["response"]) for r in read(folder / f"rollouts/{number:04d}.jsonl")]

    ppo = pipeline["folder"] / "out/ppo_bw"
    for method, folder in finished_runs.items():
        assert texts(folder, 1) == texts(ppo, 1)
        assert [task for task, _ in texts(folder, 2)] == [task for task, _ in texts(ppo, 2)]
    assert texts(finished_runs["dpo"], 2) == texts(finished_runs["kto"], 2) != texts(finished_runs["raft"], 2)


@pytest.mark.parametrize("method", ["bond", "kto"])
def test_an_interrupted_run_resumes_to_the_same_metrics(pipeline, baselines, monkeypatch, method, capsys):
    """Stopped in the last of four iterations, where BOND's anchor is the policy after two: it must come from the state."""
    monkeypatch.chdir(pipeline["folder"])
    flags = dict(iterations=4, anchor_every=2, prompts_per_iteration=4, minibatch_size=10)
    baselines.main(config(baselines, method, "out/unbroken", **flags))
    cfg = config(baselines, method, "out/broken", **flags)
    write = baselines.write_jsonl

    def interrupted(path, records):
        if path.name == "0004.jsonl":
            raise KeyboardInterrupt
        write(path, records)

    with monkeypatch.context() as patch:
        patch.setattr(baselines, "write_jsonl", interrupted)
        with pytest.raises(KeyboardInterrupt):
            baselines.main(cfg)
    assert not (pipeline["folder"] / "out/broken/stage_config.json").exists()
    with pytest.raises(SystemExit) as stop:  # neither overwritten nor taken for finished
        baselines.main(cfg)
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        baselines.main(baselines.dataclasses.replace(cfg, resume=True, beta=0.3))
    assert stop.value.code == 2 and "beta" in capsys.readouterr().err
    baselines.main(baselines.dataclasses.replace(cfg, resume=True))
    assert "resuming out/broken after iteration 3" in capsys.readouterr().out
    results = []
    for name in ("unbroken", "broken"):
        folder = pipeline["folder"] / "out" / name
        metrics = [{k: v for k, v in m.items() if not k.startswith("seconds")} for m in read(folder / "metrics.jsonl")]
        results.append((metrics, (folder / "last/model.safetensors").read_bytes()))
    assert results[0] == results[1] and len(results[0][0]) == 5


def test_prompts_without_a_pair_are_left_out(pipeline, baselines, monkeypatch):
    """Near temperature 0 nearly all responses to a prompt are the same: no pair, no crash, nothing kept of them."""
    monkeypatch.chdir(pipeline["folder"])
    for method in ("kto", "dpo"):
        baselines.main(config(baselines, method, "out/cold", iterations=1, temperature=1e-4, prompts_per_iteration=4))
        assert read(pipeline["folder"] / "out/cold/metrics.jsonl")[1]["kept"] == 0


@pytest.mark.parametrize("flags, words", [
    (dict(responses_per_prompt=1), "--responses_per_prompt is 1"), (dict(rounds=0), "--rounds is 0"),
    (dict(beta=0.0), "--beta is 0.0"), (dict(reward_model="out/nothing"), "no model at out/nothing"),
    (dict(data="data/nothing.jsonl"), "data/nothing.jsonl does not exist"),
    (dict(reward_model="out/sft"), "no reward_mean")], ids=lambda value: str(value)[:24])
def test_bad_input_is_one_line_and_exit_code_2(pipeline, baselines, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(pipeline["folder"])
    with pytest.raises(SystemExit) as stop:
        baselines.main(config(baselines, "dpo", "out/bad", **flags))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert not (pipeline["folder"] / "out/bad").exists()


def test_a_finished_run_is_reused_and_other_settings_refused(finished_runs, pipeline, baselines, monkeypatch, capsys):
    monkeypatch.chdir(pipeline["folder"])
    settings = json.loads((finished_runs["dpo"] / "stage_config.json").read_text())
    before = (finished_runs["dpo"] / "metrics.jsonl").stat().st_mtime_ns
    baselines.main(baselines.Config(**settings))
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        baselines.main(baselines.Config(**{**settings, "beta": 0.5}))
    assert stop.value.code == 2 and "beta was 0.1, now 0.5" in capsys.readouterr().err
    assert (finished_runs["dpo"] / "metrics.jsonl").stat().st_mtime_ns == before
