"""Stage 7: tests out of a text, votes, labels and pairs by hand; whole runs on a small model."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import load_script, run_script

import sandbox


@pytest.fixture(scope="session")
def plum():
    return load_script("07_plum.py")


# ---------------------------------------------------------------------------- tests out of a text

PARSED = [
    # as the small model writes them; equal ones once
    (
        "assert f([1, 2]) == [2]\nassert f([]) == []\nassert f([1,2]) == [2]\n",
        [("f([1, 2])", "[2]"), ("f([])", "[]")],
    ),
    # two opinions on one call are two tests
    ("assert f(1) == 2\nassert f(1) == None\n", [("f(1)", "2"), ("f(1)", "None")]),
    # the other way round, a message, `is`, bare and negated calls
    (
        "assert 3 == f('a'), 'no'\nassert f(0) is True\nassert f(1)\nassert not f(2)\n",
        [("f('a')", "3"), ("f(0)", "True"), ("f(1)", "True"), ("f(2)", "False")],
    ),
    # keyword arguments, containers of literals, a call over two lines
    ("assert f(xs=[(1, 'a')],\n n={2: None}) == {1}", [("f(xs=[(1, 'a')], n={2: None})", "{1}")]),
    # the last line was cut, words stand between the tests, a fenced block, a test function
    ("assert f([1]) == [1]\nassert f([2, 3]) == [2,", [("f([1])", "[1]")]),
    (
        "Sure! Two:\nassert f(1) == 2\nand\n  assert f(2) == 3\nDone.",
        [("f(1)", "2"), ("f(2)", "3")],
    ),
    ("Here:\n```python\nassert f(1) == 2\n```\nassert f(9) == 9\n", [("f(1)", "2")]),
    ("def test_f():\n    assert f(1) == 2\n", [("f(1)", "2")]),
    # not about the entry point, or about nothing
    ("assert True\nassert 1 == 1\nassert other(1) == 2\nassert f == f\nassert 'f(1)' == 2\n", []),
    ("assert f(1) == f(1)\nassert f(1) == 2 or True\nassert (f(1) == 2, 'always true')\n", []),
    ("assert f(1) != 2\nassert f(1) < 2\nassert 1 == f(1) == 1\nassert f(1) in [1, 2]\n", []),
    ("assert len(f([1])) == 1\nassert f(1) + 0 == 2\nassert [f(1)] == [2]\nf(1) == 2\n", []),
    # arguments and expectations that are computed: by whom, and with which names?
    (
        "assert f(x) == 2\nassert f(1) == y\nassert f(open('a').read()) == ''\nassert f(*[1]) == 2",
        [],
    ),
    # garbage
    ("", []),
    ("assert f(", []),
    ("\x00 assert f(1) == 1", []),
    ("]]] ```", []),
    ("(" * 5000, []),
    ("assert f(" + "[" * 3000 + "]" * 3000 + ") == 1", []),
    ("assert f(1) == " + "9" * 5000, []),
    ("\ud800", []),
]


@pytest.mark.parametrize("text, expected", PARSED, ids=range(len(PARSED)))
def test_parse_tests(plum, text, expected):
    assert plum.parse_tests(text, "f") == expected


def test_parse_tests_of_other_entry_points(plum):
    text = "assert Solution().f(2) == 3\nassert Solution(1).f(x) == 3\nassert f(2) == 3"
    assert plum.parse_tests(text, "Solution") == [("Solution().f(2)", "3")]
    assert plum.parse_tests("assert f(1) == 2", "f_it") == []
    assert plum.parse_tests("assert f(1) == 2", None) == []


def test_plum_jsonl_asks_and_answers_as_the_stage_does(plum):
    """plum.jsonl asks as --ask does, and its answers parse as what the model writes is parsed."""
    data = load_script("00_data.py")
    problem = {
        "prompt": '"""reverse the list."""\ndef solve(xs):\n',
        "prefix": "def solve(xs):\n",
        "solution": "    return xs[::-1]\n",
        "steps": ["reverse"],
        "entry_point": "solve",
    }
    (record,) = data.plum_records([problem], 0)
    assert record["prompt"] == plum.request_for_tests(problem, plum.Config())
    tests = plum.parse_tests(record["solution"], "solve")
    assert len(tests) == record["solution"].count("\n") > 1
    for call, expected in tests:
        assert eval(call, {"solve": lambda xs: xs[::-1]}) == plum.literal(expected)[0]


# --------------------------------------------------------------------------- votes, labels, pairs


def test_consistency_by_hand(plum):
    """Five responses, six tests; a row is a response, None stands for a call that failed."""
    outputs = [
        [(1,), ([2],), (0,), (7,), None, (None,)],
        [(1,), ([2],), (0,), (8,), None, (None,)],
        [(1,), ([3],), (0,), (9,), None, (None,)],
        [(2,), ([2, 2],), (0,), (7,), None, (5,)],
        [None, (None,), (0,), (1,), (4,), (5,)],
    ]
    expected = [(1,), ([2],), (0,), (7,), (4,), (None,)]
    # three say 1; two say [2]; all say 0; two say 7; one runs at all; three return None, an output
    shares = [plum.agreement_share([row[t] for row in outputs], expected[t]) for t in range(6)]
    assert shares == [0.6, 0.4, 1.0, 0.4, 0.2, 0.6]
    assert plum.agreement_share([None, None, (1,)], None) == 0.0
    # a majority agrees and some do not: not test 1 (no majority), not test 2 (nothing told apart)
    kept = [plum.is_consistent(share, 0.5) for share in shares]
    assert kept == [True, False, False, False, False, True]
    assert not plum.is_consistent(0.5, 0.5) and plum.is_consistent(0.51, 0.5)


def test_majority_output_by_hand(plum):
    assert plum.majority_output([(1,), (2,), (2,), None, (3,)]) == (2,)
    assert plum.majority_output([None, None, ([4],)]) == ([4],)  # failures have no voice
    assert plum.majority_output([(1,), (2,)]) == (1,)  # a tie: the first
    assert plum.majority_output([None, None]) is None
    assert plum.majority_output([(None,), (None,), (0,)]) == (None,)


def test_label_quality_by_hand(plum):
    labels = [True, False, False, True, None, None, False, True]
    passed = [True, False, True, False, False, True, False, True]
    # failing: 1, 3, 4, 6, of which 1 and 6 were rejected (4 has no tests, which reject nothing)
    # labels: 6, of which 0, 1, 6, 7 are right
    assert plum.label_quality(labels, passed) == {"recall": 0.5, "label_accuracy": 4 / 6}
    nothing = {"recall": None, "label_accuracy": None}
    assert plum.label_quality([None, None], [True, True]) == nothing


def test_pairs_are_of_a_passing_and_a_failing_response(plum):
    generator = torch.Generator().manual_seed(0)
    labels = [True, None, False, True, False, False, True, None]
    seen = set()
    for _ in range(100):
        pairs = plum.pair_up(labels, 2, generator)
        assert len(pairs) == 2 and len({k for pair in pairs for k in pair}) == 4
        assert all(labels[a] is True and labels[b] is False for a, b in pairs)
        seen.update(pairs)
    assert len(seen) == 9  # three passing, three failing: all combinations turn up
    assert len(plum.pair_up(labels, 10, generator)) == 3
    assert plum.pair_up([True, True, None], 2, generator) == []


def test_the_reference_point_reads_responses_with_other_prompts(plum, monkeypatch):
    """Two pairs of prompt 1, one of prompt 2, two of prompt 3: rows, prompts and responses."""
    prompts, responses = [[p] for p in (1, 1, 1, 1, 2, 2, 3, 3, 3, 3)], [[k] for k in range(10)]
    batches = []

    def forward(policy, reference, batch, cfg, amp):
        batches.append(batch)
        return torch.full((10, 1), 3.0), torch.full((10, 1), 1.0)

    monkeypatch.setattr(plum, "policy_and_reference", forward)
    cfg = plum.Config(pairs_per_prompt=2)
    assert plum.reference_point(None, None, prompts, responses, cfg, None) == 2.0
    assert batches[0]["input_ids"][:, 1:].tolist() == responses
    assert all(a != b for a, b in zip(batches[0]["input_ids"][:, :1].tolist(), prompts))
    # six rows could be of one prompt and a half: no other prompt is certain
    assert plum.reference_point(None, None, prompts[:6], responses[:6], cfg, None) == 0.0
    assert len(batches) == 1


def test_outputs_of_programs(plum):
    """What a program does on one call does not touch the others; other prints are no outputs."""
    codes = [
        "def f(x):\n    return [x, None]",
        "def f(x):\n    print('noise', end='')\n    if x == 0: 1 / 0\n    if x == 1: exit()\n"
        "    return 'a\\nb'",
        "def f(x):\n    while x == 1: pass\n    return x",
        "def f(x)\n    return x",
        "def f(x):\n    return object()",
        "print('@plum@ 0 5')\ndef f(x):\n    return {x: (1.5, True)}",
    ]
    calls = ["f(0)", "f(1)", "f(2)"]
    runs = [("f", code, calls) for code in codes] + [("f", codes[0], [])]
    outputs = plum.call_outputs(runs, plum.Config(timeout=0.3))
    assert outputs[0] == [([0, None],), ([1, None],), ([2, None],)]
    assert outputs[1] == [None, None, ("a\nb",)]
    assert outputs[2] == [(0,), None, None]  # stopped at the second call; the third never ran
    assert outputs[3] == outputs[4] == [None] * 3
    assert outputs[5] == [({0: (1.5, True)},), ({1: (1.5, True)},), ({2: (1.5, True)},)]
    assert outputs[6] == []


def test_vote_and_label_by_hand(plum):
    """Three responses; two tests, of which the first tells them apart."""
    problem = {
        "task_id": "t",
        "prompt": "p",
        "prefix": "",
        "setup": "",
        "entry_point": "f",
        "solution": "def f(x): return x + 1",
    }
    texts = ["def f(x): return 2", "def f(x): return x + 1", "def f(x): return 0"]
    written = ["assert f(1) == 5\nassert f(4) == 5", "assert f(1) == 2"]
    tests = plum.vote([problem], texts, written, plum.Config(responses_per_prompt=3))
    # f(1): 2, 2, 0; the majority is right. f(4): 2, 5, 0; no majority, at a tie the first is taken
    assert [test["test"] for test in tests] == ["assert f(1) == 2", "assert f(4) == 2"]
    assert [test["agreement"] for test in tests] == [2 / 3, 1 / 3]
    assert [test["kept"] for test in tests] == [True, False]
    assert [test["right"] for test in tests] == [True, False]
    assert plum.label([problem] * 3, texts, tests, plum.Config()) == [True, True, False]
    # the expected values are the model's: f(1) is asked for twice
    cfg = plum.Config(responses_per_prompt=3, outputs="model", agreement=0.2)
    tests = plum.vote([problem], texts, written, cfg)
    assert [test["agreement"] for test in tests] == [0, 1 / 3, 2 / 3]
    assert [test["right"] for test in tests] == [False, True, True]
    assert plum.label([problem] * 3, texts, tests, cfg) == [False, True, False]
    # without a kept test nothing is labelled; without a solution no test is called right
    tests = plum.vote([problem | {"solution": None}], texts, ["no tests here", ""], cfg)
    assert tests == [] and plum.label([problem] * 3, texts, tests, cfg) == [None] * 3
    tests = plum.vote([problem | {"solution": None}], texts, written, cfg)
    assert {test["right"] for test in tests} == {None}


# -------------------------------------------------------------------------------------- whole runs

PROGRAMS = [f"def f(x): return {body}\n" for body in ("x", "x + 1", "2 * x", "0", "abs(x)")]
TESTS = [f"assert f({x}) == {y}\n" for x in (-2, 0, 3) for y in (x + 1, 2 * x)]
FLAGS = dict(
    data="problems.jsonl",
    validation="problems.jsonl",
    policy="taught",
    iterations=2,
    prompts_per_iteration=5,
    responses_per_prompt=6,
    max_new_tokens=6,
    minibatch_size=6,
    lr=1e-2,
    eval_every=2,
    threads=1,
)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """Stages 1 and 7 as the reader types them, with a model that writes a line of Python per token.

    So every response is a program, or tests, after two seconds of stage 1.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("plum")
    kinds = [f"# task {i}\n" for i in range(8)]
    words = ["# pad\n", "<eos>", "\n", "# tests\n", *kinds, *PROGRAMS, *TESTS]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="\n"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("\n"), "merged_with_previous")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="# pad\n", eos_token="<eos>"
    )
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    problems = [
        {
            "task_id": f"t/{i}",
            "prompt": kind,
            "entry_point": "f",
            "tests": [f"assert f(3) == {4 if i % 2 else 6}"],
            "solution": PROGRAMS[1 if i % 2 else 2],
        }
        for i, kind in enumerate(kinds)
    ]
    write(folder / "problems.jsonl", problems)
    solutions, tests = [], []
    for k in range(240):  # half of the solutions are right, the rest is any program
        problem = problems[k % 8]
        solution = problem["solution"] if k % 16 < 8 else PROGRAMS[k // 16 % 5]
        solutions.append({"task_id": f"s/{k}", "prompt": problem["prompt"], "solution": solution})
        text = TESTS[k // 8 % 6] + TESTS[(k // 8 + k) % 6]
        request = problem["prompt"] + "# tests\n"
        tests.append({"task_id": f"t/{k}", "prompt": request, "solution": text})
    write(folder / "plum.jsonl", solutions + tests)
    flags_of_stage_1 = ["--model", "policy", "--data", "plum.jsonl", "--out", "taught"]
    run_script(
        "01_sft.py", *flags_of_stage_1, "--epochs", 15, "--lr", 3e-3, "--threads", 1, cwd=folder
    )
    flags = [text for name, value in FLAGS.items() for text in (f"--{name}", value)]
    return folder, run_script("07_plum.py", *flags, cwd=folder).stdout


def test_the_stage_runs_and_logs(finished_run):
    from transformers import AutoModelForCausalLM

    folder, printed = finished_run
    run = folder / "out/plum/dpo_offline"
    metrics = read(run / "metrics.jsonl")
    assert [m["iteration"] for m in metrics] == [0, 1, 2]
    assert "validation_pass_at_1" in metrics[0] and "validation_pass_at_1" in metrics[2]
    for m in metrics[1:]:
        assert m["seen"] == 30 and m["test_responses"] == 10
        assert 0 <= m["tests_kept"] <= m["tests_written"] > 0 and m["kept"] == 2 * m["pairs"]
        for name in ("pass_rate", "sampler_pass_rate", "kl_per_response", "entropy", "length"):
            assert math.isfinite(m[name]), name
    assert metrics[1]["kl_per_response"] == pytest.approx(0.0, abs=1e-5)
    assert abs(metrics[2]["kl_per_response"]) > 1e-4
    assert metrics[1]["pairs"] > 0  # 30 responses, most of them not one and the same program
    start, last = (
        AutoModelForCausalLM.from_pretrained(path) for path in (folder / "taught", run / "last")
    )
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), last.parameters()))
    assert (run / "best/config.json").is_file()
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "round   2" in printed and "best validation pass@1" in printed


