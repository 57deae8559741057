"""What the kernel keeps a program from, and the processes that carry the walls. Used by sandbox.py.

    caller ── jobs ──> Z  process 1 of its namespaces; it never sees a test or a program
      │                ├── forks U for each job: holds the candidate
      │                ├── forks J for each job: holds the tests and judges        (judge.py)
      │                └── asks S for an empty scratch when a program has touched it
      └── spawns ────> S  makes the namespaces and the root folder; then it only renews the scratch

Z takes on all walls once, and each fork inherits them at no cost: namespaces (user, mount, PID,
network, IPC, UTS) with a root folder that holds the interpreter's library and nothing else;
Landlock; a seccomp filter; no capabilities; a user id of its own. J stands behind the same walls
as U. Each job has limits on CPU time, memory, processes, files and output. Where namespaces are
missing, the rest still holds.
"""

import builtins
import contextlib
import copy  # noqa: F401 (like heapq and typing: Z holds what many programs import)
import ctypes
import gc
import glob
import heapq  # noqa: F401
import json
import marshal
import math  # noqa: F401
import mmap
import os
import resource
import select
import signal
import socket
import string  # noqa: F401
import struct
import sys
import time
import typing  # noqa: F401
from os import _exit, chdir, closerange, dup2, fork, setsid
from resource import RLIMIT_AS, RLIMIT_CPU, getrlimit, setrlimit

import judge

KEEP_OUTPUT = 64 << 10  # bytes of output that a report keeps (a program that reads stdin: all)
MAX_OUTPUT = 16 << 20  # bytes of output that end a program
PIPE_SIZE = 1 << 16
# Address space of J in bytes: small values of a candidate can make honest tests explode.
JUDGE_MEMORY = 1 << 30
MOST_MEMORY = getrlimit(RLIMIT_AS)[1] % (1 << 63)  # what the machine allows; -1 is no limit
PROCESSES = 64  # and threads, for each worker
OPEN_FILES = 128  # each socket or pipe can hold 0.2 MB that no other limit counts
SCRATCH_MB = 64
ARM = os.uname().machine == "aarch64"

# ---------------------------------------- system calls

# Refused system calls: name, number on x86_64 and on aarch64.
CALLS = """socket 41 198, connect 42 203, bind 49 200, ptrace 101 117, process_vm_readv 310 270,
    process_vm_writev 311 271, process_madvise 440 440, memfd_create 319 279, memfd_secret 447
    447, mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, unshare 272 97, setns
    308 268, open_tree 428 428, move_mount 429 429, acct 163 89, fsopen 430 430, fsmount 432
    432, bpf 321 280, mount_setattr 442 442, perf_event_open 298 241, userfaultfd 323 282,
    add_key 248 217, request_key 249 218, keyctl 250 219, io_uring_setup 425 425,
    io_uring_enter 426 426, io_uring_register 427 427, shmget 29 194, semget 64 190, msgget 68
    186, mq_open 240 180, open_by_handle_at 304 265, name_to_handle_at 303 264, pidfd_getfd 438
    438, kcmp 312 272, init_module 175 105, finit_module 313 273, kexec_load 246 104, reboot
    169 142, syslog 103 116, setpriority 141 140, ioprio_set 251 30, fanotify_init 300 262,
    sched_setparam 142 118, sched_setscheduler 144 119, sched_setattr 314 274,
    sched_setaffinity 203 122"""
# Without namespaces also: to leave the process group, and what Landlock does not know, or only in
# later versions: mode, owner, attributes and times of files, and their size by path. Not on ARM: -
CALLS_ON_FILES = """chmod 90 -, chown 92 -, lchown 94 -, utime 132 -, utimes 235 -, futimesat 261 -,
    setpgid 109 154, setsid 112 157, fchmod 91 52, fchmodat 268 53,
    fchmodat2 452 452, fchown 93 55, fchownat 260 54, setxattr 188 5, lsetxattr 189 6,
    fsetxattr 190 7, truncate 76 45,
    removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16, setxattrat 463 463,
    removexattrat 466 466, utimensat 280 88"""


