"""Runs untrusted Python programs against tests: fast, and no program gets a pass that it has not earned.

    from sandbox import run, run_many
    run("def add(a, b): return a + b", ["assert add(1, 2) == 3"], entry_point="add").passed         # True

    python sandbox.py PROBLEMS.jsonl SAMPLES.jsonl -o OUT.jsonl     one JSON object a line; OUT is SAMPLES with the verdicts
    python sandbox.py --bench HumanEval.jsonl.gz                    what a program costs here, by tools/sandbox_bench.py

The verdict is a reward, and a policy trained on it searches it for holes. So the tests never meet the candidate:

    caller ── code, tests ──> T  holds tests and expected values, calls the candidate, compares with its own builtins
                              ├── requests; plain data back, as JSON ─────────────────┐
                              └── limits ──> Z  forks a process for each program ──> U  holds the candidate's code

`passed` is T's word after the last test has run and held. What U says is data: it can be wrong, never a verdict. T is spawned
by subprocess, so that a caller which holds torch is never forked, and forks Z before it has seen a test. Tests that cannot be
split (they redirect stdout, drive coroutines, pass functions) run beside the candidate: a weaker word, and the Result says so.

Covered, where the kernel has the layers (they are tried at the start, and what is missing is said once): no network, no file
outside the interpreter's library and an empty scratch, no process that survives, no signal to the outside, limits on CPU and
wall time, memory, processes, files, output. Not covered: tests that are too weak or compare two objects of the candidate,
memorised answers, holes in the kernel, the memory of all child processes together. Linux 5.3 and Python 3.11 or newer.
"""
import atexit, builtins, collections, dataclasses, gzip, json, marshal, operator, os, re, resource, select, signal, socket, struct, sys, time
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

MAX_MESSAGE, MAX_DEPTH = 16 << 20, 200               # bytes of one message, nesting of one value; beyond is an error
KEEP_OUTPUT, MAX_OUTPUT = 64 << 10, 16 << 20         # bytes of output in Result.stdout; bytes that end a program as `output`
PATIENCE = 20                                        # seconds on top of four timeouts after which a helper that sleeps is replaced
JUDGE_MB = 1024                                      # address space of T: small values from U can make honest tests explode

class Result(NamedTuple):
    status: str          # passed, or what came of the first test that did not: failed, error, timeout, memory, output, syntax
    passed: bool
    passed_tests: int    # counted on after a test that failed
    total_tests: int     # the number of test strings given
    seconds: float       # CPU time of the candidate's process
    stdout: str          # stdout and stderr
    error: str           # what went wrong first, one line
    trust: str           # split: the tests ran in a process that never held the candidate; or in_process

# ---------------------------------------------------------------- the wire: one JSON value a line, own tags, no pickle

ATOMS, FACTORIES = {int, float, str, bool, type(None)}, (int, float, str, bool, list, tuple, dict, set)
BASES = {int: int.__int__, float: float.__float__, str: str.__str__}            # a subclass is sent as what it holds
attributes = lambda names: lambda x, base: [getattr(x, name) for name in names.split()]
content = lambda x, base: [list(base.__iter__(x))]
mapping = lambda x, base: [dict(base.items(x))]
latin = lambda x, base: [base.decode(x, "latin-1"), "latin-1"]
SHAPES = {               # type: the arguments that make x again, read by the base class, so that an override is never asked
    "tuple": content, "set": content, "frozenset": content, "bytes": latin, "bytearray": latin,
    "dict": lambda x, base: [[[k, v] for k, v in dict.items(x)]], "decimal.Decimal": lambda x, base: [base.__str__(x)],
    "collections.Counter": mapping, "collections.OrderedDict": mapping, "complex": attributes("real imag"),
    "collections.defaultdict": lambda x, base: [x.default_factory if x.default_factory in FACTORIES else None, *mapping(x, base)],
    "collections.deque": lambda x, base: [*content(x, base), x.maxlen],
    "range": attributes("start stop step"), "slice": attributes("start stop step"),
    "fractions.Fraction": attributes("numerator denominator"), "datetime.timezone": lambda x, base: [base.utcoffset(x, None)],
    "datetime.timedelta": attributes("days seconds microseconds"), "datetime.date": attributes("year month day"),
    "datetime.time": attributes("hour minute second microsecond tzinfo"),
    "datetime.datetime": attributes("year month day hour minute second microsecond tzinfo"),
    "numpy.generic": lambda x, base: [x.dtype.str, x.item()],
    "numpy.ndarray": lambda x, base: [x.dtype.str, list(x.shape), base.tolist(x)]}

def pack(x, other, depth=0):
    """x as JSON: atoms and lists as they are, the rest {type: arguments}; other(x) stands for what is not plain data."""
    kind = type(x)
    if kind in ATOMS or kind is list and ATOMS.issuperset(map(type, x)): return x
    if depth > MAX_DEPTH: raise ValueError("nested too deep")
    if x is ...: return {"builtin": "Ellipsis"}
    if kind is type and getattr(builtins, x.__name__, None) is x: return {"builtin": x.__name__}
    for base in kind.__mro__[:-1]:
        name = f"{base.__module__}.{base.__qualname__}".removeprefix("builtins.")
        if base in BASES: return BASES[base](x)
        if base is list: return [pack(v, other, depth + 1) for v in list.__iter__(x)]
        if name in SHAPES and not (name == "numpy.ndarray" and x.dtype.hasobject):
            return {name: [pack(v, other, depth + 1) for v in SHAPES[name](x, base)]}
    return other(x)

def unpack(data, handle):
    """The value that `data` stands for; `handle(key)` gives the object behind a handle."""
    if type(data) is list: return data[:] if {list, dict}.isdisjoint(map(type, data)) else [unpack(v, handle) for v in data]
    if type(data) is not dict: return data
    (tag, parts), = data.items()
    if tag == "h": return handle(parts)
    if tag == "builtin" and (isinstance(found := getattr(builtins, parts), type) or found is ...): return found
    if tag not in SHAPES: raise ValueError("no such type")
    module, _, name = tag.rpartition(".")
    parts, module = [unpack(v, handle) for v in parts], __import__(module or "builtins")
    if tag == "collections.defaultdict" and parts[0] not in FACTORIES: parts[0] = None
    if module.__name__ == "numpy":                     # numpy rounds a plain number to the type of the other: float16("inf") == 10**6
        x = module.dtype(parts[0]).type(parts[1]) if name == "generic" else module.array(parts[2], parts[0]).reshape(parts[1])
        wide = {"e": float, "f": float, "F": complex}.get(x.dtype.char)
        return x if not wide or x.size > 1 else x.astype(wide) if x.shape else wide(x)
    return getattr(module, name)(*parts)

encode = json.encoder.c_make_encoder(          # what json.dumps makes anew for each value
    None, json.JSONEncoder().default, json.encoder.encode_basestring, None, ":", ",", False, False, True)
scan = json.JSONDecoder().scan_once

def message(data):
    line = "".join([*encode(data, 0), "\n"]).encode("utf-8", "surrogatepass")
    if len(line) > MAX_MESSAGE: raise OverflowError(f"a message of {len(line)} bytes is too large")
    return line

def receive(stream):
    """The next message; EOFError when the other side is gone or talks nonsense."""
    line = stream.readline(MAX_MESSAGE)
    try: return scan(line.decode("utf-8", "surrogatepass") if line.endswith(b"\n") else "", 0)[0]
    except (ValueError, RecursionError, StopIteration): raise EOFError from None

# ---------------------------------------------------------------- U: runs the candidate and answers T

def describe(error):
    """The builtin classes of an exception, and one line for the reader, in the candidate's words where it comes from there."""
    names = [c.__name__ for c in type(error).__mro__ if vars(builtins).get(c.__name__) is c]
    trace, place = error.__traceback__, ""
    while trace:
        if trace.tb_frame.f_code.co_filename == "solution.py": place = f" (line {trace.tb_lineno})"
        trace = trace.tb_next
    try: text = getattr(error, "remote", None) or f"{type(error).__name__}: {error}"
    except BaseException: text = type(error).__name__
    return names, text[:1000].replace("\n", " ") + place

