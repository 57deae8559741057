"""Records that all stages share: what people have is read, what cannot be used is refused."""

import gzip
import json

import pytest

import sandbox

PROBLEM = {"task_id": "a", "prompt": "p", "entry_point": "f", "tests": ["assert f(1) == 1"]}
OTHER = {**PROBLEM, "task_id": "b", "prompt": "Zürich ☃"}


def lines(*records, end="\n"):
    return "".join(json.dumps(record, ensure_ascii=False) + end for record in records).encode()


def with_tests(tests):
    return lines({**PROBLEM, "tests": tests})


@pytest.mark.parametrize(
    "content",
    [
        lines(PROBLEM, OTHER),
        b"\xef\xbb\xbf" + lines(PROBLEM, OTHER, end="\r\n"),  # a BOM and CRLF, as from Windows
        b"\n\n" + lines(PROBLEM, end="\n \n") + lines(OTHER).rstrip(),  # blank lines, no last break
        lines({**PROBLEM, "extra": [1]}, {**OTHER, "setup": None}),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_what_people_have_is_read(tmp_path, content, zipped):
    path = tmp_path / ("problems.jsonl.gz" if zipped else "problems.jsonl")
    path.write_bytes(gzip.compress(content) if zipped else content)
    problems = sandbox.read_problems(path)
    assert [p["task_id"] for p in problems] == ["a", "b"]
    assert problems[1]["prompt"] == "Zürich ☃"
    assert all(p["prefix"] == p["setup"] == "" for p in problems)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "empty"),
        (lines(PROBLEM) + b'{"task_id": "\xff"}\n', "line 2: not UTF-8"),
        (lines(PROBLEM) + b"{'task_id': 1}\n", "line 2: not JSON"),
        (b"[1]\n", "line 1: not a JSON object"),
        (b'{"task_id": "a", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "line 1"),
        (lines(PROBLEM)[:-2] + b', "note": "\\ud800"}\n', "'note'"),  # half of a surrogate pair
        (lines({**PROBLEM, "prompt": "☃🐍"})[:-2] + b', "note": "\\udc00"}\n', "'note'"),
        (lines({**PROBLEM, "task_id": None}), "'task_id'"),
        (lines({**PROBLEM, "task_id": True}), "'task_id'"),
        (lines({k: v for k, v in PROBLEM.items() if k != "prompt"}), "'prompt'"),
        (lines({**PROBLEM, "entry_point": 3}), "'entry_point'"),
        (lines({**PROBLEM, "solution": 3}), "'solution'"),
        (lines(PROBLEM, {**PROBLEM, "prompt": "q"}), "line 2: field 'task_id' repeats"),
        (lines({**PROBLEM, "prompt": ""}), "'prompt'"),
        (with_tests([]), "'tests'"),
        (with_tests(""), "'tests'"),
        (with_tests([" \n"]), "'tests'"),
        (with_tests([3]), "line 1, task_id 'a': field 'tests'"),
        (with_tests([{"input": "1"}]), "'tests'"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, capsys, content, words):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        sandbox.read_problems(path)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert words in error and str(path) in error


def test_a_file_that_is_not_there_or_broken_is_refused(tmp_path, capsys):
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(lines(PROBLEM) * 1000)[:-20])
    garbled = tmp_path / "garbled.jsonl.gz"
    data = bytearray(gzip.compress(lines(PROBLEM) * 1000))
    data[15:25] = bytes(10)
    garbled.write_bytes(data)
    for path in (tmp_path / "nowhere.jsonl", broken, garbled, tmp_path):
        with pytest.raises(SystemExit):
            sandbox.read_problems(path)
        assert str(path) in capsys.readouterr().err


def test_writing_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.jsonl"
    sandbox.write_jsonl(path, [PROBLEM])
    with pytest.raises(TypeError):
        sandbox.write_jsonl(path, [OTHER, {"bad": object()}])
    assert sandbox.read_jsonl(path, {}) == [PROBLEM]


def test_run_tests_keeps_the_order_and_runs_a_program_once(monkeypatch):
    problems = [{**p, "prefix": "", "setup": ""} for p in (PROBLEM, OTHER)]
    right, wrong = "def f(x):\n    return x\n", "def f(x):\n    return 2\n"
    rows = [problems[0], problems[1], problems[0], problems[0]]
    jobs, run_many = [], sandbox.run_many

    def recorder(batch, *args, **kwargs):
        jobs.extend(batch)
        return run_many(batch, *args, **kwargs)

    monkeypatch.setattr(sandbox, "run_many", recorder)
    results = sandbox.run_tests(rows, [right, wrong, wrong, right], workers=1)
    assert [result.passed for result in results] == [True, False, False, True]
    own = [job for job in jobs if job["code"] in (right, wrong)]  # not the sandbox's own trials
    assert len(own) == 3
