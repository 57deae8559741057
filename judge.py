"""Who holds the tests and who compares. Used by sandbox.py; walls.py forks the processes.

    caller ── tests ──> J  holds the tests, asks the candidate, compares with its own builtins
     │  ^               │  requests: "call f with these values"; replies: plain data, as JSON
     │  └─── verdict ───┤
     └── code ──────────┴──> U  holds the candidate's code, and nothing else

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
import collections.abc
import contextlib
import copy
import enum
import functools
import json
import marshal
import math
import operator
import re
import symtable
import sys
import warnings
from decimal import Decimal
from os import read, write

MAX_MESSAGE = 16 << 20  # bytes of one message between J and U
MAX_DEPTH = 200  # nesting of one value

# ---------------------------------------- values on the wire: JSON with own tags, no pickle

LARGE = 1 << 10000  # beyond it decimal digits take too long
ATOMS = {int, float, str, bool, type(None)}
BASES = {int: int.__int__, float: float.__float__, str: str.__str__}  # of a subclass: its value


def attributes(names):
    return lambda x, base: [getattr(x, name) for name in names.split()]


# types: the arguments that make x again. Its base class is asked, so that no override answers.
FORMS = {
    "tuple set frozenset": lambda x, base: [list(base.__iter__(x))],
    "bytes bytearray": lambda x, base: [base.decode(x, "latin-1"), "latin-1"],
    "dict": lambda x, base: [[[k, v] for k, v in dict.items(x)]],
    "complex": attributes("real imag"),
    "array.array": lambda x, base: [x.typecode, base.tolist(x)],
    "range slice": attributes("start stop step"),
    "dict_keys": lambda x, base: [dict.fromkeys(x)],
    "dict_values": lambda x, base: [dict(enumerate(x))],
    "dict_items": lambda x, base: [dict(x)],
    "collections.Counter collections.OrderedDict": lambda x, base: [dict(base.items(x))],
    "collections.defaultdict": lambda x, base: [x.default_factory, dict(base.items(x))],
    "collections.deque": lambda x, base: [list(base.__iter__(x)), x.maxlen],
    "fractions.Fraction": attributes("numerator denominator"),
    "datetime.timezone": lambda x, base: [base.utcoffset(x, None)],
    "datetime.timedelta": attributes("days seconds microseconds"),
    "datetime.date": attributes("year month day"),
    "datetime.time": attributes("hour minute second microsecond tzinfo"),
    "datetime.datetime": attributes("year month day hour minute second microsecond tzinfo"),
    "zoneinfo.ZoneInfo": attributes("key"),
    "decimal.Decimal uuid.UUID pathlib.PurePosixPath pathlib.PosixPath": lambda x, base: [
        base.__str__(x)
    ],
    "numpy.generic numpy.ndarray": lambda x, base: [base.tolist(x), x.dtype.str, x.shape],
}
SHAPES = {name: form for names, form in FORMS.items() for name in names.split()}


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
    if kind is list:
        return [pack(value, other, depth + 1) for value in x]

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
    if is_numpy(kind) and (x.dtype.hasobject or x.dtype.names):
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


def is_numpy(kind):
    """Whether this is the type of an array or a number of numpy."""
    return kind.__module__ == "numpy" and hasattr(kind, "dtype")


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
        return wide_numpy(module, name, *parts)
    return getattr(module, name)(*parts)


@functools.lru_cache(maxsize=64)
def named_tuple(name, *fields):
    return collections.namedtuple(name, fields)


@functools.lru_cache(maxsize=64)
def member(class_name, name, value):
    base = enum.IntEnum if type(value) is int else enum.StrEnum
    return base(class_name, {name: value})[name]


def wide_numpy(numpy, name, values, dtype, shape):
    """An array or number of numpy, never of a narrow float.

    Numpy rounds what it is compared with to that type: float16("inf") == 70000 is true.
    """
    x = numpy.array(values, dtype).reshape(shape)
    x = x.astype({"e": float, "f": float, "F": complex}.get(x.dtype.char, dtype))
    return x if name == "ndarray" else x[()]


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


def take(fd, size):
    """The next `size` bytes; EOFError when the other side has gone."""
    data = bytearray()
    while len(data) < size:
        part = read(fd, min(size - len(data), 1 << 16))
        if not part:
            raise EOFError
        data += part
    return data


class Line:
    """One end of a socket. It ends with its process."""

    def __init__(self, fd):
        self.fd, self.data = fd, bytearray()

    def send(self, data):
        while data:
            data = data[write(self.fd, data) :]

    def say(self, data):
        self.send(message(data))

    def receive(self, most=MAX_MESSAGE):
        """The next message; EOFError when the other side has gone or talks nonsense."""
        data, seen = self.data, 0
        while (end := data.find(b"\n", seen)) < 0:
            seen = len(data)
            part = read(self.fd, 1 << 12)
            if not part or seen > most:
                raise EOFError
            data += part
        line = data[:end]
        del data[: end + 1]
        try:
            return scan(line.decode("utf-8", "surrogatepass"), 0)[0]
        except (ValueError, RecursionError, StopIteration):
            raise EOFError from None


# ---------------------------------------- U: runs the candidate and answers J


class Source:
    """For inspect: the text of the module."""

    def __init__(self, code):
        self.code = code

    def get_source(self, name):
        return self.code


def make_module(code, name="solution"):
    """The candidate's module, as `solution` and as `__main__` (for pickle and dataclasses)."""
    module = type(sys)(name)
    module.__file__ = "solution.py"
    module.__loader__ = Source(code)
    sys.modules["solution"] = sys.modules["__main__"] = module
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
COMPUTE = """add mul truediv floordiv mod pow and or xor matmul lshift rshift
    iadd imul itruediv ifloordiv imod iand ior ixor"""