def outcomes(setup, tests, env, gone=bool, exec=exec, Failed=AssertionError, Any=BaseException, describe=describe):
    """Runs the compiled setup and tests in env -> (status, error) of each test. The same loop in T and in U, where our tools
    are arguments, so that builtins which the candidate has replaced are at least not ours."""
    for test in tests:
        try:
            if test is tests[0]: exec(setup, env)
            exec(test, env)
            found = "passed", ""
        except Failed as error: found = "failed", describe(error)[1]
        except Any as error: found = "memory" if isinstance(error, MemoryError) else "error", describe(error)[1]
        if gone(): return                              # asked here, too, since an `except:` in the test may have hidden it
        yield found

def candidate(sock, stream, size):
    """All of U: takes a job of `size` bytes, runs the code, then answers requests until T hangs up."""
    flush, objects, keys, number, kept, spoiled = sys.stdout.flush, {}, {}, 0, 0, False
    job = marshal.loads(sock.recv(size, socket.MSG_WAITALL))                    # T's own words, not a candidate's
    code, module, kind = job["code"], type(sys)("solution"), "syntax"
    module.__file__, module.__loader__ = "solution.py", SimpleNamespace(get_source=lambda name: code)
    sys.modules["solution"] = sys.modules["__main__"] = module                  # for inspect; for pickle and dataclasses
    try:
        compiled = compile(code, "solution.py", "exec", dont_inherit=True)
        kind = "x"
        exec(compiled, module.__dict__)
    except BaseException as error:
        kind = "syntax" if kind == "syntax" and isinstance(error, SyntaxError) and "\0" not in code else "x"
        return sock.sendall(message([0, kind, *describe(error)]))
    if "tests" in job:                                 # tests that cannot be split
        setup, *tests = marshal.loads(job["tests"])
        for left, found in zip(reversed(range(len(tests))), outcomes(setup, tests, module.__dict__)):
            sock.sendall(message([0, *found, "" if left else job["token"]]))
        return

    def keep(x):                                       # a name for what stays here: "n" is the first of reply n, as T foresees
        nonlocal kept
        kept += 1
        if id(x) not in keys:
            keys[id(x)] = f"{number}.{kept}" if kept > 1 else str(number)
            objects[keys[id(x)]] = x                   # kept alive, so that its id stays its own
        return {"h": keys[id(x)]}

    found = {}
    for name in [n for n in job["names"] if n in module.__dict__]:
        value = objects["g:" + name] = module.__dict__[name]
        keys.setdefault(id(value), "g:" + name)
        try: message(found.setdefault(name, pack(value, keep)))
        except BaseException: found[name] = {"h": "g:" + name}
    answer = message([0, "v", found])
    while True:
        flush()
        sock.sendall(answer)
        number, ahead, (op, args, kwargs) = receive(stream)
        while ahead and spoiled: number, ahead, (op, args, kwargs) = receive(stream)
        try:                                           # op is a builtin, an operator, or "method"
            call_method = lambda x, name, /, *args, **kwargs: getattr(x, name)(*args, **kwargs)
            action = vars(builtins).get(op) or getattr(operator, f"__{op}__", call_method)
            named = {k: unpack(v, objects.__getitem__) for k, v in kwargs.items()}
            kept, real = 0, unpack(args, objects.__getitem__)
            answer = [number, "v", pack(action(*real, **named), keep)]
            if ahead and kept and not (op == "call" and isinstance(real[0], type)):
                answer[1], spoiled = "o", True         # an object where T foresaw data: what it foresaw next may not come
            if named or not ATOMS.issuperset(map(type, real[1:])):
                now = [[pack(a, keep) for a in real], {k: pack(v, keep) for k, v in named.items()}]
                if now != [args, kwargs]: answer += now                         # what it changed in place changes in T too
            answer = message(answer)
        except BaseException as error:
            answer = [number, "x", *describe(error)]
            try: answer = message([*answer, pack(error.args, keep)])            # the tests may look at str(error)
            except BaseException: answer = message(answer)

# ---------------------------------------------------------------- isolation: what the kernel keeps the candidate from

MODES = ("user namespace", "namespaces as root", "no namespaces")               # tried in this order when a helper starts
NAMESPACES = 0x20000000 | 0x40000000 | 0x00020000 | 0x08000000 | 0x04000000     # pid, network, mount, ipc, uts
NOBODY, ARM = 65534, os.uname().machine == "aarch64"
# system calls that are refused: their numbers on x86_64 and on aarch64
DENIED = """socket 41 198, ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, process_madvise 440 440,
    mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, unshare 272 97, setns 308 268, open_tree 428 428,
    move_mount 429 429, acct 163 89, fsopen 430 430, fsmount 432 432, mount_setattr 442 442, bpf 321 280,
    perf_event_open 298 241, userfaultfd 323 282, add_key 248 217, request_key 249 218, keyctl 250 219,
    io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427, shmget 29 194, semget 64 190, msgget
    68 186, mq_open 240 180, open_by_handle_at 304 265, name_to_handle_at 303 264, pidfd_getfd 438 438, kcmp 312 272,
    init_module 175 105, finit_module 313 273, kexec_load 246 104, reboot 169 142, syslog 103 116, setpriority 141
    140, ioprio_set 251 30, fanotify_init 300 262, sched_setparam 142 118, sched_setscheduler 144 119, sched_setattr
    314 274, sched_setaffinity 203 122"""
# Without namespaces: to leave the group, and what Landlock does not know, to change a file's owner, mode, attributes and times.
DENIED_TOO = """setpgid 109 154, setsid 112 157, fchmodat 268 53, fchmodat2 452 452, fchownat 260 54, setxattr 188 5, lsetxattr 189 6,
    removexattr 197 14, lremovexattr 198 15, setxattrat 463 463, removexattrat 466 466, utimensat 280 88"""
DENIED_TOO = [int(line.split()[1 + ARM]) for line in DENIED_TOO.split(",")] + [90, 92, 94, 132, 235, 261] * (not ARM)
DENIED = {name: int(arm if ARM else x86) for name, x86, arm in map(str.split, DENIED.split(","))}

def libc(name, *args):
    """A C function by name, or a system call by number; raises OSError when it answers -1."""
    import ctypes
    args = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    library = ctypes.CDLL(None, use_errno=True)
    answer = getattr(library, name)(*args) if isinstance(name, str) else library.syscall(ctypes.c_long(name), *args)
    if answer == -1: raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return answer