def numbers(calls):
    rows = [row.split() for row in calls.split(",")]
    found = {name: arm if ARM else x86 for name, x86, arm in rows}
    return {name: int(number) for name, number in found.items() if number != "-"}


REFUSED, REFUSED_ON_FILES = numbers(CALLS), numbers(CALLS_ON_FILES)
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
SET_PARENT_DEATH_SIGNAL, SET_DUMPABLE, SET_SUBREAPER, SET_NO_NEW_PRIVILEGES = 1, 4, 36, 38
SET_SECCOMP = 22
LIBC = ctypes.CDLL(None, use_errno=True)


def libc(call, *args):
    """Call a C function by its name, or a system call by its number; OSError when it answers -1."""
    args = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    if isinstance(call, str):
        answer = getattr(LIBC, call)(*args)
    else:
        answer = LIBC.syscall(ctypes.c_long(call), *args)
    if answer == -1:
        raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")
    return answer


def filter_system_calls(refused):
    """Take on a seccomp filter, for each child too: these calls fail, and arguments of others."""
    if os.uname().machine not in ("x86_64", "aarch64"):
        raise OSError("no seccomp filter for this machine")
    load, equal, at_least, any_bit, mask, answer = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
    allow, refuse, no_such_call, kill = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
    number, first_argument, second_argument = 0, 16, 24  # offsets in struct seccomp_data

    def op(code, value, yes=0, no=0):  # jumps over `yes` or `no` instructions
        return struct.pack("<HBBI", code, yes, no, value)

    def unless(call, offset, *condition):
        """Refuse `call` unless its argument meets the condition, which then jumps over one."""
        size = len(condition) + 3
        yield from (op(equal, call, 0, size), op(load, offset), *condition)
        yield from (op(answer, refuse), op(load, number))

    # 32-bit programs have other numbers
    code = [op(load, 4), op(equal, 0xC00000B7 if ARM else 0xC000003E, 1, 0), op(answer, kill)]
    code += [op(load, number)]
    if not ARM:
        code += [op(at_least, 0x40000000, 0, 1), op(answer, refuse)]  # the x32 interface
    for call in refused:
        code += [op(equal, call, 0, 1), op(answer, refuse)]
    code += [op(equal, 435, 0, 1), op(answer, no_such_call)]  # clone3 hides its flags
    # clone into new namespaces, prlimit64 of other processes
    code += unless(220 if ARM else 56, first_argument, op(any_bit, 0x7E020080, 0, 1))
    code += unless(261 if ARM else 302, first_argument, op(equal, 0, 1, 0))
    # socketpair: a datagram socket could send to a socket of the host by its path
    code += unless(199 if ARM else 53, second_argument, op(mask, 15), op(equal, 1, 1, 0))
    for request in (0x40086602, 0x401C5820):  # ioctl: attributes of files
        code += unless(29 if ARM else 16, second_argument, op(equal, request, 0, 1))
    code = ctypes.create_string_buffer(b"".join([*code, op(answer, allow)]))
    program = struct.pack("@HxxxxxxP", len(code) // 8, ctypes.addressof(code))
    libc("prctl", SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    libc("prctl", SET_SECCOMP, 2, ctypes.create_string_buffer(program))


def landlock(readable, writable):
    """Take on Landlock: read below `readable`, everything below `writable`, no TCP, no signals.

    Returns: version, and the descriptor of the rules, for a child's domain of its own.
    """
    version = libc(LANDLOCK_CREATE, None, 0, 1)
    rights = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    size = 8 if version < 4 else 16 if version < 6 else 24
    handled = ctypes.create_string_buffer(struct.pack("<QQQ", rights, 3, 3)[:size], size)
    rules = libc(LANDLOCK_CREATE, handled, size, 0)
    for path, allowed in [(p, 0b1101) for p in readable] + [(p, rights) for p in writable]:
        fd = os.open(path, os.O_PATH)
        if not os.path.isdir(path):
            allowed &= 0b1100000000000111
        rule = ctypes.create_string_buffer(struct.pack("<Qi", allowed, fd), 12)
        libc(LANDLOCK_ADD, rules, 1, rule, 0)
        os.close(fd)
    libc("prctl", SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    libc(LANDLOCK_RESTRICT, rules, 0)
    return version, rules


# ---------------------------------------- namespaces

NEW_USER = 0x10000000
NAMESPACES = 0x6C020000  # PID, network, mount, IPC, UTS
NO_SETUID, NO_DEVICES, READ_ONLY, BIND, RECURSIVE, PRIVATE = 2, 4, 1, 1 << 12, 1 << 14, 1 << 18
DETACH = 2


def mount(what, where, kind, flags, options=None):
    what, where, kind, options = [x and x.encode() for x in (what, where, kind, options)]
    libc("mount", what, where, kind, flags, options)


def become_own_user():
    """Root becomes a user whom nobody else is, so that this worker's processes are counted apart.

    It stays root where other users cannot read the library. Its capabilities go in any case.
    """
    uid = 0x70000000 | int.from_bytes(os.urandom(3), "little")
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, 0)
        open(os.__file__).close()
        os.setresuid(uid, uid, uid)
    except OSError:
        with contextlib.suppress(OSError):
            os.setresuid(0, 0, 0)


def enter_namespaces():
    """Leave the host's namespaces: as root, or in a user namespace. The next child is process 1."""
    if os.getuid() == 0:
        with contextlib.suppress(OSError):
            return libc("unshare", NAMESPACES)
        become_own_user()
        libc("prctl", SET_DUMPABLE, 1, 0, 0, 0)  # or /proc/self belongs to root
    uid, gid = os.getuid(), os.getgid()
    libc("unshare", NAMESPACES | NEW_USER)
    maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
    for name, text in maps.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def library(site):
    """What a program may read: the interpreter, its library, and what these load."""
    paths = [os.path.dirname(os.__file__), sys.executable, *site]
    paths += [f"{sys.base_prefix}/lib", f"{sys.base_prefix}/{sys.platlibdir}"]
    paths += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/localtime"]
    paths += ["/usr/share/zoneinfo", "/dev/zero", "/dev/random", "/dev/urandom"]
    for path in paths:  # grows meanwhile: a link is of use only with all that it leads over
        if os.path.islink(path):
            paths.append(os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path))))
        elif os.path.realpath(path) not in paths:
            paths.append(os.path.realpath(path))
    return [path for path in dict.fromkeys(paths) if os.path.exists(path)]


