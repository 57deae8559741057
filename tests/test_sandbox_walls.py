"""Programs that reach outside, or use more than they may.  Each effect is first seen without the walls (a plain process),
so that its absence behind them means something."""
# Programs under test are strings of one line.
# ruff: noqa: E501, E731, SIM105, SIM115, SIM905, UP031

import contextlib
import os
import socket
import subprocess
import sys
import time

import pytest
from sandbox_peers import plain, start

import sandbox
import walls


def inside(code, function="f", **options):
    """What f() returns inside the sandbox: T receives it and puts it into the error."""
    result = sandbox.run(
        code,
        [f"raise ValueError(repr({function}()))"],
        entry_point=function,
        **{"timeout": 3.0, **options},
    )
    assert result.error.startswith("ValueError: "), result
    return eval(result.error.removeprefix("ValueError: "))


def outside(code):
    """What f() returns in a plain process."""
    return eval(plain(code + "\nprint(repr(f()))"))


def attempt(expression, prelude=""):
    return f"{prelude}\ndef f():\n    try: return ['done', repr({expression})[:200]]\n    except (OSError, ValueError) as e: return ['refused', type(e).__name__]"


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "secret").write_text("treasure")
    for folder in [
        tmp_path,
        *list(tmp_path.parents)[:3],
    ]:  # so that not the folders' modes but the walls keep it
        try:
            folder.chmod(
                0o755
            ) if folder.stat().st_uid == os.getuid() and folder.name != "tmp" else None
        except OSError:
            pass
    tmp_path.chmod(0o777)
    return tmp_path


@pytest.fixture
def victim():
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"], start_new_session=True
    )
    yield process
    process.kill(), process.wait()


# ---- files


def test_no_file_outside_is_read(secret):
    code = attempt(f"open({str(secret / 'secret')!r}).read()")
    assert outside(code) == ["done", "'treasure'"]
    assert inside(code)[0] == "refused"


def test_no_file_outside_is_written(secret):
    code = attempt(f"open({str(secret / 'new')!r}, 'w').write('x')")
    assert inside(code)[0] == "refused" and not (secret / "new").exists()
    assert outside(code)[0] == "done" and (secret / "new").exists()


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/etc/hostname",
        "/proc/self/environ",
        "/proc/1/cmdline",
        "/proc/self/maps",
        "/sys/kernel",
        "/home",
        "/var/log",
    ],
)
def test_places_of_the_host_are_closed(path):
    code = attempt(
        f"os.listdir({path!r}) if os.path.isdir({path!r}) else open({path!r}).read()", "import os"
    )
    if outside(code)[0] != "done":
        pytest.skip(f"{path} is closed to everyone here")
    assert inside(code)[0] == "refused"


def test_the_project_is_not_readable():
    code = attempt(f"open({os.path.abspath(sandbox.__file__)!r}).read(10)")
    assert outside(code)[0] == "done" and inside(code)[0] == "refused"


def test_the_library_is_not_writable():
    code = attempt("open(os.path.dirname(os.__file__) + '/os_new.py', 'w')", "import os")
    assert inside(code)[0] == "refused" and not os.path.exists(
        os.path.dirname(os.__file__) + "/os_new.py"
    )


def test_symlinks_lead_nowhere(secret):
    code = attempt(
        "(os.symlink(%r, 'link'), open('link').read())[1]" % str(secret / "secret"), "import os"
    )
    assert inside(code)[0] == "refused"
    os.chdir(secret)
    assert outside(code) == ["done", "'treasure'"]


def test_dotdot_does_not_leave_the_scratch(secret):
    code = attempt("open('../' * 20 + %r).read()" % str(secret / "secret")[1:])
    assert outside(code) == ["done", "'treasure'"] and inside(code)[0] == "refused"


def test_no_chroot_and_no_mount():
    code = "import ctypes, os\ndef f():\n    c = ctypes.CDLL(None)\n    return [c.chroot(b'/'), c.mount(b'none', b'/tmp', b'tmpfs', 0, None), c.unshare(0x10000000), c.umount2(b'/scratch/tmp', 2)]"
    assert inside(code) == [-1, -1, -1, -1]
    if os.getuid() == 0:
        assert 0 in outside("import ctypes\ndef f(): return [ctypes.CDLL(None).chroot(b'/')]")


