"""Run untrusted Python programs against tests. No program gets a pass that it has not earned.

    from sandbox import run, run_many
    run("def add(a, b): return a + b", ["assert add(1, 2) == 3"], entry_point="add").passed  # True

    python sandbox.py PROBLEMS.jsonl SAMPLES.jsonl -o OUT.jsonl  # the samples with their verdicts

The verdict is a reward, and a policy trained on it searches it for holes. So the tests never meet
the candidate:

    this file ── spawns a worker for each core, hands it one job at a time (sandbox.py)
        │
        ├──> Z  forks for each job, enforces its limits, ends what is left        (walls.py)
        ├──> J  holds the tests, asks U, compares: its word is the verdict        (judge.py)
        └──>      U  holds the candidate's code; what it says is data, never a verdict

Workers are spawned: a caller that holds a model is slow to fork. Tests that cannot be split run
beside the candidate, a weaker word: the Result says `trust="in_process"`. A test {"input": ...,
"output": ...} is one run of a whole program, which reads stdin; its stdout is compared here.

The three files stand alone: Linux 5.3, Python 3.11, and tqdm for the command line.
docs/sandbox.md says what holds and what not. Below the workers stands what the stages share: from a
response to a program, records, settings, token ids. Libraries are imported where they are needed.
"""

import ast
import atexit
import contextlib
import dataclasses
import functools
import gzip
import json
import marshal
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import judge
import walls

PATIENCE = 20  # seconds on top of four timeouts after which a worker that says nothing is replaced
MOST_SAID = 1 << 22  # bytes that a job may say of its tests
FAILURES = ("failed", "error", "timeout", "memory", "output", "syntax")
# From two threads at once, warnings.catch_warnings would leave the caller's filters changed.
PARSING = threading.Lock()


class Result(NamedTuple):
    status: str  # passed, or of the first test that did not: one of FAILURES
    passed: bool
    passed_tests: int  # counted on after a test that failed
    total_tests: int
    seconds: float  # CPU time of the candidate and its children
    stdout: str  # stdout and stderr
    error: str  # what went wrong first, one line
    trust: str  # split: the tests ran in a process that never held the candidate; or in_process


class Job(NamedTuple):
    code: str
    tests: list  # of statements, or of {"input": ..., "output": ...} if the program reads stdin
    setup: str = ""  # statements before the first test
    entry_point: str | None = None  # what `check` is called with
    timeout: float = 3.0  # CPU seconds, for each test of a program that reads stdin
    memory_mb: int = 512  # address space
    trust: str = "auto"  # split: refuse tests that cannot be split; in_process: split none


# ---------------------------------------- running programs


def run(code, tests, *, setup="", entry_point=None, timeout=3.0, memory_mb=512, trust="auto"):
    """Run one program against its tests. The arguments are the fields of Job."""
    job = Job(code, tests, setup, entry_point, timeout, memory_mb, trust)
    return run_many([job._asdict()], 1)[0]


def run_many(jobs, workers=None, on_result=None):
    """Run jobs (dicts of `run`'s arguments), `workers` at a time, by default one for each core.

    Returns: list of Result in the order of the jobs; on_result(index, result) is called in it, too,
    one call at a time, from a worker's thread. ValueError for a negative number of workers.
    """
    if (workers or 0) < 0:
        raise ValueError(f"workers is {workers}; it must be at least 0, which is one for each core")
    if MISSING is None:
        look_for_holes()
    jobs = [checked(Job(**job)) for job in jobs]
    todo, pool, lock = enumerate(jobs), Pool(), threading.Lock()
    results, errors, told = [None] * len(jobs), [], 0

    def work():
        nonlocal told
        try:
            for index, job in todo:
                stdin = isinstance(job.tests[0] if job.tests else "", dict)
                results[index] = (run_program if stdin else run_statements)(job, pool)
                with lock:
                    while on_result and told < len(jobs) and results[told]:
                        on_result(told, results[told])
                        told += 1
        except BaseException as error:
            errors.append(error)
            pool.stop()

    count = min(len(jobs), workers or os.cpu_count() or 1)
    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:  # Ctrl-C: no job goes on
        pool.stop()
        for thread in threads:
            thread.join(PATIENCE)
    if errors:
        raise errors[0]
    return results


