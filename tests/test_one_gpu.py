"""runs/one_gpu.sh, the recipe for a real model: from end to end with a small random one on the CPU, and its commands for each card."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, load_script
from test_tokenizers import CHATML, make_tokenizer

SCRIPT = ROOT / "runs/one_gpu.sh"


def run(folder, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHON": sys.executable, "DATA": str(folder / "data"),
                   "OUT": str(folder / "out"), "FILES": str(folder / "files"), **variables}
    return subprocess.run(["bash", str(SCRIPT)], cwd=folder, capture_output=True, text=True, timeout=500, env=environment)


def make_files(folder):
    """Records as the hub has them: Magicoder, of which half the solutions are wrong, MBPP with all its splits, HumanEval."""
    folder.mkdir()

    def problem(i):
        return "xs " * (i % 4) + "x"

    prompts = [f"{problem(i)} Your code should pass these tests:\n\nassert x == 1" for i in range(48)]
    files = {"magicoder": [{"problem": prompt, "solution": f"x = {1 + i // 4 % 2}"} for i, prompt in enumerate(prompts)],
             "mbpp": [{"task_id": number, "text": problem(number), "code": "x = 1", "test_list": ["assert x == 1"], "test_setup_code": ""}
                      for number in [*range(11, 19), *range(511, 523), *range(601, 649)]],
             "humaneval": [{"task_id": f"HumanEval/{i}", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "    return 1\n",
                            "test": "def check(candidate):\n    assert candidate() == 1\n"} for i in range(3)]}
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def make_model(folder, **shape):
    """A random Qwen2 whose chat template closes a turn with <|im_end|>, while its tokenizer's EOS is another token."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer(folder, chat_template=CHATML, extra_special_tokens=["<|im_start|>", "<|im_end|>"], pad_token="<pad>")
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**{"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                                    "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 512,
                                    "eos_token_id": 2, "bos_token_id": None, **shape})).save_pretrained(folder)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The whole recipe: {folder, what it printed}."""
    folder = tmp_path_factory.mktemp("one_gpu")
    make_files(folder / "files")
    make_model(folder / "model")
    variables = {"MODEL": str(folder / "model"), "TOKENS": "12", "SFT_FLAGS": "--epochs 40 --lr 1e-2 --batch_size 16",
                 "RM_FLAGS": "--workers 1 --responses_per_prompt 4 --lr 3e-3", "R2_FLAGS": "--workers 1 --repeats 1 --responses_per_prompt 5 --bins 4",
                 "PPO_FLAGS": "--workers 1 --iterations 2 --epochs 1 --eval_every 1 --prompts_per_iteration 6",
                 "EVAL_FLAGS": "--workers 1"}
    done = run(folder, **variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {"folder": folder, "printed": done.stdout}


def test_every_stage_ran_and_wrote_what_it_should(recipe):
    out = recipe["folder"] / "out"
    results = json.loads((out / "eval/results.json").read_text())
    assert [(row["policy"], row["problems"]) for row in results] == [
        (str(out / name), count) for name in ("sft", "ppo_none/best", "ppo_bw/best") for count in (3, 8)]
    assert json.loads((out / "eval_canonical/results.json").read_text())[0]["greedy pass@1"]["mean"] == 1.0
    for name in ("bw", "none"):
        metrics = [json.loads(line) for line in (out / f"ppo_{name}/metrics.jsonl").read_text().splitlines()]
        assert [m["iteration"] for m in metrics] == [0, 1, 2] and metrics[1]["kl_per_response"] == 0
        assert metrics[1]["kept"] == {"bw": 12, "none": 30}[name] and metrics[1]["truncated"] < 0.5
    config = json.loads((out / "ppo_bw/stage_config.json").read_text())
    assert (config["kl_coef"], config["max_new_tokens"], config["micro_batch_size"]) == (0.01, 12, 8)
    samples = [json.loads(line) for line in (out / "rm/samples.jsonl").read_text().splitlines()]
    assert {0.0, 1.0} == {sample["actual_score"] for sample in samples} and "<|im_end|>" not in samples[0]["response"]
    # Validation problems choose the checkpoint, test problems nothing.
    tests = {json.loads(line)["task_id"] for name in ("mbpp", "humaneval")
             for line in (recipe["folder"] / f"data/{name}/test.jsonl").read_text().splitlines()}
    for path in out.rglob("*.jsonl"):
        if "eval" not in str(path.parent.name):
            assert not tests & {json.loads(line).get("task_id") for line in path.read_text().splitlines()}, path


def commands(printed):
    return [shlex.split(line[3:]) for line in printed.splitlines() if line.startswith("== ")]


@pytest.mark.parametrize("card, gpus, rows, more", [("24", "1", "8", ["--gradient_checkpointing"]), ("48", "2", "8", [])])
def test_the_plan_for_a_card(tmp_path, monkeypatch, card, gpus, rows, more):
    """Qwen2.5-Coder-0.5B from its config alone: the flags that fit, in commands whose flags all exist."""
    from transformers import Qwen2Config

    Qwen2Config(vocab_size=151936, hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                intermediate_size=4864, max_position_embeddings=32768, tie_word_embeddings=True).save_pretrained(tmp_path / "Qwen-0.5B")
    done = run(tmp_path, MODEL=str(tmp_path / "Qwen-0.5B"), CARD_GB=card, GPUS=gpus, PLAN="1")
    assert done.returncode == 0, done.stderr
    assert f"of {card}.0" in done.stdout and "it fits" in done.stdout
    planned = commands(done.stdout)
    names = ["00_data.py"] * 3 + ["05_eval.py", "01_sft.py", "02_reward_model.py", "03_r2_analysis.py"] + ["04_pf_ppo.py"] * 2 + ["05_eval.py"]
    scripts = [next(word for word in command if word.endswith(".py")) for command in planned]
    assert scripts == names and not (tmp_path / "out").exists() and not (tmp_path / "data").exists()
    for command, name in zip(planned, scripts):
        launcher, flags = command[:command.index(name)], command[command.index(name):]
        is_shared = gpus == "2" and name[:2] in ("01", "02", "04")
        assert launcher == (["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if is_shared else [])
        assert ("--resume" in flags) == (name[:2] in ("01", "02", "04"))  # a second call goes on where the first one stopped
        monkeypatch.setattr("sys.argv", flags)
        stage = load_script(name)
        cfg = stage.parse_config(stage.Config, "")
        if name[:2] in ("01", "04"):
            assert cfg.micro_batch_size == int(rows) and cfg.gradient_checkpointing == bool(more)
        if name == "04_pf_ppo.py":  # 494 million parameters: 5e-7 and 9e-6 times the square root of 6700 / 494
            assert (cfg.lr, cfg.critic_lr) == (1.8e-6, 3.3e-5)


def test_every_flag_of_the_recipe_exists_also_those_for_other_cards():
    text = SCRIPT.read_text()
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    settings = re.findall(r'"(\d+ \d+(?: --\w+(?: \d+)?)*)"', text)
    assert len(settings) == 6
    for setting in settings:
        for name in ("01_sft.py", "02_reward_model.py", "04_pf_ppo.py"):
            fields = load_script(name).Config.__dataclass_fields__
            assert all(flag in fields for flag in re.findall(r"--(\w+)", setting)), (name, setting)