def test_kept_tests_and_labels_are_what_they_say(finished_run):
    """Every test, label and `right` of a run, computed once more from its files, test by test."""
    run = finished_run[0] / "out/plum/dpo_offline"
    problems = {problem["task_id"]: problem for problem in read(finished_run[0] / "problems.jsonl")}
    for number, line in enumerate(read(run / "metrics.jsonl")[1:], 1):
        tests, rollouts = (
            read(run / name / f"{number:04d}.jsonl") for name in ("tests", "rollouts")
        )
        kept = {}
        for record in tests:
            texts = [r["response"] for r in rollouts if r["task_id"] == record["task_id"]]
            texts.append(problems[record["task_id"]]["solution"])
            if record["test"] is None:  # no response defines f
                assert record["agreement"] == 0 and not record["right"]
                continue
            *votes, truth = (sandbox.run(t, [record["test"]], entry_point="f") for t in texts)
            assert record["agreement"] == pytest.approx(sum(vote.passed for vote in votes) / 6)
            assert record["right"] == truth.passed
            assert record["kept"] == (0.5 < record["agreement"] < 1)
            if record["kept"]:
                kept.setdefault(record["task_id"], []).append(record["test"])
        right = [record["right"] for record in tests if record["kept"]]
        assert line["precision_kept"] == (sum(right) / len(right) if right else None)
        assert line["prompts_with_tests"] == len(kept) and line["tests_kept"] == len(right)
        for r in rollouts:
            if r["task_id"] in kept:
                result = sandbox.run(r["response"], kept[r["task_id"]], entry_point="f")
                assert r["label"] == result.passed
            else:
                assert r["label"] is None and not r["kept"]
        assert sum(r["kept"] for r in rollouts) == line["kept"]
        assert sum(r["kept"] and r["label"] for r in rollouts) == line["pairs"]


