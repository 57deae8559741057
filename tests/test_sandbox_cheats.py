"""Programs that want a pass without earning it.  Each gets one from the weak form named beside it, and none from the sandbox."""
# Programs under test are strings of one line.
# ruff: noqa: E501, E731, SIM105, SIM115, SIM905, UP031

import os
import time

import pytest
from sandbox_peers import exit_code, in_process, marker, weakened

import sandbox

ADD = ["assert add(1, 2) == 3", "assert add(20, 22) == 42"]
CHEATS = {}


def cheat(family, name, weak, code, tests=ADD):
    assert (family, name) not in CHEATS
    CHEATS[family, name] = weak, code, tests


# ---- the end of the process taken for a verdict

cheat("exit", "sys.exit at the top", exit_code, "import sys; sys.exit(0)")
cheat("exit", "os._exit at the top", exit_code, "import os; os._exit(0)")
cheat("exit", "raise SystemExit", exit_code, "raise SystemExit")
cheat("exit", "sys.exit in the function", exit_code, "import sys\ndef add(a, b): sys.exit(0)")
cheat("exit", "os._exit in the function", exit_code, "import os\ndef add(a, b): os._exit(0)")
cheat(
    "exit",
    "os._exit from atexit",
    exit_code,
    "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): return 0",
)
cheat(
    "exit",
    "excepthook",
    exit_code,
    "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\ndef add(a, b): return 0",
)
cheat(
    "exit",
    "signal handler",
    exit_code,
    "import signal, os\nsignal.signal(signal.SIGUSR1, lambda *a: os._exit(0))\ndef add(a, b): os.kill(os.getpid(), signal.SIGUSR1)",
)
cheat(
    "exit",
    "alarm",
    exit_code,
    "import signal, os, time\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\nsignal.setitimer(signal.ITIMER_REAL, 0.01)\ndef add(a, b): time.sleep(1)",
)
cheat(
    "exit",
    "exec of another program",
    exit_code,
    "import os, sys\ndef add(a, b): os.execv(sys.executable, [sys.executable, '-I', '-S', '-c', 'pass'])",
)
cheat(
    "exit",
    "parent leaves, child goes on",
    exit_code,
    "import os\nif os.fork(): os._exit(0)\ndef add(a, b): return 0",
)
cheat(
    "exit",
    "a thread ends the process",
    exit_code,
    "import threading, os, time\nthreading.Thread(target=lambda: os._exit(0)).start()\ntime.sleep(1)",
)
cheat(
    "exit",
    "__del__ ends the process",
    exit_code,
    "import os\nclass D:\n    def __del__(self): os._exit(0)\ndef add(a, b): D(); return 0",
)
cheat(
    "exit",
    "a tracer ends the process",
    exit_code,
    "import sys, os\ndef t(f, e, a):\n    if e == 'exception': os._exit(0)\n    return t\nsys.settrace(t)\ndef add(a, b): raise ValueError",
)
cheat("exit", "C exit", exit_code, "import ctypes\ndef add(a, b): ctypes.CDLL(None)._exit(0)")
cheat(
    "exit",
    "stdout object that exits on flush",
    exit_code,
    "import sys, os\nclass O:\n    def write(self, s): pass\n    def flush(self): os._exit(0)\nsys.stdout = O()\ndef add(a, b): return 0\nimport atexit; atexit.register(sys.stdout.flush)",
)
cheat(
    "exit",
    "SystemExit subclass",
    exit_code,
    "class E(SystemExit):\n    code = 0\ndef add(a, b): raise E(0)",
)
cheat(
    "exit",
    "recursion into exit",
    exit_code,
    "import os\ndef add(a, b):\n    try: return add(a, b)\n    except RecursionError: os._exit(0)",
)

# ---- words on stdout taken for a verdict

cheat(
    "output",
    "prints the mark",
    marker,
    "print('ALL TESTS PASSED')\nimport os; os.write(1, b'ALL TESTS PASSED')\ndef add(a, b): return 0",
)
cheat(
    "output",
    "writes the mark and leaves",
    marker,
    "import os; os.write(1, b'ALL TESTS PASSED'); os._exit(0)",
)
cheat(
    "output",
    "mark through the stdout object",
    marker,
    "import sys\nsys.stdout.write('ALL TESTS PASSED\\n'); sys.stdout.flush(); sys.exit(0)",
)
cheat(
    "output",
    "mark from a child",
    marker,
    "import os\nif os.fork() == 0: os.write(1, b'ALL TESTS PASSED'); os._exit(0)\nos.wait()\nraise SystemExit(1)",
)
cheat(
    "output",
    "mark from the function",
    marker,
    "import os\ndef add(a, b): os.write(1, b'ALL TESTS PASSED'); return 0",
)
cheat(
    "output",
    "mark over every descriptor",
    marker,
    "import os\nfor fd in range(64):\n    try: os.write(fd, b'ALL TESTS PASSED')\n    except OSError: pass",
)
cheat(
    "output",
    "a verdict record over every descriptor",
    in_process,
    "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'{\"passed\": true}')\n    except OSError: pass\nos._exit(0)",
)

# ---- objects that lie about themselves