def checked(job):
    texts = [job.code, job.setup, job.entry_point or ""]
    for test in job.tests:
        texts += [test["input"], test["output"]] if isinstance(test, dict) else [test]
    if isinstance(job.tests, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError("code, setup, entry_point and each of the tests are strings")
    if job.trust not in ("auto", "split", "in_process"):
        raise ValueError(f"trust is auto, split or in_process, not {job.trust!r}")
    return job


def run_statements(job, pool):
    """Run the tests beside the candidate if they need it, which J may be the first to find out."""
    count = len(job.tests)
    try:
        with PARSING:
            why, plan = judge.plan(job.setup, tuple(job.tests), job.entry_point)
        if not job.tests:
            raise ValueError("there are no tests")
        job.code.encode()  # half a surrogate pair is no program
    except Exception as error:
        return refused(count, f"the tests do not compile or are refused: {error}")
    while True:
        together = job.trust == "in_process" or bool(why) and job.trust == "auto"
        if why and not together:
            return refused(count, f"the tests cannot be split: they {why}")
        token = os.urandom(16).hex()
        kind = "one process" if together else "split"
        outcome = pool.run(kind, (job.code, token, *plan), job)
        why = outcome.last("one_process")
        if together or not why:
            return result_of(outcome, count, token, "in_process" if together else "split")


def refused(count, why):
    return Result("error", False, 0, count, 0.0, "", why, "split")


def result_of(outcome, count, token, trust):
    """The Result of a job from what J said of each test, and what Z says of the end."""
    found = [said for said in outcome.said if not isinstance(said, dict)]
    first = next((said for said in found if said != 1), None)
    broken = outcome.last("token") != token or len(found) != count
    failure = outcome.failure(first, broken)
    if not failure and not outcome.last("asked"):
        failure = "error", "the tests asked nothing of the candidate"
    status, error = failure or ("passed", "")
    held = sum(said == 1 for said in found[:count])
    return Result(status, not failure, held, count, outcome.seconds, outcome.output, error, trust)


def run_program(job, pool):
    """Run the program for each test. All together may take ten times the limit of one."""
    failure, held, seconds, stdout = None, 0, 0.0, ""
    try:
        inputs = [test["input"].encode() for test in job.tests]
    except (TypeError, ValueError) as reason:  # half a surrogate pair, or statements among them
        return refused(len(job.tests), f"the tests are refused: {reason}")
    for test, given in zip(job.tests, inputs):
        now = "timeout", "the tests together took too long"
        if seconds < 10 * job.timeout:
            with open(os.memfd_create("stdin"), "w+b") as stdin:
                stdin.write(given)
                outcome = pool.run("program", (job.code,), job, stdin)
            seconds += outcome.seconds
            stdout = stdout or outcome.output[: walls.KEEP_OUTPUT]
            now = outcome.failure(None, outcome.exit_status)
            if not now and not judge.same_output(test["output"], outcome.output):
                now = "failed", "the output is not the one expected"
        held += not now
        failure = failure or now
    status, error = failure or ("passed", "")
    return Result(status, not failure, held, len(job.tests), seconds, stdout, error, "split")


# ---------------------------------------- workers


@dataclasses.dataclass
class Outcome:
    """What came of a task: Z's report, and what J (or U) said, line by line."""

    reason: str  # ended, timeout, output; lost
    exit_status: int = 0  # of U
    judge_status: int = 0
    seconds: float = 0.0
    output: str = ""
    said: list = ()

    def last(self, key):
        return self.said[-1].get(key) if self.said and isinstance(self.said[-1], dict) else None

    def failure(self, said, broken):
        """(status, error) as J or U gives it, or of a job that is `broken` off; else None."""
        if said := self.last("failure") or said:
            status, error = said if isinstance(said, list) and len(said) == 2 else ("error", "")
            return status if status in FAILURES else "error", str(error)  # U can write anything
        if self.reason == "ended" and not broken:
            return None
        if self.reason == "lost":
            return "error", "the worker died three times"
        if self.reason in ("timeout", "output"):
            return self.reason, f"{'time' if self.reason == 'timeout' else 'output'} limit reached"
        if self.judge_status == signal.SIGXCPU:
            return "timeout", "the tests took too long over the candidate's values"
        if os.WIFSIGNALED(self.exit_status):
            return "error", f"ended by signal {os.WTERMSIG(self.exit_status)}"
        code = os.WEXITSTATUS(self.exit_status)
        return "error", f"ended with exit code {code} before its tests were done"


MISSING = None  # walls that this machine does not have, found out once by trying
IDLE = []  # workers at rest


class Pool:
    """The workers that one call of run_many uses."""

    def __init__(self):
        self.busy, self.stopped = set(), False

    def run(self, kind, data, job, stdin=None):
        """Run a task; if its worker dies, which is not the job's doing, on another one."""
        for _ in range(3):
            if self.stopped:
                raise SystemExit
            try:
                worker = IDLE.pop()
            except IndexError:
                worker = Worker()
            self.busy.add(worker)
            outcome = worker.run(kind, data, stdin, job.timeout, int(job.memory_mb))
            self.busy.remove(worker)
            if outcome:
                IDLE.append(worker)
                return outcome
            worker.end()
        return Outcome("lost")

    def stop(self):
        """End the jobs that are running, and start none."""
        self.stopped = True
        for worker in list(self.busy):
            with contextlib.suppress(OSError):
                worker.control.shutdown(socket.SHUT_RDWR)


# One arena: each thread would reserve 64 MB of address space for one of its own.
ENVIRONMENT = {"LD_BIND_NOW": "1", "PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}
ENVIRONMENT |= {"OPENBLAS_NUM_THREADS": "1"}


class Worker:
    """S and Z, spawned once and kept (never forked: a process that holds torch forks slowly)."""

    namespaces = None  # whether they work here: found out by the first worker, and kept to

    def __init__(self):
        if not sys.platform.startswith("linux"):
            raise RuntimeError("sandbox.py needs Linux")
        self.take_core()
        known = Worker.namespaces
        for namespaces in [True, False] if known is None else [known, known]:
            if self.spawn(namespaces):
                Worker.namespaces = namespaces
                return
            self.process.wait()
        raise RuntimeError("the sandbox's worker does not start")

    def take_core(self):
        """Z, J and U take turns: on one core, since waking another costs more.

        The name keeps other workers off it, but not another container's: hence the random order.
        """
        self.core = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.cores = os.sched_getaffinity(0)
        for core in sorted(self.cores, key=lambda core: os.urandom(8)):
            with contextlib.suppress(OSError):
                self.core.bind(f"\0sandbox.py on core {core}")
                self.cores = {core}
                return  # where all are taken, it runs where the kernel puts it

    def spawn(self, namespaces):
        """Returns whether Z is ready."""
        self.control, theirs = socket.socketpair()
        folder = os.path.dirname(os.path.abspath(__file__))
        site = [p for p in sys.path if "site-packages" in p or "dist-packages" in p]
        arguments = f"{theirs.fileno()}, {namespaces}, {site}, {self.cores}"
        code = f"import sys; sys.path[:1] = [{folder!r}]; import walls; sys.path[:1] = []\n"
        code += f"sys.path += {site}; walls.serve({arguments})"
        # In a session of its own: Ctrl-C is for the caller. Symbols are bound before the forks.
        self.process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-X", "utf8", "-X", "int_max_str_digits=0", "-c", code],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            # A pipe that nobody reads, as U's will be: Python asks at its start where one can seek.
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd="/",
            env=ENVIRONMENT,
        )
        theirs.close()
        self.process.stdout.close()
        self.reports = self.control.makefile("rb", 1 << 16)
        line = self.reports.readline()
        self.layers = json.loads(line) if line else None
        return bool(line)

    def run(self, kind, data, stdin, timeout, memory_mb):
        """Hand a task to Z, with sockets that Z gives to J and U and never reads.

        Returns: the Outcome, or None when the worker has died.
        """
        line, *ends = socket.socketpair()
        if kind == "split":  # U finds its program, as far as it fits, and J hands on the rest
            ends += socket.socketpair()
            code = judge.encoded(data[0])
            sent = ends[1].send(code, socket.MSG_DONTWAIT)
            data = (code[sent:], *data[1:])
        data = marshal.dumps(data)
        self.control.settimeout(4 * timeout + PATIENCE)
        line.setblocking(False)
        with line:
            fds = [end.fileno() for end in ends]
            if stdin:
                stdin.seek(0)
                fds.append(stdin.fileno())
            head = marshal.dumps([kind, timeout, memory_mb, len(data)])
            try:
                sent = line.send(data)  # what fits is there before J asks for it
                socket.send_fds(self.control, [head], fds)
                for end in ends:
                    end.close()
                line.settimeout(PATIENCE)
                with contextlib.suppress(ConnectionError):  # U has died before it took the job
                    line.sendall(data[sent:])
                said = self.listen(line, 4 * timeout + PATIENCE)
                *report, size = json.loads(self.reports.readline())
                output = self.reports.read(size)
            except (OSError, ValueError):
                return None
            if len(output) < size:
                return None
            return Outcome(*report, output.decode("utf-8", "replace"), said)

    def listen(self, line, seconds):
        """All that is said until Z reports: a value for each line, none where one is no JSON."""
        said, report = bytearray(), select.poll()
        report.register(self.control, select.POLLIN)
        line.setblocking(False)
        for _ in range(int(50 * seconds)):
            over = report.poll(20)  # milliseconds: the line has room for the words of 278 tests
            with contextlib.suppress(OSError):
                while len(said) < MOST_SAID and (part := line.recv(1 << 16)):
                    said += part
            if over:
                break
        try:
            return [json.loads(text) for text in said.split(b"\n")[:-1]]
        except (ValueError, RecursionError):
            return []

    def end(self):
        """End the worker: Z sees that its caller has gone, and S that Z has."""
        self.close()
        try:
            self.process.wait(1)  # S removes its scratch
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def close(self):
        for thing in (self.reports, self.control, self.core):
            thing.close()


# A wall, and a program that gets to its end only where that wall is missing.
PROBES = {
    "reading files outside": "open(outside + '/secret')",
    "writing files outside": "open(outside + '/new', 'w')",
    "modes and times of files outside": "os.chmod(outside + '/secret', 0o600)",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', port), 1)",
    "host sockets": "import socket\na, b = socket.socketpair(1, 2)\na.sendto(b'x', path)",
    "signals to other processes": "os.kill(caller, 0)",
    "root's rights": "assert os.getuid() == 0",
    "capabilities": "import ctypes, struct\nheld = ctypes.create_string_buffer(24)\n"
    "ctypes.CDLL(None).capget(struct.pack('<Ii', 0x20080522, 0), held)\nassert any(held.raw)",
    "memory": "bytearray(1 << 30)",
    "memory in files without a name": "os.memfd_create('x')",
    "new namespaces": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "number of processes": "for _ in range(300):\n    if os.fork() == 0: os._exit(0)",
    "processes that leave their group": "assert os.getppid() > 1  # no PID namespace\n"
    "if os.fork() == 0: os.setsid(), os._exit(0)\nassert os.wait()[1] == 0",
}


def look_for_holes():
    """Let candidates try to break each wall, and say once what stood open."""
    global MISSING
    MISSING = []
    os.register_at_fork(after_in_child=forget_workers)
    host = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener = socket.create_server(("127.0.0.1", 0))
    with tempfile.TemporaryDirectory() as outside, host, listener:
        Path(outside, "secret").touch()
        host.bind(outside + "/socket")
        for path in (outside, outside + "/secret", outside + "/socket"):
            os.chmod(path, 0o777)
        known = f"import os\noutside, port = {outside!r}, {listener.getsockname()[1]}\n"
        known += f"path, caller = {outside + '/socket'!r}, {os.getpid()}\ndef probe():\n"
        codes = [known + textwrap.indent(probe, "    ") for probe in PROBES.values()]
        jobs = [{"code": code, "tests": ["probe()"], "entry_point": "probe"} for code in codes]
        results = run_many(jobs, 1)
    MISSING = [name for name, result in zip(PROBES, results) if result.passed]
    if not IDLE or not IDLE[0].layers["namespaces"]:
        MISSING.append("namespaces")
    if MISSING:
        print("sandbox: not enforced on this machine: " + ", ".join(MISSING), file=sys.stderr)


def forget_workers():
    """In a fork of the caller: the workers are the caller's."""
    while IDLE:
        IDLE.pop().close()


@atexit.register
def close():
    """End the idle workers. They also end by themselves when the caller does."""
    while IDLE:
        IDLE.pop().end()


# ---------------------------------------- from a response to a program

FENCE = re.compile(r"(?m)^(?P<before>.*?)(?P<mark>`{3,}|~{3,})[ \t]*(?P<language>[\w+#.-]*)[ \t]*$")
PYTHON = ("", "python", "python3", "py", "py3")
TAG = re.compile(r"^\[/?[A-Z]+\][ \t]*$", re.M)  # [PYTHON], [BEGIN] and [DONE] around code


def program(problem, response):
    """The candidate's program: the one place where code is taken out of a response. Never raises.

    What is right for a person who reads the response is right here: fences in every form, several
    blocks, a body that goes on from the prefix or a whole function, words around code.
    """
    name = judge.first_name(problem.get("entry_point"))
    prefix = re.sub("\r\n?", "\n", problem.get("prefix") or "")
    text = re.sub("\r\n?", "\n", response.split("</think>", 1)[-1].replace("\ufeff", ""))
    fence = FENCE.search(text)
    text = text if fence else TAG.sub("", text)
    is_body = text.lstrip("\n")[:1] in (" ", "\t")
    if is_body and name:  # then perhaps comes the next problem's code
        again = re.search(rf"^(?:async def|def|class) {re.escape(name)}\b", text, re.M)
        if again and (whole := assemble(prefix, text[: again.start()], name)):
            return whole
    if whole := assemble(prefix, text, name):  # code and nothing else
        return whole
    head = text[: fence.start("mark")] if fence else ""  # code, a lone closing fence, and words
    is_code = is_body or looks_defined(head, name) or re.search(r"^[ \t]*return\b", head, re.M)
    if is_code and (whole := assemble(prefix, head, name)):
        return whole
    blocks = [code for language, code in code_blocks(text) if language.lower() in PYTHON]
    blocks = list(filter(str.strip, blocks))
    right = [(whole, code) for code in blocks if (whole := assemble(prefix, code, name))]
    if right:
        # A block that defines the entry point itself comes before one that could be its body.
        last = right[0 if name else -1]
        whole, code = next((pair for pair in reversed(right) if answers(pair[1], name)), last)
        return with_helpers(whole, [block for block in blocks if block is not code])
    likely = [block for block in reversed(blocks) if looks_defined(block, name)] or blocks
    likely = [*likely[:1], FENCE.sub(r"\g<before>\n", text)]  # a fence may only end the code
    found = (longest_program(prefix, code, name) for code in likely)
    return next(filter(None, found), prefix + likely[0])


def code_blocks(text):
    """(language, code) of each fenced block of a response.

    A block ends at the first closing fence up to which it is Python, since a docstring may hold
    fences, or else at the first.
    """
    lines, blocks, last = text.split("\n"), [], -1
    fences = {n: fence for n, line in enumerate(lines) if (fence := FENCE.match(line))}
    closing = {n: fence["mark"] for n, fence in fences.items() if not fence["language"]}
    for start, fence in fences.items():
        if start <= last or len(blocks) == 50:
            continue
        ends = [n for n, mark in closing.items() if n > start and mark.startswith(fence["mark"])]
        ends = ends[:20] or [len(lines)]
        bodies = [block_body(lines, start + 1, end, fence["before"]) for end in ends]
        chosen = next((i for i, body in enumerate(bodies) if parses(body)), 0)
        blocks.append((fence["language"], bodies[chosen]))
        last = ends[chosen]
    return blocks


def block_body(lines, start, end, before):
    """The lines of a block without the indent of its fence; the last may hold the end fence."""
    body = lines[start:end]
    if end < len(lines) and (last := FENCE.match(lines[end])["before"]).strip():
        body.append(last)
    indent = len(before) if re.fullmatch(r"[ \t]*([-*+]|\d+[.)])?[ \t]*", before) else 0
    body = [line[min(indent, len(line) - len(line.lstrip(" \t"))) :] for line in body]
    return "\n".join(body) + "\n"


def parses(code):
    """Whether this is Python: as it stands, or as a body."""
    return error_line(textwrap.dedent(code)) > code.count("\n")


@functools.lru_cache(maxsize=16)
def parse(code):
    """The syntax tree of code that compiles; a `return` outside of a function parses."""
    with PARSING, warnings.catch_warnings(action="ignore"):
        try:
            compile(code, "solution.py", "exec", dont_inherit=True)
            return ast.parse(code)
        except Exception:
            return None


def names_of(node):
    """The names that a statement at the top of a module binds."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return {node.name}
        case ast.Assign() | ast.AnnAssign(value=ast.AST()):
            targets = getattr(node, "targets", None) or [node.target]
            return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        case ast.Import() | ast.ImportFrom():
            return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return set()


def source(node):
    """The text of a statement, or none if it is nested too deep for Python to write it."""
    try:
        return ast.unparse(node)
    except RecursionError:
        return ""


def is_stub(node):
    """A function that does nothing: a docstring, `...`, imports; a class with such functions only.

    The prefix of many problems is one, and parses before anything has been answered.
    """
    if isinstance(node, ast.ClassDef):
        methods = [n for n in node.body if isinstance(n, judge.FUNCTION)]
        return bool(methods) and all(map(is_stub, methods))
    does = (ast.Call, ast.Yield, ast.YieldFrom, ast.Await)
    nothing = (ast.Pass, ast.Import, ast.ImportFrom)
    body = [n for n in getattr(node, "body", [node]) if not isinstance(n, nothing)]
    idle = [n for n in body if isinstance(n, ast.Expr)]
    return idle == body and not any(isinstance(x, does) for n in idle for x in ast.walk(n))


def defines(code, name):
    """Whether code parses and binds this name at its top; without a name, does anything."""
    tree = parse(code)
    if tree is None:
        return False
    if name:
        found = [node for node in tree.body if name in names_of(node)]
        return bool(found) and not is_stub(found[-1])
    does = [n for n in tree.body if not isinstance(n, ast.Expr) or isinstance(n.value, ast.Call)]
    return bool(does)


def answers(code, name):
    """Whether a block is an answer of its own, not an example of its use or a part of it."""
    if not defines(code, name):
        return False
    body = parse(code).body
    if not name:
        read = judge.loaded(body)
        writes, reads = read & {"print", "sys", "os"}, read & {"input", "open", "sys", "os"}
        return writes and reads and not all(map(names_of, body))
    last = [node for node in body if name in names_of(node)][-1]
    return name not in judge.loaded([getattr(last, "value", last)])  # not `f = cache(f)`


def looks_defined(code, name):
    """The same as `defines`, for code that may not parse."""
    name = re.escape(name) if name else r"\w+"
    start = rf"(?:async[ \t]+def|def|class)[ \t]+{name}\b|{name}[ \t]*(?::[^=\n]+)?=(?!=)"
    return re.search(rf"^(?:{start})", code, re.M) is not None


@functools.lru_cache(maxsize=4096)
def complete_part(prefix):
    """The longest run of leading lines that is complete: imports, helpers, no stub at its end."""
    lines = prefix.splitlines(keepends=True)
    for end in range(len(lines), 0, -1):
        if tree := parse("".join(lines[:end])):
            last = tree.body[-1] if tree.body else None
            if isinstance(last, judge.DEFINITIONS) and is_stub(last):
                end = min(n.lineno for n in [last, *last.decorator_list]) - 1
            return "".join(lines[:end]).rstrip("\n") + "\n" * (end > 0)
    return ""


def forms(prefix, code, name):
    """The ways in which code can go on from the prefix, the likely ones first."""
    if code[:1] in " \t":  # it brings the indent in which the prefix ends
        prefix = prefix.rstrip(" \t")
    start = complete_part(prefix)
    rest = prefix[len(start) :]
    body = textwrap.dedent(code)
    header = re.search(r"^class\b.*:[ \t]*\n", rest, re.M)
    method = re.findall(r"^[ \t]+(?:async )?def (\w+)", rest, re.M)[-1:]
    methods = re.search(r"^(?:async )?def \w+\(self\b", body, re.M)
    if header and (looks_defined(body, method[0]) if method else methods):
        yield start + in_class(rest[: header.end()], body, name)
    elif name and methods and not (looks_defined(body, name) or looks_defined(prefix, name)):
        yield start + in_class(f"class {name}:\n", body, name)
    if looks_defined(body, name) or not prefix:
        yield start + (code if looks_defined(code, name) else body)
    yield prefix + code  # its body
    if re.match(r"( +)\S(?s:.*)\n\1 \S", code):  # some tokenizers drop a blank at the start
        yield f"{prefix} {code}"
    indents = {len(line) - len(line.lstrip(" ")) for line in rest.splitlines() if line.strip()}
    for indent in {max(indents, default=0) + 4: 0, 4: 0}:
        yield prefix.rstrip() + "\n" + textwrap.indent(body, " " * indent)
        yield prefix.rstrip() + "\n" + " " * indent + code  # the answer has been stripped


def in_class(header, code, name):
    """Methods below the header of their class; what has no `self` before it or behind it."""
    before = methods = behind = ""
    for node in getattr(parse(code), "body", ()):
        text = source(node) + "\n"
        if isinstance(node, judge.FUNCTION) and "self" in [a.arg for a in node.args.args]:
            methods += text
        elif names_of(node) and name not in judge.loaded([node]):
            before += text
        else:
            behind += text
    return before + header + textwrap.indent(methods or code, "    ") + behind


def assemble(prefix, code, name):
    """The first form of prefix and code that defines the entry point, or None."""
    found = map(hoist, forms(prefix, code, name)) if code.strip() else ()
    whole = next((form for form in found if defines(form, name)), None)
    return whole and without_words(whole)


def without_words(code):
    """Code without lines of one word, such as `Explanation`, that would only be a NameError."""
    known = {name for node in parse(code).body for name in names_of(node)}
    lines = code.split("\n")
    for node in parse(code).body:
        word = isinstance(node, ast.Expr) and getattr(node.value, "id", None)
        if word and word not in known:
            lines[node.lineno - 1] = lines[node.lineno - 1].replace(word, "", 1)
    return "\n".join(lines)


FUTURE = re.compile(r"^from __future__ import (?:\([^)]*\)|.*)$", re.M)


def hoist(code):
    """`from __future__` has to stand first."""
    futures = FUTURE.findall(code)
    return "\n".join([*futures, FUTURE.sub("", code)]) if futures else code


def with_helpers(code, blocks):
    """Code with the imports, functions, classes and constants that only the other blocks have."""
    wanted, have = judge.global_names([code])
    nodes = [node for block in blocks if parse(block) for node in parse(block).body]
    for node in reversed(nodes):
        if names_of(node) & wanted - have:
            helper = source(node)
            used, bound = judge.global_names([helper])
            wanted, have = wanted | used, have | bound
            code = hoist(f"{helper}\n{code}")
    return code


def longest_program(prefix, code, name):
    """The longest run of whole statements that defines the entry point: words around it go.

    Nothing goes out of the middle of a function: what does not compile there is not right.
    """
    if len(code) > 20_000:
        return None
    lines = code.split("\n")
    first, starts, before = re.compile(r"(def|class|import|from|async def)\b|@|\w+ *="), [], ""
    for number, line in enumerate(lines):
        body = name and line.strip() and line[:1].isspace() > before[:1].isspace()
        if first.match(line) or body:  # the first indented line, not those behind it
            starts.append(number)
        before = line if line.strip() else before
    named = [number for number, line in enumerate(lines) if looks_defined(line, name)]
    for start in dict.fromkeys([0, *starts[:2], *named[:1]]):
        indent = len(lines[start]) - len(lines[start].lstrip(" \t")) or 1  # of a body
        tops = [n for n in range(start + 1, len(lines)) if lines[n][:indent].strip()]
        end = len(lines)
        for _ in range(20):  # up to the first statement that is no Python, as the parser sees it
            part = "\n".join(lines[start:end]) + "\n"
            if whole := assemble(prefix, part, name):
                return whole
            size = part.count("\n")
            reach = max(error_line(f) - f.count("\n") + size for f in forms(prefix, part, name))
            end = max((n for n in tops if n < end and n <= start + reach - 1), default=0)
            if end <= start:
                break


def error_line(code):
    """The line up to which this is Python, for the parser; it also takes a body, with `return`."""
    try:
        with PARSING, warnings.catch_warnings(action="ignore"):
            ast.parse(code)
    except Exception as error:
        return getattr(error, "lineno", None) or 0
    return code.count("\n") + 1


# ---------------------------------------- records: problems and samples as JSONL


def fail(message):
    """Bad input: one line that says what to do, exit code 2."""
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_jsonl(path, fields, unique=(), check=None):
    """Read the records of a JSONL file; refuse what cannot be used, with file, line and field.

    Blank lines, a BOM, CRLF, extra fields and .gz are accepted.

    Args:
        fields: {name: type or tuple of types}; any other type or no such field is refused,
            except that a field which may be None may also be absent.
        unique: names of fields whose values, taken together, must not repeat.
        check: called with each record and its place, to refuse it for other reasons.
    Returns: list of dicts, at least one.
    """
    records, seen = [], {}
    for place, text in _lines(path):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            fail(f"{place}: not JSON ({error}); repair or delete the line")
        if not isinstance(record, dict):
            fail(f"{place}: not a JSON object; repair or delete the line")
        for item in record.items():
            try:
                json.dumps(item, ensure_ascii=False).encode()
            except (RecursionError, UnicodeEncodeError) as error:  # half of a surrogate pair
                fail(f"{place}: field {item[0]!a} cannot be written ({error}); repair it")
        for name, types in fields.items():
            value = record.setdefault(name, None)
            allowed = types if isinstance(types, tuple) else (types,)
            if not isinstance(value, allowed) or isinstance(value, bool) and bool not in allowed:
                fail(f"{place}: field '{name}' is missing or has the wrong type")
        key = tuple(record[name] for name in unique)
        if unique and seen.setdefault(key, place) != place:
            fail(f"{place}: field '{unique[0]}' repeats {key[0]!r} of {seen[key]}")
        if check:
            check(record, place)
        records.append(record)
    if not records:
        fail(f"{path} is empty; write at least one record to it")
    return records


def _lines(path):
    """(place, text) of each line of a UTF-8 file that is not blank."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            lines = file.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except FileNotFoundError:
        fail(f"{path} does not exist; run the stage that writes it first (README)")
    except (OSError, EOFError, zlib.error) as error:
        fail(f"{path} cannot be read ({error})")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", line.decode()
            except UnicodeDecodeError as error:
                fail(f"{path}, line {number}: not UTF-8 ({error}); save the file as UTF-8")


TEXT = (str, type(None))
TESTED = {"prefix": TEXT, "setup": TEXT, "entry_point": TEXT, "tests": list}


def read_problems(path):
    """Problems to test programs with: every field filled, unique ids, tests that can be run.

    A test is a string of statements, or {"input": ..., "output": ...} if a program reads stdin.
    """

    def check(problem, place):
        check_tests(problem, place)
        if not problem["prompt"]:
            fail(f"{place}, task_id {problem['task_id']!r}: field 'prompt' is empty")

    fields = {"task_id": str, "prompt": str, "solution": TEXT} | TESTED
    return read_jsonl(path, fields, ["task_id"], check)


def check_tests(problem, place):
    """Refuse a problem whose tests cannot be run, and put "" for a prefix or setup of null."""
    place = f"{place}, task_id {problem['task_id']!r}"
    problem["prefix"] = problem["prefix"] or ""
    problem["setup"] = problem["setup"] or ""
    if not problem["tests"]:
        fail(f"{place}: field 'tests' is empty, so nothing could pass; add one or drop the problem")
    for test in problem["tests"]:
        stdin = isinstance(test, dict) and all(
            isinstance(test.get(name), str) for name in ("input", "output")
        )
        if not stdin and not (isinstance(test, str) and test.strip()):
            fail(f"{place}: field 'tests' holds neither statements nor an input and output")
    if len({type(test) for test in problem["tests"]}) > 1:
        fail(f"{place}: field 'tests' holds statements and inputs; a problem has one kind")


def write_jsonl(path, records):
    """Write records to a JSONL file, whole or not at all: a temporary file takes its place."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def verdict(result):
    """The fields that a sample's record takes from its Result."""
    return {
        "actual_score": float(result.passed),
        "passed_tests": result.passed_tests,
        "total_tests": result.total_tests,
        "status": result.status,
        "trust": result.trust,
    }


def job_of(problem, response, **options):
    """The job, as `run_many` takes it, of a response to a problem."""
    given = {name: problem[name] for name in ("tests", "setup", "entry_point")}
    return {"code": program(problem, response)} | given | options


def run_tests(problems, responses, *, timeout=3.0, workers=0, progress=None):
    """Run responses against the tests of their problems, identical programs once.

    Args:
        problems: the problem of each response (as `read_problems` gives them); responses: texts.
        timeout: CPU seconds per program; workers: sandbox processes, 0 for one per core.
        progress: label of a tqdm bar, or None for silence.
    Returns: list of Result, in order.
    """
    jobs, keys = {}, []
    for problem, response in zip(problems, responses, strict=True):
        job = job_of(problem, response, timeout=timeout)
        keys.append((problem["task_id"], job["code"]))
        jobs[keys[-1]] = job
    with progress_bar(len(jobs), progress) as bar:
        results = run_many(list(jobs.values()), workers, lambda index, result: bar.update())
    results = dict(zip(jobs, results))
    return [results[key] for key in keys]


# ---------------------------------------- what a stage has finished

# Flags that change no result: a finished stage may be run again with other values of these.
FREE_FLAGS = {
    "gradient_checkpointing",
    "micro_batch_size",
    "resume",
    "score_batch_size",
    "threads",
    "workers",
}


def check_numbers(cfg):
    """Refuse, before any work, numbers with which nothing could run or be learned."""
    positive = ("beta", "epochs", "iterations", "kl_target", "layers", "max_grad_norm")
    positive += ("rounds", "temperature", "timeout")
    counts = ("_size", "_every", "_iteration", "_prompt", "_responses", "_tokens")
    shares = ("gamma", "label_noise", "lam", "warmup")
    for name, value in dataclasses.asdict(cfg).items():
        if not isinstance(value, (int, float)):
            continue
        if name in ("top", "bottom"):
            good, rule = abs(value) < float("inf"), "finite"
        elif name == "seed":  # it is multiplied by a million, for PyTorch's 64 bits
            good, rule = 0 <= value < 1 << 32, f"at least 0 and below {1 << 32}"
        elif name in positive or name.endswith(counts):
            good, rule = 0 < value < float("inf"), "above 0"
        elif name in shares:
            good, rule = 0 <= value <= 1, "from 0 to 1"
        else:
            good, rule = 0 <= value < float("inf"), "at least 0"
        if not good:  # nan, too
            fail(f"--{name} {value}: it must be {rule}")


@contextlib.contextmanager
def one_line_error(what):
    """Refuse what transformers cannot load, with the first line of its reason."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        fail(f"{what}: {reason}")


def check_model(path, policy=False):
    """Refuse, before any work, a path without a model; with `policy`, a reward model, too."""
    from transformers import PreTrainedConfig

    ours = Path(path).exists() or str(path).startswith(("/", ".", "out/"))  # no name on the hub
    whole = (Path(path) / "config.json").is_file()
    if ours and (not whole or (Path(path) / "adapter_config.json").is_file()):
        fail(f"no model at {path}: run its stage first, or merge LoRA adapters")
    with one_line_error(f"no model at {path}"):
        config, _ = PreTrainedConfig.get_config_dict(path)
    if policy and "ForSequenceClassification" in str(config.get("architectures")):
        fail(f"{path} is a reward model, where a policy is needed")


def finished(cfg, directory, resume=False):
    """True if `directory` holds this stage's output made with these settings; others are refused.

    `stage_config.json` is the last file that a stage writes, so it marks the output as complete.
    `state_config.json` stands beside the saved state of a run that --resume can go on with.
    """
    directory, advice = Path(directory), "delete it or choose another --out"
    if not directory.exists():
        parent = next(parent for parent in directory.absolute().parents if parent.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            fail(f"{directory} cannot be written; choose another --out")
        return False
    marks = [directory / name for name in ("stage_config.json", "state_config.json")]
    complete, resumable = (mark.is_file() for mark in marks)
    if not complete and not (resumable and resume):
        resuming = "add --resume to go on, or " if resumable else ""
        fail(f"{directory} holds no finished run; {resuming}{advice}")
    mark = marks[0 if complete else 1]
    try:
        old = dict(json.loads(mark.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        fail(f"{mark} is damaged; delete {directory} or choose another --out")
    new = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in FREE_FLAGS}
    if not new.keys() <= old.keys():
        fail(f"{directory} is of another stage or version; {advice}")
    changed = [f"{k} was {old[k]!r}, now {v!r}" for k, v in new.items() if old[k] != v]
    if changed:
        fail(f"{directory} was made with other settings ({'; '.join(changed)}); {advice}")
    if complete:
        drop_state(directory)
        print(f"{directory} is finished; delete it to run this stage again")
    return complete


def drop_state(directory):
    """Delete what --resume goes on from: of no use when the stage is finished."""
    names = ("samples.jsonl", "validation_samples.jsonl", "config.json")
    for name in ("state.pt", "state.tmp", *(f"state_{name}" for name in names)):
        (directory / name).unlink(missing_ok=True)


def save_config(cfg, directory, name="stage_config.json"):
    """Save the settings beside the output: as a rule the mark that it is complete."""
    text = json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"
    temporary = Path(directory) / "stage_config.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(Path(directory) / name)
    if name == "stage_config.json":
        drop_state(Path(directory))


def sample_record(problem, response, result, **others):
    """A sample as it is saved: the task, the response, its verdict, and what else is known."""
    asked = {"task_id": problem["task_id"], "prompt": problem["prompt"]}
    return asked | {"response": response} | verdict(result) | others


def plot_curves(metrics, path, panels):
    """Draw the course of a run: {heading of a panel: names of the metrics in it}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    for axis, (heading, names) in zip(figure.subplots(1, len(panels)), panels.items()):
        for name in names:
            lines = [line for line in metrics if line.get(name) is not None]
            steps = [line["iteration"] for line in lines]
            axis.plot(steps, [line[name] for line in lines], ".-", label=name)
        axis.set(title=heading, xlabel="iteration")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def progress_bar(total, label, unit="it"):
    """A tqdm bar that stays away from what takes less than three seconds; label None: no bar.

    In a log file it moves every half minute: a real model samples for minutes.
    """
    from tqdm import tqdm  # not at the top: run and run_many need the standard library only

    interval = 1 if sys.stderr.isatty() else 30
    pace = {"delay": 3, "mininterval": interval, "maxinterval": max(interval, 10)}
    return tqdm(total=total, desc=label, leave=False, disable=label is None, unit=unit, **pace)


# ---------------------------------------- prompts and responses as token ids


def load_tokenizer(path, plain=False, policy=False):
    """A tokenizer whose EOS closes a response and whose pad token is another.

    A chat template may close a turn with another token than the tokenizer's EOS (ChatML
    <|im_end|>, Gemma <end_of_turn>). An instruction-tuned model emits that one, so it becomes the
    EOS. A pad token equal to EOS would hide the EOS that we train.

    Args:
        plain: drop the chat template, in saved copies, too.
        policy: refuse a reward model.
    """
    from transformers import AutoTokenizer

    check_model(path, policy)
    with one_line_error(f"no tokenizer at {path}"):
        tokenizer = AutoTokenizer.from_pretrained(path)
    if plain:
        tokenizer.chat_template = None
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "QUESTION"}]
        chat.append({"role": "assistant", "content": "RESPONSE"})
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False)
            prompt = tokenizer.apply_chat_template(
                chat[:1], tokenize=False, add_generation_prompt=True
            )
            if "QUESTION" not in prompt or "RESPONSE" not in text:
                raise ValueError("it does not show every message")
        except Exception as error:  # templates raise what they like
            fail(f"the chat template of {path} refuses a plain question ({error})")
        behind = tokenizer(text.rpartition("RESPONSE")[2], add_special_tokens=False).input_ids
        special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
        closing = [i for i in behind if i in special]
        if closing:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(closing[0])
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "<|pf_ppo_pad|>"})
    return tokenizer


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt up to the first response token, by the chat template if there is one.

    BOS comes from one place only, the template or the tokenizer. An EOS that the tokenizer appends
    is removed, since the response follows.
    """
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        # Llama 3 would write today's date into each prompt: the RM would see others tomorrow.
        return tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False, date_string="26 Jul 2024"
        )
    ids = tokenizer(prompt).input_ids
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_prompts(tokenizer, problems, max_new_tokens, model_config):
    """Token ids of the prompts; one that leaves no room for a response is refused."""
    prompts = [encode_prompt(tokenizer, problem["prompt"]) for problem in problems]
    context = getattr(model_config, "max_position_embeddings", None) or 10**9
    for problem, ids in zip(problems, prompts):
        if len(ids) + max_new_tokens > context:
            fail(
                f"the prompt of {problem['task_id']} has {len(ids)} tokens: with --max_new_tokens "
                f"{max_new_tokens} that exceeds the model's context of {context}"
            )
    return prompts


def encode_response(tokenizer, response):
    """Token ids of a response with its EOS, as they continue a prompt.

    SentencePiece tokenizers put a space before a text, but not behind a line break.
    """
    ids = tokenizer(response, add_special_tokens=False).input_ids
    if decode_response(tokenizer, ids) == " " + response:
        start = tokenizer("\n", add_special_tokens=False).input_ids
        ids = tokenizer("\n" + response, add_special_tokens=False).input_ids[len(start) :]
    return ids + [tokenizer.eos_token_id]


def decode_response(tokenizer, ids):
    """The text of a response without its EOS, as it continues a prompt.

    SentencePiece tokenizers drop a space at the start of a text: of "    return x" three would be
    left, and no program would run. After a line break they keep all spaces.
    """
    ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    start = tokenizer("\n", add_special_tokens=False).input_ids
    text = tokenizer.decode(start + ids, clean_up_tokenization_spaces=False)
    return text.removeprefix("\n")


# ---------------------------------------- command line

VERDICT = ("actual_score", "passed_tests", "total_tests", "status", "trust")


def score_file(args):
    """Append each sample with its verdict to the output, behind those of an earlier run."""
    fields = {"task_id": (str, int)} | TESTED
    problems = read_jsonl(args.problems, fields, ["task_id"], check_tests)
    problems = {problem["task_id"]: problem for problem in problems}
    samples = read_jsonl(args.samples, {"task_id": (str, int), "response": str})
    for number, sample in enumerate(samples, 1):
        if sample["task_id"] not in problems:
            fail(f"{args.samples}, sample {number}: field 'task_id' is not in {args.problems}")
    start, end = scored_already(args.output, samples)
    options = {"trust": args.trust, "timeout": args.timeout, "memory_mb": args.memory_mb}
    jobs = [job_of(problems[s["task_id"]], s["response"], **options) for s in samples[start:]]
    if not jobs:
        return
    try:
        out = open(args.output, "a", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        fail(f"{args.output}: cannot be written ({error})")
    with out, progress_bar(len(jobs), "sandbox") as bar:
        out.truncate(end)

        def on_result(index, result):
            out.write(json.dumps(samples[start + index] | verdict(result)) + "\n")
            out.flush()
            bar.update()

        run_many(jobs, args.workers, on_result)


def scored_already(path, samples):
    """How many samples an earlier run has written, and the size of their lines."""
    count, size = 0, 0
    lines = Path(path).read_bytes().splitlines(keepends=True) if os.path.isfile(path) else []
    for line in lines:
        if not line.endswith(b"\n"):
            break  # cut off: written again
        try:
            record = json.loads(line)
            same = record == samples[count] | {name: record[name] for name in VERDICT}
        except (ValueError, LookupError, AttributeError, TypeError):
            same = False
        if not same:
            fail(f"{path}, line {count + 1}: not the result of this sample; name another file")
        count, size = count + 1, size + len(line)
    return count, size


def main():
    import argparse

    parser = argparse.ArgumentParser(description="Score samples by the tests of their problems.")
    add = parser.add_argument
    add("problems", metavar="PROBLEMS.jsonl")
    add("samples", metavar="SAMPLES.jsonl")
    add("-o", "--output", metavar="OUT.jsonl", required=True, help="an interrupted run goes on")
    add("--workers", type=int, help="programs at a time; default: the number of cores")
    add("--timeout", type=float, default=3.0, help="CPU seconds per program")
    add("--memory_mb", type=int, default=512, help="address space of a program")
    trusts = ["auto", "split", "in_process"]
    add("--trust", choices=trusts, default="auto", help="split: refuse the others")
    args = parser.parse_args()
    if os.path.realpath(args.output) in map(os.path.realpath, (args.problems, args.samples)):
        fail(f"{args.output} is one of the inputs; name another file")
    if (args.workers or 0) < 0 or not 0 < args.timeout < float("inf") or args.memory_mb <= 0:
        fail("--timeout and --memory_mb must be above 0, --workers at least 0")
    try:
        score_file(args)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
