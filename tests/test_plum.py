"""PLUM: tests out of a text, votes, quality and pairs by hand; the lesson's data; the whole stage on the small pipeline."""

import ast
import json
import math
import shutil
import sys

import pytest
import torch
from conftest import ROOT, load_script, run_script

sys.path.insert(0, str(ROOT))

import sandbox  # noqa: E402


@pytest.fixture(scope="session")
def plum():
    return load_script("07_plum.py")


@pytest.fixture(scope="session")
def data():
    return load_script("00_data.py")


# --------------------------------------------------------------------------------------------------- tests out of a text


@pytest.mark.parametrize("text, expected", [
    # as the small model writes them; equal ones once
    ("assert solve([1, 2]) == [2]\nassert solve([]) == []\nassert solve([1,2]) == [2]\n",
     [("solve([1, 2])", "[2]"), ("solve([])", "[]")]),
    ("assert solve(-3) == None", [("solve(-3)", "None")]),
    # two opinions on one call are two tests
    ("assert solve(1) == 2\nassert solve(1) == 3\n", [("solve(1)", "2"), ("solve(1)", "3")]),
    # the other way round, a message, `is`, bare and negated calls
    ("assert 3 == solve('a'), 'no'\nassert solve(0) is True\nassert solve(1)\nassert not solve(2)\n",
     [("solve('a')", "3"), ("solve(0)", "True"), ("solve(1)", "True"), ("solve(2)", "False")]),
    # keyword arguments, containers of literals
    ("assert solve(xs=[(1, 'a')], n={2: None}) == {1, 2}", [("solve(xs=[(1, 'a')], n={2: None})", "{1, 2}")]),
    # the last line was cut: the others count
    ("assert solve([1]) == [1]\nassert solve([2, 3]) == [2,", [("solve([1])", "[1]")]),
    # words between them, and fenced blocks
    ("Sure! Two tests:\nassert solve(1) == 2\nand\n    assert solve(2) == 3\nThat's it.",
     [("solve(1)", "2"), ("solve(2)", "3")]),
    ("Here:\n```python\nassert solve(1) == 2\n```\nassert solve(9) == 9\n```\nassert solve(3) == 4\n```\n",
     [("solve(1)", "2"), ("solve(3)", "4")]),
    ("```\nassert solve(1) == 2", [("solve(1)", "2")]),
    # not about the entry point, or about nothing
    ("assert True\nassert 1 == 1\nassert other(1) == 2\nassert solve == solve\nassert 'solve(1)' == 2\n", []),
    ("assert solve(1) == solve(1)\nassert solve(1) == 2 or True\nassert (solve(1) == 2, 'always true')\n", []),
    ("assert solve(1) != 2\nassert solve(1) < 2\nassert 1 == solve(1) == 1\nassert solve(1) in [1, 2]\n", []),
    ("assert len(solve([1])) == 1\nassert solve(1) + 0 == 2\nassert [solve(1)] == [2]\n", []),
    # arguments and expectations that are computed: by whom, and with which names?
    ("assert solve(x) == 2\nassert solve(1) == y\nassert solve(open('f').read()) == ''\nassert solve(*[1]) == 2\n"
     "assert solve(1) == sorted([2, 1])\n", []),
    # no top level, no assert
    ("def test():\n    assert solve(1) == 2\n", []), ("solve(1) == 2\n", []), ("if True:\n    assert solve(1) == 2", []),
    # garbage
    ("", []), ("assert", []), ("assert solve(", []), ("\x00 assert solve(1) == 1", []), ("]]] ```", []), ("(" * 5000, []),
    ("assert solve(" + "[" * 3000 + "]" * 3000 + ") == 1", []), ("assert solve(1) == " + "9" * 5000, []), ("\ud800", [])],
    ids=lambda value: ascii(value)[:30] if isinstance(value, str) else "")
def test_parse_tests(plum, text, expected):
    assert plum.parse_tests(text, "solve") == expected


def test_parse_tests_of_other_entry_points(plum):
    assert plum.parse_tests("assert Solution().f(2) == 3\nassert Solution(1).f(x) == 3\nassert f(2) == 3", "Solution") == [
        ("Solution().f(2)", "3")]
    assert plum.parse_tests("assert solve(1) == 2", "solve_it") == plum.parse_tests("assert solve(1) == 2", None) == []


# ------------------------------------------------------------------------------------------------- votes, quality, pairs