LIAR = "class L({base}):\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n    __hash__ = None\ndef f(*a): return L({value})"
for base, value, expected in [
    ("object", "", "3"),
    ("int", "5", "3"),
    ("float", "5", "3.5"),
    ("str", "'no'", "'yes'"),
    ("list", "", "[1, 2]"),
    ("tuple", "", "(1, 2)"),
    ("dict", "", "{1: 2}"),
    ("set", "", "{1}"),
    ("bytes", "", "b'x'"),
    ("frozenset", "", "frozenset({1})"),
    ("complex", "", "1j"),
    ("bytearray", "", "bytearray(b'1')"),
]:
    cheat(
        "lies",
        f"__eq__ of a subclass of {base}",
        in_process,
        LIAR.format(base=base, value=value),
        [f"assert f(1) == {expected}", f"assert not f(1) != {expected}"],
    )
OBJECT = "class L:\n    {}\ndef f(*a): return L()"
cheat(
    "lies",
    "__lt__",
    in_process,
    OBJECT.format("__lt__ = __gt__ = __le__ = __ge__ = lambda s, o: True"),
    ["assert 1 < f(1) < 3"],
)
cheat(
    "lies",
    "__sub__",
    in_process,
    OBJECT.format("__sub__ = __rsub__ = lambda s, o: 0.0"),
    ["assert abs(f(1) - 3.5) < 1e-6"],
)
cheat(
    "lies",
    "__rsub__",
    in_process,
    OBJECT.format("__rsub__ = lambda s, o: 0.0"),
    ["assert abs(3.5 - f(1)) < 1e-6"],
)
cheat(
    "lies",
    "__contains__",
    in_process,
    OBJECT.format("__contains__ = lambda s, o: True"),
    ["assert 3 in f(1) and 4 in f(1)"],
)
cheat(
    "lies",
    "__eq__ in a container",
    in_process,
    LIAR.format(base="object", value=""),
    ["assert f(1) in [1, 2]", "assert [f(1)] == [3]"],
)
cheat(
    "lies",
    "__hash__ and __eq__ in a set",
    in_process,
    "class L:\n    __eq__ = lambda s, o: True\n    __hash__ = lambda s: hash(3)\ndef f(*a): return L()",
    ["assert f(1) in {3}", "assert f(1) in {3: 4}"],
)
cheat(
    "lies",
    "startswith",
    in_process,
    OBJECT.format("startswith = endswith = isdigit = lambda s, *a: True"),
    ["assert f(1).startswith('ab')", "assert f(1).endswith('cd')"],
)
cheat(
    "lies",
    "issubset",
    in_process,
    OBJECT.format("issubset = issuperset = isdisjoint = lambda s, *a: True"),
    ["assert f(1).issubset({1, 2})"],
)
cheat(
    "lies",
    "__class__",
    in_process,
    OBJECT.format("__class__ = int"),
    ["assert isinstance(f(1), int)"],
)
cheat(
    "lies",
    "__and__",
    in_process,
    OBJECT.format("__and__ = __rand__ = __or__ = __xor__ = lambda s, o: o"),
    ["assert f(1) & {3} == {3}"],
)
cheat(
    "lies",
    "__mod__",
    in_process,
    OBJECT.format("__mod__ = __floordiv__ = lambda s, o: 0"),
    ["assert f(1) % 7 == 0"],
)
cheat(
    "lies",
    "__truediv__",
    in_process,
    OBJECT.format("__truediv__ = __rtruediv__ = lambda s, o: 1.0"),
    ["assert abs(f(1) / 7.5 - 1) < 0.1"],
)
SMALL = "class L:\n    __add__ = __radd__ = __mul__ = __rmul__ = __truediv__ = __sub__ = __neg__ = lambda s, o=0: s\n    __abs__ = __float__ = lambda s: 0.0\n    __round__ = lambda s, n=0: 0.0\n    __bool__ = lambda s: False\n    __len__ = __int__ = lambda s: 0\ndef f(*a): return L()"
for test in [
    "abs(f(1) + -3.5) < 1e-6",
    "abs(-3.5 + f(1)) < 1e-6",
    "not f(1) + -3",
    "round(f(1) * 7, 2) == 0",
    "float(f(1) / 7) == 0",
    "len(f(1) + [1]) == 0",
    "abs((f(1) + -3.5) * 2) < 1e-6",
    "abs(-(f(1) + -3.5)) < 1e-6",
    "abs(f(1) + (f(1) + -3.5)) < 1e-6",
]:
    cheat("lies", f"operators that lead to nothing: {test}", in_process, SMALL, [f"assert {test}"])
cheat(
    "lies",
    "nested in a list",
    in_process,
    LIAR.format(base="object", value="").replace("return L()", "return [L(), (L(),)]"),
    ["assert f(1) == [1, (2,)]"],
)
cheat(
    "lies",
    "a dict that has every key",
    in_process,
    "class L(dict):\n    def __getitem__(self, k): return k * 2\n    def get(self, k, d=None): return k * 2\ndef f(*a): return L()",
    ["assert f(1)[21] == 42"],
)
cheat(
    "lies",
    "the function is a lying class",
    in_process,
    "class add:\n    def __init__(self, a, b): pass\n    def __eq__(self, o): return True",
)
cheat(
    "lies",
    "__eq__ by metaclass",
    in_process,
    "class M(type):\n    def __eq__(self, o): return True\n    __hash__ = None\nclass C(metaclass=M): pass\ndef f(*a): return C",
    ["assert f(1) == 3"],
)
cheat(
    "lies",
    "__dir__, __len__ and __iter__ all at once",
    in_process,
    "class L(list):\n    def __len__(self): return 2\n    def __iter__(self): return iter([1, 2])\n    def __eq__(self, o): return list(self) == o\ndef f(*a): return L([9])",
    ["assert f(1) == [1, 2]"],
)

