"""Tests of 00_data.py: the tiny set, bad input, and the conversion of public sets."""

import ast
import base64
import collections
import functools
import gzip
import json
import math
import os
import pickle
import random
import sys
import zlib
from pathlib import Path

import pyarrow.parquet
import pytest
from conftest import load_script, run_script

import sandbox

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"  # copies of the public sets, where there are any
stage = load_script("00_data.py")
FIELDS = ["task_id", "prompt", "prefix", "setup", "entry_point", "tests", "solution", "source"]
SMALL = {"sft": 5, "rm": 2, "ppo": 2, "validation": 2, "test": 2}


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def solved(problems):
    """The sandbox's results for the solutions of problems."""
    return sandbox.run_tests(problems, [p["solution"] for p in problems], timeout=10.0, workers=1)


def passes(problem, solution):
    """Run the tests of a tiny problem here: our own templates need no sandbox."""
    names = {}
    exec(problem["prefix"] + solution, names)
    try:
        for test in problem["tests"]:
            exec(test, names)
    except Exception:
        return False
    return True


@pytest.fixture(scope="module")
def tiny():
    """{split: problems}, smaller than the default set."""
    sizes = {"sft": 1000, "rm": 100, "ppo": 100, "validation": 100, "test": 150}
    return stage.tiny_splits(stage.Config(**sizes))


# ---- the tiny set ----


def test_splits_have_their_sizes_and_fields(tiny):
    assert [len(tiny[split]) for split in stage.SPLITS] == [1000, 100, 100, 100, 150]
    for split in stage.SPLITS:
        for number, problem in enumerate(tiny[split]):
            extra = ["steps", "flaw"] if split == "sft" else ["steps"]
            assert list(problem) == FIELDS + extra
            assert problem["task_id"] == f"tiny/{split}/{number}"
            assert problem["prompt"].endswith('."""\n' + problem["prefix"])
            assert len(problem["tests"]) >= 6
            assert len(set(problem["tests"])) == len(problem["tests"])
            assert len(problem["solution"]) <= stage.MAX_PROGRAM


def test_no_prompt_twice_and_no_chain_in_two_of_training_validation_and_test(tiny):
    prompts = [problem["prompt"] for split in stage.SPLITS for problem in tiny[split]]
    assert len(set(prompts)) == len(prompts)
    parts = (["sft", "rm", "ppo"], ["validation"], ["test"])
    trained, validation, test = (
        {tuple(problem["steps"]) for split in part for problem in tiny[split]} for part in parts
    )
    assert not trained & validation and not trained & test and not validation & test
    # Every single step is in training; each part has chains of all other lengths.
    assert set(map(len, trained)) == {1, 2, 3, 4, 5}
    assert set(map(len, validation)) == set(map(len, test)) == {2, 3, 4, 5}


def test_solutions_pass_unless_flawed(tiny):
    """The right answer to every problem is known: by our own run, and by the sandbox."""
    for split in stage.SPLITS:
        for problem in tiny[split]:
            right = passes(problem, problem["solution"])
            assert right == (not problem.get("flaw")), problem["task_id"]
    problems = tiny["sft"][:40] + tiny["test"][:20]
    assert [r.passed for r in solved(problems)] == [not p.get("flaw") for p in problems]


def test_one_line_per_step_and_flaws_that_name_their_steps(tiny):
    steps = {step.kind: step for step in stage.STEPS}
    for problem in tiny["sft"]:
        lines = problem["solution"].splitlines()
        assert lines[-1].startswith("    return ") and problem["solution"].endswith("\n")
        wrong = set(problem["flaw"] or [])
        missing = len(problem["steps"]) - len(lines)
        if missing or lines == [f"    return {problem['prefix'][10:-3]}"]:
            assert missing <= len(wrong) and wrong
            continue
        for number, (line, kind) in enumerate(zip(lines, problem["steps"]), 1):
            expression = line.strip().removeprefix("return ").split(" = ")[-1]
            options = steps[kind].wrong if number in wrong else steps[kind].right
            assert expression in options