OPERATORS = f"{COMPARE} {COMPUTE} eq abs neg pos invert index contains getitem setitem delitem"
CONVERT = "int float complex bytes abs neg pos invert index round floor ceil trunc contains"
ASKED = "getitem setitem delitem next str repr format reversed bool copy hash"
FUNCTIONS = """bool len int float complex bytes round iter next str repr hash format reversed
    getattr setattr isinstance issubclass"""
ACTIONS = {name: getattr(operator, f"__{name}__") for name in OPERATORS.split()}
ACTIONS |= {name: getattr(builtins, name) for name in FUNCTIONS.split()}
ACTIONS |= {name: getattr(math, name) for name in ("floor", "ceil", "trunc")}
ACTIONS |= {"call": operator.call, "copy": copy.copy, "deepcopy": copy.deepcopy}
ACTIONS["read"] = lambda x: x
ACTIONS["method"] = lambda x, name, /, *args, **kwargs: getattr(x, name)(*args, **kwargs)


def answer(size, line):
    """All of U: take the code, run it, then answer J's requests until it hangs up."""
    judge = Line(line)
    code = judge.receive(1 << 62)  # a program may be larger than a message
    module = make_module(code)
    flush = sys.stdout.flush
    failure = load(code, module)
    flush()
    judge.say([0, failure])
    if not failure:
        Answers(module).serve(judge, flush)


CHANGEABLE = (list, dict, set, bytearray, collections.deque)  # that can change
MOST_KEPT, MOST_BYTES = 16, 1 << 14  # what each reply looks at again


def is_handle(sent):
    return type(sent) is dict and "h" in sent