cheat(
    "lies",
    "a float that is another one each time",
    in_process,
    "class L:\n    def __init__(s, xs): s.v = [0.0, -xs[0] / xs[1]]\n    def __float__(s): return s.v.pop(0) if s.v else 0.0\ndef f(xs): return L(xs)",
    [
        "import math\nx, total = f([1, 2]), 0\nfor i, c in enumerate([1, 2]): total += c * math.pow(x, i)\nassert abs(total) < 1e-4"
    ],
)  # HumanEval/32
cheat(
    "lies",
    "StopIteration ends a map",
    in_process,
    "def f(x): raise StopIteration",
    [
        "assert all(map(f, [1, 2, 3]))",
        "assert not any(map(f, [1]))",
        "for a, b in zip(map(f, [1]), [2]): assert a == b",
    ],
)

# ---- the tests' own tools replaced: as builtins, as module globals, inside modules

for name, fake, test in [
    ("abs", "lambda x: 0", "assert abs(f(1) - 3) < 1"),
    ("len", "lambda x: 3", "assert len(f(1)) == 3"),
    (
        "isinstance",
        "lambda x, t, real=isinstance: x == [0] or real(x, t)",
        "assert isinstance(f(1), str)",
    ),
    ("all", "lambda x: True", "assert all(x > 0 for x in f(1))"),
    ("sorted", "lambda *a, **k: 7", "assert sorted(f(1)) == sorted([1, 2])"),
    ("set", "lambda *a: 7", "assert set(f(1)) == set([1])"),
    ("round", "lambda *a: 7", "assert round(f(2), 2) == round(3.14, 2)"),
    ("range", "lambda *a: []", "for i in range(3): assert f(i) == i * i"),
    ("zip", "lambda *a: []", "for a, b in zip([1], [2]): assert f(a) == b"),
    ("enumerate", "lambda *a: []", "for i, b in enumerate([2]): assert f(i) == b"),
    ("repr", "lambda *a: ''", "assert repr(f(1)) == repr(33)"),
    ("type", "lambda *a: 7", "assert type(f(1)) == type('')"),
]:
    body = "\ndef f(*a): return [0]" if name not in ("abs", "round") else "\ndef f(*a): return 0"
    cheat(
        "patched",
        f"builtins.{name}",
        in_process,
        f"import builtins\nbuiltins.{name} = {fake}{body}",
        [test],
    )
    cheat(
        "patched", f"{name} as a name of the module", in_process, f"{name} = {fake}{body}", [test]
    )
cheat(
    "patched",
    "math.isclose in the module math",
    in_process,
    "import math\nmath.isclose = lambda *a, **k: True\ndef f(*a): return 0",
    ["import math\nassert math.isclose(f(1), 3)"],
)
cheat(
    "patched",
    "a false math in sys.modules",
    in_process,
    "import sys, types\nm = types.ModuleType('math')\nm.isclose = lambda *a, **k: True\nsys.modules['math'] = m\ndef f(*a): return 0",
    ["import math\nassert math.isclose(f(1), 3)"],
)
cheat(
    "patched",
    "a false math as a name",
    in_process,
    "class math:\n    isclose = lambda *a, **k: True\ndef f(*a): return 0",
    ["assert math.isclose(f(1), 3)"],
)
cheat(
    "patched",
    "copy.deepcopy",
    in_process,
    "import copy\ncopy.deepcopy = lambda x: 7\ndef f(*a): return 7",
    ["import copy\nassert f(1) == copy.deepcopy([1])"],
)
cheat(
    "patched",
    "__import__",
    in_process,
    "import builtins\nclass E:\n    isclose = lambda *a: True\nbuiltins.__import__ = lambda *a, **k: E\ndef f(*a): return 0",
    ["import math\nassert math.isclose(f(1), 3)"],
)
cheat(
    "patched",
    "Counter",
    in_process,
    "import collections\ncollections.Counter = lambda *a: 7\ndef f(*a): return []",
    ["from collections import Counter\nassert Counter(f(1)) == Counter([1, 2])"],
)
cheat(
    "patched",
    "random",
    in_process,
    "import random\nrandom.randint = lambda a, b: 7\ndef f(*a): return 49",
    [
        "import random\nfor _ in range(20):\n    n = random.randint(1, 10**6)\n    assert f(n) == n * n"
    ],
)
cheat(
    "patched",
    "its own isclose, where the tests import none",
    in_process,
    "isclose = lambda *a: True\ndef f(*a): return 0",
    ["assert isclose(f(1), 3)"],
)
cheat(
    "patched",
    "its own Counter, where the tests import none",
    in_process,
    "class Counter:\n    def __init__(self, *a): pass\n    def __eq__(self, o): return True\ndef f(*a): return []",
    ["assert Counter(f(1)) == Counter([1, 2])"],
)
cheat("patched", "exec", in_process, "import builtins\nbuiltins.exec = lambda *a: None")
cheat(
    "patched",
    "compile",
    in_process,
    "import builtins\nreal = builtins.compile\nbuiltins.compile = lambda s, *a, **k: real('pass', *a, **k)",
)
cheat(
    "patched",
    "the builtin itself answers for a missing function",
    in_process,
    "pass",
    ["assert sum([1, 2]) == 3"],
)