def test_every_mutation_and_every_missing_step_fails():
    """Every wrong line that was kept, and every step that can be left out, for 150 problems."""
    pool, rng, counts = stage.input_pool(0), random.Random(1), collections.Counter()
    while counts["chains"] < 150:
        chain = stage.draw_chain(rng.randint(1, 5), rng)
        found = stage.choose_tests(chain, pool, rng)
        if found is None:
            continue
        chosen, _, mutations = found
        counts["chains"] += 1
        problem = {
            "prefix": f"def solve({chain[0].takes}):\n",
            "tests": [f"assert solve({values[0]!r}) == {values[-1]!r}" for values in chosen],
        }
        right = [step.right[0] for step in chain]
        assert passes(problem, stage.body(chain, right))
        for place, step in enumerate(chain):
            assert mutations[place]
            for line in mutations[place] + [""] * (step.takes == step.gives):
                lines = [*right[:place], line, *right[place + 1 :]]
                assert not passes(problem, stage.body(chain, lines))
                counts["mutants"] += 1
    assert counts["mutants"] > 500


def test_a_step_that_changes_nothing_is_rejected():
    """Swapping case twice, or turning around what a sort follows, teaches nothing."""
    steps = {step.kind: step for step in stage.STEPS}
    pool = stage.input_pool(0)
    for kinds in (["swap_case", "swap_case"], ["reverse", "sort_down"], ["square", "absolute"]):
        chain = [steps[kind] for kind in kinds]
        assert stage.choose_tests(chain, pool, random.Random(0)) is None, kinds
    chain = [steps["reverse"], steps["drop_tail"]]
    assert stage.choose_tests(chain, pool, random.Random(0)) is not None


def test_the_table_of_steps():
    assert len(stage.STEPS) == len({step.kind for step in stage.STEPS}) == 40
    wordings = [(step.takes, words) for step in stage.STEPS for words in step.say]
    assert len(set(wordings)) == len(wordings), "a wording that means two kinds of step"
    assert {letter for _, words in wordings for letter in words if letter.isdigit()} <= set("12345")
    for step in stage.STEPS:
        assert len(step.say) == 3 and len(step.wrong) == 2 and len(step.right) in (1, 2)
        assert not set(step.right) & set(step.wrong)
        first, *others = [stage.compiled(line, step.takes) for line in step.right]
        for value in stage.input_pool(0)[step.takes]:  # two right lines agree
            try:
                expected = first(value)
            except Exception:
                continue
            assert all(other(value) == expected for other in others), (step.kind, value)


def test_all_kinds_are_used(tiny):
    used = {kind for problem in tiny["sft"] for kind in problem["steps"]}
    assert used == {step.kind for step in stage.STEPS}
    for split in ("rm", "validation", "test"):
        assert len({kind for problem in tiny[split] for kind in problem["steps"]}) >= 35


def test_flaws_come_at_their_rates(tiny):
    rates = stage.flaw_rates(stage.Config().hard_share)
    assert min(rates.values()) >= 0.05 and max(rates.values()) <= 0.7
    assert sum(rate > 0.5 for rate in rates.values()) == 8  # 0.21 of 40 kinds
    seen, wrong = collections.Counter(), collections.Counter()
    for problem in tiny["sft"]:
        seen.update(problem["steps"])
        wrong.update(problem["steps"][number - 1] for number in problem["flaw"] or [])
    for kind, count in seen.items():
        # Four standard deviations of a binomial: 40 kinds, one false alarm in 400 seeds.
        spread = math.sqrt(rates[kind] * (1 - rates[kind]) * count)
        assert abs(wrong[kind] - rates[kind] * count) < 4 * spread + 1, kind


