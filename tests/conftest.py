"""Shared by all tests: numbered scripts as modules, small random models, a small whole pipeline."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)
# A shell that runs the tests in the background has SIGINT ignored in all its children; the tests of
# Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def load_script(name):
    """A numbered script as a module, by path. In sys.modules first: dataclasses look there."""
    module_name = "script_" + name.removesuffix(".py")
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, ROOT / name)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    return sys.modules[module_name]


def run_script(name, *flags, cwd, check=True, timeout=600):
    """A script as the reader types it, in another folder; the output is shown when it fails."""
    command = [sys.executable, str(ROOT / name), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment
    )
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="session")
def sft():
    return load_script("01_sft.py")


@pytest.fixture(scope="session")
def rm():
    return load_script("02_reward_model.py")


@pytest.fixture(scope="session")
def r2():
    return load_script("03_r2_analysis.py")


@pytest.fixture(scope="session")
def ppo():
    return load_script("04_pf_ppo.py")


@pytest.fixture(scope="session")
def evaluation():
    return load_script("05_eval.py")


@pytest.fixture(scope="session")
def baselines():
    return load_script("06_baselines.py")


# One-step problems with few flaws: a model of 0.15M parameters solves half of them after a quarter
# of a minute.
DATA_FLAGS = ("--lengths", 0.4, 0.6, "--hard_share", 0.3, "--sft", 1500, "--rm", 100, "--ppo", 40)
DATA_FLAGS += ("--validation", 24, "--test", 24)
SFT_FLAGS = ("--hidden_size", 64, "--layers", 2, "--epochs", 10, "--batch_size", 32, "--lr", 4e-3)
PPO_FLAGS = ("--iterations", 4, "--prompts_per_iteration", 8, "--minibatch_size", 8)
PPO_FLAGS += ("--eval_every", 2, "--critic_warmup", 1)
POLICIES = ("out/sft", "out/ppo_bw/last", "canonical")


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """A folder in which stages 0 to 5 have run once with default paths: {stage: its output}."""
    folder = tmp_path_factory.mktemp("pipeline")
    outputs = {"folder": folder}
    for name, flags in (
        ("00_data.py", DATA_FLAGS),
        ("01_sft.py", SFT_FLAGS),
        ("02_reward_model.py", ("--r2_responses", 5)),
        ("03_r2_analysis.py", ("--bins", 5, "--resamples", 100)),
        ("04_pf_ppo.py", ("--strategy", "bw", *PPO_FLAGS)),
        ("05_eval.py", ("--policies", *POLICIES, "--samples", 4, "--ks", 1, 4)),
    ):
        outputs[name] = run_script(name, *flags, cwd=folder).stdout
    return outputs


@pytest.fixture
def killed_at(monkeypatch):
    """A function: call(), killed where it writes this mark of its output, `times` times."""
    import sandbox

    def killed_at(mark, call, times=1):
        save_config = sandbox.save_config

        def killed(cfg, directory, name="stage_config.json"):
            if name == mark:
                raise KeyboardInterrupt
            save_config(cfg, directory, name)

        with monkeypatch.context() as patch:
            patch.setattr(sandbox, "save_config", killed)
            for _ in range(times):
                with pytest.raises(KeyboardInterrupt):
                    call()

    return killed_at


def tiny_config(kind):
    """Small configs; GPT-2 has absolute positions, so that left padding shows."""
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    if kind == "gpt2":
        return GPT2Config(
            vocab_size=50,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind]
    return config(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )


def save_random_model(kind, folder):
    """A random causal LM with large weights, so that its outputs differ clearly."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=["llama", "qwen2", "gpt2"])
def model_folder(request, tmp_path):
    return save_random_model(request.param, tmp_path / "model")


@pytest.fixture
def llama_folder(tmp_path):
    return save_random_model("llama", tmp_path / "model")