def test_scratch_is_writable_and_empty_for_the_next():
    write = "import os\nopen('left', 'w').write('x'); os.mkdir('d'); open('d/e', 'w').write('y'); open('/tmp/g', 'w').write('z') if os.getcwd() != '/tmp' and os.access('/tmp', os.W_OK) else 0\nos.chmod('d', 0)\ndef f(): return sorted(os.listdir('.'))"
    assert {"left", "d"} <= set(inside(write))
    assert inside("import os\ndef f(): return os.listdir('.')") == []


def test_flags_and_modes_are_not_left_for_the_next():
    """The pipe of stdout and the scratch folder are new for each program: one cannot spoil them for the next."""
    sandbox.run(
        "import os\nos.set_blocking(1, False); os.set_blocking(2, False)\nimport fcntl\nfcntl.fcntl(1, 1031, 4096)",
        ["import solution"],
    )
    noisy = sandbox.run(
        "import os\nfor _ in range(40): os.write(1, b'x' * 100000)\ndef f(): return 1",
        ["assert f() == 1"],
        entry_point="f",
    )
    assert noisy.passed, noisy
    for mode in (0o000, 0o500):
        sandbox.run(
            f"import os\ntry: os.chmod('.', {mode})\nexcept OSError: pass", ["import solution"]
        )
        assert inside("def f(): return open('a', 'w').write('abc')") == 3


def test_attributes_are_not_left_for_the_next():
    """A default ACL on the scratch shows in no listing and no mode, and closes each new file to its owner."""
    acl = "bytes.fromhex('0200000001000000ffffffff04000000ffffffff20000000ffffffff')"
    sandbox.run(
        f"import os\nfor name, value in (('system.posix_acl_default', {acl}), ('user.x', b'y')):\n    try: os.setxattr('.', name, value)\n    except OSError: pass",
        ["import solution"],
    )
    assert inside(
        "import os\ndef f():\n    open('a', 'w').write('x')\n    return [open('a').read(), os.listxattr('.')]"
    ) == ["x", []]


def test_disk_is_limited():
    code = "def f():\n    n = 0\n    try:\n        for i in range(40):\n            with open(f'x{i}', 'wb') as h:\n                for _ in range(16): n += h.write(b'x' * (1 << 20))\n    except OSError: pass\n    return n >> 20"
    if inside("import os\ndef f(): return os.getcwd()").startswith("/dev/shm"):
        pytest.skip("without namespaces the scratch has no total limit")
    assert inside(code) <= 64


def test_one_file_is_limited():
    code = "def f():\n    n = 0\n    try:\n        with open('x', 'wb') as h:\n            while n < 200: h.write(b'x' * (1 << 20)); n += 1\n    except OSError: pass\n    return n"
    assert inside(code) <= 64


def test_descriptors_are_limited():
    code = "def f():\n    k = []\n    try:\n        while len(k) < 5000: k.append(open('/dev/null'))\n    except OSError: pass\n    return len(k)"
    assert inside(code) < 300 < outside(code)


def test_the_environment_is_not_there(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "treasure")
    code = "import os\ndef f(): return os.environ.get('SECRET_KEY')"
    sandbox.close()  # helpers that start now, with the secret in the caller's environment
    assert outside(code) == "treasure" and inside(code) is None


def test_no_open_descriptor_of_the_caller(secret):
    with open(secret / "secret") as held, contextlib.ExitStack() as many:
        os.set_inheritable(held.fileno(), True)
        for _ in range(200):
            many.enter_context(open(os.devnull))  # the socket to the helper has a high number, too
        sandbox.close()
        names = "import os\ndef f():\n    found = []\n    for n in range(3, 1000):\n        try: os.fstat(n); found.append(n)\n        except OSError: pass\n    return len(found)"
        assert inside(names) == 1  # the socket to T


# ---- network


def listener():
    return socket.create_server(("127.0.0.1", 0))


