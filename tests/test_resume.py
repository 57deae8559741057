"""What a run survives. --resume of stages 1, 2 and 4: SIGKILL at random points, and the end is that of an unbroken run. A
full disk, too little memory, a policy that falls apart: nothing is lost, and one line says what to do.

Each run is a process of its own, forked from one that has imported PyTorch: a start then costs nothing, and ten kills no minute.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

PROBLEMS = [{"task_id": f"t/{i}", "prompt": "xs " * (i % 4) + "x\n", "prefix": "", "setup": "", "entry_point": None,
             "tests": ["assert x == 1"], "solution": f"x = {1 + i // 4 % 2}\n", "source": "test"} for i in range(48)]
SFT_FLAGS = ("--data", "problems.jsonl", "--epochs", 24, "--batch_size", 8, "--hidden_size", 32, "--layers", 1, "--vocab_size", 300,
             "--lr", 1e-2, "--log_every", 10, "--save_every", 2, "--threads", 1)  # 144 steps
RM_FLAGS = ("--data", "problems.jsonl", "--policy", "out/unbroken_sft", "--epochs", 8, "--batch_size", 4, "--save_every", 3,
            "--max_new_tokens", 12, "--workers", 1, "--threads", 1)
PPO_FLAGS = ("--data", "problems.jsonl", "--validation", "problems.jsonl", "--policy", "out/unbroken_sft", "--reward_model",
             "out/unbroken_rm", "--iterations", 30, "--prompts_per_iteration", 6, "--minibatch_size", 4, "--critic_warmup", 3,
             "--eval_every", 4, "--save_every", 7, "--kl_control", "adaptive", "--kl_horizon", 50, "--kl_target", 0.5, "--lr", 1e-3,
             "--max_new_tokens", 12, "--workers", 1, "--threads", 1)
SERVER = """
import json, os, resource, runpy, sys
sys.path.insert(0, sys.argv[1])
from conftest import ROOT, load_script
import torch._dynamo  # which the first optimiser would import
sys.path.insert(0, str(ROOT))
for name in ("01_sft.py", "02_reward_model.py", "04_pf_ppo.py", "05_eval.py"):
    load_script(name)
for line in sys.stdin:
    name, folder, flags, limits = json.loads(line)
    process = os.fork()
    if process == 0:
        os.setsid()
        os.chdir(folder)
        sys.argv, log = [name, *flags], os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        if "memory" in limits:  # bytes above what the process has now
            pages = int(open("/proc/self/statm").read().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, [pages * resource.getpagesize() + limits["memory"]] * 2)
        if "file" in limits:  # bytes; a write beyond fails as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, [limits["file"]] * 2)
        runpy.run_path(str(ROOT / name), run_name="__main__")
        sys.stdout.flush()
        os._exit(0)
    print(process, flush=True)
    print(os.waitpid(process, 0)[1], flush=True)
