"""The kernel's walls around a process that runs somebody else's program.

A Python-level "sandbox" (deleted builtins, patched modules) is none: a few lines of ctypes leave it. Here every wall is
the kernel's, and irrevocable once up:

    namespaces   own users, mounts, network, processes, IPC: a file tree of the standard library and an empty scratch
                 folder of limited size, a network without a way out, no other process to see
    Landlock     reads the standard library, writes the scratch folder, opens no port, signals nobody outside
    seccomp      a list of harmless system calls; no sockets, no new processes, no ptrace, no keys, no io_uring
    rlimits      processor time, memory, file size, open files, threads

Each is enough against most attacks; together one may have a hole. Main failure mode: a wall that the system silently
lacks. `breaches` therefore tries to get out after the walls are up, and `sandbox.py` refuses where anything succeeds.

Only the standard library is imported: the module runs in workers that have nothing else. Sources: namespaces(7),
user_namespaces(7), landlock(7), seccomp(2), getrlimit(2); system call numbers from the kernel's headers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence

SCRATCH = "/box/scratch"
"""The only place a confined program can write to (where mount namespaces are to be had, else there is none)."""

_NEW_NS, _NEW_CGROUP, _NEW_UTS, _NEW_IPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
_NEW_USER, NEW_PID, _NEW_NET = 0x10000000, 0x20000000, 0x40000000
_READ_ONLY, _NO_SUID, _NO_DEV, _NO_EXEC, _REMOUNT = 1, 2, 4, 8, 32
_BIND, _REC, _PRIVATE = 4096, 16384, 1 << 18
_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    done = _libc.mount(
        source.encode(),
        target.encode(),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        options.encode() or None,
    )
    _checked(done, f"mount {target}")


# --- namespaces: set up once in a worker -----------------------------------------------------------------------------


def become_nobody(uid: int, keep_capabilities: bool) -> None:
    """Give up root for a user that owns nothing, but not, if so wanted, the capabilities in this namespace."""
    if keep_capabilities:
        _checked(_libc.prctl(28, 1 << 2, 0, 0, 0), "securebits")  # PR_SET_SECUREBITS, NO_SETUID_FIXUP
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    _libc.prctl(1, signal.SIGKILL, 0, 0, 0)


def enter_namespaces(nobody: int | None) -> None:
    """Leave every namespace of the machine but its time; the next child is process 1 of an own world.

    Args:
        nobody: given by root: another user that the namespace shall know, to become later.

    Raises:
        OSError: the system does not allow it.
    """
    uid, gid, me = os.getuid(), os.getgid(), os.getpid()
    reader, writer = os.pipe()
    helper = os.fork() if nobody is not None else None
    if helper == 0:  # only from outside may root map two users
        os.read(reader, 1)
        for name in ("gid_map", "uid_map"):
            _write(f"/proc/{me}/{name}", f"0 0 1\n{nobody} {nobody} 1\n")
        os._exit(0)
    everything = _NEW_USER | _NEW_NS | NEW_PID | _NEW_NET | _NEW_IPC | _NEW_UTS | _NEW_CGROUP
    try:
        _checked(_libc.unshare(everything), "unshare")
    finally:
        os.write(writer, b"x")
        os.close(writer)
        os.close(reader)
    if helper is None:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
    elif os.waitpid(helper, 0)[1] != 0:
        raise OSError(errno.EPERM, "the users of a namespace could not be set")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def enter_empty_root(visible: Sequence[str]) -> None:
    """Make a root folder with nothing in it but the `visible` folders (read-only), /dev/null and an empty SCRATCH.

    Packages inside a visible folder (`site-packages`) are hidden.
    """
    root = next(
        path
        for path in ("/sys", "/mnt", "/srv", "/opt")
        if os.path.isdir(path) and not any(folder.startswith(path) for folder in visible)
    )
    sources = [*visible, "/dev/null"]
    handles = [
        os.open(path, os.O_PATH) for path in sources
    ]  # what is visible may lie below the new root's place
    _mount("none", "/", None, _REC | _PRIVATE)
    _mount("root", root, "tmpfs", _NO_SUID | _NO_DEV, "size=1m,mode=755")
    for path, handle in zip(sources, handles, strict=True):
        inside = root + path
        if os.path.isdir(path) and path != "/dev/null":
            os.makedirs(inside)
        else:
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            os.close(os.open(inside, os.O_CREAT | os.O_WRONLY))
        _mount(f"/proc/self/fd/{handle}", inside, None, _BIND)
        # A namespace may not take back what its parent's mount forbids, so those flags are kept.
        kept = os.statvfs(inside).f_flag & (_NO_SUID | _NO_DEV | _NO_EXEC | 1024 | 2048)
        if path != "/dev/null":
            _mount("none", inside, None, _BIND | _REMOUNT | _READ_ONLY | kept)
            for packages in hidden_packages(inside):
                _mount("none", packages, "tmpfs", _READ_ONLY | _NO_SUID | _NO_DEV, "size=4k,mode=755")
        os.close(handle)
    os.makedirs(root + SCRATCH)
    _mount("none", root, None, _REMOUNT | _READ_ONLY | _NO_SUID | _NO_DEV, "size=1m,mode=755")
    os.chdir(root)
    _checked(
        _libc.syscall(ctypes.c_long(_PIVOT_ROOT), b".", b"."), "pivot_root"
    )  # the old root now lies on top
    _checked(_libc.umount2(b".", _DETACH), "umount")
    os.chdir("/")


def hidden_packages(folder: str) -> list[str]:
    """Return the folders of installed packages directly in a library folder."""
    return [
        os.path.join(folder, name)
        for name in ("site-packages", "dist-packages")
        if os.path.isdir(os.path.join(folder, name))
    ]


def next_child_in_own_processes() -> None:
    """Make the next child process 1 of a namespace of its own: whatever it starts dies with it."""
    _checked(_libc.unshare(NEW_PID), "unshare")


def next_child_in_my_processes(own_pidfd: int) -> None:
    """Undo `next_child_in_own_processes` for later children."""
    _checked(_libc.setns(own_pidfd, NEW_PID), "setns")


def mount_scratch(megabytes: int) -> None:
    """Give this process an empty SCRATCH that nobody else sees and that ends with it."""
    _checked(_libc.unshare(_NEW_NS), "unshare")
    flags = _NO_SUID | _NO_DEV | _NO_EXEC
    _mount("scratch", SCRATCH, "tmpfs", flags, f"size={megabytes}m,nr_inodes=1000,mode=700")
    os.chdir(SCRATCH)


def drop_capabilities() -> None:
    """Give up every capability, also those of this user namespace, for good."""
    for capability in range(64):
        if _libc.prctl(24, capability, 0, 0, 0) < 0:  # PR_CAPBSET_DROP: fails past the last, or without any
            break
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _checked(_libc.syscall(ctypes.c_long(_CAPSET), header, none), "capset")


def close_from(first: int) -> None:
    """Close all descriptors from `first` on, in one call where os.closerange may try a million."""
    _checked(_libc.syscall(ctypes.c_long(436), first, ctypes.c_uint(0xFFFFFFFF), 0), "close_range")


# --- limits, Landlock, seccomp: set up in every program --------------------------------------------------------------


def set_limits(
    memory_mb: int, cpu_seconds: int, file_mb: int, open_files: int, processes: int | None
) -> None:
    """Set limits that cannot be raised again. `processes` counts threads of this user (None: unlimited)."""
    # Process 1 of a namespace ignores the warning signal of the soft limit, so soft and hard are equal.
    for name, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_FSIZE, file_mb << 20),
        (resource.RLIMIT_NOFILE, open_files),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_STACK, 8 << 20),
    ):
        if value is not None:
            resource.setrlimit(name, (value, value))


_READ, _READ_FILE = 0b1100, 0b100  # READ_FILE, READ_DIR
_WRITE_ANY = 0b1 << 1 | 0b1100 | 0b11 << 4 | 0b11 << 7 | 1 << 10 | 0b111 << 12
"""Write, read, remove, make folders, files, fifos and links; never execute, devices or sockets."""


def landlock_version() -> int:
    """Return the version of the kernel's Landlock, 0 where there is none."""
    return max(0, _libc.syscall(ctypes.c_long(444), None, ctypes.c_size_t(0), ctypes.c_uint(1)))


