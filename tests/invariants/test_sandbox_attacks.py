"""Programs that attack the sandbox. Every attack must have run (it says so in its output) and none may succeed.

Each is run behind all walls of this system and again without namespaces, where Landlock and seccomp stand alone.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nurture.errors import NurtureError
from nurture.rewards import sandbox as sandbox_module
from nurture.rewards.sandbox import Job, Limits, Sandbox, SandboxResult, Walls, walls_here

LIMITS = Limits(wall_seconds=3, cpu_seconds=1, memory_mb=256, scratch_mb=4)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")


@pytest.fixture(scope="module", params=["all walls", "no namespaces"])
def box(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    os.environ["NURTURE_TEST_SECRET"] = "environment-secret"
    here = walls_here()
    if request.param == "no namespaces":
        if not here.landlock:
            pytest.skip("no Landlock here")
        here = Walls(namespaces=False, landlock=here.landlock, bubblewrap=False)
    elif not here.namespaces:
        pytest.skip("no namespaces here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox_module, "walls_here", lambda: here)
        with Sandbox(1, LIMITS) as sandbox:
            yield sandbox
    del os.environ["NURTURE_TEST_SECRET"]


@pytest.fixture
def secret(tmp_path: Path) -> Iterator[Path]:
    """A file that every user of the machine may read and write."""
    path = tmp_path / "secret.txt"
    path.write_text("file-secret")
    path.chmod(0o666)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == Path.home().owner() and str(folder).startswith(("/tmp/", "/var/tmp/")):
            folder.chmod(folder.stat().st_mode | 0o055)
    tmp_path.chmod(0o777)
    yield path
    assert path.read_text() == "file-secret"
    assert path.stat().st_mode & 0o777 == 0o666
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["secret.txt"]


PRELUDE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def attempt(name, attack):
    print("attempt", name, flush=True)
    try:
        result = attack()
    except BaseException as error:
        print("stopped", name, type(error).__name__, error, flush=True)
    else:
        print("SUCCESS", name, repr(result)[:200], flush=True)
"""


def run_attack(box: Sandbox, source: str) -> SandboxResult:
    """Run an attack; check that it began and that nothing it tried succeeded."""
    result = box.run(PRELUDE + textwrap.dedent(source))
    assert "attempt" in result.output, result
    assert "SUCCESS" not in result.output, result.output
    return result


def assert_stopped(box: Sandbox, source: str, *names: str) -> str:
    """The attack ran to its end, and the kernel refused each named attempt."""
    result = run_attack(box, source)
    assert result.status == "passed", result
    for name in names:
        assert f"stopped {name} " in result.output, result.output
    return result.output


