"""Who holds the tests and who compares. Used by sandbox.py; walls.py forks the processes.

    caller ── code, tests ──> J  holds the tests, asks the candidate, compares with its own builtins
       ^                      │  requests: "call f with these values"; replies: plain data, as JSON
       └────── verdict ───────┤
                              └──> U  holds the candidate's code, and nothing else

What U answers is data: it can be wrong, and it is never a verdict. What is no plain data (a class
under test, a generator) stays in U. J holds a Proxy for it, which never equals plain data.
J and U are new for each job. J stands behind the same walls, since tests may do anything with an
answer.

Some tests need the candidate in their own process: they pass functions, redirect stdout, seed its
random numbers. Their text says so (`why_one_process`), or J finds that it cannot send what they
made. They run beside the candidate in U, a weaker word: the Result says `trust="in_process"`.
What a candidate answers never leads there.
"""

import ast
import builtins
import collections
import contextlib
import copy
import enum
import functools
import json
import marshal
import operator
import re
import sys
import warnings
from decimal import Decimal
from os import read, write
from types import SimpleNamespace

MAX_MESSAGE = 16 << 20  # bytes of one message between J and U
MAX_DEPTH = 200  # nesting of one value

# ---------------------------------------- values on the wire: JSON with own tags, no pickle

LARGE = 1 << 10000  # beyond it decimal digits take too long
ATOMS = {int, float, str, bool, type(None)}
BASES = {int: int.__int__, float: float.__float__, str: str.__str__}  # of a subclass: its value


def attributes(names):
    return lambda x, base: [getattr(x, name) for name in names.split()]


# type: the arguments that make x again. Its base class is asked, so that no override answers.
SHAPES = {
    "tuple": lambda x, base: [list(base.__iter__(x))],
    "set": lambda x, base: [list(base.__iter__(x))],
    "frozenset": lambda x, base: [list(base.__iter__(x))],
    "bytes": lambda x, base: [base.decode(x, "latin-1"), "latin-1"],
    "bytearray": lambda x, base: [base.decode(x, "latin-1"), "latin-1"],
    "dict": lambda x, base: [[[k, v] for k, v in dict.items(x)]],
    "complex": attributes("real imag"),
    "array.array": lambda x, base: [x.typecode, base.tolist(x)],
    "range": attributes("start stop step"),
    "slice": attributes("start stop step"),
    "dict_keys": lambda x, base: [dict.fromkeys(x)],
    "dict_values": lambda x, base: [dict(enumerate(x))],
    "dict_items": lambda x, base: [dict(x)],
    "collections.Counter": lambda x, base: [dict(base.items(x))],
    "collections.OrderedDict": lambda x, base: [dict(base.items(x))],
    "collections.defaultdict": lambda x, base: [x.default_factory, dict(base.items(x))],
    "collections.deque": lambda x, base: [list(base.__iter__(x)), x.maxlen],
    "decimal.Decimal": lambda x, base: [base.__str__(x)],
    "fractions.Fraction": attributes("numerator denominator"),
    "datetime.timezone": lambda x, base: [base.utcoffset(x, None)],
    "datetime.timedelta": attributes("days seconds microseconds"),
    "datetime.date": attributes("year month day"),
    "datetime.time": attributes("hour minute second microsecond tzinfo"),
    "datetime.datetime": attributes("year month day hour minute second microsecond tzinfo"),
    "zoneinfo.ZoneInfo": attributes("key"),
    "pathlib.PurePosixPath": lambda x, base: [base.__str__(x)],
    "pathlib.PosixPath": lambda x, base: [base.__str__(x)],
    "uuid.UUID": lambda x, base: [base.__str__(x)],
    "numpy.generic": lambda x, base: [x.dtype.str, x.item()],
    "numpy.ndarray": lambda x, base: [x.dtype.str, list(x.shape), base.tolist(x)],
}


def pack(x, other, depth=0):
    """Make JSON of x: atoms and lists as they are, the rest as {type: arguments}.

    other(x) stands for what is no plain data.
    """
    kind = type(x)
    if kind is int and not -LARGE < x < LARGE:
        return {"int": hex(x)}
    if kind in ATOMS or kind is list and ATOMS.issuperset(map(type, x)):
        return x
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep")

    def parts(values):
        return [pack(value, other, depth + 1) for value in values]

    if x is ...:
        return {"builtin": "Ellipsis"}
    if kind is type and getattr(builtins, x.__name__, None) is x:
        return {"builtin": x.__name__}
    if issubclass(kind, enum.Enum):
        plain = issubclass(kind, (int, str))
        return {"enum": parts([kind.__name__, x.name, x.value])} if plain else other(x)
    fields = getattr(kind, "_fields", None)
    if issubclass(kind, tuple) and type(fields) is tuple and tuple.__len__(x) == len(fields):
        return {"named": [kind.__name__, list(fields), parts(tuple.__iter__(x))]}
    if kind.__module__ == "numpy" and (x.dtype.hasobject or x.dtype.names):
        return other(x)
    for base in kind.__mro__[:-1]:
        name = f"{base.__module__}.{base.__qualname__}".removeprefix("builtins.")
        if base in BASES:
            return BASES[base](x)
        if base is list:
            return parts(list.__iter__(x))
        if name in SHAPES:
            return {name: parts(SHAPES[name](x, base))}
    return other(x)