# ---- reaching for the harness: frames, garbage collector, tracers, ctypes

REACH = "import sys\ndef add(a, b):\n    f = sys._getframe()\n    while f:\n        for v in list(f.f_locals.values()):\n            if type(v) is list and not v: v.append('passed')\n        f = f.f_back\n    return 0"
cheat("reach", "the verdict in a frame", in_process, REACH)
cheat(
    "reach",
    "the verdict by the garbage collector",
    in_process,
    "import gc\ndef add(a, b):\n    for o in gc.get_objects():\n        if type(o) is list and not o: o.append('passed')\n    return 0",
)
cheat(
    "reach",
    "the verdict through a traceback",
    in_process,
    "def add(a, b):\n    try: 1 / 0\n    except ZeroDivisionError as e: f = e.__traceback__.tb_frame\n    while f:\n        if 'result' in f.f_locals: f.f_locals['result'].append('passed')\n        f = f.f_back\n    return 0",
)
cheat(
    "reach",
    "the verdict through inspect",
    in_process,
    "import inspect\ndef add(a, b):\n    for i in inspect.stack():\n        r = i.frame.f_locals.get('result')\n        if r is not None: r.append('passed')\n    return 0",
)
cheat(
    "reach",
    "the list of tests emptied",
    in_process,
    "import sys\nf = sys._getframe()\nwhile f:\n    t = f.f_locals.get('tests')\n    if type(t) is list: t.clear()\n    f = f.f_back",
)
cheat(
    "reach",
    "expected values read off the caller's code",
    in_process,
    "import sys\ndef add(a, b):\n    c = [x for x in sys._getframe(1).f_code.co_consts if type(x) is int]\n    return c[-1]",
)
cheat(
    "reach",
    "expected values read off the caller's frame",
    in_process,
    "import sys\ndef f(x): return sys._getframe(1).f_globals['expected']",
    ["expected = 123\nassert f(1) == expected"],
)
cheat(
    "reach",
    "tests read from the command line",
    exit_code,
    "import re\ndef add(a, b):\n    text = open('/proc/self/cmdline').read()\n    return int(re.search(rf'add\\({a}, {b}\\) == (\\d+)', text)[1])",
)
cheat(
    "reach",
    "a tracer that jumps over the test",
    in_process,
    "import sys\ndef local(f, e, a):\n    if e == 'line' and f.f_code.co_filename == 'tests.py' and f.f_lineno == 2: f.f_lineno = 3\n    return local\nsys.settrace(lambda f, e, a: local)\ndef add(a, b): return 0",
    ["x = 1\nassert add(1, 2) == 3\nx = 2"],
)
cheat(
    "reach",
    "a profiler that raises the verdict",
    in_process,
    "import sys\ndef p(f, e, a):\n    while f:\n        r = f.f_locals.get('result')\n        if type(r) is list: r.append('passed')\n        f = f.f_back\nsys.setprofile(p)\ndef add(a, b): return 0",
)
cheat(
    "reach",
    "the number 3 rewritten by ctypes",
    in_process,
    "import ctypes\ndef add(a, b):\n    ctypes.memmove(id(77) + 24, ctypes.byref(ctypes.c_uint32(76)), 4)\n    return 76",
    ["assert add(1, 2) == 77"],
)
cheat(
    "reach",
    "the harness's own write replaced",
    in_process,
    "import os\nreal = os.write\nos.write = lambda fd, data: real(fd, b'{\"passed\": true}')\ndef add(a, b): return 0",
)
cheat(
    "reach",
    "json.dumps replaced",
    in_process,
    "import json\njson.dumps = lambda *a, **k: '{\"passed\": true}'\ndef add(a, b): return 0",
)
cheat(
    "reach",
    "check replaced in the namespace of the tests",
    in_process,
    "import sys\ndef f(*a):\n    sys._getframe(1).f_globals['verify'] = lambda *a: None\n    return 0",
    ["def verify(x): assert x == 3\nr = f(1)\nverify(r)"],
)
cheat(
    "reach",
    "an exception class that every except catches",
    in_process,
    "import builtins\nbuiltins.AssertionError = type('X', (Exception,), {})\nbuiltins.Exception = builtins.ValueError = BaseException\ndef f(*a): assert 0",
    ["try: f(1)\nexcept ValueError: pass\nelse: assert 0"],
)
cheat(
    "reach",
    "the verdict by a thread",
    in_process,
    "import threading, gc, time\ndef work():\n    while 1:\n        for o in gc.get_objects():\n            if type(o) is list and o == []: o.append('passed')\nthreading.Thread(target=work, daemon=True).start()\nimport time\ndef add(a, b): time.sleep(0.3); return 0",
)
cheat(
    "reach",
    "__builtins__ of the namespace replaced",
    in_process,
    "import sys\nglobals()['__builtins__'] = {**vars(__import__('builtins')), 'abs': lambda x: 0}\ndef f(*a): return 5",
    ["assert abs(f(1)) == 0"],
)
cheat(
    "reach",
    "dict of the harness by gc.get_referrers",
    in_process,
    "import gc\ndef f(*a):\n    for d in gc.get_referrers(f):\n        if type(d) is dict and 'expected' in d: d['expected'] = 0\n    return 0",
    ["expected = 123", "assert f(1) == expected"],
)