def test_how_a_flaw_is_drawn():
    """Shares of flaws, missing steps and usual wrong lines among 20,000 one-step solutions."""
    step = next(step for step in stage.STEPS if step.kind == "keep_odd")
    rng, counts = random.Random(0), collections.Counter()
    for _ in range(20_000):
        counts[stage.draw_solution([step], [step.wrong], {"keep_odd": 0.5}, rng)[0]] += 1
    share = {line: count / 20_000 for line, count in counts.items()}
    # 0.5 right, one in four of these the rarer way; 0.5 wrong, of which 0.025 without the step, and
    # of the others 0.85 the usual line. The standard deviation of a share is at most 0.0035.
    expected = dict(zip(step.right, (0.375, 0.125))) | {"": 0.0125}
    expected |= dict(zip(step.wrong, (0.5 * 0.975 * 0.85, 0.5 * 0.975 * 0.15)))
    assert share.keys() == expected.keys()
    assert all(abs(share[line] - expected[line]) < 0.015 for line in expected)


def test_values_stay_small(tiny):
    for problem in tiny["sft"]:
        for test in problem["tests"]:
            assert stage.small(ast.literal_eval(test.split(" == ", 1)[1])) and len(test) < 400


def test_plum_records_have_the_outputs_of_their_solutions(tiny):
    records = stage.plum_records(tiny["sft"][:300], 0)
    assert records == stage.plum_records(tiny["sft"][:300], 0) != stage.plum_records(tiny["sft"], 1)
    assert len(records) > 290
    for record in records:
        assert list(record) == ["task_id", "prompt", "solution"]
        problem = tiny["sft"][int(record["task_id"].removeprefix("tiny/plum/"))]
        assert record["prompt"] == problem["prompt"] + "# tests\n"
        tests = record["solution"].splitlines()
        assert 1 <= len(tests) <= 3
        assert passes({"prefix": problem["prefix"], "tests": tests}, problem["solution"])


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    """As the reader types it; another hash seed would show in the order of sets and strings."""
    flags = [f for name, size in SMALL.items() for f in (f"--{name}", 10 * size)]
    for name, seed, hash_seed in (("a", 3, "1"), ("b", 3, "2"), ("c", 4, "1")):
        os.environ["PYTHONHASHSEED"] = hash_seed
        try:
            run_script("00_data.py", "--out", name, "--seed", seed, *flags, cwd=tmp_path)
        finally:
            del os.environ["PYTHONHASHSEED"]
    for split in (*stage.SPLITS, "plum"):
        a, b, c = ((tmp_path / name / f"{split}.jsonl").read_bytes() for name in "abc")
        assert a == b != c
    sft, plum = ((tmp_path / f"a/{name}.jsonl").read_bytes() for name in ("sft", "plum"))
    assert plum.startswith(sft) and b"# tests" in plum[len(sft) :]  # solutions, then requests


def test_the_example_in_the_docstring():
    """The record that opens the file is one that the defaults write."""
    text = stage.__doc__.split("spread out:")[1].split("\n\n")[1]
    example = json.loads(" ".join(line.strip() for line in text.splitlines()))
    number = int(example["task_id"].split("/")[-1])
    cfg = stage.Config(sft=number + 1, rm=1, ppo=1, validation=1, test=1)
    assert stage.tiny_splits(cfg)["sft"][number] == example


