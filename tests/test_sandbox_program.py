"""From a model's answer to a program: what is right for a person who reads it is right here."""
# Programs under test are strings of one line.
# ruff: noqa: E501, E731, SIM105, SIM115, SIM905, UP031

import warnings

import pytest

from sandbox import code_blocks, program

F = "`" * 3
FULL = dict(
    prefix="import math\n\ndef helper(x):\n    return x\n\ndef solve(xs):\n", entry_point="solve"
)
BARE = dict(prefix="", entry_point="solve")
CLASS = dict(prefix="class Solution:\n    def solve(self, xs):\n", entry_point="Solution")
FIB = dict(prefix='def solve(xs):\n    """Doc."""\n', entry_point="solve")
CODE = "def solve(xs):\n    return sorted(xs)\n"
BODY = "    return sorted(xs)\n"

ANSWERS = {
    "bare code": (CODE, FULL),
    "a body": (BODY, FULL),
    "a body without its indent": ("return sorted(xs)\n", FULL),
    "a fence": (f"Here it is:\n{F}python\n{CODE}{F}\nIt sorts.", FULL),
    "no closing fence": (f"{F}python\n{CODE}", FULL),
    "a lone closing fence": (f"{CODE}{F}", FULL),
    "a lone closing fence behind a body": (f"{BODY}{F}\nThat is all.", FULL),
    "a lone closing fence behind the last line": (f"{CODE.rstrip()}{F}", FULL),
    "a closing fence behind the last line": (f"{F}python\n{CODE.rstrip()}{F}\nIt sorts.", FULL),
    "an opening fence in a line": (f"Here is the code: {F}python\n{CODE}{F}", FULL),
    "four backticks": (f"`{F}python\n{CODE}`{F}", FULL),
    "tildes": (f"~~~python\n{CODE}~~~", FULL),
    "fences in a list": (f"1. First:\n   {F}python\n   def solve(xs):\n       return sorted(xs)\n   {F}\n2. Done", FULL),
    "a fence in a docstring": (
        f'{F}python\ndef solve(xs):\n    """Sorts.\n\n    {F}\n    solve([2, 1])\n    {F}\n    """\n    return sorted(xs)\n{F}\nDone.',
        FULL,
    ),
    "a fence in a docstring, and no other": (
        f'def solve(xs):\n    """Sorts.\n\n    {F}\n    solve([2, 1])\n    {F}\n    """\n    return sorted(xs)\n',
        FULL,
    ),
    "a byte order mark": (f"{F}python\n\ufeff{CODE}{F}", FULL),
    "CRLF": (f"{F}python\n{CODE}{F}\n".replace("\n", "\r\n"), FULL),
    "a capital language": (f"{F}Python\n{CODE}{F}", FULL),
    "an example before": (f"{F}python\nprint(1)\n{F}\nthen\n{F}python\n{CODE}{F}", FULL),
    "an example after": (f"{F}python\n{CODE}{F}\nUse:\n{F}python\nprint(solve([2, 1]))\n{F}\nOutput:\n{F}\n[1, 2]\n{F}", FULL),
    "another language": (f"{F}cpp\nint solve() {{}}\n{F}\nor\n{F}python\n{CODE}{F}\nor\n{F}javascript\nsolve = 1\n{F}", FULL),
    "a better version after": (f"{F}python\ndef solve(xs):\n    return xs\n{F}\nThat is wrong:\n{F}python\n{CODE}{F}", FULL),
    "a broken version after": (f"{F}python\n{CODE}{F}\nor\n{F}python\ndef solve(xs): return (\n{F}", FULL),
    "imports in another block": (f"{F}python\nfrom heapq import nsmallest\n{F}\n{F}python\ndef solve(xs):\n    return nsmallest(len(xs), xs)\n{F}", BARE),
    "a helper in another block": (f"{F}python\ndef mine(xs):\n    return sorted(xs)\n{F}\n{F}python\ndef solve(xs):\n    return mine(xs)\n{F}", BARE),
    "thoughts before": (f"<think>\n{F}python\ndef solve(xs): return 0\n{F}\n</think>\n{F}python\n{CODE}{F}", FULL),
    "words before and after": (f"Sure! Here is the function:\n\n{CODE}\nThis function sorts the list.\n", FULL),
    "words after a body": (f"{BODY}\nThis function sorts the list.\n", FULL),
    "a future import": (f"{F}python\nfrom __future__ import annotations\n{CODE}{F}", FULL),
    "a body and the whole function again": (f"{BODY}\n{CODE}", FULL),
    "a body and a helper": ("    return mine(xs)\n\ndef mine(xs):\n    return sorted(xs)\n", FULL),
    "a helper and a call of the prefix": (f"{F}python\n    return mine(xs)\n\ndef mine(xs):\n    return sorted(xs)\n{F}", FIB),
    "a body without its indent behind a docstring": ("return sorted(xs)\n", FIB),
    "such a body in a fence": (f"{F}python\nxs = list(xs)\nreturn sorted(xs)\n{F}", FIB),
    "a method": ("def solve(self, xs):\n    return sorted(xs)\n", CLASS),
    "a method in a fence": (f"{F}python\ndef solve(self, xs):\n    return sorted(xs)\n{F}", CLASS),
    "a class": (f"{F}python\nclass Solution:\n    def solve(self, xs):\n        return sorted(xs)\n{F}", CLASS),
    "a body of a method": ("        return sorted(xs)\n", CLASS),
    "a lone closing fence, words and a docstring": (f"{CODE}{F}\n\nThis function sorts the list.", FIB),
    "a body that has been stripped": ("ys = list(xs)\n    return sorted(ys)", FIB),
    "an indented function": (f"{F}python\n    def solve(xs):\n        return sorted(xs)\n{F}", FIB),
    "an indented function, no prefix": ("    def solve(xs):\n        return sorted(xs)\n", BARE),
    "an answer cut off behind the function": (f"{F}python\n{CODE}\ndef test():\n    assert solve([", FULL),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_a_right_answer_is_right(name):
    response, problem = ANSWERS[name]
    names = {}
    exec(program(problem, response), names)
    solve = names["Solution"]().solve if problem is CLASS else names["solve"]
    assert solve([2, 1]) == [1, 2], program(problem, response)
    assert problem is not FULL or "math" in names and "helper" in names


@pytest.mark.parametrize(
    "response",
    [
        "I cannot do that.",
        f"{F}cpp\nint solve() {{ return 0; }}\n{F}",
        f"{F}python\ndef other(xs):\n    return xs\n{F}",
        "def solve(xs): return (",
        "",
    ],
)
def test_a_wrong_answer_defines_nothing(response):
    names = {}
    try:
        exec(program(BARE, response), names)
    except SyntaxError:
        pass
    assert "solve" not in names


def test_a_program_without_an_entry_point():
    script = "n = int(input())\nprint(n * 2)\n"
    answer = f"Input:\n{F}\n5\n{F}\nProgram:\n{F}python\n{script}{F}\nOutput:\n{F}\n10\n{F}"
    assert program(dict(prefix="", entry_point=None), answer).strip() == script.strip()


def test_an_entry_point_that_is_an_expression():
    code = "class Solution:\n    def solve(self, xs):\n        return xs\n"
    assert (
        program(
            dict(prefix="import math\n", entry_point="Solution().solve"), f"{F}python\n{code}{F}"
        )
        == "import math\n" + code
    )


def test_blocks_of_an_answer():
    blocks = code_blocks(f"a\n{F}python\nx = 1\n{F}\nb\n~~~\ny = 2\n~~~\n")
    assert blocks == [("python", "x = 1\n"), ("", "y = 2\n")]


def test_many_fences_take_no_time():
    import time

    began = time.process_time()
    for response in (
        f"{F}python\n" * 800,
        f"{F}\n" * 800,
        f"{F}python\nx = (\n{F}\n" * 300,
        "x = (\n" * 5000,
    ):
        assert isinstance(program(FULL, response), str)
    assert time.process_time() - began < 20


def test_odd_code_warns_nobody():
    """Python warns of `1if`; a stage that reads thousands of answers must not print it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program(BARE, "    return 1if xs else 2)\n")
        program(FULL, "    x = 1if xs else 2\n    return x x\n")
    assert not caught