def test_no_connection_to_loopback():
    with listener() as server:
        code = attempt(
            f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)",
            "import socket",
        )
        assert outside(code)[0] == "done" and inside(code)[0] == "refused"


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK"])
def test_no_socket_of_any_family(family):
    code = attempt(
        f"socket.socket(socket.{family}, socket.SOCK_DGRAM if '{family}' != 'AF_NETLINK' else socket.SOCK_RAW)",
        "import socket",
    )
    if outside(code)[0] != "done":
        pytest.skip(f"no {family} here")
    assert inside(code)[0] == "refused"


def test_no_udp_by_ctypes():
    code = "import ctypes\ndef f(): return ctypes.CDLL(None).socket(2, 2, 0)"
    assert outside(code) >= 0 and inside(code) == -1


def test_socketpair_works():
    assert (
        inside(
            "import socket\ndef f():\n    a, b = socket.socketpair()\n    a.sendall(b'x')\n    return b.recv(1)"
        )
        == b"x"
    )


# ---- other processes


def test_no_signal_reaches_outside(victim):
    code = attempt(f"os.kill({victim.pid}, 9)", "import os")
    inside(code)
    assert victim.poll() is None
    outside(code)
    assert victim.wait(5) == -9


def test_kill_minus_one_stays_inside(victim):
    result = sandbox.run(
        "import os\nos.kill(-1, 9)\ndef f(): return 1", ["assert f() == 1"], entry_point="f"
    )
    assert victim.poll() is None and result.status in ("error", "passed")
    assert sandbox.run("def f(): return 1", ["assert f() == 1"], entry_point="f").passed


def test_kill_zero_reaches_nobody_else():
    """Without setsid the group of the helper would die with it: here in the weak form a second process of the group does."""
    code = "import os, signal\nos.kill(0, signal.SIGKILL)"
    for _ in range(3):
        assert not sandbox.run(code, ["import solution"]).passed
    assert sandbox.run("def f(): return 1", ["assert f() == 1"], entry_point="f").passed
    weak = "import os, signal, time\npid = os.fork()\nif pid == 0: os.kill(0, signal.SIGKILL)\ntime.sleep(2)\nprint('alive')"
    assert "alive" not in plain(weak), "the weak form survives: the test would not bite"


def test_stop_signal_to_parent_and_group():
    for code in (
        "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)",
        "import os, signal\nos.killpg(0, signal.SIGSTOP)",
        "import os, signal\nos.kill(1, signal.SIGKILL)",
        "import os, signal\nfor s in range(1, 65):\n    try: os.kill(os.getppid() or 1, s)\n    except OSError: pass",
    ):
        start_time = time.monotonic()
        sandbox.run(code, ["import solution"], timeout=0.5)
        assert sandbox.run("def f(): return 1", ["assert f() == 1"], entry_point="f").passed
        assert time.monotonic() - start_time < 6


def count(word):
    found = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            found += (
                word.encode() in open(f"/proc/{pid}/cmdline", "rb").read()
                or word in open(f"/proc/{pid}/comm").read()
            )
        except OSError:
            pass
    return found


STRAY = "import ctypes, os, time\ndef stray(depth):\n    if depth and os.fork(): return\n    {}\n    ctypes.CDLL(None).prctl(15, b'{}', 0, 0, 0)\n    time.sleep({})\nif os.fork() == 0:\n    stray({})\n    os._exit(0)\ntime.sleep(0.1)\ndef f(): return 1"


@pytest.mark.parametrize(
    "name, action, depth",
    [
        ("child", "pass", 0),
        ("orphan", "pass", 1),
        ("own session", "os.setsid()", 1),
        ("deaf", "import signal; [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 3, 15)]", 1),
    ],
)
def test_no_process_survives(name, action, depth):
    action = f"try: {action}\n    except OSError: pass" if "setsid" in action else action
    word = (
        f"s{name[:3]}{os.getpid()}"  # of its own: what the weak form leaves lives for two seconds
    )
    sandbox.run(STRAY.format(action, word, 30, depth), ["assert f() == 1"], entry_point="f")
    time.sleep(0.1)
    assert count(word) == 0
    start(
        STRAY.format(action, word, 2, depth).replace(
            "time.sleep(0.1)", "time.sleep(0.3); os._exit(0)"
        )
    )
    assert count(word) == 1, "the weak form leaves nothing: the test would not bite"