def make_root(paths):
    """Give this process a root folder that holds these paths, read-only, and a scratch."""
    root = "/proc"  # any directory that is always there
    mount("none", "/", None, RECURSIVE | PRIVATE)
    mount("none", root, "tmpfs", NO_SETUID | NO_DEVICES, "mode=755,size=1m")
    for path in sorted(paths):  # folders before what is in them
        new = root + path
        if os.path.lexists(new):
            continue
        os.makedirs(os.path.dirname(new), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), new)
            continue
        if os.path.isdir(path):
            os.mkdir(new)
        else:
            open(new, "w").close()
        mount(path, new, None, BIND | RECURSIVE)
        rights = 3 if path.startswith("/dev/") else 7  # read-only, no setuid; no devices
        attributes = struct.pack("<QQQQ", rights, 0, 0, 0)
        libc(REFUSED["mount_setattr"], -100, new.encode(), 0x8000, attributes, 32)  # all below
    os.makedirs(root + "/scratch/tmp")
    mount("none", root + "/scratch/tmp", "tmpfs", NO_SETUID | NO_DEVICES)
    for name in ("/tmp", "/dev/shm"):  # /dev/shm holds the semaphores of multiprocessing
        if not os.path.lexists(root + name):
            os.symlink("/scratch/tmp", root + name)
    os.chdir(root)
    mount("none", ".", None, 32 | READ_ONLY | NO_SETUID | NO_DEVICES)  # remount
    libc(REFUSED["pivot_root"], b".", b".")
    libc("umount2", b".", DETACH)


# ---------------------------------------- S: makes the walls' outside, and renews the scratch


