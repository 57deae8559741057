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
OPEN = CLASS | dict(prefix=CLASS["prefix"] + "        ")
MORE = dict(
    prefix="class Solution:\n    def __init__(self):\n        self.f = sorted\n",
    entry_point="Solution",
)
STUB = CLASS | dict(prefix=CLASS["prefix"] + '        """Doc."""\n        ')
METHOD = dict(prefix="import math\n", entry_point="Solution")
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
    "thoughts without a start": (f"Is it xs?\n{F}python\ndef solve(xs): return xs\n{F}\n</think>\n{CODE}", FULL),
    "a method's body without its indent": ("if not xs:\n    return []\nreturn sorted(xs)\n", CLASS),
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
    "an example with the names of the answer": (f"{F}python\ndef solve(xs):\n    result = sorted(xs)\n    return result\n{F}\nExample:\n{F}python\nxs = input()\nresult = solve(xs)\n{F}", FULL),
    "a test that imports the answer": (f"{F}python\n{CODE}{F}\nTest:\n{F}python\nfrom solution import solve\nassert solve([]) == []\n{F}", FULL),
    "the answer wrapped later": (f"{F}python\n{CODE}{F}\nor faster:\n{F}python\nfrom functools import cache\nsolve = cache(solve)\n{F}", FULL),
    "a stub after": (f"{F}python\n{CODE}{F}\nThe signature:\n{F}python\ndef solve(xs):\n    ...\n{F}", FULL),
    "an output before a body": (f"It gives\n{F}\n[1, 2]\n{F}\nand the body is\n{F}python\n{BODY}{F}", FIB),
    "an import before a body": (f"{F}python\nfrom heapq import nsmallest\n{F}\nThen:\n{F}python\n    return nsmallest(len(xs), xs)\n{F}", FIB),
    "a body, a lone closing fence and examples": (f"{BODY}{F}\nUse:\n{F}python\nprint(solve([2, 1]))\n{F}\nOutput:\n{F}\n[1, 2]\n{F}", FIB),
    "a body without its first indent, and words": (f"ys = list(xs)\n    return sorted(ys)\n{F}\nIt sorts.", FIB),
    "a body whose first line lacks a blank": ("   ys = list(xs)\n    return sorted(ys)\n", FIB),
    "a body and the next problem": (f"{BODY}\n\ndef solve(xs):\n    return xs[", FIB),
    "words before a body": (f"Here is the body:\n\n{BODY}\nHope it helps.", FIB),
    "the function again, cut off": (f"{CODE}\n{CODE[:-4]}", BARE),
    "a heading and words": (f"# Solution\nHere it is:\n\n{CODE}", FIB),
    "a word before and after": (f"python\n{CODE}\nExplanation\n", BARE),
    "tags": (f"[PYTHON]\n{CODE}[/PYTHON]", BARE),
    "BEGIN and DONE": (f"[BEGIN]\n{CODE}[DONE]\n", BARE),
    "a list of words before": (f"Steps:\n   1. sort\n   2. return\n   3. done\n\n{CODE}", BARE),
    "a constant before": ("Here:\n\nLIMIT = 10 ** 9\n\ndef solve(xs):\n    return sorted(xs)[:LIMIT]\n", BARE),
    "a future import in parentheses": (f"{F}python\nfrom __future__ import (\n    annotations,\n)\n{CODE}{F}", FULL),
    "thoughts named later": (f"<think>\nhm\n</think>\n{F}python\n{CODE}{F}\nI closed </think> above.", FULL),
    "a markdown fence around": (f"{F}markdown\nThe code:\n{F}python\n{CODE}{F}\nDone\n{F}", FIB),
    "a line separator in a text": (f"{F}python\ndef solve(xs):\n    mark = '\u2028'\n    return sorted(xs)\n{F}", FULL),
    "a body of a method behind its blanks": ("        ys = list(xs)\n        return sorted(ys)\n", OPEN),
    "a body of a method, a fence and words": (f"        return sorted(xs)\n{F}\nIt's sorted.", OPEN),
    "a body of a method, and the next one cut off": ("        return sorted(xs)\n\n    def other(self, x", OPEN),
    "a body of a method, and its use": ("        return sorted(xs)\n\ns = Solution()\nprint(s.solve([2, 1]))\n", OPEN),
    "a body of a method, and another class": ("        return sorted(xs)\n\n\nclass Solution:\n    def other(self, x):\n        return x\n", OPEN),
    "a method and its use": (f"{F}python\ndef solve(self, xs):\n    return sorted(xs)\n\ns = Solution()\nprint(s.solve([2, 1]))\n{F}", CLASS),
    "a method and a helper beside its class": (f"{F}python\ndef mine(xs):\n    return sorted(xs)\n\ndef solve(self, xs):\n    return mine(xs)\n{F}", CLASS),
    "pass, then the function": ("    pass\n\ndef solve(xs):\n    return sorted(xs)\n", FIB),
    "a function of one expression": (f"{F}python\ndef solve(xs):\n    return [x for x in sorted(xs)]\n{F}", FIB),
    "a text that looks like a tag": (f"{F}python\ndef solve(xs):\n    assert len(\"\"\"\n[INST]\n\"\"\") == 8\n    return sorted(xs)\n{F}", FIB),
    "a method more": ("    def solve(self, xs):\n        return self.f(xs)\n", MORE),
    "a method of an open class, its helper and its use": (f"{F}python\ndef mine(xs):\n    return sorted(xs)\n\ndef solve(self, xs):\n    return mine(xs)\n\ns = Solution()\nprint(s.solve([]))\n{F}", CLASS | dict(prefix="class Solution:\n")),
    "a method behind its stub, and its use": (f"{F}python\ndef solve(self, xs):\n    return sorted(xs)\n\ns = Solution()\nprint(s.solve([]))\n{F}", STUB),
    "other tags": (f"[SOLUTION]\n{CODE}[/SOLUTION]", BARE),
    "a method without a class": (f"{F}python\ndef solve(self, xs):\n    return sorted(xs)\n{F}", METHOD),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_a_right_answer_is_right(name):
    response, problem = ANSWERS[name]
    names = {}
    exec(program(problem, response), names)
    solve = names["Solution"]().solve if "Solution" in names else names["solve"]
    assert solve([2, 1]) == [1, 2], program(problem, response)
    assert problem is not FULL or "math" in names and "helper" in names


