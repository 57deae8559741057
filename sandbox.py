"""Runs untrusted Python programs against tests: fast, and no program gets a pass that it has not earned.

    from sandbox import run, run_many
    run("def add(a, b): return a + b", ["assert add(1, 2) == 3"], entry_point="add").passed        # True

    python sandbox.py PROBLEMS.jsonl SAMPLES.jsonl -o OUT.jsonl

The verdict is a reward, and a policy trained on it searches it for holes.  So the tests never meet the candidate:

    caller ── job ──> T  holds the tests and expected values, calls the candidate, compares with its own builtins
       │              │  one socketpair a job; plain data in JSON both ways
       └── limits ──> Z ──fork──> U  holds the candidate's code, never a test, an expected value or the verdict

`passed` is T's word after the last test has run and held.  What U says is data: it can be wrong, never a verdict.
"""
import atexit, builtins, itertools, json, operator, os, re, resource, select, signal, socket, struct, sys, time
from functools import lru_cache
from typing import NamedTuple

MAX_FRAME = 16 << 20     # bytes of one message from the candidate; a larger reply is an error
MAX_DEPTH = 200          # nesting of one value
KEEP_OUTPUT = 64 << 10   # bytes of stdout and stderr kept for Result.stdout; the rest is cut
MAX_OUTPUT = 16 << 20    # bytes after which the program is stopped with status `output`
JUDGE_MB = 1024          # address space of T: values from U can make honest tests explode


class Result(NamedTuple):
    status: str          # passed, failed, error, timeout, memory, output, syntax
    passed: bool
    passed_tests: int
    total_tests: int     # the number of test strings given
    seconds: float       # CPU seconds of the candidate's process
    stdout: str          # stdout and stderr, at most KEEP_OUTPUT bytes
    error: str           # first thing that went wrong, one line
    trust: str           # split: the tests ran in a process that never held the candidate; in_process otherwise


# ---------------------------------------------------------------- plain data on the wire: own tags in JSON, no pickle

ATOMS = {int, float, str, bool, type(None)}
LATER = lambda module, name: lambda *a: getattr(__import__(module), name)(*a)   # imported when first needed
SHAPES = {               # type: (its parts, read by the base class so that an override is never asked; its maker)
    "list": (lambda x: list(list.__iter__(x)), list),
    "tuple": (lambda x: list(tuple.__iter__(x)), tuple),
    "set": (lambda x: list(set.__iter__(x)), set),
    "frozenset": (lambda x: list(frozenset.__iter__(x)), frozenset),
    "dict": (lambda x: [[k, v] for k, v in dict.items(x)], dict),
    "bytes": (lambda x: bytes.hex(x), bytes.fromhex),
    "bytearray": (lambda x: bytearray.hex(x), bytearray.fromhex),
    "complex": (lambda x: [complex.__pos__(x).real, complex.__pos__(x).imag], lambda p: complex(*p)),
    "range": (lambda x: [x.start, x.stop, x.step], lambda p: range(*p)),
    "slice": (lambda x: [x.start, x.stop, x.step], lambda p: slice(*p)),
    "ellipsis": (lambda x: None, lambda p: ...),
    "bool": (bool, bool),
    "int": (lambda x: hex(int.__int__(x)), lambda p: int(p, 16)),               # beyond 4300 digits; JSON holds the rest
    "float": (lambda x: float.__float__(x), float),
    "str": (lambda x: [ord(c) for c in str.__str__(x)], lambda p: "".join(map(chr, p))),      # lone surrogates
    "collections.deque": (lambda x: [list(type(x).__mro__[-2].__iter__(x)), x.maxlen], lambda p: LATER("collections", "deque")(*p)),
    "collections.Counter": (lambda x: [[k, v] for k, v in dict.items(x)], lambda p: LATER("collections", "Counter")(dict(p))),
    "collections.OrderedDict": (lambda x: [[k, x[k]] for k in x], lambda p: LATER("collections", "OrderedDict")(p)),
    "collections.defaultdict": (lambda x: [[k, v] for k, v in dict.items(x)], lambda p: LATER("collections", "defaultdict")(None, p)),
    "decimal.Decimal": (lambda x: format(x), LATER("decimal", "Decimal")),
    "fractions.Fraction": (lambda x: [x.numerator, x.denominator], lambda p: LATER("fractions", "Fraction")(*p)),
    "numpy.ndarray": (lambda x: [x.dtype.str, list(x.shape), type(x).__mro__[-2].tolist(x)] if x.dtype.kind in "biufcUS" else x.dtype.kind + 1, lambda p: __import__("numpy").array(p[2], p[0]).reshape(p[1])),
    "numpy.generic": (lambda x: [x.dtype.str, x.item()], lambda p: __import__("numpy").dtype(p[0]).type(p[1])),
    "datetime.timedelta": (lambda x: [x.days, x.seconds, x.microseconds], lambda p: LATER("datetime", "timedelta")(*p)),
    "datetime.datetime": (lambda x: x.isoformat(), lambda p: __import__("datetime").datetime.fromisoformat(p)),
    "datetime.date": (lambda x: x.isoformat(), lambda p: __import__("datetime").date.fromisoformat(p)),
    "datetime.time": (lambda x: x.isoformat(), lambda p: __import__("datetime").time.fromisoformat(p)),
}


def pack(x, other, careful=False, depth=0):
    """x as JSON data; `other(x)` says what becomes of an object that is not plain data."""
    kind = type(x)
    if kind in ATOMS and not (careful and kind in (int, str)): return x
    if depth > MAX_DEPTH: raise ValueError("nested too deep")
    if kind is list and not careful and ATOMS.issuperset(map(type, x)): return x
    for base in kind.__mro__[:-1]:
        name = base.__qualname__ if base.__module__ == "builtins" else f"{base.__module__}.{base.__qualname__}"
        if name in SHAPES:
            if name == "str" and not careful: return str.__str__(x)
            if name == "int" and not careful: return int.__int__(x)
            parts = SHAPES[name][0](x)
            if name not in ("str", "int", "bytes", "bytearray"):
                parts = [pack(v, other, careful, depth + 1) for v in parts] if type(parts) is list else pack(parts, other, careful, depth + 1)
            return parts if name == "list" else {name: parts}
    if kind is type and getattr(builtins, x.__name__, None) is x: return {"type": x.__name__}
    return other(x)


def unpack(data, handle):
    """The value that `data` stands for; `handle(key)` gives the object behind a handle."""
    if type(data) is list: return data[:] if {list, dict}.isdisjoint(map(type, data)) else [unpack(v, handle) for v in data]
    if type(data) is not dict: return data
    (tag, parts), = data.items()
    if tag == "h": return handle(parts)
    if tag == "type":
        found = getattr(builtins, parts)
        if not isinstance(found, type): raise ValueError("not a type")
        return found
    return SHAPES[tag][1](unpack(parts, handle))


encode = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":")).encode


def frame(data):
    data = encode(data).encode()
    if len(data) > MAX_FRAME: raise OverflowError(f"a message of {len(data)} bytes is too large")
    return struct.pack("<I", len(data)) + data


def to_bytes(build):
    """The frame of build(careful): the quick form first, the careful one for huge ints and lone surrogates."""
    try: return frame(build(False))
    except ValueError: return frame(build(True))      # UnicodeEncodeError is one


class Link:
    """Frames over a stream socket; raises EOFError when the other side is gone or talks nonsense."""
    def __init__(self, sock): self.sock, self.buffer = sock, b""

    def take(self, size):
        parts, have = [self.buffer], len(self.buffer)
        while have < size:
            part = self.sock.recv(1 << 16 if size - have < 1 << 16 else 1 << 20)
            if not part: raise EOFError
            parts.append(part)
            have += len(part)
        data = b"".join(parts)
        self.buffer = data[size:]
        return data[:size]

    def receive(self):
        try:
            size, = struct.unpack("<I", self.take(4))
            if size > MAX_FRAME: raise EOFError
            return json.loads(self.take(size))
        except (ValueError, RecursionError, ConnectionError): raise EOFError from None


# ---------------------------------------------------------------- U: runs the candidate and answers T