def serve(control, namespaces, site, cores):
    """All of S. `control` is the caller's socket; OSError where `namespaces` do not work."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, cores)  # only slower without
    control, high = socket.socket(fileno=os.dup(control)), control  # a low number: U closes those
    os.close(high)
    paths = library(site)
    if namespaces:
        enter_namespaces()
        make_root([*paths, "/dev/null"])
        scratch = "/scratch/tmp"
    else:
        place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"
        scratch = f"{place}/sandbox-{os.getppid()}-{os.urandom(6).hex()}/tmp"
        os.makedirs(scratch)
    renew(scratch, namespaces)
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        try:
            serve_jobs(control, theirs, paths, scratch, namespaces)
        finally:
            os._exit(0)
    theirs.close()
    control.close()
    while ours.recv(1):
        renew(scratch, namespaces)
        ours.sendall(b"!")
    os.waitpid(pid, 0)
    if not namespaces:
        remove(os.path.dirname(scratch))


def renew(scratch, namespaces):
    """Make the scratch empty and new, times and counts of its file system too."""
    if namespaces:
        libc("umount2", scratch.encode(), DETACH)
        size = f"mode=1777,size={SCRATCH_MB}m,nr_inodes=4096"
        mount("tmpfs", scratch, "tmpfs", NO_SETUID | NO_DEVICES, size)
        return
    for name in os.listdir(os.path.dirname(scratch)):
        remove(os.path.join(os.path.dirname(scratch), name))
    os.mkdir(scratch)
    os.chmod(scratch, 0o1777)


def remove(folder):
    """Remove a folder, also where a program has closed it to all."""
    import shutil

    for place, names, _ in os.walk(folder):  # from the top, before it lists what is in them
        for path in [place, *(os.path.join(place, name) for name in names)]:
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------- Z: forks J and U for each job, and ends them


def set_limit(kind, value):
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def threads_of(uid):
    """The number of a user's processes and threads."""
    count = 0
    for path in glob.glob("/proc/[0-9]*/task/*"):
        with contextlib.suppress(OSError):  # it has just ended
            count += os.stat(path).st_uid == uid
    return count


def take_on_walls(paths, scratch, namespaces):
    """Z's walls, for all its children too. Returns what there is of them, and Landlock's rules."""
    processes = PROCESSES
    if os.getuid() == 0:
        become_own_user()
    elif not namespaces:
        processes += threads_of(os.getuid())  # they count as well
    # From inside, only a signal that it handles can hurt process 1.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    libc("prctl", SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if not namespaces:
        # Orphans become our children, so that we see their end.
        libc("prctl", SET_SUBREAPER, 1, 0, 0, 0)
    libc("capset", struct.pack("<Ii", 0x20080522, 0), bytes(24))
    set_limit(resource.RLIMIT_CORE, 0)
    set_limit(resource.RLIMIT_FSIZE, SCRATCH_MB << 20)
    set_limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    if os.getuid():
        set_limit(resource.RLIMIT_NPROC, processes)
    layers = {"namespaces": namespaces, "landlock": 0, "seccomp": False}
    rules = None
    with contextlib.suppress(OSError):
        layers["landlock"], rules = landlock(paths, [os.path.dirname(scratch), "/dev/null"])
    with contextlib.suppress(OSError):
        filter_system_calls(REFUSED.values())
        layers["seccomp"] = True
    return layers, rules


def serve_jobs(control, keeper, paths, scratch, namespaces):
    """All of Z: job after job. It hands the sockets of a job on and reads none of them."""
    layers, rules = take_on_walls(paths, scratch, namespaces)
    builtins.exit = builtins.quit = sys.exit  # as in any interpreter
    os.chdir("/")
    rehearse()
    gc.freeze()  # a child that collects garbage would copy every page
    control.sendall(json.dumps(layers).encode() + b"\n")
    places = scratch, os.path.dirname(scratch)
    empty = scratch_state(*places)
    while True:
        data, fds, _, _ = socket.recv_fds(control, 4096, 4)
        if not data:
            return
        job = Job(*marshal.loads(data), fds, layers, rules, scratch)
        report = job.run(control.fileno())
        if scratch_state(*places) != empty:
            keeper.sendall(b"?")
            keeper.recv(1)
            empty = scratch_state(*places)
        control.sendall(report)
        if job.printed:
            control.sendall(memoryview(job.output)[: job.printed])


