"""02_reward_model.py: the loss, pairs, scores, one small run, resume, and what it refuses."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import sandbox

PROBLEM = {"prefix": "", "setup": "", "entry_point": None, "tests": ["assert x == 1"]}


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------- the loss and the pairs


def test_pairwise_loss_by_hand(rm):
    # Differences 1 and -2: -log sigmoid(1) = .31326, -log sigmoid(-2) = 2.12693
    loss = rm.pairwise_loss(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 2.0]))
    assert loss.item() == pytest.approx((0.31326 + 2.12693) / 2, abs=1e-4)
    assert rm.pairwise_loss(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(math.log(2))


def test_pairwise_loss_pushes_the_chosen_up(rm):
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    rm.pairwise_loss(chosen, rejected).backward()
    assert chosen.grad.item() == -0.5 and rejected.grad.item() == 0.5


def levenshtein(a, b):
    """The textbook recursion, as a table."""
    table = [[i + j for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            replaced = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, replaced)
    return table[-1][-1]


def test_edit_distance(rm):
    assert rm.edit_distance("kitten", "sitting") == 3
    assert rm.edit_distance("", "") == 0
    assert rm.edit_distance("", "abc") == rm.edit_distance("abc", "") == 3
    rng = random.Random(0)
    for _ in range(200):
        a, b = ("".join(rng.choices("abc\né", k=rng.randrange(12))) for _ in range(2))
        assert rm.edit_distance(a, b) == levenshtein(a, b)


def test_pick_pair_takes_the_largest_edit_distance(rm):
    responses = ["return 1", "return 12345", "return 2", "pass"]
    # passing 0 and 1, failing 2 and 3: 1 and 3 differ most
    assert rm.pick_pair(responses, [True, True, False, False]) == (1, 3)
    assert rm.pick_pair(responses, [False, False, True, True]) == (3, 1)
    assert rm.pick_pair(["ab", "xb", "ay"], [True, False, False]) == (0, 1)  # first of equals
    assert rm.pick_pair(responses, [True] * 4) is None
    assert rm.pick_pair(responses, [False] * 4) is None


def test_all_pairs_counts_a_text_once(rm):
    assert rm.all_pairs(["a", "b", "a", "c"], [True, False, True, False]) == [(0, 1), (0, 3)]


def make_samples(groups):
    """[[(response, passed), ..] of each prompt] -> samples."""
    return [
        {"task_id": f"t/{p}", "prompt": f"p{p}", "response": text, "actual_score": float(passed)}
        for p, group in enumerate(groups)
        for text, passed in group
    ]


def test_training_pairs_are_one_or_up_to_four_of_each_prompt(rm):
    groups = [[("a", 1), ("bb", 1), ("ccc", 0), ("dddd", 0), ("eeeee", 0)]]  # 6 pairs
    groups += [[("a", 1), ("b", 0)], [("a", 1), ("a", 1)], [("a", 0), ("b", 0)]]
    for kind, counts in (("all", [4, 1]), ("edit", [1, 1])):
        pairs = rm.choose_pairs(make_samples(groups), rm.Config(pairs=kind), random.Random(0))
        assert [sum(a["task_id"] == f"t/{p}" for a, _ in pairs) for p in range(2)] == counts
        assert len(pairs) == sum(counts)
        assert all(a["task_id"] == b["task_id"] for a, b in pairs)
        assert all(a["actual_score"] > b["actual_score"] for a, b in pairs)
    assert (pairs[0][0]["response"], pairs[0][1]["response"]) == ("a", "eeeee")
    assert rm.pair_record(pairs[0]) == {
        "task_id": "t/0", "prompt": "p0", "chosen": "a", "rejected": "eeeee", "edit_distance": 5
    }  # fmt: skip


def test_worse_reward_models_on_purpose(rm):
    """--max_pairs takes so many, --label_noise turns about that share of them around."""
    samples = make_samples([[("a", 1), ("b", 0)]] * 1)
    samples = [{**s, "task_id": f"t/{p}"} for p in range(1000) for s in samples]
    cfg = rm.Config(max_pairs=400, label_noise=0.25)
    pairs = rm.choose_pairs(samples, cfg, random.Random(0))
    assert len({a["task_id"] for a, _ in pairs}) == len(pairs) == 400
    wrong = sum(a["actual_score"] < b["actual_score"] for a, b in pairs)
    assert 65 <= wrong <= 135  # 100 +- 4 standard deviations


# -------------------------------------------------------------------------- accuracy and scores


def test_interval_over_prompts_is_wider_than_over_pairs(rm):
    """Ten pairs of a prompt that all agree are one observation, not ten."""
    values = np.repeat(np.random.default_rng(0).random(40) < 0.7, 10).astype(float)
    prompts, pairs = np.repeat(np.arange(40), 10), np.arange(400)
    low, high = rm.clustered_interval(values, prompts, np.random.default_rng(1))
    low_pairs, high_pairs = rm.clustered_interval(values, pairs, np.random.default_rng(1))
    assert low < values.mean() < high and high - low > 2 * (high_pairs - low_pairs)


def test_pair_accuracy_by_hand(rm):
    def pair(prompt, good, bad):
        rows = ({"task_id": prompt, "rm_score": s, "response": text} for s, text in (good, bad))
        return tuple(rows)

    pairs = [
        pair("a", (1.0, "xx"), (0.0, "xxx")),  # right, shorter
        pair("a", (1.0, "xx"), (2.0, "yy")),  # wrong, equal length
        pair("b", (3.0, "xxx"), (2.0, "x")),  # right, longer
        pair("b", (3.0, "xxx"), (3.0, "y")),  # a tie, longer
    ]
    accuracy = rm.pair_accuracy(pairs, 0)
    assert (accuracy["pairs"], accuracy["prompts"]) == (4, 2)
    assert accuracy["accuracy"] == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert accuracy["shorter_is_better"] == pytest.approx((1 + 0.5) / 4)
    # Prompt a has 1 of 2 right, b has 1.5 of 2: no draw of two prompts leaves this range.
    assert (accuracy["low"], accuracy["high"]) == (0.5, 0.75)


def test_training_and_scoring_read_the_last_token(rm, model_folder):
    """The score is the model's own logit at the last token, alone or beside longer rows."""
    model = rm.AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1).eval()
    sequences = [[5, 6, 7, 1], [8, 9, 10, 11, 12, 13, 1], [5, 6], [9, 8, 7, 6, 5]]
    with torch.no_grad():
        trained = rm.last_scores(model, sequences)
        alone = torch.cat([model(torch.tensor([ids])).logits[:, 0] for ids in sequences])
    assert torch.allclose(trained, alone, atol=1e-4)
    assert torch.allclose(rm.score_responses(model, sequences, 2), alone, atol=1e-4)
    assert rm.last_scores(model, sequences).requires_grad