OPS = {"call": lambda f, *a, **k: f(*a, **k), "method": lambda o, name, *a, **k: getattr(o, name)(*a, **k)}
OPS |= {f.__name__: f for f in (getattr, setattr, len, bool, str, repr, int, float, iter, next, round, abs, isinstance, issubclass)}
OPS |= {name: getattr(operator, name) for name in "eq lt le gt ge add sub mul truediv floordiv mod pow and_ or_ xor matmul neg pos getitem setitem delitem index".split()}


def describe(error):
    """Names of the exception's classes that are builtins, and one line for the reader."""
    names = [c.__name__ for c in type(error).__mro__ if getattr(builtins, c.__name__, None) is c]
    line, trace = None, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "solution.py": line = trace.tb_lineno
        trace = trace.tb_next
    try: text = str(error)[:500]
    except BaseException: text = "?"
    return names, f"{type(error).__name__}: {text}" + (f" (line {line})" if line else "")


def candidate_module(code):
    """The module in which the candidate will run, found as `solution` and as `__main__` (pickle, dataclasses)."""
    module = type(sys)("solution")
    module.__file__ = "solution.py"
    module.__loader__ = type("Loader", (), {"get_source": lambda self, name: code})()      # for inspect.getsource
    sys.modules["solution"] = sys.modules["__main__"] = module
    return module


def candidate(sock, flush=sys.stdout.flush, send=socket.socket.sendall):
    """All of U: run the code, then answer requests until T closes."""
    link, objects, keys, count = Link(sock), {}, {}, itertools.count()

    def keep(n):                                      # names an object that stays here; the first of reply n is "n"
        fresh = itertools.count()
        def other(x):
            if id(x) not in keys:
                k = next(fresh)
                keys[id(x)] = key = f"{n}.{k}" if k else str(n)
                objects[key] = x                      # kept alive, so ids stay unique
            return {"h": keys[id(x)]}
        return other

    def reply(n, kind, build):
        try: data = to_bytes(lambda careful: [n, kind, *build(careful)])
        except BaseException as error: data = to_bytes(lambda careful: [n, "x", *pack(list(describe(error)), None, careful)])
        flush()
        send(sock, data)

    n, how, job = link.receive()
    job = unpack(job, None)
    if how == "tests": return in_process(sock, job, send)
    module = candidate_module(job["code"])
    try:
        code = compile(job["code"], "solution.py", "exec", dont_inherit=True)
    except BaseException as error:
        reply(0, "syntax" if isinstance(error, SyntaxError) and "\0" not in job["code"] else "x", lambda careful: pack(list(describe(error)), None, careful))
        return
    try: exec(code, module.__dict__)
    except BaseException as error: return reply(0, "x", lambda careful, error=error: pack(list(describe(error)), None, careful))
    found = {}
    for name in job["names"]:
        if name not in module.__dict__: continue
        value = module.__dict__[name]
        if type(value) is type(sys): found[name] = {"module": value.__name__}
        else:
            objects["g:" + name] = value
            keys.setdefault(id(value), "g:" + name)
            try: found[name] = json.loads(to_bytes(lambda careful: pack(value, lambda x: {"h": keys[id(x)]} if x is value else keep("g")(x), careful))[4:])
            except BaseException: found[name] = {"h": "g:" + name}
    reply(0, "v", lambda careful: [found])
    while True:
        n, op, args, kwargs = link.receive()
        try:
            real, named = [unpack(a, objects.__getitem__) for a in args], {k: unpack(v, objects.__getitem__) for k, v in kwargs.items()}
            value = OPS[op](*real, **named)
        except BaseException as error:
            reply(n, "x", lambda careful, error=error: pack(list(describe(error)), None, careful))
            continue
        def answer(careful):
            other = keep(n)
            out = [pack(value, other, careful)]
            if ATOMS.issuperset(map(type, real[1:])) and not named: return out
            now = [[pack(a, other, careful) for a in real], {k: pack(v, other, careful) for k, v in named.items()}]
            return out if now == [args, kwargs] else out + now      # what it changed in place changes in T too
        reply(n, "v", answer)


def in_process(sock, job, send):
    """Candidate and tests in one process, for tests that cannot be split: a weaker word, and the Result says so."""
    exec_, compile_, Failed, Bad, list_ = exec, compile, AssertionError, BaseException, list
    outcomes, token = [], job["token"]
    env = candidate_module(job["code"]).__dict__
    stage = "syntax"
    try:
        code = compile_(job["code"], "solution.py", "exec", dont_inherit=True)
        stage = "x"
        exec_(code, env)
        exec_(compile_(job["setup"], "setup.py", "exec"), env)
    except Bad as error:
        return send(sock, to_bytes(lambda careful: [0, stage if isinstance(error, SyntaxError) else "x", *pack(list_(describe(error)), None, careful)]))
    for test in job["tests"]:
        try: exec_(compile_(test, "tests.py", "exec"), env); outcome = ["passed", ""]
        except Failed as error: outcome = ["failed", describe(error)[1]]
        except Bad as error: outcome = ["memory" if isinstance(error, MemoryError) else "error", describe(error)[1]]
        send(sock, to_bytes(lambda careful: [0, "test", *pack(outcome, None, careful)]))
    sys.stdout.flush()
    send(sock, to_bytes(lambda careful: [0, "done", token]))


# ---------------------------------------------------------------- isolation: what the kernel keeps the candidate from

MODES = ("user namespace", "namespaces as root", "no namespaces")      # tried in this order when Z starts
CLONE_FLAGS = 0x10000000 | 0x20000000 | 0x40000000 | 0x00020000 | 0x08000000 | 0x04000000   # user, pid, net, mount, ipc, uts
NOBODY, SCRATCH = 65534, "/scratch/tmp"           # Landlock allows what is below /scratch, so a fresh mount needs no new rule
DENIED = {               # syscall: its number on x86_64 and on aarch64
    "socket": (41, 198), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432), "mount_setattr": (442, 442),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "shmget": (29, 194),
    "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    "pidfd_getfd": (438, 438), "kcmp": (312, 272), "init_module": (175, 105), "finit_module": (313, 273), "kexec_load": (246, 104),
    "reboot": (169, 142), "acct": (163, 89), "syslog": (103, 116), "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setattr": (314, 274), "sched_setaffinity": (203, 122), "fanotify_init": (300, 262)}


def libc(name, *args):
    """A C function by name, or a syscall by number; raises OSError when it answers -1."""
    import ctypes
    global _libc
    if "_libc" not in globals(): _libc = ctypes.CDLL(None, use_errno=True)
    args = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    answer = getattr(_libc, name)(*args) if isinstance(name, str) else _libc.syscall(ctypes.c_long(name), *args)
    if answer == -1: raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return answer


def seccomp_filter(denied):
    """A BPF program that refuses these syscalls, new namespaces and limits for others; clone3 is answered `not there`, or threads break."""
    machine = os.uname().machine
    if machine not in ("x86_64", "aarch64"): raise OSError("no seccomp filter for this machine")
    arm = machine == "aarch64"
    op = lambda code, k, yes=0, no=0: struct.pack("<HBBI", code, yes, no, k)
    load, equal, mask, ret = 0x20, 0x15, 0x45, 0x06
    allow, eperm, enosys, kill = op(ret, 0x7FFF0000), op(ret, 0x50001), op(ret, 0x50026), op(ret, 0x80000000)
    code = [op(load, 4), op(equal, 0xC00000B7 if arm else 0xC000003E, 1, 0), kill, op(load, 0)]
    if not arm: code += [op(0x35, 0x40000000, 0, 1), eperm]                                  # the x32 interface
    for number in [pair[arm] for pair in denied]: code += [op(equal, number, 0, 1), eperm]
    code += [op(equal, 435, 0, 1), enosys]                                                   # clone3 hides its flags from a filter
    code += [op(equal, 220 if arm else 56, 0, 3), op(load, 16), op(mask, 0x7E020080, 0, 1), eperm, op(load, 0)]
    code += [op(equal, 261 if arm else 302, 0, 3), op(load, 16), op(equal, 0, 1, 0), eperm]   # prlimit64 of another process
    return b"".join(code + [allow])