def rehearse():
    """Run J and U here some times, on sockets that hold all that the other side would say.

    Python notes which methods it has found and how bytecode runs best. A fork that makes such a
    note copies a page for it, so Z has made them before.
    """
    values = [([1], "a"), (2.5, {"b": (1, 2)}), ("c", None), ({3, 4}, [True])]
    tests = "\n".join(f"assert f({x!r}) == {y!r}" for x, y in values)
    job = marshal.dumps((b"", "", *judge.plan("", (tests,), "f")[1]))
    requests, replies = judge.message("def f(x):\n    return x\n"), judge.message([0, None])
    for number, (x, y) in enumerate(values, 1):
        x, y = judge.pack(x, None), judge.pack(y, None)
        requests += judge.message([number, "call", [{"h": "g:f"}, x], []])
        replies += judge.message([number, "value", y])
    main = sys.modules["__main__"]
    both = (judge.judge, len(job), job, replies), (judge.answer, 0, requests)
    for run, size, *said in 20 * both:
        pairs = [socket.socketpair() for _ in said]
        for (ours, _), text in zip(pairs, said):
            ours.sendall(text)
            ours.shutdown(socket.SHUT_WR)
        with contextlib.suppress(EOFError):
            run(size, *[theirs.fileno() for _, theirs in pairs])
    sys.modules["__main__"] = main
    del sys.modules["solution"]


def scratch_state(scratch, around):
    """Changes with everything that a program could leave in the scratch for the next one to see."""
    try:
        inside, beside = os.stat(scratch), os.stat(around)
        return os.listdir(scratch), inside.st_mode, inside.st_ctime_ns, beside.st_ctime_ns
    except OSError:
        return None


