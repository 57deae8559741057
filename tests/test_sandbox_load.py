"""Many programs, dying helpers, dying callers, the command line, and all of it as an ordinary user."""
# Programs under test are strings of one line.
# ruff: noqa: E501, E731, SIM105, SIM115, SIM905, UP031

import glob
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

import pytest

import sandbox

ROOT = os.path.dirname(os.path.abspath(sandbox.__file__))
GOOD = dict(code="def f(x): return x + 1", tests=["assert f(1) == 2"], entry_point="f")
KINDS = {  # kind: (code, expected statuses)
    "pass": ("def f(x): return x + 1", {"passed"}),
    "fail": ("def f(x): return x", {"failed"}),
    "raise": ("def f(x): raise ValueError", {"error"}),
    "exit": ("import os; os._exit(0)", {"error"}),
    "syntax": ("def f(", {"syntax"}),
    "crash": ("import os\nos.kill(os.getpid(), 11)", {"error"}),
    "print": ("print('x' * 100000)\ndef f(x): return x + 1", {"passed"}),
    "file": ("open('a', 'w').write('x')\ndef f(x): return x + 1", {"passed"}),
    "fork": (
        "import os\nif os.fork() == 0:\n    import time; time.sleep(60)\ndef f(x): return x + 1",
        {"passed"},
    ),
    "hang": ("while True: pass", {"timeout"}),
    "memory": ("x = bytearray(1 << 34)", {"memory"}),
}


def children():
    """Processes below this one, by their command line."""
    table, found, last = {}, {os.getpid()}, -1
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            table[int(pid)] = int(open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[1])
        except OSError:
            pass
    while len(found) > last:
        last, found = len(found), found | {p for p, parent in table.items() if parent in found}
    return found - {os.getpid()}


def copy_sandbox(folder):
    for name in ("sandbox.py", "judge.py", "walls.py"):
        os.chmod(shutil.copy(os.path.join(ROOT, name), folder), 0o644)


def helpers(worker):
    """Pids of S and Z, its child."""
    pids = [worker.process.pid]
    while len(pids) < 2:
        pids.append(int(open(f"/proc/{pids[-1]}/task/{pids[-1]}/children").read().split()[0]))
    return pids


def rss(pid="self"):
    return int(open(f"/proc/{pid}/statm").read().split()[1]) * 4 >> 10


def own_scratches():
    """Folders of this process's workers where there are no namespaces; others run beside it."""
    return glob.glob(f"/dev/shm/sandbox-{os.getpid()}-*")


@pytest.mark.parametrize("count", [int(os.environ.get("SANDBOX_LOAD", "1000"))])
def test_load(count):
    """SANDBOX_LOAD=100000 runs the long form."""
    rng = random.Random(0)
    kinds = [
        rng.choices(list(KINDS), [60, 10, 5, 5, 5, 3, 3, 4, 4, 0.2, 2])[0] for _ in range(count)
    ]
    jobs = [GOOD | dict(code=f"# {i}\n{KINDS[k][0]}", timeout=0.3) for i, k in enumerate(kinds)]
    for k in ("pass", "fork", "file", "memory"):
        sandbox.run(**GOOD | dict(code=KINDS[k][0]))
    sandbox.run_many(jobs[:50], workers=2)
    before = (
        len(os.listdir("/proc/self/fd")),
        len(children()),
        len(open("/proc/self/mounts").readlines()),
        rss(),
        {p: rss(p) for p in children()},
    )
    order, scratches = [], own_scratches()
    results = sandbox.run_many(jobs, workers=2, on_result=lambda i, r: order.append(i))
    wrong = [
        (i, k, r)
        for i, (k, r) in enumerate(zip(kinds, results))
        if r.status not in KINDS[k][1] or r.passed != (r.status == "passed")
    ]
    assert wrong == [] and sorted(order) == list(range(count))
    assert (
        len(os.listdir("/proc/self/fd")) == before[0]
        and len(children()) == before[1]
        and len(open("/proc/self/mounts").readlines()) == before[2]
    )
    kept = sum(len(r.stdout) for r in results) >> 20
    assert rss() - before[3] - kept < 20 + count // 1000  # MB: jobs and results themselves
    assert all(rss(p) - before[4].get(p, rss(p)) < 20 for p in children()), "a helper grows"
    assert own_scratches() == scratches


