"""Bad input: one clear line that says what to do, exit code 2, nothing written."""

import json
import sys

import pytest
import torch
from conftest import load_script

PROBLEM = {"task_id": "t/0", "prompt": "p", "prefix": "", "setup": "", "entry_point": None, "tests": ["assert True"],
           "solution": "pass\n"}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with one good problem file and a small model with its tokenizer; the paths that scripts take by default."""
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(tmp_path)
    (tmp_path / "problems.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    tokenizer = load_script("01_sft.py").build_tokenizer(["p pass\n"], 260)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=16, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    return tmp_path


def refused(capsys, world, function, *words):
    """`function` ends with exit code 2 and one line that holds all words; the folder is as it was."""
    before = sorted(world.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        function()
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert sorted(world.rglob("*")) == before


def command_line(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    return lambda: module.parse_config(module.Config, module.__doc__)


def test_unknown_strategy(ppo, world, capsys, monkeypatch):
    refused(capsys, world, command_line(ppo, monkeypatch, "--strategy", "best"), "--strategy", "best", "bw")


def test_unknown_flag_and_wrong_type(ppo, world, capsys, monkeypatch):
    refused(capsys, world, command_line(ppo, monkeypatch, "--stratgy", "bw"), "--stratgy")
    refused(capsys, world, command_line(ppo, monkeypatch, "--iterations", "many"), "--iterations", "many")


def test_missing_file(sft, world, capsys):
    refused(capsys, world, lambda: sft.main(sft.Config(data="nowhere.jsonl", out="o")), "nowhere.jsonl", "does not exist")


@pytest.mark.parametrize("line, words", [
    ("{not json", ("line 2", "not JSON")),
    ("[1, 2]", ("line 2", "not a JSON object")),
    (json.dumps({**PROBLEM, "prompt": 3}), ("line 2", "prompt")),
    (json.dumps({k: v for k, v in PROBLEM.items() if k != "tests"}), ("line 2", "tests")),
])
def test_malformed_line(rm, world, capsys, line, words):
    (world / "problems.jsonl").write_text(json.dumps(PROBLEM) + "\n" + line + "\n")
    refused(capsys, world, lambda: rm.main(rm.Config(data="problems.jsonl", out="o")), "problems.jsonl", *words)


def test_empty_split(evaluation, world, capsys):
    (world / "empty.jsonl").write_text("")
    refused(capsys, world, lambda: evaluation.main(evaluation.Config(problems=["empty.jsonl"], out="o")), "empty.jsonl", "empty")


def test_prompt_longer_than_the_context(evaluation, world, capsys):
    (world / "problems.jsonl").write_text(json.dumps({**PROBLEM, "prompt": "word " * 100}) + "\n")
    cfg = evaluation.Config(policies=["policy"], problems=["problems.jsonl"], out="o", max_new_tokens=32)
    refused(capsys, world, lambda: evaluation.main(cfg), "t/0", "context of 128", "--max_new_tokens 32")


def test_n_smaller_than_the_filter_needs(ppo, world, capsys):
    for cfg in (ppo.Config(strategy="bw", responses_per_prompt=1, out="o"), ppo.Config(strategy="none", advantage="rloo",
                                                                                       responses_per_prompt=1, out="o")):
        refused(capsys, world, lambda: ppo.main(cfg), "--responses_per_prompt", "2")
    # One response is enough for the filters that need no other.
    refused(capsys, world, lambda: ppo.main(ppo.Config(strategy="bon", responses_per_prompt=1, out="o")), "data/tiny/ppo.jsonl")


@pytest.mark.parametrize("script", ["ppo", "r2"])
def test_reward_model_without_statistics(script, world, capsys, request):
    module = request.getfixturevalue(script)
    config = module.AutoConfig.from_pretrained("policy", num_labels=1)
    module.AutoModelForSequenceClassification.from_config(config).save_pretrained("rm")
    settings = {"ppo": dict(data="problems.jsonl", validation="problems.jsonl", policy="policy"),
                "r2": dict(data="problems.jsonl", policies=["policy"])}[script]
    refused(capsys, world, lambda: module.main(module.Config(reward_model="rm", out="o", **settings)), "rm", "reward_mean",
            "02_reward_model.py")


@pytest.mark.parametrize("script, names", [
    ("04_pf_ppo.py", ("eval_every", "state_every")), ("06_baselines.py", ("eval_every",)), ("07_plum.py", ("eval_every",))])
def test_never_is_no_number_of_iterations(world, capsys, script, names):
    """0 would end the run in a division by zero, after the first iteration is paid for."""
    module = load_script(script)
    for name in names:
        refused(capsys, world, lambda: module.main(module.Config(out="o", **{name: 0})), f"--{name}", "at least")


def test_missing_model(evaluation, world, capsys):
    cfg = evaluation.Config(policies=["out/none"], problems=["problems.jsonl"], out="o")
    refused(capsys, world, lambda: evaluation.main(cfg), "out/none", "run the stage")


def test_more_k_than_samples(evaluation, world, capsys):
    cfg = evaluation.Config(policies=["policy"], problems=["problems.jsonl"], out="o", samples=2, ks=[1, 5])
    refused(capsys, world, lambda: evaluation.main(cfg), "pass@5", "--samples")


@pytest.mark.parametrize("last, words", [("out/typo", "no model at out/typo"), ("canonical", "no solution")])
def test_the_last_policy_is_checked_before_the_first_one_runs(evaluation, world, capsys, monkeypatch, last, words):
    (world / "problems.jsonl").write_text(json.dumps({**PROBLEM, "solution": None}) + "\n")
    monkeypatch.setattr(evaluation, "generate", lambda *args, **kwargs: pytest.fail("work that would be lost"))
    cfg = evaluation.Config(policies=["policy", last], problems=["problems.jsonl"], out="o", samples=0, max_new_tokens=4)
    refused(capsys, world, lambda: evaluation.main(cfg), words)


@pytest.mark.parametrize("flags", [dict(holdout_share=15.0), dict(holdout_share=0.0), dict(label_noise=2.0), dict(max_pairs=-1)])
def test_shares_of_the_reward_model_are_checked_before_it_samples(rm, world, capsys, flags):
    refused(capsys, world, lambda: rm.main(rm.Config(data="problems.jsonl", policy="policy", out="o", **flags)), "--holdout_share",
            "--label_noise", "--max_pairs")


@pytest.mark.parametrize("script", ["01_sft.py", "02_reward_model.py"])
def test_resume_does_not_replace_a_folder_of_somebody_else(script, world, capsys):
    module = load_script(script)
    (world / "out/sft").mkdir(parents=True)
    (world / "out/sft/weights").write_text("dear")
    refused(capsys, world, lambda: module.main(module.Config(data="problems.jsonl", out="out", resume=True)), "holds no finished run")


def test_canonical_needs_solutions(evaluation, world, capsys):
    (world / "problems.jsonl").write_text(json.dumps({**PROBLEM, "solution": None}) + "\n")
    cfg = evaluation.Config(policies=["canonical"], problems=["problems.jsonl"], out="o", samples=0)
    refused(capsys, world, lambda: evaluation.main(cfg), "no solution", "t/0")


def test_no_pairs(rm, world, capsys):
    """A policy that never passes (or always) gives nothing to compare."""
    (world / "problems.jsonl").write_text(json.dumps({**PROBLEM, "tests": ["assert False"]}) + "\n")
    cfg = rm.Config(data="problems.jsonl", policy="policy", out="o", workers=1, max_new_tokens=4)
    refused(capsys, world, lambda: rm.main(cfg), "0 training", "problems.jsonl")


def test_other_settings_do_not_overwrite_a_finished_run(sft, world, capsys):
    cfg = sft.Config(data="problems.jsonl", out="o")
    (world / "o").mkdir()
    refused(capsys, world, lambda: sft.main(cfg), "o exists but holds no finished run")
    sft.save_config(cfg, world / "o")
    refused(capsys, world, lambda: sft.main(sft.Config(data="problems.jsonl", out="o", seed=7)), "seed was 0, now 7")
    sft.main(cfg)
    assert "is finished" in capsys.readouterr().out


def test_a_bad_loss_stops_training(ppo, world):
    policy = ppo.load_model(ppo.AutoModelForCausalLM, "policy", torch.device("cpu"))
    batch = ppo.make_batch([[5]], [[6, 1]], 0)
    weights = [p.detach().clone() for p in policy.parameters()]

    def loss_of(mb):
        return next(policy.parameters()).sum() * float("nan"), {}

    with pytest.raises(FloatingPointError):
        ppo.train_epoch(policy, torch.optim.AdamW(policy.parameters()), loss_of, batch, torch.arange(1), ppo.Config(),
                        torch.Generator(), torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(weights, policy.parameters()))  # the step was not taken


@pytest.mark.parametrize("script, flags", [
    ("01_sft.py", dict(model="./policy", epochs=2, batch_size=1)), ("02_reward_model.py", dict(policy="policy", max_new_tokens=4))])
def test_a_gradient_that_is_not_finite_stops_training_before_its_step(script, flags, world, capsys, monkeypatch):
    """The loss is fine, its gradient is nan (as cuDNN's attention made it for some lengths): no weights may be saved."""
    module = load_script(script)
    lines = [{**PROBLEM, "task_id": f"t/{i}"} for i in range(8)]
    (world / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    load_model, run_tests, reached = module.load_model, getattr(module, "run_tests", None), []

    def with_a_hook(model_class, *args, **kwargs):
        model = load_model(model_class, *args, **kwargs)
        weight = next(model.parameters())
        if weight.requires_grad:
            weight.register_hook(lambda gradient: reached.append(1) or gradient * float("nan"))
        return model

    def every_second_passes(problems, *args):  # a policy with random weights would give no pairs
        return [result._replace(passed=k % 2 == 0) for k, result in enumerate(run_tests(problems, *args))]

    monkeypatch.setattr(module, "load_model", with_a_hook)
    if run_tests:
        monkeypatch.setattr(module, "run_tests", every_second_passes)
    with pytest.raises(SystemExit) as stop:
        module.main(module.Config(data="problems.jsonl", out="o", threads=1, **flags))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "gradient's norm nan at step 1; lower --lr" in error and "the loss is nan" not in error
    assert reached and not (world / "o").exists() and not (world / "o.work/state.pt").exists()


def test_a_reward_that_is_not_finite_stops_with_the_rollouts_saved(ppo, world, capsys):
    config = ppo.AutoConfig.from_pretrained("policy", num_labels=1)
    config.reward_mean, config.reward_std = float("nan"), 1.0
    ppo.AutoModelForSequenceClassification.from_config(config).save_pretrained("rm")
    (world / "problems.jsonl").write_text("".join(json.dumps({**PROBLEM, "task_id": f"t/{i}"}) + "\n" for i in range(4)))
    with pytest.raises(SystemExit) as stop:
        ppo.main(ppo.Config(data="problems.jsonl", validation="problems.jsonl", policy="policy", reward_model="rm", out="o",
                            prompts_per_iteration=2, max_new_tokens=4, iterations=2, workers=1, threads=1))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.count("\n") == 0 and "iteration 1: a logprob, reward or value is not a finite" in error
    assert len((world / "o/rollouts/0001.jsonl").read_text().splitlines()) == 10 and (world / "o/best/model.safetensors").exists()


def test_a_batch_of_nothing_is_refused(world, capsys, monkeypatch):
    for script in ("01_sft.py", "02_reward_model.py", "04_pf_ppo.py", "05_eval.py"):
        module = load_script(script)
        for name in [name for name in vars(module.Config()) if name.endswith("batch_size")]:
            refused(capsys, world, command_line(module, monkeypatch, f"--{name}", "0"), f"--{name} 0", "at least 1")


@pytest.mark.parametrize("script, last", [("03_r2_analysis.py", "plot_r2"), ("05_eval.py", "save_config")])
def test_a_stage_that_breaks_off_while_it_saves_can_be_run_again(script, last, world, capsys, monkeypatch):
    module = load_script(script)
    config = module.AutoConfig.from_pretrained("policy", num_labels=1)
    config.reward_mean, config.reward_std = 0.0, 1.0
    load_script("02_reward_model.py").AutoModelForSequenceClassification.from_config(config).save_pretrained("rm")
    (world / "problems.jsonl").write_text("".join(json.dumps({**PROBLEM, "task_id": f"t/{i}"}) + "\n" for i in range(6)))
    cfg = {"03_r2_analysis.py": dict(policies=["policy"], data="problems.jsonl", reward_model="rm", repeats=1, bins=2),
           "05_eval.py": dict(policies=["policy"], problems=["problems.jsonl"], samples=0)}[script]
    cfg = module.Config(**cfg, out="o", max_new_tokens=4, workers=1, threads=1)
    run_tests = module.run_tests  # random programs all fail, and R2 of that is undefined
    monkeypatch.setattr(module, "run_tests", lambda *args: [r._replace(passed=k % 2 == 0) for k, r in enumerate(run_tests(*args))])

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, last, full)
        with pytest.raises(OSError):
            module.main(cfg)
    assert not (world / "o").exists()
    module.main(cfg)
    assert (world / "o/stage_config.json").exists() and not (world / "o.tmp").exists()
    module.main(cfg)
    assert "is finished" in capsys.readouterr().out


def test_write_jsonl_is_whole_or_not_at_all(sft, tmp_path):
    path = tmp_path / "x.jsonl"
    sft.write_jsonl(path, [{"a": "ü"}])
    with pytest.raises(TypeError):
        sft.write_jsonl(path, [{"a": 1}, {"a": object()}])  # breaks off in the middle
    assert path.read_text(encoding="utf-8") == '{"a": "ü"}\n'


def test_a_checkpoint_that_cannot_be_saved_leaves_the_old_one(sft, world):
    """The disk is full in the middle of saving: the previous checkpoint is still there, and loads."""
    model = sft.load_model(sft.AutoModelForCausalLM, "policy", torch.device("cpu"))
    tokenizer = sft.load_tokenizer("policy")

    class Full:
        def save_pretrained(self, directory):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        sft.save_model(model, Full(), "policy")
    again = sft.load_model(sft.AutoModelForCausalLM, "policy", torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    sft.save_model(model, tokenizer, "policy")
    assert not [p for p in world.iterdir() if p.name.startswith("policy.")]
