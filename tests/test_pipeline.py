"""All stages as subprocesses, as a reader types them, on a small set; what 04 promises of a run."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import PPO_FLAGS, ROOT, run_script
from test_filter import STRATEGIES
from transformers import AutoTokenizer

import sandbox

SAMPLE = {
    "task_id": str,
    "prompt": str,
    "response": str,
    "rm_score": (float, type(None)),
    "actual_score": float,
    "passed_tests": int,
    "total_tests": int,
    "status": str,
    "trust": str,
    "truncated": bool,
    "policy": str,
}


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def small_run(ppo, folder, monkeypatch, **options):
    """04 in this process on the pipeline's models -> (metrics, rollouts of the last iteration)."""
    monkeypatch.chdir(folder)
    sizes = dict(iterations=2, critic_warmup=1, prompts_per_iteration=4, minibatch_size=8)
    cfg = ppo.Config(**sizes | {"eval_every": 2, "out": "out/small"} | options)
    shutil.rmtree(cfg.out, ignore_errors=True)
    ppo.main(cfg)
    rollouts = sorted((folder / cfg.out / "rollouts").iterdir())
    return read(folder / cfg.out / "metrics.jsonl"), read(rollouts[-1])


# ------------------------------------------------------------------------------- what stages write


@pytest.mark.parametrize(
    "path",
    [
        "rm/samples.jsonl",
        "rm/validation_samples.jsonl",
        "ppo_bw/rollouts/0001.jsonl",
        "eval/samples.jsonl",
    ],
)
def test_samples_have_their_fields_and_verdicts(pipeline, path):
    records = read(pipeline["folder"] / "out" / path)
    for record in records:
        assert all(isinstance(record[name], types) for name, types in SAMPLE.items()), record
        passed = record["status"] == "passed"
        assert passed == (record["actual_score"] == 1.0)
        assert passed == (record["passed_tests"] == record["total_tests"])
    assert {0.0, 1.0} == {record["actual_score"] for record in records}  # both verdicts occur


def test_checkpoints_are_ordinary_folders(pipeline, ppo, sft):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    out = pipeline["folder"] / "out"
    start, best, last = (
        AutoModelForCausalLM.from_pretrained(out / name)
        for name in ("sft", "ppo_bw/best", "ppo_bw/last")
    )
    assert start.config.eos_token_id == best.config.eos_token_id != best.config.pad_token_id
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), last.parameters()))
    reward_model = AutoModelForSequenceClassification.from_pretrained(out / "rm")
    assert reward_model.config.num_labels == 1 and reward_model.config.reward_std > 0
    # A batch through transformers' own forward pass gives the scores that stage 2 has saved.
    tokenizer = sandbox.load_tokenizer(str(out / "rm"))
    samples = [r for r in read(out / "rm/validation_samples.jsonl") if not r["truncated"]][:20]
    rows = [
        sandbox.encode_prompt(tokenizer, r["prompt"])
        + sandbox.encode_response(tokenizer, r["response"])
        for r in samples
    ]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        scores = reward_model(**batch).logits[:, 0]
    stored = torch.tensor([r["rm_score"] for r in samples])
    # A policy may have sampled a text by other tokens than the tokenizer's own: not quite all.
    assert (scores - stored).abs().less(1e-2).float().mean() >= 0.8


def test_r2_names_a_filter_or_none(pipeline):
    result = json.loads((pipeline["folder"] / "out/r2/r2.json").read_text())
    rows = result["policies"][0]["strategies"]
    assert set(STRATEGIES) - {"single"} == set(rows)
    assert result["recommended"] in [None, *rows]
    assert result["verdict"] in pipeline["03_r2_analysis.py"]


def test_eval_table(pipeline):
    table = (pipeline["folder"] / "out/eval/table.txt").read_text()
    assert table in pipeline["05_eval.py"]
    canonical = next(line for line in table.splitlines() if line.startswith("canonical"))
    assert "1.000" in canonical


