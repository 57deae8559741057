"""Tests of 00_data.py: the tiny set keeps its promises, public data sets parse, bad input leaves nothing behind."""

import ast
import collections
import dataclasses
import gzip
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"  # copies of the benchmarks, where there are any
sys.path.insert(0, str(ROOT))

import sandbox  # noqa: E402


def load_stage(name):
    """A numbered script as a module; dataclasses look their module up in sys.modules."""
    spec = importlib.util.spec_from_file_location(name.replace(".py", "").lstrip("0123456789_"), ROOT / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


stage = load_stage("00_data.py")
FIELDS = {"task_id": str, "prompt": str, "prefix": str, "setup": str, "entry_point": str, "tests": list,
          "solution": str, "source": str}


def run_stage(*flags, **options):
    """00_data.py as the reader types it."""
    command = [sys.executable, ROOT / "00_data.py", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def passes(problem, solution):
    """Run the tests of a tiny problem here: our own templates need no sandbox."""
    namespace = {}
    exec(problem["prefix"] + solution, namespace)
    try:
        for test in problem["tests"]:
            exec(test, namespace)
    except Exception:
        return False
    return True


def run_solutions(problems):
    """The sandbox's result for the solution of each problem."""
    return sandbox.run_many([
        {"code": sandbox.program(problem, problem["solution"]), "tests": problem["tests"], "setup": problem["setup"],
         "entry_point": problem["entry_point"], "timeout": 10.0} for problem in problems])


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tiny():
    """{split: problems}, smaller than the default set except for the SFT split, which the flaw rates are read from."""
    return stage.tiny_splits(stage.Config(sft=3000, rm=150, ppo=150, validation=100, test=200))


# ---- the tiny set ----


def test_splits_have_their_sizes_and_fields(tiny):
    assert {split: len(problems) for split, problems in tiny.items()} == {
        "sft": 3000, "rm": 150, "ppo": 150, "validation": 100, "test": 200}
    for split in stage.SPLITS:
        for number, problem in enumerate(tiny[split]):
            assert all(isinstance(problem[name], kind) for name, kind in FIELDS.items())
            assert problem["task_id"] == f"tiny/{split}/{number}"
            assert problem["prompt"].endswith('."""\n' + problem["prefix"])
            assert len(problem["tests"]) >= 6 and len(set(problem["tests"])) == len(problem["tests"])
            assert 1 <= len(problem["steps"]) <= 5 and len(problem["solution"]) <= stage.MAX_PROGRAM
            assert ("flaw" in problem) == (split == "sft")


def test_no_prompt_twice_and_no_chain_on_both_sides(tiny):
    prompts = [problem["prompt"] for split in stage.SPLITS for problem in tiny[split]]
    assert len(set(prompts)) == len(prompts)
    trained = {tuple(problem["steps"]) for split in ("sft", "rm", "ppo") for problem in tiny[split]}
    tested = {tuple(problem["steps"]) for split in ("validation", "test") for problem in tiny[split]}
    assert not trained & tested
    assert min(map(len, trained)) == 1 and min(map(len, tested)) == 2  # every single step is in training


def test_solutions_pass_unless_flawed(tiny):
    """Correct solutions pass; each solution with a recorded flaw fails at least one test."""
    for split in stage.SPLITS:
        for problem in tiny[split]:
            assert passes(problem, problem["solution"]) == (not problem.get("flaw")), problem["task_id"]


def test_sandbox_agrees(tiny):
    problems = tiny["sft"][:60] + tiny["test"][:30]
    results = run_solutions(problems)
    assert [result.passed for result in results] == [not problem.get("flaw") for problem in problems]


def test_one_line_a_step(tiny):
    for problem in tiny["sft"]:
        missing = sum(flaw["flaw"] == "missing step" for flaw in problem["flaw"] or [])
        lines = problem["solution"].splitlines()
        assert len(lines) == max(1, len(problem["steps"]) - missing)
        assert lines[-1].startswith("    return ") and problem["solution"].endswith("\n")


def test_every_mutation_and_every_missing_step_fails(tiny):
    """For each problem: every single-step mutation that was kept, and every step left out where that is well typed."""
    pool, rng, checked = stage.input_pool(0), random.Random(1), collections.Counter()
    while checked["chains"] < 150:
        chain = stage.draw_chain(rng.randint(1, 5), stage.STEPS, rng)
        found = stage.choose_tests(chain, pool, rng)
        if found is None:
            continue
        chosen, _, mutations = found
        checked["chains"] += 1
        problem = {"prefix": f"def solve({stage.VARIABLE[chain[0].takes]}):\n",
                   "tests": [f"assert solve({values[0]!r}) == {values[-1]!r}" for values in chosen]}

        def body(flaws):
            lines = stage.write_solution(chain, mutations, flaws, None)
            return stage.body(chain[0].takes, [(step.gives, line) for step, line in lines])

        assert passes(problem, body([None] * len(chain)))
        for place, step in enumerate(chain):
            kept = list(mutations[place]) + ["missing step"] * (step.takes == step.gives)
            assert mutations[place]
            for flaw in kept:
                assert not passes(problem, body([flaw if place == other else None for other in range(len(chain))]))
                checked["mutants"] += 1
    assert checked["mutants"] > 500


def test_step_that_changes_nothing_is_rejected():
    """Reversing twice, and sorting what a sort follows, are no problems to learn from."""
    steps = {step.kind: step for step in stage.STEPS}
    pool = stage.input_pool(0)
    for kinds in (["upper", "swap_case", "upper"], ["reverse", "sort_up"], ["square", "absolute"],
                  ["double", "keep_even"]):
        assert stage.choose_tests([steps[kind] for kind in kinds], pool, random.Random(0)) is None, kinds
    assert stage.choose_tests([steps["reverse"], steps["drop_head"]], pool, random.Random(0)) is not None


def test_table_of_steps():
    assert len(stage.STEPS) >= 40
    assert len({step.kind for step in stage.STEPS}) == len(stage.STEPS)
    wordings = [(step.takes, words) for step in stage.STEPS for words in step.words.split(" | ")]
    assert len(set(wordings)) == len(wordings), "a wording that means two kinds of step"
    for step in stage.STEPS:
        assert len(step.words.split(" | ")) >= 3 and 1 <= len(step.wrong) <= 3
        assert not set(step.right.split(" | ")) & set(step.wrong.values())


def test_two_ways_to_write_a_step_agree():
    pool = stage.input_pool(0)
    for step in stage.STEPS:
        first, *others = [stage.compiled(way, stage.VARIABLE[step.takes]) for way in step.right.split(" | ")]
        for value in pool[step.takes]:
            try:
                expected = first(value)
            except Exception:
                continue
            assert all(other(value) == expected for other in others), (step.kind, value)


def test_all_kinds_are_used_and_digits_are_few(tiny):
    used = {kind for problem in tiny["sft"] for kind in problem["steps"]}
    assert used == {step.kind for step in stage.used_steps(stage.Config().kinds)} and len(used) >= 40
    assert {kind for problem in tiny["test"] for kind in problem["steps"]} <= used
    assert {letter for problem in tiny["sft"] for letter in problem["prompt"] if letter.isdigit()} <= set("12345")


def test_flaws_come_at_their_rates(tiny):
    rates = stage.flaw_rates(stage.Config())
    assert min(rates.values()) >= 0.05 and max(rates.values()) <= 0.7
    hard = [rate for rate in rates.values() if rate > 0.5]
    assert abs(len(hard) / len(rates) - stage.Config().hard_share) < 0.04
    seen, wrong, usual = collections.Counter(), collections.Counter(), 0
    for problem in tiny["sft"]:
        seen.update(problem["steps"])
        wrong.update(flaw["kind"] for flaw in problem["flaw"] or [])
    for kind, count in seen.items():  # four standard deviations of a binomial: dozens of kinds, one false alarm in 200 seeds
        spread = math.sqrt(rates[kind] * (1 - rates[kind]) * count)
        assert abs(wrong[kind] - rates[kind] * count) < 4 * spread + 1, kind
    flaws = [flaw for problem in tiny["sft"] for flaw in problem["flaw"] or []]
    missing = sum(flaw["flaw"] == "missing step" for flaw in flaws)
    assert 0.01 < missing / len(flaws) < 0.03
    first = {step.kind: next(iter(step.wrong)) for step in stage.STEPS}
    usual = sum(flaw["flaw"] == first[flaw["kind"]] for flaw in flaws)
    assert 0.75 < usual / len(flaws) < 0.9


def test_flaws_name_their_step(tiny):
    for problem in tiny["sft"]:
        for flaw in problem["flaw"] or []:
            assert set(flaw) == {"step", "kind", "flaw"} and problem["steps"][flaw["step"] - 1] == flaw["kind"]


def test_values_stay_small(tiny):
    for problem in tiny["sft"]:
        for test in problem["tests"]:
            result = ast.literal_eval(test.split(" == ", 1)[1])
            assert stage.small(result) and len(test) < 400


def test_same_seed_same_bytes(tmp_path):
    """Also with another hash seed, as sets and dicts of strings would show."""
    sizes = ["--sft", 200, "--rm", 40, "--ppo", 40, "--validation", 20, "--test", 20]
    for name, seed, hash_seed in (("a", 3, "1"), ("b", 3, "2"), ("c", 4, "1")):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = run_stage("--out", tmp_path / name, "--seed", seed, *sizes, env=environment)
        assert done.returncode == 0, done.stderr
    for split in stage.SPLITS:
        a, b, c = ((tmp_path / name / f"{split}.jsonl").read_bytes() for name in "abc")
        assert a == b != c
    again = run_stage("--out", tmp_path / "a", "--seed", 3, *sizes)
    assert again.returncode == 0 and "is finished" in again.stdout


def test_example_in_the_docstring():
    """The record that opens the file is one that the defaults write."""
    text = " ".join(line.strip() for line in stage.__doc__.split("spread out:")[1].split("\n\n")[1].splitlines())
    example = json.loads(text)
    number = int(example["task_id"].split("/")[-1])
    problem = stage.tiny_splits(stage.Config(sft=number + 1, rm=1, ppo=1, validation=1, test=1))["sft"][number]
    assert problem == example, "the defaults changed: copy this record into the docstring of 00_data.py"


# ---- bad input ----


@pytest.mark.parametrize("flags, words", [
    (["--dataset", "nothing"], "invalid choice"),
    (["--size", "3"], "--size"),
    (["--sft", "0"], "--sft"),
    (["--sft", "many"], "--sft"),
    (["--hard_share", "1.5"], "--hard_share"),
    (["--easy_flaws", "0.1"], "--easy_flaws"),
    (["--lengths", "0", "0"], "--lengths"),
    (["--file", "x.jsonl"], "--dataset"),
    (["--sft", "3000", "--lengths", "1"], "--lengths"),  # there are not that many problems of one step
    (["--dataset", "humaneval", "--file", "absent.jsonl"], "absent.jsonl"),
    (["--dataset", "humaneval", "--file", "broken.jsonl"], "broken.jsonl, line 2"),
    (["--dataset", "humaneval", "--file", "fields.jsonl"], "fields.jsonl, line 1: field 'task_id'"),
    (["--dataset", "mbpp", "--file", "code.jsonl"], "code.jsonl, line 1: code"),
    (["--dataset", "evol", "--file", "empty.jsonl"], "empty.jsonl has no problems"),
    (["--dataset", "evol", "--file", "cut.jsonl.gz"], "cut.jsonl.gz"),
    (["--dataset", "evol", "--file", "plain.jsonl.gz"], "plain.jsonl.gz"),
    (["--dataset", "mbpp_sanitized", "--file", "list.json"], "list.json, record 1: field"),
    (["--dataset", "magicoder"], "--file"),  # without a network
])
def test_bad_input_is_one_line_and_leaves_nothing(flags, words, tmp_path):
    good = json.dumps({"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f",
                       "canonical_solution": "    return 1\n", "test": "def check(f):\n    assert f()\n"})
    (tmp_path / "broken.jsonl").write_text(good + "\n{\n")
    (tmp_path / "fields.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    (tmp_path / "code.jsonl").write_text(json.dumps({"task_id": 11, "text": "a", "code": "def f(:", "test_list": [],
                                                     "test_setup_code": ""}) + "\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"instruction": "a", "output": "b"}\n' * 50)[:30])
    (tmp_path / "plain.jsonl.gz").write_text("{}\n")
    (tmp_path / "list.json").write_text('[{"task_id": 1}]')
    before = sorted(tmp_path.rglob("*"))
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path.parent / "hf")}
    done = run_stage(*flags, cwd=tmp_path, env=offline)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("00_data.py: error: "), done.stderr
    assert words in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_other_output_is_not_overwritten(tmp_path):
    sizes = ["--sft", 5, "--rm", 2, "--ppo", 2, "--validation", 2, "--test", 2, "--out", tmp_path / "out"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    done = run_stage(*sizes)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes.txt"]
    (tmp_path / "out" / "notes.txt").unlink()
    (tmp_path / "out").rmdir()
    assert run_stage(*sizes).returncode == 0
    before = (tmp_path / "out" / "sft.jsonl").read_bytes()
    done = run_stage(*sizes, "--seed", 1)  # other settings
    assert done.returncode == 2 and "--out" in done.stderr
    assert (tmp_path / "out" / "sft.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_config_is_saved(tmp_path):
    done = run_stage("--sft", 5, "--rm", 2, "--ppo", 2, "--validation", 2, "--test", 2, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "out" / "stage_config.json").read_text())
    assert set(saved) == {field.name for field in dataclasses.fields(stage.Config)} and saved["sft"] == 5


# ---- public data sets ----


def written(tmp_path, dataset, file):
    """{split: problems} that the script writes for a local file."""
    done = run_stage("--dataset", dataset, "--file", file, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    splits = {path.stem: read(path) for path in (tmp_path / "out").glob("*.jsonl")}
    for problems in splits.values():
        for problem in problems:
            assert set(problem) == set(FIELDS) and problem["source"] == dataset
            assert all(isinstance(problem[name], str) for name in ("task_id", "prompt", "prefix", "setup"))
            assert all(isinstance(test, str) for test in problem["tests"])
    return splits


def shared(name):
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    return path


def test_humaneval(tmp_path):
    splits = written(tmp_path, "humaneval", shared("HumanEval.jsonl.gz"))
    assert {split: len(problems) for split, problems in splits.items()} == {"test": 164}
    results = run_solutions(splits["test"])
    assert [(problem["task_id"], result.status, result.error) for problem, result in zip(splits["test"], results)
            if not result.passed] == []


def test_humaneval_helpers_of_the_tests_are_not_the_responses_own(tmp_path):
    """HumanEval/32 tests `find_zero` by `poly`, which the prompt defines; a response that redefines it gets no pass."""
    splits = written(tmp_path, "humaneval", shared("HumanEval.jsonl.gz"))
    problem = next(problem for problem in splits["test"] if problem["task_id"] == "HumanEval/32")
    cheat = "    return 0.0\n\ndef poly(xs, x):\n    return 0.0\n"
    result = sandbox.run(sandbox.program(problem, cheat), problem["tests"], setup=problem["setup"],
                         entry_point=problem["entry_point"])
    assert not result.passed


def test_humaneval_answer_with_the_whole_function(tmp_path):
    """A chat model writes the signature again: the helper functions of the prompt must stay, the stub must go."""
    problems = written(tmp_path, "humaneval", shared("HumanEval.jsonl.gz"))["test"]
    whole = [{**problem, "solution": f"Here it is:\n```python\n{problem['prompt']}{problem['solution']}```\n"}
             for problem in problems]
    assert all(result.passed for result in run_solutions(whole))
    results = run_solutions([{**problem, "solution": "    return None\n"} for problem in problems])
    assert not any(result.passed for result in results)


def test_mbpp(tmp_path):
    """All 964 problems of the usual splits: every reference solution passes, so there is no exception to list."""
    splits = written(tmp_path, "mbpp", shared("mbpp.jsonl.gz"))
    assert {split: len(problems) for split, problems in splits.items()} == {
        "rm": 187, "ppo": 187, "validation": 90, "test": 500}
    numbers = {split: {int(problem["task_id"].split("/")[1]) for problem in problems}
               for split, problems in splits.items()}
    assert numbers["test"] == set(range(11, 511)) and numbers["validation"] == set(range(511, 601))
    assert not numbers["rm"] & numbers["ppo"] and numbers["rm"] | numbers["ppo"] == set(range(601, 975))
    problems = [problem for split in splits.values() for problem in split]
    assert all(problem["entry_point"] and f"{problem['entry_point']}(" in problem["prompt"] for problem in problems)
    assert not any("\r" in problem["solution"] + problem["setup"] for problem in problems)
    results = run_solutions(problems)
    assert [(problem["task_id"], result.status, result.error) for problem, result in zip(problems, results)
            if not result.passed] == []


def test_mbpp_sanitized(tmp_path):
    """The sanitized shape, made from the shapes that its authors publish: a JSON list, `prompt`, `test_imports`."""
    records = [{"source_file": "x", "task_id": number, "prompt": "Write a function to double a number.",
                "test_imports": ["import math"], "code": "def twice(n):\r\n  return 2 * n",
                "test_list": ["assert twice(2) == math.floor(4.5)"]} for number in (3, 11, 511, 601, 602)]
    (tmp_path / "sanitized-mbpp.json").write_text(json.dumps(records, indent=1))
    splits = written(tmp_path, "mbpp_sanitized", tmp_path / "sanitized-mbpp.json")
    sizes = {split: len(problems) for split, problems in splits.items()}
    assert sizes == {"rm": 1, "ppo": 1, "validation": 1, "test": 1}
    assert all(result.passed for split in splits.values() for result in run_solutions(split))
    assert splits["test"][0]["prompt"] == ("Write a function to double a number. Your code should pass these tests:\n\n"
                                           "assert twice(2) == math.floor(4.5)\n")


def test_leetcode(tmp_path):
    """The file has no reference solutions; three of our own pass, one of them on linked lists, and wrong ones fail."""
    splits = written(tmp_path, "leetcode", shared("leetcode_contest_20240121-Jul.jsonl.gz"))
    assert {split: len(problems) for split, problems in splits.items()} == {"test": 180}
    for problem in splits["test"]:
        assert len(problem["tests"]) == 100 and problem["entry_point"] == "Solution" and problem["solution"] is None
        compile(problem["prefix"] + "pass\n", "prefix", "exec")
        assert problem["prefix"].rstrip(" ").endswith(problem["prompt"]) and problem["prompt"].endswith(":\n")
        compile(problem["setup"] + "\n".join(problem["tests"]), "tests", "exec")
        assert not any("test_input" in test for test in problem["tests"])
    pushes = next(problem for problem in splits["test"] if problem["task_id"].endswith("pushes-to-type-word-i"))
    double = next(problem for problem in splits["test"] if "double-a-number" in problem["task_id"])
    answers = [
        (pushes, "return sum(place // 8 + 1 for place in range(len(word)))\n", True),
        (pushes, "        total = 0\n        for place in range(len(word)):\n            total += place // 8 + 1\n        return total\n", True),
        (pushes, "```python\n        places = range(len(word))\n        return sum(place // 8 + 1 for place in places)\n```", True),
        (pushes, "return len(word)\n", False),
        (pushes, "```python\nclass Solution:\n    def minimumPushes(self, word):\n"
                 "        return sum(place // 8 + 1 for place in range(len(word)))\n```\n", True),
        (double, "```python\nclass Solution:\n    def doubleIt(self, head):\n        number = 0\n        while head:\n"
                 "            number, head = number * 10 + head.val, head.next\n        node = None\n"
                 "        for digit in reversed(str(2 * number)):\n            node = ListNode(int(digit), node)\n"
                 "        return node\n```\n", True),
    ]
    results = run_solutions([{**problem, "solution": answer} for problem, answer, _ in answers])
    assert [result.passed for result in results] == [expected for _, _, expected in answers], [r.error for r in results]


@pytest.mark.parametrize("dataset, record", [
    ("magicoder", {"lang": "python", "problem": "Write f.", "solution": "```python\ndef f(): pass\n```", "index": 3}),
    ("evol", {"instruction": "Write f.\n", "output": "```python\ndef f(): pass\n```\n"})])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_instruction_data(dataset, record, suffix, tmp_path):
    lines = (json.dumps(record) + "\n") * 3 + json.dumps({**record, "note": "\u2028"}, ensure_ascii=False)
    file = tmp_path / f"data{suffix}"
    file.write_bytes(gzip.compress(lines.encode()) if suffix.endswith("gz") else lines.encode())
    splits = written(tmp_path, dataset, file)
    assert list(splits) == ["sft"] and len(splits["sft"]) == 4
    assert splits["sft"][2] == {
        "task_id": f"{dataset}/2", "prompt": "Write f.\n", "prefix": "", "setup": "", "entry_point": None, "tests": [],
        "solution": "```python\ndef f(): pass\n```\n", "source": dataset}


def test_hub_names_and_configurations(monkeypatch):
    """What is asked of `datasets`, with a stand-in for the network."""
    asked = []
    fake = type(sys)("datasets")
    fake.load_dataset = lambda *names: asked.append(names) or {"train": [{"a": 1}], "test": []}
    monkeypatch.setitem(sys.modules, "datasets", fake)
    for dataset in stage.DATASETS[1:]:
        assert stage.hub_records(dataset) == [(f"{stage.HUB[dataset][0]}, split train, record 1", {"a": 1})]
    assert asked == list(stage.HUB.values()) and set(stage.HUB) == set(stage.FIELDS) == set(stage.DATASETS[1:])


def test_kinds_that_cannot_make_a_chain(capsys):
    """Three kinds of step, of which none may take what the one before gives."""
    with pytest.raises(SystemExit) as stop:
        stage.tiny_splits(stage.Config(kinds=3))
    assert stop.value.code == 2 and "--kinds 3 is left that takes a" in capsys.readouterr().err