class Answers:
    """U's objects that J has handles for, and the loop that answers."""

    def __init__(self, module):
        self.names, self.objects, self.keys = module.__dict__, {}, {}
        self.kept = {}  # by number: a container that J has a copy of, and the text that J knows
        self.last = 0  # number

    def find(self, key):
        """The object behind a handle: a global name as it is now, or an object answered before."""
        if key.startswith("g:"):
            if key[2:] not in self.names:
                raise NameError(f"name {key[2:]!r} is not defined")
            x, old = self.names[key[2:]], self.objects.get(key)
            if self.keys.get(id(old)) == key:
                del self.keys[id(old)]  # bound anew: another object may get this id
            self.objects[key] = x
            self.keys.setdefault(id(x), key)
        return self.objects[key]

    def keep(self, x):
        """A handle for an object that stays here, alive, so that its id stays its own."""
        key = self.keys.setdefault(id(x), str(len(self.objects)))
        self.objects[key] = x
        return {"h": key}

    def serve(self, judge, flush):
        while True:
            number, action, args, names = judge.receive()
            try:
                reply = message([number, "value", *self.act(action, args, names)])
            except BaseException as error:
                reply = self.error(number, error)
            flush()
            judge.send(reply)

    def act(self, action, args, names):
        """[value], or all that J has to know: [value, arguments, number, changes].

        The arguments, of which the last have names, where the candidate has changed them in place;
        the number under which it keeps this container, if it does; and what became of those that it
        kept before.
        """
        real = unpack(args, self.find)
        if names:
            count = len(real) - len(names)
            value = ACTIONS[action](*real[:count], **dict(zip(names, real[count:])))
        else:
            value = ACTIONS[action](*real)
        shared = isinstance(value, CHANGEABLE) and sys.getrefcount(value) > 2  # our name, its own
        packed = pack(value, self.keep)
        changes = self.changes() if self.kept else {}
        number = self.number_of(value, packed) if shared else None
        now = [sent if is_handle(sent) else pack(x, self.keep) for sent, x in zip(args, real)]
        if now == args and number is None and not changes:
            return [packed]
        return [packed, now, number, changes]

    def number_of(self, value, packed):
        """A number for a container that somebody beside this request refers to, None if large."""
        key = next((key for key, (x, _) in self.kept.items() if x is value), None)
        text = encoded(packed)
        if key is None and len(text) < MOST_BYTES:
            self.last += 1
            key = str(self.last)
            if len(self.kept) == MOST_KEPT:
                del self.kept[next(iter(self.kept))]
        if key is not None:
            self.kept[key] = value, text
        return key

    def changes(self):
        """{number: new value} of the kept containers that have changed since J last heard."""
        found = {}
        for key in list(self.kept):
            value, known = self.kept.pop(key)
            with contextlib.suppress(Exception):  # it has become nested too deep, or a circle
                packed = pack(value, self.keep)
                text = encoded(packed)
                if text != known:
                    found[key] = packed
                if len(text) < MOST_BYTES and sys.getrefcount(value) > 2:
                    self.kept[key] = value, text
        return found

    def error(self, number, error):
        known = [c.__name__ for c in type(error).__mro__ if vars(builtins).get(c.__name__) is c]
        reply = [number, "error", type(error).__name__, known, describe(error)]
        for details in (  # tests may look at these, and not all of them may work
            lambda: [error.args, str(error), vars(error)],
            lambda: [error.args, None, {}],
        ):
            with contextlib.suppress(BaseException):
                return message([*reply, pack(details(), self.keep)])
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
        self.kept = {}  # our copies of containers that U keeps, by U's numbers
        self.lengths = {}  # of objects, since they were last asked to do something
        self.yielded = set()  # the keys of those that were iterated over since

    def stop(self, error):
        self.over = error
        raise error

    def reply(self, request):
        try:
            self.line.send(request)
            while True:
                reply = self.line.receive()
                if type(reply) is list and len(reply) > 1 and reply[0] == self.number:
                    return reply[1:]
        except (EOFError, OSError):
            self.stop(Gone())

    def handle(self, key):
        return Proxy(self, str(key))

    def refuse(self, x):
        """Send the key of a Proxy; give up on anything else that is no plain data."""
        if isinstance(x, Proxy):
            return {"h": x._key}
        # These can come from what the candidate answered, which must not decide how the tests run.
        if isinstance(x, BaseException) or is_numpy(type(x)):
            raise TypeError(f"the tests pass a {type(x).__name__}, which cannot be sent")
        self.stop(CannotSend(f"pass a {type(x).__name__}"))

    def ask(self, action, /, *args, **kwargs):
        """Let U do it. Returns the value, or raises what U raised."""
        if self.over:
            raise self.over
        if self.lengths and action in CHANGES:
            asked = [x._key for x in args if isinstance(x, Proxy)]
            for key, (_, kind) in list(self.lengths.items()):
                if kind is UnderTest or key in asked:
                    del self.lengths[key]
                    self.yielded.discard(key)
        if kwargs:
            args += tuple(kwargs.values())
        sent = [{"h": x._key} if isinstance(x, Proxy) else pack(x, self.refuse) for x in args]
        self.number += 1
        kind, *parts = self.reply(message([self.number, action, sent, list(kwargs)]))
        if kind == "error":
            raise self.error(action, *parts)
        try:
            value = unpack(parts[0], self.handle)
            if len(parts) == 1:
                return value
            _, now, number, changes = parts
            for old, new in zip(args, unpack(now, self.handle)):
                change(old, new)
            for key, new in changes.items():
                change(self.kept[key], unpack(new, self.handle))
            if number is not None:
                value = self.kept[number] = change(self.kept.get(number), value)
            return value
        except MemoryError:
            raise
        except Exception as error:
            raise RuntimeError(f"the candidate's reply makes no sense: {error!r}") from None

    def error(self, action, name, classes, text, details=None):
        """An exception of U: its first builtin class that takes the arguments, by U's own name."""
        arguments, said, attributes = unpack(details, self.handle) or ((str(text),), None, {})
        for known in [*map(str, classes), "Exception"]:
            kind = getattr(builtins, known, None)
            if not isinstance(kind, type) or not issubclass(kind, BaseException):
                continue
            if issubclass(kind, StopIteration) and action != "next":
                continue  # it would end `all(map(f, xs))` with success
            try:
                if name != kind.__name__:
                    kind = type(name, (kind,), {})
                error = kind(*arguments)
                if said not in (None, str(error)):
                    error = type(name, (kind,), {"__str__": lambda self: str(said)})(*arguments)
                error.__dict__.update(attributes)
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
    elif isinstance(old, CHANGEABLE):
        if isinstance(old, dict):
            new = {k: change(old.get(k), v) for k, v in new.items()}
        old.clear()
        if isinstance(old, (dict, set)):
            old.update(new)
        else:
            old.extend(new)
    elif type(old).__name__ == "ndarray" and old.shape == new.shape:
        old[...] = new
    elif type(old).__name__ == "array":
        old[:] = new
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
        if name.startswith("__") and name != "__name__":
            raise AttributeError(name)
        if sys._getframe(1).f_code.co_filename != "tests.py":
            raise AttributeError(f"{name}: a library needs plain data here")
        if name in self._remote.methods:
            return functools.partial(self._method, name)  # only called: one message, not two
        value = self._remote.ask("getattr", self, name)
        if type(self) is Proxy and name in DATA_METHODS and isinstance(value, Proxy):
            return functools.partial(self._method, name)
        return value

    def _method(self, name, /, *args, **kwargs):
        data_is_due = type(self) is Proxy
        if data_is_due and name in DATA_METHODS and (args or kwargs or name.startswith("is")):
            raise AttributeError(f"{name}: plain data is needed here")
        return self._remote.ask("method", self, name, *args, **kwargs)

    def __setattr__(self, name, value):
        self._remote.ask("setattr", self, name, value)

    def __eq__(self, x):
        if not isinstance(x, Proxy):
            return False
        return self._key == x._key or self._remote.ask("eq", self, x) is True

    def __iter__(self):
        iterator, count = self._remote.ask("iter", self), 0
        lengths = self._remote.lengths
        again = getattr(iterator, "_key", None) != self._key  # an iterator only goes on
        while True:
            try:
                value = self._remote.ask("next", iterator)
            except StopIteration:
                break
            count += 1
            if again and self._key in lengths and count > lengths[self._key][0]:
                self._count(count)
            yield value
        if again or type(self) is Proxy and self._key in lengths:
            self._count(count)
            self._remote.yielded.add(self._key)

    def __len__(self):
        return self._count(self._remote.ask("len", self))

    def _count(self, length):
        """Refuse a length that iteration does not yield: 3, and zip(x, expected) is empty."""
        if self._remote.lengths.setdefault(self._key, (length, type(self)))[0] != length:
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

    def __deepcopy__(self, memo):
        return self._remote.ask("deepcopy", self)