"""


class Stages:
    """Starts stages in `folder`, one at a time."""

    def __init__(self, folder):
        self.folder = folder
        self.server = subprocess.Popen([sys.executable, "-c", SERVER, str(Path(__file__).parent)], text=True, bufsize=1,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})

    def start(self, name, *flags, **limits):
        self.server.stdin.write(json.dumps([name, str(self.folder), [str(flag) for flag in flags], limits]) + "\n")
        return int(self.server.stdout.readline())

    def wait(self):
        """The exit status: 0, or -9 for a process that was killed."""
        return os.waitstatus_to_exitcode(int(self.server.stdout.readline()))

    def run(self, name, *flags, status=0, **limits):
        """Run a stage that ends with this exit status -> what it printed."""
        log = self.folder / "log"
        before = log.stat().st_size if log.exists() else 0
        self.start(name, *flags, **limits)
        ended, printed = self.wait(), log.read_bytes()[before:].decode()
        assert ended == status, printed
        return printed

    def kill(self, name, *flags, progress, seconds):
        """Start a stage, wait until `progress()` has changed, kill it after so many seconds more -> was it still at work?"""
        before = progress()
        process = self.start(name, *flags)
        deadline = time.time() + 60
        while progress() == before and time.time() < deadline and os.path.exists(f"/proc/{process}/exe"):
            time.sleep(0.002)
        time.sleep(seconds)
        try:
            os.killpg(process, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return self.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    (folder / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    stages = Stages(folder)
    stages.start("01_sft.py", "--out", "out/unbroken_sft", *SFT_FLAGS)
    started = time.time()  # the server is up: it has answered
    assert stages.wait() == 0, (folder / "log").read_text()
    stages.sft_seconds = time.time() - started
    stages.run("02_reward_model.py", "--out", "out/unbroken_rm", *RM_FLAGS)
    yield stages
    stages.server.stdin.close()
    stages.server.wait()


@pytest.fixture(scope="module")
def unbroken_ppo(stages):
    stages.run("04_pf_ppo.py", "--out", "out/unbroken_ppo", *PPO_FLAGS)
    return stages.folder / "out/unbroken_ppo"


def saved_at(path):
    """What changes when a file is replaced."""
    def look():
        return path.stat().st_mtime_ns if path.exists() else None

    return look


def without_seconds(path):
    return [{name: value for name, value in json.loads(line).items() if not name.startswith("seconds")}
            for line in path.read_text().splitlines()]


def test_sft_killed_ten_times_ends_as_if_unbroken(stages):
    out, work = stages.folder / "out/killed_sft", stages.folder / "out/killed_sft.work"
    rng = random.Random(0)
    steps = []
    for number in range(10):
        alive = stages.kill("01_sft.py", "--out", "out/killed_sft", *SFT_FLAGS, "--resume", progress=saved_at(work / "state.pt"),
                            seconds=rng.random() * stages.sft_seconds / 30)
        assert alive and not (out / "stage_config.json").exists(), f"finished before kill {number}"
        steps.append(torch.load(work / "state.pt")["step"])
    assert steps == sorted(set(steps)) and steps[-1] < 144  # each went on from where the one before was saved
    stages.run("01_sft.py", "--out", "out/killed_sft", *SFT_FLAGS, "--resume")
    assert f"resuming out/killed_sft after step {steps[-1]} of 144" in (stages.folder / "log").read_text()
    unbroken = stages.folder / "out/unbroken_sft"
    assert (out / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()
    assert (out / "tokenizer.json").read_bytes() == (unbroken / "tokenizer.json").read_bytes()
    metrics = without_seconds(out / "metrics.jsonl")
    assert metrics == without_seconds(unbroken / "metrics.jsonl") and metrics[-1]["step"] == 144
    assert metrics[-1]["validation_loss"] < metrics[0]["validation_loss"]
    assert not work.exists()


def test_reward_model_killed_ten_times_ends_as_if_unbroken_and_samples_once(stages):
    out, work = stages.folder / "out/killed_rm", stages.folder / "out/killed_rm.work"
    command = ("02_reward_model.py", "--out", "out/killed_rm", *RM_FLAGS, "--resume")
    rng = random.Random(1)
    assert stages.kill(*command, progress=time.time, seconds=0.05)  # before it has sampled and tested all
    assert not work.exists()
    sampled = (stages.folder / "log").read_text().count("240 responses,")
    assert stages.kill(*command, progress=saved_at(work / "stage_config.json"), seconds=0.0)  # while it picks pairs
    samples = saved_at(work / "samples.jsonl")()
    for number in range(8):
        alive = stages.kill(*command, progress=saved_at(work / "state.pt"), seconds=rng.random() * 0.02)
        assert alive and not (out / "stage_config.json").exists(), f"finished before kill {number}"
        assert saved_at(work / "samples.jsonl")() == samples  # not sampled again
    stages.run(*command)
    assert (stages.folder / "log").read_text().count("240 responses,") == sampled + 1
    for name in ("model.safetensors", "config.json", "samples.jsonl", "pairs.jsonl", "accuracy.json"):
        assert (out / name).read_bytes() == (stages.folder / "out/unbroken_rm" / name).read_bytes(), name
    assert not work.exists()


def same_state(a, b):
    """Two files of --resume hold the same, but for seconds and paths."""
    a, b = torch.load(a), torch.load(b)
    for state in (a, b):
        state["metrics"] = [{name: value for name, value in m.items() if not name.startswith("seconds")} for m in state["metrics"]]
        del state["config"]

    def same(x, y):
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(same(x[name], y[name]) for name in x)
        if isinstance(x, (list, tuple)):
            return len(x) == len(y) and all(map(same, x, y))
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

    return same(a, b)


def test_ppo_killed_ten_times_ends_as_if_unbroken(stages, unbroken_ppo):
    """Weights, both optimisers, the KL controller, the order of prompts, the best checkpoint so far: all of it goes on."""
    out = stages.folder / "out/killed_ppo"
    command = ("04_pf_ppo.py", "--out", "out/killed_ppo", *PPO_FLAGS, "--resume")
    metrics = without_seconds(unbroken_ppo / "metrics.jsonl")
    seconds = sum(json.loads(line)["seconds_train"] + json.loads(line)["seconds_generate"]
                  for line in (unbroken_ppo / "metrics.jsonl").read_text().splitlines()[1:]) / 30
    rng = random.Random(2)
    iterations = []
    for number in range(10):
        alive = stages.kill(*command, progress=saved_at(out / "state.pt"), seconds=rng.random() * 2 * seconds)
        assert alive and not (out / "stage_config.json").exists(), f"finished before kill {number}"
        iterations.append(torch.load(out / "state.pt")["metrics"][-1]["iteration"])
    assert iterations == sorted(set(iterations)) and iterations[-1] < 30
    assert f"resuming out/killed_ppo after iteration {iterations[-1]}\n" in stages.run(*command)
    assert without_seconds(out / "metrics.jsonl") == metrics
    assert len({m["kl_coef"] for m in metrics[1:]}) > 25 and metrics[-1]["validation_pass_at_1"] > metrics[0]["validation_pass_at_1"]
    for name in ("best", "last", "iteration_7", "iteration_28"):
        assert (out / name / "model.safetensors").read_bytes() == (unbroken_ppo / name / "model.safetensors").read_bytes(), name
    assert (unbroken_ppo / "best/model.safetensors").read_bytes() != (unbroken_ppo / "last/model.safetensors").read_bytes()
    assert same_state(out / "state.pt", unbroken_ppo / "state.pt")


def test_state_saved_every_four_iterations(stages, unbroken_ppo):
    """--state_every 4, killed after iteration 10 or a little later: 9 and what followed is repeated, the end is the same."""
    out = stages.folder / "out/rare_ppo"
    command = ("04_pf_ppo.py", "--out", "out/rare_ppo", *PPO_FLAGS, "--state_every", 4, "--resume")
    assert stages.kill(*command, progress=(out / "rollouts/0010.jsonl").exists, seconds=0.0)
    saved = torch.load(out / "state.pt")["metrics"][-1]["iteration"]
    assert saved % 4 == 0 and saved >= 8
    assert f"resuming out/rare_ppo after iteration {saved}\n" in stages.run(*command)
    assert without_seconds(out / "metrics.jsonl") == without_seconds(unbroken_ppo / "metrics.jsonl")
    assert same_state(out / "state.pt", unbroken_ppo / "state.pt")  # 30 is no multiple of 4: the last one is saved, too


def test_a_full_disk_leaves_the_state_before_and_the_run_goes_on(stages, unbroken_ppo):
    """A write that fails in the middle of state.pt: the one before is whole, and --resume ends as if nothing had been."""
    out = stages.folder / "out/full_ppo"
    command = ("04_pf_ppo.py", "--out", "out/full_ppo", *PPO_FLAGS, "--resume")
    stages.kill(*command, progress=saved_at(out / "state.pt"), seconds=0.0)
    before = (out / "state.pt").read_bytes()
    assert "Error" in stages.run(*command, status=1, file=len(before) // 2)  # the weights fit, the optimisers do not
    assert (out / "state.pt").read_bytes() == before and (out / "state.pt.tmp").stat().st_size <= len(before) // 2
    stages.run(*command)
    assert without_seconds(out / "metrics.jsonl") == without_seconds(unbroken_ppo / "metrics.jsonl")
    assert same_state(out / "state.pt", unbroken_ppo / "state.pt")


def test_a_policy_that_falls_apart_stops_with_its_rollouts_saved(stages):
    """A learning rate that is far too high: the reason in one line, the rollouts of the iteration, the best policy before."""
    out = stages.folder / "out/broken_ppo"
    flags = [*PPO_FLAGS, "--out", "out/broken_ppo", "--lr", 0.3, "--max_kl", 5]
    lines = stages.run("04_pf_ppo.py", *flags, status=2).splitlines()
    assert re.match(r"04_pf_ppo.py: error: iteration (\d+): KL from the reference is \d+ nats per response, above --max_kl 5; "
                    "its rollouts are in out/broken_ppo/rollouts, the best policy before in out/broken_ppo/best. Start in another "
                    "--out with a lower --lr", lines[-1])
    last = without_seconds(out / "metrics.jsonl")[-1]["iteration"]
    assert f"iteration {last + 1}:" in lines[-1] and not any(line.startswith("Traceback") for line in lines)
    rollouts = (out / f"rollouts/{last + 1:04d}.jsonl").read_text().splitlines()
    assert len(rollouts) == 30 and not (out / f"rollouts/{last + 2:04d}.jsonl").exists()
    assert (out / "best/model.safetensors").exists() and not (out / "stage_config.json").exists()


def test_killed_between_the_two_renames_of_the_best_policy(stages, unbroken_ppo):
    """`best` has its old name and the new one is not there yet: --resume puts it back."""
    weights = (unbroken_ppo / "best/model.safetensors").read_bytes()
    (unbroken_ppo / "stage_config.json").unlink()
    (unbroken_ppo / "best").rename(unbroken_ppo / "best.old")
    stages.run("04_pf_ppo.py", "--out", "out/unbroken_ppo", *PPO_FLAGS, "--resume")
    assert (unbroken_ppo / "best/model.safetensors").read_bytes() == weights and not (unbroken_ppo / "best.old").exists()
    assert (unbroken_ppo / "stage_config.json").exists()


# -------------------------------------------------------------------------------------------------------- too little memory


@pytest.fixture(scope="module")
def wide(stages):
    """A model whose activations are large and whose weights are not, and its reward model: 64 kB a token for each of several copies."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(stages.folder / "out/unbroken_sft")
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=16384, max_position_embeddings=512, bos_token_id=None,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    LlamaForCausalLM(config).save_pretrained(stages.folder / "wide")
    config.num_labels, config.reward_mean, config.reward_std = 1, 0.0, 1.0
    AutoModelForSequenceClassification.from_config(config).save_pretrained(stages.folder / "wide_rm")
    for name in ("wide", "wide_rm"):
        tokenizer.save_pretrained(stages.folder / name)
    (stages.folder / "long.jsonl").write_text("".join(
        json.dumps({**problem, "prompt": "xs " * 100 + problem["prompt"]}) + "\n" for problem in PROBLEMS))
    return stages