def unpack(data, handle):
    """Make the value that `data` stands for; handle(key) gives the object behind a handle."""
    if type(data) is list:
        return [unpack(v, handle) if type(v) in (list, dict) else v for v in data]
    if type(data) is not dict:
        return data
    ((tag, parts),) = data.items()
    if tag == "h":
        return handle(parts)
    if tag == "int":
        return int(parts, 16)
    if tag == "builtin" and (isinstance(found := getattr(builtins, parts), type) or found is ...):
        return found
    if tag == "named":
        return named_tuple(parts[0], *parts[1])(*[unpack(v, handle) for v in parts[2]])
    if tag == "enum":
        return member(*parts)
    if tag not in SHAPES:
        raise ValueError("no such type")
    parts = [unpack(v, handle) for v in parts]
    if tag.startswith("dict_"):
        return getattr(parts[0], tag.removeprefix("dict_"))()
    module, _, name = tag.rpartition(".")
    module = __import__(module or "builtins")
    if module.__name__ == "numpy":
        return wide_numpy(module, name, parts)
    return getattr(module, name)(*parts)


@functools.lru_cache(maxsize=64)
def named_tuple(name, *fields):
    return collections.namedtuple(name, fields)


@functools.lru_cache(maxsize=64)
def member(class_name, name, value):
    base = enum.IntEnum if type(value) is int else enum.StrEnum
    return base(class_name, {name: value})[name]


def wide_numpy(numpy, name, parts):
    """An array or number of numpy, never of a narrow float.

    Numpy rounds what it is compared with to that type: float16("inf") == 70000 is true.
    """
    if name == "generic":
        x = numpy.dtype(parts[0]).type(parts[1])
    else:
        x = numpy.array(parts[2], parts[0]).reshape(parts[1])
    wide = {"e": float, "f": float, "F": complex}.get(x.dtype.char)
    if not wide:
        return x
    return x.astype(wide) if x.shape or name == "ndarray" else wide(x)


# The C functions below json.dumps and json.loads: a new process runs as little Python as it can,
# since each page that it touches first is copied.
quote = json.encoder.encode_basestring
encode = json.encoder.c_make_encoder(None, None, quote, None, ":", ",", False, False, True)
scan = json.JSONDecoder().scan_once


def encoded(data):
    """Plain data as a line of JSON."""
    return "".join([*encode(data, 0), "\n"]).encode("utf-8", "surrogatepass")


def message(data):
    line = encoded(data)
    if len(line) > MAX_MESSAGE:
        raise OverflowError(f"a message of {len(line)} bytes is too large")
    return line


class Line:
    """One end of a socket. It ends with its process."""

    def __init__(self, fd):
        self.fd, self.data = fd, bytearray()

    def send(self, data):
        while data:
            data = data[write(self.fd, data) :]

    def fill(self):
        part = read(self.fd, 1 << 16)
        if not part:
            raise EOFError
        self.data += part

    def take(self, size):
        """The next `size` bytes; EOFError when the other side has gone."""
        while len(self.data) < size:
            self.fill()
        data = self.data[:size]
        del self.data[:size]
        return data

    def receive(self):
        """The next message; EOFError also when the other side talks nonsense."""
        seen = 0
        while (end := self.data.find(b"\n", seen)) < 0:
            seen = len(self.data)
            if seen > MAX_MESSAGE:
                raise EOFError
            self.fill()
        try:
            return scan(self.take(end + 1).decode("utf-8", "surrogatepass"), 0)[0]
        except (ValueError, RecursionError, StopIteration):
            raise EOFError from None


# ---------------------------------------- U: runs the candidate and answers J


def make_module(code, name="solution"):
    """The candidate's module, as `solution` and as `__main__` (for pickle and dataclasses)."""
    module = type(sys)(name)
    module.__file__ = "solution.py"
    module.__loader__ = SimpleNamespace(get_source=lambda name: code)
    sys.modules["solution"] = sys.modules["__main__"] = module
    builtins.exit = builtins.quit = sys.exit  # as in any interpreter
    return module


def load(code, module):
    """Run the candidate's code. Returns None, or the status and the error that ended it."""
    status = "syntax"
    try:
        compiled = compile(code, "solution.py", "exec", dont_inherit=True)
        status = "error"
        exec(compiled, module.__dict__)
    except BaseException as error:
        if isinstance(error, SystemExit) and module.__name__ == "__main__":
            raise
        if not isinstance(error, SyntaxError) or "\0" in code:
            status = "memory" if isinstance(error, MemoryError) else "error"
        return [status, describe(error)]