class UnderTest(Proxy):
    """A class under test or an object of it: it answers for itself, as in `Stack().push(1)`."""

    def __call__(self, *args, **kwargs):
        value = super().__call__(*args, **kwargs)
        return self._own(value) if self._key.startswith("g:") else value

    def __len__(self):  # it may have changed; what it yields next is compared with this
        length = self._remote.ask("len", self)
        if length and self._key in self._remote.yielded:  # an iteration may empty it
            self._count(length)
        self._remote.lengths[self._key] = length, UnderTest
        return length

    def _own(self, value):
        return UnderTest(value._remote, value._key) if isinstance(value, Proxy) else value


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


for _name in ASKED.split():  # a hash only finds the bucket: __eq__ decides
    setattr(Proxy, f"__{_name}__", forward(_name))
for _name in f"{COMPARE} {COMPUTE}".split():
    setattr(Proxy, f"__{_name}__", between(_name))
for _name in CONVERT.split():
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


def environment(remote, called, read, hidden, library):
    """The tests' names: the library's and the candidate's; its missing `sum` is not the builtin."""
    env = {"__name__": "tests", "run_case": run_case}
    if read:
        env = Names(env)
        env.remote, env.read = remote, read
    if hidden:
        env["__builtins__"] = {n: x for n, x in vars(builtins).items() if n not in hidden}
    for name in called:  # the tests name a class with a capital letter
        env[name] = (UnderTest if name[:1].isupper() else Proxy)(remote, "g:" + name)
    for name, module in library:
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

    Returns: why they need one process, or ""; and what J needs: the compiled tests, a seed for
    their random numbers or "", methods that they only call, and the names for `environment`.
    Raises ValueError or SyntaxError where the tests cannot be run or test nothing.
    """
    with warnings.catch_warnings(action="ignore"):
        trees = [ast.parse(source) for source in (setup, *tests)]
        for tree in trees[1:]:
            refuse_empty(tree)
        call_what_nobody_calls(trees, entry_point)
        trees.insert(0, ast.Module([n for n in trees[0].body if isinstance(n, EARLY)], []))
        codes = [compile(tree, "tests.py", "exec", dont_inherit=True) for tree in trees]
    nodes = [node for tree in trees for node in in_order(tree)]
    used, bound = global_names((setup, *tests))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    functions = {call.func for call in calls}
    called = {f.id for f in functions if isinstance(f, ast.Name)}
    # A function's name as an argument, `check(f)`, is a function, too.
    passed = {arg.id for call in calls for arg in call.args if isinstance(arg, ast.Name)}
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and n not in functions}

    entry = first_name(entry_point)
    names = {n for n in used - bound if not hasattr(builtins, n)} - {entry}
    library = names & ((MODULES | {"np"}) - called | (LIBRARY.keys() if entry_point else set()))
    names = names - library | ({entry} & loaded(trees))  # it alone may hide a builtin
    called = names & (called | passed & {entry})
    why = why_one_process(nodes, names | {"candidate"}, names - called)
    if not names and "solution" not in why:
        raise ValueError("the tests ask nothing of the candidate")
    seed = repr((setup, tests)) if any("random" in source for source in (setup, *tests)) else ""
    hidden = sorted(names & vars(builtins).keys())
    library = sorted((n, LIBRARY.get(n) or {"np": "numpy"}.get(n, n)) for n in library)
    methods = {f.attr for f in functions if isinstance(f, ast.Attribute)} - read  # only called
    names = sorted(called), sorted(names - called), hidden, library
    return why, (marshal.dumps(codes), seed, methods, *names)


def first_name(entry_point):
    """The global name that an entry point starts with: `Solution` of `Solution().twoSum`."""
    return re.match(r"\w*", entry_point or "")[0] or None


FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTION, ast.ClassDef)
EARLY = (ast.Import, ast.ImportFrom, ast.ClassDef)  # a candidate's annotations may name them
BLOCKS = (*DEFINITIONS, ast.If, ast.For, ast.While)


def global_names(sources):
    """(names that are looked up as global somewhere, names that are bound as global)."""
    tables = [symtable.symtable(source, "tests.py", "exec") for source in sources]
    used, bound = set(), set()
    for table in tables:  # grows by the functions and classes in it
        tables += table.get_children()
        top = table.get_type() == "module"
        for name in table.get_symbols():
            binds = name.is_assigned() or name.is_imported() or name.is_namespace()
            if binds and (top or name.is_declared_global()):
                bound.add(name.get_name())
            elif name.is_global() or top:
                used.add(name.get_name())
    return used, bound


def refuse_empty(tree):
    """Refuse a test that says nothing, or only compares."""
    if all(isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) for n in tree.body):
        raise ValueError("a test is empty")
    nodes = list(tree.body)
    for node in nodes:  # grows by what is in functions, classes, loops, conditions
        nodes += node.body if isinstance(node, BLOCKS) else []
        value = node.value if isinstance(node, ast.Expr) else None
        while isinstance(value, ast.BoolOp):  # `f(1) == 2 and f(2) == 3`
            value = value.values[-1]
        if isinstance(value, ast.Compare):
            raise ValueError(f"line {node.lineno}: a comparison without `assert` tests nothing")


def loaded(nodes):
    """The names that are read somewhere in these nodes."""
    names = [n for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)]
    return {name.id for name in names if isinstance(name.ctx, ast.Load)}


SETUPS = ("setUpModule", "setup_module")


def call_what_nobody_calls(trees, entry_point):
    """Add a test runner's calls: check(entry_point), test functions, classes of tests."""
    body = [node for tree in trees for node in tree.body]
    cases = cases_in(body)
    definitions = [node for node in body if isinstance(node, DEFINITIONS)]
    runner = any(is_root(node, cases) for node in definitions)
    asserting = {node.name for node in definitions if asserts(node)}
    for tree in trees:
        inner = not runner and tree is not trees[0]
        tree.body = [n for node in tree.body for n in below_guard(node, inner, asserting)]
    body = [node for tree in trees for node in tree.body]
    used, before = loaded([node for node in body if is_root(node, cases)]), None
    while used != before:  # grows by what the definitions use that these use
        before = used
        used = used | loaded([node for node in body if getattr(node, "name", "") in used])
    bases = loaded([base for n in body if isinstance(n, ast.ClassDef) for base in n.bases])
    for tree in trees:
        calls = []
        for node in list(tree.body):
            name = getattr(node, "name", "")
            run = "__import__('asyncio').run" * isinstance(node, ast.AsyncFunctionDef)
            if name in cases:
                if name not in bases or has_tests(node):
                    calls.append(f"run_case({name})")
            elif not isinstance(node, DEFINITIONS) or name in used:
                continue
            elif name == "check":
                if not entry_point:
                    raise ValueError("check(candidate) needs an entry_point")
                calls.append(f"{run}(check({entry_point}))")
            elif name in SETUPS:
                calls.insert(0, f"{name}({'None' * len(node.args.args)})")
            elif name.startswith("test"):
                if len(node.args.args) > len(node.args.defaults) or node.args.kwonlyargs:
                    raise ValueError(f"{name} takes arguments, which only a test runner has")
                calls.append(f"{run}({name}())")
            elif tree is not trees[0] and not node.decorator_list and not getattr(node, "bases", 0):
                tree.body.remove(node)
        # What the setup defines runs with the last test.
        place = trees[-1] if tree is trees[0] else tree
        place.body += ast.parse("\n".join(calls)).body