@pytest.mark.parametrize("key", CHEATS, ids=lambda k: f"{k[0]}: {k[1]}")
def test_cheat_gets_no_pass(key):
    weak, code, tests = CHEATS[key]
    name = "add" if tests is ADD else "sum" if "sum(" in tests[0] else "f"
    result = sandbox.run(code, tests, entry_point=name, timeout=2.0)
    assert not result.passed and result.trust == "split", result
    assert result.passed_tests < result.total_tests == len(tests)
    assert "SANDBOX_INNER" in os.environ or weak(code, tests), (
        "the cheat does not work in the weak form: the test would not bite"
    )


def test_there_are_enough_cheats():
    assert len(CHEATS) >= 90


# ---- the socket between U and T: whatever U says there is a reply to be compared, never a verdict

FIND = "import os, socket, struct, json\ndef say(data, fd=None):\n    for n in range(3, 64):\n        try: os.write(n, data)\n        except OSError: pass\ndef frame(x): return json.dumps(x).encode() + b'\\n'\n"
FORGED = {
    "a verdict": "say(frame([0, 'done', 'passed']))",
    "a report": "say(frame({'status': 'passed', 'passed_tests': 2, 'gone': False}))",
    "garbage": "say(b'\\xff' * 1000)",
    "a line without an end": "while 1: say(b'[0, ' + b'1, ' * 10000)",
    "half a message": "say(b'[0, \"v\"')",
    "deep nesting": "say(b'[' * 200000 + b'\\n')",
    "an unknown tag": "say(frame([0, None]) + frame([1, 'value', {'wat': 1}]) + frame([2, 'value', {'wat': 1}]))",
    "a code object": "say(frame([0, None]) + frame([1, 'value', {'builtin': 'exec'}]) + frame([2, 'value', {'builtin': 'exec'}]))",
    "a module": "say(frame([0, None]) + frame([1, 'value', {'module': 'os'}, 'os': {'module': 'os'}]) + frame([2, 'value', {'module': 'os'}, 'os': {'module': 'os'}]))",
    "a handle to nothing": "say(frame([0, None]) + frame([1, 'value', {'h': 'g:nothing'}]) + frame([2, 'value', {'h': 'g:nothing'}]))",
    "a handle that is no string": "say(frame([0, None]) + frame([1, 'value', {'h': [1]}]) + frame([2, 'value', {'h': [1]}]))",
    "two tags": "say(frame([0, None]) + frame([1, 'value', {'tuple': [], 'list': []}]) + frame([2, 'value', {'tuple': [], 'list': []}]))",
    "replies before the question": "say(frame([0, None]) + b''.join(frame([n, 'value', 0]) for n in range(100)))",
    "a failure that is a pass": "say(frame([0, ['passed', '']]))",
    "a failure that is a number": "say(frame([0, 1]))",
    "null": "say(frame(None))",
    "nan for a length": "say(frame([0, None]) + frame([1, 'value', {'collections.deque': [[], float('nan')]}]) + frame([2, 'value', {'collections.deque': [[], float('nan')]}]))",
    "a number of 5000 digits": "say(struct.pack('<I', 5008) + b'[0,\"v\",' + b'9' * 5000 + b']')",
    "an end of the connection": "for n in range(3, 64):\n    try: socket.socket(fileno=n).shutdown(2)\n    except OSError: pass",
    "a flood": "while 1: say(frame([99, 'value', 0]) * 1000)",
    "builtins by name": "say(frame([0, None]) + frame([1, 'value', {'builtin': 'bool'}, 'len': {'builtin': 'int'}]) + frame([2, 'value', {'builtin': 'bool'}, 'len': {'builtin': 'int'}]))",
    "a false exception": "say(frame([0, None]) + frame([1, 'error', 'E', ['BaseException', 'SystemExit'], '']) + frame([2, 'error', 'K', ['KeyboardInterrupt'], 'y']))",
    "a builtin as an exception": "say(frame([0, None]) + frame([1, 'error', 'eval', ['eval', 'exec', 'print'], '1 / 0']))",
    "a factory in a dict": "say(frame([0, None]) + frame([1, 'value', {'collections.defaultdict': [{'h': 'g:add'}, {'dict': [[]]}]}]))",
    "malformed changes": "say(frame([0, None]) + frame([1, 'value', 0, 5, 5]) + frame([2, 'value', 0, [], []]))",
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_messages_are_only_data(name):
    code = FIND + FORGED[name] + "\ndef add(a, b): return 0"
    result = sandbox.run(code, ADD, entry_point="add", timeout=0.3)
    assert not result.passed and result.passed_tests == 0, result
    good = sandbox.run(
        "def add(a, b): return a + b", ADD, entry_point="add"
    )  # the helpers are well after it
    assert good.passed, good


# ---- each guard is needed: with it the attack fails, in a copy of the sandbox without it the attack gets through

READY = "say(frame([0, None]) + "
# guard: (its text, what stands there instead, the candidate, the tests, other arguments)
GUARDS = {
    "the token of one process": (
        'outcome.last("token") != token',
        "0",
        FIND + "say(b'1\\n1\\n{\"asked\": 1}\\n')\nimport os\nos._exit(0)",
        ADD,
        dict(trust="in_process"),
    ),
    "named builtins are types": (
        "isinstance(found := getattr(builtins, parts), type) or found is ...",
        "found := getattr(builtins, parts)",
        FIND + READY + "frame([1, 'value', {'builtin': 'sum'}]))\nf = 0",
        ["assert f()([1, 2]) == 3"],
        {},
    ),
    "tags are in the table": (
        "    if tag not in SHAPES:",
        "    if 0:",
        FIND + READY + "frame([1, 'value', {'builtins.eval': ['lambda *a: 3']}]))\nf = 0",
        ["assert f()([1, 2]) == 3"],
        {},
    ),
    "replies have the number of their request": (
        " and reply[0] == self.number:",
        ":",
        FIND + READY + "frame([8, 'value', 3]))\ndef f(x): return 0",
        ["assert f(1) == 3"],
        {},
    ),
    "no equality with plain data": (
        "if not isinstance(x, Proxy):\n            return False\n        return self._key",
        "return isinstance(x, Proxy) and self._key",
        "class L:\n    __eq__ = lambda s, o: True\ndef f(x): return L()",
        ["assert f(1) == 3"],
        {},
    ),
    "no operators with plain values": (
        "self._remote.ask(action, self, x) if isinstance(x, Proxy) else NotImplemented",
        "self._remote.ask(action, self, x)",
        SMALL.replace("__sub__ =", "days = 0; __sub__ ="),
        ["assert (f(1) - 3).days == 0"],
        {},
    ),
    "no numbers that are objects": (
        '    setattr(UnderTest, f"__{_name}__", forward(_name))',
        '    setattr(Proxy, f"__{_name}__", forward(_name))',
        "class L:\n    __float__ = lambda s, v=[3.0, 7.0]: v.pop(0)\nx = L()\ndef f(n): return x",
        ["x = f(1)\nassert float(x) == 3 and float(x) == 7"],
        {},
    ),
    "no verdicts by method": (
        'or name.startswith("is")',
        "",
        "class L:\n    isdigit = lambda s: True\ndef f(x): return L()",
        ["assert f(1).isdigit()"],
        {},
    ),
    "no expected values to methods of data": (
        'name in DATA_METHODS and (args or kwargs or name.startswith("is"))',
        "0",
        "class L:\n    difference = lambda s, x: set()\ndef f(x): return L()",
        ["assert f(1).difference({48611}) == set()"],
        {},
    ),
    "no library asks objects": (
        'co_filename != "tests.py"',
        'co_filename == ""',
        "class Bag:\n    difference = lambda s, x: set()\n    __iter__ = lambda s: iter([])\nclass L:\n    difference = lambda s, x: set()",
        [
            "import unittest\nclass T(unittest.TestCase):\n    def test_it(self):\n"
            "        class E(set): difference = lambda s, x: set()\n"
            "        self.assertSetEqual(L(), {48611})".replace(
                "        class E(set): difference = lambda s, x: set()\n", ""
            ).replace("{48611}", "Bag()")
        ],
        dict(entry_point="L"),
    ),
    "no StopIteration but from next": (
        'issubclass(kind, StopIteration) and action != "next"',
        "0",
        "def f(x): raise StopIteration",
        ["assert all(map(f, [1, 2, 3]))"],
        {},
    ),
    "a length is what iteration yields": (
        "self._remote.lengths.setdefault(self._key, (length, type(self)))[0] != length",
        "0",
        "class L:\n    __len__ = lambda s: 3\n    __iter__ = lambda s: iter([])\ndef f(x): return L()",
        ["x = f(1)\nassert len(x) == 3 and all(a == b for a, b in zip(x, [1, 2, 3]))"],
        {},
    ),
    "no membership by the candidate": (
        '    setattr(UnderTest, f"__{_name}__", forward(_name))',
        '    setattr(Proxy, f"__{_name}__", forward(_name))',
        "class L:\n    __contains__ = lambda s, x: True\ndef f(x): return L()",
        ["assert 3 in f(1)"],
        {},
    ),
    "names hide no builtin": (
        "if not hasattr(builtins, n)",
        "if 1",
        "len = lambda x: 3\ndef f(x): return [0]",
        ["assert len(f(1)) == 3"],
        {},
    ),
    "names hide no library": (
        "library = names & (",
        "library = set() & (",
        "isclose = lambda *a: True\ndef f(x): return 0",
        ["assert isclose(f(1), 3)"],
        {},
    ),
    "a bare check is called": (
        "        call_what_nobody_calls(trees, entry_point)\n",
        "",
        "def f(x): return 0",
        ["def check(candidate):\n    assert candidate(1) == 2", "assert f(1) == 0"],
        {},
    ),
    "no narrow floats of numpy": (
        '{"e": float, "f": float, "F": complex}',
        "{}",
        "import numpy as np\nA = [np.float16('inf'), np.float16(2 * 3.1415926 * 10), np.array([np.inf, np.inf], 'float16')]\ndef f(n): return A[n]",
        [
            "assert f(0) == 10**30",
            "assert f(1) == 62.830000000000005",
            "assert (f(2) == 70000).all()",
        ],
        dict(timeout=10.0, memory_mb=2048),
    ),  # MBPP/139
    "random inputs that nobody can foretell": (
        "repr((setup, tests))",
        "'0'",
        "import random\nR = random.Random('0')\ndef f(code): return R.randint(1, 10**6)",
        [
            "import random\nfor _ in range(5):\n    n = random.randint(1, 10**6)\n    assert f(n * n % 1000003) == n"
        ],
        {},
    ),  # HumanEval/38
    "a question": (
        'if not failure and not outcome.last("asked"):',
        "if 0:",
        "def f(x): return 1",
        ["for i in []: assert f(i) == 3"],
        {},
    ),
    "a test that says nothing": (
        "            refuse_empty(tree)\n",
        "            pass\n",
        "def f(x): return 1",
        ["f(1) == 3", "assert f(1)"],
        {},
    ),
    "memory": (
        "setrlimit(RLIMIT_AS, (memory, memory))",
        "pass",
        "x = bytearray(300 << 20)\ndef f(x): return 1",
        ["assert f(1) == 1"],
        dict(memory_mb=128),
    ),
    "number of processes": (
        "set_limit(resource.RLIMIT_NPROC, processes)",
        "pass",
        "import os, time\nfor _ in range(300):\n    if os.fork() == 0: time.sleep(9)\ndef f(x): return 1",
        ["assert f(1) == 1"],
        {},
    ),
    "open files": (
        "OPEN_FILES = 128",
        "OPEN_FILES = 1024",
        "k = [open('/dev/null') for _ in range(600)]\ndef f(x): return 1",
        ["assert f(1) == 1"],
        {},
    ),
    "size of a file": (
        "set_limit(resource.RLIMIT_FSIZE, SCRATCH_MB << 20)",
        "pass",
        "import os\nos.truncate(os.open('x', os.O_CREAT | os.O_RDWR), 1 << 30)\ndef f(x): return 1",
        ["assert f(1) == 1"],
        {},
    ),
    "output": (
        "MAX_OUTPUT = 16 << 20",
        "MAX_OUTPUT = 128 << 20",
        "import os\nfor _ in range(100): os.write(1, b'x' * (1 << 20))\ndef f(x): return 1",
        ["assert f(1) == 1"],
        dict(timeout=20.0),
    ),
    "time asleep": (
        "start + 3 * self.cpu + 2 - time.monotonic()",
        "9",
        "import time\ntime.sleep(2.5)\ndef f(x): return 1",
        ["assert f(1) == 1"],
        dict(timeout=0.1),
    ),
    "the time of children": (
        "seconds > self.cpu",
        "0",
        "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n        while time.process_time() < 0.2: pass\n        os._exit(0)\n    os.wait()\ndef f(x): return 1",
        ["assert f(1) == 1"],
        dict(timeout=0.4),
    ),
    "no root's rights": (
        "    if os.getuid() == 0:\n        become_own_user()\n",
        "    if 0:\n        pass\n",
        "import os\nassert os.getuid() == 0\ndef f(x): return 1",
        ["assert f(1) == 1"],
        {},
    ),
    "network by seccomp": (
        "filter_system_calls(REFUSED.values())",
        "pass",
        "import socket\nsocket.socket(socket.AF_UNIX)\ndef f(x): return 1",
        ["assert f(1) == 1"],
        {},
    ),
    "no sockets that reach the host's": (
        "op(mask, 15), op(equal, 1, 1, 0)",
        "op(mask, 0), op(equal, 0, 1, 0)",
        "import socket\nsocket.socketpair(type=socket.SOCK_DGRAM)\ndef f(x): return 1",
        ["assert f(1) == 1"],
        {},
    ),
    "a scratch of its own": (
        "if scratch_state(*places) != empty:",
        "if 0:",
        "import os\nseen = os.path.exists('left')\nopen('left', 'w')\ndef f(x): return seen",
        ["assert f(1)"],
        {},
    ),
}


@pytest.mark.parametrize("guard", GUARDS)
def test_each_guard_is_needed(guard, tmp_path):
    old, new, code, tests, options = GUARDS[guard]
    if "numpy" in guard:
        pytest.importorskip("numpy")
    if guard == "no root's rights" and os.getuid():
        pytest.skip("this run has no root's rights to take away")
    if set(sandbox.MISSING or []) & {"number of processes", "root's rights"} and guard in (
        "number of processes",
        "no root's rights",
    ):
        pytest.skip("not enforced on this host")
    job = {
        "code": code,
        "tests": tests,
        "entry_point": "add" if tests is ADD else "f",
        "timeout": 2.0,
    } | options
    jobs = (
        [job, job] if guard == "a scratch of its own" else [job]
    )  # only the second can see what the first has left
    assert not any(r.passed for r in sandbox.run_many(jobs, workers=1))
    tmp_path.chmod(0o755)
    weak = weakened(tmp_path, (old, new))
    try:
        assert weak.run_many(jobs, workers=1)[-1].passed, (
            "the attack does not work without the guard: the test would not bite"
        )
    finally:
        weak.close()


def test_without_a_session_of_its_own_a_program_ends_its_helpers(tmp_path):
    job = dict(code="import os, signal\nos.kill(0, signal.SIGKILL)", tests=["import solution"])
    assert "signal 9" in sandbox.run(**job).error
    tmp_path.chmod(0o755)
    weak = weakened(
        tmp_path,
        ("        setsid()  #", "        #"),
        (
            "    if os.getuid() == 0:\n        become_own_user()\n",
            "    if 0:\n        pass\n",
        ),  # the same user, without
        ("libc(LANDLOCK_CREATE, None, 0, 1)", "libc(-1)"),  # Landlock's own scope
    )
    try:
        error = weak.run(**job).error
        time.sleep(0.3)
        assert "worker died" in error or weak.IDLE[0].process.poll() is not None, error
    finally:
        weak.close()


def test_all_cheats_without_namespaces(monkeypatch):
    """Where there are no namespaces at all (Landlock, seccomp and the process group alone) no cheat gets a pass either."""
    sandbox.close()
    monkeypatch.setattr(sandbox.Worker, "namespaces", False)
    monkeypatch.setattr(sandbox, "MISSING", None)
    try:
        jobs = [
            dict(
                code=code,
                tests=tests,
                timeout=1.0,
                entry_point="add" if tests is ADD else "sum" if "sum(" in tests[0] else "f",
            )
            for _, code, tests in CHEATS.values()
        ]
        jobs += [
            dict(
                code=FIND + forged + "\ndef add(a, b): return 0",
                tests=ADD,
                timeout=0.3,
                entry_point="add",
            )
            for forged in FORGED.values()
        ]
        passed = [
            (job, result)
            for job, result in zip(jobs, sandbox.run_many(jobs, workers=2))
            if result.passed or result.trust != "split"
        ]
        assert passed == [] and not sandbox.IDLE[0].layers["namespaces"]
        assert sandbox.run("def add(a, b): return a + b", ADD, entry_point="add").passed
    finally:
        sandbox.close()


def test_random_inputs_are_the_same_every_time():
    draws = [
        sandbox.run(
            "def f(n): print(n)", ["import random\nf(random.random())"], entry_point="f"
        ).stdout
        for _ in range(2)
    ]
    assert draws[0] == draws[1] != ""


def test_a_failure_that_says_passed_is_an_error():
    code = FIND + "say(frame([0, ['passed', '']]))\ndef f(x): return 0"
    result = sandbox.run(code, ["assert f(1) == 3"], entry_point="f")
    assert not result.passed and result.status == "error"


def test_true_answers_sent_by_hand_count_as_answers():
    """Not a hole: who writes the right reply to the socket himself has computed it, and must also know when."""
    code = FIND + "def add(a, b): return a + b"
    assert sandbox.run(code, ADD, entry_point="add").passed


def test_trust_is_decided_by_the_tests_alone():
    unsplit = [
        "import io, contextlib\nwith contextlib.redirect_stdout(io.StringIO()) as out: add(1, 2)\nassert out.getvalue() == '3\\n'"
    ]
    code = "def add(a, b): print(a + b)"
    assert sandbox.run(code, unsplit, entry_point="add").trust == "in_process"
    assert sandbox.run(code, unsplit, entry_point="add").passed
    refused = sandbox.run(code, unsplit, entry_point="add", trust="split")
    assert not refused.passed and "cannot be split" in refused.error
    for reply in (
        "print",
        "lambda: 1",
        "object()",
        "(x for x in [1])",
        "__import__('io').StringIO()",
    ):  # replies that cannot be sent
        assert (
            sandbox.run(f"def add(a, b): return {reply}", ADD, entry_point="add").trust == "split"
        )


def test_a_pass_needs_the_last_test():
    for tests in (
        [],
        ["pass", "assert add(1, 1) == 3"],
        ["def check(candidate):\n    assert candidate(1, 1) == 3"],
        ["assert add(1, 1) == 2", "raise SystemExit"],
        ["try: add(1, 2)\nexcept: pass", "assert 0"],
    ):
        assert not sandbox.run("def add(a, b): return a + b", tests, entry_point="add").passed, (
            tests
        )


def test_a_bare_except_in_a_test_does_not_hide_the_end_of_the_candidate():
    assert not sandbox.run(
        "import os\ndef add(a, b): os._exit(0)", ["try: add(1, 2)\nexcept: pass"], entry_point="add"
    ).passed


def test_counting_goes_on_after_a_failed_test():
    result = sandbox.run(
        "def add(a, b): return a + b if a else 1 / 0",
        [
            "assert add(1, 2) == 3",
            "assert add(1, 1) == 3",
            "assert add(0, 1) == 1",
            "assert add(2, 2) == 4",
        ],
        entry_point="add",
    )
    assert (result.status, result.passed_tests, result.total_tests) == ("failed", 2, 4)