def processes() -> set[str]:
    """Command lines of everything that runs on this machine."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found.add(f"{folder.name} {(folder / 'cmdline').read_text()}")
        except OSError:
            continue
    return found


# --- network ---------------------------------------------------------------------------------------------------------


def test_tcp_connection(box: Sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        assert_stopped(
            box,
            f"""
            import socket
            attempt("tcp", lambda: socket.create_connection(("127.0.0.1", {port}), timeout=1))
            """,
            "tcp",
        )
        with pytest.raises(TimeoutError):
            server.accept()


def test_udp_datagram(box: Sandbox):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(0.2)
        port = server.getsockname()[1]
        source = f"""
            import socket
            def send():
                return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"leak", ("127.0.0.1", {port}))
            attempt("udp", send)
            """
        assert_stopped(box, source, "udp")
        with pytest.raises(TimeoutError):
            server.recv(10)


def test_name_lookup(box: Sandbox):
    assert_stopped(
        box, 'import socket; attempt("lookup", lambda: socket.getaddrinfo("example.com", 80))', "lookup"
    )


def test_local_sockets_of_the_machine(box: Sandbox, tmp_path: Path):
    name = f"\0nurture-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        server.settimeout(0.2)
        source = f"""
            import socket
            def connect(kind):
                s = socket.socket(socket.AF_UNIX, kind); s.connect({name!r}); return s
            attempt("stream", lambda: connect(socket.SOCK_STREAM))
            attempt("datagram", lambda: connect(socket.SOCK_DGRAM))
            def pair():
                a, b = socket.socketpair(); a.close()
                return b.connect({name!r})
            attempt("pair", pair)
            attempt("datagram pair", lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
            """
        assert_stopped(box, source, "stream", "datagram", "pair", "datagram pair")
        with pytest.raises(TimeoutError):
            server.accept()


def test_sockets_without_python(box: Sandbox):
    assert_stopped(
        box,
        """
        number = 41 if os.uname().machine == "x86_64" else 198
        for family, kind in ((2, 1), (2, 3), (10, 1), (16, 3), (17, 3), (40, 1)):
            attempt(f"socket-{family}-{kind}", lambda: call(number, family, kind, 0))
        """,
        "socket-2-1",
        "socket-17-3",
        "socket-40-1",
    )


# --- files -----------------------------------------------------------------------------------------------------------


def test_read_system_files(box: Sandbox):
    assert_stopped(
        box,
        """
        for path in ("/etc/passwd", "/etc/shadow", "/etc/hostname", "/root/.bashrc", "/var/log/dpkg.log"):
            attempt(path, lambda: open(path).read())
        """,
        "/etc/passwd",
        "/etc/shadow",
    )


def test_read_home_and_this_file(box: Sandbox):
    home, here = str(Path.home()), str(Path(__file__).resolve())
    assert_stopped(
        box,
        f"""
        attempt("home", lambda: os.listdir({home!r}))
        attempt("expanded", lambda: os.listdir(os.path.expanduser("~root")))
        attempt("source", lambda: open({here!r}).read())
        attempt("root", lambda: [name for name in os.listdir("/") if name in ("etc", "home", "work")][0])
        """,
        "home",
        "source",
    )


def test_read_through_links(box: Sandbox, secret: Path):
    output = assert_stopped(
        box,
        f"""
        def by(link):
            link({str(secret)!r}, "link")
            return open("link").read()
        attempt("plain", lambda: open({str(secret)!r}).read())
        attempt("symlink", lambda: by(os.symlink))
        attempt("hardlink", lambda: by(os.link))
        attempt("dots", lambda: open("../../../../.." + {str(secret)!r}).read())
        attempt("bytes", lambda: os.open({str(secret)!r}.encode(), os.O_RDONLY))
        attempt("path only", lambda: os.read(os.open({str(secret)!r}, os.O_PATH), 10))
        """,
        "plain",
        "symlink",
        "hardlink",
        "dots",
    )
    assert "file-secret" not in output


def test_change_files_of_the_machine(box: Sandbox, secret: Path):
    assert_stopped(
        box,
        f"""
        path = {str(secret)!r}
        attempt("write", lambda: open(path, "w").write("changed"))
        attempt("append", lambda: open(path, "a").write("changed"))
        attempt("truncate", lambda: os.truncate(path, 0))
        attempt("delete", lambda: os.unlink(path))
        attempt("rename", lambda: os.rename(path, path + ".gone"))
        attempt("chmod", lambda: os.chmod(path, 0))
        attempt("chown", lambda: os.chown(path, 0, 0))
        attempt("utime", lambda: os.utime(path, (0, 0)))
        attempt("attribute", lambda: os.setxattr(path, "user.x", b"1"))
        attempt("create", lambda: open(path + ".new", "w"))
        attempt("mkdir", lambda: os.mkdir(path + ".dir"))
        """,
        "write",
        "truncate",
        "delete",
        "chmod",
        "create",
    )


def test_write_into_the_library(box: Sandbox):
    assert_stopped(
        box,
        """
        import random
        for place in (os.path.dirname(os.__file__), "/tmp", "/dev/shm", "/var/tmp", "/usr/lib", "/"):
            attempt(place, lambda: open(os.path.join(place, "sitecustomize.py"), "w").write("evil"))
        attempt("random", lambda: open(random.__file__, "a").write("evil"))
        """,
        "random",
        "/tmp",
        "/dev/shm",
    )
    assert not Path("/tmp/sitecustomize.py").exists()


def test_big_files(box: Sandbox):
    result = run_attack(
        box,
        """
        def grow():
            with open("big", "wb") as file:
                for _ in range(4):
                    file.write(b"x" * 900_000)
        attempt("big", grow)
        """,
    )
    assert "stopped big" in result.output


def test_many_files(box: Sandbox):
    result = run_attack(
        box,
        """
        def fill():
            for i in range(100):
                open(f"f{i}", "wb").write(b"x" * 500_000)
        def clutter():
            for i in range(100_000):
                open(f"n{i}", "wb").close()
        attempt("fill", fill)
        attempt("clutter", clutter)
        """,
    )
    assert "stopped fill" in result.output
    assert "stopped clutter" in result.output


def test_what_one_program_leaves_the_next_does_not_find(box: Sandbox):
    leave = """
        print("attempt")
        import json, builtins, random
        builtins.len = lambda x: 42
        json.dumps = lambda *a, **k: "forged"
        random.seed(7)
        for name in ("left", "deep"):
            try:
                os.mkdir(name); os.mkdir(name + "/inside"); os.symlink("/", name + "/root")
                open(name + "/inside/file", "w").write("x"); os.rmdir("/proc")
            except OSError as error:
                print(error)
        """
    look = """
        print("attempt")
        import json
        print(len("abc"), json.dumps([1]), os.listdir(".") if os.getcwd() != "/" else [])
        """
    run_attack(box, leave)
    result = run_attack(box, look)
    assert "3 [1] []" in result.output


def test_devices(box: Sandbox):
    assert_stopped(
        box,
        """
        for name in ("mem", "kmem", "vda", "sda", "tty", "ptmx", "kvm", "fuse", "nvidia0", "shm/x", "random"):
            attempt(name, lambda: os.open("/dev/" + name, os.O_RDWR | (os.O_CREAT if "/" in name else 0)))
        attempt("mknod", lambda: os.mknod("disk", 0o600 | 0o060000, os.makedev(8, 0)))
        attempt("ioctl", lambda: __import__("fcntl").ioctl(0, 0x5412, b"x"))
        """,
        "mem",
        "vda",
        "tty",
        "mknod",
        "ioctl",
    )


# --- other processes -------------------------------------------------------------------------------------------------


def test_fork_bomb(box: Sandbox):
    before = len(processes())
    assert_stopped(
        box,
        """
        def bomb():
            while True:
                os.fork()
        attempt("bomb", bomb)
        attempt("vfork", lambda: call(58 if os.uname().machine == "x86_64" else 220))
        attempt("clone", lambda: call(56 if os.uname().machine == "x86_64" else 220, 17, 0, 0, 0, 0))
        attempt("clone3", lambda: call(435, bytes(88), 88))
        """,
        "bomb",
        "clone",
        "clone3",
    )
    assert len(processes()) <= before + 8


def test_programs_of_the_machine(box: Sandbox):
    assert_stopped(
        box,
        """
        attempt("shell", lambda: __import__("subprocess").run("id", shell=True))
        attempt("pool", lambda: __import__("multiprocessing").get_context("fork").Process(target=print).start())
        attempt("system", lambda: 1 / (1 - bool(os.system("exit 0"))))
        attempt("exec", lambda: os.execv(sys.executable or "/usr/bin/python3", ["python", "-c", "print(1)"]))
        attempt("spawn", lambda: os.posix_spawn("/bin/sh", ["sh"], {}))
        def own():
            open("own.sh", "w").write("#!/bin/sh")
            os.chmod("own.sh", 0o755)
            return os.execv("./own.sh", ["own.sh"])
        attempt("own", own)
        """,
        "shell",
        "pool",
        "system",
        "exec",
        "spawn",
        "own",
    )


def test_daemons(box: Sandbox):
    before = processes()
    result = run_attack(
        box,
        """
        import signal, threading, time
        for number in range(1, 32):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        attempt("session", lambda: (os.setsid(), os.fork()))
        def stay():
            while True:
                time.sleep(0.1)
        threading.Thread(target=stay).start()
        print("attempt to stay", flush=True)
        """,
    )
    assert "attempt to stay" in result.output
    time.sleep(0.1)
    assert not {line for line in processes() - before if "worker.main" in line}


def test_many_threads(box: Sandbox):
    result = run_attack(
        box,
        """
        import threading, time
        def bomb():
            for count in range(1000):
                threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        attempt("threads", bomb)
        print("alive", threading.active_count())
        """,
    )
    assert "stopped threads" in result.output
    alive = int(result.output.split("alive ")[1].split()[0])
    assert alive <= LIMITS.threads + 3


def test_signals_to_others(box: Sandbox):
    me, worker = os.getpid(), box._pool[0].process.pid
    output = assert_stopped(
        box,
        f"""
        import signal
        for name, pid in (("parent", os.getppid() or 1), ("tests", {me}), ("worker", {worker}), ("all", -1), ("one", 1)):
            attempt(name, lambda: os.kill(pid, 9))
        attempt("group", lambda: os.killpg(0, 9))
        tgkill = 234 if os.uname().machine == "x86_64" else 131
        attempt("tgkill", lambda: call(tgkill, {me}, {me}, 9))
        attempt("pidfd", lambda: os.pidfd_open({me}))
        attempt("queue", lambda: call(129 if tgkill == 234 else 138, {me}, 9, bytes(128)))
        """,
        "parent",
        "tests",
        "all",
        "tgkill",
        "pidfd",
    )
    assert output.count("attempt") == 9
    assert box._pool[0].process.poll() is None


def test_signals_by_way_of_a_descriptor(box: Sandbox):
    assert_stopped(
        box,
        f"""
        reader, writer = os.pipe()
        number = 72 if os.uname().machine == "x86_64" else 25
        attempt("owner", lambda: call(number, reader, 8, {os.getpid()}))
        attempt("signal", lambda: call(number, reader, 10, 9))
        print("flags", call(number, reader, 1))
        """,
        "owner",
        "signal",
    )


def test_ptrace_and_foreign_memory(box: Sandbox):
    assert_stopped(
        box,
        f"""
        x86 = os.uname().machine == "x86_64"
        for name, pid in (("parent", os.getppid() or 1), ("tests", {os.getpid()})):
            attempt("attach " + name, lambda: call(101 if x86 else 117, 16, pid, 0, 0))
            attempt("seize " + name, lambda: call(101 if x86 else 117, 0x4206, pid, 0, 0))
            attempt("read " + name, lambda: call(310 if x86 else 270, pid, bytes(16), 1, bytes(16), 1, 0))
            attempt("write " + name, lambda: call(311 if x86 else 271, pid, bytes(16), 1, bytes(16), 1, 0))
        """,
        "attach parent",
        "read tests",
        "write parent",
    )


def test_proc(box: Sandbox):
    output = assert_stopped(
        box,
        f"""
        for name in ("self", "1", str(os.getppid()), "{os.getpid()}"):
            for file in ("environ", "cmdline", "maps", "mem", "fd", "root/etc/passwd", "cwd"):
                path = f"/proc/{{name}}/{{file}}"
                attempt(path, lambda: os.listdir(path) if file == "fd" else open(path, "rb").read(1))
        """,
        "/proc/self/environ",
        "/proc/self/mem",
        f"/proc/{os.getpid()}/environ",
    )
    assert output.count("stopped") == 28


def test_environment(box: Sandbox):
    result = run_attack(box, 'print("attempt", dict(os.environ), sys.argv)')
    assert result.status == "passed"
    assert "environment-secret" not in result.output
    assert "HOME" not in result.output
    assert "PATH" not in result.output


def test_inherited_descriptors(box: Sandbox):
    result = run_attack(
        box,
        """
        print("attempt")
        found = []
        for number in range(3, 2000):
            try:
                os.fstat(number)
                found.append(number)
            except OSError:
                pass
        print("open:", found)
        """,
    )
    assert "open: []" in result.output


# --- the kernel ------------------------------------------------------------------------------------------------------


def test_more_rights(box: Sandbox):
    output = assert_stopped(
        box,
        """
        attempt("setuid", lambda: os.setuid(0))
        attempt("setgid", lambda: os.setgid(0))
        attempt("namespaces", lambda: call(272 if os.uname().machine == "x86_64" else 97, 0x10000000))
        attempt("chroot", lambda: os.chroot("/"))
        attempt("mount", lambda: call(165 if os.uname().machine == "x86_64" else 40, b"x", b"/", b"proc", 0, None))
        attempt("nice", lambda: os.nice(-5))
        attempt("capset", lambda: call(126 if os.uname().machine == "x86_64" else 91, bytes(8), b"\\xff" * 24))
        print("user", os.getuid(), os.geteuid())
        """,
        "setuid",
        "namespaces",
        "chroot",
        "mount",
        "capset",
    )
    user = int(output.split("user ")[1].split()[0])
    assert user != 0
    if os.getuid() == 0:
        assert user >= 0x7000_0000


def test_raised_limits(box: Sandbox):
    assert_stopped(
        box,
        """
        import resource
        for name in ("AS", "CPU", "NPROC", "FSIZE", "NOFILE", "CORE"):
            number = getattr(resource, "RLIMIT_" + name)
            hard = resource.getrlimit(number)[1]
            attempt(name, lambda: resource.setrlimit(number, (hard + 1, hard + 1)))
        attempt("others", lambda: resource.prlimit(1, resource.RLIMIT_CPU, (0, 0)))
        """,
        "AS",
        "NPROC",
        "FSIZE",
        "others",
    )


def test_rarely_needed_system_calls(box: Sandbox):
    assert_stopped(
        box,
        """
        names = dict(io_uring=425, pidfd_getfd=438, userfaultfd=323, bpf=321, perf=298, keyctl=250, add_key=248,
                     memfd=319, mount_setattr=442, open_tree=428, fsopen=430, name_to_handle=303, kexec=246,
                     shmget=29, msgget=68, semget=64, mq_open=240, personality=135, quotactl=179, swapon=167,
                     reboot=169, init_module=175, syslog=103, acct=163, settime=164, process_madvise=440)
        if os.uname().machine == "x86_64":
            for name, number in names.items():
                attempt(name, lambda: call(number, 0, 0, 0, 0, 0, 0))
            attempt("x32", lambda: call(0x40000000 + 39))
        else:
            attempt("io_uring", lambda: call(425, 0, 0, 0, 0, 0, 0))
        """,
        "io_uring",
    )


# --- too much of everything ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "take",
    [
        "bytearray(2 << 30)",
        "[bytearray(1 << 20) for _ in range(10_000)]",
        "__import__('mmap').mmap(-1, 1 << 30)",
        "[__import__('mmap').mmap(-1, 1 << 20) for _ in range(10_000)]",
        "'x' * (1 << 40)",
    ],
)
def test_memory(box: Sandbox, take: str):
    result = run_attack(box, f'attempt("memory", lambda: {take})')
    assert "stopped memory" in result.output


def test_endless_output(box: Sandbox):
    result = run_attack(
        box,
        """
        print("attempt")
        while True:
            print("spam" * 1000)
        """,
    )
    assert not result.passed
    assert len(result.output) <= LIMITS.output_bytes


@pytest.mark.parametrize(
    "work",
    [
        "while True: pass",
        "__import__('time').sleep(60)",
        "9**9**9",
        "import re; re.match('(a+)+$', 'a' * 40 + 'b')",
    ],
)
def test_endless_work(box: Sandbox, work: str):
    result = run_attack(box, f'print("attempt", flush=True)\n{work}')
    assert result.status == "timeout"
    assert result.seconds < LIMITS.wall_seconds + 1


def test_deep_recursion(box: Sandbox):
    result = run_attack(
        box,
        """
        sys.setrecursionlimit(10**9)
        print("attempt", flush=True)
        class A:
            def __repr__(self): return repr([self])
        repr(A())
        """,
    )
    assert result.status in ("error", "timeout")
    assert box.run("print(1)").passed


def test_crash_of_the_interpreter(box: Sandbox):
    result = run_attack(box, 'print("attempt", flush=True)\nctypes.string_at(0)')
    assert result.status == "error"
    assert "SIGSEGV" in result.detail


def test_source_that_breaks_the_compiler(box: Sandbox):
    for source in ("(" * 100_000, "x=" + "-" * 1_000_000 + "1", "\0", "a" * (1 << 20), "\ud800"):
        assert box.run(source).status in ("error", "timeout")
    assert box.run("print(1)").passed


# --- the tests and the verdict ---------------------------------------------------------------------------------------

HIDDEN = "hidden-expected-value"
TABLE = (f"assert f(1) == '{HIDDEN}'",)
JUDGED = (f"assert f(1) in ['{HIDDEN}']",)


@pytest.fixture(params=[TABLE, JUDGED], ids=["compared", "judged"])
def tests(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return request.param


def attack_tests(box: Sandbox, source: str, tests: tuple[str, ...]) -> SandboxResult:
    """Run an attack on its own test, which an honest program passes."""
    assert box.run(f"def f(x):\n    return '{HIDDEN}'", tests, entry_point="f").passed
    result = box.run(PRELUDE + textwrap.dedent(source), tests, entry_point="f")
    assert "attempt" in result.output, result
    assert not result.passed
    return result


def test_search_for_the_expected_value_in_memory(box: Sandbox, tests: tuple[str, ...]):
    """All memory near any object is searched: the program's own text is found there, the expected value is not."""
    source = """
        import gc
        reader, writer = os.pipe()
        def memory():
            near = {id(o) >> 20 for o in gc.get_objects()} | {id(bytearray(n)) >> 20 for n in (10, 1000, 100_000)}
            for block in sorted({b + d for b in near for d in range(-3, 4)}):
                for page in range(256):  # the kernel says which pages there are by copying them, or not
                    if libc.write(writer, ctypes.c_void_p((block << 20) + page * 4096), ctypes.c_size_t(4096)) > 0:
                        yield os.read(reader, 4096)
        def f(x):
            print("attempt", flush=True)
            mark = b"".join([b"own-", b"mark"])
            halves = [(b"hidden-", b"expected-value"), (b"own-", b"mark-in-memory")]
            found, pages = set(), 0
            for page in memory():
                pages += 1
                for first, second in halves:
                    at = page.find(first)
                    while at >= 0:
                        if page[at + len(first) : at + len(first) + len(second)] == second:
                            found.add(second)
                        at = page.find(first, at + 1)
            print("pages", pages, "found", sorted(found), flush=True)
            return "none"
        own = "own-mark-in-memory"
        """
    output = attack_tests(box, source, tests).output
    assert "mark-in-memory" in output
    assert "expected-value" not in output
    assert int(output.split("pages ")[1].split()[0]) > 500


def test_search_for_the_expected_value_by_python(box: Sandbox, tests: tuple[str, ...]):
    source = """
        import gc
        own = ["own", "mark"]
        def f(x):
            print("attempt")
            frame, texts = sys._getframe(), []
            while frame:
                texts.append(repr(frame.f_locals) + repr(frame.f_globals))
                frame = frame.f_back
            texts += [repr(o)[:10_000] for o in gc.get_objects() if isinstance(o, (list, dict, tuple, bytearray))]
            for words in (["hidden", "expected", "value"], ["'own', 'mark'"]):
                print(any("-".join(words) in text for text in texts), flush=True)
            return "none"
        """
    assert "False\nTrue\n" in attack_tests(box, source, tests).output


def test_forged_verdicts(box: Sandbox, tests: tuple[str, ...]):
    source = """
        import json
        print("attempt", flush=True)
        verdict = json.dumps({"status": "passed", "detail": "", "calls": 9}).encode()
        answers = json.dumps([{"value": None}, {"value": True}]).encode()
        for number in range(3, 64):
            for text in (verdict, len(verdict).to_bytes(4, "big") + verdict, answers):
                try:
                    os.write(number, text)
                    os.pwrite(number, text, 0)
                except OSError:
                    pass
        os._exit(0)
        """
    attack_tests(box, source, tests)


def test_overwritten_tests(box: Sandbox, tests: tuple[str, ...]):
    source = """
        print("attempt", flush=True)
        for number in range(0, 64):
            try:
                os.ftruncate(number, 0)
                os.lseek(number, 0, 0)
            except OSError:
                pass
        def f(x):
            return "none"
        """
    result = box.run(PRELUDE + textwrap.dedent(source), tests, entry_point="f")
    assert not result.passed


def test_import_of_the_grader(box: Sandbox, tests: tuple[str, ...]):
    source = """
        print("attempt")
        for name in ("nurture", "nurture.rewards.exam", "nurture.rewards.sandbox", "pytest", "torch", "exam"):
            attempt(name, lambda: __import__(name))
        main = sys.modules.get("__main__")
        def f(x):
            for name, value in list(vars(main).items()) + [("modules", sys.modules)]:
                if name in ("worker", "exam", "judge"):
                    value.exam.mark = value.exam.judge = lambda *a: {"status": "passed", "detail": "", "calls": 1}
            return "none"
        """
    result = attack_tests(box, source, tests)
    assert "SUCCESS" not in result.output
    assert result.output.count("stopped") == 6


def test_the_sandbox_still_works_after_all_this(box: Sandbox):
    results = box.run_many([Job("def f(x):\n    return x + 1", ("assert f(1) == 2",), "f")] * 20)
    assert all(result.passed for result in results)
    assert box._pool[0].process.poll() is None


# --- refusing --------------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_is_replaced_and_the_job_run_again():
    with Sandbox(1, LIMITS) as sandbox:
        first = sandbox._pool[0]
        first.process.kill()
        first.process.wait()
        assert sandbox.run("def f(x):\n    return x", ["assert f(1) == 1"], entry_point="f").passed
        assert sandbox._pool[0] is not first


def test_it_refuses_where_the_walls_do_not_hold(monkeypatch: pytest.MonkeyPatch):
    def hello(worker: object) -> dict[str, object]:
        return {"breaches": ["read a file"], "landlock": 0}

    monkeypatch.setattr(sandbox_module._Worker, "hello", hello)
    walls_here.cache_clear()
    try:
        with pytest.raises(NurtureError, match=r"cannot confine a program.*a program could read a file"):
            walls_here()
    finally:
        walls_here.cache_clear()


def test_the_trial_of_the_walls_sees_when_there_are_none():
    """Outside any wall the same trial reports breaches, so an empty report means something."""
    program = (
        "import os; os.execv = lambda *a: None\n"
        "from nurture.rewards.walls import breaches\n"
        "print(breaches('/etc/passwd', 64))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/"
    )
    for name in ("read a file", "list a folder", "open a network socket", "start a process", "take memory"):
        assert name in done.stdout


def test_a_normal_user_gets_the_same_walls(tmp_path: Path):
    """The test suite may run as root; a user without any rights must be served as well."""
    python = "/usr/bin/python3"
    if os.getuid() != 0 or not Path(python).exists():
        pytest.skip("needs root, to become another user, and the system's Python")
    version = subprocess.run(
        [python, "-c", "import sys; print(sys.version_info >= (3, 10))"], capture_output=True
    )
    if b"True" not in version.stdout:
        pytest.skip("the system's Python is too old")
    package = tmp_path / "nurture"
    (package / "rewards").mkdir(parents=True)
    source = Path(sandbox_module.__file__).parent
    for name in ("__init__", "sandbox", "worker", "walls", "exam"):
        (package / "rewards" / f"{name}.py").write_text((source / f"{name}.py").read_text())
    for name in ("__init__", "errors"):
        (package / f"{name}.py").write_text((source.parent / f"{name}.py").read_text())
    program = (
        "import shutil\n"
        "from nurture.rewards import sandbox\n"
        "print(sandbox.walls_here())\n"
        "with sandbox.Sandbox(1) as s:\n"
        "    print(s.run('def f(x): return x', ['assert f(1) == 1'], entry_point='f').status)\n"
        "    print(s.run('open(\"/etc/passwd\")').status, s.run('import os; os.fork()').status)\n"
        "if shutil.which('bwrap'):\n"
        "    worker = sandbox._Worker(False, True, 256)\n"
        "    print(worker.hello()['breaches'])\n"
        "    worker.close()\n"
    )
    for folder in (tmp_path, *list(tmp_path.parents)[:-2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    done = subprocess.run(
        [python, "-c", program], cwd=tmp_path, user=65_534, group=65_534, extra_groups=[],
        env={"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "seccomp" in done.stdout
    inside_bubblewrap = ["[]"] if shutil.which("bwrap") else []
    assert done.stdout.splitlines()[1:] == ["passed", "error error", *inside_bubblewrap]