def filter_syscalls(denied):
    """Takes on a seccomp filter that refuses these, new namespaces and limits for others; it stays, also in each child."""
    import ctypes
    if os.uname().machine not in ("x86_64", "aarch64"): raise OSError("no seccomp filter for this machine")
    op = lambda code, value, yes=0, no=0: struct.pack("<HBBI", code, yes, no, value)
    load, equal, any_bit, refuse = 0x20, 0x15, 0x45, op(0x06, 0x50001)
    code = [op(load, 4), op(equal, 0xC00000B7 if ARM else 0xC000003E, 1, 0), op(0x06, 0x80000000)]     # another machine: killed
    code += [op(load, 0)] + ([] if ARM else [op(0x35, 0x40000000, 0, 1), refuse])                       # the x32 interface
    for number in denied: code += [op(equal, number, 0, 1), refuse]
    code += [op(equal, 435, 0, 1), op(0x06, 0x50026)]       # clone3 hides its flags: `not there`; EPERM breaks threads
    code += [op(equal, 220 if ARM else 56, 0, 3), op(load, 16), op(any_bit, 0x7E020080, 0, 1), refuse, op(load, 0)]      # clone
    code += [op(equal, 261 if ARM else 302, 0, 3), op(load, 16), op(equal, 0, 1, 0), refuse]   # prlimit64 of others
    code = ctypes.create_string_buffer(b"".join([*code, op(0x06, 0x7FFF0000)]))
    libc("prctl", 38, 1, 0, 0, 0)                                # no new privileges
    libc("prctl", 22, 2, ctypes.create_string_buffer(struct.pack("@HxxxxxxP", len(code) // 8, ctypes.addressof(code))))

def landlock(readable, writable):
    """Takes on Landlock: read and run below `readable`, all below `writable`; no TCP, no signal (version 6) to the outside."""
    import ctypes
    abi = libc(444, None, 0, 1)
    rights = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1
    attributes = struct.pack("<QQQ", rights, 3, 3)[:8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = libc(444, ctypes.create_string_buffer(attributes, len(attributes)), len(attributes), 0)
    for path, allowed in [(p, 0b1101) for p in readable] + [(p, rights) for p in writable]:
        fd = os.open(path, os.O_PATH)
        if not os.path.isdir(path): allowed &= 0b1100000000000111
        libc(445, ruleset, 1, ctypes.create_string_buffer(struct.pack("<Qi", allowed, fd), 12), 0)
        os.close(fd)
    libc("prctl", 38, 1, 0, 0, 0), libc(446, ruleset, 0)
    return abi, ruleset

def library(site):
    """What a candidate may read: the interpreter, its library, the shared libraries that these need."""
    base = sys.base_prefix
    paths = [os.path.dirname(os.__file__), f"{base}/lib", f"{base}/{sys.platlibdir}", sys.executable, *site]
    paths += """/lib /lib64 /usr/lib /usr/lib64 /etc/ld.so.cache /etc/localtime /usr/share/zoneinfo /dev/zero /dev/random
        /dev/urandom""".split()
    for p in paths:                                    # a link is of use only with all that it leads over
        if os.path.islink(p): paths.append(os.path.normpath(os.path.join(os.path.dirname(p), os.readlink(p))))
        elif os.path.realpath(p) not in paths: paths.append(os.path.realpath(p))
    return [p for p in dict.fromkeys(paths) if os.path.exists(p)]

def mount(what, where, kind, flags, options=None):
    libc("mount", what.encode(), where.encode(), kind and kind.encode(), flags, options and options.encode())

def new_root(paths):
    """Gives this process a root of its own: these paths, read-only, and an empty folder for the scratch."""
    root = "/proc"                                     # any directory that is always there
    mount("none", "/", None, 1 << 14 | 1 << 18)        # private, recursive
    mount("none", root, "tmpfs", 6, "mode=755,size=1m")
    for path in sorted(paths):                         # folders before what is in them
        if os.path.lexists(root + path): continue
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        if os.path.islink(path): os.symlink(os.readlink(path), root + path); continue
        os.mkdir(root + path) if os.path.isdir(path) else open(root + path, "w").close()
        mount(path, root + path, None, 1 << 12 | 1 << 14)        # bind, recursive; read-only below:
        if not path.startswith("/dev/"): libc(442, -100, (root + path).encode(), 0x8000, struct.pack("<QQQQ", 7, 0, 0, 0), 32)
    os.makedirs(root + "/scratch/tmp")
    mount("none", root + "/scratch/tmp", "tmpfs", 6)
    for name in ("/tmp", "/dev/shm"):                  # /dev/shm holds the semaphores of multiprocessing
        if not os.path.lexists(root + name): os.symlink("/scratch/tmp", root + name)
    os.chdir(root)
    mount("none", ".", None, 32 | 1 | 6)               # the new root itself is read-only
    libc(DENIED["pivot_root"], b".", b"."), libc("umount2", b".", 2)

def limit(kind, value):
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value, value) if hard == resource.RLIM_INFINITY else (min(value, hard),) * 2)

# ---------------------------------------------------------------- P keeps the scratch; Z forks a U for each job

def keep_house(mode, site, control, caller):
    """P: takes on the namespaces and forks Z, process 1 in them. Then it renews the scratch when asked: Z must not mount."""
    spaces, paths = mode != MODES[2], library(site)
    if spaces:
        libc("unshare", NAMESPACES | (0x10000000 if mode == MODES[0] else 0))
        control.sendall(b"?"), control.recv(1)         # T writes the map of ids
        new_root([*paths, "/dev/null"])
    scratch = f"{'/dev/shm' if os.access('/dev/shm', os.W_OK) else '/tmp'}/sandbox-{os.urandom(6).hex()}"
    scratch = "/scratch/tmp" if spaces else scratch    # Landlock allows all below /scratch: a new mount there needs no new rule
    os.makedirs(scratch, exist_ok=True)

    def renew():
        if not spaces: return os.system("chmod -R u+rwX {0}; rm -rf {0}/* {0}/.[!.]* {0}/..?*; chmod 1777 {0}".format(scratch))
        libc("umount2", scratch.encode(), 2)
        mount("tmpfs", scratch, "tmpfs", 6, "mode=1777,size=64m,nr_inodes=4096")

    renew()
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        return serve_candidates(mode, paths, scratch, control, caller, theirs)
    theirs.close(), control.close(), caller.close()
    while ours.recv(1): renew(), ours.sendall(b"!")
    if not spaces: os.wait(), os.system(f"chmod -R u+rwX {scratch}; rm -rf {scratch}")

def take_on_walls(mode, paths, scratch):
    """Z's walls, which each fork inherits at no cost -> what there is of them, and Landlock's rules."""
    spaces, uid = mode != MODES[2], os.getuid()
    own = [] if spaces else [f"/proc/{p}/task" for p in os.listdir("/proc") if p.isdigit()]    # without a pid namespace
    own = [p for p in own if os.path.exists(p) and os.stat(p).st_uid == uid]                    # they count, too
    signal.signal(signal.SIGINT, signal.SIG_DFL)       # from inside, only a signal that it handles can hurt process 1
    if not spaces: libc("prctl", 36, 1, 0, 0, 0)       # orphans become our children, so that we see their end
    elif uid: libc("capset", struct.pack("<Ii", 0x20080522, 0), bytes(24))      # a user namespace gave all of them
    if uid == 0:                                       # or no limit on processes. It stays where others cannot read the library
        try:
            os.setgroups([]), os.setresgid(NOBODY, NOBODY, NOBODY), os.setresuid(NOBODY, NOBODY, 0)
            open(os.__file__).close(), os.setresuid(NOBODY, NOBODY, NOBODY)
        except OSError: os.setresuid(0, 0, 0)
    libc("prctl", 1, signal.SIGKILL, 0, 0, 0)          # Z dies with P, and with Z all of its namespace
    limit(resource.RLIMIT_CORE, 0), limit(resource.RLIMIT_FSIZE, 64 << 20), limit(resource.RLIMIT_NOFILE, 256)
    if os.getuid(): limit(resource.RLIMIT_NPROC, 64 + sum(len(os.listdir(p)) for p in own if os.path.exists(p)))
    abi, ruleset, seccomp = 0, None, False
    try: abi, ruleset = landlock(paths, ["/scratch" if spaces else scratch, "/dev/null"])
    except OSError: pass
    try: filter_syscalls(DENIED.values()); seccomp = True
    except OSError: pass
    return {"mode": mode, "landlock": abi, "seccomp": seccomp, "unprivileged": os.getuid() != 0}, ruleset

def serve_candidates(mode, paths, scratch, control, caller, keeper):
    """Z: a new process for each job, and its end."""
    import gc
    layers, ruleset = take_on_walls(mode, paths, scratch)
    spaces = mode != MODES[2]
    line = os.dup2(control.fileno(), os.dup(0), inheritable=False)    # U's end of its socket to T always has this number,
    sock, stream = socket.socket(fileno=line), open(line, "rb", 1 << 16, closefd=False)    # so that these are made once
    os.chdir(scratch)
    control.sendall(message(layers))
    job = marshal.dumps({"code": "", "tests": marshal.dumps([compile("", "tests.py", "exec")] * 2), "token": ""})
    for _ in range(50):                                # or each child would be the first to run this: 1 ms and 50 pages each
        rehearsal, theirs = socket.socketpair()
        with rehearsal, theirs: theirs.sendall(job), candidate(rehearsal, None, len(job))
    gc.disable(), gc.freeze()                          # a child that collects would copy every page
    while True:
        data, extra, _, _ = control.recvmsg(4096, socket.CMSG_SPACE(4))
        if not extra: return                           # T has gone
        fd, = struct.unpack("i", extra[0][2])
        os.dup2(fd, line, inheritable=False), os.close(fd)
        cpu, memory, size = scan(data.decode(), 0)[0]
        out, out_w = os.pipe()                         # a new one each time: its flags are a program's to change
        start, pid = time.monotonic(), os.fork()
        if pid == 0:
            try:
                os.setsid()                            # first: kill(0) would reach our own group, outside of the namespace
                os.dup2(out_w, 1), os.dup2(out_w, 2)
                limit(resource.RLIMIT_CPU, int(cpu) + 2), limit(resource.RLIMIT_AS, memory << 20)
                if ruleset and not spaces: libc(446, ruleset, 0)                # a Landlock domain of its own: no signal to Z
                if layers["seccomp"] and not spaces: filter_syscalls(DENIED_TOO)
                os.closerange(3, line), os.closerange(line + 1, 64)
                gc.enable()
                candidate(sock, stream, size)
                sys.stdout.flush()
            except (EOFError, OSError): pass           # T has hung up
            except BaseException: sys.excepthook(*sys.exc_info())
            finally: os._exit(0)
        os.close(out_w)
        reason, text = watch(pid, line, out, caller, start, cpu)
        done = 0
        while done is not None:                        # until nobody is left
            try:
                os.kill(-1, signal.SIGKILL) if spaces else os.killpg(pid, signal.SIGKILL)
            except OSError: pass
            try: done, how, usage = os.wait4(-1, 0)
            except ChildProcessError: done = None
            if done == pid: status, seconds = how, usage.ru_utime + usage.ru_stime
        os.dup2(0, line, inheritable=False)            # T sees the end of U, and lets go of a stdout that U may have sent it
        while (data := os.read(out, 1 << 16)) and len(text) < KEEP_OUTPUT: text += data       # nobody is left who could write
        os.close(out)
        try: clean = not os.listdir(scratch) + os.listxattr(scratch) and os.stat(scratch).st_mode == 0o41777
        except OSError: clean = False                  # a program may have closed the folder to all
        if not clean: os.chdir("/"), keeper.sendall(b"?"), keeper.recv(1), os.chdir(scratch)
        if reason == "ended" and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU: reason = "timeout"
        try: control.sendall(message([reason, status, seconds, text[:KEEP_OUTPUT].decode("utf-8", "replace")]))
        except OSError: return

def watch(pid, line, out, caller, start, cpu):
    """Waits until T hangs up, U ends or reaches a limit -> why, and what it printed. CPU time: wall time counts neighbours."""
    clock, left, text, total = (~pid << 3) | 2, cpu, b"", 0       # the kernel's number for the CPU clock of pid
    child, poll = os.pidfd_open(pid), select.poll()
    poll.register(out, select.POLLIN), poll.register(child, select.POLLIN)
    poll.register(caller, select.POLLRDHUP), poll.register(line, select.POLLRDHUP)
    try:
        while left > 0.001:
            ready = dict(poll.poll(left * 1000))
            for fd, reason in (caller.fileno(), "orphan"), (child, "ended"), (line, "done"):
                if fd in ready: return reason, text
            if out in ready:
                data = os.read(out, 1 << 16)
                if not data: poll.unregister(out)      # it has closed its stdout
                total += len(data)
                if len(text) < KEEP_OUTPUT: text += data
                if total > MAX_OUTPUT: return "output", text
            left = min(cpu - time.clock_gettime(clock), start + 3 * cpu + 2 - time.monotonic())
        return "timeout", text
    finally: os.close(child)

# ---------------------------------------------------------------- T: holds the tests, calls U, compares

class Gone(BaseException):
    """U has ended or broken the protocol: no test can go on."""

class Remote:
    """T's end of one U: sends requests and takes the replies."""
    def __init__(self, sock, methods, ahead):
        self.sock, self.methods, self.ahead = sock, methods, ahead              # ahead: requests that go with the code
        self.stream = open(sock.fileno(), "rb", 1 << 16, closefd=False)
        self.number, self.sent, self.gone = 0, len(ahead), False                # of the present request, of the last one sent
        self.said = {}                                 # readings of objects since one of them was last asked to do something

    def send(self, data):
        try: self.sock.sendall(data)
        except OSError: self.gone = True; raise Gone from None

    def reply(self, number):
        while True:
            try: reply = receive(self.stream)
            except (EOFError, OSError): self.gone = True; raise Gone from None
            if type(reply) is list and len(reply) > 2 and reply[0] == number: return reply[1:]

    def handle(self, key):
        if type(key) is not str: raise ValueError("bad handle")
        return Proxy(self, key)

    def ask(self, op, /, *args, **kwargs):
        """Lets U do it: gives the value, or raises what it raised."""
        if self.gone: raise Gone
        if op not in UNARY: self.said.clear()
        body = request(op, args, kwargs)
        if self.number < len(self.ahead) and self.ahead[self.number] == body: self.number += 1
        else:                                          # not foreseen: from here on, each waits for the reply before it
            self.ahead, self.sent = (), self.sent + 1
            self.number = self.sent
            self.send(b"[%d,0,%b]\n" % (self.number, body))
        kind, value, *changed = self.reply(self.number)
        if kind == "x":
            error = remote_error(value, *unpack(changed, self.handle))
            if op == "call" and isinstance(error, StopIteration):               # it would end `all(map(f, xs))` with success
                raise RuntimeError("the candidate raised StopIteration") from error
            raise error
        if kind == "o": self.ahead = ()                # U passes over the rest
        try:
            if changed:
                for old, new in zip(args, unpack(changed[0], self.handle)): change(old, new)
                for name in kwargs: change(kwargs[name], unpack(changed[1][name], self.handle))
            return unpack(value, self.handle)
        except MemoryError: raise
        except Exception as error: raise RuntimeError(f"the candidate's reply makes no sense: {error!r}") from None

def request(op, args, kwargs):
    def other(x):
        if type(x) is Proxy: return {"h": x._key}
        raise TypeError(f"the tests pass a {type(x).__name__}, which cannot be sent")
    return message([op, [pack(a, other) for a in args], {k: pack(v, other) for k, v in kwargs.items()}])[:-1]

def remote_error(names, text, args=None):
    """An exception of U, as the first of its classes that is a builtin one and takes a text."""
    for kind in [getattr(builtins, str(name), None) for name in names] + [RuntimeError]:
        if not isinstance(kind, type) or not issubclass(kind, Exception): continue
        try: error = kind(*(args if type(args) is tuple else [str(text)]))
        except Exception: continue                     # UnicodeDecodeError and its like want more
        error.remote = str(text)
        return error

def change(old, new):
    """`new`, but as the container `old` where it is of the same type, nested ones, too: every name for them sees the change."""
    if type(old) is not type(new): return new
    if type(old) is list: old[:] = [change(a, b) for a, b in zip(old, new)] + new[len(old):]
    elif type(old) is tuple: return tuple([change(a, b) for a, b in zip(old, new)])
    elif isinstance(old, (dict, set)):
        if isinstance(old, dict): new = {k: change(old.get(k), v) for k, v in new.items()}
        old.clear(), old.update(new)
    elif type(old) is bytearray or hasattr(old, "maxlen"): old.clear(), old.extend(new)
    else: return new
    return old

VERDICTS = {n for t in (str, set, bytes, float) for n in dir(t) if n.startswith(("is", "starts", "ends"))}

class Proxy:
    """An object that stays in U. It never equals plain data, and what the tests compute with it is not U's to answer."""
    def __init__(self, remote, key): self.__dict__.update(_remote=remote, _key=key, _mixed=False)
    def __setattr__(self, name, value): self._remote.ask("setattr", self, name, value)
    def __contains__(self, item): return any(item == v for v in iter(self))     # U's own __contains__ could say yes to all
    def __hash__(self): return hash(self._remote.ask("hash", self))             # the bucket only; __eq__ decides
    def __instancecheck__(self, x): return type(x) is Proxy and self._remote.ask("isinstance", x, self) is True
    def __subclasscheck__(self, x): return type(x) is Proxy and self._remote.ask("issubclass", x, self) is True
    def __eq__(self, x): return type(x) is Proxy and (self._key == x._key or self._remote.ask("eq", self, x) is True)
    def __getattr__(self, name):                       # `f(x).startswith("a")` asks a str, not a friend of the candidate
        if name in VERDICTS or name.startswith("__") and name not in ("__name__", "__doc__"): raise AttributeError(name)
        if name in self._remote.methods: return partial(self._remote.ask, "method", self, name)
        return self._remote.ask("getattr", self, name)

def forward(op):
    return lambda self, *args, **kwargs: self._remote.ask(op, self, *args, **kwargs)

def arithmetic(op, swap=False):
    """`abs(f(x) + -3.5) < 1e-6`: an L() that answers 0.0 to abs() would pass. So what an operator makes of an object and a
    plain value of the tests (`Vector(1, 2) * 3`) has to be an object, a mixed one, and so has all that operators make of it."""
    def ask(self, *args):
        plain = op in BINARY and type(args[0]) is not Proxy
        if plain and op not in WITH_PLAIN: return NotImplemented
        said, key = self._remote.said, (op, self._key, *args) if op in UNARY else None
        if key in said: return said[key]               # or an x whose float(x) is another number each time is a root of all
        value = self._remote.ask(op, *args, self) if swap else self._remote.ask(op, self, *args)
        if key: said[key] = value
        if plain or any(type(x) is Proxy and x._mixed for x in (self, *args)):
            if type(value) is not Proxy: raise TypeError(f"{op}: the candidate's operators give no plain data to these tests")
            value.__dict__["_mixed"] = True
        return value
    return ask

UNARY = "bool len int float abs neg round".split()
BINARY = "lt le gt ge add sub mul truediv floordiv mod pow and or xor matmul".split()
WITH_PLAIN = ["add", "mul", "truediv"]                 # not `-` and the like, which measure how far a result is from a value
for _op in "call getitem setitem delitem iter next str repr".split(): setattr(Proxy, f"__{_op}__", forward(_op))
for _op in UNARY + BINARY: setattr(Proxy, f"__{_op}__", arithmetic(_op))
for _op in WITH_PLAIN: setattr(Proxy, f"__r{_op}__", arithmetic(_op, swap=True))

# ---------------------------------------------------------------- what the text of the tests says about them

UNSPLIT = set("""redirect_stdout redirect_stderr patch mock StringIO stdout stdin stderr capsys asyncio inspect globals locals
    eval exec""".split())
MODULES = set("""math cmath re sys random string itertools functools collections operator copy datetime decimal fractions heapq
    bisect statistics time json typing numbers array struct hashlib calendar numpy textwrap types enum dataclasses""".split())
LIBRARY = dict.fromkeys("isclose sqrt ceil floor gcd pi inf nan".split(), "math") | {
    "deepcopy": "copy", "Decimal": "decimal", "Fraction": "fractions"} | dict.fromkeys(
    "Counter defaultdict OrderedDict deque namedtuple".split(), "collections")          # whatever a candidate calls so

@lru_cache(maxsize=256)
def plan(setup, tests, entry_point):
    """What these tests need, found from their text alone and kept for the next candidate."""
    import ast
    sources = [setup, *tests]                          # a bare `def check(candidate)` tests nothing
    if entry_point and not re.search(r"^\s*check\(", "\n".join(sources), re.M):
        sources[1:] = [f"{t}\n\ncheck({entry_point})\n" if re.search(r"^def check\(", t, re.M) else t for t in tests]
    trees = [ast.parse(s) for s in sources]
    codes, nodes = [compile(t, "tests.py", "exec") for t in trees], [n for t in trees for n in ast.walk(t)]
    used, bound, ours, called, attributes = set(), set(), set(), set(), collections.Counter()
    for node in nodes:
        match node:
            case ast.Name(id=name, ctx=ast.Load()): used.add(name)
            case ast.Name(id=name) | ast.ExceptHandler(name=name) | ast.arg(arg=name): bound.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name): ours.add(name)
            case ast.alias(name=name, asname=short): bound.add((short or name).split(".")[0])
            case ast.Attribute(attr=name): attributes[name] += 1
            case ast.Call(func=ast.Attribute(attr=name)): attributes[name] -= 1
            case ast.Call(func=ast.Name(id=name)): called.add(name)
    names = {n for n in used - bound - ours if not hasattr(builtins, n)} - {entry_point}
    library = names & ((MODULES | {"np"}) - called | (LIBRARY.keys() if entry_point else set()))
    names = names - library | ({entry_point} - {None})                          # only the entry point may hide a builtin
    methods = {name for name, count in attributes.items() if not count}         # only ever called: one message, not two
    ahead, batch = foresee(trees, names, methods)
    return SimpleNamespace(codes=codes, for_u=marshal.dumps(codes), names=sorted(names), library=library, methods=methods,
                           ahead=ahead, batch=batch, why=why_not_split(nodes, names, ours, entry_point))

def why_not_split(nodes, names, ours, entry_point):
    """What these tests do that takes the candidate in the same process, if anything; `ours` are functions that they define."""
    import ast
    words = lambda *within: {n.id for node in within for n in ast.walk(node) if isinstance(n, ast.Name)}
    theirs = names | {n.arg for n in nodes if isinstance(n, ast.arg)}           # what may stand for a thing of the candidate's
    theirs |= {w for n in nodes if isinstance(n, ast.Assign) and theirs & words(n.value) for w in words(*n.targets)}
    function = lambda x: isinstance(x, (ast.Lambda, ast.GeneratorExp)) or isinstance(x, ast.Name) and x.id in ours
    why = ""
    for node in nodes:
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.alias(name=word) | ast.ImportFrom(module=word) if (
                    UNSPLIT & set(str(word).split(".")) - {entry_point}): why = f"use {word}"
            case ast.AsyncFunctionDef() | ast.Await() | ast.AsyncFor() | ast.AsyncWith(): why = "are asynchronous"
            case ast.ExceptHandler(type=ast.AST() as kind) if names & words(kind): why = "catch an exception of the candidate"
            case ast.ClassDef(bases=bases) if names & words(*bases): why = "derive from a class of the candidate"
            case ast.withitem(context_expr=what) if names & words(what): why = "enter a context of the candidate"
            case ast.Call(func=called, args=args, keywords=more) if theirs & words(called):
                if any(map(function, [*args, *(k.value for k in more)])): why = "pass a function to the candidate"
    return why and f"the tests cannot be split: they {why}"

def environment(plan, entry_point, candidates, seed):
    """The global names of the tests: the library's and the candidate's. A missing `sum` of the candidate is not ours."""
    env = candidates | {"__name__": "tests", "__builtins__": {n: v for n, v in vars(builtins).items() if n != entry_point}}
    for name in plan.library:
        module = LIBRARY.get(name) or {"np": "numpy"}.get(name, name)
        try: env[name] = getattr(__import__(module), name) if name in LIBRARY else __import__(module)
        except ImportError: pass
    __import__("random").seed(seed)                    # the same tests, the same label; and U does not know the tests
    return env

def foresee(trees, names, methods):
    """Asserts of one form go to U as one batch: each around one call of the candidate with literal arguments. The tests' text
    says that these calls come, and in which order, up to the first statement that may ask for anything else."""
    import ast
    requests, functions, kinds = [], {}, set()
    skips = ast.BoolOp, ast.IfExp, ast.Lambda, ast.comprehension                # what may run a call never, or often

    def note(op, /, *args, **kwargs):                  # stands for U
        requests.append(request(op, args, kwargs))
        return Proxy(notebook, str(len(requests)))

    def read(body, env):
        for node in body:
            inside = list(ast.walk(node.test if isinstance(node, ast.Assert) else node))         # its message is for a failure
            used = [n for n in inside if isinstance(n, ast.Name) and (n.id in env or n.id in functions)]
            match node:
                case ast.FunctionDef(name=name): functions[name] = node
                case _ if not used: pass               # it asks for nothing
                case ast.Expr(ast.Call(ast.Name(name), [ast.Name(given)], [])) if name in functions:            # check(f)
                    read(functions[name].body, env | {functions[name].args.args[0].arg: env[given]})
                case ast.Assign([ast.Name(name)], ast.Call(ast.Name()) as call) if len(used) == 1:              # s = Solution()
                    env[name] = eval(compile(ast.Expression(call), "tests.py", "eval"), env)
                case ast.Assert() if len(used) == 1 and not any(isinstance(n, skips) for n in inside):
                    call = [n for n in inside if isinstance(n, ast.Call) and used[0] in ast.walk(n.func)][-1]
                    kinds.add(ast.unparse(call.func))  # of one function only: `dec("cd")` in the batch would answer `enc("ab")`
                    if len(kinds) > 1: raise ValueError("from here on, each request waits for the reply before it")
                    eval(compile(ast.Expression(call), "tests.py", "eval"), env)
                case _: raise ValueError("from here on, each request waits for the reply before it")

    notebook = SimpleNamespace(ask=note, methods=methods, said={})
    env = {"__builtins__": {}} | {name: Proxy(notebook, "g:" + name) for name in names}          # so arguments are literals
    try:
        for tree in trees: read(tree.body, env)
    except Exception: pass
    lines = [b"[%d,1,%b]\n" % numbered for numbered in enumerate(requests, 1)]
    while sum(map(len, lines)) > 1 << 16: lines.pop()  # more than a socket holds while U does not read
    return requests[:len(lines)], b"".join(lines)

def judge(job, zygote, reports):
    """One job -> the fields of its Result."""
    count, token, found, failure = len(job["tests"]), os.urandom(16).hex(), [], None     # found: (status, error) of each test
    try:
        p = plan(job["setup"], tuple(job["tests"]), job["entry_point"])
        split = job["trust"] == "split" or job["trust"] == "auto" and not p.why
        if not count or split and p.why: raise ValueError(p.why or "there are no tests")
    except Exception as error:
        return "error", False, 0, count, 0.0, "", f"the tests do not compile or are refused: {error}", "split"
    ours, theirs = socket.socketpair()
    code = marshal.dumps({"code": job["code"]} | ({"names": p.names} if split else {"tests": p.for_u, "token": token}))
    with theirs: socket.send_fds(zygote, [message([job["timeout"], job["memory_mb"], len(code)])], [theirs.fileno()])
    remote = Remote(ours, p.methods, p.ahead if split else ())
    try:
        remote.send(code + (p.batch if split else b""))
        kind, *reply = remote.reply(0)
        if kind in ("x", "syntax"):                    # the candidate's code did not run to its end
            failure = "memory" if "MemoryError" in reply[0] else "syntax" if kind == "syntax" else "error", str(reply[1])
        elif split:
            theirs = {n: unpack(v, remote.handle) for n, v in reply[0].items() if n in p.names}
            env = environment(p, job["entry_point"], theirs, repr((job["setup"], job["tests"])))
            found.extend(outcomes(p.codes[0], p.codes[1:], env, lambda: remote.gone))
        else:
            found.append((str(kind), str(reply[0])))
            while len(found) < count:
                kind, *reply = remote.reply(0)
                found.append((str(kind), str(reply[0])))
            if reply[1] != token: found.clear()
    except Gone: pass
    except Exception as error: failure = "memory" if isinstance(error, MemoryError) else "error", describe(error)[1]
    remote.stream.close(), ours.close()                # Z sees it, ends U and says how
    reason, status, seconds, output = receive(reports)
    if not failure and len(found) < count:             # U has ended before the tests did
        if reason in ("timeout", "output"): failure = reason, f"{'time' if reason == 'timeout' else reason} limit reached"
        elif os.WIFSIGNALED(status): failure = "error", f"ended by signal {os.WTERMSIG(status)}"
        else: failure = "error", f"ended with exit code {os.WEXITSTATUS(status)} before its tests were done"
    status, error = failure or next((f for f in found if f[0] != "passed"), ("passed", ""))
    held = sum(status == "passed" for status, _ in found)
    return status, status == "passed", held, count, seconds, output, error, "split" if split else "in_process"

# ---------------------------------------------------------------- the helper process: T, which starts Z before it sees a test

def serve(fd, modes, site, cores):
    """All of T: Z in the first mode that works here, then job after job."""
    import copy, ctypes, functools, heapq, math, string, typing          # what many programs import: loaded once, not in each U
    try: os.sched_setaffinity(0, cores)
    except OSError: pass                               # only slower
    control, uid = socket.socket(fileno=os.dup(fd)), os.getuid()                # a low number: U closes those below 64
    os.close(fd)
    for mode in modes:
        zygote, theirs = socket.socketpair()
        if (pid := os.fork()) == 0:
            zygote.close()
            try: keep_house(mode, site, theirs, control)
            except OSError as error: mode == modes[-1] and print(f"sandbox: {mode}: {error}", file=sys.stderr)
            finally: os._exit(0)
        theirs.close()
        reports = open(zygote.fileno(), "rb", 1 << 16, closefd=False)
        try:
            if mode != MODES[2]: zygote.recv(1)
            if mode == MODES[0]:                       # P's map of ids can only be written from here
                if uid: open(f"/proc/{pid}/setgroups", "w").write("deny")
                for kind, own in ("uid", uid), ("gid", os.getgid()):
                    ids = f"{own} {own} 1" + ("" if uid else f"\n{NOBODY} {NOBODY} 1")
                    with open(f"/proc/{pid}/{kind}_map", "w") as file: file.write(ids)
            if mode != MODES[2]: zygote.sendall(b"!")
            layers = receive(reports)
            break
        except (EOFError, OSError): zygote.close(), os.waitpid(pid, 0)
    else: return
    memory = os.open("/proc/self/statm", os.O_RDONLY)  # not ru_maxrss, which starts with the size of the caller
    try: landlock(library(site), ["/dev/null"]), filter_syscalls(DENIED.values())
    except OSError: pass                               # T runs only the data set's code: its walls are a second thought
    limit(resource.RLIMIT_AS, JUDGE_MB << 20)
    control.sendall(message(layers))
    jobs = open(control.fileno(), "rb", 1 << 16, closefd=False)
    while int(os.pread(memory, 99, 0).split()[1]) * resource.getpagesize() < JUDGE_MB << 19:    # one that has grown is replaced
        try:
            job = receive(jobs)                        # beyond this CPU time T is killed, and replaced
            resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + job["timeout"]) + 2, resource.RLIM_INFINITY))
            control.sendall(message(judge(job, zygote, reports)))
        except (EOFError, OSError): return             # the caller or Z has gone