SMALL = ("--generate_batch_size", 5, "--score_batch_size", 2, "--micro_batch_size", 2)
OUT_OF_MEMORY = {  # what is too large -> what the line says
    "ppo_generate": ("04_pf_ppo.py", (*SMALL, "--generate_batch_size", 256), "lower --generate_batch_size (256)"),
    "ppo_score": ("04_pf_ppo.py", (*SMALL, "--score_batch_size", 64), "lower --score_batch_size (64)"),
    "ppo_train": ("04_pf_ppo.py", (*SMALL, "--micro_batch_size", 48), "lower --micro_batch_size (48), or add --gradient_checkpointing"),
    "ppo_fits": ("04_pf_ppo.py", SMALL, None),
    "sft_train": ("01_sft.py", ("--micro_batch_size", 16, "--gradient_checkpointing"), "lower --micro_batch_size (16)"),
    "rm_generate": ("02_reward_model.py", ("--generate_batch_size", 240), "lower --generate_batch_size (240)"),
    "eval_generate": ("05_eval.py", ("--generate_batch_size", 240), "lower --generate_batch_size (240)"),
}


@pytest.mark.parametrize("case", OUT_OF_MEMORY)
def test_out_of_memory_names_the_flag_to_lower(wide, case):
    """A real failure to allocate, 450 MB above what the process holds when it starts."""
    script, flags, words = OUT_OF_MEMORY[case]
    common = {"04_pf_ppo.py": ("--policy", "wide", "--reward_model", "wide_rm", "--data", "long.jsonl", "--validation", "long.jsonl",
                               "--prompts_per_iteration", 12, "--iterations", 1, "--critic_warmup", 0, "--max_new_tokens", 4),
              "01_sft.py": ("--model", "./wide", "--data", "long.jsonl", "--batch_size", 16, "--epochs", 1),
              "02_reward_model.py": ("--policy", "wide", "--data", "long.jsonl", "--max_new_tokens", 4),
              "05_eval.py": ("--policies", "wide", "--problems", "long.jsonl", "--samples", 0, "--max_new_tokens", 4)}[script]
    workers = () if script == "01_sft.py" else ("--workers", 1)
    printed = wide.run(script, *common, *workers, "--threads", 1, "--out", f"out/{case}", *flags, status=2 if words else 0,
                       memory=450 * 2**20)
    if words:
        assert printed.splitlines()[-1] == f"{script}: error: out of memory: {words}" and "Traceback" not in printed


