"""Stage 5: the estimates by hand and by enumeration, and whole runs on a small random model."""

import itertools
import json

import numpy as np
import pytest
import torch
import tyro

import sandbox

PAPER = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]  # the paper's stop strings
RIGHT, WRONG, OTHER = "def f(): return 1\n", "def f(): return 2\n", "y = 3\n"


def make_world(folder, chat_template=None):
    """A folder with a policy, a reward model and problems, all random and very small.

    Each token is a line of Python, so that every response is a program: it passes if the last `f`
    is the right one, which happens about a third of the time.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    words = ["# pad\n", "<eos>", "\n", RIGHT, WRONG, OTHER, "# task\n", "# user\n"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="\n"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("\n"), "merged_with_previous")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="# pad\n", eos_token="<eos>"
    )
    tokenizer.chat_template = chat_template
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    models = {"policy": LlamaForCausalLM(config), "other": LlamaForCausalLM(config)}
    statistics = {"num_labels": 1, "reward_mean": 0.1, "reward_std": 0.5}
    models["rm"] = LlamaForSequenceClassification(
        LlamaConfig(**config.to_diff_dict(), **statistics)
    )
    for name, model in models.items():
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(5)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    problems = [
        {
            "task_id": f"t/{i}",
            "prompt": "# task\n" * (1 + i % 3) + OTHER * (i % 4),
            "entry_point": "f",
            "tests": ["assert f() == 1", "assert f() < 2"],
            "solution": RIGHT,
        }
        for i in range(12)
    ]
    write(folder / "problems.jsonl", problems)
    return problems


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_world(tmp_path)
    return tmp_path


def settings(evaluation, **flags):
    defaults = dict(
        policies=["./policy"],
        problems=["problems.jsonl"],
        out="o",
        samples=0,
        max_new_tokens=6,
        workers=1,
        threads=1,
    )
    return evaluation.Config(**{**defaults, **flags})


# -------------------------------------------------------------------------------------- estimates


@pytest.mark.parametrize("n", [1, 3, 5, 6])
def test_pass_at_k_against_enumeration(evaluation, n):
    """The share of all draws of k of n samples, c of them right, with a right one in it."""
    for c in range(n + 1):
        for k in range(1, n + 1):
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert evaluation.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_needs_k_samples(evaluation):
    with pytest.raises(ValueError):
        evaluation.pass_at_k(2, 1, 3)


def test_bootstrap_interval_covers_and_narrows(evaluation):
    rng = np.random.default_rng(0)
    covered, widths = 0, {}
    for trial in range(200):
        interval = evaluation.bootstrap_mean(rng.random(100) < 0.3, trial, resamples=500)
        covered += interval["low"] <= 0.3 <= interval["high"]
        assert interval["low"] <= interval["mean"] <= interval["high"]
    assert 178 <= covered <= 199  # 95% of 200, within three standard deviations and a bit
    for size in (50, 1250):
        interval = evaluation.bootstrap_mean(np.arange(size) % 2, 0, resamples=2000)
        widths[size] = interval["high"] - interval["low"]
    assert widths[50] == pytest.approx(2 * 1.96 * 0.5 / 50**0.5, rel=0.15)  # of a normal mean
    assert widths[50] / widths[1250] == pytest.approx(5, rel=0.15)
    same = evaluation.bootstrap_mean([1.0] * 20, 0)
    assert same == {"mean": 1.0, "low": 1.0, "high": 1.0}


@pytest.mark.parametrize(
    "text, cut",
    [
        ("    return 1\n\n\ndef g():\n    ret", "    return 1\n\n"),
        # the first in the text, not the first of the list
        ("    return 1\nprint(f(2))\nclass A:", "    return 1"),
        ("    if x:\n        return 1\n    # why\n", "    if x:\n        return 1\n    # why\n"),
        ("\ndef f(x):", ""),
        ("def f(x):\n    return x\n# next", "def f(x):\n    return x"),
        ("", ""),
    ],
)
def test_text_is_cut_at_the_first_stop_string(evaluation, text, cut):
    assert evaluation.cut_at_stop(text, PAPER) == cut
    assert evaluation.cut_at_stop(text, []) == text


def test_stop_strings_from_the_command_line(evaluation):
    cfg = tyro.cli(evaluation.Config, args=["--stop", *PAPER, "--plain"], use_underscores=True)
    assert cfg.stop == PAPER and cfg.plain
    assert tyro.cli(evaluation.Config, args=[], use_underscores=True).stop == []


# ------------------------------------------------------------------------------------------- runs


def test_a_run_with_every_kind_of_policy(evaluation, world, capsys):
    """Two policies and the solutions on two files, sampled, tested and scored."""
    problems = read(world / "problems.jsonl")
    write(world / "more.jsonl", problems[:5])
    cfg = settings(
        evaluation,
        policies=["./policy", "./other", "canonical"],
        problems=["problems.jsonl", "more.jsonl"],
        reward_model="./rm",
        samples=4,
        ks=[1, 4],
        generate_batch_size=8,
    )
    evaluation.main(cfg)
    records = read(world / "o/samples.jsonl")
    results = json.loads((world / "o/results.json").read_text())
    assert len(records) == 2 * (12 + 5) * 5 + 12 + 5 and len(results) == 6
    of = {(row["policy"], row["benchmark"]): row for row in results}

    for (policy, benchmark), row in of.items():
        mine = [r for r in records if r["policy"] == policy and r["benchmark"] == benchmark]
        greedy = [r["actual_score"] for r in mine if r["greedy"]]
        assert len(greedy) == row["problems"]
        assert row["greedy pass@1"]["mean"] == pytest.approx(np.mean(greedy))
        first = of["./policy", benchmark]
        if policy == "canonical":
            assert row["greedy pass@1"]["mean"] == 1.0 and "pass@1" not in row
            assert all(r["rm_score"] is None and not r["truncated"] for r in mine)
            assert set(row["gain"]) == {"greedy pass@1"}
            continue
        sampled = [r["actual_score"] for r in mine if not r["greedy"]]
        assert row["pass@1"]["mean"] == pytest.approx(np.mean(sampled))
        solved = np.array(sampled).reshape(-1, 4).max(1)  # pass@4 of four samples: any of them
        assert row["pass@4"]["mean"] == pytest.approx(solved.mean())
        assert row["rm_score"]["mean"] == pytest.approx(
            np.mean([r["rm_score"] for r in mine if not r["greedy"]])
        )
        if policy == "./other":
            for name in ("greedy pass@1", "pass@1", "rm_score"):
                gain = row["gain"][name]
                assert gain["mean"] == pytest.approx(row[name]["mean"] - first[name]["mean"])
                assert gain["low"] <= gain["mean"] <= gain["high"]
        else:
            assert row["gain"] == {}
    assert 0 < of["./policy", "problems.jsonl"]["pass@1"]["mean"] < 1  # or this shows little

    # The same prompts in another file: the greedy responses are the same, whatever is beside them.
    def greedy_texts(benchmark):
        mine = [r for r in records if r["policy"] == "./policy" and r["benchmark"] == benchmark]
        return [r["response"] for r in mine if r["greedy"]]

    assert greedy_texts("problems.jsonl")[:5] == greedy_texts("more.jsonl")
    table = (world / "o/table.txt").read_text()
    assert table.count("minus ./policy, paired by problem:") == 2
    assert "canonical" in table and "rm_score" in table and "1.000 [1.000, 1.000]" in table

    # Run again it is reused, also with flags that change no result; other settings are refused.
    capsys.readouterr()
    evaluation.main(evaluation.Config(**{**vars(cfg), "workers": 2, "score_batch_size": 3}))
    printed = capsys.readouterr().out
    assert "is finished" in printed and table in printed
    with pytest.raises(SystemExit) as stop:
        evaluation.main(evaluation.Config(**{**vars(cfg), "seed": 7}))
    assert stop.value.code == 2 and "seed was 0, now 7" in capsys.readouterr().err


def test_scores_are_the_reward_models_own_output(evaluation, world, monkeypatch):
    """Against the reward model on one row; a truncated response gets no EOS made up for it."""
    from transformers import AutoModelForSequenceClassification

    respond, responses = evaluation.respond, []
    monkeypatch.setattr(
        evaluation, "respond", lambda *a: responses.extend(respond(*a)) or list(responses)
    )
    cfg = settings(evaluation, samples=3, ks=[1], reward_model="./rm", score_batch_size=7)
    evaluation.main(cfg)
    records = read(world / "o/samples.jsonl")
    assert {r["truncated"] for r in records} == {True, False}
    tokenizer = sandbox.load_tokenizer("./rm")
    rm = AutoModelForSequenceClassification.from_pretrained("./rm").eval()
    for record, response in zip(records, responses, strict=True):
        assert record["truncated"] == (response[-1] != tokenizer.eos_token_id)
        ids = torch.tensor([tokenizer(record["prompt"]).input_ids + response])
        score = rm.score(rm.model(ids).last_hidden_state)[0, -1].item()
        assert record["rm_score"] == pytest.approx(score, abs=1e-4)


def test_a_base_model_that_goes_on_passes_with_stop_strings_only(evaluation, world, monkeypatch):
    """It answers, goes on with a program of its own, and never emits EOS."""
    ids = sandbox.load_tokenizer("./policy")(RIGHT + WRONG + OTHER).input_ids

    def generate(model, tokenizer, prompts, repeats, *_):
        return [ids] * len(prompts) * repeats, []

    monkeypatch.setattr(evaluation, "generate", generate)
    for passed, stop in enumerate(([], ["\ny", "\ndef"])):
        evaluation.main(settings(evaluation, stop=stop, out=f"o{passed}"))
        results = json.loads((world / f"o{passed}/results.json").read_text())
        record = read(world / f"o{passed}/samples.jsonl")[0]
        assert results[0]["greedy pass@1"]["mean"] == passed
        assert record["response"] == (RIGHT.rstrip() if stop else RIGHT + WRONG + OTHER)
        assert record["truncated"] == (not stop)


def test_plain_leaves_the_chat_template_out(evaluation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    template = "{% for m in messages %}# user\n{{ m.content }}{% endfor %}"
    problems = make_world(tmp_path, chat_template=template)
    tokenizer = sandbox.load_tokenizer("./policy", plain=True)
    seen = []

    def generate(model, tokenizer, prompts, repeats, *_):
        seen.append(prompts[0])
        return [[1]] * len(prompts) * repeats, []

    monkeypatch.setattr(evaluation, "generate", generate)
    for plain in (False, True):
        evaluation.main(settings(evaluation, plain=plain, out=f"o{plain}"))
        expected = problems[0]["prompt"] if plain else "# user\n" + problems[0]["prompt"]
        assert tokenizer.decode(seen[-1]) == expected


# -------------------------------------------------------------------------------------- bad input

BAD = {
    "missing policy": (dict(policies=["./policy", "out/typo"]), "no model at out/typo"),
    "no policy": (dict(policies=[]), "--policies"),
    "an RM": (dict(policies=["./policy", "./rm"]), "./rm is a reward model"),
    "cut to nothing": (dict(stop=[""]), "--stop"),
    "no solutions": (dict(policies=["./policy", "canonical"]), "t/11 has no solution"),
    "long prompt": (dict(max_new_tokens=60), "exceeds the model's context of 64"),
    "k above n": (dict(samples=2, ks=[1, 5]), "pass@5 needs"),
    "other tokenizer": (dict(policies=["./policy", "./foreign"], reward_model="./rm"), "tokenizer"),
    "not an RM": (dict(reward_model="./policy"), "reward_mean"),
    "cut text": (dict(reward_model="./rm", stop=["\ndef"]), "--stop"),
    "missing file": (dict(problems=["problems.jsonl", "none.jsonl"]), "none.jsonl does not exist"),
    "no tests": (dict(problems=["problems.jsonl", "bad.jsonl"]), "bad.jsonl"),
    "a folder in the way": (dict(out="policy"), "policy holds no finished run"),
    "batch of nothing": (dict(score_batch_size=0), "--score_batch_size"),
}


@pytest.mark.parametrize("name", BAD)
def test_everything_is_checked_before_the_first_policy_runs(
    evaluation, world, capsys, monkeypatch, name
):
    """One line, exit code 2, nothing written and nothing computed."""
    problems = read(world / "problems.jsonl")
    write(world / "problems.jsonl", [*problems[:-1], {**problems[-1], "solution": None}])
    write(world / "bad.jsonl", [{**problems[0], "tests": []}])
    foreign = sandbox.load_tokenizer("./policy")
    foreign.add_tokens(["z = 4\n"])
    foreign.save_pretrained("./foreign")
    evaluation.AutoConfig.from_pretrained("./policy").save_pretrained("./foreign")
    before = sorted(world.rglob("*"))
    monkeypatch.setattr(evaluation, "generate", lambda *_: pytest.fail("work that would be lost"))
    flags, words = BAD[name]
    with pytest.raises(SystemExit) as stop:
        evaluation.main(settings(evaluation, **flags))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert sorted(world.rglob("*")) == before


def test_a_run_that_breaks_off_while_it_saves_can_be_run_again(evaluation, world, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.sandbox, "save_config", full)
        with pytest.raises(OSError):
            evaluation.main(settings(evaluation))
    assert not (world / "o").exists()
    evaluation.main(settings(evaluation))
    assert (world / "o/stage_config.json").exists() and not (world / "o.tmp").exists()