# ----------------------------------------------------------------------------------- a small run


@pytest.fixture(scope="module")
def sft_folder(sft, tmp_path_factory):
    """Problems, and a policy that passes about half of the time: {problems.jsonl, policy}."""
    folder = tmp_path_factory.mktemp("policy")
    problems = [
        {
            **PROBLEM,
            "task_id": f"t/{i}",
            "prompt": "xs " * (i % 4) + "x\n",
            "solution": f"x = {1 + i // 4 % 2}\n",
        }
        for i in range(48)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
        cfg = sft.Config(
            data="problems.jsonl",
            out="policy",
            epochs=16,
            batch_size=8,
            hidden_size=32,
            layers=1,
            vocab_size=300,
            lr=1e-2,
            threads=1,
        )
        sft.main(cfg)
    return folder


@pytest.fixture
def world(sft_folder, tmp_path, monkeypatch):
    """An empty current folder whose problems.jsonl and policy are those of `sft_folder`."""
    monkeypatch.chdir(tmp_path)
    for name in ("problems.jsonl", "policy"):
        Path(name).symlink_to(sft_folder / name)
    return tmp_path


def config(rm, **settings):
    defaults = {
        "data": "problems.jsonl",
        "validation": "problems.jsonl",
        "policy": "policy",
        "out": "o",
        "r2_responses": 4,
        "max_new_tokens": 12,
        "epochs": 2,
        "batch_size": 8,
        "lr": 3e-3,
        "log_every": 3,
        "workers": 1,
        "threads": 1,
    }
    return rm.Config(**{**defaults, **settings})


SAMPLE = {
    "task_id": str,
    "prompt": str,
    "response": str,
    "rm_score": float,
    "actual_score": float,
    "passed_tests": int,
    "total_tests": int,
    "status": str,
    "trust": str,
    "truncated": bool,
    "policy": str,
}


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_what_it_writes(rm, world, capsys, lora_rank):
    if lora_rank:
        pytest.importorskip("peft")
    rm.main(config(rm, lora_rank=lora_rank, gradient_checkpointing=bool(lora_rank)))
    problems = read("problems.jsonl")
    samples, validation = read("o/samples.jsonl"), read("o/validation_samples.jsonl")
    assert [s["task_id"] for s in samples] == [p["task_id"] for p in problems for _ in range(5)]
    assert [s["task_id"] for s in validation] == [p["task_id"] for p in problems for _ in range(4)]
    for s in samples + validation:
        assert s.keys() == SAMPLE.keys() and all(isinstance(s[k], SAMPLE[k]) for k in SAMPLE)
    rows = [p for p in problems for _ in range(5)]
    assert [s["prompt"] for s in samples] == [p["prompt"] for p in rows]
    again = sandbox.run_tests(rows, [s["response"] for s in samples], timeout=1.0, workers=1)
    assert [float(result.passed) for result in again] == [s["actual_score"] for s in samples]
    assert {s["actual_score"] for s in samples} == {0.0, 1.0}

    # The saved folder loads as it is, gives the saved scores, and knows their unit.
    model = rm.AutoModelForSequenceClassification.from_pretrained("o").eval()
    tokenizer = sandbox.load_tokenizer("o")
    assert Path("o/tokenizer.json").read_bytes() == Path("policy/tokenizer.json").read_bytes()
    some = [s for s in samples if not s["truncated"]][:20]
    encode = AutoTokenizer.from_pretrained("o")
    sequences = [
        sandbox.encode_prompt(tokenizer, s["prompt"])
        + encode(s["response"]).input_ids
        + [tokenizer.eos_token_id]
        for s in some
    ]
    again = rm.score_responses(model, sequences, 8)
    stored = torch.tensor([s["rm_score"] for s in some])
    # Not quite all: a policy may have sampled a text by other tokens than the tokenizer's own.
    assert (again - stored).abs().less(1e-3).float().mean() >= 0.8
    scores = torch.tensor([s["rm_score"] for s in validation])
    assert model.config.num_labels == 1
    assert model.config.reward_mean == pytest.approx(scores.mean().item(), abs=1e-4)
    assert model.config.reward_std == pytest.approx(scores.std().item(), rel=1e-4)

    pairs = read("o/pairs.jsonl")
    verdicts = {(s["task_id"], s["response"]): s["actual_score"] for s in samples}
    for p in pairs:
        assert verdicts[p["task_id"], p["chosen"]] > verdicts[p["task_id"], p["rejected"]]
        assert p["edit_distance"] == rm.edit_distance(p["chosen"], p["rejected"])
    accuracy = json.loads(Path("o/accuracy.json").read_text())
    if not lora_rank:  # one number tells the programs apart
        assert accuracy["accuracy"] > 0.75
    assert f"{accuracy['accuracy']:.3f} [" in capsys.readouterr().out
    assert not Path("o/state.pt").exists() and not list(Path("o").glob("adapter*"))


def test_resumed_it_ends_as_the_unbroken_run_and_samples_once(rm, world, monkeypatch, capsys):
    rm.main(config(rm, out="unbroken"))
    saves = []
    save_state = rm.save_state

    def killed(*args, **progress):
        save_state(*args, **progress)
        saves.append(progress["step"])
        if progress["step"] in (0, 6):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rm, "save_state", killed)
        with pytest.raises(KeyboardInterrupt):
            rm.main(config(rm))
        monkeypatch.setattr(rm, "generate", lambda *args: pytest.fail("sampled again"))
        with pytest.raises(KeyboardInterrupt):
            rm.main(config(rm, resume=True))
    assert saves == [0, 3, 6] and not Path("o/stage_config.json").exists()
    with pytest.raises(SystemExit):
        rm.main(config(rm))
    assert "add --resume" in capsys.readouterr().err
    rm.main(config(rm, resume=True))
    assert "resuming o after step 6" in capsys.readouterr().out
    for name in ("model.safetensors", "config.json", "samples.jsonl", "validation_samples.jsonl",
                 "pairs.jsonl", "accuracy.json"):  # fmt: skip
        assert (world / "o" / name).read_bytes() == (world / "unbroken" / name).read_bytes(), name
    rm.main(config(rm, workers=0))
    assert "o is finished" in capsys.readouterr().out


