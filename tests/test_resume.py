"""--resume of stages 1 and 2: SIGKILL at random points, and the end is that of an unbroken run.

Each run is a process of its own, forked from one that has imported PyTorch: a start then costs nothing, and ten kills no minute.
"""

import json
import os
import random
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
SERVER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from conftest import load_script
import torch._dynamo  # which the first optimiser would import
for name in ("01_sft.py", "02_reward_model.py"):
    load_script(name)
for line in sys.stdin:
    name, folder, flags = json.loads(line)
    process = os.fork()
    if process == 0:
        os.setsid()
        os.chdir(folder)
        sys.argv, log = [name, *flags], os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        stage = load_script(name)
        stage.main(stage.parse_config(stage.Config, ""))
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

    def start(self, name, *flags):
        self.server.stdin.write(json.dumps([name, str(self.folder), [str(flag) for flag in flags]]) + "\n")
        return int(self.server.stdout.readline())

    def wait(self):
        """The exit status: 0, or -9 for a process that was killed."""
        return os.waitstatus_to_exitcode(int(self.server.stdout.readline()))

    def run(self, name, *flags):
        self.start(name, *flags)
        assert self.wait() == 0, (self.folder / "log").read_text()

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
    yield stages
    stages.server.stdin.close()
    stages.server.wait()


def saved_at(path):
    """What changes when a file is replaced."""
    def look():
        return path.stat().st_mtime_ns if path.exists() else None

    return look


def without_seconds(path):
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in path.read_text().splitlines()]


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


def test_reward_model_killed_ends_as_if_unbroken_and_samples_once(stages):
    out, work = stages.folder / "out/killed_rm", stages.folder / "out/killed_rm.work"
    stages.run("02_reward_model.py", "--out", "out/unbroken_rm", *RM_FLAGS)
    command = ("02_reward_model.py", "--out", "out/killed_rm", *RM_FLAGS, "--resume")
    rng = random.Random(1)
    assert stages.kill(*command, progress=time.time, seconds=0.05)  # before it has sampled and tested all
    assert not work.exists()
    sampled = (stages.folder / "log").read_text().count("240 responses,")
    assert stages.kill(*command, progress=saved_at(work / "stage_config.json"), seconds=0.0)  # while it picks pairs
    samples = saved_at(work / "samples.jsonl")()
    for number in range(4):
        alive = stages.kill(*command, progress=saved_at(work / "state.pt"), seconds=rng.random() * 0.03)
        assert alive and not (out / "stage_config.json").exists(), f"finished before kill {number}"
        assert saved_at(work / "samples.jsonl")() == samples  # not sampled again
    stages.run(*command)
    assert (stages.folder / "log").read_text().count("240 responses,") == sampled + 1
    for name in ("model.safetensors", "config.json", "samples.jsonl", "pairs.jsonl", "accuracy.json"):
        assert (out / name).read_bytes() == (stages.folder / "out/unbroken_rm" / name).read_bytes(), name
    assert not work.exists()


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