def below_guard(node, inner, asserting):
    """A statement as it is, without a main guard, which is no test runner's business.

    With `inner` what the guard holds, if it asserts: nobody else would. Never `unittest.main()`,
    which would look for tests in another module and end the process.
    """
    if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
        return node.body if inner and (asserts(node) or loaded([node]) & asserting) else []
    is_main = isinstance(node, ast.Expr) and ast.unparse(node.value).startswith("unittest.main(")
    return [] if is_main else [node]


def asserts(node):
    return any(isinstance(n, ast.Assert) for n in ast.walk(node))


def is_root(node, cases):
    """Whether this statement runs although nothing else uses it."""
    name = getattr(node, "name", "")
    named = name in (*cases, *SETUPS, "check") or name.startswith("test")
    return named or not isinstance(node, DEFINITIONS)


def cases_in(body):
    """The names of the classes whose tests are run: of unittest, or as pytest has them."""
    aliases = [alias for n in body if isinstance(n, ast.ImportFrom) for alias in n.names]
    unittest = {a.asname for a in aliases if a.name.endswith("TestCase")}
    cases = set()
    for node in body:
        if not isinstance(node, ast.ClassDef):
            continue
        bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        tests = [n for n in node.body if getattr(n, "name", "").startswith("test")]
        isolated = any("Isolated" in base for base in bases)
        if any(isinstance(n, ast.AsyncFunctionDef) for n in tests) and not isolated:
            raise ValueError(f"{node.name}: nobody awaits its tests")
        derived = any(base.endswith("TestCase") or base in unittest | cases for base in bases)
        if derived or node.name.startswith("Test") and (tests or not bases):
            cases.add(node.name)
    return cases