def landlock_rules(visible: Sequence[str], scratch: bool) -> int | None:
    """Return a handle of rules that `landlock` applies; None where the kernel has no Landlock.

    Everything is forbidden but reading `visible` folders (without their packages), /dev/null, and SCRATCH.
    """
    version = landlock_version()
    if not version:
        return None
    files = (1 << (13, 13, 14, 15, 15, 16)[min(version, 5)]) - 1
    network = 0b11 if version >= 4 else 0
    signals_and_sockets = 0b11 if version >= 6 else 0
    attributes = struct.pack("QQQ", files, network, signals_and_sockets)
    size = 8 if version < 4 else 16 if version < 6 else 24
    handle = _checked(
        _libc.syscall(ctypes.c_long(444), attributes, ctypes.c_size_t(size), ctypes.c_uint(0)),
        "landlock_create_ruleset",
    )
    allowed = [("/dev/null", 0b110)]
    for folder in visible:
        if not os.path.isdir(folder):
            allowed.append((folder, _READ_FILE))
            continue
        packages = hidden_packages(folder)
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if path not in packages:
                allowed.append((path, _READ if os.path.isdir(path) else _READ_FILE))
    if scratch:
        # A rule on the scratch folder would be on what is mounted over; one on its parent holds, and the rest of the
        # parent is a read-only mount.
        allowed.append((os.path.dirname(SCRATCH), _WRITE_ANY & files))
    for path, access in allowed:
        try:
            target = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # what is not there, or not ours to read, stays forbidden
        rule = struct.pack("=Qi", access, target)
        _checked(
            _libc.syscall(ctypes.c_long(445), ctypes.c_int(handle), ctypes.c_int(1), rule, ctypes.c_uint(0)),
            f"landlock_add_rule {path}",
        )
        os.close(target)
    return handle