# ---- bad input ----

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": "def f():\n",
    "entry_point": "f",
    "canonical_solution": "    return 1\n",
    "test": "def check(f):\n    assert f()\n",
}
EVOL = {"instruction": "a", "output": "b"}
BAD_MBPP = {"task_id": 11, "text": "a", "code": "def f(:", "test_list": [], "test_setup_code": ""}
BAD_FILES = {
    "broken.jsonl": json.dumps(HUMANEVAL) + "\n{\n",
    "fields.jsonl": json.dumps(EVOL) + "\n",
    "code.jsonl": json.dumps(BAD_MBPP) + "\n",
    "untested.jsonl": json.dumps(BAD_MBPP | {"code": "def f(): pass"}) + "\n",
    "twice.jsonl": (json.dumps(HUMANEVAL) + "\n") * 2,
    "surrogate.json": json.dumps([{**EVOL, "output": "\ud800"}]),
    "list.json": '[{"task_id": 1}]',
    "empty.jsonl": "\n",
    "cut.jsonl.gz": gzip.compress(json.dumps(EVOL).encode() * 50)[:30],
    "broken.json": "[",
    "number.json": "5",
    "deep.json": "[" * 100_000,
    "broken.parquet": "PAR1",
    "table.csv": "a,b\n",
    "records.jsonl": json.dumps({"question": "", "input_output": "{}"}) + "\n",
    "train.jsonl": json.dumps({"question": "", "input_output": "{}"}) + "\n",
}


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"dataset": "nothing"}, "--dataset nothing"),
        ({"sft": 0}, "--sft 0"),
        ({"hard_share": 1.5}, "--hard_share"),
        ({"lengths": [0.0, 0.0]}, "--lengths"),
        ({"lengths": [1.0, float("nan")]}, "--lengths"),
        ({"file": ["empty.jsonl"]}, "--dataset"),
        ({"sft": 3000, "lengths": [1.0]}, "--lengths"),  # there are fewer problems of one step
        ({"dataset": "humaneval", "file": ["absent.jsonl"]}, "absent.jsonl does not exist"),
        ({"dataset": "humaneval", "file": ["broken.jsonl"]}, "broken.jsonl, line 2: not JSON"),
        ({"dataset": "humaneval", "file": ["fields.jsonl"]}, "fields.jsonl, record 1"),
        ({"dataset": "humaneval", "file": ["twice.jsonl"]}, "record 2: task_id 'HumanEval/0'"),
        ({"dataset": "mbpp", "file": ["code.jsonl"]}, "code.jsonl, record 1"),
        ({"dataset": "mbpp", "file": ["untested.jsonl"]}, "untested.jsonl, record 1"),
        ({"dataset": "mbpp_sanitized", "file": ["list.json"]}, "list.json, record 1"),
        ({"dataset": "evol", "file": ["surrogate.json"]}, "surrogate.json, record 1"),
        ({"dataset": "evol", "file": ["empty.jsonl"]}, "empty.jsonl is empty"),
        ({"dataset": "evol", "file": ["cut.jsonl.gz"]}, "cut.jsonl.gz"),
        ({"dataset": "evol", "file": ["broken.json"]}, "broken.json cannot be read"),
        ({"dataset": "evol", "file": ["number.json"]}, "number.json cannot be read"),
        ({"dataset": "evol", "file": ["deep.json"]}, "deep.json cannot be read"),
        ({"dataset": "evol", "file": ["broken.parquet"]}, "broken.parquet cannot be read"),
        ({"dataset": "evol", "file": ["table.csv"]}, ".parquet is needed"),
        ({"dataset": "taco", "file": ["records.jsonl"]}, "must tell the split"),
        ({"dataset": "taco", "file": ["train.jsonl"]}, "no record can be used"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in BAD_FILES.items():
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        stage.main(stage.Config(**flags))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and words in message
    assert len(message.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_without_a_network_the_message_says_what_to_do(tmp_path):
    done = run_script("00_data.py", "--dataset", "magicoder", cwd=tmp_path, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "pass a local copy with --file" in last
    assert not list(tmp_path.iterdir())
    assert run_script("00_data.py", "--size", 3, cwd=tmp_path, check=False).returncode == 2


def test_output_that_is_there_is_kept(tmp_path, capsys):
    out = tmp_path / "out"
    cfg = functools.partial(stage.Config, out=str(out), **SMALL)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        stage.main(cfg())
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes.txt"]
    (out / "notes.txt").unlink()
    out.rmdir()
    stage.main(cfg())
    before = (out / "sft.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        stage.main(cfg(seed=1))
    assert "seed was 0, now 1" in capsys.readouterr().err
    stage.main(cfg())
    assert "is finished" in capsys.readouterr().out
    assert (out / "sft.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


# ---- public sets: records of our own ----


def convert(tmp_path, dataset, files, **flags):
    """{split: problems} that the stage writes for {file name: records}."""
    paths = []
    for name, records in files.items():
        paths.append(str(tmp_path / name))
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), paths[-1])
        elif name.endswith(".json"):
            Path(paths[-1]).write_text(json.dumps(records, indent=1))
        else:
            text = "".join(json.dumps(record, ensure_ascii=False) + "\r\n\n" for record in records)
            data = b"\xef\xbb\xbf" + text.encode()
            Path(paths[-1]).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    out = tmp_path / "out"
    stage.main(stage.Config(dataset=dataset, file=paths, out=str(out), **flags))
    splits = {path.stem: read(path) for path in out.glob("*.jsonl")}
    for split, problems in splits.items():
        if split != "left_out":
            assert all(list(p) == FIELDS and p["source"] == dataset for p in problems)
            if stage.SETS[dataset].splits != "sft":  # the later stages accept every problem
                assert sandbox.read_problems(out / f"{split}.jsonl") == problems
    return splits


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "data.json", "data.parquet"])
@pytest.mark.parametrize(
    "dataset, fields", [("magicoder", "problem solution"), ("evol", "instruction output")]
)
def test_instructions_in_every_kind_of_file(dataset, fields, name, tmp_path):
    texts = ("Write f.\n", "```python\ndef f(): pass  # \u2028\n```")
    splits = convert(tmp_path, dataset, {name: [dict(zip(fields.split(), texts))] * 3})
    assert list(splits) == ["sft"] and len(splits["sft"]) == 3
    expected = {"task_id": f"{dataset}/2", "prompt": "Write f.\n", "prefix": "", "setup": ""}
    expected |= {"entry_point": None, "tests": [], "source": dataset}
    assert splits["sft"][2] == expected | {"solution": texts[1] + "\n"}


def mbpp_record(number, **fields):
    return {
        "task_id": number,
        "prompt": "Write a function to double a number.",
        "test_imports": ["import math"],
        "code": "def twice(n):\r\n  return 2 * n",
        "test_list": ["assert twice(2) == math.floor(4.5)", "assert twice(3) == 6"],
        **fields,
    }


def test_mbpp_sanitized_and_one_test_shown(tmp_path):
    records = [mbpp_record(number) for number in (3, 11, 511, 601, 602)]
    splits = convert(tmp_path, "mbpp_sanitized", {"m.json": records}, show_one_test=True)
    assert {s: len(p) for s, p in splits.items()} == dict.fromkeys(
        ("rm", "ppo", "validation", "test"), 1
    )
    assert splits["test"][0]["prompt"] == (
        "Write a function to double a number. Your code should pass these tests:\n\n"
        "assert twice(2) == math.floor(4.5)\n"
    )
    assert len(splits["test"][0]["tests"]) == 2 and splits["test"][0]["entry_point"] == "twice"
    assert all(result.passed for problems in splits.values() for result in solved(problems))


def test_mbpp_plus(tmp_path):
    """EvalPlus's `test`: helpers, inputs, results and a loop. All problems are test problems."""
    test = """import math
def assertion(out, exp, atol):
    assert out == exp or math.isclose(out, exp, abs_tol=atol)

inputs = [[1], [2], [0.5]]
results = [2, 4, 1.0]
for i, (inp, exp) in enumerate(zip(inputs, results)):
    assertion(twice(*inp), exp, 0)
"""
    records = [mbpp_record(number, test=test) for number in (2, 809)]
    problems = convert(tmp_path, "mbpp_plus", {"m.parquet": records})["test"]
    assert all(result.passed for result in solved(problems))
    wrong = solved(
        [{**problems[0], "solution": "def twice(n):\n    return int(2 * n) if n else 1"}]
    )
    assert wrong[0].passed  # our wrong answer is right on these inputs,
    wrong = solved([{**problems[0], "solution": "def twice(n):\n    return n + 1"}])
    assert not wrong[0].passed  # and this one is wrong on two of them


def pickled(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def live_record(public, private, starter="", name=None):
    return {
        "question_content": "Add numbers.",
        "question_id": "q1",
        "starter_code": starter,
        "metadata": json.dumps({"func_name": name} if name else {}),
        "public_test_cases": json.dumps(public),
        "private_test_cases": private,
    }


def test_livecodebench(tmp_path):
    stdin = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
    more = [{"input": "4 5\n", "output": "9\n", "testtype": "stdin"}]
    call = [{"input": '[1, 2]\n"a"', "output": "null", "testtype": "functional"}]
    starter = "class Solution:\n    def add(self, a: List[int], b: str) -> None:\n        "
    records = [
        live_record(stdin, pickled(json.dumps(more))),
        live_record(call, json.dumps(call), starter, "add") | {"question_id": "q2"},
    ]
    program, method = convert(tmp_path, "livecodebench", {"live.jsonl": records})["test"]
    assert program["tests"] == [
        {"input": "1 2\n", "output": "3\n"},
        {"input": "4 5\n", "output": "9\n"},
    ]
    assert program["entry_point"] is None and "standard input" in program["prompt"]
    assert method["tests"] == ["assert Solution().add([1, 2], 'a') == None"] * 2
    assert method["entry_point"] == "Solution" and starter.rstrip() in method["prompt"]
    answer = "```python\nclass Solution:\n    def add(self, a: List[int], b: str): pass\n```"
    assert solved([{**method, "solution": answer}])[0].passed
    assert not solved([{**method, "solution": answer.replace("pass", "return 1")}])[0].passed


@pytest.mark.parametrize("value", [Evil(), ["[]"], os.getcwd, b"[]"])
def test_a_pickle_may_hold_one_string_and_nothing_else(value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {"live.jsonl": [live_record([], pickled(value))]}
    with pytest.raises(SystemExit):
        convert(tmp_path, "livecodebench", files)
    assert "live.jsonl, record 1" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["live.jsonl"]


def in_out(inputs, outputs, solutions=("pass",), starter="", **more):
    return {
        "question": "Do it.",
        "solutions": json.dumps(list(solutions)),
        "starter_code": starter,
        "input_output": json.dumps({"inputs": inputs, "outputs": outputs, **more}),
    }


def test_input_output_sets(tmp_path):
    """APPS and TACO: programs, functions, methods; untested records are left out by name."""
    program = in_out(
        ["1 2\n", ["3", "4"]], ["3\n", ["7"]], ["print(sum(map(int, input().split())))"]
    )
    method = in_out(
        [[[1, 2]], [[]]],
        [[2, 1], [[]]],
        ["class Solution:\n    def turn(self, xs: List[int]):\n        return xs[::-1]\n"],
        "class Solution:\n    def turn(self, xs: List[int]) -> List[int]:\n",
        fn_name="turn",
    )
    function = in_out([["a"]], [["b"]], ["def f(x):\n    return 'b'"], fn_name="f")
    untested = [
        in_out([], []),
        program | {"input_output": ""},
        in_out(["1"], []),
        in_out(["1"], ["1"], fn_name="f"),
    ]
    train = [in_out([str(n)], [str(n)], [] if n < 20 else ["print(input())"]) for n in range(100)]
    files = {"test.jsonl": [program, method, function, *untested], "my-train.parquet": train}
    splits = convert(tmp_path, "taco", files)
    program, method, function = splits["test"]
    assert program["tests"] == [
        {"input": "1 2\n", "output": "3\n"},
        {"input": "3\n4", "output": "7"},
    ]
    assert program["entry_point"] is None and program["solution"].startswith("print")
    assert method["tests"] == [
        "assert Solution().turn([1, 2]) == [2, 1]",
        "assert Solution().turn([]) in [[[]], []]",  # their judge takes [] for [[]]
    ]
    assert function["tests"] == ["assert f('a') in [['b'], 'b']"] and "`f`" in function["prompt"]
    assert all(result.passed for result in solved([method, function]))
    places = [record["place"].split(", ")[1] for record in splits["left_out"]]
    assert places == ["record 4", "record 5", "record 6", "record 7"]
    sizes = {split: len(splits[split]) for split in stage.SPLITS[:4]}
    assert sum(sizes.values()) == 100 and sizes["ppo"] == 20 and sizes["validation"] == 10
    assert sizes["sft"] < 40 < 30 + sizes["rm"] and all(p["solution"] for p in splits["sft"])
    ids = [problem["task_id"] for split in stage.SPLITS for problem in splits[split]]
    assert len(set(ids)) == len(ids) == 103


def test_code_contests(tmp_path):
    def record(tests):
        return {
            "description": "Echo.",
            "public_tests": {"input": ["1\n"][:tests], "output": ["1\n"][:tests]},
            "private_tests": {"input": [], "output": []},
            "generated_tests": {"input": ["2\n"][:tests], "output": ["2\n"][:tests]},
            "solutions": {"language": [2, 3], "solution": ["cin >> n;", "print(input())"]},
        }

    files = {"valid.jsonl": [record(1)], "test.jsonl": [record(1), record(0)]}
    splits = convert(tmp_path, "code_contests", files)
    assert {split: len(problems) for split, problems in splits.items()} == {
        "validation": 1,
        "test": 1,
        "left_out": 1,
    }
    assert splits["test"][0]["tests"] == [{"input": n, "output": n} for n in ("1\n", "2\n")]
    assert splits["test"][0]["solution"] == "print(input())"


def test_what_is_asked_of_the_hub(monkeypatch):
    """Names, configurations and, for repositories with a loading script, files."""
    asked = {}
    hub = type(sys)("datasets")

    def load_dataset(*names, **options):
        asked[dataset] = (*names, *options.values())
        return {"train": [{"a": 1}], "test": []}

    hub.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", hub)
    for dataset in stage.SETS:
        ((split, place, record),) = stage.hub_records(dataset)
        assert split == "train" and place.endswith("split train, record 1") and record == {"a": 1}
    assert asked["mbpp"] == ("google-research-datasets/mbpp", "full")
    assert asked["evol"] == ("theblackcat102/evol-codealpaca-v1", None)
    assert asked["taco"][0] == "arrow"
    assert asked["taco"][1]["test"] == "hf://datasets/BAAI/TACO/test/*.arrow"
    assert asked["livecodebench"][0] == "json"
    listed = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    for dataset, row in stage.SETS.items():
        assert f"| `{dataset}` | `{row.hub}`" in listed


# ---- public sets: the real files, where there are copies ----


def sample(name, step=1):
    """Every `step`-th record of a real file."""
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for number, line in enumerate(file) if number % step == 0]


TRAIN, TEST = "LeetCodeDataset-v0.2.0-train.jsonl.gz", "LeetCodeDataset-v0.3.1-test.jsonl.gz"
CONTEST = "leetcode_contest_20240121-Jul.jsonl.gz"


def test_humaneval(tmp_path):
    """Reference solutions pass, also as whole functions in a fence; helpers are the tests' own."""
    splits = convert(tmp_path, "humaneval", {"h.jsonl.gz": sample("HumanEval.jsonl.gz", 4)})
    problems = splits["test"]
    assert list(splits) == ["test"] and len(problems) == 41
    assert all(result.passed for result in solved(problems))
    fenced = "Here it is:\n```python\n{prompt}{solution}```\n"
    whole = [{**problem, "solution": fenced.format(**problem)} for problem in problems]
    assert all(result.passed for result in solved(whole))
    nothing = [{**problem, "solution": "    return None\n"} for problem in problems]
    assert not any(result.passed for result in solved(nothing))
    roots = next(problem for problem in problems if problem["task_id"] == "HumanEval/32")
    cheat = "    return 0.0\n\ndef poly(xs, x):\n    return 0.0\n"
    assert not solved([{**roots, "solution": cheat}])[0].passed


def test_humaneval_plus(tmp_path):
    records = sample("HumanEvalPlus-OriginFmt.jsonl.gz", 20)
    problems = convert(tmp_path, "humaneval_plus", {"h.jsonl": records})["test"]
    assert all(result.passed for result in solved(problems[:4]))


def test_mbpp(tmp_path):
    splits = convert(tmp_path, "mbpp", {"m.jsonl": sample("mbpp.jsonl.gz")})
    numbers = {
        split: {int(problem["task_id"].split("/")[1]) for problem in problems}
        for split, problems in splits.items()
    }
    assert numbers["test"] == set(range(11, 511))
    assert numbers["validation"] == set(range(511, 601))
    assert numbers["rm"] | numbers["ppo"] == set(range(601, 975))
    assert len(numbers["rm"]) == len(numbers["ppo"]) == 187
    problems = [problem for split in splits.values() for problem in split]
    for problem in problems:
        assert f"{problem['entry_point']}(" in problem["prompt"] and len(problem["tests"]) == 3
        assert "\r" not in problem["solution"] + problem["setup"]
        assert all(test in problem["prompt"] for test in problem["tests"])
    assert all(result.passed for result in solved(problems[::30]))


def test_leetcodedataset(tmp_path):
    """One test per assert, answers pass, and lists of the response's own making do not."""
    files = {"train.jsonl": sample(TRAIN, 12), "test.jsonl": sample(TEST, 19)}
    splits = convert(tmp_path, "leetcodedataset", files)
    assert set(splits) == set(stage.SPLITS) and len(splits["test"]) == 12
    for problem in (problem for problems in splits.values() for problem in problems):
        assert problem["entry_point"] == "Solution"
        for test in problem["tests"]:
            assert (
                isinstance(ast.parse(test).body[0], ast.Assert) and test.count("Solution().") == 1
            )
    problems = splits["rm"] + splits["validation"]
    results = solved(problems)
    assert sum(not result.passed for result in results) <= 1  # docs/datasets.md has the exceptions
    assert all("```" in problem["solution"] for problem in splits["sft"])


def test_lists_of_leetcodedataset_are_compared_by_the_tests(tmp_path):
    records = [
        r for r in sample(TRAIN) if r["task_id"] in ("reverse-linked-list", "invert-binary-tree")
    ]
    problems = convert(tmp_path, "leetcodedataset", {"test.jsonl": records})["test"]
    assert len(problems) == 2 and all(result.passed for result in solved(problems))
    cheat = """
class ListNode:
    def __init__(self, val=0, next=None):
        self.val, self.next = 0, None
    __eq__ = lambda self, other: True
TreeNode = ListNode
def is_same_list(*nodes): return True
def list_node(values): return None
is_same_tree, tree_node = is_same_list, list_node
class Solution:
    def __getattr__(self, name): return lambda *args, **more: None
"""
    assert not any(result.passed for result in solved([{**p, "solution": cheat} for p in problems]))


def test_no_contest_problem_is_trained_on():
    """54 problems of the contest set are in LeetCodeDataset's training file, by slug."""
    contest = {record["meta"]["titleSlug"] for record in sample(CONTEST)}
    records = sample(TRAIN)
    shared = [record for record in records if record["task_id"] in contest]
    assert len(shared) == 54
    places = [stage.split_of("leetcodedataset", "train", record) for record in records]
    assert all(stage.split_of("leetcodedataset", "train", record) is None for record in shared)
    assert places.count(None) == 80 and set(places) == {None, "training"}


def test_leetcode_contest(tmp_path):
    """No reference solutions here: three of our own pass, one of them on linked lists."""
    records = [
        r for r in sample(CONTEST) if "type-word-i" in r["task_id"] or "double-a-n" in r["task_id"]
    ]
    problems = convert(tmp_path, "leetcode", {"l.jsonl": records})["test"]
    for problem in problems:
        assert len(problem["tests"]) == 100 and problem["prompt"].endswith(":\n")
        assert not any("test_input" in test for test in problem["tests"])
    pushes = next(problem for problem in problems if problem["task_id"].endswith("type-word-i"))
    double = next(problem for problem in problems if "double-a-n" in problem["task_id"])
    formula = "sum(place // 8 + 1 for place in range(len(word)))"
    method = "class Solution:\n    def minimumPushes(self, word):\n        return"
    linked = """```python
class Solution:
    def doubleIt(self, head):
        number = 0
        while head:
            number, head = number * 10 + head.val, head.next
        node = None
        for digit in reversed(str(2 * number)):
            node = ListNode(int(digit), node)
        return node
```"""
    answers = [
        (pushes, f"return {formula}\n", True),  # goes on in the open body
        (pushes, f"        answer = {formula}\n        return answer\n", True),
        (pushes, f"```python\n{method} {formula}\n```", True),
        (pushes, "return len(word)\n", False),
        (double, linked, True),
    ]
    results = solved([{**problem, "solution": answer} for problem, answer, _ in answers])
    assert [result.passed for result in results] == [right for _, _, right in answers]