# -------------------------------------------------------------------------------------- a PPO run


def test_ppo_starts_at_ratio_one_and_kl_zero_and_logs_everything(pipeline):
    metrics = read(pipeline["folder"] / "out/ppo_bw/metrics.jsonl")
    assert [m["iteration"] for m in metrics] == [0, 1, 2, 3, 4]
    # The policy first learns in iteration 2, from two minibatches, the first at ratio 1.
    kl = [m["kl_per_response"] for m in metrics[1:]]
    assert kl[:2] == pytest.approx([0.0, 0.0], abs=1e-5) and abs(kl[3]) > 1e-4
    assert "policy_loss" not in metrics[1]
    assert metrics[2]["policy_ratio"] == pytest.approx(1.0, abs=0.05)
    names = "rm_score score pass_rate pass_rate_kept truncated length explained_variance kl_coef"
    names += " critic_loss critic_grad_norm seconds_generate seconds_train"
    for m in metrics[1:]:
        assert m["kept"] == 16 and m["seen"] == 40
        assert all(math.isfinite(m[name]) for name in names.split())
    for m in metrics[2::2]:
        names = ("validation_pass_at_1", "unfiltered_kl_per_response", "entropy", "policy_loss")
        assert all(math.isfinite(m[name]) for name in names)
    best = max(m["validation_pass_at_1"] for m in metrics if "validation_pass_at_1" in m)
    assert f"best validation pass@1 {best:.3f}" in pipeline["04_pf_ppo.py"]


def test_bw_kept_the_best_and_the_worst_of_each_prompt(pipeline):
    for path in sorted((pipeline["folder"] / "out/ppo_bw/rollouts").iterdir()):
        records = read(path)
        assert len(records) == 40
        for start in range(0, 40, 5):
            group = records[start : start + 5]
            assert len({r["task_id"] for r in group}) == 1
            kept, scores = [r["score"] for r in group if r["kept"]], [r["score"] for r in group]
            assert sorted(kept) == [min(scores), max(scores)]