# ---------------------------------------------------------------- the caller's side

MISSING, IDLE = None, []               # what is not enforced, found out once by trying; workers at rest

class Unsafe(RuntimeError):
    """Isolation "strict" was asked for, and a layer is missing."""

class Worker:
    """A helper process, spawned once (never forked: a process that holds torch forks slowly) and kept."""
    def __init__(self):
        import subprocess
        if not sys.platform.startswith("linux"): raise RuntimeError("sandbox.py needs Linux")
        # T, Z and U take turns: on one core, since waking another costs more. The name keeps other helpers off it, but for those of
        # another container: hence the random order.
        self.core, cores = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), os.sched_getaffinity(0)
        for core in sorted(cores, key=lambda core: os.urandom(8)):
            try: self.core.bind(f"\0sandbox.py on core {core}")
            except OSError: continue                   # where all are taken, it runs where the kernel puts it
            cores = {core}
            break
        folder, file = os.path.split(os.path.abspath(__file__))
        site, (self.sock, theirs) = [p for p in sys.path if "site-packages" in p or "dist-packages" in p], socket.socketpair()
        code = (f"import sys; sys.path[:1] = [{folder!r}]; import {file.removesuffix('.py')} as sandbox; sys.path[:1] = []\n"
                f"sys.path += {site}; sandbox.serve({theirs.fileno()}, {MODES}, {site}, {cores})")
        # In a session of its own: Ctrl-C is for the caller. Symbols are looked up at the start, not in each child.
        self.process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-X", "utf8", "-X", "int_max_str_digits=0", "-c", code], pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True, cwd="/",
            env={"LD_BIND_NOW": "1", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"})
        theirs.close()
        self.stream, self.deadline = self.sock.makefile("rb", 1 << 16), float("inf")
        try: self.layers = receive(self.stream)
        except EOFError: raise RuntimeError("the sandbox's helper process does not start") from None

    def end(self):
        """Ends the helper; Z and P go when they see it. Returns its exit status."""
        self.stream.close(), self.sock.close(), self.core.close(), self.process.kill()
        return self.process.wait()

PROBES = {               # a wall, and a program that runs to its end only where that wall is missing
    "reading files outside": "open(outside + '/secret')", "writing files outside": "open(outside + '/new', 'w')",
    "network": "import socket; socket.create_connection(('127.0.0.1', port), 1)",
    "signals to other processes": "import os; os.kill(caller, 0)", "root's rights": "import os; assert os.getuid() == 0",
    "memory": "bytearray(1 << 30)", "new namespaces": "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "number of processes": "import os\nfor _ in range(300):\n    if os.fork() == 0: os._exit(0)",
    "processes that leave their group": "import os\nassert os.getppid() > 1         # no pid namespace\n"
                                        "if os.fork() == 0: os.setsid(), os._exit(0)\nassert os.wait()[1] == 0"}

def look_for_holes():
    """Lets candidates try to break each wall, and says once what stood open."""
    global MISSING
    import tempfile
    forget = lambda: [f.close() for worker in (IDLE.pop() for _ in list(IDLE)) for f in (worker.stream, worker.sock, worker.core)]
    os.register_at_fork(after_in_child=forget)         # not at the import, or each process of a candidate would run it, too
    with tempfile.TemporaryDirectory() as outside, socket.create_server(("127.0.0.1", 0)) as listener:
        os.chmod(outside, 0o777)
        with open(outside + "/secret", "w") as file: os.chmod(file.fileno(), 0o666)
        known = f"outside, port, caller = {outside!r}, {listener.getsockname()[1]}, {os.getpid()}\n"
        results = run_many([dict(code=known + probe, tests=["pass"]) for probe in PROBES.values()], 1, isolation=None)
    MISSING = [name for name, result in zip(PROBES, results) if result.passed]
    if MISSING: print("sandbox: not enforced on this machine: " + ", ".join(MISSING), file=sys.stderr)

@atexit.register
def close():
    """Ends the idle helpers. They also end by themselves when the caller does."""
    while IDLE: IDLE.pop().end()

def checked(code, tests, setup="", entry_point=None, timeout=3.0, memory_mb=512, trust="auto"):
    job = dict(locals())
    if isinstance(tests, str) or not all(isinstance(t, str) for t in [code, setup, entry_point or "", *tests]):
        raise TypeError("code, setup, entry_point and each of the tests are strings")
    if trust not in ("auto", "split", "in_process"): raise ValueError(f"trust is auto, split or in_process, not {trust!r}")
    return job | dict(timeout=float(timeout), memory_mb=int(memory_mb))

def run_many(jobs, workers=None, on_result=None, isolation="auto"):
    """Results of the jobs (dicts of run's arguments) in their order, from `workers` helpers at a time; default: one a core.
    on_result(index, result) is called in that order, too, as soon as all before are there."""
    import selectors
    if MISSING is None and isolation: look_for_holes()
    if MISSING and isolation == "strict": raise Unsafe("not enforced on this machine: " + ", ".join(MISSING))
    results, tries, todo, told = [None] * len(jobs), collections.Counter(), collections.deque(range(len(jobs))), 0
    busy, free = selectors.DefaultSelector(), []
    while len(free) < min(len(jobs), workers or os.cpu_count() or 1):
        try: free.append(IDLE.pop())
        except IndexError: free.append(None)           # yet to be started
    try:
        while todo or busy.get_map():
            while todo and free:
                job, index = checked(**jobs[todo[0]]), todo.popleft()
                try: line = message(job)
                except OverflowError as error:
                    results[index] = Result("error", False, 0, len(job["tests"]), 0.0, "", str(error), "split")
                    continue
                worker = free.pop() or Worker()
                busy.register(worker.sock, selectors.EVENT_READ, (worker, index))
                worker.deadline = time.monotonic() + 4 * job["timeout"] + PATIENCE
                try: worker.sock.sendall(line)
                except OSError: pass                   # it has died: seen below
            for key, ready in [(key, True) for key, _ in busy.select(1)] or [(key, False) for key in busy.get_map().values()]:
                worker, index = key.data
                late = time.monotonic() > worker.deadline        # T hangs where no CPU limit ends it
                if not ready and not late: continue
                busy.unregister(worker.sock)
                try:
                    if late: raise EOFError
                    results[index] = Result(*receive(worker.stream))
                except (EOFError, OSError):            # a helper died: once more, unless it was the job's doing
                    late = worker.end() == -signal.SIGXCPU or late
                    worker, tries[index] = None, tries[index] + 1
                    why = "the tests took too long over the candidate's values" if late else "the helpers died three times"
                    result = Result("timeout" if late else "error", False, 0, len(jobs[index]["tests"]), 0.0, "", why, "split")
                    if not late and tries[index] < 3: todo.appendleft(index)
                    else: results[index] = result
                free.append(worker)
            while on_result and told < len(jobs) and results[told]: on_result(told, results[told]); told += 1
        return results
    finally:
        for key in [*busy.get_map().values()]: key.data[0].end()
        busy.close()
        IDLE.extend(filter(None, free))

def run(code, tests, *, setup="", entry_point=None, timeout=3.0, memory_mb=512, trust="auto", isolation="auto"):
    """Runs one program against its tests; each test is a string of statements, and all have to hold."""
    job = dict(code=code, tests=tests, setup=setup, entry_point=entry_point, timeout=timeout, memory_mb=memory_mb, trust=trust)
    return run_many([job], 1, isolation=isolation)[0]

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
        if response.count("```") == 1 and before.strip() and not defines(code, entry_point): code = before  # only the end fence
    if defines(code, entry_point): return complete_part(prefix) + code
    return (prefix.rstrip(" \t") if code[:1] in (" ", "\t") else prefix) + code        # an open indent, or the response's own

# ---------------------------------------------------------------- records: problems and samples as JSONL


def fail(message):
    """Bad input: one line that says what to do, exit code 2."""
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_jsonl(path, fields, unique=()):
    """Read the records of a JSONL file; what cannot be used is refused in one line with file, line and field.

    Blank lines, a BOM, CRLF, extra fields and .gz are accepted.

    Args:
        fields: {name: type or tuple of types}; a record without the field or with another type is refused,
            except that a field which may be None may also be absent.
        unique: names of the fields whose values, taken together, must not repeat, such as ["task_id"].
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
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            name = next(name for name in record if "\\ud" in json.dumps([name, record[name]]))
            fail(f"{place}: field '{name}' holds half of a surrogate pair, which cannot be saved; repair or delete the line")
        for name, types in fields.items():
            value = record.setdefault(name, None)
            allowed = types if isinstance(types, tuple) else (types,)
            if not isinstance(value, allowed) or isinstance(value, bool) and bool not in allowed:
                fail(f"{place}: field '{name}' is missing or has the wrong type")
        key = tuple(record[name] for name in unique)
        if unique and seen.setdefault(key, place) != place:
            fail(f"{place}: field '{unique[0]}' repeats {key[0]!r} of {seen[key]}; give each record its own")
        records.append(record)
    if not records:
        fail(f"{path} is empty; write at least one record to it")
    return records


def _lines(path):
    """(place, text) of each line of a UTF-8 file that is not blank."""
    if not os.path.isfile(path):
        fail(f"{path} does not exist; run the stage that writes it first (README, the table of stages)")
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            lines = file.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except (OSError, EOFError) as error:
        fail(f"{path} cannot be read ({error})")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", line.decode()
            except UnicodeDecodeError as error:
                fail(f"{path}, line {number}: not UTF-8 ({error}); save the file as UTF-8")


def read_problems(path):
    """Problems whose programs are to be tested: `read_jsonl` with every field filled, unique ids and tests that can be run.

    A test is a string of statements, or {"input": ..., "output": ...} for a program that reads stdin and writes stdout.
    """
    text = (str, type(None))
    fields = {"task_id": str, "prompt": str, "prefix": text, "setup": text, "entry_point": text, "tests": list}
    problems = read_jsonl(path, fields, unique=["task_id"])
    for problem in problems:
        problem["prefix"] = problem["prefix"] or ""
        problem["setup"] = problem["setup"] or ""
        place = f"{path}, task_id {problem['task_id']!r}"
        if not problem["tests"]:
            fail(f"{place}: field 'tests' is empty, so nothing could pass; add tests or drop the problem")
        for test in problem["tests"]:
            stdin = isinstance(test, dict) and all(isinstance(test.get(name), str) for name in ("input", "output"))
            if not stdin and not (isinstance(test, str) and test.strip()):
                fail(f"{place}: field 'tests' holds something that is no string of statements and no input and output")
    return problems


def write_jsonl(path, records):
    """Write records to a JSONL file, whole or not at all: a temporary file takes its place when it is complete."""
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


def run_tests(problems, responses, *, timeout=3.0, workers=0, progress=None):
    """Run responses against the tests of their problems, identical programs once.

    Args:
        problems: the problem of each response (as `read_problems` gives them); responses: texts.
        timeout: CPU seconds per program; workers: sandbox processes, 0 for one per core.
        progress: label of a tqdm bar, or None for silence.
    Returns: list of Result, in order.
    """
    jobs, index = [], {}
    for problem, response in zip(problems, responses, strict=True):
        key = problem["task_id"], program(problem, response)
        if key not in index:
            index[key] = len(jobs)
            job = {"code": key[1], "timeout": timeout}
            jobs.append(job | {name: problem[name] for name in ("tests", "setup", "entry_point")})
    with progress_bar(len(jobs), progress) as bar:
        results = run_many(jobs, workers or None, on_result=lambda index, result: bar.update())
    return [results[index[p["task_id"], program(p, r)]] for p, r in zip(problems, responses, strict=True)]


# ---------------------------------------------------------------- what a stage has finished

# Flags that change no result: a finished stage may be run again with other values of these.
FREE_FLAGS = {
    "gradient_checkpointing",
    "micro_batch_size",
    "resume",
    "score_batch_size",
    "threads",
    "workers",
}


def finished(cfg, directory):
    """True if `directory` holds this stage's output made with these settings; others are refused.

    `stage_config.json` is the last file that a stage writes, so it marks the output as complete.
    """
    path = Path(directory) / "stage_config.json"
    if not path.is_file():
        return False
    old, new = json.loads(path.read_text(encoding="utf-8")), dataclasses.asdict(cfg)
    changed = [
        f"{name} was {old.get(name)!r}, now {new[name]!r}"
        for name in new
        if name not in FREE_FLAGS and old.get(name) != new[name]
    ]
    if changed:
        fail(
            f"{directory} was made with other settings ({'; '.join(changed)}); "
            "delete it or choose another --out"
        )
    print(f"{directory} is finished; delete it to run this stage again")
    return True


def save_config(cfg, directory):
    """Save the settings beside the output, as the mark that it is complete."""
    text = json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"
    temporary = Path(directory) / "stage_config.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(Path(directory) / "stage_config.json")


def progress_bar(total, label):
    """A tqdm bar that stays away from what takes less than three seconds; label None: no bar."""
    from tqdm import tqdm  # not at the top: the sandbox alone needs the standard library only

    return tqdm(
        total=total, desc=label, delay=3, mininterval=1, leave=False, disable=label is None
    )


# ---------------------------------------------------------------- command line

class BadInput(Exception):
    """Something is wrong with a file; the message is the one line that the user sees."""

TYPES = dict(task_id=str | int, prefix=str | None, setup=str | None, entry_point=str | None, tests=list, response=str)

def records(path, needed):
    """(place, record) for each line of a JSONL file; a bad line is named with its number and the field."""
    try: lines = open(path, "rb").read().split(b"\n")
    except OSError as error: raise BadInput(f"{path}: cannot be read: {error}") from None
    for place, line in [(f"{path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]:
        try: record = json.loads(line)
        except (ValueError, RecursionError) as error: raise BadInput(f"{place}: not JSON: {error}") from None
        if type(record) is not dict: raise BadInput(f"{place}: not a JSON object")
        for field, kind in TYPES.items():
            value = record.get(field)
            if field in needed and field not in record: raise BadInput(f"{place}: field {field!r} is missing")
            bad = field in record and not isinstance(value, kind)
            bad = bad or kind is list and not all(isinstance(t, str) for t in value or [])
            if bad: raise BadInput(f"{place}: field {field!r} is not of type {getattr(kind, '__name__', kind)}")
        yield place, record

def score_file(args):
    """Appends each sample with its verdict to the output, in order; goes on behind those that an earlier run has left there."""
    problems, samples, start, end, passed = {}, [], 0, 0, 0
    for place, problem in records(args.problems, ["task_id", "tests"]):
        if problems.setdefault(problem["task_id"], problem) is not problem: raise BadInput(f"{place}: field 'task_id' repeats")
    for place, sample in records(args.samples, ["task_id", "response"]):
        if sample["task_id"] not in problems: raise BadInput(f"{place}: field 'task_id' is not in {args.problems}")
        samples.append(sample)
    for line in open(args.output, "rb") if os.path.exists(args.output) else []:
        if not line.endswith(b"\n"): break             # cut off: written again
        try: same = json.loads(line).items() >= samples[start].items() and b'"status":' in line
        except (ValueError, LookupError, AttributeError): same = False
        if not same: raise BadInput(f"{args.output}, line {start + 1}: not the result of this sample; it is left as it is")
        start, end = start + 1, end + len(line)
    jobs = [dict(code=program(p, s["response"]), tests=p["tests"], setup=p.get("setup") or "", entry_point=p.get("entry_point"),
                 trust=args.trust, timeout=args.timeout, memory_mb=args.memory_mb)
            for s in samples[start:] for p in [problems[s["task_id"]]]]

    def on_result(index, result):
        nonlocal passed
        passed, count, sample = passed + result.passed, start + index + 1, samples[start + index]
        sample |= {"actual_score": float(result.passed), "passed_tests": result.passed_tests, "total_tests": result.total_tests}
        out.write(json.dumps(sample | {"status": result.status}) + "\n")
        out.flush()
        if sys.stderr.isatty() or count == len(samples) or count % 1000 == 0:
            bar = f"[{'#' * (30 * count // len(samples)):.<30}] {count}/{len(samples)}, {passed} of {count - start} passed"
            print("\r" + bar, end="", file=sys.stderr, flush=True)

    if jobs:
        try: out = open(args.output, "a", encoding="utf-8")
        except OSError as error: raise BadInput(f"{args.output}: cannot be written: {error}") from None
        with out:
            out.truncate(end)
            run_many(jobs, args.workers, on_result, args.isolation)
    print(f"\n{args.output}: {len(samples)} samples, {start} of them from an earlier run", file=sys.stderr)

def main():
    import argparse, runpy
    parser = argparse.ArgumentParser(description="Scores samples by the tests of their problems.")
    parser.add_argument("problems", nargs="?", metavar="PROBLEMS.jsonl")
    parser.add_argument("samples", nargs="?", metavar="SAMPLES.jsonl")
    parser.add_argument("-o", "--output", metavar="OUT.jsonl", help="samples with verdicts; an interrupted run goes on")
    parser.add_argument("--workers", type=int, help="programs at a time; default: the number of cores")
    parser.add_argument("--timeout", type=float, default=3.0, help="CPU seconds a program")
    parser.add_argument("--memory_mb", type=int, default=512, help="address space of a program")
    parser.add_argument("--trust", choices=["auto", "split", "in_process"], default="auto", help="split: refuse the others")
    parser.add_argument("--isolation", choices=["auto", "strict"], default="auto", help="strict: not without all layers")
    parser.add_argument("--bench", nargs="?", const="../shared/data/HumanEval.jsonl.gz", metavar="HumanEval.jsonl.gz")
    parser.add_argument("--rounds", type=int, default=5, help="of the bench, which says what a program costs")
    args = parser.parse_args()
    if args.bench:
        tool = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tools", "sandbox_bench.py")
        if not os.path.exists(tool): parser.exit(2, f"sandbox.py: --bench needs {tool}, which is not there\n")
        return runpy.run_path(tool)["bench"](args.bench, args.rounds)
    if None in (args.problems, args.samples, args.output): parser.error("PROBLEMS.jsonl SAMPLES.jsonl -o OUT.jsonl are needed")
    try: score_file(args)
    except (BadInput, Unsafe) as error: print(f"sandbox.py: {error}", file=sys.stderr); return 2
    except KeyboardInterrupt: print("\nstopped; the same command goes on from here", file=sys.stderr); return 130

if __name__ == "__main__": sys.exit(main())
