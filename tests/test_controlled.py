"""tools/: controlled.py puts errors where it says; benchmark.py and compare.py run."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, load_script

import sandbox

sys.path.insert(0, str(ROOT / "tools"))


@pytest.fixture(scope="module")
def controlled():
    return load_script("tools/controlled.py")


def made_samples(prompts):
    """Five responses to each prompt, of which 30% pass; the hashes depend on the texts alone."""
    rng = random.Random(0)
    return [
        {"prompt": f"p{i}", "response": f"r{i} {k}" + "x" * rng.randrange(90), "total_tests": 4}
        | {"passed_tests": 4 if rng.random() < 0.3 else rng.randrange(4)}
        for i in range(prompts)
        for k in range(5)
    ]


def rewards(controlled, samples, profile):
    reward = controlled.ProfileReward(samples, profile)
    values = [reward(s["prompt"], s["response"], s["passed_tests"] / 4) for s in samples]
    return np.array(values), np.array([s["passed_tests"] == 4 for s in samples])


@pytest.mark.parametrize(
    ("profile", "expected"),
    [("clean", 1), ("moderate", 0.75), ("high", 0.75), ("low", 0.75), ("everywhere", 0.75)],
)
def test_profiles_order_as_many_pairs_and_are_distributed_alike(controlled, profile, expected):
    values, passed = rewards(controlled, made_samples(600), profile)
    ordered = (values[passed][:, None] > values[~passed]).mean()
    assert ordered == pytest.approx(expected, abs=0.03)
    assert values.mean() == pytest.approx(0, abs=0.02)
    assert values.std() == pytest.approx(1, abs=0.03)


def test_each_profile_errs_where_it_says(controlled):
    """Pass rates of the top and of the bottom eighth: 1 and 0 where they can be trusted."""
    samples = made_samples(600)
    ends = {}
    for profile in ("moderate", "moderate_length", "high", "low"):
        values, passed = rewards(controlled, samples, profile)
        ranked = passed[values.argsort()]
        ends[profile] = ranked[-len(ranked) // 16 :].mean(), ranked[: len(ranked) // 16].mean()
    assert ends["moderate"] == ends["moderate_length"] == (1, 0)
    assert 0.2 < ends["high"][0] < 0.4 and ends["high"][1] == 0
    assert ends["low"][0] == 1 and 0.2 < ends["low"][1] < 0.4


def test_moderate_length_prefers_long_responses(controlled):
    """Among the disturbed the reward rises with length; a hash does not."""
    samples = made_samples(600)
    lengths = np.array([len(s["response"]) for s in samples])
    by_length, _ = rewards(controlled, samples, "moderate_length")
    by_hash, _ = rewards(controlled, samples, "moderate")
    assert np.corrcoef(by_length, lengths)[0, 1] > 0.3
    assert abs(np.corrcoef(by_hash, lengths)[0, 1]) < 0.1


def test_stage_4_trains_on_the_profile(controlled, pipeline, tmp_path, monkeypatch):
    """The reward in the rollouts is the one that the verdicts there give."""
    monkeypatch.chdir(pipeline["folder"])
    monkeypatch.setattr(controlled.ppo, "score_responses", controlled.ppo.score_responses)
    sizes = {"iterations": 1, "critic_warmup": 0, "prompts_per_iteration": 8, "minibatch_size": 8}
    out = tmp_path / "bw"
    controlled.main(controlled.Config(profile="high", out=str(out), threads=1, **sizes))
    reward = controlled.ProfileReward(sandbox.read_jsonl("out/rm/samples.jsonl", {}), "high")
    rows = sandbox.read_jsonl(out / "rollouts/0001.jsonl", {})
    for row in rows:
        share_passed = row["passed_tests"] / row["total_tests"]
        expected = reward(row["prompt"], row["response"], share_passed) - row["truncated"]
        assert row["score"] == pytest.approx(expected, abs=1e-4)
    assert len(rows) == 40

    rescored = tmp_path / "high.jsonl"
    source = "out/rm/validation_samples.jsonl"
    controlled.main(controlled.Config(profile="high", rescore=source, out=str(rescored)))
    before, after = sandbox.read_jsonl(source, {}), sandbox.read_jsonl(rescored, {})
    assert [r["response"] for r in before] == [r["response"] for r in after]
    assert [r["rm_score"] for r in before] != [r["rm_score"] for r in after]


@pytest.mark.parametrize("policy", ["out/sft", "tiny"])
def test_benchmark_measures_an_iteration_and_every_sampler(pipeline, monkeypatch, tmp_path, policy):
    """In float32 all samplers write the same greedy responses."""
    benchmark = load_script("tools/benchmark.py")
    monkeypatch.chdir(pipeline["folder"])
    sizes = {"prompts": 4, "prompt_tokens": 24, "max_new_tokens": 24, "mean_length": 8, "rounds": 1}
    out = tmp_path / "lines.jsonl"
    benchmark.main(benchmark.Config((policy,), threads=1, bf16="off", out=str(out), **sizes))
    lines = sandbox.read_jsonl(out, {"model": str, "device": str, "flags": dict})
    names = [name for name, _, _ in benchmark.SAMPLERS if "bf16" not in name]
    assert [line["measured"] for line in lines] == ["iteration", *names]
    assert [line["error"] for line in lines if "error" in line] == []
    assert all(lines[0][f"{phase}_s"] >= 0 for phase in benchmark.PHASES)
    assert all(line["greedy_equal"] > 0.9 and line["tokens_per_s"] > 0 for line in lines[1:])


def test_benchmark_turns_a_failure_into_a_line_and_heeds_its_budget(tmp_path, monkeypatch):
    benchmark = load_script("tools/benchmark.py")
    out = tmp_path / "lines.jsonl"
    cfg = benchmark.Config(("tiny",), prompts=2, max_new_tokens=4, rounds=1, out=str(out))
    cfg.prompt_tokens = 5000  # longer than the context: 04 refuses it
    cfg.budget_minutes = 0.0
    benchmark.main(cfg)
    assert out.read_text() == ""
    cfg.budget_minutes = 1.0
    monkeypatch.setattr(benchmark, "SAMPLERS", ())
    benchmark.main(cfg)
    (line,) = sandbox.read_jsonl(out, {})
    assert line["error"] == "SystemExit: 2" and line["measured"] == "iteration"


def test_compare_shows_what_stages_4_and_5_have_written(pipeline, monkeypatch, tmp_path, capsys):
    compare = load_script("tools/compare.py")
    monkeypatch.chdir(pipeline["folder"])
    out = str(tmp_path / "page")
    compare.main(compare.Config(runs=["out/ppo_bw"], out=out, programs=3))
    printed = capsys.readouterr().out
    for row in json.loads(Path("out/eval/results.json").read_text(encoding="utf-8")):
        greedy, gain = row["greedy pass@1"]["mean"], row["gain"].get("greedy pass@1")
        line = next(x for x in printed.splitlines() if f"| {row['policy']} |" in x)
        assert f"| {100 * greedy:.1f} [" in line
        assert gain is None or f"| {100 * gain['mean']:+.1f} [" in line
    page = Path(f"{out}_programs.md").read_text()
    samples = [s for s in sandbox.read_jsonl("out/eval/samples.jsonl", {}) if s["greedy"]]
    first = {s["policy"]: s for s in samples if s["task_id"] == samples[0]["task_id"]}
    before = next(iter(first.values()))
    verdict = "passes" if before["actual_score"] == 1 else before["status"]
    assert page.count("\n## ") == 3
    assert f"`{before['policy']}`: {verdict}" in page and before["response"].strip("\n") in page
    assert Path(f"{out}.png").stat().st_size > 10_000
    with pytest.raises(SystemExit) as refused:
        compare.main(compare.Config(runs=["out/none"], out=out))
    assert refused.value.code == 2