def test_fork_bomb_is_held():
    code = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    if "number of processes" in (sandbox.MISSING or []):
        pytest.skip("the number of processes is not limited on this host")
    began = time.monotonic()
    result = sandbox.run(code, ["import solution"], timeout=0.5)
    assert result.status in ("timeout", "error") and time.monotonic() - began < 8
    assert sandbox.run("def f(): return 1", ["assert f() == 1"], entry_point="f").passed


def test_number_of_processes():
    code = "import os, time\ndef f():\n    n = 0\n    try:\n        while n < 300:\n            if os.fork() == 0: time.sleep(30)\n            n += 1\n    except OSError: pass\n    return n"
    if "number of processes" in (sandbox.MISSING or []):
        pytest.skip("the number of processes is not limited on this host")
    assert inside(code) < (
        100 if sandbox.IDLE[0].layers["namespaces"] else 300
    )  # without a namespace the user's other processes count too


def test_no_ptrace_and_no_foreign_memory(victim):
    code = f"import ctypes\ndef f():\n    c = ctypes.CDLL(None, use_errno=True)\n    return [c.ptrace(16, {victim.pid}, 0, 0), c.ptrace(16, 1, 0, 0), c.process_vm_readv(1, 0, 0, 0, 0, 0)]"
    assert inside(code) == [-1, -1, -1]
    if os.getuid() == 0:
        assert outside(code)[0] == 0


def test_helper_is_not_slowed_or_limited():
    code = "import ctypes, os\ndef f():\n    c = ctypes.CDLL(None)\n    lim = (ctypes.c_ulong * 2)(1, 1)\n    out = []\n    for call in (lambda: os.setpriority(os.PRIO_PROCESS, 1, 19), lambda: os.sched_setaffinity(1, {0}), lambda: os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)):\n        try: call(); out.append('done')\n        except OSError: out.append('refused')\n    return out + [c.prlimit(1, 7, lim, None), c.prlimit(os.getppid(), 7, lim, None)]"
    assert inside(code) == ["refused"] * 3 + [-1, -1]


def test_no_root_rights():
    code = "import os\ndef f(): return [os.getuid() != 0, os.geteuid() != 0]"
    if "root's rights" in (sandbox.MISSING or []):
        pytest.skip("root cannot change its id here")
    assert inside(code) == [True, True]
    assert inside(attempt("os.setuid(0)", "import os"))[0] == "refused" or os.getuid() != 0


def test_no_new_privileges():
    assert inside("import ctypes\ndef f(): return ctypes.CDLL(None).prctl(39, 0, 0, 0, 0)") == 1


@pytest.mark.parametrize(
    "call",
    [
        "keyctl(0, -3, 0)",
        "syscall(425, 1, 0)",
        "syscall(321, 0, 0, 0)",
        "syscall(323, 0)",
        "syscall(29, 1234, 4096, 0o1600)",
        "syscall(240, b'/q', 66, 384, 0)",
        "syscall(438, 3, 0, 0)",
    ],
)
def test_dangerous_syscalls_are_refused(call):
    if os.uname().machine != "x86_64":
        pytest.skip("numbers of x86_64")
    assert inside(
        f"import ctypes\ndef f():\n    c = ctypes.CDLL(None, use_errno=True)\n    c.keyctl = lambda *a: c.syscall(250, *a)\n    return [c.{call}, ctypes.get_errno()]"
    ) == [-1, 1]


# ---- limits


def timed(code, **options):
    began = time.monotonic()
    result = sandbox.run(code, ["assert f() == 1"], entry_point="f", **options)
    return result, time.monotonic() - began


ENDLESS = {
    "python loop": "while True: pass",
    "C loop": "sum(range(10**15))",
    "regex": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "in the function": "def f():\n    while True: pass\nf()",
    "big power": "10 ** 10 ** 10",
    "deaf to signals": "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
    "swallows everything": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "threads": "import threading\nfor _ in range(4): threading.Thread(target=lambda: sum(range(10**15))).start()",
}