def test_all_fields_of_a_kept_row_belong_to_one_response(pipeline, ppo, monkeypatch):
    """What `train_epoch` gets for a row is that row's tokens, score, value and advantage."""
    seen, train_epoch = [], ppo.train_epoch

    def recorder(model, optimizer, loss_function, batch, *others):
        seen.append({name: field.clone() for name, field in batch.items()})
        return train_epoch(model, optimizer, loss_function, batch, *others)

    monkeypatch.setattr(ppo, "train_epoch", recorder)
    options = dict(strategy="br", iterations=1, critic_warmup=0, prompts_per_iteration=6)
    _, records = small_run(ppo, pipeline["folder"], monkeypatch, **options)
    kept = [record for record in records if record["kept"]]
    tokenizer, batch = sandbox.load_tokenizer("out/sft"), seen[0]
    mask, whole = batch["response_mask"].bool(), batch["attention_mask"].bool()
    assert len(kept) == len(mask) == 12
    for k, record in enumerate(kept):
        sequence, length = batch["input_ids"][k][whole[k]].tolist(), int(mask[k].sum())
        prompt, ids = sequence[:-length], sequence[-length:]
        assert sandbox.decode_response(tokenizer, ids) == record["response"]
        assert prompt == sandbox.encode_prompt(tokenizer, record["prompt"])
        # Nothing is trained yet, so the KL is 0: the last return is the score of the response.
        last_return = batch["returns"][k][len(ids) - 1].item()
        assert last_return == pytest.approx(record["score"], abs=1e-4)
    plain = (batch["returns"] - batch["old_values"])[mask]
    whitened = (plain - plain.mean()) / plain.std(unbiased=False)
    assert torch.allclose(batch["advantages"][mask], whitened, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"strategy": strategy} for strategy in STRATEGIES]
    + [
        {"strategy": "bw", "advantage": "rloo"},
        {"strategy": "br", "advantage": "grpo"},
        {"strategy": "br", "gradient_checkpointing": True, "bf16": "on", "epochs": 2},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_strategy_and_variant_runs(pipeline, ppo, options, monkeypatch):
    metrics, _ = small_run(ppo, pipeline["folder"], monkeypatch, **options)
    last = metrics[-1]
    assert last["seen"] == 20 and math.isfinite(last["policy_loss"])
    kept = {"none": 20, "single": 20, "bon": 4, "br": 8, "bw": 8, "random2": 8}
    kept |= {f"pow_{k}": 20 for k in (1, 2, 3)}
    assert last["kept"] == kept.get(options["strategy"], last["kept"])


def test_adaptive_kl_changes_the_coefficient_once_the_policy_moves(pipeline, ppo, monkeypatch):
    options = dict(strategy="none", kl_control="adaptive", iterations=4, lr=1e-3)
    metrics, _ = small_run(ppo, pipeline["folder"], monkeypatch, **options)
    coefs = [m["kl_coef"] for m in metrics[1:]]
    assert coefs[:3] == [0.3] * 3 and coefs[3] != 0.3


@pytest.mark.parametrize("advantage", ["gae", "grpo"])
def test_the_tests_as_reward_need_no_reward_model(pipeline, ppo, monkeypatch, advantage):
    options = dict(reward="tests", advantage=advantage, reward_model="out/nowhere", strategy="bw")
    metrics, records = small_run(ppo, pipeline["folder"], monkeypatch, **options)
    for record in records:
        share = record["passed_tests"] / record["total_tests"] - record["truncated"]
        assert record["rm_score"] is None and record["score"] == pytest.approx(share)
    assert metrics[-1]["rm_score"] is None and "policy_loss" in metrics[-1]
    if advantage == "gae":  # the critic's head starts at 0, so before training all values are 0
        assert metrics[1]["explained_variance"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("advantage", ["gae", "grpo"])
def test_the_policy_follows_the_reward_and_its_opposite(pipeline, ppo, monkeypatch, advantage):
    """A reward for short responses makes them shorter; with its sign flipped, longer."""
    final = {}
    for sign in (1.0, -1.0):

        def reward(model, sequences, batch_size, progress=None, sign=sign):
            lengths = torch.tensor([float(len(ids)) for ids in sequences])
            config = model.config
            score = -sign * (lengths - lengths.mean()) / 5
            return config.reward_mean + config.reward_std * score

        monkeypatch.setattr(ppo, "score_responses", reward)
        options = dict(advantage=advantage, strategy="none", iterations=4, critic_warmup=0, lr=1e-3)
        options |= dict(
            prompts_per_iteration=16, minibatch_size=16, max_new_tokens=48, eval_every=4
        )
        options |= dict(kl_coef=0.0, truncation_penalty=0.0)
        metrics, _ = small_run(ppo, pipeline["folder"], monkeypatch, **options)
        final[sign] = metrics[-1]["length"]
    assert final[-1.0] - final[1.0] > 3  # tokens, of about 26


def test_a_truncated_response_is_marked_and_pays_a_penalty(pipeline, ppo, monkeypatch):
    options = dict(strategy="none", max_new_tokens=24, iterations=1, critic_warmup=0)
    _, records = small_run(ppo, pipeline["folder"], monkeypatch, **options)
    config = ppo.AutoConfig.from_pretrained("out/rm")
    assert {True, False} == {record["truncated"] for record in records}
    for record in records:
        score = (record["rm_score"] - config.reward_mean) / config.reward_std
        assert record["score"] == pytest.approx(score - record["truncated"], abs=1e-4)


def test_lora_runs_and_saves_merged_folders(pipeline, ppo, monkeypatch):
    pytest.importorskip("peft")
    metrics, _ = small_run(ppo, pipeline["folder"], monkeypatch, lora_rank=4, lr=1e-3)
    assert metrics[1]["kl_per_response"] == pytest.approx(0.0, abs=1e-5)
    assert math.isfinite(metrics[2]["policy_loss"])
    folder = pipeline["folder"] / "out/small/last"
    assert (folder / "model.safetensors").exists() and not (folder / "adapter_config.json").exists()


def test_sampler_and_filter_draw_from_different_streams(pipeline, ppo, monkeypatch):
    """With one stream, `random2` would keep a response by the number that chose a token."""
    drawn, rand = [], torch.rand

    def recorder(*args, **kwargs):
        drawn.append(rand(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(torch, "rand", recorder)
    small_run(ppo, pipeline["folder"], monkeypatch, strategy="random2", iterations=1)
    sampler = torch.cat([x.flatten() for x in drawn if x.shape[-1] == 1])
    noise = torch.cat([x.flatten() for x in drawn if x.shape == (4, 5)])
    assert len(noise) == 20 and not torch.isin(noise, sampler).any()


# ----------------------------------------------------------------------------- again, and resumed


def without_seconds(metrics):
    return [{k: v for k, v in m.items() if not k.startswith("seconds")} for m in metrics]


def test_a_finished_stage_is_reused_and_other_settings_are_refused(pipeline):
    folder = pipeline["folder"]
    before = (folder / "out/ppo_bw/metrics.jsonl").stat().st_mtime_ns
    command = ("04_pf_ppo.py", "--strategy", "bw", *PPO_FLAGS)
    free = ("--threads", 2, "--workers", 2, "--micro_batch_size", 4, "--score_batch_size", 9)
    assert "is finished" in run_script(*command, *free, cwd=folder).stdout
    assert (folder / "out/ppo_bw/metrics.jsonl").stat().st_mtime_ns == before
    done = run_script(*command, "--lr", 1, cwd=folder, check=False)
    assert done.returncode == 2 and "lr was 0.0001, now 1.0" in done.stderr


def test_a_killed_run_resumes_to_the_same_result(pipeline):
    """SIGKILL in the middle of an iteration; --resume ends where the unbroken run ended."""
    folder = pipeline["folder"]
    flags = [str(flag) for flag in ("--strategy", "bw", "--out", "out/killed", *PPO_FLAGS)]
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "04_pf_ppo.py"), *flags],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    metrics, deadline = folder / "out/killed/metrics.jsonl", time.time() + 180
    while not (metrics.exists() and len(read(metrics)) >= 4) and time.time() < deadline:
        assert run.poll() is None
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)  # after iteration 3; the last state is that of iteration 2
    run.wait()
    assert not (folder / "out/killed/stage_config.json").exists()
    refused = run_script("04_pf_ppo.py", *flags, cwd=folder, check=False)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    other = run_script("04_pf_ppo.py", *flags, "--resume", "--lr", 1, cwd=folder, check=False)
    assert other.returncode == 2 and "lr" in other.stderr
    assert "resuming" in run_script("04_pf_ppo.py", *flags, "--resume", cwd=folder).stdout
    unbroken, resumed = (
        without_seconds(read(folder / f"out/{name}/metrics.jsonl")) for name in ("ppo_bw", "killed")
    )
    assert resumed == unbroken
    for name in ("best", "last"):
        one, other = (
            (folder / f"out/{run}/{name}/model.safetensors").read_bytes()
            for run in ("ppo_bw", "killed")
        )
        assert one == other


def test_killed_at_its_first_state_it_starts_again(pipeline, ppo, monkeypatch, killed_at):
    """All that it had written was in <out>.tmp."""
    folder = pipeline["folder"]
    killed_at("state_config.json", lambda: small_run(ppo, folder, monkeypatch, out="out/first"))
    assert not (folder / "out/first").exists()
    metrics, _ = small_run(ppo, folder, monkeypatch, out="out/first", resume=True)
    unbroken, _ = small_run(ppo, folder, monkeypatch)
    assert without_seconds(metrics) == without_seconds(unbroken)
    assert not (folder / "out/first.tmp").exists()
    names = [{path.name for path in (folder / out).iterdir()} for out in ("out/first", "out/small")]
    assert names[0] == names[1] and "state.pt" not in names[0]


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, words",
    [
        ({"data": "data/nowhere.jsonl"}, "data/nowhere.jsonl"),
        ({"policy": "out/nowhere"}, "out/nowhere"),
        ({"policy": "out/rm"}, "out/rm is a reward model"),
        ({"policy": "no/such_model"}, "no/such_model"),  # a name that the hub does not give
        ({"policy": "out/torn"}, "out/torn"),
        ({"reward_model": "out/sft"}, "reward_std"),
        ({"reward_model": "out/std_0"}, "reward_std are [0.0, 0.0]"),
        ({"reward_model": "out/std_inf"}, "reward_std are [0.0, inf]"),
        ({"reward_model": "out/mean_null"}, "reward_std are [None, 1.0]"),
        ({"reward_model": "out/adapters"}, "merge LoRA adapters"),
        ({"policy": "out/no_weights"}, "no model at out/no_weights"),
        ({"policy": "out/cut"}, "no model at out/cut"),
        ({"reward_model": "out/other_tokens"}, "tokenizer"),
        ({"strategy": "bw", "responses_per_prompt": 1}, "--responses_per_prompt"),
        ({"advantage": "grpo", "responses_per_prompt": 1}, "--responses_per_prompt"),
        ({"max_new_tokens": 10_000}, "context"),
        ({"micro_batch_size": 0}, "--micro_batch_size"),
        ({"lr": -1.0}, "--lr -1.0"),
        ({"seed": 10**13}, "--seed 10000000000000"),
        ({"top": float("nan")}, "--top nan"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"threads": -1}, "--threads -1"),
        ({"gamma": 1.5}, "--gamma 1.5"),
        ({"kl_control": "adaptive", "kl_target": 0.0}, "--kl_target"),
        ({"kl_control": "adaptive", "kl_horizon": 1}, "--kl_horizon"),
        ({"out": "out/sft"}, "out/sft is of another stage"),
        ({"out": "data/tiny/ppo.jsonl/ppo"}, "cannot be written"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(
    pipeline, ppo, monkeypatch, capsys, options, words
):
    monkeypatch.chdir(pipeline["folder"])
    if not os.path.exists("out/std_0"):
        units = {"std_0": (0.0, 0.0), "std_inf": (0.0, math.inf), "mean_null": (None, 1.0)}
        for name in (*units, "other_tokens", "adapters"):
            shutil.copytree("out/rm", f"out/{name}")
        config = json.loads((pipeline["folder"] / "out/rm/config.json").read_text())
        for name, (mean, std) in units.items():
            text = json.dumps({**config, "reward_mean": mean, "reward_std": std})
            (pipeline["folder"] / f"out/{name}/config.json").write_text(text)
        (pipeline["folder"] / "out/adapters/adapter_config.json").write_text("{}")
        for name in ("no_weights", "cut"):
            shutil.copytree("out/sft", f"out/{name}")
        os.remove("out/no_weights/model.safetensors")
        os.truncate("out/cut/model.safetensors", 1000)
        tokenizer = AutoTokenizer.from_pretrained("out/rm")
        tokenizer.add_tokens(["<new>"])
        tokenizer.save_pretrained("out/other_tokens")
        os.makedirs("out/torn")
        (pipeline["folder"] / "out/torn/config.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        ppo.main(ppo.Config(**{"out": "out/refused"} | options))
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 2 and len(error) == 1 and words in error[0]
    assert not os.path.exists("out/refused")


def test_a_wrong_flag_ends_with_exit_code_2(tmp_path):
    done = run_script("04_pf_ppo.py", "--strategy", "best", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "--strategy" in done.stderr + done.stdout
    assert not list(tmp_path.iterdir())