def landlock(handle: int | None) -> None:
    """Apply the rules to this process and its children."""
    _checked(_libc.prctl(38, 1, 0, 0, 0), "no_new_privs")
    if handle is not None:
        _checked(
            _libc.syscall(ctypes.c_long(446), ctypes.c_int(handle), ctypes.c_uint(0)),
            "landlock_restrict_self",
        )


# System calls a program may make: name, number on x86-64, number on aarch64 (- where it has none).
_CALLS = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, lseek 8 62, close 3 57,
openat 257 56, open 2 -, fstat 5 80, newfstatat 262 79, stat 4 -, lstat 6 -, statx 332 291, access 21 -,
faccessat 269 48, faccessat2 439 439, readlink 89 -, readlinkat 267 78, getdents64 217 61, getcwd 79 17, chdir 80 49,
fchdir 81 50, mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38,
renameat2 316 276, symlink 88 -, symlinkat 266 36, link 86 -, linkat 265 37, ftruncate 77 46, fsync 74 82,
fdatasync 75 83, flock 73 32, sendfile 40 71, umask 95 166, statfs 137 43, fstatfs 138 44, dup 32 23, dup2 33 -,
dup3 292 24, pipe 22 -, pipe2 293 59, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, epoll_create1 291 20,
epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, eventfd2 290 19, sendto 44 206, recvfrom 45 207,
shutdown 48 210, mmap 9 222, mprotect 10 226, munmap 11 215, mremap 25 216, madvise 28 233, brk 12 214,
mincore 27 232, msync 26 227, futex 202 98, set_robust_list 273 99, rseq 334 293, exit 60 93, exit_group 231 94,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, sigaltstack 131 132,
restart_syscall 219 128, nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114,
gettimeofday 96 169, time 201 -, times 100 153, alarm 37 -, setitimer 38 103, getitimer 36 102, getrusage 98 165,
sysinfo 99 179, uname 63 160, getrandom 318 278, getpid 39 172, gettid 186 178, getppid 110 173, getuid 102 174,
geteuid 107 175, getgid 104 176, getegid 108 177, getresuid 118 148, getresgid 120 150, getgroups 115 158,
getpgrp 111 -, getpgid 121 155, getsid 124 156, sched_yield 24 124, sched_getaffinity 204 123, getcpu 309 168,
getrlimit 97 163, setrlimit 160 164, close_range 436 436, copy_file_range 326 285, membarrier 324 283
"""
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_COLUMN, _AUDIT_ARCH = _MACHINES.get(platform.machine(), (0, 0))
_PIVOT_ROOT, _CAPSET = ((155, 126), (41, 91))[_COLUMN]
# judged by their arguments, same columns
_CLONE, _CLONE3, _FCNTL, _IOCTL, _PRLIMIT, _SOCKETPAIR = (
    pair[_COLUMN] for pair in ((56, 220), (435, 435), (72, 25), (16, 29), (302, 261), (53, 199))
)
_FCNTL_ALLOWED = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 36, 37, 38)
"""Duplicate, flags, locks. Not F_SETOWN, which sends signals to others, nor larger pipes."""

_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000


def seccomp_program() -> bytes:
    """Return the filter as BPF: what is not on the list fails with EPERM."""
    allow, forbid = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | errno.EPERM)

    def argument(index: int) -> tuple[int, int, int, int]:
        return (_LOAD, 0, 0, 16 + 8 * index)  # the low half: all arguments judged here are 32 bits wide

    def when(number: int, body: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
        return [(_EQUAL, 0, len(body), number), *body]

    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _AUDIT_ARCH), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    code += [(_AT_LEAST, 0, 1, 0x40000000), forbid]  # the other numbering of x86-64
    for entry in _CALLS.replace("\n", " ").split(","):
        number = entry.split()[1 + _COLUMN]
        if number != "-":
            code += when(int(number), [allow])
    # Threads, but no processes. The newer call hides its flags in memory: glibc falls back to the older one.
    code += when(_CLONE, [argument(0), (_AND, 0, 0, 0x10000), (_EQUAL, 0, 1, 0x10000), allow, forbid])
    code += when(_CLONE3, [(_RETURN, 0, 0, _ERRNO | errno.ENOSYS)])
    not_a_device = (_RETURN, 0, 0, _ERRNO | errno.ENOTTY)
    code += when(_IOCTL, [argument(1), (_EQUAL, 0, 1, 0x5421), allow, not_a_device])  # FIONBIO: not to wait
    commands = [line for command in _FCNTL_ALLOWED for line in ((_EQUAL, 0, 1, command), allow)]
    code += when(_FCNTL, [argument(1), *commands, forbid])
    code += when(_PRLIMIT, [argument(0), (_EQUAL, 0, 1, 0), allow, forbid])  # only its own limits
    unix_stream = [argument(0), (_EQUAL, 0, 4, 1), argument(1), (_AND, 0, 0, 0xF), (_EQUAL, 0, 1, 1), allow]
    code += when(_SOCKETPAIR, [*unix_stream, forbid])  # asyncio's own wake-up call
    code.append(forbid)
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def seccomp(program: bytes) -> None:
    """Allow this process and its children nothing but the listed system calls.

    Raises:
        OSError: the kernel has no seccomp filters, or the processor's calls are not known here.
    """
    if not _AUDIT_ARCH:
        raise OSError(errno.ENOSYS, f"no list of system calls for {platform.machine()}")
    buffer = ctypes.create_string_buffer(program, len(program))
    filter_program = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    _checked(_libc.prctl(22, 2, filter_program, 0, 0), "seccomp")


# --- do they hold? ---------------------------------------------------------------------------------------------------


def _ptrace() -> None:
    _checked(_libc.ptrace(0, 0, None, None), "ptrace")


def _fork() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def breaches(forbidden_file: str, memory_mb: int) -> list[str]:
    """Try to get out of the walls around this process; return what succeeded."""
    attempts: dict[str, Callable[[], object]] = {
        "read a file": lambda: os.open(forbidden_file, os.O_RDONLY),
        "list a folder": lambda: os.listdir(os.path.dirname(forbidden_file)),
        "write a file": lambda: os.open(forbidden_file, os.O_WRONLY),
        "open a network socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
        "open a local socket": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        "start a process": _fork,
        "start a program": lambda: os.execv(sys.executable, [sys.executable, "-c", ""]),
        "signal other processes": lambda: os.kill(os.getppid() or 1, 0),
        "take memory without limit": lambda: bytearray((memory_mb + 1) << 20),
        "raise a limit": lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)),
        "trace a process": _ptrace,  # last, for a traced process stops at the next signal
    }
    found = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except (OSError, MemoryError, ValueError):
            continue
        found.append(name)
    return found