@pytest.mark.parametrize("mark", ["state_config.json", "stage_config.json"])
def test_killed_while_it_saves_it_can_be_called_again(rm, world, killed_at, mark):
    rm.main(config(rm, out="unbroken"))
    killed_at(mark, lambda: rm.main(config(rm, resume=True)), times=2)
    rm.main(config(rm, resume=True))
    names = [{path.name for path in Path(out).iterdir()} for out in ("o", "unbroken")]
    assert names[0] == names[1] and "state.pt" not in names[0]
    for name in names[0] - {"stage_config.json"}:
        assert Path("o", name).read_bytes() == Path("unbroken", name).read_bytes(), name


def test_micro_batches_change_nothing(rm, world):
    for out, size in (("whole", 8), ("parts", 3)):
        rm.main(config(rm, out=out, micro_batch_size=size))
    whole, parts = (
        torch.tensor([s["rm_score"] for s in read(f"{out}/samples.jsonl")])
        for out in ("whole", "parts")
    )
    assert (whole - parts).abs().max() < 0.02 * whole.std()


# --------------------------------------------------------------------------------- what it refuses


def refused(capsys, rm, *words, **settings):
    """The stage ends with exit code 2 and one line that holds all words; the folder stays."""
    before = sorted(Path(".").rglob("*"))
    with pytest.raises(SystemExit) as stop:
        rm.main(config(rm, **settings))
    error = capsys.readouterr().err  # on a slow machine behind a progress bar
    assert stop.value.code == 2 and "Traceback" not in error
    assert all(word in error.strip().splitlines()[-1] for word in words), error
    assert sorted(Path(".").rglob("*")) == before


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"data": "nowhere.jsonl"}, ["nowhere.jsonl does not exist"]),
        ({"validation": "nowhere.jsonl"}, ["nowhere.jsonl does not exist"]),
        ({"policy": "out/none"}, ["no model at out/none"]),
        ({"policy": "./adapters"}, ["./adapters", "merge"]),
        ({"validation": "long.jsonl"}, ["t/long", "--max_new_tokens 12", "context of 512"]),
        ({"validation": "untested.jsonl"}, ["untested.jsonl", "tests"]),
        ({"responses_per_prompt": 1}, ["--responses_per_prompt", "2"]),
        ({"label_noise": 2.0}, ["--label_noise"]),
        ({"max_pairs": -1}, ["--max_pairs"]),
        ({"batch_size": 0}, ["--batch_size 0"]),
        ({"epochs": 0}, ["--epochs 0"]),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_it_samples(rm, world, capsys, monkeypatch, settings, words):
    Path("adapters").mkdir()
    Path("adapters/adapter_config.json").write_text("{}")
    long = {**PROBLEM, "task_id": "t/long", "prompt": "word " * 600}
    Path("long.jsonl").write_text(json.dumps(long) + "\n")
    Path("untested.jsonl").write_text(json.dumps({**long, "tests": []}) + "\n")
    monkeypatch.setattr(rm, "generate", lambda *args: pytest.fail("work that would be lost"))
    refused(capsys, rm, *words, **settings)