def test_one_second_ends_in_time():
    began = time.monotonic()
    results = dict(
        zip(
            ENDLESS,
            sandbox.run_many(
                [
                    dict(code=code, tests=["assert f() == 1"], entry_point="f", timeout=1.0)
                    for code in ENDLESS.values()
                ],
                workers=4,
            ),
        )
    )
    for name, result in results.items():
        assert result.status == "timeout" and result.seconds < 1.35, (
            name,
            result,
        )  # CPU time: wall time
    assert time.monotonic() - began < 14  # on a busy machine says little


def test_without_limits_they_do_not_end():
    running = {
        name: subprocess.Popen(
            ["nice", sys.executable, "-I", "-S", "-c", code],
            start_new_session=True,
            stderr=subprocess.DEVNULL,
        )
        for name, code in ENDLESS.items()
    }
    time.sleep(2)
    ended = [name for name, process in running.items() if process.poll() is not None]
    for process in running.values():
        process.kill(), process.wait()
    assert ended == [], "these end by themselves: the test would not bite"


def test_sleep_is_ended_by_the_wall_limit():
    result, seconds = timed("import time\ntime.sleep(100)", timeout=0.2)
    assert result.status == "timeout" and seconds < 4 and result.seconds < 0.2


def test_short_limits_work():
    result, _ = timed("while True: pass", timeout=0.1)
    assert result.status == "timeout" and result.seconds < 0.3


def test_time_of_children_is_limited_by_the_wall():
    result, seconds = timed(
        "import os, time\nif os.fork() == 0:\n    while True: pass\ntime.sleep(60)", timeout=0.3
    )
    assert result.status == "timeout" and seconds < 5


@pytest.mark.parametrize(
    "code",
    [
        "x = [0] * 10**9",
        "x = bytearray(1 << 33)",
        "x = 'a' * (1 << 33)",
        "x = []\nwhile True: x.append(bytearray(1 << 20))",
        "def f(): return [0] * 10**9",
        "import ctypes\nc = ctypes.create_string_buffer(1 << 33)",
    ],
)
def test_memory_is_limited(code):
    result, _ = timed(code)
    assert result.status == "memory", result


def test_memory_limit_is_the_one_asked_for():
    code = "x = bytearray(300 << 20)\ndef f(): return 1"
    assert timed(code, memory_mb=512)[0].passed and timed(code, memory_mb=128)[0].status == "memory"


def test_flood_of_output_is_cut_and_stopped():
    result, _ = timed("while True: print('x' * 10000)", timeout=20.0)
    assert result.status == "output" and len(result.stdout) <= walls.KEEP_OUTPUT


def test_two_gigabytes_of_output_do_not_grow_the_caller():
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result, _ = timed(
        "import os\nfor _ in range(2048): os.write(1, b'x' * (1 << 20))\ndef f(): return 1",
        timeout=20.0,
    )
    assert (
        result.status == "output"
        and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30 << 10
    )


def test_megabytes_of_output_pass():
    result, _ = timed("def f():\n    for _ in range(3000): print('x' * 1000)\n    return 1")
    assert result.passed and len(result.stdout) == walls.KEEP_OUTPUT


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys.setrecursionlimit(10**9)\ndef g(n): return g(n + 1)\ng(0)",
        "import os\nos.abort()",
        "import ctypes\nctypes.string_at(0)",
        "import os\nos.kill(os.getpid(), 9)",
        "import faulthandler\nfaulthandler._sigsegv()",
    ],
)
def test_a_crash_is_an_error(code):
    result, _ = timed(code, timeout=1.0)
    assert result.status in ("error", "memory", "timeout") and not result.passed


EXPLODE = [
    ("10**12", "assert list(range(f())) == []"),
    ("10**15", "assert sum(range(f())) == 3"),
    ("[[0] * 100] * 1000", "x = f() * 10**9"),
    ("'a' * 60 + 'b'", "import re\nassert re.match('(a+)+$', f())"),
]