@pytest.mark.parametrize(
    "flags",
    [
        dict(loss="kto", epochs=2, gradient_checkpointing=True),
        dict(outputs="model", agreement=0.2, lora_rank=2),
    ],
    ids=["kto", "model, lora"],
)
def test_online_runs_sample_from_the_policy(finished_run, plum, monkeypatch, tmp_path, flags):
    """The policy samples, the frozen model writes the tests; offline it samples, too."""
    monkeypatch.chdir(finished_run[0])
    calls, generate = [], plum.generate

    def recorded(model, tokenizer, prompts, repeats, temperature, *rest):
        if temperature:  # not in validations
            learns = any(p.requires_grad for p in model.parameters())
            if "lora_rank" in flags:  # one model for both
                learns = model.get_model_status().enabled
            calls.append((repeats, learns))
        return generate(model, tokenizer, prompts, repeats, temperature, *rest)

    monkeypatch.setattr(plum, "generate", recorded)
    for online in (True, False):
        calls.clear()
        out = tmp_path / str(online)
        plum.main(plum.Config(**FLAGS, out=str(out), online=online, **flags))
        own = [] if online else [(1, True)]  # offline, one of the policy's own for the log
        assert calls == [(6, online), (2, False), *own] * 2
    metrics = read(tmp_path / "True/metrics.jsonl")
    assert metrics[1]["kl_per_response"] == pytest.approx(0.0, abs=1e-5)
    assert abs(metrics[2]["kl_per_response"]) > 1e-4
    if flags.get("loss") == "kto":
        trained = next(m for m in metrics if m.get("pairs"))
        assert trained["policy_kl_point"] >= 0 and 0 < trained["policy_loss"] < 1
    first = [
        [r["response"] for r in read(tmp_path / name / "rollouts/0001.jsonl")]
        for name in ("True", "False")
    ]
    assert first[0] == first[1]  # before the policy has moved, it is the starting policy