def test_consistency_by_hand(plum):
    """Five responses, six tests; each row has the outputs of a response, None where the call failed."""
    outputs = [[(1,), ([2],), (0,), (7,), None, (None,)],
               [(1,), ([2],), (0,), (8,), None, (None,)],
               [(1,), ([3],), (0,), (9,), None, (None,)],
               [(2,), ([2, 2],), (0,), (7,), None, (5,)],
               [None, (None,), (0,), (1,), (4,), (5,)]]
    expected = [(1,), ([2],), (0,), (7,), (4,), (None,)]
    shares = [plum.agreement_share([row[t] for row in outputs], expected[t]) for t in range(6)]
    # three of five say 1; two say [2]; all say 0; two say 7; one runs at all; three return None, which is an output
    assert shares == [0.6, 0.4, 1.0, 0.4, 0.2, 0.6]
    # a majority agrees and some do not: not test 2 (no majority), not test 3 (nothing told apart)
    assert [plum.is_consistent(share, 0.5) for share in shares] == [True, False, False, False, False, True]
    assert plum.is_consistent(0.5, 0.5) is False and plum.is_consistent(0.51, 0.5) is True
    assert [plum.is_consistent(share, 0.3) for share in shares] == [True, True, False, True, False, True]


def test_majority_output_by_hand(plum):
    assert plum.majority_output([(1,), (2,), (2,), None, (3,)]) == (2,)
    assert plum.majority_output([None, None, ([4],)]) == ([4],)  # failures have no voice; lists cannot be hashed
    assert plum.majority_output([(1,), (2,)]) == (1,)  # a tie: the first
    assert plum.majority_output([None, None]) is None
    assert plum.majority_output([(None,), (None,), (0,)]) == (None,)


def test_precision_and_recall_by_hand(plum):
    assert plum.precision([True, False, True, True]) == 0.75 and plum.precision([]) is None
    verdicts = [True, False, False, True, None, None, False, True]
    passed = [True, False, True, False, False, True, False, True]
    # failing responses: numbers 1, 3, 4, 6, of which 1 and 6 were rejected (4 has no tests, which reject nothing): 2/4
    # passing responses: numbers 0, 2, 5, 7, of which 2 was rejected: 1/4
    # verdicts: 6, of which 0, 1, 6, 7 are right: 4/6
    assert plum.verdict_quality(verdicts, passed) == {"recall": 0.5, "false_rejections": 0.25, "label_accuracy": 4 / 6}
    nothing = {"recall": None, "false_rejections": 0.0, "label_accuracy": None}
    assert plum.verdict_quality([None, None], [True, True]) == nothing


def test_pairs_are_of_a_passing_and_a_failing_response(plum):
    generator = torch.Generator().manual_seed(0)
    verdicts = [True, None, False, True, False, False, True, None]
    seen = set()
    for _ in range(50):
        pairs = plum.pair_up(verdicts, 2, generator)
        assert len(pairs) == 2 and len({k for pair in pairs for k in pair}) == 4
        assert all(verdicts[a] is True and verdicts[b] is False for a, b in pairs)
        seen.update(pairs)
    assert len(seen) == 9  # three passing, three failing: all combinations turn up
    assert len(plum.pair_up(verdicts, 10, generator)) == 3
    assert plum.pair_up([True, True, None], 2, generator) == plum.pair_up([False], 2, generator) == []