def has_tests(node):
    return any(getattr(n, "name", "").startswith("test") for n in node.body)


EXCEPTIONS = ("Error", "Exception", "Warning")
CHANGES_IT = """append extend insert remove pop clear update discard setdefault popitem
    appendleft extendleft popleft rotate subtract difference_update intersection_update
    symmetric_difference_update"""
CHANGES_FIRST = "heappush heappop heapify heapreplace heappushpop shuffle insort"
CHANGING, CHANGING_FIRST = set(CHANGES_IT.split()), set(CHANGES_FIRST.split())
ABSTRACT = set(collections.abc.__all__)  # a stand-in has all their methods


def why_one_process(nodes, names, read):
    """What these tests do that takes the candidate in their own process, or ""."""
    cases, made = cases_in(nodes), any(name[:1].isupper() for name in names)
    if changes_what_is_shared(nodes, names, read):
        return "change what the candidate gave or was given"
    for node in nodes:
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.keyword(arg=word) if (
                word in SHARED - names or re.fullmatch("__(?!name|init).*__", word or "")
            ):
                return f"use {word}"
            case ast.Call(func=ast.Name(id="compile" | "id" | "callable" as word)):
                return f"use {word}"
            case ast.Call(func=ast.Subscript(value=ast.Name(id=word))) if word in names:
                return f"call {word}[...]"
            case ast.Call(ast.Name(id="isinstance" | "issubclass"), [_, kind]) if ABSTRACT & set(
                re.findall(r"\w+", ast.unparse(kind))
            ):
                return f"ask for {ast.unparse(kind)}"
            case ast.Call(ast.Name("hasattr"), [_, ast.Constant(str(word))]) if word[:2] == "__":
                return f"ask for {word}"
            case ast.Name(id=word) if word in names and word.endswith(EXCEPTIONS):
                return f"name the candidate's {word}"
            case ast.ExceptHandler(type=ast.AST() as kind) if not judged(kind, made):
                return "catch an exception that is no builtin, or the judge's own"
            case ast.Call(ast.Attribute(attr=f), [x, *_]) if "Raises" in f and not judged(x, made):
                return "expect an exception that is no builtin, or the judge's own"
            case ast.Import() | ast.ImportFrom() if not plain_import(node):
                return f"import {getattr(node, 'module', None) or node.names[0].name}"
            case ast.AsyncFunctionDef():
                return "are asynchronous"
            case ast.With() if not ast.unparse(node.items[0]).startswith("self."):
                return "enter a context"
            case ast.ClassDef() if node.name not in cases:
                return f"define the class {node.name}"
            case ast.Compare() if compares_identities(node, names):
                return "compare identities"
            case ast.List() | ast.Tuple() | ast.Dict() | ast.Call() if repeats(node):
                return "hold one object twice"
            case ast.BinOp(left=ast.List(elts=[first]), op=ast.Mult()) if not is_constant(first):
                return "hold one object several times"
    return ""