def describe(error):
    """One line about an exception, with the line of the candidate where it comes from there."""
    trace, place = error.__traceback__, ""
    while trace:
        if trace.tb_frame.f_code.co_filename == "solution.py":
            place = f" (line {trace.tb_lineno})"
        trace = trace.tb_next
    try:
        text = getattr(error, "remote", None) or f"{type(error).__name__}: {error}"
    except BaseException:
        text = type(error).__name__
    return text[:1000].replace("\n", " ") + place


COMPARE = "lt le gt ge sub isub"  # `abs(f(1) - 3)`: f's object must not hear of the 3
COMPUTE = "add mul truediv floordiv mod pow and or xor matmul iadd imul"
OPERATORS = f"{COMPARE} {COMPUTE} eq abs neg pos invert index contains getitem setitem delitem"
FUNCTIONS = """bool len int float round iter next str repr hash format reversed getattr setattr
    isinstance issubclass"""
ACTIONS = {name: getattr(operator, f"__{name}__") for name in OPERATORS.split()}
ACTIONS |= {name: getattr(builtins, name) for name in FUNCTIONS.split()}
ACTIONS |= {
    "call": lambda f, /, *args, **kwargs: f(*args, **kwargs),
    "method": lambda x, name, /, *args, **kwargs: getattr(x, name)(*args, **kwargs),
    "read": lambda x: x,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def answer(size, line):
    """All of U: take the code from J, run it, then answer requests until J hangs up."""
    judge = Line(line)
    code = marshal.loads(judge.take(int.from_bytes(judge.take(8), "little")))
    module = make_module(code)
    flush = sys.stdout.flush
    failure = load(code, module)
    flush()
    judge.send(message([0, failure]))
    if not failure:
        Answers(module).serve(judge, flush)


class Answers:
    """U's objects that J has handles for, and the loop that answers."""

    def __init__(self, module):
        self.names, self.objects, self.keys = module.__dict__, {}, {}

    def find(self, key):
        """The object behind a handle: a global name as it is now, or an object answered before."""
        if key.startswith("g:"):
            if key[2:] not in self.names:
                raise NameError(f"name {key[2:]!r} is not defined")
            x = self.objects[key] = self.names[key[2:]]
            self.keys.setdefault(id(x), key)
        return self.objects[key]

    def keep(self, x):
        """A handle for an object that stays here, alive, so that its id stays its own."""
        key = self.keys.setdefault(id(x), str(len(self.keys)))
        self.objects[key] = x
        return {"h": key}

    def serve(self, judge, flush):
        while True:
            number, action, args, kwargs = judge.receive()
            try:
                reply = message([number, "value", *self.act(action, args, kwargs)])
            except BaseException as error:
                reply = self.error(number, error)
            flush()
            judge.send(reply)

    def act(self, action, args, kwargs):
        """The value, and the arguments where the candidate has changed them in place."""
        real = unpack(args, self.find)
        named = {k: unpack(v, self.find) for k, v in kwargs.items()}
        value = pack(ACTIONS[action](*real, **named), self.keep)
        if not named and ATOMS.issuperset(map(type, real)):
            return [value]
        now = [pack(real, self.keep), {k: pack(v, self.keep) for k, v in named.items()}]
        return [value] if now == [args, kwargs] else [value, *now]

    def error(self, number, error):
        known = [c.__name__ for c in type(error).__mro__ if vars(builtins).get(c.__name__) is c]
        reply = [number, "error", type(error).__name__, known, describe(error)]
        try:
            return message([*reply, pack(error.args, self.keep)])  # tests may look at str(error)
        except BaseException:
            return message(reply)


# ---------------------------------------- J: asks U, and compares


class Gone(BaseException):
    """U has ended or broken the protocol: no test can go on."""


class CannotSend(BaseException):
    """The tests have made something that cannot be sent, so they need one process."""


# What may change the length of an object.
CHANGES = {"call", "method", "setattr", "setitem", "delitem", "sub", "isub", *COMPUTE.split()}


class Remote:
    """J's end of U: sends requests and takes the replies."""

    def __init__(self, line, methods=()):
        self.line, self.methods = line, methods
        self.number = 0  # of the last request
        self.over = None  # Gone or CannotSend: kept, since an `except:` of the tests may hide it
        self.lengths = {}  # of objects, since one of them was last asked to do something

    def stop(self, error):
        self.over = error
        raise error

    def reply(self):
        while True:
            try:
                reply = self.line.receive()
            except (EOFError, OSError):
                self.stop(Gone())
            if type(reply) is list and len(reply) > 1 and reply[0] == self.number:
                return reply[1:]

    def handle(self, key):
        if type(key) is not str:
            raise ValueError("bad handle")
        return Proxy(self, key)

    def named(self, name):
        """A global name of the candidate. The tests name a class with a capital letter."""
        return (UnderTest if name[:1].isupper() else Proxy)(self, "g:" + name)

    def refuse(self, x):
        """Send the key of a Proxy; give up on anything else that is no plain data."""
        if isinstance(x, Proxy):
            return {"h": x._key}
        # These can come from what the candidate answered, which must not decide how the tests run.
        if isinstance(x, BaseException) or type(x).__module__ == "numpy":
            raise TypeError(f"the tests pass a {type(x).__name__}, which cannot be sent")
        self.stop(CannotSend(f"pass a {type(x).__name__}"))

    def ask(self, action, /, *args, **kwargs):
        """Let U do it. Returns the value, or raises what U raised."""
        if self.over:
            raise self.over
        if action in CHANGES:
            self.lengths.clear()
        sent = [pack(list(args), self.refuse), {k: pack(v, self.refuse) for k, v in kwargs.items()}]
        self.number += 1
        request = message([self.number, action, *sent])
        try:
            self.line.send(request)
        except OSError:
            self.stop(Gone())
        kind, *parts = self.reply()
        if kind == "error":
            raise self.error(action, *parts)
        try:
            if len(parts) > 1:
                for old, new in zip(args, unpack(parts[1], self.handle)):
                    change(old, new)
                for name in kwargs:
                    change(kwargs[name], unpack(parts[2][name], self.handle))
            return unpack(parts[0], self.handle)
        except MemoryError:
            raise
        except Exception as error:
            raise RuntimeError(f"the candidate's reply makes no sense: {error!r}") from None

    def error(self, action, name, classes, text, args=None):
        """An exception of U: its first builtin class that takes the arguments, by U's own name."""
        arguments = unpack(args, self.handle) if args is not None else None
        arguments = arguments if type(arguments) is tuple else (str(text),)
        for known in [*map(str, classes), "RuntimeError"]:
            kind = getattr(builtins, known, None)
            if not isinstance(kind, type) or not issubclass(kind, Exception):
                continue
            if issubclass(kind, StopIteration) and action != "next":
                kind = RuntimeError  # it would end `all(map(f, xs))` with success
            try:
                if name != kind.__name__:
                    kind = type(name, (kind,), {})
                error = kind(*arguments)
            except Exception:
                continue  # UnicodeDecodeError and its like want more
            error.remote = str(text)
            return error


def change(old, new):
    """`new`, but as the container `old` where it is of that type: every name sees the change."""
    if type(old) is not type(new):
        return new
    if type(old) is list:
        old[:] = [change(a, b) for a, b in zip(old, new)] + new[len(old) :]
    elif type(old) is tuple:
        return tuple([change(a, b) for a, b in zip(old, new)])
    elif isinstance(old, (dict, set)):
        if isinstance(old, dict):
            new = {k: change(old.get(k), v) for k, v in new.items()}
        old.clear()
        old.update(new)
    elif type(old) in (bytearray, collections.deque):
        old.clear()
        old.extend(new)
    elif type(old).__name__ == "ndarray" and old.shape == new.shape:
        old[...] = new
    else:
        return new
    return old


# Methods of immutable plain data. What the tests hand to one of them is often what they expect
# (`f(1).difference({2})`), so only data answers it, not an object of the candidate.
DATA = (str, bytes, tuple, frozenset, int, float, complex, Decimal)
DATA_METHODS = {name for kind in DATA for name in dir(kind) if not name.startswith("_")}


class Proxy:
    """An object that stays in U. It never equals plain data, and no library may ask its methods.

    What a function gave where data was due may be called, read and iterated, but it computes
    nothing with what the tests hold.
    """

    def __init__(self, remote, key):
        self.__dict__.update(_remote=remote, _key=key)

    def __call__(self, *args, **kwargs):
        return self._remote.ask("call", self, *args, **kwargs)

    def __getattr__(self, name):
        if name.startswith("__") and name not in ("__name__", "__doc__"):
            raise AttributeError(name)
        if sys._getframe(1).f_code.co_filename != "tests.py":
            raise AttributeError(f"{name}: a library needs plain data here")
        if name in self._remote.methods:
            return functools.partial(self._method, name)  # only called: one message, not two
        return self._remote.ask("getattr", self, name)

    def _method(self, name, /, *args, **kwargs):
        if name in DATA_METHODS and (args or kwargs or name.startswith("is")):
            raise AttributeError(f"{name}: plain data is needed here")
        return self._remote.ask("method", self, name, *args, **kwargs)

    def __setattr__(self, name, value):
        self._remote.ask("setattr", self, name, value)

    def __eq__(self, x):
        if not isinstance(x, Proxy):
            return False
        return self._key == x._key or self._remote.ask("eq", self, x) is True

    def __hash__(self):
        return hash(self._remote.ask("hash", self))  # the bucket only; __eq__ decides

    def __iter__(self):
        iterator, count = self._remote.ask("iter", self), 0
        while True:
            try:
                value = self._remote.ask("next", iterator)
            except StopIteration:
                break
            count += 1
            yield value
        if iterator != self:  # an iterator only goes on
            self._count(count)

    def __len__(self):
        return self._count(self._remote.ask("len", self))

    def _count(self, length):
        """Refuse a length that iteration does not yield: 3, and zip(x, expected) is empty."""
        if self._remote.lengths.setdefault(self._key, length) != length:
            raise TypeError("the length of the candidate's object is not what it yields")
        return length

    def __instancecheck__(self, x):
        if isinstance(x, Proxy):
            return self._remote.ask("isinstance", x, self) is True
        # Of U's named tuples, IntEnums and exceptions, J has made classes of the same name.
        made = type(x).__module__ == __name__
        return made and type(x).__name__ == self._remote.ask("getattr", self, "__name__")

    def __subclasscheck__(self, x):
        return isinstance(x, Proxy) and self._remote.ask("issubclass", x, self) is True

    def __copy__(self):
        return self._remote.ask("copy", self)

    def __deepcopy__(self, memo):
        return self._remote.ask("deepcopy", self)


class UnderTest(Proxy):
    """A class under test or an object of it: it answers for itself, as in `Stack().push(1)`."""

    def __call__(self, *args, **kwargs):
        value = super().__call__(*args, **kwargs)
        return self._own(value) if self._key.startswith("g:") else value

    def _own(self, value):
        return UnderTest(value._remote, value._key) if isinstance(value, Proxy) else value

    def _method(self, name, /, *args, **kwargs):
        return self._remote.ask("method", self, name, *args, **kwargs)


def forward(action):
    return lambda self, *args: self._remote.ask(action, self, *args)


def between(action):
    """Between two objects of U."""

    def ask(self, x):
        return self._remote.ask(action, self, x) if isinstance(x, Proxy) else NotImplemented

    return ask


def with_data(action, swapped=False):
    """Of a class under test with anything, to give another object: `Vector(1, 2) * 3`.

    `abs(f(x) + -3.5) < 1e-6`: an object that answers 0.0 would pass.
    """

    def ask(self, x):
        value = self._remote.ask(action, x, self) if swapped else self._remote.ask(action, self, x)
        if not isinstance(x, Proxy) and not isinstance(value, Proxy):
            raise TypeError(f"{action}: the candidate's operators give no plain data")
        return self._own(value)

    return ask


for _name in ("getitem", "setitem", "delitem", "next", "str", "repr", "format", "reversed", "bool"):
    setattr(Proxy, f"__{_name}__", forward(_name))
for _name in f"{COMPARE} {COMPUTE}".split():
    setattr(Proxy, f"__{_name}__", between(_name))
for _name in ("int", "float", "abs", "neg", "pos", "invert", "index", "round", "contains"):
    setattr(UnderTest, f"__{_name}__", forward(_name))
for _name in COMPUTE.split():
    setattr(UnderTest, f"__{_name}__", with_data(_name))
    setattr(UnderTest, f"__r{_name}__", with_data(_name, swapped=True))


class Names(dict):
    """The tests' global names; the candidate's, unless they are functions, are read each time."""

    def __missing__(self, name):
        if name not in self.read:
            raise KeyError(name)
        return self.remote.ask("read", Proxy(self.remote, "g:" + name))


def environment(plan, remote):
    """The tests' names: the library's and the candidate's; its missing `sum` is not the builtin."""
    env = {"__name__": "tests", "run_case": run_case}
    if plan["read"]:
        env = Names(env)
        env.remote, env.read = remote, plan["read"]
    if plan["hidden"]:
        known = vars(builtins).items()
        env["__builtins__"] = {name: x for name, x in known if name not in plan["hidden"]}
    for name in plan["called"]:
        env[name] = remote.named(name)
    for name, module in plan["library"]:
        with contextlib.suppress(ImportError):
            env[name] = getattr(__import__(module), name) if name in LIBRARY else __import__(module)
    return env


# ---------------------------------------- what the text of the tests says about them

# Modules whose results are plain data. Tests that import others run in one process.
PLAIN = """math cmath re sys random string itertools functools collections operator copy datetime
    decimal fractions heapq bisect statistics time json typing numbers array struct hashlib
    calendar numpy textwrap unittest ast zoneinfo base64 binascii unicodedata difflib uuid"""
MODULES = set(PLAIN.split())
# What needs the candidate in the same process, or could run what it answers.
WORDS = """
    redirect_stdout redirect_stderr patch mock StringIO stdout stdin stderr capsys monkeypatch
    asyncio globals locals vars eval exec open input environ seed setstate setrecursionlimit
    getcontext setcontext localcontext modules allow_pickle __import__ argv assertIs assertIsNot
    assertLogs assertNoLogs assertWarns assertWarnsRegex SystemExit KeyboardInterrupt"""
SHARED = set(WORDS.split())
# Names that tests use without an import, since candidates have them: they are the library's.
LIBRARY = {"deepcopy": "copy", "Decimal": "decimal", "Fraction": "fractions"}
LIBRARY |= dict.fromkeys(("isclose", "sqrt", "ceil", "floor", "gcd", "pi", "inf", "nan"), "math")
CONTAINERS = ("Counter", "defaultdict", "OrderedDict", "deque", "namedtuple")
LIBRARY |= dict.fromkeys(CONTAINERS, "collections")


@functools.lru_cache(maxsize=256)
def plan(setup, tests, entry_point):
    """What these tests are and need, from their text alone. The caller keeps it for other programs.

    Returns: dict of what J needs, and `why`: why they need one process, or "".
    Raises ValueError or SyntaxError where the tests cannot be run or test nothing.
    """
    with warnings.catch_warnings(action="ignore"):
        trees = [ast.parse(source) for source in (setup, *tests)]
        for tree in trees[1:]:
            refuse_empty(tree)
        call_what_nobody_calls(trees, entry_point)
        trees.insert(0, ast.Module([n for n in trees[0].body if isinstance(n, EARLY)], []))
        codes = [compile(tree, "tests.py", "exec", dont_inherit=True) for tree in trees]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    words = [node for node in nodes if isinstance(node, ast.Name)]
    used = {word.id for word in words if isinstance(word.ctx, ast.Load)}
    bound = {word.id for word in words if not isinstance(word.ctx, ast.Load)} | definitions(nodes)
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    called = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    # A function's name as an argument, `check(f)`, is a function, too.
    passed = {arg.id for call in calls for arg in call.args if isinstance(arg, ast.Name)}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    functions = {id(call.func) for call in calls}
    read = {node.attr for node in attributes if id(node) not in functions}

    entry = first_name(entry_point)
    names = {n for n in used - bound if not hasattr(builtins, n) and n != "run_case"} - {entry}
    library = names & ((MODULES | {"np"}) - called | (LIBRARY.keys() if entry_point else set()))
    names = names - library | ({entry} & used)  # only the entry point may hide a builtin
    called = names & (called | passed & {entry})
    why = why_one_process(nodes, names | {"candidate"}, names - called)
    if not names and "solution" not in why:
        raise ValueError("the tests ask nothing of the candidate")
    return {
        "codes": marshal.dumps(codes),
        "seed": repr((setup, tests)),
        "called": sorted(called),
        "read": sorted(names - called),
        "hidden": sorted(names & vars(builtins).keys()),
        "library": sorted((n, LIBRARY.get(n) or {"np": "numpy"}.get(n, n)) for n in library),
        "methods": {node.attr for node in attributes} - read,  # only ever called
        "random": any("random" in source for source in (setup, *tests)),
        "why": why,
    }


def first_name(entry_point):
    """The global name that an entry point starts with: `Solution` of `Solution().twoSum`."""
    return re.match(r"\w*", entry_point or "")[0] or None


FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
EARLY = (ast.Import, ast.ImportFrom, ast.ClassDef)  # a candidate's annotations may name them


def definitions(nodes):
    """The names that definitions, imports, arguments and `except ... as` bind."""
    named = (*FUNCTION, ast.ClassDef, ast.ExceptHandler)
    found = {node.name for node in nodes if isinstance(node, named)}
    found |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    aliases = [node for node in nodes if isinstance(node, ast.alias)]
    return found | {(alias.asname or alias.name).split(".")[0] for alias in aliases}


def refuse_empty(tree):
    """Refuse a test that says nothing, or only compares."""
    expressions = [node.value for node in tree.body if isinstance(node, ast.Expr)]
    if len(tree.body) == sum(isinstance(value, ast.Constant) for value in expressions):
        raise ValueError("a test is empty")
    inner = [node for f in tree.body if isinstance(f, ast.FunctionDef) for node in f.body]
    for node in tree.body + inner:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Compare):
            raise ValueError(f"line {node.lineno}: a comparison without `assert` tests nothing")