def test_micro_batches_change_nothing_and_pairs_stay_together(finished_run, plum):
    """The gradient of one step in one micro-batch, in three, and by hand from single responses."""
    cfg = plum.Config(beta=0.5, minibatch_size=100, max_grad_norm=1e9)
    _, amp = plum.set_up(cfg)
    path = str(finished_run[0] / "policy")
    tokenizer = sandbox.load_tokenizer(path)
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 7, (6,), generator=rng).tolist()
    responses = [torch.randint(4, 20, (n,), generator=rng).tolist() for n in lengths]
    prompts = [[4], [4], [5, 6], [5, 6], [7], [7]]
    losses, gradients = [], []
    for size in (6, 2, None):
        policy, _ = plum.load_policy(path, tokenizer, cfg, torch.device("cpu"))
        batch = plum.make_batch(prompts, responses)
        batch["kl_point"] = torch.zeros(6, 1)
        batch["ref_logprobs"] = 0.1 * torch.arange(6)[:, None] * batch["response_mask"]
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        before = [p.detach().clone() for p in policy.parameters()]
        if size:
            cfg = dataclasses.replace(cfg, micro_batch_size=size)
            order = torch.Generator().manual_seed(1)
            job = (policy, optimizer, plum.pair_loss, batch, 2, cfg, order, amp)
            statistics = plum.train_groups(*job)
            losses.append(statistics["loss"])
        else:
            ratios = []
            for k, (prompt, response) in enumerate(zip(prompts, responses)):
                ids = torch.tensor([prompt + response])
                logprobs = plum.response_logprobs(
                    policy, ids, torch.ones_like(ids), len(response), 1.0
                )
                ratios.append(logprobs.sum() - 0.1 * k * len(response))
            h = torch.stack([ratios[k] - ratios[k + 1] for k in (0, 2, 4)])
            loss = -torch.log(torch.sigmoid(0.5 * h)).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        gradients.append([b - p.detach() for b, p in zip(before, policy.parameters())])
    assert losses == pytest.approx([losses[2]] * 3, rel=1e-5)
    for other in gradients[:2]:
        for a, b in zip(other, gradients[2]):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_a_finished_run_is_kept(finished_run, plum, monkeypatch, capsys):
    monkeypatch.chdir(finished_run[0])
    plum.main(plum.Config(**FLAGS))
    assert "out/plum/dpo_offline is finished" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        plum.main(plum.Config(**FLAGS, beta=0.3))
    assert stop.value.code == 2 and "beta was 0.1, now 0.3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(responses_per_prompt=1), "--responses_per_prompt 1"),
        (dict(eval_every=0), "--eval_every 0"),
        (dict(pairs_per_prompt=0), "--pairs_per_prompt 0"),
        (dict(beta=0.0), "--beta 0.0"),
        (dict(micro_batch_size=0), "--micro_batch_size 0"),
        (dict(agreement=1.0), "--agreement 1.0"),
        (dict(ask="tests, please"), "has no {prompt}"),
        (dict(data="nothing.jsonl"), "nothing.jsonl does not exist"),
        (dict(data="nameless.jsonl"), "no problem has an entry_point"),
        (dict(policy="out/nothing"), "no model at out/nothing"),
        (dict(max_new_tokens=64), "exceeds the model's context of 64"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bad_input_is_one_line_and_exit_code_2(
    finished_run, plum, monkeypatch, capsys, flags, words
):
    monkeypatch.chdir(finished_run[0])
    problem = read(finished_run[0] / "problems.jsonl")[0]
    write(finished_run[0] / "nameless.jsonl", [problem | {"entry_point": None}])
    before = sorted(finished_run[0].rglob("*"))
    with pytest.raises(SystemExit) as stop:
        plum.main(plum.Config(**{**FLAGS, "out": "bad", **flags}))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert sorted(finished_run[0].rglob("*")) == before  # nothing written, nothing lost