class Job:
    """One job in Z: its processes, from the fork to their end.

    Z and its forks run as little as they can: each page that one of them writes to first is copied,
    and Python writes to an object (its count of references) when it merely uses it.
    """

    def __init__(self, kind, cpu, memory_mb, size, fds, layers, rules, scratch):
        self.kind, self.cpu, self.memory, self.size = kind, cpu, memory_mb << 20, size
        self.fds, self.layers, self.rules, self.scratch = fds, layers, rules, scratch
        self.kept = MAX_OUTPUT if kind == "program" else KEEP_OUTPUT
        self.judge = self.output = None
        self.printed = 0  # bytes

    def run(self, caller):
        """Returns the reason, the exit statuses of U and J, CPU seconds of U and its children, and
        how much of the output is kept, as a line of JSON.
        """
        # New for each job: a program may change their flags.
        output, theirs = os.pipe()
        null = os.open("/dev/null", os.O_RDWR)
        watched = select.poll()
        watched.register(caller, select.POLLRDHUP)
        watched.register(output, select.POLLIN)
        self.fork(null, theirs)
        for fd in (null, *self.fds):
            os.close(fd)
        reason = self.watch(watched, caller, output)
        status, judge_status, seconds = self.end()
        # Nobody is left who could write. A copy of `theirs` may be on its way through a socket.
        while self.printed < self.kept and dict(watched.poll(0)).get(output, 0) & select.POLLIN:
            self.read(output)
        os.close(output)
        os.close(theirs)
        if reason == "ended" and (seconds > self.cpu or status == signal.SIGXCPU):
            reason = "timeout"  # by its children, too
        self.printed = min(self.printed, self.kept)
        return f'["{reason}", {status}, {judge_status}, {seconds}, {self.printed}]\n'.encode()

    def read(self, output):
        """Read on, into memory that the kernel takes back with the job: what Z holds of a program's
        output, a later program could find.
        """
        if not self.output:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self.output = mmap.mmap(-1, MAX_OUTPUT + PIPE_SIZE, flags)
        rest = memoryview(self.output)[self.printed :]
        self.printed += os.readv(output, [rest[:PIPE_SIZE]])

    def fork(self, null, output):
        """Fork J, if the tests are its, and U."""
        line, *others = self.fds
        run, lines, given = judge.run_together, (line,), (null, output, output)
        seconds, domain = int(self.cpu) + 2, None
        if not self.layers["namespaces"]:
            domain = self.rules, self.layers["seccomp"]
        limits = seconds, min(self.memory, MOST_MEMORY)
        if self.kind == "split":
            link, theirs = others
            of_judge = seconds, min(JUDGE_MEMORY, MOST_MEMORY)
            lines, nowhere = (line, link), (null, null, null)
            self.judge = fork() or live(judge.judge, self.size, lines, of_judge, domain, nowhere)
            run, lines = judge.answer, (theirs,)
        elif self.kind == "program":
            run, given = judge.run_program, (*others, output, null)
        self.candidate = fork() or live(run, self.size, lines, limits, domain, given, self.scratch)

    def watch(self, watched, caller, output):
        """Wait for the end of J or U, or for a limit. Returns the reason; reads the output.

        The limit is CPU time: wall time counts the neighbours. For a program that sleeps there is
        a wide limit on wall time.
        """
        candidate = os.pidfd_open(self.candidate)
        other = os.pidfd_open(self.judge) if self.judge else candidate
        watched.register(candidate, select.POLLIN)
        watched.register(other, select.POLLIN)
        clock = (~self.candidate << 3) | 2  # the kernel's number for the CPU clock of this process
        start, reason, left = time.monotonic(), None, self.cpu
        while not reason:
            ready = dict(watched.poll(max(left, 0.001) * 1000))
            if caller in ready:
                reason = "orphan"
            elif candidate in ready or other in ready:
                reason = "ended"
            elif output in ready:
                self.read(output)
                if self.printed > MAX_OUTPUT:
                    reason = "output"
            if not reason:
                wall = start + 3 * self.cpu + 2 - time.monotonic()
                left = min(self.cpu - time.clock_gettime(clock), wall)
                reason = "timeout" if left <= 0 else None
        if reason == "ended" and other not in ready:  # J may still say how far it has come
            last = select.poll()
            last.register(other, select.POLLIN)
            last.poll(1000)
        os.close(candidate)
        if self.judge:
            os.close(other)
        return reason

    def end(self):
        """Kill all, until nobody is left. Returns both exit statuses, CPU time of all but J."""
        status, judge_status, seconds = 0, 0, 0.0
        while True:
            try:
                self.kill()
                pid, how, usage = os.wait4(-1, 0)
            except (ProcessLookupError, ChildProcessError):
                return status, judge_status, seconds
            if pid == self.judge:
                judge_status = how
                continue
            seconds += usage.ru_utime + usage.ru_stime
            if pid == self.candidate:
                status = how

    def kill(self):
        if self.layers["namespaces"]:
            os.kill(-1, signal.SIGKILL)
            return
        for pid in filter(None, (self.judge, self.candidate)):
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)


def live(run, size, lines, limits, domain, given, place=None):
    """All of a fork: take on its limits, run(size, *lines), end.

    lines: the descriptors it keeps, ascending; limits: CPU seconds, bytes of address space;
    domain: the walls that it takes on for itself, where there are no namespaces; given: descriptors
    that become its stdin, stdout, stderr; place: its working folder.
    """
    try:
        setsid()  # first: kill(0) would reach our own group
        for fd, source in enumerate(given):
            dup2(source, fd)
        if domain:
            rules, seccomp = domain
            if rules:
                libc(LANDLOCK_RESTRICT, rules, 0)  # a domain of its own: no signal to Z
            if seccomp:
                filter_system_calls(REFUSED_ON_FILES.values())
        start = 3
        for fd in lines:
            closerange(start, fd)
            start = fd + 1
        closerange(start, OPEN_FILES)
        if place:
            chdir(place)
        seconds, memory = limits
        setrlimit(RLIMIT_CPU, (seconds, seconds + 1))
        setrlimit(RLIMIT_AS, (memory, memory))
        _exit(run(size, *lines) or 0)
    except (EOFError, ConnectionError):
        _exit(0)  # the other side has gone
    except BaseException:
        sys.excepthook(*sys.exc_info())
        _exit(1)