def test_a_resumed_run_may_need_less_memory_but_not_learn_differently(stages, unbroken_ppo):
    command = ("04_pf_ppo.py", "--out", "out/smaller_ppo", *PPO_FLAGS, "--resume")
    stages.kill(*command, progress=saved_at(stages.folder / "out/smaller_ppo/state.pt"), seconds=0.0)
    assert "(lr)" in stages.run(*command, "--lr", 1e-4, status=2)
    stages.run(*command, "--micro_batch_size", 3, "--score_batch_size", 9, "--gradient_checkpointing")
    ours, theirs = (without_seconds(stages.folder / f"out/{name}/metrics.jsonl") for name in ("smaller_ppo", "unbroken_ppo"))
    assert [m["iteration"] for m in ours] == [m["iteration"] for m in theirs]
    assert ours[5]["critic_loss"] == pytest.approx(theirs[5]["critic_loss"], rel=1e-3)


def test_killed_between_the_model_and_the_mark_that_it_is_complete(stages, sft, monkeypatch):
    """The folder is there, its stage_config.json is not: --resume makes it whole."""
    monkeypatch.chdir(stages.folder)
    monkeypatch.setattr("sys.argv", ["01_sft.py", "--out", "out/unmarked", *map(str, SFT_FLAGS), "--resume"])
    cfg = sft.parse_config(sft.Config, "")
    save_config = sft.save_config

    def killed(settings, directory):
        if directory == Path("out/unmarked"):
            raise KeyboardInterrupt
        save_config(settings, directory)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "save_config", killed)
        with pytest.raises(KeyboardInterrupt):
            sft.main(cfg)
    assert Path("out/unmarked/model.safetensors").exists() and not Path("out/unmarked/stage_config.json").exists()
    sft.main(cfg)
    assert Path("out/unmarked/model.safetensors").read_bytes() == Path("out/unbroken_sft/model.safetensors").read_bytes()
    assert not Path("out/unmarked.work").exists()


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_an_interrupted_run_is_neither_lost_nor_mixed_with_another(request, stage, tmp_path, monkeypatch, capsys):
    module = request.getfixturevalue(stage)
    monkeypatch.chdir(tmp_path)
    work = tmp_path / "o.work"
    work.mkdir()
    cfg = module.Config(data="nowhere.jsonl", out="o")
    module.save_config(cfg, work)
    for other, words in ((cfg, "go on with --resume"), (module.Config(data="nowhere.jsonl", out="o", seed=7, resume=True), "(seed)"),
                         (module.Config(data="nowhere.jsonl", out="o", resume=True), "nowhere.jsonl does not exist")):
        with pytest.raises(SystemExit) as stop:
            module.main(other)
        assert stop.value.code == 2 and words in capsys.readouterr().err
        assert [p.name for p in tmp_path.iterdir()] == ["o.work"]


def test_a_finished_run_counts_as_the_same_with_and_without_resume(stages, sft, monkeypatch, capsys):
    monkeypatch.chdir(stages.folder)
    for extra in ([], ["--resume"]):
        Path("out/unbroken_sft.work").mkdir()  # as a kill at the very end would leave it
        monkeypatch.setattr("sys.argv", ["01_sft.py", "--out", "out/unbroken_sft", *map(str, SFT_FLAGS), *extra])
        sft.main(sft.parse_config(sft.Config, ""))
        assert "is finished" in capsys.readouterr().out and not Path("out/unbroken_sft.work").exists()


def test_a_state_that_cannot_be_written_leaves_the_one_before(sft, tmp_path, monkeypatch):
    """The disk is full in the middle of a save."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    sft.save_state(tmp_path / "state.pt", model, optimizer, scheduler, step=1)

    def full(state, path):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        sft.save_state(tmp_path / "state.pt", model, optimizer, scheduler, step=2)
    assert sft.load_state(tmp_path / "state.pt", model, optimizer, scheduler) == {"step": 1}