def test_a_negative_number_of_workers_is_refused():
    with pytest.raises(ValueError, match="workers is -1"):
        sandbox.run_many([dict(code="", tests=["assert f() == 1"])], workers=-1)


def test_results_come_in_input_order():
    jobs = [
        dict(
            code=f"import time\ntime.sleep({0.05 if i % 7 == 0 else 0})\ndef f(): return {i}",
            tests=[f"assert f() == {i}", f"raise KeyError({i})"],
            entry_point="f",
        )
        for i in range(40)
    ]
    assert [
        int(r.error.removeprefix("KeyError: ")) for r in sandbox.run_many(jobs, workers=3)
    ] == list(range(40))


def test_a_program_of_megabytes_is_a_program():
    codes = ("x = 1", "#" * (17 << 20), "x = ", "#" * (17 << 20))
    told = []
    results = sandbox.run_many(
        [dict(code=code, tests=["import solution"], timeout=9.0) for code in codes],
        1,
        lambda index, result: told.append((index, result.status)),
    )
    assert [r.status for r in results] == ["passed", "passed", "syntax", "passed"]
    assert told == list(enumerate(r.status for r in results))


@pytest.mark.parametrize("trust", ["split", "in_process"])
def test_thousands_of_tests_are_counted(trust):
    tests = [f"assert f({i}) == {i}" for i in range(3000)]
    options = dict(entry_point="f", trust=trust)
    assert sandbox.run("def f(x): return x", tests, **options)[:4] == ("passed", True, 3000, 3000)
    result = sandbox.run("def f(x): return x % 2999", tests, **options)
    assert result[:4] == ("failed", False, 2999, 3000)


def test_a_program_that_floods_the_words_of_its_tests_ends():
    """In one process it has the line to the caller, which must not read forever."""
    code = "import os\nwhile True:\n    for fd in range(3, 20):\n        try: os.write(fd, b'1\\n' * 9999)\n        except OSError: pass"
    start = time.monotonic()
    result = sandbox.run(
        code, ["assert f() == 1"], entry_point="f", trust="in_process", timeout=0.5
    )
    assert not result.passed and time.monotonic() - start < 20


def test_a_program_of_megabytes_is_a_program_for_split_tests_too():
    code = "#" * (17 << 20) + "\ndef f(x): return x"
    result = sandbox.run(code, ["assert f(1) == 1"], entry_point="f", timeout=9.0)
    assert result.passed and result.trust == "split", result


def test_tests_of_megabytes_are_read_in_linear_time():
    tests = ["x = '" + "a" * 60_000_000 + "'\nassert f(1) == 1"]
    options = dict(entry_point="f", trust="in_process")
    assert sandbox.run("def f(x): return x", tests, **options).passed


def test_jobs_may_have_their_own_limits():
    results = sandbox.run_many(
        [
            GOOD | dict(timeout=0.2, code="while True: pass"),
            GOOD | dict(memory_mb=64, code="x = bytearray(200 << 20)\ndef f(x): return 2"),
            GOOD | dict(memory_mb=1024, code="x = bytearray(600 << 20)\ndef f(x): return 2"),
            GOOD | dict(trust="in_process"),
        ]
    )
    assert [r.status for r in results] == ["timeout", "memory", "passed", "passed"] and results[
        3
    ].trust == "in_process"
    assert sandbox.run_many([]) == []


@pytest.mark.parametrize("role", ["S", "Z"])
def test_a_killed_helper_is_replaced_and_nothing_is_lost(role):
    jobs = [
        dict(
            code=f"import time\ntime.sleep(0.01)\ndef f(): return {i}",
            tests=[f"assert f() == {i}"],
            entry_point="f",
        )
        for i in range(120)
    ]
    sandbox.run(**GOOD)
    worker = sandbox.IDLE[-1]
    pids = dict(zip("SZ", helpers(worker)))
    timer = threading.Timer(0.5, os.kill, (pids[role], signal.SIGKILL))
    timer.start()
    results = sandbox.run_many(jobs, workers=1)
    timer.join()
    assert all(r.passed for r in results)
    deadline = (
        time.time() + 20
    )  # P's parent is killed with it, and then init reaps P when it comes to it
    while os.path.exists(f"/proc/{pids[role]}") and time.time() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pids[role]}")