def lock_down(filter_code):
    """No new privileges, then the seccomp filter; both are kept by every child."""
    import ctypes
    libc("prctl", 38, 1, 0, 0, 0)
    buffer = ctypes.create_string_buffer(filter_code)
    libc("prctl", 22, 2, ctypes.create_string_buffer(struct.pack("@HxxxxxxP", len(filter_code) // 8, ctypes.addressof(buffer))))


def landlock(readable, writable):
    """A ruleset: read and run below `readable`, anything below `writable`; no signal and no TCP to the outside."""
    import ctypes
    abi = libc(444, None, 0, 1)
    rights = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1
    attributes = struct.pack("<QQQ", rights, 3, 3)[:8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = libc(444, ctypes.create_string_buffer(attributes, len(attributes)), len(attributes), 0)
    for path, allowed in [(p, 0b1101) for p in readable] + [(p, rights) for p in writable]:
        try: fd = os.open(path, os.O_PATH)
        except OSError: continue
        if not os.path.isdir(path): allowed &= 0b1100000000000111
        libc(445, ruleset, 1, ctypes.create_string_buffer(struct.pack("<Qi", allowed, fd), 12), 0)
        os.close(fd)
    return ruleset, abi


def library(site):
    """What a candidate may read: the interpreter, its library, the shared libraries that these need."""
    paths = [os.path.dirname(os.__file__), f"{sys.base_prefix}/lib", f"{sys.base_prefix}/{sys.platlibdir}", *site, sys.executable,
             "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo"]
    for p in paths:                                    # a link is of use only with all that it leads over
        if os.path.islink(p): paths.append(os.path.normpath(os.path.join(os.path.dirname(p), os.readlink(p))))
        elif os.path.realpath(p) not in paths: paths.append(os.path.realpath(p))
    return [p for p in dict.fromkeys(paths) if os.path.exists(p)]


def enter_namespaces(mode, readable):
    """Takes this process out of the host's view: own ids, processes, network, mounts; then a root of the library and a scratch."""
    uid, gid = os.getuid(), os.getgid()
    if mode == MODES[0]:
        go, me = os.pipe(), os.getpid()
        writer = os.fork()                             # as root the map must be written from the parent namespace
        if writer == 0:
            try:
                if os.read(go[0], 1):
                    if uid: open(f"/proc/{me}/setgroups", "w").write("deny")
                    for kind, own in (("uid", uid), ("gid", gid)):
                        with open(f"/proc/{me}/{kind}_map", "w") as file: file.write(f"{own} {own} 1" + ("" if uid else f"\n{NOBODY} {NOBODY} 1"))
                    os._exit(0)
            finally: os._exit(1)
        try:
            libc("unshare", CLONE_FLAGS)
            os.write(go[1], b"1")
        finally:
            os.close(go[0]), os.close(go[1])
            if os.waitpid(writer, 0)[1]: raise OSError("no map of ids")
    else: libc("unshare", CLONE_FLAGS & ~0x10000000)
    root = b"/proc"                                    # any directory that is always there
    libc("mount", b"none", b"/", None, 1 << 14 | 1 << 18, None)                             # private, recursive
    libc("mount", b"tmpfs", root, b"tmpfs", 6, b"mode=755,size=1m")
    for path in readable + [f"/dev/{d}" for d in ("null", "zero", "random", "urandom")]:
        inside = root.decode() + path
        if os.path.lexists(inside) : continue
        parent = os.path.dirname(inside)
        os.makedirs(parent, exist_ok=True)
        if os.path.islink(path): os.symlink(os.readlink(path), inside); continue
        os.mkdir(inside) if os.path.isdir(path) else open(inside, "w").close()
        libc("mount", path.encode(), inside.encode(), None, 1 << 12 | 1 << 14, None)        # bind, recursive
        if path[:5] != "/dev/":
            import ctypes
            libc(442, -100, inside.encode(), 0x8000, ctypes.create_string_buffer(struct.pack("<QQQQ", 7, 0, 0, 0), 32), 32)   # read-only below
    os.makedirs(root.decode() + SCRATCH)
    for name in ("/tmp", "/dev/shm"):                  # /dev/shm holds the semaphores of multiprocessing
        if not os.path.lexists(root.decode() + name): os.symlink(SCRATCH, root.decode() + name)
    os.chdir(root)
    libc("mount", b"none", b".", None, 32 | 1 | 6, None)                                     # the new root itself is read-only
    libc(DENIED["pivot_root"][os.uname().machine == "aarch64"], b".", b".")
    libc("umount2", b".", 2)
    os.chdir("/")


def works(step):
    """Whether a step of isolation succeeds, found out in a child that is thrown away."""
    child = os.fork()
    if child == 0:
        try: step(); os._exit(0)
        except BaseException: os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def become_nobody():
    os.setgroups([]), os.setresgid(NOBODY, NOBODY, NOBODY), os.setresuid(NOBODY, NOBODY, NOBODY)


class Box:
    """The walls around every U.  Z takes them on itself once; a fork inherits them at no cost."""
    def __init__(self, mode, site, control):
        self.spaces, readable = mode != MODES[2], library(site)
        if self.spaces:
            enter_namespaces(mode, readable)
            self.scratch = SCRATCH
        else:
            import tempfile
            self.scratch = tempfile.mkdtemp(prefix="sandbox-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
        self.guard, ours = socket.socketpair()
        if os.fork():                                  # the first child is process 1 of the namespace
            self.guard.close(), control.close()
            self.keep_scratch(ours)
        ours.close()
        if self.spaces: self.mount()
        else: libc("prctl", 36, 1, 0, 0, 0)            # orphans become our children, so that we see their end
        nobody = os.getuid() == 0 and works(lambda: (become_nobody(), open(os.__file__).close(), os.chdir("/")))
        if nobody:
            if not self.spaces: os.chown(self.scratch, NOBODY, NOBODY)
            become_nobody()
        elif os.getuid(): libc("capset", struct.pack("<Ii", 0x20080522, 0), bytes(24))      # a user namespace gives all of them
        libc("prctl", 1, signal.SIGKILL, 0, 0, 0)      # Z dies with its parent, and with Z all of its namespace
        limit(resource.RLIMIT_CORE, 0), limit(resource.RLIMIT_FSIZE, 64 << 20), limit(resource.RLIMIT_NOFILE, 256)
        if os.getuid(): limit(resource.RLIMIT_NPROC, 64 if self.spaces else 64 + own_tasks())
        os.chdir(self.scratch)
        libc("prctl", 38, 1, 0, 0, 0)
        self.inner, self.ruleset = b"", None
        try:
            self.ruleset, abi = landlock(readable + ["/dev/zero", "/dev/random", "/dev/urandom"], [os.path.dirname(SCRATCH) if self.spaces else self.scratch, "/dev/null"])
            libc(446, self.ruleset, 0)
        except OSError: abi = 0
        try:
            code = seccomp_filter(DENIED.values())
            seccomp = works(lambda: lock_down(code))
            if seccomp: lock_down(code)
            if seccomp and not self.spaces: self.inner = seccomp_filter([(109, 154), (112, 157)])   # setpgid, setsid: the group is how it is killed
        except OSError: seccomp = False
        self.layers = {"mode": mode, "landlock": abi, "seccomp": seccomp, "unprivileged": os.getuid() != 0}

    def keep_scratch(self, requests):
        """The life of Z's parent: it alone may mount.  It ends with Z."""
        while requests.recv(1):
            libc("umount2", SCRATCH.encode(), 2)
            self.mount()
            requests.sendall(b"!")
        status = os.wait()[1]
        if not self.spaces:
            import shutil
            shutil.rmtree(self.scratch, ignore_errors=True)
        os._exit(status != 0)

    def mount(self): libc("mount", b"tmpfs", SCRATCH.encode(), b"tmpfs", 6, b"mode=1777,size=64m,nr_inodes=4096")

    def clean(self):
        """Nothing that one program wrote is there for the next."""
        if not os.listdir(self.scratch): return
        if self.spaces:
            os.chdir("/")
            self.guard.sendall(b"?"), self.guard.recv(1)
            return os.chdir(self.scratch)
        import shutil
        for folder, names, _ in os.walk(self.scratch):
            for name in names:
                if not os.path.islink(os.path.join(folder, name)): os.chmod(os.path.join(folder, name), 0o700)
        for entry in os.scandir(self.scratch):
            shutil.rmtree(entry.path, ignore_errors=True) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)

    def go_in(self, job):
        """What is left for a child to do before it sees the candidate's code."""
        cpu, memory = int(job["timeout"]) + 2, job["memory_mb"] << 20
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu)), limit(resource.RLIMIT_AS, memory)
        if not self.spaces:                            # without a pid namespace: no signal to Z, no way out of the group
            if self.ruleset is not None: libc(446, self.ruleset, 0)
            if self.inner: lock_down(self.inner)

    def kill_all(self, pid):
        """Kills U and all that it started; returns how U ended and its CPU seconds."""
        ended = None
        while True:
            try: os.kill(-1, signal.SIGKILL) if self.spaces else os.killpg(pid, signal.SIGKILL)
            except OSError: pass
            try: done, status, usage = os.wait4(-1, 0)
            except ChildProcessError: return ended
            if done == pid: ended = status, usage.ru_utime + usage.ru_stime


def own_tasks():
    """Processes and threads that this user has already: without a namespace they count against the limit."""
    import glob
    return sum(os.stat(p).st_uid == os.getuid() for p in glob.glob("/proc/[0-9]*/task/[0-9]*"))


# ---------------------------------------------------------------- Z: forks one U a job, limits it, leaves nothing behind

def limit(kind, value):
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def receive_job(control):
    """The next job and the descriptor that comes with it, or None when the caller is gone."""
    data, fds, _, _ = socket.recv_fds(control, 1 << 16, 1)
    if len(data) < 4: return None
    missing = struct.unpack_from("<I", data)[0] + 4 - len(data)
    if missing > 0: data += control.recv(missing, socket.MSG_WAITALL)
    return json.loads(data[4:]), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fds[0])


def serve_candidates(control, box):
    import gc
    exec(compile("1", "solution.py", "exec"))         # the first compile makes the classes of the syntax tree: 1 ms in each child
    gc.disable(), gc.freeze()                         # a child that collects would copy every page
    null, (out, out_w), poll = os.open("/dev/null", os.O_RDWR), os.pipe(), select.poll()
    os.set_blocking(out, False)
    poll.register(out, select.POLLIN), poll.register(control, select.POLLRDHUP)
    while got := receive_job(control):
        job, sock = got
        start, pid = time.monotonic(), os.fork()
        if pid == 0:
            try:
                os.setsid()                           # first: kill(0) would reach our own group, outside of the namespace
                os.dup2(null, 0), os.dup2(out_w, 1), os.dup2(out_w, 2)
                box.go_in(job)
                os.closerange(3, sock.fileno()), os.closerange(sock.fileno() + 1, 64)
                gc.enable()
                candidate(sock)
                sys.stdout.flush()
            except (EOFError, OSError): pass          # T has hung up
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(70)
            finally: os._exit(0)
        child = os.pidfd_open(pid)
        poll.register(child, select.POLLIN), poll.register(sock, select.POLLRDHUP)
        reason, text = watch(poll, pid, child, sock.fileno(), out, control.fileno(), start, job["timeout"])
        status, seconds = box.kill_all(pid)
        while data := read_some(out):                 # nobody is left who could write
            if len(text) < KEEP_OUTPUT: text += data
        poll.unregister(child), poll.unregister(sock), os.close(child)
        box.clean()
        if reason == "ended" and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU: reason = "timeout"
        control.sendall(frame([reason, status, seconds, text[:KEEP_OUTPUT].decode("utf-8", "replace")]))
        sock.close()


def read_some(fd):
    try: return os.read(fd, 1 << 16)
    except BlockingIOError: return b""


def watch(poll, pid, child, sock, out, control, start, cpu):
    """Waits until T hangs up, U ends or reaches a limit; why, and what it printed.  CPU time is the limit: wall time counts busy neighbours."""
    clock, left, text, total = (~pid << 3) | 2, cpu, b"", 0       # the kernel's number for the CPU clock of pid
    while True:
        ready = dict(poll.poll(max(1, left * 1000)))
        if control in ready: return "orphan", text
        if child in ready: return "ended", text
        if sock in ready: return "done", text
        if out in ready:
            data = read_some(out)
            total += len(data)
            if len(text) < KEEP_OUTPUT: text += data
            if total > MAX_OUTPUT: return "output", text
        left = min(cpu - time.clock_gettime(clock), start + 3 * cpu + 2 - time.monotonic())
        if left <= 0.001: return "timeout", text


# ---------------------------------------------------------------- T: holds the tests, calls U, compares

class Gone(BaseException):
    """U has died or broken the protocol: no test can go on."""


class Remote:
    """T's end of one U: sends requests, most of them ahead of time, and takes the replies."""
    def __init__(self, sock, plan):
        self.sock, self.link, self.plan, self.gone, self.proxies = sock, Link(sock), plan, False, {}
        self.number = self.sent = 0                    # requests made by the tests; requests sent, some of them ahead

    def send_ahead(self, first=b""):
        """Sends the next foreseen requests in one go; not more than a socket holds while U is not reading."""
        parts, size, ahead = [first], 0, self.plan.ahead
        while self.sent < len(ahead) and (len(parts) == 1 and not first or size + len(ahead[self.sent]) < 1 << 16):
            parts.append(ahead[self.sent])
            size += len(parts[-1])
            self.sent += 1
        self.send(b"".join(parts))

    def send(self, data):
        try: self.sock.sendall(data)
        except OSError: self.gone = True; raise Gone from None

    def proxy(self, key):
        if type(key) is not str: raise ValueError("bad handle")
        if key not in self.proxies: self.proxies[key] = Proxy(self, key)
        return self.proxies[key]

    def receive(self, number):
        while True:
            try: reply = self.link.receive()
            except (EOFError, OSError): self.gone = True; raise Gone from None
            if type(reply) is list and len(reply) > 2 and reply[0] == number: return reply

    def ask(self, op, *args, **kwargs):
        if self.gone: raise Gone
        number, ahead = self.number + 1, self.plan.ahead
        data = request(number, op, args, kwargs)
        if number <= len(ahead) and ahead[number - 1] == data:
            if number > self.sent: self.send_ahead()
        else:
            if number <= self.sent:                    # the tests took another way than foreseen: pass over what was sent
                number = self.sent + 1
                data = request(number, op, args, kwargs)
            self.plan, self.sent = self.plan._replace(ahead=()), number
            self.send(data)
        self.number = number
        reply = self.receive(self.number)
        if reply[1] == "x": raise remote_error(reply)
        try:
            value = unpack(reply[2], self.proxy)
            if len(reply) > 3:
                for old, new in zip(args, unpack(reply[3], self.proxy)): change(old, new)
                for name, new in unpack({"dict": [[k, v] for k, v in reply[4].items()]}, self.proxy).items(): change(kwargs[name], new)
            return value
        except MemoryError: raise
        except Exception as error: raise RuntimeError(f"the candidate's reply makes no sense: {error!r}") from None


def remote_error(reply):
    names, text = (reply[2], reply[3]) if len(reply) > 3 and type(reply[2]) is list else ([], "?")
    for name in names:
        kind = getattr(builtins, name, None) if type(name) is str else None
        if isinstance(kind, type) and issubclass(kind, Exception):
            try: error = kind(str(text))
            except TypeError: continue                # UnicodeDecodeError and its like want more arguments
            error.remote = str(text)
            return error
    return RuntimeError(str(text))


def request(number, op, args, kwargs):
    def other(x):
        if type(x) is Proxy: return {"h": object.__getattribute__(x, "_key")}
        raise TypeError(f"the tests pass a {type(x).__name__}, which cannot be sent")
    return to_bytes(lambda careful: [number, op, [pack(a, other, careful) for a in args], {k: pack(v, other, careful) for k, v in kwargs.items()}])


def change(old, new):
    """Gives the container `old` the content of `new`, in place, so that every name for it sees the change."""
    if type(old) is not type(new) or old is new: return
    if type(old) is list:
        for i, v in enumerate(new):
            if i < len(old) and type(old[i]) is type(v) and type(v) in (list, dict, set): change(old[i], v); new[i] = old[i]
        old[:] = new
    elif type(old) is dict:
        for k, v in new.items():
            if k in old and type(old[k]) is type(v) and type(v) in (list, dict, set): change(old[k], v); new[k] = old[k]
        old.clear(), old.update(new)
    elif type(old) is tuple:
        for a, b in zip(old, new): change(a, b)
    elif type(old) in (set, bytearray): old.clear(), (old.update if type(old) is set else old.extend)(new)
    elif hasattr(old, "maxlen"): old.clear(), old.extend(new)
    elif isinstance(old, dict): old.clear(), old.update(new)


class Proxy:
    """An object that stays in U.  It never equals plain data, and no operator shows it a plain value to lie about."""
    def __init__(self, remote, key):
        object.__setattr__(self, "_remote", remote)
        object.__setattr__(self, "_key", key)
    def __call__(self, *args, **kwargs): return self._remote.ask("call", self, *args, **kwargs)
    def __getattr__(self, name):
        if name in VERDICTS or name.startswith("__") and name not in ("__name__", "__doc__"): raise AttributeError(name)
        if name in self._remote.plan.methods: return lambda *a, **k: self._remote.ask("method", self, name, *a, **k)
        return self._remote.ask("getattr", self, name)
    def __setattr__(self, name, value): self._remote.ask("setattr", self, name, value)
    def __getitem__(self, key): return self._remote.ask("getitem", self, key)
    def __setitem__(self, key, value): self._remote.ask("setitem", self, key, value)
    def __delitem__(self, key): self._remote.ask("delitem", self, key)
    def __iter__(self): return self._remote.ask("iter", self)
    def __next__(self): return self._remote.ask("next", self)
    def __contains__(self, item): return any(item == v for v in iter(self))   # U's own __contains__ could say yes to all
    def __len__(self): return self._remote.ask("len", self)
    def __bool__(self): return self._remote.ask("bool", self) is True
    def __str__(self): return self._remote.ask("str", self)
    def __repr__(self): return self._remote.ask("repr", self)
    def __int__(self): return self._remote.ask("int", self)
    def __float__(self): return self._remote.ask("float", self)
    def __abs__(self): return self._remote.ask("abs", self)
    def __neg__(self): return self._remote.ask("neg", self)
    def __round__(self, *digits): return self._remote.ask("round", self, *digits)
    def __hash__(self): return hash(self._key)
    def __instancecheck__(self, x): return type(x) is Proxy and self._remote.ask("isinstance", x, self) is True
    def __subclasscheck__(self, x): return type(x) is Proxy and self._remote.ask("issubclass", x, self) is True
    def __eq__(self, other):
        if type(other) is not Proxy: return False
        return self._key == other._key or self._remote.ask("eq", self, other) is True

for _name in "lt le gt ge add sub mul truediv floordiv mod pow and or xor matmul".split():     # between two handles only
    def _method(self, other, op={"and": "and_", "or": "or_"}.get(_name, _name)):
        return self._remote.ask(op, self, other) if type(other) is Proxy else NotImplemented
    setattr(Proxy, f"__{_name}__", _method)
VERDICTS = {n for t in (str, set, bytes, float) for n in dir(t) if n.startswith(("is", "starts", "ends"))}     # `f(x).startswith("a")` asks for a str, not for a friend of the candidate


UNSPLIT = set("redirect_stdout redirect_stderr patch mock StringIO stdout stdin stderr capsys asyncio inspect globals locals eval exec".split())
PLAIN_MODULES = set("""math cmath re sys random string itertools functools collections operator copy datetime decimal fractions
    heapq bisect statistics time json typing numbers array struct hashlib calendar numpy textwrap types enum dataclasses""".split())


class Plan(NamedTuple):
    """What one list of tests needs, found from its text alone and kept for the next candidate."""
    setup: object
    tests: list
    sources: tuple       # the tests' text
    names: list          # names that only the candidate can give
    modules: dict        # names that T imports itself
    methods: set         # attributes that the tests only ever call: one message, not two
    ahead: list          # requests that the tests will make whatever the replies are, sent in one go
    why: str             # why the tests cannot be split, or ""
    bad: str             # a test that does not compile


@lru_cache(maxsize=256)
def plan(setup, tests, entry_point):
    import ast
    try: trees = [ast.parse(setup)] + [ast.parse(t) for t in tests]
    except Exception as error: return Plan(None, [], (), [], {}, set(), [], "", f"the tests do not compile: {error}")
    nodes = [n for t in trees for n in ast.walk(t)]
    bound = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    functions = {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    bound |= functions | {n.arg for n in nodes if isinstance(n, ast.arg)}
    bound |= {(a.asname or a.name).split(".")[0] for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    bound |= {n.name for n in nodes if isinstance(n, ast.ExceptHandler) and n.name}
    loads = {n.id for n in nodes if isinstance(n, ast.Name)} - bound
    if entry_point: loads.add(entry_point)
    names = {n for n in loads if n == entry_point or not hasattr(builtins, n)}
    called = {n.func for n in nodes if isinstance(n, ast.Call)}
    names_called = {f.id for f in called if isinstance(f, ast.Name)} | {entry_point}
    modules = {n: "numpy" if n == "np" else n for n in names - names_called if n in PLAIN_MODULES or n == "np"}
    names -= set(modules)
    methods = {n.attr for n in called if isinstance(n, ast.Attribute)} - {n.attr for n in nodes if isinstance(n, ast.Attribute) and n not in called}
    why, derived = "", names | {a.arg for n in nodes if isinstance(n, ast.FunctionDef) for a in n.args.args}
    words = lambda node: {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    while more := {w for n in nodes if isinstance(n, (ast.Assign, ast.For)) and derived & words(n.value if isinstance(n, ast.Assign) else n.iter)
                   for t in (n.targets if isinstance(n, ast.Assign) else [n.target]) for w in words(t)} - derived: derived |= more
    for n in nodes:
        word = n.id if isinstance(n, ast.Name) else n.attr if isinstance(n, ast.Attribute) else ""
        if word in UNSPLIT and word != entry_point: why = word
        elif isinstance(n, (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)): why = "async"
        elif isinstance(n, (ast.Import, ast.ImportFrom)) and UNSPLIT & {p for a in n.names for p in [*a.name.split("."), getattr(n, "module", "") or ""]}: why = "import"
        elif isinstance(n, ast.ExceptHandler) and n.type and names & words(n.type): why = "it catches an exception of the candidate"
        elif isinstance(n, ast.ClassDef) and any(names & words(b) for b in n.bases): why = "it derives from a class of the candidate"
        elif isinstance(n, ast.With) and any(names & words(i.context_expr) for i in n.items): why = "it enters a context of the candidate"
        elif isinstance(n, ast.Call) and derived & words(n.func):
            for a in [*n.args, *(k.value for k in n.keywords)]:
                if isinstance(a, (ast.Lambda, ast.GeneratorExp)) or isinstance(a, ast.Name) and a.id in functions: why = "it passes a function to the candidate"
    check = next((i for i, t in enumerate(trees[1:]) for n in t.body if isinstance(n, ast.FunctionDef) and n.name == "check"), None)
    if check is not None and entry_point and not any(isinstance(f, ast.Name) and f.id == "check" for f in called):
        tests = tests[:check] + (tests[check] + f"\n\ncheck({entry_point})\n",) + tests[check + 1:]       # a bare `def check(candidate)` tests nothing
        trees[1 + check] = ast.parse(tests[check])
    try: codes = [compile(t, "tests.py", "exec") for t in trees]
    except Exception as error: return Plan(None, [], (), [], {}, set(), [], "", f"the tests do not compile: {error}")
    return Plan(codes[0], codes[1:], tests, sorted(names), modules, methods, [] if why else foresee(trees, names, derived, methods), why and f"the tests cannot be split: {why}", "")


def foresee(trees, names, derived, methods):
    """The requests that straight-line tests make whatever the replies are: asserts of one form go to U as one batch."""
    import ast
    known, frames, checks, Unknown = {n: Proxy(None, "g:" + n) for n in names}, [], {}, object()
    touches = lambda node: any(isinstance(n, ast.Name) and n.id in derived for n in ast.walk(node))
    objects = any(isinstance(n, ast.Attribute) and touches(n.value) for t in trees for n in ast.walk(t))   # results are objects: `len(x)` is a request too

    def value(node):                                   # raises LookupError where a request might be made that is not foreseen
        if isinstance(node, ast.Name) and node.id in known: return known[node.id]
        if not touches(node):
            try: return ast.literal_eval(node)
            except ValueError: return Unknown
        if isinstance(node, ast.Compare) and len(node.ops) == 1: sides = [value(node.left), value(node.comparators[0])]
        elif isinstance(node, ast.BinOp): sides = [value(node.left), value(node.right)]
        elif isinstance(node, ast.UnaryOp): sides = [value(node.operand)]
        elif isinstance(node, ast.Call): return call(node)
        else: raise LookupError
        if objects and sum(type(s) is Proxy for s in sides) > (not isinstance(node, ast.UnaryOp)): raise LookupError
        return Unknown

    def call(node):
        method = isinstance(node.func, ast.Attribute) and node.func.attr in methods
        target = value(node.func.value if method else node.func) if method or isinstance(node.func, ast.Name) else Unknown
        args = [value(a) for a in node.args]
        kwargs = {}
        for k in node.keywords: kwargs.update({k.arg: value(k.value)} if k.arg else value(k.value))
        if type(target) is not Proxy:
            if touches(node.func) or objects and any(type(a) is Proxy for a in args): raise LookupError
            return Unknown                             # a builtin on plain data
        if any(a is Unknown or type(a) is Proxy for a in [*args, *kwargs.values()]): raise LookupError
        number = len(frames) + 1
        frames.append(request(number, "method" if method else "call", (target, node.func.attr, *args) if method else (target, *args), kwargs))
        for a in node.args + [k.value for k in node.keywords]:
            if isinstance(a, ast.Name): known[a.id] = Unknown                   # it may have been changed in place
        return Proxy(None, str(number))

    def walk(body):
        for n in body:
            if isinstance(n, ast.Assert): value(n.test)
            elif isinstance(n, ast.Assign) and len(n.targets) == 1 and isinstance(n.targets[0], ast.Name): known[n.targets[0].id] = value(n.value)
            elif isinstance(n, ast.FunctionDef) and not n.decorator_list: checks[n.name] = n
            elif isinstance(n, ast.Expr) and isinstance(n.value, ast.Call):
                call_, f = n.value, n.value.func
                if isinstance(f, ast.Name) and f.id in checks and len(call_.args) == len(checks[f.id].args.args) == 1 and not call_.keywords:
                    known[checks[f.id].args.args[0].arg] = value(call_.args[0])
                    walk(checks[f.id].body)
                else: value(call_)
            elif not isinstance(n, (ast.Import, ast.ImportFrom, ast.Pass)) and not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)): raise LookupError

    try:
        for tree in trees: walk(tree.body)
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError): pass
    return frames


def one_line(error):
    """The error for the reader; the candidate's own text where it comes from there."""
    try: return (getattr(error, "remote", "") or f"{type(error).__name__}: {error}")[:1000]
    except Exception: return type(error).__name__


def judge(job, sock):
    """One job: what T can say of it.  `gone` means that U ended before the tests did; Z knows why."""
    p = plan(job["setup"], tuple(job["tests"]), job["entry_point"])
    trust = "in_process" if job["trust"] == "in_process" or p.why and job["trust"] == "auto" else "split"
    report = {"status": "error", "passed_tests": 0, "error": "", "trust": trust, "gone": False, "retire": False}
    if p.bad or not p.tests or trust == "split" and p.why: return report | {"error": p.bad or p.why or "there are no tests"}
    failed = []                                        # (status, error) of what did not hold

    def start_failed(reply):                           # the candidate's code did not run to its end
        names, text = reply[2:] if len(reply) == 4 else ((), "?")
        return report | {"status": "syntax" if reply[1] == "syntax" else "memory" if "MemoryError" in names else "error", "error": str(unpack(text, None))}

    try:
        if trust == "in_process":
            token, link, done = os.urandom(16).hex(), Link(sock), False
            sock.sendall(to_bytes(lambda careful: [0, "tests", pack({"code": job["code"], "setup": job["setup"], "tests": list(p.sources), "token": token}, None, careful)]))
            while not done:
                reply = link.receive()
                if reply[1] == "done": done = reply[2] == token
                elif reply[1] != "test": return start_failed(reply)
                elif reply[2] == "passed": report["passed_tests"] += 1
                else: failed.append((str(reply[2]), str(unpack(reply[3], None))))
        else:
            remote = Remote(sock, p)
            remote.send_ahead(to_bytes(lambda careful: [0, "code", pack({"code": job["code"], "names": p.names}, None, careful)]))
            reply = remote.receive(0)
            if reply[1] != "v": return start_failed(reply)
            known = dict(vars(builtins))
            known.pop(job["entry_point"], None)        # a missing `sum` of the candidate is not ours
            env = {"__name__": "tests", "__builtins__": known}
            for name, module in p.modules.items():
                try: env[name] = __import__(module)
                except ImportError: pass
            for name in p.names:
                if name not in reply[2]: continue
                value = reply[2][name]
                try: env[name] = __import__(value["module"]) if type(value) is dict and value.get("module") in PLAIN_MODULES else unpack(value, remote.proxy)
                except Exception: pass
            if "random" in sys.modules: sys.modules["random"].seed(0)          # the same program gets the same label
            exec(p.setup, env)
            for test in p.tests:
                try:
                    exec(test, env)
                    if remote.gone: raise Gone         # an `except:` in the test hid it
                    report["passed_tests"] += 1
                except AssertionError as error: failed.append(("failed", one_line(error)))
                except MemoryError as error:
                    failed.append(("memory", one_line(error)))
                    report["retire"] |= not hasattr(error, "remote")
                except Exception as error: failed.append(("error", one_line(error)))
    except (Gone, EOFError, OSError): report["gone"] = True
    except MemoryError: return report | {"status": "memory", "error": "the tests ran out of memory on the candidate's values", "retire": True}
    except BaseException as error: failed.append(("error", one_line(error)))
    if report["passed_tests"] == len(p.tests) and not failed and not report["gone"]: return report | {"status": "passed"}
    return report | dict(zip(("status", "error"), failed[0] if failed else ("error", "")))


def serve_tests(control, site):
    try:
        ruleset, _ = landlock(library(site) + ["/dev/urandom"], ["/dev/null"])
        libc("prctl", 38, 1, 0, 0, 0), libc(446, ruleset, 0)
    except OSError: pass
    limit(resource.RLIMIT_AS, JUDGE_MB << 20)
    while got := receive_job(control):
        job, sock = got
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + job["timeout"]) + 3, resource.RLIM_INFINITY))
        try: report = judge(job, sock)
        except Exception as error: report = {"status": "error", "passed_tests": 0, "error": one_line(error), "trust": "split", "gone": False, "retire": True}
        sock.close()
        control.sendall(to_bytes(lambda careful: pack(report, None, careful)))