def judged(kind, made):
    """Whether J can tell such an exception of the candidate: a builtin one that is not J's own.

    Where a class is under test, J raises these two itself for what it cannot ask.
    """
    own = {"TypeError", "AttributeError"} if made else set()
    return loaded([kind]) <= vars(builtins).keys() - own


def changes_what_is_shared(nodes, names, read):
    """Whether the tests change in place a container that the candidate gave or was given.

    J and U have a copy each. An object of a class under test is one and the same, but what it holds
    is not: `stack.append(1)`, but `tree.children.append(1)`.
    """
    parameters = {node.arg for node in nodes if isinstance(node, ast.arg)}
    called = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    theirs = names | parameters & called  # of `check(fn)`
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    theirs |= {function.name for function in functions if loaded([function]) & theirs}
    given = dict.fromkeys(read, True)  # what is shared: whether it is plain data

    def is_given(place):
        text = ast.unparse(place)
        if isinstance(place, ast.Call) and loaded([place.func]) & theirs:
            return not text[:1].isupper()  # f().append(1)
        return given.get(text) or text.startswith(tuple(x + end for x in given for end in ".["))

    for node in nodes:
        match node:
            case (
                ast.Assign(value=value)
                | ast.AnnAssign(value=ast.AST() as value)
                | ast.NamedExpr(value=value)
                | ast.For(iter=value)
            ) if loaded([value]) & (theirs | given.keys()):
                plain = not any(name[:1].isupper() for name in loaded([value]) & theirs)
                for target in getattr(node, "targets", 0) or [node.target]:
                    for part in getattr(target, "elts", [target]):
                        given[ast.unparse(part)] = plain
            case (
                ast.Subscript(value=place, ctx=ast.Store() | ast.Del())
                | ast.AugAssign(target=place, value=ast.List() | ast.Set() | ast.Dict())
                | ast.Call(ast.Attribute(value=place, attr="add"), [_])
            ) if is_given(place):
                return True
            case ast.Attribute(value=place, attr=word) if word in CHANGING and is_given(place):
                return True
            case ast.Call(ast.Attribute(attr=word) | ast.Name(id=word), [place, *_]) if (
                word in CHANGING_FIRST and is_given(place)
            ):
                return True
            case ast.Call(func=f, args=args) if loaded([f]) & theirs or is_given(f):
                for x in [*args, *(keyword.value for keyword in node.keywords)]:
                    back = isinstance(x, ast.Name) and x.id in read and x.id[:1].islower()
                    if back and loaded([f]) & names:
                        return True  # the candidate gets back a copy of what it holds
                    shared = [ast.unparse(x)] if isinstance(x, ast.Attribute) else loaded([x])
                    given = dict.fromkeys(shared, True) | given
    return False


def in_order(tree):
    """The nodes of a tree that have a place in its source, in that order."""
    nodes = [node for node in ast.walk(tree) if hasattr(node, "lineno")]
    return sorted(nodes, key=lambda node: (node.lineno, node.col_offset))


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