@pytest.mark.parametrize(
    "response",
    [
        "I cannot do that.",
        f"{F}cpp\nint solve() {{ return 0; }}\n{F}",
        f"{F}python\ndef other(xs):\n    return xs\n{F}",
        "def solve(xs): return (",
        "def solve(xs):\n    print 'hm'\n    return sorted(xs)\n",
        f"{F}python\ndef solve(xs):\n    if xs:\n        return sorted(xs)\n    els:\n        return 0\n{F}",
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


def test_a_part_of_a_program_is_not_the_program():
    """Explanations repeat lines, and a wrong version before must not leave its input() behind."""
    script = "def main():\n    n = int(input())\n    print(n * 2)\n\nmain()\n"
    wrong = "n = int(input())\nprint(n)\n"
    problem = dict(prefix="", entry_point=None)
    for part in ("n = int(input())\n", "assert 2 * 2 == 4\n", "ans = n * 2\n"):
        answer = f"First:\n{F}python\n{wrong}{F}\nNo:\n{F}python\n{script}{F}\nHere\n{F}python\n{part}{F}"
        assert program(problem, answer).strip() == script.strip()
    constant = f"{F}python\nMOD = 7\n{F}\nand\n{F}python\nprint(int(input()) % MOD)\n{F}"
    assert program(problem, constant).split() == "MOD = 7 print(int(input()) % MOD)".split()
    halves = script.split("\n\n")
    answer = f"{F}python\n{halves[0]}\n{F}\nThen call it:\n{F}python\n{halves[1]}{F}"
    assert (
        program(problem, answer).replace("\n\n", "\n").strip()
        == script.replace("\n\n", "\n").strip()
    )


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


def test_lines_that_end_in_other_ways():
    """A lone carriage return ends a line for Python, too; words are cleared by line number."""
    problem = dict(prefix="import math\rx = 1\r\n", entry_point="f")
    code = program(problem, "def f(n):\r    return n\r\rExplanation")
    assert code == "import math\nx = 1\ndef f(n):\n    return n\n\n"


def test_many_fences_take_no_time():
    import time

    began = time.process_time()
    for response in (
        f"{F}python\n" * 800,
        f"{F}\n" * 800,
        f"{F}python\nx = (\n{F}\n" * 300,
        "x = (\n" * 5000,
        "@a\n" * 16000,
        f"{F}python\ndef solve(:\n{F}\n" * 2500,
        f"{F}\n" * 5000,
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