def test_a_helper_that_died_while_idle_is_replaced():
    for role in range(2):
        sandbox.run(**GOOD)
        os.kill(helpers(sandbox.IDLE[-1])[role], signal.SIGKILL)
        time.sleep(0.1)
        assert sandbox.run(**GOOD).passed


SCRIPT = "import sys, os, time; sys.path.insert(0, {root!r}); import sandbox\n"


def script(body, **options):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(root=ROOT) + body],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


LOOP = "print(os.getpid(), flush=True)\nsandbox.run_many([dict(code='import time; time.sleep(0.3)', tests=['import solution'], entry_point=None)] * 1000, workers=2)"


def below(pid):
    try:
        kids = [
            int(k)
            for t in os.listdir(f"/proc/{pid}/task")
            for k in open(f"/proc/{pid}/task/{t}/children").read().split()
        ]
    except OSError:
        return []
    return kids + [g for k in kids for g in below(k)]


def gone(pids, seconds):
    end = time.monotonic() + seconds
    alive = lambda p: (
        os.path.exists(f"/proc/{p}")
        and open(f"/proc/{p}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    )
    while time.monotonic() < end:
        try:
            if not any(alive(p) for p in pids):
                return True
        except OSError:
            pass
        time.sleep(0.02)
    return False


def test_helpers_die_with_a_killed_caller():
    process = script(LOOP)
    process.stdout.readline()
    time.sleep(1)
    pids = below(process.pid)
    assert len(pids) >= 4
    process.kill()
    process.wait()
    assert gone(pids, 3)


def test_ctrl_c_stops_at_once():
    process = script(LOOP)
    process.stdout.readline()
    time.sleep(1)
    pids = below(process.pid)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.wait(5)
    assert (
        time.monotonic() - began < 1.5
        and "KeyboardInterrupt" in process.stderr.read()
        and gone(pids, 1)
    )


def test_two_callers_do_not_disturb_each_other():
    body = 'r = sandbox.run_many([dict(code=f\'open("x", "w").write("{i}")\\ndef f(): return [open("x").read(), __import__("os").listdir(".")]\', tests=[f\'assert f() == ["{i}", ["x"]]\'], entry_point=\'f\') for i in range(100)], workers=2)\nprint(sum(x.passed for x in r))'
    both = [script(body), script(body)]
    assert [p.communicate(timeout=60)[0].strip() for p in both] == ["100", "100"]


def test_each_helper_has_a_core_of_its_own_as_long_as_there_are_any():
    """Also among callers: the name of a core that is taken belongs to a helper of whoever came first."""
    sandbox.close()
    everything, held = os.sched_getaffinity(0), {}
    for core in everything:
        held[core] = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            held[core].bind(f"\0sandbox.py on core {core}")
        except OSError:
            held.pop(core).close()  # of another process on this machine
    if len(held) < 2:
        pytest.skip("fewer than two cores are free")
    first, second = sorted(held)[:2]
    job = dict(
        code="import os, time\nprint(sorted(os.sched_getaffinity(0)))\ntime.sleep(0.5)",
        tests=["import solution"],
    )
    where = lambda: sorted(r.stdout.strip() for r in sandbox.run_many([job] * 3, workers=3))
    try:
        os.sched_setaffinity(0, {first, second})
        held[second].close()
        assert where() == sorted([f"[{second}]", f"[{first}, {second}]", f"[{first}, {second}]"])
        held[first].close(), sandbox.close()
        assert where() == sorted([f"[{first}]", f"[{second}]", f"[{first}, {second}]"])
    finally:
        for name in held.values():
            name.close()
        os.sched_setaffinity(0, everything)
        sandbox.close()


def test_threads_of_one_caller_do_not_disturb_each_other():
    out = {}

    def work(n):
        out[n] = sandbox.run_many(
            [
                dict(
                    code=f"def f(): return {n * 100 + i}",
                    tests=[f"assert f() == {n * 100 + i}"],
                    entry_point="f",
                )
                for i in range(40)
            ],
            workers=1,
        )

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert all(r.passed for n in range(3) for r in out[n])


def test_a_fork_of_the_caller_gets_its_own_helpers():
    """Parent and child have different programs, so that an answer to the other one would show."""
    body = """g = dict(code='def f(): return 1', tests=['assert f() == 1'], entry_point='f')
sandbox.run(**g)
pid = os.fork()
r = sandbox.run_many([g if pid else g | dict(code='def f(): return 2')] * 50, workers=1)
print('parent' if pid else 'child', *sorted({x.status for x in r}), flush=True)
if pid == 0: os._exit(0)
os.wait()"""
    assert sorted(script(body).communicate(timeout=60)[0].splitlines()) == [
        "child failed",
        "parent passed",
    ]


def test_nothing_is_left_after_the_caller():
    process = script(
        "sandbox.run_many([dict(code='open(\"a\", \"w\")', tests=['import solution'])] * 20, workers=2); print(*[w.process.pid for w in sandbox.IDLE])"
    )
    out, err = process.communicate(timeout=60)
    assert len(out.split()) == 2 and gone(map(int, out.split()), 2) and process.returncode == 0


def test_torch_in_the_caller_makes_no_difference_to_the_helpers():
    pytest.importorskip("torch")
    body = "import torch\nx = torch.ones(50 << 20)\nr = sandbox.run_many([dict(code='import sys\\ndef f(): return \"torch\" in sys.modules', tests=['assert f() is False'], entry_point='f')] * 30, workers=1)\nprint(sum(x.passed for x in r))"
    assert script(body).communicate(timeout=120)[0].strip() == "30"


def test_a_caller_of_a_gigabyte_changes_nothing():
    body = "x = bytearray(b'x') * (1 << 30)\nr = sandbox.run_many([dict(code='def f(): return 1', tests=['assert f() == 1'], entry_point='f')] * 30, workers=1)\nprint(sum(x.passed for x in r), sandbox.IDLE[0].process.pid == first)"
    body = body.replace(
        "\nr =", "\nsandbox.run('', ['import solution'])\nfirst = sandbox.IDLE[0].process.pid\nr ="
    )
    assert script(body).communicate(timeout=120)[0].split() == ["30", "True"]


@pytest.mark.parametrize("flags", [["-Ur"], ["-U"]])
def test_a_host_without_user_namespaces(flags):
    """In a namespace that allows no further ones: as its root, and as a user whom nothing is allowed. Slower walls, but walls, and no hanging."""
    body = (
        SCRIPT.format(root="/tmp/sandbox-host-%d" % os.getpid())
        + "r = sandbox.run('def f(): return 1', ['assert f() == 1'], entry_point='f'); print(r.status, int(sandbox.IDLE[0].layers['namespaces']), len(__import__('glob').glob(f'/dev/shm/sandbox-{os.getpid()}-*')), sandbox.MISSING)"
    )
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", *flags, "true"], capture_output=True).returncode
    ):
        pytest.skip("unshare does not work here")
    python = (
        "/usr/bin/python3"
        if "-Ur" not in flags and os.path.exists("/usr/bin/python3")
        else sys.executable
    )  # one that the user may read
    os.makedirs("/tmp/sandbox-host-%d" % os.getpid(), exist_ok=True)
    try:
        copy_sandbox("/tmp/sandbox-host-%d" % os.getpid())
        run = subprocess.run(
            [
                "unshare",
                *flags,
                "sh",
                "-c",
                'echo 0 > /proc/sys/user/max_user_namespaces; exec "$0" -c "$1"',
                python,
                body,
            ],
            capture_output=True,
            text=True,
            timeout=30,
        )
        status, namespaces, scratches, missing = run.stdout.split(" ", 3)
        assert status == "passed" and namespaces in "01", run
        assert int(namespaces) + int(scratches) == 1, run  # own_scratches() sees it
        assert not {
            "reading files outside",
            "writing files outside",
            "network",
            "signals to other processes",
            "memory",
        } & set(eval(missing))
    finally:
        shutil.rmtree("/tmp/sandbox-host-%d" % os.getpid())


def test_wrong_arguments_are_said_at_once():
    with pytest.raises(TypeError):
        sandbox.run_many([dict(tests=[])])
    with pytest.raises(TypeError):
        sandbox.run("x", "assert 1")
    with pytest.raises(TypeError):
        sandbox.run(None, ["assert 1"])
    with pytest.raises(ValueError):
        sandbox.run("x", ["assert 1"], trust="blind")


# ---- command line

PROBLEMS = [
    {
        "task_id": "a",
        "prefix": "import os\ndef f(x):\n",
        "entry_point": "f",
        "setup": "",
        "tests": ["assert f(1) == 2", "assert f(2) == 3"],
    },
    {"task_id": 2, "tests": ["assert g() == 1"], "setup": None, "entry_point": None, "prefix": ""},
]
SAMPLES = [
    {"task_id": "a", "response": "    return x + 1", "rm_score": 0.5, "policy": "p"},
    {"task_id": 2, "response": "def g(): return 1"},
    {"task_id": "a", "response": "    return 2"},
    {"task_id": "a", "response": "```python\ndef f(x): return x +"},
]


def write(path, records):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return str(path)


def cli(*args, **options):
    return subprocess.run(
        [sys.executable, os.path.join(ROOT, "sandbox.py"), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=100,
        **options,
    )


def test_cli_scores_a_file_and_goes_on_where_it_stopped(tmp_path):
    problems, samples, out = (
        write(tmp_path / "p.jsonl", PROBLEMS),
        write(tmp_path / "s.jsonl", SAMPLES),
        tmp_path / "o.jsonl",
    )
    run = cli(problems, samples, "-o", out, "--workers", 2)
    assert run.returncode == 0, run.stderr
    whole = out.read_text()
    records = [json.loads(line) for line in whole.splitlines()]
    assert [
        (r["status"], r["actual_score"], r["passed_tests"], r["total_tests"]) for r in records
    ] == [
        ("passed", 1.0, 2, 2),
        ("passed", 1.0, 1, 1),
        ("failed", 0.0, 1, 2),
        ("syntax", 0.0, 0, 2),
    ]
    assert records[0]["rm_score"] == 0.5 and records[0]["policy"] == "p"
    out.write_text(whole[: len(whole) // 2])  # cut in the middle of a line
    assert cli(problems, samples, "-o", out).returncode == 0 and out.read_text() == whole
    stamp = out.stat().st_mtime_ns
    assert cli(problems, samples, "-o", out).returncode == 0 and out.stat().st_mtime_ns == stamp


BAD = [
    ("p", ["{\n"], "line 1", "not JSON"),
    ("p", [PROBLEMS[0], "[]\n"], "line 2", "object"),
    ("p", [{"task_id": "a"}], "line 1", "'tests'"),
    ("p", [PROBLEMS[0] | {"tests": "x"}], "line 1", "'tests'"),
    ("p", [PROBLEMS[0] | {"tests": [1]}], "task_id 'a'", "'tests'"),
    ("p", [PROBLEMS[0] | {"entry_point": 3}], "line 1", "'entry_point'"),
    ("p", [PROBLEMS[0], PROBLEMS[1], PROBLEMS[0]], "line 3", "'task_id'"),
    ("s", [SAMPLES[0], {"task_id": "zz", "response": ""}], "sample 2", "'task_id'"),
    ("s", [{"task_id": "a"}], "line 1", "'response'"),
    ("s", [SAMPLES[0], SAMPLES[1] | {"response": None}], "line 2", "'response'"),
    ("s", ["\xff"], "s.jsonl", "line 1"),
    ("s", [SAMPLES[0], {"response": "x"}], "line 2", "'task_id'"),
]


@pytest.mark.parametrize("which, records, place, field", BAD)
def test_cli_says_where_the_input_is_bad(tmp_path, which, records, place, field):
    (
        write(tmp_path / "p.jsonl", PROBLEMS),
        write(tmp_path / "s.jsonl", SAMPLES),
        write(tmp_path / "o.jsonl", ["keep me\n"]),
    )
    write(tmp_path / f"{which}.jsonl", records)
    run = cli(tmp_path / "p.jsonl", tmp_path / "s.jsonl", "-o", tmp_path / "o.jsonl")
    assert (
        run.returncode == 2
        and len(run.stderr.strip().splitlines()) == 1
        and f"{which}.jsonl" in run.stderr
        and place in run.stderr
        and field in run.stderr
    ), run.stderr
    assert (tmp_path / "o.jsonl").read_text() == "keep me\n"


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--workers", -1), "--workers"),  # with no worker nothing would be scored
        (("--timeout", "nan"), "--timeout"),
        (("--memory_mb", 0), "--memory_mb"),
        (("-o", "."), "cannot be written"),
    ],
)
def test_cli_refuses_settings_in_one_line(tmp_path, flags, words):
    problems, samples = write(tmp_path / "p.jsonl", PROBLEMS), write(tmp_path / "s.jsonl", SAMPLES)
    run = cli(problems, samples, "-o", tmp_path / "o.jsonl", *flags)
    assert run.returncode == 2 and words in run.stderr and run.stderr.count("\n") == 1
    assert not (tmp_path / "o.jsonl").exists()


def test_cli_scores_samples_that_have_verdicts(tmp_path):
    """The output of one run is the input of another: verdicts are replaced, `trust` is among them."""
    problems, first = write(tmp_path / "p.jsonl", PROBLEMS), tmp_path / "1.jsonl"
    old = [s | {"actual_score": 0.5, "status": "?", "trust": "none"} for s in SAMPLES]
    assert cli(problems, write(tmp_path / "s.jsonl", old), "-o", first).returncode == 0
    assert cli(problems, first, "-o", tmp_path / "2.jsonl").returncode == 0
    assert (tmp_path / "2.jsonl").read_text() == first.read_text()
    records = [json.loads(line) for line in first.read_text().splitlines()]
    assert [r["trust"] for r in records] == ["split"] * 4 and records[0]["actual_score"] == 1.0
    assert cli(problems, write(tmp_path / "s.jsonl", old), "-o", first).returncode == 0  # goes on


def test_cli_scores_programs_that_read_stdin(tmp_path):
    tests = [{"input": "1 2\n", "output": "3\n"}, {"input": "4 5", "output": "9"}]
    problems = write(tmp_path / "p.jsonl", [{"task_id": "a", "tests": tests}])
    code = "a, b = map(int, input().split())\nprint(a + b)"
    samples = [
        {"task_id": "a", "response": f"```python\n{code}\n```"},
        {"task_id": "a", "response": "print(3)"},
    ]
    out = tmp_path / "o.jsonl"
    assert cli(problems, write(tmp_path / "s.jsonl", samples), "-o", out).returncode == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["status"], r["passed_tests"]) for r in records] == [("passed", 2), ("failed", 1)]