def repeats(node):
    """`[row, row]`, but not the targets of an assignment: `_, _, x = f()`."""
    if isinstance(node, ast.Call):
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
    else:
        values = node.values if isinstance(node, ast.Dict) else node.elts
    names = [value.id for value in values if isinstance(value, ast.Name)]
    return len(set(names)) < len(names) and not isinstance(getattr(node, "ctx", None), ast.Store)


BLANKS = " \t\r\n\v\f"
NUMBER = re.compile(r"[+-]?[0-9]{1,300}(\.[0-9]{0,300})?([eE][+-]?[0-9]{1,4})?")


def same_output(expected, output):
    """Whether a program's stdout is what a test expects.

    Blanks at line ends, between numbers, blank lines at the end aside; 1.0 for 1 is the same.
    """
    expected, output = (
        [line.rstrip(BLANKS) for line in text.rstrip(BLANKS).split("\n")]
        for text in (expected, output)
    )
    return len(expected) == len(output) and all(map(same_line, expected, output))


def same_line(line, found):
    if line == found:
        return True
    numbers = all(re.fullmatch(r"[0-9.eE+-]*[0-9][0-9.eE+-]*", word) for word in line.split())
    blanks = r"[ \t]+" if numbers else r"([ \t]+)"  # they may be part of a drawing
    words, found = re.split(blanks, line), re.split(blanks, found)
    return len(words) == len(found) and all(map(same_word, words, found))


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
        getattr(case, "setup_class", bool)()
        for name in names:
            instance = case()
            test = getattr(instance, name)
            for step in ("setup_method", "", "teardown_method"):
                method = getattr(instance, step, bool) if step else test
                takes = step and getattr(method, "__code__", None)
                method(*[test][: takes.co_argcount - 1 if takes else 0])
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
    codes, seed, env, remote, say, exec=exec, Fail=AssertionError, Any=BaseException, tell=describe
):
    """Run the compiled setup and tests in env, and say what came of each test.

    The same loop in J and in U. Our tools are arguments: a candidate in U can replace builtins.
    """
    if seed:  # the same tests, the same label; and the candidate does not know the tests
        import random

        random.seed(seed)
    _, setup, *tests = marshal.loads(codes)
    said_first = False
    for number, test in enumerate(tests):
        found = None
        try:
            if number == 0:
                exec(setup, env)
            exec(test, env)
        except Fail as error:
            found = ["failed", tell(error)]
        except Any as error:
            found = ["memory" if isinstance(error, MemoryError) else "error", tell(error)]
        if remote.over:
            return
        say(1 if not found else 0 if said_first else found)
        said_first = said_first or bool(found)


def judge(size, line, link):
    """All of J: take the job from the caller, hand on to U what is left of the code, run the tests.

    It says a line for each test: 1, [status, error] of the first that fails, 0 of others.
    Then the number of requests, and the token that shows that all has been said.
    """
    code, token, codes, seed, methods, *names = marshal.loads(take(line, size))
    remote, say = Remote(Line(link), methods), Line(line).say
    env = environment(remote, *names)
    try:
        failure = remote.reply(code)[0]
    except Gone:
        return
    if failure is not None:
        return say({"failure": failure})
    run_tests(codes, seed, env, remote, say)
    if type(remote.over) is CannotSend:
        say({"one_process": str(remote.over)})
    elif not remote.over:
        say({"asked": remote.number, "token": token})


def run_together(size, line):
    """All of U where tests and candidate share it: here the token is no proof."""
    say = Line(line).say
    code, token, codes, seed, *_ = marshal.loads(take(line, size))
    module = make_module(code)
    with contextlib.suppress(BaseException):
        exec(marshal.loads(codes)[0], module.__dict__)
    failure = load(code, module)
    if failure:
        return say({"failure": failure})
    module.run_case = run_case
    run_tests(codes, seed, module.__dict__, Remote(None), say)
    sys.stdout.flush()
    say({"asked": 1, "token": token})


def run_program(size, line):
    """All of U for a program that reads stdin: run it as the interpreter would."""
    import atexit
    import threading

    (code,) = marshal.loads(take(line, size))
    sys.argv[:] = ["solution.py"]
    failure, exit_code, module = None, 0, make_module(code, "__main__")
    try:
        failure = load(code, module)
    except SystemExit as end:
        exit_code = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(ValueError):  # it has closed it
        sys.stdout.flush()  # may be an object of the program's own
    module.__dict__.clear()  # files that it left open are written
    with contextlib.suppress(ValueError):
        sys.__stdout__.flush()
    if failure:
        Line(line).say({"failure": failure})
    return exit_code & 255