# ---------------------------------------------------------------- the caller's side

class Worker:
    """One Z and one T, spawned once (never forked: a process that holds torch forks slowly) and kept."""
    def __init__(self):
        self.helpers = {}

    def start(self, role):
        """Starts a helper; Z in the first mode that works here."""
        global MODE
        while True:
            self.spawn(role)
            if role == "T": return
            try: self.layers = Link(self.helpers[role][1]).receive(); return
            except EOFError:
                self.drop(role)
                if MODE == len(MODES) - 1: raise RuntimeError("the sandbox's helper process does not start") from None
                MODE += 1

    def spawn(self, role):
        import subprocess
        ours, theirs = socket.socketpair()
        folder, file = os.path.split(os.path.abspath(__file__))
        paths = [p for p in sys.path if "site-packages" in p or "dist-packages" in p]
        code = f"import sys; sys.path.insert(0, {folder!r}); import {file[:-3]} as s; sys.path[:] = [p for p in sys.path if p not in ('', {folder!r})] + {paths!r}; s.serve({role!r}, {theirs.fileno()}, {MODES[MODE]!r}, {paths!r})"
        process = subprocess.Popen([sys.executable, "-s", "-S", "-X", "utf8", "-c", code], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, cwd="/", env={"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}, start_new_session=True)
        theirs.close()
        self.helpers[role] = process, ours

    def submit(self, job, isolation="auto"):
        for role in ("Z", "T"):
            if role not in self.helpers: self.start(role)
        if MISSING is None: look_for_holes(self)
        if MISSING and isolation == "strict": raise Unsafe("not enforced on this machine: " + ", ".join(MISSING))
        self.hand_over(job)

    def hand_over(self, job):
        """Sends T the job and Z the limits, with the two ends of a fresh socketpair."""
        self.job, self.reports, (a, b) = job, {}, socket.socketpair()
        with a, b:
            for role, end in (("Z", b), ("T", a)):
                keys = ("timeout", "memory_mb") if role == "Z" else ("code", "tests", "setup", "entry_point", "timeout", "trust")
                data, sock = json.dumps({k: job[k] for k in keys}).encode(), self.helpers[role][1]
                data = struct.pack("<I", len(data)) + data
                sent = socket.send_fds(sock, [data], [end.fileno()])
                if sent < len(data): sock.sendall(data[sent:])
        self.deadline = time.monotonic() + 4 * job["timeout"] + 20

    def collect(self, role):
        """Takes a helper's report; returns the Result when both are there."""
        reply = Link(self.helpers[role][1]).receive()
        self.reports[role] = unpack(reply, None) if role == "T" else reply
        if len(self.reports) < 2: return None
        t, (reason, ended, seconds, stdout) = self.reports["T"], self.reports["Z"]
        if t["retire"]: self.drop("T")
        status, error = t["status"], t["error"]
        if t["gone"]:
            status = reason if reason in ("timeout", "output") else "error"
            error = f"{reason} limit" if status != "error" else f"ended by signal {os.WTERMSIG(ended)}" if os.WIFSIGNALED(ended) else f"ended with exit code {os.WEXITSTATUS(ended)} before its tests were done"
        return Result(status, status == "passed", t["passed_tests"], len(self.job["tests"]), seconds, stdout, error, t["trust"])

    def drop(self, role):
        """Ends a helper; returns its exit status."""
        process, sock = self.helpers.pop(role)
        sock.close()
        process.kill()
        return process.wait()


class Unsafe(RuntimeError):
    """Isolation "strict" was asked for, and a layer is missing."""


MISSING = None           # what the kernel does not keep a candidate from, found out once by trying
HOLES = '''
import ctypes, os, socket
def holes(outside, port, caller, size):
    found, fork = [], os.fork
    def attempt(name, action):
        try:
            if action() is not False: found.append(name)
        except (OSError, MemoryError): pass
    attempt("reading files outside", lambda: open(outside + "/secret").close())
    attempt("writing files outside", lambda: open(outside + "/new", "w").close())
    attempt("network", lambda: socket.create_connection(("127.0.0.1", port), 1))
    attempt("signals to other processes", lambda: os.kill(caller, 0))
    attempt("root's rights", lambda: os.getuid() == 0)
    attempt("memory", lambda: bytearray(size))
    attempt("new namespaces", lambda: ctypes.CDLL(None).unshare(0x10000000) == 0)
    def crowd():
        for _ in range(300):
            if fork() == 0: os._exit(0)
    attempt("number of processes", crowd)
    def stray():
        pid = fork()
        if pid == 0:
            try: os.setsid()
            except OSError: os._exit(1)
            os._exit(0)
        return os.waitpid(pid, 0)[1] == 0
    if os.getpid() > 1000 or os.getppid() > 1000: attempt("processes that leave their group", stray)      # without a pid namespace
    return found
'''


def look_for_holes(worker):
    """Lets a candidate try to break each wall, and says once what stood open."""
    global MISSING
    import tempfile
    with tempfile.TemporaryDirectory() as outside, socket.create_server(("127.0.0.1", 0)) as listener:
        os.chmod(outside, 0o777)
        with open(outside + "/secret", "w") as file: os.chmod(file.fileno(), 0o666)
        job = DEFAULTS | dict(code=HOLES, entry_point="holes", timeout=10.0,
                                           tests=[f"raise ValueError(','.join(holes({outside!r}, {listener.getsockname()[1]}, {os.getpid()}, {1 << 30})))"])
        worker.hand_over(job)
        result = worker.collect("Z") or worker.collect("T")
        found = result.error.removeprefix("ValueError: ")
        if not result.error.startswith("ValueError: "): found = f"anything, since the trial failed ({result.error})"
        if os.path.exists(outside + "/new") and "writing" not in found: found += ",writing files outside"
    MISSING = [f for f in found.split(",") if f]
    if MISSING: print("sandbox: not enforced on this machine: " + ", ".join(MISSING) + f" (layers: {worker.layers})", file=sys.stderr)


IDLE, OWNER, MODE = [], [0], 0


def close():
    """Ends the idle helpers.  They also end by themselves when the caller does."""
    while IDLE and OWNER[0] == os.getpid():
        worker = IDLE.pop()
        for role in list(worker.helpers): worker.drop(role)


atexit.register(close)


DEFAULTS = dict(setup="", entry_point=None, timeout=3.0, memory_mb=512, trust="auto")


def run_many(jobs, workers=None, on_result=None, isolation="auto"):
    """Results of the jobs (dicts of run's arguments) in their order, from `workers` pairs of helpers at a time."""
    if OWNER[0] != os.getpid(): OWNER[0] = os.getpid(); IDLE.clear()           # after a fork the helpers are the parent's
    results, tries, todo, busy = [None] * len(jobs), {}, iter(range(len(jobs))), {}
    again, free, poll = [], [IDLE.pop() if IDLE else Worker() for _ in range(min(len(jobs), workers or os.cpu_count() or 1))], select.poll()

    def release(worker):                               # no more news is awaited from it
        for _, sock in worker.helpers.values():
            if busy.pop(sock.fileno(), None): poll.unregister(sock)

    def stop(worker):
        release(worker)
        return {role: worker.drop(role) for role in list(worker.helpers)}

    def finish(worker, result):
        results[worker.index] = result
        free.append(worker)
        tries.pop(worker.index, None)
        if on_result: on_result(worker.index, result)

    def lost(worker, late):                            # a helper died: once more, unless it was the job's doing
        codes, i = stop(worker), worker.index
        tries[i] = tries.get(i, 0) + 1
        if late or codes.get("T") == -signal.SIGXCPU or tries[i] > 2:
            status = "error" if tries[i] > 2 and not late else "timeout"
            finish(worker, Result(status, False, 0, len(jobs[i]["tests"]), 0.0, "", "the tests ran too long on the candidate's values" if status == "timeout" else "the helpers died three times", "split"))
        else: again.append(i), free.append(worker)

    try:
        while True:
            while free and (i := again.pop() if again else next(todo, None)) is not None:
                worker = free.pop()
                worker.index = i
                try: worker.submit(DEFAULTS | jobs[i], isolation)
                except (OSError, EOFError): lost(worker, False); continue
                for role, (_, sock) in worker.helpers.items():
                    busy[sock.fileno()] = worker, role
                    poll.register(sock, select.POLLIN)
            if not busy: break
            for fd, _ in poll.poll(1000):
                if fd not in busy: continue
                worker, role = busy.pop(fd)
                poll.unregister(fd)
                try: result = worker.collect(role)
                except (EOFError, OSError): lost(worker, False)
                else:
                    if result: finish(worker, result)
            for worker in {id(w): w for w, _ in busy.values()}.values():
                if time.monotonic() > worker.deadline: lost(worker, True)
    finally:
        for worker, _ in list(busy.values()): stop(worker)
        IDLE.extend(w for w in free if w.helpers)
    return results


def run(code, tests, *, setup="", entry_point=None, timeout=3.0, memory_mb=512, trust="auto", isolation="auto"):
    """Runs one program against its tests; each test is a string of statements, and all have to hold."""
    job = dict(code=code, tests=tests, setup=setup, entry_point=entry_point, timeout=timeout, memory_mb=memory_mb, trust=trust)
    return run_many([job], 1, isolation=isolation)[0]


def serve(role, fd, mode, site):
    """The life of a helper process."""
    control = socket.socket(fileno=fd)
    import collections, copy, ctypes, functools, heapq, math, string, typing
    if role == "T": return serve_tests(control, site)
    try: box = Box(mode, site, control)
    except OSError as error: sys.exit(f"sandbox: no {mode}: {error}" if mode == MODES[-1] else 3)       # the caller tries the next mode
    control.sendall(frame(box.layers))
    serve_candidates(control, box)


# ---------------------------------------------------------------- from a response to a program

@lru_cache(maxsize=4096)
def complete_part(prefix):
    """The longest run of leading lines that parses by itself: imports and helpers stay, an open `def f(x):` goes."""
    import ast
    lines = prefix.splitlines(keepends=True)
    for end in range(len(lines), 0, -1):
        try: ast.parse("".join(lines[:end]))
        except Exception: continue
        return "".join(lines[:end]).rstrip("\n") + "\n"
    return ""


def defines(code, name):
    name = re.escape(name) if name else r"\w+"
    return re.search(rf"^(?:async[ \t]+def|def|class)[ \t]+{name}\b|^{name}[ \t]*(?::[^=\n]+)?=(?!=)", code, re.M) is not None


def program(problem, response):
    """The candidate's program: the one place where code is taken out of a response.  Never raises, whatever the text."""
    prefix, entry_point = problem.get("prefix") or "", problem.get("entry_point")
    blocks = re.findall(r"^[ \t]*```[^\n`]*\n(.*?)(?=^[ \t]*```|\Z)(?:[ \t]*```[^\n]*)?", response, re.S | re.M)
    code = response
    if blocks:
        code = next((b for b in reversed(blocks) if defines(b, entry_point)), blocks[0])
        before = response[:response.index("```")]
        if response.count("```") == 1 and before.strip() and not defines(code, entry_point): code = before   # only the closing fence
    if defines(code, entry_point): return complete_part(prefix) + code
    return prefix + code


# ---------------------------------------------------------------- command line

class BadInput(Exception):
    """Something wrong in a file; the message is the one line that the user sees."""


FIELDS = {"task_id": (str, int), "prefix": (str, type(None)), "setup": (str, type(None)), "entry_point": (str, type(None)), "tests": list, "response": str}


def records(path, needed):
    """The records of a JSONL file.  A bad line is reported with file, line number and field."""
    found = []
    try: lines = open(path, encoding="utf-8").read().split("\n")
    except (OSError, ValueError) as error: raise BadInput(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip(): continue
        try: record = json.loads(line)
        except (ValueError, RecursionError) as error: raise BadInput(f"{path}, line {number}: not JSON: {error}") from None
        if type(record) is not dict: raise BadInput(f"{path}, line {number}: not a JSON object")
        for field in needed:
            if field not in record: raise BadInput(f"{path}, line {number}: field {field!r} is missing")
        for field in FIELDS.keys() & record.keys():
            if not isinstance(record[field], FIELDS[field]): raise BadInput(f"{path}, line {number}: field {field!r} is a {type(record[field]).__name__}")
        if not all(isinstance(t, str) for t in record.get("tests", [])): raise BadInput(f"{path}, line {number}: field 'tests' holds something other than strings")
        found.append((number, record))
    return found


def finished(path, samples):
    """How many samples an earlier run has already written to `path`; a last line that was cut off is taken away."""
    if not os.path.exists(path): return 0
    with open(path, "rb") as file: data = file.read()
    whole = data[:data.rfind(b"\n") + 1]
    lines = whole.split(b"\n")[:-1]
    if len(lines) > len(samples): raise BadInput(f"{path}, line {len(samples) + 1}: more records than there are samples; it is left as it is")
    for number, (line, (_, sample)) in enumerate(zip(lines, samples), 1):
        try: old = json.loads(line)
        except ValueError: old = None
        if type(old) is not dict or "status" not in old: raise BadInput(f"{path}, line {number}: not a result of this program; it is left as it is")
        for field in ("task_id", "response"):
            if old.get(field) != sample[field]: raise BadInput(f"{path}, line {number}: field {field!r} differs from the sample's; it is left as it is")
    if len(whole) < len(data): os.truncate(path, len(whole))
    return len(lines)


def score_file(args):
    problems = {}
    for number, problem in records(args.problems, ["task_id", "tests"]):
        if problem["task_id"] in problems: raise BadInput(f"{args.problems}, line {number}: field 'task_id' repeats {problem['task_id']!r}")
        problems[problem["task_id"]] = problem
    samples = records(args.samples, ["task_id", "response"])
    for number, sample in samples:
        if sample["task_id"] not in problems: raise BadInput(f"{args.samples}, line {number}: field 'task_id' {sample['task_id']!r} is not in {args.problems}")
    if os.path.exists(args.output) and any(os.path.samefile(args.output, p) for p in (args.problems, args.samples)):
        raise BadInput(f"{args.output}: is an input")
    start = finished(args.output, samples)
    jobs = []
    for _, sample in samples[start:]:
        problem = problems[sample["task_id"]]
        jobs.append(dict(code=program(problem, sample["response"]), tests=problem["tests"], setup=problem.get("setup") or "", entry_point=problem.get("entry_point"),
                         timeout=args.timeout, memory_mb=args.memory_mb, trust=args.trust))
    waiting, done, passed = {}, start, 0
    try: out = open(args.output, "a", encoding="utf-8")
    except OSError as error: raise BadInput(f"{args.output}: cannot be written: {error}") from None
    with out:
        def on_result(index, result):                # results are written in the order of the samples, so a run can go on
            nonlocal done, passed
            waiting[start + index] = result
            passed += result.passed
            while done in waiting:
                result, sample = waiting.pop(done), samples[done][1]
                out.write(json.dumps(sample | {"actual_score": float(result.passed), "passed_tests": result.passed_tests, "total_tests": result.total_tests, "status": result.status}) + "\n")
                out.flush()
                done += 1
            count = done + len(waiting)
            if sys.stderr.isatty() or count == len(samples) or count % 1000 == 0:
                filled = 30 * count // len(samples)
                print(f"\r[{'#' * filled}{'.' * (30 - filled)}] {count}/{len(samples)}, {passed} of {count - start} passed", end="", file=sys.stderr, flush=True)
        run_many(jobs, args.workers, on_result)
    print(f"\n{args.output}: {len(samples)} samples, {start} of them from an earlier run", file=sys.stderr)


def main():
    import argparse
    parser = argparse.ArgumentParser(description="Scores samples by the tests of their problems.")
    parser.add_argument("problems", metavar="PROBLEMS.jsonl")
    parser.add_argument("samples", metavar="SAMPLES.jsonl")
    parser.add_argument("-o", "--output", required=True, metavar="OUT.jsonl", help="the samples with their scores; an interrupted run goes on where it stopped")
    parser.add_argument("--workers", type=int, default=None, help="programs at a time; default: the number of cores")
    parser.add_argument("--timeout", type=float, default=3.0, help="CPU seconds a program")
    parser.add_argument("--memory_mb", type=int, default=512, help="address space of a program")
    parser.add_argument("--trust", choices=["auto", "split", "in_process"], default="auto")
    try: score_file(parser.parse_args())
    except BadInput as error: print(f"sandbox.py: {error}", file=sys.stderr); return 2
    except KeyboardInterrupt: print("\nstopped; the same command goes on from here", file=sys.stderr); return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