def test_cli_overwrites_nothing_of_others(tmp_path):
    problems, samples = write(tmp_path / "p.jsonl", PROBLEMS), write(tmp_path / "s.jsonl", SAMPLES)
    for content in (
        ["keep me\n"],
        [{"task_id": "a", "response": "other", "status": "passed"}],
        [SAMPLES[0] | {"status": "passed"}] * 5,
    ):
        out = write(tmp_path / "o.jsonl", content)
        kept = open(out).read()
        assert cli(problems, samples, "-o", out).returncode == 2 and open(out).read() == kept
    for args in (
        (problems, samples, "-o", samples),
        (problems, tmp_path / "none", "-o", tmp_path / "n"),
        (problems, samples, "-o", tmp_path / "no" / "folder"),
        (problems, samples),
        (problems, samples, "-o", "x", "--wat"),
    ):
        assert cli(*args).returncode == 2
    assert open(samples).read() == "".join(json.dumps(s) + "\n" for s in SAMPLES)


def test_cli_stopped_by_ctrl_c_keeps_what_it_has(tmp_path):
    slow = {"task_id": "s", "tests": ["import solution"], "prefix": "", "entry_point": None}
    problems = write(tmp_path / "p.jsonl", [slow])
    samples = write(
        tmp_path / "s.jsonl",
        [{"task_id": "s", "response": f"import time\ntime.sleep(0.05) # {i}"} for i in range(400)],
    )
    process = subprocess.Popen(
        [
            sys.executable,
            os.path.join(ROOT, "sandbox.py"),
            problems,
            samples,
            "-o",
            tmp_path / "o.jsonl",
            "--workers",
            "2",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    out = tmp_path / "o.jsonl"
    while process.poll() is None and not (out.exists() and out.read_text().count("\n") > 5):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    process.wait(5)
    assert (
        process.returncode == 130
        and time.monotonic() - began < 1.5
        and "Traceback" not in process.stderr.read()
    )
    lines = (tmp_path / "o.jsonl").read_text().splitlines()
    assert 5 < len(lines) < 400 and all(json.loads(line)["status"] == "passed" for line in lines)


def test_three_files_alone_are_enough(tmp_path):
    """A copy in another folder needs nothing else: no other file of ours, no package."""
    copy_sandbox(tmp_path)
    body = "import sandbox; print(sandbox.run('def f(): return 1', ['assert f() == 1']).status)"
    run = subprocess.run(
        [sys.executable, "-S", "-c", body], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.stdout == "passed\n", run.stderr


def test_bench_prints_its_table():
    tool = os.path.join(ROOT, "tools", "sandbox_bench.py")
    run = subprocess.run([sys.executable, tool, "nowhere", "1"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for row in ("floor", "one process", "split", "fresh interpreter"):
        assert row in run.stdout


# ---- as an ordinary user


def test_all_of_it_as_an_ordinary_user(tmp_path_factory):
    """The other sandbox tests again (honest programs, load and all) as user 1001, in a copy that this user may read; SANDBOX_USER=test runs the slow ones too."""
    if os.getuid() != 0:
        pytest.skip("this run is an ordinary user's already")
    if os.environ.get("SANDBOX_INNER"):
        pytest.skip("inner run")
    if not shutil.which("setpriv"):
        pytest.skip("no setpriv")
    user = ["setpriv", "--reuid", "1001", "--regid", "1001", "--clear-groups"]
    python = next(
        (
            p
            for p in (sys.executable, "/usr/bin/python3")
            if subprocess.run(
                [
                    *user,
                    p,
                    "-c",
                    "import sys, subprocess; sys.exit(sys.version_info < (3, 10) or subprocess.call([sys.executable, '-c', '']))",
                ],
                capture_output=True,
                cwd="/",
            ).returncode
            == 0
        ),
        None,
    )
    if not python:
        pytest.skip("no Python that an ordinary user may run")
    folder = "/tmp/sandbox-user-%d" % os.getpid()
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder + "/tests"), os.makedirs(folder + "/lib")
    try:
        copy_sandbox(folder)
        for name in os.listdir(os.path.join(ROOT, "tests")):
            if name.startswith(("test_sandbox_", "sandbox_peers")):
                shutil.copy(os.path.join(ROOT, "tests", name), folder + "/tests")
        for name in (
            "pytest",
            "_pytest",
            "pluggy",
            "iniconfig",
            "packaging",
            "pygments",
            "py",
        ):  # the user's Python may have none
            origin = getattr(__import__("importlib.util").util.find_spec(name), "origin", None)
            if origin and origin.endswith("__init__.py"):
                shutil.copytree(os.path.dirname(origin), f"{folder}/lib/{name}")
            elif origin:
                shutil.copy(origin, folder + "/lib")
        subprocess.run(["chmod", "-R", "a+rwX", folder])
        run = subprocess.run(
            [
                *user,
                python,
                "-m",
                "pytest",
                "-q",
                "-x",
                "-p",
                "no:cacheprovider",
                "tests",
                "-k",
                os.environ.get(
                    "SANDBOX_USER",
                    " and ".join(
                        "not " + n
                        for n in "wall_limit explode survives stop_signal one_second do_not_end crash frame flood fork_bomb gigabytes children CPU asleep torch bench cli ctrl_c canonical host killed".split()
                    ),
                ),
            ],
            cwd=folder,
            env={
                "SANDBOX_LOAD": "200",
                "PATH": os.environ["PATH"],
                "PYTHONPATH": f"{folder}:{folder}/lib",
                "SANDBOX_INNER": "1",
                "HOME": folder,
                "TMPDIR": "/tmp",
                "PYTEST_DEBUG_TEMPROOT": folder,
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
        print(run.stdout.strip().splitlines()[-1])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_workers_leave_the_warnings_of_the_caller_as_they_are():
    """Python's warnings.catch_warnings is not for threads; the odds of a clash are high here."""
    before, interval = list(warnings.filters), sys.getswitchinterval()
    code = "def f(): return 1"
    jobs = [{"code": code, "tests": [f"assert f() == 1 and {i} + 1"]} for i in range(600)]
    sys.setswitchinterval(1e-6)
    try:
        results = sandbox.run_many(jobs, 4)
    finally:
        sys.setswitchinterval(interval)
        after = list(warnings.filters)
        warnings.filters[:] = before
    assert after == before and all(result.passed for result in results)