@pytest.mark.parametrize("place", ["data", "validation"])
def test_no_pairs(rm, world, capsys, place):
    """A policy that never passes gives nothing to compare."""
    failing = {**PROBLEM, "task_id": "t", "prompt": "x\n", "tests": ["assert False"]}
    Path("failing.jsonl").write_text(json.dumps(failing) + "\n")
    refused(capsys, rm, "0 pairs from failing" if place == "data" else "0 from failing.jsonl",
            **{place: "failing.jsonl"})  # fmt: skip


def test_one_score_for_everything_is_no_reward_model(rm, world, capsys, monkeypatch):
    monkeypatch.setattr(
        rm, "score_responses", lambda model, sequences, *_: torch.ones(len(sequences))
    )
    with pytest.raises(SystemExit) as stop:
        rm.main(config(rm))
    assert stop.value.code == 2 and "one score" in capsys.readouterr().err
    assert not Path("o/model.safetensors").exists()


def test_a_gradient_that_is_not_finite_stops_before_its_step(rm, world, monkeypatch):
    load_model = rm.load_model

    def with_a_hook(model_class, *args, **options):
        model = load_model(model_class, *args, **options)
        next(model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
        return model

    monkeypatch.setattr(rm, "load_model", with_a_hook)
    with pytest.raises(RuntimeError, match="non-finite"):
        rm.main(config(rm))
    assert torch.load("o/state.pt")["step"] == 0 and not Path("o/model.safetensors").exists()