def call_what_nobody_calls(trees, entry_point):
    """Add a test runner's calls: check(entry_point), test functions, classes of tests."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    for tree in trees:
        calls, never = [], []
        for node in tree.body:
            name = getattr(node, "name", "")
            run = "__import__('asyncio').run" * isinstance(node, ast.AsyncFunctionDef)
            if isinstance(node, ast.ClassDef) and is_case(node):
                calls.append(f"run_case({name})")
            elif not isinstance(node, (*FUNCTION, ast.ClassDef)) or name in used:
                continue
            elif name == "check":
                if not entry_point:
                    raise ValueError("check(candidate) needs an entry_point")
                calls.append(f"{run}(check({entry_point}))")
            elif name.startswith("test"):
                if len(node.args.args) > len(node.args.defaults) or node.args.kwonlyargs:
                    raise ValueError(f"{name} takes arguments, which only a test runner has")
                calls.append(f"{run}({name}())")
            elif tree is not trees[0] and not node.decorator_list and not getattr(node, "bases", 0):
                never.append(node)
        # `unittest.main()` would look for tests in another module, and end the process
        tree.body = [n for n in tree.body if n not in never and not runs_unittest(n)]
        # What the setup defines runs with the last test.
        place = trees[-1] if tree is trees[0] else tree
        place.body += ast.parse("\n".join(calls)).body


def is_case(node):
    bases = [ast.unparse(base) for base in node.bases]
    case = any(base.endswith("TestCase") for base in bases)
    tests = [n for n in node.body if getattr(n, "name", "").startswith("test")]
    if any(isinstance(n, ast.AsyncFunctionDef) for n in tests) and "Isolated" not in str(bases):
        raise ValueError(f"{node.name}: nobody awaits its tests")
    return case or node.name.startswith("Test") and (tests or not bases)


def runs_unittest(node):
    if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
        return all(runs_unittest(n) for n in node.body)
    return isinstance(node, ast.Expr) and ast.unparse(node.value).startswith("unittest.main(")


EXCEPTIONS = ("Error", "Exception", "Warning")
BUILTINS = vars(builtins).keys()
CHANGING = ("append", "extend", "insert", "remove", "pop", "clear", "update", "discard")


def why_one_process(nodes, names, read):
    """What these tests do that takes the candidate in their own process, or ""."""
    given = dict.fromkeys(read, True)  # what holds things of the candidate: whether plain data

    def ids(node):
        return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}

    def is_given(place):
        text = ast.unparse(place)  # log; tree.children
        return given.get(text) or text.startswith(tuple(x + end for x in given for end in ".["))

    for node in nodes:
        match node:
            case ast.Assign(targets=[target], value=value) if ids(value) & (names | given.keys()):
                is_data = not any(name[:1].isupper() for name in ids(value) & names)
                # An object may keep its arguments.
                given = dict.fromkeys(() if is_data else ids(value), True) | given
                given |= {ast.unparse(x): is_data for x in getattr(target, "elts", [target])}
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.keyword(arg=word) if (
                word in SHARED - names
            ):
                return f"use {word}"
            case ast.Call(func=ast.Name(id="compile" | "id" as word)):
                return f"use {word}"
            case ast.Attribute(attr=word) if re.fullmatch("__(?!name|init).*__", word):
                return f"use {word}"
            case ast.Subscript(value=place, ctx=ast.Store() | ast.Del()) if is_given(place):
                return "change what the candidate gave"
            case ast.Attribute(value=place, attr=word) if word in CHANGING and is_given(place):
                return "change what the candidate gave"
            case ast.Name(id=word) if word in names and word.endswith(EXCEPTIONS):
                return f"name the candidate's {word}"
            case ast.ExceptHandler(type=ast.AST() as kind) if ids(kind) - BUILTINS:
                return "catch an exception that is no builtin"
            case ast.Call(ast.Attribute(attr=f), [x, *_]) if "Raises" in f and ids(x) - BUILTINS:
                return "expect an exception that is no builtin"
            case ast.Import() | ast.ImportFrom() if not plain_import(node):
                return f"import {getattr(node, 'module', None) or node.names[0].name}"
            case ast.AsyncFunctionDef() | ast.Await() | ast.AsyncFor() | ast.AsyncWith():
                return "are asynchronous"
            case ast.With() if not ast.unparse(node.items[0]).startswith("self."):
                return "enter a context"
            case ast.ClassDef() if not is_case(node):
                return f"define the class {node.name}"
            case ast.Compare() if compares_identities(node, names):
                return "compare identities"
            case ast.List(elts=values) | ast.Tuple(elts=values) | ast.Call(args=values) if repeats(
                node, values
            ):
                return "hold one object twice"
            case ast.BinOp(left=ast.List(elts=[first]), op=ast.Mult()) if not is_constant(first):
                return "hold one object several times"
    return ""


def plain_import(node):
    """Whether all that is imported comes from modules whose results are plain data."""
    modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    modules = modules or [alias.name for alias in node.names]
    return "unittest.mock" not in modules and {m.partition(".")[0] for m in modules} <= MODULES


def compares_identities(node, names):
    """`f(x) is x`, but not `f(x) is None`, whose right side is the same object everywhere."""
    sides = [node.left, *node.comparators]
    types = any(isinstance(side, ast.Call) and is_constant(side) for side in sides)
    if not types and not any(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
        return False
    theirs = any(isinstance(side, ast.Name) and side.id in names for side in sides)
    return theirs or not any(map(is_constant, sides))


def is_constant(node):
    """None, True, a builtin type: what is the same object everywhere."""
    match node:
        case ast.Constant() | ast.Call(func=ast.Name(id="type")):
            return True
        case ast.Name(id=name):
            return isinstance(getattr(builtins, name, None), type)
    return False


def repeats(node, values):
    """`[row, row]`, but not the targets of an assignment: `_, _, x = f()`."""
    names = [value.id for value in values if isinstance(value, ast.Name)]
    return len(set(names)) < len(names) and not isinstance(getattr(node, "ctx", None), ast.Store)


def same_output(expected, output):
    """Whether a program's stdout is what a test expects.

    Blanks at line ends, between numbers, blank lines at the end aside; 1.0 for 1 is the same.
    """
    expected, output = expected.rstrip().splitlines(), output.rstrip().splitlines()
    if len(expected) != len(output):
        return False
    for line, found in zip(expected, output):
        if line.rstrip() == found.rstrip():
            continue
        blanks = r"(\s+)" if re.search(r"[^\s\d.eE+-]", line) else r"\s+"
        words, found = [re.split(blanks, text.rstrip()) for text in (line, found)]
        if len(words) != len(found) or not all(map(same_word, words, found)):
            return False
    return True


NUMBER = re.compile(r"[+-]?\d{1,300}(\.\d{0,300})?([eE][+-]?\d{1,4})?")


def same_word(word, found):
    if word == found:
        return True
    numbers = NUMBER.fullmatch(word) and NUMBER.fullmatch(found)
    return bool(numbers and re.search("[.eE]", word + found)) and Decimal(word) == Decimal(found)


# ---------------------------------------- running the tests


def run_case(case):
    """Run a class of tests, of unittest or as pytest has them."""
    import unittest

    names = [name for name in dir(case) if name.startswith("test")]
    if not names:
        raise ValueError(f"{case.__name__} holds no test")
    if not issubclass(case, unittest.TestCase):
        for name in names:
            instance = case()
            for step in ("setup_method", name, "teardown_method"):
                getattr(instance, step, bool)()
        return
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    problems = result.failures + result.errors
    problems += [(test, "was expected to fail") for test in result.unexpectedSuccesses]
    if result.skipped and not problems:
        raise ValueError(f"{case.__name__} skips tests")
    if problems:
        raise AssertionError(problems[0][1].strip().rpartition("\n")[2])


def run_tests(
    codes, env, over, say, exec=exec, Failed=AssertionError, Any=BaseException, describe=describe
):
    """Run the compiled setup and tests in env, and say what came of each test.

    The same loop in J and in U. Our tools are arguments: a candidate in U can replace builtins.
    """
    _, setup, *tests = marshal.loads(codes)
    said_first = False
    for number, test in enumerate(tests):
        found = None
        try:
            if number == 0:
                exec(setup, env)
            exec(test, env)
        except Failed as error:
            found = ["failed", describe(error)]
        except Any as error:
            found = ["memory" if isinstance(error, MemoryError) else "error", describe(error)]
        if over():
            return
        say(1 if not found else 0 if said_first else found)
        said_first = said_first or bool(found)


def seed_random(job):
    """The same tests, the same label; and the candidate does not know the tests."""
    if job["random"]:
        import random

        random.seed(job["seed"])


def judge(size, line, link):
    """All of J: take the job from the caller, hand the code on to U, run the tests.

    It says a line for each test: 1, [status, error] of the first that fails, 0 of others.
    Then the number of requests, and the token that shows that all has been said.
    """
    caller, candidate = Line(line), Line(link)
    job = marshal.loads(caller.take(size))
    code = marshal.dumps(job["code"])
    remote = Remote(candidate, job["methods"])

    def say(found):
        caller.send(message(found))

    try:
        candidate.send(len(code).to_bytes(8, "little") + code)
        env = environment(job, remote)
        seed_random(job)
        failure = remote.reply()[0]
        if failure is not None:
            return say({"failure": failure})
        run_tests(job["codes"], env, lambda: remote.over, say)
    except (Gone, OSError):
        pass
    if type(remote.over) is CannotSend:
        say({"one_process": str(remote.over)})
    elif not remote.over:
        say({"asked": remote.number, "token": job["token"]})


def run_together(size, line):
    """All of U where tests and candidate share it: here the token is no proof."""
    caller = Line(line)
    send = caller.send
    job = marshal.loads(caller.take(size))
    module = make_module(job["code"])
    with contextlib.suppress(BaseException):
        exec(marshal.loads(job["codes"])[0], module.__dict__)
    failure = load(job["code"], module)
    if failure:
        return send(message({"failure": failure}))
    module.run_case = run_case
    seed_random(job)
    run_tests(job["codes"], module.__dict__, bool, lambda found: send(message(found)))
    sys.stdout.flush()
    send(message({"asked": 1, "token": job["token"]}))


def run_program(size, line):
    """All of U for a program that reads stdin: run it as the interpreter would."""
    import atexit
    import threading

    caller = Line(line)
    code = marshal.loads(caller.take(size))["code"]
    sys.argv[:] = ["solution.py"]
    failure, exit_code, module = None, 0, make_module(code, "__main__")
    try:
        failure = load(code, module)
    except SystemExit as end:
        exit_code = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    module.__dict__.clear()  # files that it left open are written
    for file in (sys.stdout, sys.__stdout__):
        with contextlib.suppress(ValueError):  # it has closed it
            file.flush()
    if failure:
        caller.send(message({"failure": failure}))
    return exit_code & 255