def test_pairs_of_other_prompts_by_hand(plum):
    """KTO's point of reference: rows 0 to 7 answer one prompt, 8 to 15 the next. Of a prompt there are at most two pairs."""
    groups = torch.tensor([[0, 3], [1, 3], [9, 8], [16, 20], [17, 20]])
    others = plum.pairs_of_other_prompts(groups, 2)
    assert others.tolist() == [[16, 20], [17, 20], [0, 3], [1, 3], [9, 8]]
    assert not (others // 8 == groups // 8).any()
    assert plum.pairs_of_other_prompts(groups[:3], 2) is None  # all could be of one prompt


def test_outputs_of_programs(plum):
    """What a program does on one call does not touch the others; what it prints besides is no output."""
    problem = {"task_id": "t", "entry_point": "f"}
    codes = ["def f(x):\n    return [x, None]",
             "def f(x):\n    print('noise', end='')\n    if x == 0: 1 / 0\n    if x == 1: exit()\n    return 'a\\nb'",
             "def f(x):\n    while x == 1: pass\n    return x",
             "def f(x)\n    return x",
             "def f(x):\n    return object()",
             "print('@plum@ 0 5')\ndef f(x):\n    return {x: (1.5, True)}",
             "def f(x):\n    return [x, None]"]
    calls = ["f(0)", "f(1)", "f(2)"]
    outputs = plum.call_outputs([problem] * 7, codes, [calls] * 6 + [[]], 1, 0.3)
    assert outputs[0] == [([0, None],), ([1, None],), ([2, None],)]
    assert outputs[1] == [None, None, ("a\nb",)]
    assert outputs[2] == [(0,), None, None]  # stopped at the second call; the third never ran
    assert outputs[3] == outputs[4] == [None] * 3
    assert outputs[5] == [({0: (1.5, True)},), ({1: (1.5, True)},), ({2: (1.5, True)},)]  # the forged line came first
    assert outputs[6] == []


# --------------------------------------------------------------------------------------------------------- the lesson's data


def test_tests_of_the_lesson_have_the_outputs_of_the_solution(data, plum):
    problems = data.tiny_splits(data.Config(sft=400, rm=1, ppo=1, validation=1, test=1))["sft"]
    records = data.plum_records(problems, 0)
    assert records == data.plum_records(problems, 0) != data.plum_records(problems, 1) and len(records) > 390
    asked, wrong, true_and_false = set(), 0, set()
    for record in records:
        problem = problems[int(record["task_id"].split("/")[-1])]
        assert record["prompt"] == plum.Config().ask.replace("{prompt}", problem["prompt"])
        tests = plum.parse_tests(record["solution"], "solve")  # they parse as the stage parses what the model writes
        assert 1 <= len(tests) <= 3 and len(tests) == record["solution"].count("\n") == len({call for call, _ in tests})
        names = {}
        exec(problem["prefix"] + problem["solution"], names)
        for call, expected in tests:
            asked.add(call)
            assert eval(call, names) == ast.literal_eval(expected)
        if problem["flaw"]:  # tests of a wrong solution are wrong where the flaw shows
            steps = [next(step for step in data.STEPS if step.kind == kind) for kind in problem["steps"]]
            right = [data.compiled(step.right.split(" | ")[0], data.VARIABLE[step.takes]) for step in steps]
            for call, expected in tests:
                try:
                    values = data.trace(right, ast.literal_eval(call.removeprefix("solve(").removesuffix(")")))
                except Exception:
                    continue
                true_and_false.add(values is None or values[-1] == ast.literal_eval(expected))
                wrong += values is not None and values[-1] != ast.literal_eval(expected)
    assert len(asked) > 300 and wrong > 100 and true_and_false == {True, False}


# ----------------------------------------------------------------------------------------------------- on the small pipeline

FLAGS = dict(iterations=2, prompts_per_iteration=6, responses_per_prompt=6, test_responses=3, minibatch_size=8,
             micro_batch_size=4, eval_every=2, lr=1e-3, test_tokens=96, sft_epochs=3.0, sft_batch_size=32, sft_lr=4e-3,
             threads=1)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def finished_run(pipeline):
    """The stage as the reader types it, with the default paths: its folder, its output."""
    flags = [text for name, value in FLAGS.items() for text in (f"--{name}", value)]
    return pipeline["folder"] / "out/plum", run_script("07_plum.py", *flags, cwd=pipeline["folder"]).stdout


def config(plum, out, **flags):
    shutil.rmtree(out, ignore_errors=True)
    return plum.Config(out=str(out), **{**FLAGS, **flags})


def test_the_stage_runs_and_logs(finished_run, pipeline, plum):
    from transformers import AutoModelForCausalLM

    folder, printed = finished_run
    lesson = read(folder / "sft/metrics.jsonl")
    for task in ("solve", "tests"):
        assert math.isfinite(lesson[-1][f"validation_loss_{task}"])
    assert lesson[-1]["validation_loss_tests"] < lesson[0]["validation_loss_tests"]  # the task that is new to it
    run = folder / "dpo_offline"
    metrics = read(run / "metrics.jsonl")
    assert [m["iteration"] for m in metrics] == [0, 1, 2]
    assert "validation_pass_at_1" in metrics[0] and "validation_pass_at_1" in metrics[2]
    for m in metrics[1:]:
        assert m["seen"] == 36 and m["test_responses"] == 18 and m["prompts"] == 6
        assert 0 < m["test_responses_parsed"] <= 18 and m["tests_kept"] <= m["tests_written"] > 0
        for name in ("precision_written", "recall", "pass_rate", "sampler_pass_rate", "kl_per_token", "entropy", "length"):
            assert math.isfinite(m[name]), name
    assert metrics[1]["kl_per_response"] == 0.0 and metrics[1]["only_measured"] == 0 and metrics[2]["only_measured"] == 6
    assert sum(m["pairs"] for m in metrics[1:]) > 0
    first = next(m for m in metrics[1:] if m["pairs"])
    assert first["policy_loss"] > 0
    sys.path.insert(0, str(ROOT / "tools"))
    from tables import training_record

    cost = training_record(metrics)["cost"]  # a row of the tables of results/
    assert cost["samples"] == 2 * (36 + 18) and cost["rm_passes"] == cost["critic_rows"] == 0
    assert cost["policy_rows"] == 2 * sum(m["pairs"] for m in metrics[1:])
    start, last = (AutoModelForCausalLM.from_pretrained(path) for path in (folder / "sft", run / "last"))
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), last.parameters()))
    assert (run / "best/config.json").is_file() and (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "round   2" in printed and "best validation pass@1" in printed


def test_kept_tests_and_verdicts_are_what_they_say(finished_run, pipeline):
    """Every kept test, every verdict and every `right` of a run, computed once more from its files, in the sandbox."""
    run = finished_run[0] / "dpo_offline"
    problems = {problem["task_id"]: problem for problem in read(pipeline["folder"] / "data/tiny/ppo.jsonl")}
    counts = {True: 0, False: 0}
    for number, line in ((1, read(run / "metrics.jsonl")[1]), (2, read(run / "metrics.jsonl")[2])):
        tests, rollouts = (read(run / name / f"{number:04d}.jsonl") for name in ("tests", "rollouts"))
        kept = {}
        for record in tests:
            problem = problems[record["task_id"]]
            assert record["kept"] == (0.5 < record["agreement"] < 1)
            if record["test"] is None:
                assert record["agreement"] == 0 and not record["right"]
                continue
            codes = [sandbox.program(problem, r["response"]) for r in rollouts if r["task_id"] == record["task_id"]]
            results = sandbox.run_many([{"code": code, "tests": [record["test"]], "entry_point": "solve"} for code in
                                        codes + [problem["prefix"] + problem["solution"]]], workers=1)
            assert record["agreement"] == pytest.approx(sum(r.passed for r in results[:-1]) / 6)
            assert record["right"] == results[-1].passed
            if record["kept"]:
                kept.setdefault(record["task_id"], []).append(record["test"])
        right = [record["right"] for record in tests if record["kept"]]
        assert line["precision_kept"] == (sum(right) / len(right) if right else None)
        assert line["precision_written"] == sum(record["right"] for record in tests) / len(tests)
        assert line["prompts_with_tests"] == len(kept) and line["tests_kept"] == len(right)
        rejected = 0
        for r in rollouts:
            if r["task_id"] not in kept:
                assert r["verdict"] is None and not r["kept"]
                continue
            code = sandbox.program(problems[r["task_id"]], r["response"])
            assert r["verdict"] == sandbox.run(code, kept[r["task_id"]], entry_point="solve").passed
            counts[r["verdict"]] += 1
            rejected += not r["verdict"] and not r["actual_score"]
            if r["kept"]:  # the better one of a pair passes, the other does not
                assert r["best"] == r["verdict"]
        assert line["recall"] == rejected / sum(not r["actual_score"] for r in rollouts)
        assert sum(r["best"] for r in rollouts) == line["pairs"] == sum(r["kept"] for r in rollouts) / 2
    assert counts[True] and counts[False]


@pytest.mark.parametrize("flags", [dict(loss="kto"), dict(outputs="model", agreement=0.2),
                                   dict(outputs="reference", agreement=0.0)], ids=["kto", "model", "reference"])
def test_online_runs_sample_from_the_policy(finished_run, pipeline, plum, monkeypatch, flags):
    monkeypatch.chdir(pipeline["folder"])
    plum.main(config(plum, "out/plum/variant", online=True, **flags))
    metrics, offline = (read(pipeline["folder"] / f"out/plum/{name}/metrics.jsonl") for name in ("variant", "dpo_offline"))
    assert all(m["only_measured"] == 0 for m in metrics[1:]) and metrics[2]["kl_per_response"] != 0.0
    first, second = ([[r["response"] for r in read(pipeline["folder"] / f"out/plum/{name}/rollouts/{number:04d}.jsonl")]
                      for name in ("variant", "dpo_offline")] for number in (1, 2))
    assert first[0] == first[1] and second[0] != second[1]  # the same until the policy has moved
    trained = next((m for m in metrics[1:] if m["pairs"]), None)
    if flags.get("loss") == "kto":
        assert trained["policy_kl"] >= 0 and 0 < trained["policy_loss"] < 1
    elif flags["outputs"] == "reference":  # a test is right wherever the solution has an output, and else not kept
        assert all(m["precision_kept"] in (1.0, None) for m in metrics[1:]) and any(m["tests_kept"] for m in metrics[1:])
    else:  # expectations are the model's: a call may have several
        tests = read(pipeline["folder"] / "out/plum/variant/tests/0001.jsonl")
        assert all(record["test"].startswith("assert " + record["call"]) for record in tests)
        assert len({record["test"] for record in tests}) > len({record["call"] for record in tests}) or len(tests) > 6
    assert metrics[0]["validation_pass_at_1"] == offline[0]["validation_pass_at_1"]


def test_an_interrupted_run_resumes_to_the_same_metrics(finished_run, pipeline, plum, monkeypatch, capsys):
    monkeypatch.chdir(pipeline["folder"])
    flags = dict(online=True, iterations=3)
    plum.main(config(plum, "out/plum/unbroken", **flags))
    cfg = config(plum, "out/plum/broken", **flags)
    write = plum.write_jsonl

    def interrupted(path, records):
        if path.name == "0003.jsonl":
            raise KeyboardInterrupt
        write(path, records)

    with monkeypatch.context() as patch:
        patch.setattr(plum, "write_jsonl", interrupted)
        with pytest.raises(KeyboardInterrupt):
            plum.main(cfg)
    with pytest.raises(SystemExit) as stop:  # neither overwritten nor taken for finished
        plum.main(cfg)
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        plum.main(plum.dataclasses.replace(cfg, resume=True, beta=0.3))
    assert stop.value.code == 2 and "beta" in capsys.readouterr().err
    plum.main(plum.dataclasses.replace(cfg, resume=True))
    assert "resuming out/plum/broken after round 2" in capsys.readouterr().out
    results = []
    for name in ("unbroken", "broken"):
        folder = pipeline["folder"] / "out/plum" / name
        metrics = [{k: v for k, v in m.items() if not k.startswith("seconds")} for m in read(folder / "metrics.jsonl")]
        results.append((metrics, (folder / "last/model.safetensors").read_bytes()))
    assert results[0] == results[1] and len(results[0][0]) == 4
    plum.main(plum.Config(**json.loads((pipeline["folder"] / "out/plum/broken/stage_config.json").read_text())))
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    (dict(responses_per_prompt=1), "--responses_per_prompt is 1"), (dict(agreement=1.0), "--agreement is 1.0"),
    (dict(ask="tests, please"), "does not hold {prompt}"), (dict(beta=0.0), "--beta is 0.0"),
    (dict(data="data/nothing.jsonl"), "data/nothing.jsonl does not exist"),
    (dict(data="data/nameless.jsonl"), "no problem names its entry_point"),
    (dict(both_tasks="out/plum/other", tests_data="data/nothing.jsonl"), "data/nothing.jsonl does not exist"),
    (dict(both_tasks="out/plum/other", ask="{prompt}# checks\n"), "line 1: the prompt is not of the form of --ask"),
    (dict(sft_epochs=1.0), "out/plum/sft holds a run with other settings"),
    (dict(max_grad_norm=0.5), "max_grad_norm was 1.0, now 0.5"), (dict(ask="Tests of\n{prompt}"), "ask was"),
    (dict(both_tasks="out/plum/other", max_length=4), "leaves 0 examples, of which one is held out"),
    (dict(data="data/unsolved.jsonl", outputs="reference"), "no problem has a solution"),
    (dict(policy="out/nothing", sft_epochs=0.0), "no model at out/nothing")], ids=lambda value: str(value)[:24])
def test_bad_input_is_one_line_and_exit_code_2(finished_run, pipeline, plum, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(pipeline["folder"])
    problem = read(pipeline["folder"] / "data/tiny/ppo.jsonl")[0]
    (pipeline["folder"] / "data/nameless.jsonl").write_text(json.dumps({**problem, "entry_point": None}) + "\n")
    (pipeline["folder"] / "data/unsolved.jsonl").write_text(json.dumps({**problem, "solution": None}) + "\n")
    with pytest.raises(SystemExit) as stop:
        plum.main(config(plum, "out/plum/bad", **flags))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert not (pipeline["folder"] / "out/plum/bad").exists() and not (pipeline["folder"] / "out/plum/other").exists()
