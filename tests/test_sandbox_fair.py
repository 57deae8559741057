"""Styles of real tests: in each, an honest program passes and a subtly wrong one does not."""
# Programs under test are strings of one line.
# ruff: noqa: E501, E731, SIM105, SIM115, SIM905, UP031

import pytest

import sandbox
from sandbox import run

# style: (honest program, what is wrong in the other: (text, other text), tests, setup, trust)
LINKED = (
    "class ListNode:\n    def __init__(self, val=0, next=None): self.val, self.next = val, next\n"
)
UNITTEST = "import unittest\nclass T(unittest.TestCase):\n    def test_it(self): self.assertEqual(f(2), 4)\n"
DOUBLE = ("def f(x): return x * 2", ("* 2", "* 3"))
STYLES = {
    # ---- tests that somebody else would run
    "a test function": (*DOUBLE, "def test_f():\n    assert f(2) == 4", "", "split"),
    "two of them": (*DOUBLE, "def test_a():\n    assert f(1)\ndef test_b():\n    assert f(2) == 4", "", "split"),
    "a TestCase": (*DOUBLE, UNITTEST, "", "split"),
    "a TestCase under main": (*DOUBLE, UNITTEST + "if __name__ == '__main__':\n    unittest.main()", "", "split"),
    "a TestCase and main": (*DOUBLE, UNITTEST + "unittest.main(exit=False)", "", "split"),
    "a TestCase in the setup": (*DOUBLE, "x = f(1)", UNITTEST, "split"),
    "a class of tests": (*DOUBLE, "class TestF:\n    def test_it(self): assert f(2) == 4", "", "split"),
    "check in the setup": (*DOUBLE, "x = 1", "def check(candidate):\n    assert candidate(2) == 4", "split"),
    "an async test": (*DOUBLE, "async def test_f():\n    assert f(2) == 4", "", "in_process"),
    # ---- values
    "a namedtuple": (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(a): return P(a, a + 1)",
        ("a + 1", "a + 2"),
        "p = f(1)\nassert p.x == 1 and p.y == 2 and p == (1, 2) and p._asdict() == {'x': 1, 'y': 2}",
        "",
        "split",
    ),
    "a namedtuple of the tests": (
        "def f(p): return p.x + p.y",
        ("p.x +", "p.x -"),
        "assert f(P(1, 2)) == 3",
        "from collections import namedtuple\nP = namedtuple('P', 'x y')",
        "split",
    ),
    "an enum": (
        "import enum\nclass C(enum.Enum):\n    A = 1\n    B = 2\ndef f(x): return C(x)",
        ("C(x)", "C(3 - x)"),
        "assert f(1) == C.A and f(2).name == 'B' and f(1).value == 1",
        "",
        "split",
    ),
    "an IntEnum": (
        "import enum\nclass C(enum.IntEnum):\n    A = 1\n    B = 2\ndef f(x): return C(x)",
        ("C(x)", "C(3 - x)"),
        "assert f(1) == 1 and f(1) == C.A and f(2).name == 'B'",
        "",
        "split",
    ),
    "dict views": (
        "def f(d): return d.keys(), d.values(), d.items()",
        ("d.items()", "d.keys()"),
        "k, v, i = f({'a': 1})\nassert k == {'a'} and list(v) == [1] and i == {('a', 1)}",
        "",
        "split",
    ),
    "a path": (
        "from pathlib import Path\ndef f(a): return Path(a) / 'x'",
        ("'x'", "'y'"),
        "assert str(f('a')) == 'a/x' and f('a').name == 'x'",
        "",
        "split",
    ),
    "a time with a zone": (
        "from datetime import datetime\nfrom zoneinfo import ZoneInfo\ndef f(h): return datetime(2020, 1, 1, h, tzinfo=ZoneInfo('UTC'))",
        ("1, h", "1, h + 1"),
        "from datetime import datetime, timezone\nassert f(3) == datetime(2020, 1, 1, 3, tzinfo=timezone.utc)",
        "",
        "split",
    ),
    "numbers of many digits": (
        "def f(n): return 7 ** n",
        ("n)", "n, k=0): return 7 ** n + 1\ndef g(n)"),
        "assert f(99999) == 7 ** 99999",
        "",
        "split",
    ),
    # ---- state
    "a global that a call changes": (
        "count = 0\ndef f(x):\n    global count\n    count += x",
        ("+= x", "+= 1"),
        "assert count == 0\nf(5)\nassert count == 5",
        "",
        "split",
    ),
    "cache_info": (
        "import functools\n@functools.cache\ndef f(x): return x * 2",
        ("@functools.cache\n", "@functools.lru_cache(0)\n"),
        "f(1), f(1)\nassert f.cache_info().hits == 1",
        "",
        "split",
    ),
    "identity": ("def f(x): x.append(1); return x", ("return x", "return x[:]"), "a = []\nassert f(a) is a", "", "in_process"),
    "aliases": (
        "def f(m): m[0].append(1); return m",
        ("m[0].append(1)", "m[0] = m[0] + [1]"),
        "row = []\nassert f([row, row]) == [[1], [1]]",
        "",
        "in_process",
    ),
    "random numbers with a seed": (
        "import random\ndef f(): return random.random()",
        ("random.random()", "random.random() / 2"),
        "import random\nrandom.seed(3)\nx = random.random()\nrandom.seed(3)\nassert f() == x",
        "",
        "in_process",
    ),
    "a file of the test": (
        "def f(p): return open(p).read()",
        (".read()", ".readline()"),
        "with open('a', 'w') as h: h.write('x\\ny')\nassert f('a') == 'x\\ny'",
        "",
        "in_process",
    ),
    "the environment": (
        "import os\ndef f(): return os.environ['X']",
        ("['X']", ".get('Y')"),
        "import os\nos.environ['X'] = '1'\nassert f() == '1'",
        "",
        "in_process",
    ),
    # ---- exceptions
    "its own exception": (
        "class MyError(Exception): pass\ndef f(x):\n    if x < 0: raise MyError('no')",
        ("raise MyError", "raise ValueError"),
        "try: f(-1)\nexcept MyError as e: assert str(e) == 'no'\nelse: assert 0",
        "",
        "in_process",
    ),
    "assertRaises with its own": (
        "class MyError(Exception): pass\ndef f(x):\n    if x < 0: raise MyError('no')",
        ("raise MyError", "raise ValueError"),
        "import unittest\nclass T(unittest.TestCase):\n    def test_it(self): self.assertRaises(MyError, f, -1)",
        "",
        "in_process",
    ),
    "the name of an exception": (
        "class Odd(ValueError): pass\ndef f(x): raise Odd(x)",
        ("raise Odd", "raise ValueError"),
        "try: f(-1)\nexcept ValueError as e: assert type(e).__name__ == 'Odd' and e.args == (-1,)\nelse: assert 0",
        "",
        "split",
    ),
    # ---- what the tests hand over
    "a function by name": ("def f(g): return g(2)", ("g(2)", "g(3)"), "def g(x): return x + 1\nassert f(g) == 3", "", "in_process"),
    "functions in a list": ("def f(gs): return gs[0](2)", ("(2)", "(3)"), "assert f([lambda x: x + 1]) == 3", "", "in_process"),
    "a builtin": ("def f(g): return g([1, 2])", ("[1, 2]", "[1]"), "assert f(len) == 2", "", "in_process"),
    "a partial": (
        "def f(g): return g(2)",
        ("g(2)", "g(3)"),
        "import functools\nassert f(functools.partial(max, 1)) == 2",
        "",
        "in_process",
    ),
    "a decorator": (
        "def f(g): return lambda x: g(x) + 1",
        ("+ 1", "+ 2"),
        "@f\ndef g(x): return x\nassert g(1) == 2",
        "",
        "in_process",
    ),
    "nodes of the setup": (
        "def f(n):\n    s = 0\n    while n: s, n = s + n.val, n.next\n    return s",
        ("s = 0", "s = 1"),
        "assert f(ListNode(1, ListNode(2))) == 3",
        LINKED,
        "in_process",
    ),
    "an iterator": ("def f(it): return sum(it)", ("sum(it)", "len(list(it))"), "assert f(iter([1, 2])) == 3", "", "in_process"),
    # ---- objects of the candidate
    "a context manager": (
        "class f:\n    def __enter__(self): return 5\n    def __exit__(self, *a): pass",
        ("5", "6"),
        "with f() as x: assert x == 5",
        "",
        "in_process",
    ),
    "a deep copy": (
        "class Box:\n    def __init__(self): self.a = [1]",
        ("[1]", "[2]"),
        "import copy\nb = copy.deepcopy(Box())\nassert b.a == [1]",
        "",
        "split",
    ),
    "an f-string": (
        "class Box:\n    def __format__(self, s): return 'box' + s",
        ("'box'", "'bax'"),
        "assert f'{Box():x}' == 'boxx'",
        "",
        "split",
    ),
    "vars": ("class Box:\n    def __init__(self): self.a = 1", ("= 1", "= 2"), "assert vars(Box()) == {'a': 1}", "", "in_process"),
    "reversed": (
        "class Box:\n    def __reversed__(self): return iter([2, 1])",
        ("[2, 1]", "[1, 2]"),
        "assert list(reversed(Box())) == [2, 1]",
        "",
        "split",
    ),
    "a class under test": (
        "class UnionFind:\n    def __init__(self): self.p = list(range(9))\n    def find(self, x): return self.p[x]\n"
        "    def union(self, a, b): self.p[a] = self.p[b]",
        ("self.p[b]", "b + 1"),
        "u = UnionFind()\nassert u.find(3) == 3\nu.union(1, 2)\nassert u.find(1) == u.find(2)",
        "",
        "split",
    ),
    "in a class under test": (
        "class Trie:\n    def __init__(self): self.w = set()\n    def add(self, w): self.w.add(w)\n"
        "    def __contains__(self, w): return w in self.w\n    def __len__(self): return len(self.w)",
        ("in self.w\n", "not in self.w\n"),
        "t = Trie()\nt.add('a')\nassert 'a' in t and 'b' not in t and len(t) == 1",
        "",
        "split",
    ),
    "from solution import": (*DOUBLE, "from solution import f\nassert f(2) == 4", "", "in_process"),
    "threads of the tests": (
        *DOUBLE,
        "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(2) as p: assert list(p.map(f, [1, 2])) == [2, 4]",
        "",
        "in_process",
    ),
    "an array changed in place": (
        "def f(a): a[0] = 5",
        ("= 5", "= 6"),
        "import numpy as np\na = np.zeros(2)\nf(a)\nassert a[0] == 5",
        "",
        "split",
    ),
    # ---- aliases in what the candidate gave
    "a class of tests with a base": (*DOUBLE, "class Base: pass\nclass TestF(Base):\n    def test_it(self): assert f(2) == 4", "", "in_process"),
    "an async check": ("async def f(x): return x * 2", ("* 2", "* 3"), "x = 1", "async def check(candidate): assert await candidate(2) == 4", "in_process"),
    "a definition of the tests that f registers": ("names = []\ndef f(g): names.append(g.__name__); return g", ("g.__name__", "1"), "@f\ndef g(): pass\nassert names == ['g']", "", "in_process"),
    "rows that are one list": ("def f(n): return [[0] * n for _ in range(n)]", ("[[0] * n for _ in range(n)]", "[[0] * n] * n"), "g = f(2)\ng[0][0] = 1\nassert g == [[1, 0], [0, 0]]", "", "in_process"),
    "a copy": ("import copy\ndef f(x): return copy.deepcopy(x)", ("copy.deepcopy(x)", "list(x)"), "a = [[1]]\nb = f(a)\nb[0].append(2)\nassert a == [[1]]", "", "in_process"),
    "a copy in check": ("import copy\ndef f(x): return copy.copy(x)", ("copy.copy(x)", "x"), "def check(candidate):\n    a = [1]\n    b = candidate(a)\n    b.append(2)\n    assert a == [1]", "", "in_process"),
    "a list in an object": ("class Box:\n    def __init__(self): self.kids = []\n    def n(self): return len(self.kids)", ("len(self.kids)", "0"), "a, b = Box(), Box()\na.kids.append(b)\nassert a.n() == 1 and b.n() == 0", "", "in_process"),
    "an object that changes itself": ("class Box:\n    def __init__(self): self.a = []\n    def append(self, x): self.a.append(x); return len(self.a)", ("len(self.a)", "1"), "b = Box()\nassert b.append(1) == 1\nassert b.append(1) == 2", "", "split"),
    "a global list that the tests change": ("log = []\ndef f(x): log.append(x); return len(log)", ("log.append(x); return len(log)", "return 1"), "f(1)\nassert len(log) == 1\nlog.clear()\nassert f(1) == 1 and log == [1]", "", "in_process"),
    "a global that the tests set": ("CONFIG = {'k': 2}\ndef f(x): return x * CONFIG['k']", ("* CONFIG['k']", "* 2"), "assert f(2) == 4\nCONFIG['k'] = 5\nassert f(2) == 10", "", "in_process"),
    "a list that an object keeps": ("class Box:\n    def __init__(self, a): self.a = a\n    def n(self): return len(self.a)", ("= a\n", "= list(a)\n"), "a = [1]\nb = Box(a)\na.append(2)\nassert b.n() == 2", "", "in_process"),
    "a list that an object gives": ("class Box:\n    def __init__(self): self.a = [1]\n    def all(self): return list(self.a)", ("list(self.a)", "self.a"), "b = Box()\na = b.all()\na.append(2)\nassert b.all() == [1]", "", "in_process"),
    "assertIsNot": ("def f(x): return x[:]", ("x[:]", "x"), "import unittest\nclass T(unittest.TestCase):\n    def test_it(self):\n        a = [1]\n        self.assertIsNot(f(a), a)", "", "in_process"),
    "id": ("class Box:\n    it = None\n    def __new__(cls):\n        cls.it = cls.it or super().__new__(cls)\n        return cls.it", ("cls.it or ", ""), "a, b = Box(), Box()\nassert id(a) == id(b)", "", "in_process"),
    # ---- what only the candidate's own process shows
    "the cause of an exception": ("def f(x):\n    try: return int(x)\n    except ValueError as e: raise KeyError(x) from e", ("from e", "from None"), "try: f('a')\nexcept KeyError as e: assert isinstance(e.__cause__, ValueError)\nelse: assert 0", "", "in_process"),
    "an exception of a library": ("import json\ndef f(x): return json.loads(x)", ("json.loads(x)", "x"), "import json\ntry: f('{')\nexcept json.JSONDecodeError as e: assert e.pos == 1\nelse: assert 0", "", "in_process"),
    "assertLogs": ("import logging\ndef f(): logging.warning('low')", ("warning", "info"), "import unittest\nclass T(unittest.TestCase):\n    def test_it(self):\n        with self.assertLogs(level='WARNING'): f()", "", "in_process"),
    "assertWarns": ("import warnings\ndef f(): warnings.warn('old')", ("warnings.warn('old')", "pass"), "import unittest\nclass T(unittest.TestCase):\n    def test_it(self):\n        with self.assertWarns(UserWarning): f()", "", "in_process"),
    "SystemExit": ("import sys\ndef f(): sys.exit(2)", ("2", "3"), "try: f()\nexcept SystemExit as e: assert e.code == 2\nelse: assert 0", "", "in_process"),
    "argv": ("import sys\ndef f(): return sys.argv[1:]", ("[1:]", "[2:]"), "import sys\nsys.argv = ['p', 'a']\nassert f() == ['a']", "", "in_process"),
    "a doc string": ("def f():\n    'Doc.'", ("Doc", "doc"), "assert f.__doc__ == 'Doc.'", "", "in_process"),
    "one list as two arguments": ("def f(a, b): a.append(1); return b", ("a.append(1); ", ""), "a = []\nassert f(a, a) == [1]", "", "in_process"),
    "one list as two arguments by keyword": ("def f(a, b): a.append(1); return b", ("a.append(1); ", ""), "a = []\nassert f(a, b=a) == [1]", "", "in_process"),
    "one list twice in a dict": ("def f(d): d['a'].append(1); return d['b']", ("d['a'].append(1); ", ""), "x = []\nassert f({'a': x, 'b': x}) == [1]", "", "in_process"),
    "one list twice in a tuple": ("def f(t): t[0].append(1); return t[1]", ("t[0].append(1); ", ""), "a = []\nassert f((a, a)) == [1]", "", "in_process"),
    "one list several times": ("def f(t): t[0].append(1); return t[1]", ("t[0].append(1); ", ""), "a = []\nassert f([a] * 2) == [1]", "", "in_process"),
    "not the same list": ("def f(x): return x[:]", ("x[:]", "x"), "a = [1]\nassert f(a) is not a", "", "in_process"),
    "a module's setup with a helper": (*DOUBLE, "def two(): return 2\ndef setUpModule():\n    global n\n    n = two()\nclass TestF:\n    def test_it(self): assert f(n) == 4", "", "split"),
    "a generic class": ("from typing import Generic, TypeVar\nT = TypeVar('T')\nclass Stack(Generic[T]):\n    def __init__(self): self.a = []\n    def push(self, x): self.a.append(x)\n    def index(self, x): return self.a.index(x)\n    def __contains__(self, x): return x in self.a", ("append(x)", "append(-x)"), "s = Stack[int]()\ns.push(1)\ns.push(2)\nassert 2 in s and s.index(2) == 1", "", "in_process"),
    "the type of an object": ("class Box: pass\nclass Other: pass\ndef f(): return Box()", ("return Box", "return Other"), "assert type(f()) == Box", "", "in_process"),
    "annotations with classes of the setup": ("from typing import Optional\ndef f(n: Optional[ListNode]) -> ListNode: return ListNode(n.val + 1)", ("+ 1", "+ 2"), "assert f(ListNode(1)).val == 2", LINKED, "in_process"),
    # ---- runners, guards and setups of tests
    "a main guard": (*DOUBLE, "def test_f():\n    assert f(2) == 4\nif __name__ == '__main__':\n    test_f()", "", "split"),
    "a main guard beside a true assert": ("def f(x): return x * 2", ("x * 2", "0"), "assert f(0) == 0\ndef test_f():\n    assert f(2) == 4\nif __name__ == '__main__':\n    test_f()", "", "split"),
    "a main guard that hides failures": (*DOUBLE, "def test_f():\n    assert f(2) == 4\nif __name__ == '__main__':\n    try: test_f(); print('ok')\n    except AssertionError as e: print('failed', e)", "", "split"),
    "a main guard that ends": (*DOUBLE, "import sys\ndef test_f():\n    assert f(2) == 4\nif __name__ == '__main__':\n    test_f()\n    sys.exit(0)", "", "split"),
    "a main guard of a program": (*DOUBLE, "assert f(2) == 4\nif __name__ == '__main__':\n    print(f(int(input())))", "", "split"),
    "a main function": (*DOUBLE, "assert f(0) == 0\ndef main():\n    assert f(2) == 4\nif __name__ == '__main__':\n    main()", "", "split"),
    "a case with its tests from elsewhere": (*DOUBLE, "import unittest\nclass Mixin:\n    def test_a(self): self.assertEqual(f(2), 4)\nclass A(Mixin, unittest.TestCase): pass\nsuite = unittest.TestLoader().loadTestsFromTestCase(A)\nunittest.TextTestRunner().run(suite)", "", "in_process"),
    "setup_module with its module": (*DOUBLE, "def setup_module(module):\n    global n\n    n = 2\ndef test_it(): assert f(n) == 4", "", "split"),
    "rows that a later call changes": ("class Box:\n    def __init__(s): s.b = [[0] * 2 for _ in range(2)]\n    def board(s): return s.b\n    def move(s): s.b[0][0] = 1", ("[0][0]", "[1][0]"), "x = Box()\nb = x.board()\nx.move()\nassert b == [[1, 0], [0, 0]]", "", "split"),
    "a copy of rows": ("class Box:\n    def __init__(s): s.b = [[0] * 2 for _ in range(2)]\n    def board(s): return [r[:] for r in s.b]\n    def move(s): s.b[0][0] = 1", ("[r[:] for r in s.b]", "s.b"), "x = Box()\nb = x.board()\nx.move()\nassert b == [[0, 0], [0, 0]]", "", "split"),
    "a result that is kept, after many that are not": ("seen = []\ndef f(x): return [x]\ndef put(x): seen.append(x); return seen", ("return seen", "return seen[:]"), "for i in range(99): assert f(i) == [i]\na = put(1)\nput(2)\nassert a == [1, 2]", "", "split"),
    "a result that becomes a circle": ("seen = [1]\ndef f(): return seen\ndef tie(): seen.append(seen); return len(seen)", ("len(seen)", "3"), "a = f()\nassert a == [1] and tie() == 2", "", "split"),
    "an exception that cannot be told": ("class Bad(ValueError):\n    def __str__(s): return s.x\ndef f(x): raise Bad(7)", ("7", "8"), "try: f(1)\nexcept ValueError as e: assert e.args == (7,)\nelse: assert 0", "", "split"),
    "check under a main guard": (*DOUBLE, "import io\ndef check(candidate): assert candidate(2) == 4\nif __name__ == '__main__': check(f)", "", "in_process"),
    "a runner that nobody calls": ("def f(x): return x * 2", ("x * 2", "0"), "assert f(0) == 0\ndef test_f():\n    assert f(2) == 4\ndef run_all():\n    test_f()", "", "split"),
    "a TestCase from a TestCase": ("def f(x): return x * 2", ("x * 2", "0"), "import unittest\nclass Base(unittest.TestCase):\n    def test_zero(self): self.assertEqual(f(0), 0)\nclass Doubles(Base):\n    def test_two(self): self.assertEqual(f(2), 4)", "", "split"),
    "a TestCase by another name": (*DOUBLE, "from unittest import TestCase as TC\nclass Checks(TC):\n    def test_it(self): self.assertEqual(f(2), 4)", "", "split"),
    "a base TestCase without tests": (*DOUBLE, "import unittest\nclass Base(unittest.TestCase):\n    def setUp(self): self.n = 2\nclass TestF(Base):\n    def test_two(self): self.assertEqual(f(self.n), 4)", "", "split"),
    "setup_method with its method": (*DOUBLE, "class TestF:\n    def setup_method(self, method): self.n = 2\n    def test_it(self): assert f(self.n) == 4", "", "split"),
    "setup_class": (*DOUBLE, "class TestF:\n    @classmethod\n    def setup_class(cls): cls.n = 2\n    def test_it(self): assert f(self.n) == 4", "", "split"),
    "setUpModule": (*DOUBLE, "import unittest\ndef setUpModule():\n    global n\n    n = 2\nclass T(unittest.TestCase):\n    def test_it(self): self.assertEqual(f(n), 4)", "", "split"),
    "setup_module": (*DOUBLE, "def test_it(): assert f(n) == 4\ndef setup_module():\n    global n\n    n = 2", "", "split"),
    "a local variable named like another function": ("def f(a): return a * 2\ndef total(x): return sum(x)", ("sum(x)", "0"), "def test_f():\n    total = f(2)\n    assert total == 4\ndef test_total(): assert total([1, 2]) == 3", "", "split"),
    "an argument named like another function": ("def f(x): return x\ndef node(x): return x + 1", ("+ 1", "+ 2"), "def show(node): return str(node)\nassert show(f(1)) == '1'\nassert node(1) == 2", "", "split"),
    # ---- copies and aliases
    "an argument changed later": ("def f(x): return x[:]", ("x[:]", "x"), "a = [1, 2]\nb = f(a)\na.append(3)\nassert b == [1, 2]", "", "in_process"),
    "an argument changed later, in check": ("def f(x): return x[:]", ("x[:]", "x"), "def check(fn):\n    a = [1]\n    b = fn(a)\n    a.append(2)\n    assert b == [1]", "", "in_process"),
    "a set changed": ("def f(x): return set(x)", ("set(x)", "x"), "a = {1}\nb = f(a)\nb.add(2)\nassert a == {1}", "", "in_process"),
    "a list made longer": ("def f(x): return list(x)", ("list(x)", "x"), "a = [1]\nb: list = f(a)\nb += [2]\nassert a == [1]", "", "in_process"),
    "two names for a result": ("def f(x): return list(x)", ("list(x)", "x"), "a = [1]\nb = c = f(a)\nb.append(2)\nassert a == [1] and c == [1, 2]", "", "in_process"),
    "a result by a helper": ("def f(x): return list(x)", ("list(x)", "x"), "def call(x): return f(x)\na = [1]\nb = call(a)\nb.append(2)\nassert a == [1]", "", "in_process"),
    "a heap": ("def f(x): return list(x)", ("list(x)", "x"), "import heapq\na = [1]\nb = f(a)\nheapq.heappush(b, 0)\nassert a == [1]", "", "in_process"),
    "a result without a name": ("items = []\ndef f(): return items[:]", ("items[:]", "items"), "f().append(5)\nassert f() == []", "", "in_process"),
    "rows in a loop": ("def f(n): return [[0] * n for _ in range(n)]", ("[[0] * n for _ in range(n)]", "[[0] * n] * n"), "g = f(2)\nfor i, row in enumerate(g): row[0] = i\nassert g == [[0, 0], [1, 0]]", "", "in_process"),
    "what a method was given": ("class Box:\n    def __init__(s): s.d = []\n    def put(s, x): s.d.append(dict(x))\n    def get(s): return s.d", ("dict(x)", "x"), "b = Box()\nitem = {'q': 1}\nb.put(item)\nitem['q'] = 0\nassert b.get() == [{'q': 1}]", "", "in_process"),
    "a global handed back": ("log = []\ndef f(x, v): x.append(v); return len(log)", ("len(log)", "0"), "assert f(log, 1) == 1", "", "in_process"),
    "a list yielded again and again": ("def f(n):\n    path = []\n    def go(i):\n        if i == n: yield path[:]; return\n        for b in (0, 1): path.append(b); yield from go(i + 1); path.pop()\n    return go(0)", ("path[:]", "path"), "assert list(f(2)) == [[0, 0], [0, 1], [1, 0], [1, 1]]", "", "split"),
    "a list yielded as it is": ("def f(x):\n    cur = []\n    for v in x: cur.append(v); yield cur", ("cur.append(v)", "cur.insert(0, v)"), "for got, want in zip(f([1, 2]), [[1], [1, 2]]): assert got == want", "", "split"),
    "a result that a later call changes": ("def f(x, seen=()): seen = [*seen, x]; return seen", ("seen=()): seen = [*seen, x]; return", "seen=[]): seen.append(x); return"), "a = f(1)\nf(2)\nassert a == [1]", "", "split"),
    "a result that a later call is to change": ("seen = []\ndef f(x): seen.append(x); return seen", ("return seen", "return seen[:]"), "a = f(1)\nassert f(2) == [1, 2]\nassert a == [1, 2]", "", "split"),
    "a result of a method that a later one changes": ("class Box:\n    def __init__(s): s.x = {}\n    def all(s): return dict(s.x)\n    def put(s, k): s.x[k] = len(s.x)", ("dict(s.x)", "s.x"), "b = Box()\nb.put('a')\nx = b.all()\nb.put('b')\nassert x == {'a': 0} and b.all() == {'a': 0, 'b': 1}", "", "split"),
    "array changed in place": ("def f(a): a.append(9)", ("9", "8"), "from array import array\na = array('i', [1])\nf(a)\nassert list(a) == [1, 9]", "", "split"),
    # ---- exceptions
    "an exception's own text": ("class Bad(ValueError):\n    def __init__(s, x): super().__init__(x); s.code = x\n    def __str__(s): return f'bad {s.code}'\ndef f(x): raise Bad(x)", ("bad {", "{"), "try: f(3)\nexcept ValueError as e: assert str(e) == 'bad 3' and e.code == 3 and e.args == (3,)\nelse: assert 0", "", "split"),
    "the name of a missing file": ("def f(x): return open(x)", ("open(x)", "open('a')"), "try: f('missing.txt')\nexcept FileNotFoundError as e: assert 'missing.txt' in str(e) and e.errno == 2\nelse: assert 0", "", "split"),
    "exit where an error is due": ("import sys\ndef f(x): raise RuntimeError(x)", ("raise RuntimeError(x)", "sys.exit(1)"), "try: f(1)\nexcept RuntimeError: pass\nelse: assert 0", "", "split"),
    "exit where any error is due": ("import sys\ndef f(x): raise KeyError(x)", ("raise KeyError(x)", "sys.exit(1)"), "try: f(1)\nexcept Exception: pass\nelse: assert 0", "", "split"),
    "StopIteration where an error is due": ("def f(x): raise RuntimeError", ("RuntimeError", "StopIteration"), "try: f(1)\nexcept RuntimeError: pass\nelse: assert 0", "", "split"),
    "an operator that raises": ("class Box:\n    x = 1\n    def __lt__(s, o): return NotImplemented", ("NotImplemented", "True"), "try: Box() < 3\nexcept TypeError: pass\nelse: assert 0", "", "in_process"),
    "an attribute that cannot be deleted": ("class Box:\n    __slots__ = ()\n    x = 1", ("    __slots__ = ()\n    x = 1", "    def __init__(s): s.x = 1"), "try: del Box().x\nexcept AttributeError: pass\nelse: assert 0", "", "in_process"),
    # ---- what every stand-in has
    "callable": ("def f(x): return len", ("return len", "return x"), "assert callable(f(1))", "", "in_process"),
    "an abstract class": ("def f(x): return iter([x])", ("iter([x])", "[x]"), "from collections.abc import Iterator\nassert isinstance(f(1), Iterator)", "", "in_process"),
    "hasattr": ("def f(x): return iter([x])", ("iter([x])", "[x]"), "assert hasattr(f(1), '__next__')", "", "in_process"),
    "a naive ==": ("class Box:\n    x, y = 1, 2\n    def __eq__(s, o): return s.x == o.x\n    def __iter__(s): return iter((s.x, s.y))", ("(s.x, s.y)", "(s.y, s.x)"), "x, y = Box()\nassert list(Box()) == [x, y] == [1, 2]", "", "split"),
    "a global bound anew": ("class Box:\n    def __init__(s, n): s.n = n\nbox = Box(0)\ndef put(i):\n    global box\n    box = Box(i)\n    return Box(100 + i)", ("100 +", "99 +"), "for i in range(20):\n    m = put(i)\n    assert box.n == i and m.n == 100 + i", "", "split"),
    "a global bound to another's object": ("class Box:\n    x = 1\nbox = Box()\ndef make(): return Box()\ndef put(x):\n    global box\n    box = x", ("return Box()", "return box"), "assert box == box\nput(make())\nb = make()\nput(b)\nassert box == b\nc = make()\nassert not c == b", "", "split"),
    "a length that next changes": ("class Box:\n    n = 3\n    def __len__(s): return s.n\n    def __iter__(s): return s\n    def __next__(s):\n        if not s.n: raise StopIteration\n        s.n -= 1\n        return s.n", ("s.n -= 1", "s.n -= 2"), "b = Box()\nassert len(b) == 3 and next(b) == 2 and len(b) == 2 and list(b) == [1, 0]", "", "split"),
    "a length that iteration changes": ("class Box:\n    def __init__(s): s.v = [1, 2, 3]\n    def __len__(s): return len(s.v)\n    def __iter__(s):\n        while s.v: yield s.v.pop(0)", ("pop(0)", "pop()"), "b = Box()\nassert len(b) == 3 and list(b) == [1, 2, 3] and len(b) == 0", "", "split"),
    "a length after the items": ("class Box:\n    def __init__(s, v): s.v = v\n    def __len__(s): return len(s.v)\n    def __iter__(s): return iter(s.v)", ("iter(s.v)", "iter(())"), "b = Box([1, 2, 3])\nassert all(x == y for x, y in zip(b, [1, 2, 3])) and len(b) == 3", "", "split"),
    "a length that an item changes": ("class Box:\n    def __init__(s): s.d = {}\n    def __getitem__(s, k): return s.d.setdefault(k, 0)\n    def __len__(s): return len(s.d)", ("setdefault", "get"), "b = Box()\nassert len(b) == 0 and b['a'] == 0 and len(b) == 1", "", "split"),
    "numbers of a class": ("class Box:\n    def __init__(s, x): s.x = x\n    def __lshift__(s, k): return Box(s.x << k)\n    def __itruediv__(s, k): s.x /= k; return s\n    def __floor__(s): return int(s.x)\n    def __trunc__(s): return int(s.x)\n    def __complex__(s): return complex(s.x, 1)\n    def __bytes__(s): return b'%d' % s.x\n    def __float__(s): return s.x + 0.5", ("return int(s.x)\n    def __trunc", "return 0\n    def __trunc"), "import math\na = b = Box(8)\na /= 2\nassert b.x == 4 and (Box(1) << 3).x == 8 and math.floor(Box(2)) == math.trunc(Box(2)) == 2 and complex(Box(5)) == 5 + 1j and bytes(Box(5)) == b'5'", "", "split"),
    "a function of numpy": ("def f(g, x): return (g(x + 1e-6) - g(x - 1e-6)) / 2e-6", ("(x + 1e-6)", "(x)"), "import numpy as np\nassert abs(f(np.sin, 0.0) - 1) < 1e-6", "", "in_process"),
    # ---- values and operators
    "isinstance of a named tuple": ("from collections import namedtuple\nBox = namedtuple('Box', 'x')\nBag = namedtuple('Bag', 'x')\ndef f(): return Box(1)", ("return Box", "return Bag"), "assert isinstance(f(), Box) and f().x == 1", "", "split"),
    "a defaultdict's own default": ("from collections import defaultdict\ndef f(): return defaultdict(lambda: 5, a=1)", ("5", "6"), "assert f()['a'] == 1 and f()['b'] == 5", "", "split"),
    "array": ("from array import array\ndef f(x): return array('i', x)", ("x)", "x[1:])"), "from array import array\nassert f([2, 1]) == array('i', [2, 1])", "", "split"),
    "operators in place": ("class Box:\n    x = 1\n    def __iadd__(self, o): self.x += o.x; return self", ("return self", "return Box()"), "a = b = Box()\na += Box()\nassert b.x == a.x == 2", "", "split"),
    "operators of a class under test": ("class Box:\n    def __init__(self, x): self.x = x\n    def __pow__(self, n): return Box(self.x ** n)\n    def __floordiv__(self, n): return Box(self.x // n)\n    def __invert__(self): return Box(-self.x)\n    def __index__(self): return self.x", ("-self.x", "self.x"), "assert (Box(3) ** 2).x == 9 and (Box(7) // 2).x == 3 and (~Box(3)).x == -3 and [1, 2][Box(1)] == 2", "", "split"),
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_both_verdicts_are_right(style):
    code, (old, new), test, setup, trust = STYLES[style]
    if "numpy" in test:
        pytest.importorskip("numpy")
    wrong = code.replace(old, new)
    assert wrong != code
    name = next((n for n in ("Box", "UnionFind", "Trie") if n in code), "f")
    jobs = [
        dict(code=c, tests=[test], setup=setup, entry_point=name, timeout=9.0, memory_mb=2048)
        for c in (code, wrong)
    ]
    good, bad = sandbox.run_many(jobs, 1)
    assert good.passed and good.trust == trust, good
    assert not bad.passed, bad


# ---- tests that ask nothing, and programs that would pass them

NOTHING = {
    "no test at all": [],
    "an empty test": [""],
    "a comment": ["# assert f(1) == 3"],
    "a comparison": ["f(1) == 3"],
    "a comparison in a test function": ["def test_f():\n    f(1) == 3"],
    "a comparison in a class": ["class TestF:\n    def test_it(self):\n        f(1) == 3"],
    "a comparison in a loop": ["for i in range(2):\n    f(i) == 3"],
    "two comparisons": ["f(2) == 4 and f(3) == 6"],
    "no call": ["assert True"],
    "a loop over nothing": ["for x in []: assert f(x) == 3"],
    "a test function with arguments": ["def test_f(fixture):\n    assert f(1) == 3"],
    "a coroutine that nobody runs": [
        "import asyncio\nasync def main():\n    assert await f(1) == 3"
    ],
    "a class that nobody uses, in one process": [
        "import io\nclass F:\n    def test_it(self): assert f(1) == 3"
    ],
    "async tests that nobody awaits": [
        "import unittest\nclass T(unittest.TestCase):\n    async def test_it(self): assert f(1) == 3"
    ],
    "an empty TestCase": ["import unittest\nclass T(unittest.TestCase): pass"],
    "a skipped test": [
        "import unittest\nclass T(unittest.TestCase):\n    @unittest.skip('x')\n    def test_it(self): f(1)"
    ],
}


@pytest.mark.parametrize("name", NOTHING)
def test_tests_that_ask_nothing_pass_nobody(name):
    result = run("def f(x): return 1", NOTHING[name], entry_point="f")
    assert result.status == "error" and result.error, result


def test_check_without_an_entry_point_is_refused():
    test = "def check(candidate):\n    assert candidate(1) == 2"
    result = run("def f(x): return 2", [test], entry_point=None)
    assert result.status == "error" and "entry_point" in result.error


# ---- programs that answer something else than data

LIAR = "class L:\n    {}\ndef f(*a): return L()"
SET = "union = intersection = difference = symmetric_difference = lambda s, *a: set()"
UNEARNED = {
    "StopIteration from a method": ("__getattr__ = lambda s, n: next(iter([]))", "assert all(x.a for x in [f(1)])"),
    "StopIteration from an item": ("__getitem__ = lambda s, n: next(iter([]))", "assert all(map(lambda x: x[0], [f(1)]))"),
    "StopIteration from len": ("__len__ = lambda s: next(iter([]))", "assert all(map(len, [f(1)]))"),
    "StopIteration from iter": ("__iter__ = lambda s: next(iter([]))", "assert all(map(list, [f(1)]))"),
    "assertSetEqual": (
        SET,
        "import unittest\nclass T(unittest.TestCase):\n    def test_it(self): self.assertSetEqual(f(1), {48611})",
    ),
    "union": (SET, "assert f(1).difference({48611}) == set()"),
    "find": ("find = lambda s, x: 0", "assert f(1).find('abc') == 0"),
    "count": ("count = lambda s, x: 1", "assert f(1).count('abc') == 1"),
    "index": ("index = lambda s, x: 0", "assert f(1).index(48611) == 0"),
    "replace": ("replace = lambda s, *a: ''", "assert f(1).replace('abc', '') == ''"),
    "Decimal.compare": ("compare = lambda s, x: 0", "from decimal import Decimal\nassert f(1).compare(Decimal(3)) == 0"),
    "a length over nothing": (
        "__len__ = lambda s: 3\n    __iter__ = lambda s: iter([])",
        "x = f(1)\nassert len(x) == 3 and all(a == b for a, b in zip(x, [1, 2, 3]))",
    ),
    "nothing, and a length": (
        "__len__ = lambda s: 3\n    __iter__ = lambda s: iter([])",
        "x = f(1)\nassert all(a == b for a, b in zip(x, [1, 2, 3])) and len(x) == 3",
    ),
    "a length of an iterator": (
        "__len__ = lambda s: 3\n    __iter__ = lambda s: s\n    def __next__(s): raise StopIteration",
        "x = f(1)\nassert len(x) == 3\nfor a, b in zip(x, [1, 2, 3]): assert a == b",
    ),
    "a length, and an iterator that equals all": (
        "__len__ = lambda s: 3\n    def __iter__(s):\n        class I:\n            __eq__ = lambda s, o: True\n            __iter__ = lambda s: s\n            def __next__(s): raise StopIteration\n        return I()",
        "x = f(1)\nassert len(x) == 3 and all(a == b for a, b in zip(x, [1, 2, 3]))",
    ),
    "a length, and more than that": (
        "__len__ = lambda s: 2\n    __iter__ = lambda s: iter([1, 2, 3, 4])",
        "x = f(1)\nassert len(x) == 2\nfor a, b in zip(x, [1, 2, 3]): assert a == b",
    ),
    "a length, and another call": (
        "__len__ = lambda s: 3\n    __iter__ = lambda s: iter([])",
        "x = f(1)\nassert len(x) == 3\ny = f(2)\nassert all(a == b for a, b in zip(x, [1, 2, 3]))",
    ),
    "startswith, which is read, too": ("startswith = lambda s, *a: True", "assert f(1).startswith('ab') and any(map('1x'.startswith, ['1']))"),
    "isdigit, which is read, too": ("isdigit = lambda s: True", "assert f(1).isdigit() and all(map(str.isdigit, ['1']))"),
    "assertAlmostEqual": (
        "__sub__ = __rsub__ = lambda s, x: 0.0\n    __abs__ = lambda s: 0.0",
        "import unittest\nclass T(unittest.TestCase):\n    def test_it(self): self.assertAlmostEqual(f(1), 3.5)",
    ),
    "assertIn": (
        "__contains__ = lambda s, x: True",
        "import unittest\nclass T(unittest.TestCase):\n    def test_it(self): self.assertIn(3, f(1))",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNEARNED)
def test_no_pass_for_an_object_where_data_is_due(name):
    body, test = UNEARNED[name]
    result = run(LIAR.format(body), [test], entry_point="f")
    assert not result.passed and result.trust == "split", result


RUN_ANSWERS = {
    "pickle": (
        "import pickle\nassert pickle.loads(f()) == 3",
        "b'cbuiltins\\neval\\n(S\"3\"\\ntR.'",
    ),
    "marshal": ("import marshal\nassert marshal.loads(f()) == 3", "__import__('marshal').dumps(4)"),
    "eval": ("assert eval(f()) == 4", "'3'"),
    "exec": ("exec(f())\nassert x == 4", "'x = 3'"),
    "compile": ("c = compile(f(), 'x', 'eval')\nassert c.co_code == b''", "'3'"),
}


@pytest.mark.parametrize("name", RUN_ANSWERS)
def test_tests_that_run_answers_run_beside_the_candidate(name):
    test, value = RUN_ANSWERS[name]
    assert run(f"def f(): return {value}", [test], entry_point="f").trust == "in_process"


def test_a_judge_that_has_fallen_has_no_rights_and_no_future():
    """Tests that hand an answer to something like `eval` by another name: J stands behind the same walls, for one job."""
    probe = (
        "import random\nsystem = random._os\nassert f() == 1\nassert system.getuid() != 0\n"
        "for p in ['/etc/passwd', '/proc/1/environ', '/home']:\n"
        "    try: system.stat(p)\n    except OSError: pass\n    else: assert 0, p\n"
        "for p in (1, system.getppid()):\n    try: system.kill(p, 9)\n    except OSError: pass"
    )
    for _ in range(2):
        result = run("def f(): return 1", [probe], entry_point="f")
        assert result.passed and result.trust == "split", result


def test_answers_never_decide_where_the_tests_run():
    tests = ["r = f(1)\ng(r)\nassert g(r) == 2"]
    for value in (
        "[1]",
        "object()",
        "(x for x in [1])",
        "lambda: 1",
        "ValueError()",
        "open('/dev/null')",
        "10 ** 9999999",
    ):
        code = f"def f(x): return {value}\ndef g(x): return 3"
        assert run(code, tests, entry_point="f").trust == "split", value
    raised = "def f(x): raise KeyError(x)\ndef g(e): return 3"
    test = "try: f(1)\nexcept Exception as e: assert g(e) == 2"
    assert run(raised, [test], entry_point="f").trust == "split"


# ---- programs that read stdin

SUM = "import sys\nprint(sum(map(int, sys.stdin.read().split())))"


@pytest.mark.parametrize(
    "code",
    [
        SUM,
        "print(int(input()) + int(input()))",
        "print(sum(int(line) for line in open(0)))",
        "import sys\nif __name__ == '__main__':\n    for line in [sum(map(int, sys.stdin))]: sys.stdout.write(str(line))",
        "import os\nos.write(1, str(sum(map(int, os.read(0, 99).split()))).encode())",
        "import sys\nprint(sum(map(int, sys.stdin.buffer.readlines())), end='  \\n\\n')",
        "import atexit, io, sys\nout = io.StringIO()\natexit.register(lambda: sys.stdout.write(out.getvalue()))\nout.write(str(int(input()) + int(input())))",
        "print(int(input()) + int(input()))\nraise SystemExit",
        "print(float(int(input()) + int(input())))",
        "print(int(input()) + int(input()))\nexit()",
        "import atexit, io, sys\nsys.stdout = io.StringIO()\nprint(int(input()) + int(input()))\natexit.register(lambda: sys.__stdout__.write(sys.stdout.getvalue()))",
        "import os\nout = os.fdopen(1, 'w')\nout.write(str(int(input()) + int(input())))",
        "import sys\nprint(int(input()) + int(input()))\nsys.stdout.close()",
        "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8')\nprint(int(input()) + int(input()))",
        "import sys\nsys.stdout.reconfigure(line_buffering=True)\nprint(int(input()) + int(input()))",
        "import sys\nclass Out:\n    def __init__(s): s.b = []\n    def write(s, x): s.b.append(x)\n    def flush(s): real.write(''.join(s.b)); s.b.clear()\nreal, sys.stdout = sys.stdout, Out()\nprint(int(input()) + int(input()))",
    ],
)
def test_a_program_that_reads_stdin(code):
    tests = [{"input": "1\n2\n", "output": "3\n"}, {"input": "20\n22", "output": "42"}]
    result = run(code, tests)
    assert result.passed and result.passed_tests == 2 and result.trust == "split", result
    wrong = run(code, [tests[0], {"input": "1\n1\n", "output": "3"}])
    assert (wrong.status, wrong.passed_tests) == ("failed", 1)


@pytest.mark.parametrize(
    "code, status",
    [
        ("print(3)\n1 / 0", "error"),
        ("print(3)\nraise SystemExit(1)", "error"),
        ("print(", "syntax"),
        ("while True: pass", "timeout"),
        ("x = bytearray(1 << 33)", "memory"),
        ("while True: print('x' * 10000)", "output"),
        ("print('\\n' * 9_000_000)", "failed"),  # more than 16 MB in JSON
        ("print(4)", "failed"),
        ("", "failed"),
        ("print('3', 0)", "failed"),
    ],
)
def test_what_became_of_a_program_that_reads_stdin(code, status):
    result = run(code, [{"input": "", "output": "3"}], timeout=0.5)
    assert result.status == status and not result.passed, result


@pytest.mark.parametrize(
    "expected, output, same",
    [
        ("1 2\n3", "1 2  \n3\n\n", True),
        ("1.0", "1", True),
        ("1e3", "1000", True),
        ("0.10", ".1", False),
        ("1 2", "1  2", True),
        ("  *\n * *", "  *\n * *", True),
        ("  *", "*", False),
        ("* *", "*  *", False),
        ("x = 1.0", "x = 1", True),
        ("12", "1 2", False),
        ("a\nb", "a b", False),
        ("007", "7", False),
        ("1.5", "1.50000001", False),
        ("yes", "Yes", False),
        ("", "\n\n", True),
        ("nan", "NaN", False),
        ("+   +", "+ +", False),
        (".  -", ". -", False),
        (".5  .25", ".5 .25", True),
        ("2020-01-01  3", "2020-01-01 3", True),
        ("-1  2.5", "-1 2.5", True),
        ("a\nb", "a\r\nb\r\n", True),
        ("a\nb", "a\rb", False),
        ("a\nb", "a\x0cb", False),
        ("a\nb", "a\u2028b", False),
        ("a", "a\xa0", False),
        ("1.5", "\u0661.5", False),
    ],
)
def test_outputs_that_are_the_same(expected, output, same):
    assert sandbox.judge.same_output(expected, output) == same


@pytest.mark.parametrize("test", [{"input": "\ud800", "output": "1"}, "assert f(1) == 1"])
def test_a_bad_test_ends_its_job_alone(test):
    """Not the whole batch: half of a surrogate pair, statements among inputs."""
    jobs = [{"code": "print(1)", "tests": [{"input": "", "output": "1"}, test]}]
    jobs.append({"code": "print(1)", "tests": [{"input": "", "output": "1"}]})
    bad, good = sandbox.run_many(jobs)
    assert bad.status == "error" and "the tests are refused" in bad.error and good.passed


def test_many_large_inputs():
    """Limits on size are per test: a hundred tests of 100 kB each."""
    line = "1 " * 50000
    result = run(SUM, [{"input": line, "output": "50000"}] * 100)
    assert result.passed and result.passed_tests == 100, result


def test_a_job_may_take_ten_times_the_limit_of_a_test():
    code = "import time\nwhile time.process_time() < 0.25: pass\nprint(1)"
    result = run(code, [{"input": "", "output": "1"}] * 20, timeout=0.3)
    assert result.status == "timeout" and 8 <= result.passed_tests < 20, result


def test_each_run_of_a_program_is_new():
    code = "import os\nprint(os.path.exists('a'), input())\nopen('a', 'w').write('x')"
    assert run(code, [{"input": str(i), "output": f"False {i}"} for i in range(4)]).passed