def test_values_that_explode_in_the_tests():
    """The candidate's value is small, what the test makes of it is not: T has limits too, and is replaced."""
    began = time.monotonic()
    results = sandbox.run_many(
        [
            dict(code=f"def f(): return {value}", tests=[test], entry_point="f", timeout=0.5)
            for value, test in EXPLODE
        ],
        workers=4,
    )
    for case, result in zip(EXPLODE, results):
        assert result.status in ("timeout", "memory"), (case, result)
    assert time.monotonic() - began < 25
    assert sandbox.run("def f(): return 1", ["assert f() == 1"], entry_point="f").passed


def test_tests_that_sleep_are_given_up():
    began = time.monotonic()
    result = sandbox.run(
        "def f(): return 1",
        ["import time\ntime.sleep(60)\nassert f() == 1"],
        entry_point="f",
        timeout=0.2,
    )
    assert result.status == "timeout" and time.monotonic() - began < 20


LEAKS = {
    "a patched module": (
        "import math\nmath.leak = 1",
        "import math\nassert not hasattr(math, 'leak')",
    ),
    "a patched builtin": ("__builtins__['abs'] = len", "assert abs(-3) == 3"),
    "the recursion limit": (
        "import sys\nsys.setrecursionlimit(70)",
        "import sys\nassert sys.getrecursionlimit() == 1000",
    ),
    "the precision of decimals": (
        "from decimal import *\ngetcontext().prec = 2",
        "from decimal import Decimal\nassert str(Decimal(1) / 3) == '0.' + '3' * 28",
    ),
    "memory": ("import math\nmath.leak = b'x' * (600 << 20)", "assert len(b'x' * (600 << 20)) > 1"),
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_judge_is_new_for_each_job(name):
    """What the tests of one job leave behind does not change the verdict of the next."""
    code = "import sys\ndef f(): return 1"
    leak, look = (test + "\nassert f() == 1" for test in LEAKS[name])
    jobs = [dict(code=code, tests=[test], entry_point="f") for test in (look, leak, look)]
    assert [result.passed for result in sandbox.run_many(jobs, 1)[::2]] == [True, True]


# ---- nothing passes from one program to the next


def test_no_state_from_the_program_before():
    sandbox.run(
        "import math, builtins, sys\nmath.pi = 3\nbuiltins.spy = 1\nsys.spy = 1\nimport solution\nsolution.spy = 1",
        ["import solution"],
    )
    assert inside(
        "import math, builtins, sys\ndef f(): return [math.pi > 3.1, hasattr(builtins, 'spy'), hasattr(sys, 'spy'), 'spy' in globals()]"
    ) == [True, False, False, False]


def test_tests_of_other_jobs_are_not_in_memory():
    word = "needle" + str(os.getpid())
    look = f"import gc, sys\ndef f():\n    w = chr(110) + 'eedle{os.getpid()}'\n    found = [o for o in gc.get_objects() if type(o) in (list, tuple, dict) and any(type(v) is str and w in v for v in (list(o.values()) if type(o) is dict else o))]\n    return len(found)"
    weak = "tests = ['assert f() == \"%s\"']\n" % word + look
    assert outside(weak) >= 1, "the look-out finds nothing: the test would not bite"
    sandbox.run("def f(): return 1", [f"assert f() == '{word}'"], entry_point="f")
    assert sandbox.run(look, [f"assert '{word}' != f() == 0"], entry_point="f").passed


def test_the_raw_memory_of_the_candidate_holds_no_expected_value():
    """All of U's heap, byte by byte, by ctypes: the expected value of its own test is nowhere."""
    code = """
import ctypes, gc
def f():
    word = bytes([n + 1 for n in b'@BCDE']).decode() + '%d'
    text, hits = word.encode(), 0
    for o in gc.get_objects():
        try: hits += ctypes.string_at(id(o), 64).count(text)
        except Exception: pass
    return hits
""" % os.getpid()
    assert sandbox.run(
        code, [f"assert f() == 0 and 'ACDEF{os.getpid()}' != f()"], entry_point="f"
    ).passed


def test_the_trial_of_the_walls_finds_a_hole(monkeypatch, capfd):
    """The trial at the start is known to bite: a wall taken away is reported."""
    monkeypatch.setitem(sandbox.PROBES, "network", "open('x', 'w')")
    monkeypatch.setattr(sandbox, "MISSING", None)
    sandbox.run("1", ["import solution"])
    assert (
        sandbox.MISSING == ["network"]
        and "not enforced on this machine: network" in capfd.readouterr().err
    )


@pytest.mark.parametrize("namespaces", [True, False])
def test_the_walls_hold_with_and_without_namespaces(namespaces, monkeypatch, tmp_path):
    """Files, network, signals, modes and sockets of the host are closed in each."""
    sandbox.close()
    monkeypatch.setattr(sandbox.Worker, "namespaces", namespaces)
    monkeypatch.setattr(sandbox, "MISSING", None)
    try:
        assert sandbox.run("def f(): return 1", ["assert f() == 1"], entry_point="f").passed
        assert not {
            "reading files outside",
            "writing files outside",
            "network",
            "signals to other processes",
            "memory",
            "new namespaces",
            "processes that leave their group",
            "host sockets",
            "capabilities",
            "modes and times of files outside",
        } & set(sandbox.MISSING)
        assert ("namespaces" in sandbox.MISSING) != sandbox.IDLE[0].layers["namespaces"]
        victim = tmp_path / "file"
        (
            victim.write_text("x"),
            os.chmod(victim, 0o640),
            os.utime(victim, (1, 1)),
            os.chmod(tmp_path, 0o777),
        )
        sandbox.run(
            f"import os\nfor spoil in (lambda p: os.chmod(p, 0), lambda p: os.utime(p, (9, 9)), lambda p: os.setxattr(p, 'user.x', b'y'), lambda p: os.chown(p, -1, os.getgid())):\n"
            f"    try: spoil({str(victim)!r})\n    except OSError: pass",
            ["import solution"],
        )
        assert (
            os.stat(victim).st_mode & 0o777,
            os.stat(victim).st_mtime,
            os.listxattr(victim),
        ) == (0o640, 1, [])
        beside = attempt(
            "[open(p + '/beside', 'w').close() for p in ('..', '../..', '/tmp')]"
        ).replace("def f():", "def f():\n    open('here', 'w').write('x')")
        assert inside(beside)[0] == "refused" or namespaces  # /tmp is the scratch there
        assert inside("import os\ndef f(): return os.listdir('.')") == []
    finally:
        sandbox.close()


def test_a_fork_loop_in_one_worker_is_not_felt_in_another():
    """Each worker's processes have a limit of their own."""
    if "number of processes" in (sandbox.MISSING or []):
        pytest.skip("the number of processes is not limited on this host")
    bomb = "import os, time\nfor _ in range(200):\n    try:\n        if os.fork() == 0: time.sleep(9)\n    except OSError: pass\ntime.sleep(1)\ndef f(): return 0"
    honest = "import threading, time\ndef f():\n    ts = [threading.Thread(target=time.sleep, args=(0.05,)) for _ in range(40)]\n    [t.start() for t in ts], [t.join() for t in ts]\n    return 1"
    jobs = [
        dict(code=code, tests=["assert f() == 1"], entry_point="f", timeout=2.0)
        for code in [bomb] + [honest] * 8
    ]
    assert [r.passed for r in sandbox.run_many(jobs, workers=2)] == [False] + [True] * 8


def test_memory_without_a_name_is_refused():
    assert outside(attempt("os.memfd_create('x')", "import os"))[0] == "done"
    assert inside(attempt("os.memfd_create('x')", "import os"))[0] == "refused"


def test_stdin_is_new_for_each_job():
    look = "import os\ndef f(): return [os.get_blocking(0), os.read(0, 9)]"
    before = inside(look)
    sandbox.run("import os\nos.set_blocking(0, False)\nos.close(0)", ["import solution"])
    assert inside(look) == before == [True, b""]


def test_files_that_come_and_go_leave_no_trace():
    """Times, inode numbers and counts of the scratch are the same whatever the job before has done there."""
    if not sandbox.IDLE[0].layers["namespaces"]:
        pytest.skip("without namespaces the scratch is a folder of the host")
    look = "import os\ndef f():\n    open('a', 'w')\n    s = os.statvfs('.')\n    return [os.stat('a').st_ino, s.f_ffree, s.f_bavail, len(os.listdir('.'))]"
    before = inside(look)
    spoil = "import os\nfor i in range(50):\n    open(f'x{i}', 'w').write('x' * 9999); os.remove(f'x{i}')"
    sandbox.run(spoil, ["import solution"])
    assert inside(look) == before


def test_children_that_hide_their_time_have_the_wall_limit():
    code = "import os, signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nif os.fork() == 0:\n    while True: pass\nos.wait()\ndef f(): return 1"
    result, seconds = timed(code, timeout=0.3)
    assert not result.passed and seconds < 6


def test_devices_carry_nothing_from_run_to_run():
    """Neither locks and flags of stderr's open file, which is no pipe here, nor times of devices."""
    code = (
        "import fcntl, os, struct\n"
        "def lock(fd, call, byte):\n"
        "    form = 'hhqqi4x'\n"
        "    answer = fcntl.fcntl(fd, call, struct.pack(form, fcntl.F_WRLCK, 0, byte, 1, 0))\n"
        "    return struct.unpack(form, answer)[0] != fcntl.F_UNLCK\n"
        "null = os.open('/dev/null', os.O_RDWR)\n"
        "seen = [byte for byte in range(20) if lock(null, fcntl.F_OFD_GETLK, byte)]\n"
        "print(seen, os.get_blocking(2), input())\n"
        "lock(2, fcntl.F_OFD_SETLK, 7)\n"
        "os.set_blocking(2, False)"
    )
    result = sandbox.run(code, [{"input": str(i), "output": f"[] True {i}"} for i in range(3)])
    assert result.passed, result
    for device in ("null", "zero", "random", "urandom"):
        status, error = inside(attempt(f"os.utime('/dev/{device}')", "import os"))[:2]
        assert status == "refused", (device, error)


def test_a_descriptor_on_its_way_does_not_stop_the_worker():
    """The output's end that a program has sent to the caller keeps the pipe open."""
    code = (
        "import array, os, socket\n"
        "for fd in range(3, 40):\n"
        "    try:\n"
        "        s = socket.socket(fileno=os.dup(fd))\n"
        "        s.sendmsg([b'1'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [1]))])\n"
        "        s.detach()\n"
        "    except OSError: pass\n"
        "print(4)"
    )
    start = time.monotonic()
    assert sandbox.run(code, [{"input": "", "output": "4"}], timeout=0.5).stdout == "4\n"
    assert time.monotonic() - start < 10


def test_output_is_not_in_the_memory_of_the_next_job():
    """It can be the expected output of a stdin test, which several programs are run against."""
    scan = (
        "import ctypes, os, sys\n"
        "left, right, found = b'printed', b'yesterday', 0\n"
        "keep = left + right if input() else None\n"
        "libc, (reader, writer) = ctypes.CDLL(None), os.pipe()\n"
        "big = ctypes.create_string_buffer(1 << 20)\n"
        "for place in id(sys.modules), id(keep), ctypes.addressof(big):\n"
        "    start = (place & -4096) - (24 << 20)\n"
        "    for page in range(start, start + (48 << 20), 4096):\n"
        "        if libc.write(writer, ctypes.c_void_p(page), 4096) == 4096:\n"
        "            before, _, after = os.read(reader, 4096).partition(left)\n"
        "            found += after.startswith(right)\n"
        "print(found > 0)\n"
    )
    printing = "print('printed' + 'yesterday')\nprint('x' * int(input()))"
    for size in (10, 100):
        first = sandbox.run(printing, [{"input": str(size), "output": ""}])
        assert first.stdout.startswith("printedyesterday"), first
        for kept, output in (("", "False"), ("keep", "True")):
            result = sandbox.run(scan, [{"input": f"{kept}\n", "output": output}], timeout=20.0)
            assert result.passed, result
