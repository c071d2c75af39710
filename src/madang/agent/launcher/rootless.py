"""Without root: a user namespace in which we are root of what is ours."""

from __future__ import annotations

import os
import pwd
import shutil
from typing import Final

from madang.agent.launcher import syscalls
from madang.wire.errors import HostLacks

_MOST_UIDS: Final = 65536


def enter() -> tuple[int, int]:
    """Become root of a new user namespace: (first uid for sessions, how many).

    Where ``newuidmap`` and ``/etc/subuid`` allow, sessions get uids of their own from 1 on; else
    there is only ours (how many: 0). Raises HostLacks where user namespaces are forbidden.
    """
    uid, gid = os.geteuid(), os.getegid()
    ranges = _subordinate(uid)
    start, go = os.pipe()
    helper = _fork_mapper(start, go, uid, gid, ranges) if ranges else 0
    try:
        syscalls.unshare(syscalls.CLONE_NEWUSER)
    except OSError as exc:
        raise HostLacks(
            "this kernel lets no ordinary user make user namespaces "
            f"({exc.strerror}). Start `madang up` as root, or allow them: "
            "`sysctl -w user.max_user_namespaces=65536` and, where they exist, "
            "`kernel.unprivileged_userns_clone=1`, "
            "`kernel.apparmor_restrict_unprivileged_userns=0`."
        ) from exc
    os.write(go, b"!")
    os.close(go)
    os.close(start)
    if helper and os.waitpid(helper, 0)[1] == 0:
        count = min(ranges[0][1], ranges[1][1], _MOST_UIDS) if ranges else 0
    else:
        count = 0
        _map_one(uid, gid)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    return 1, count


def rejoined() -> tuple[int, int]:
    """The same, for an older launcher's namespace that we have entered."""
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    with open("/proc/self/uid_map", encoding="ascii") as file:
        lines = [line.split() for line in file]
    return 1, sum(int(count) for first, _, count in lines if first != "0")


def _map_one(uid: int, gid: int) -> None:
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _subordinate(uid: int) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """First number and count of uids and gids that the administrator gave to this user."""
    if not (shutil.which("newuidmap") and shutil.which("newgidmap")):
        return None
    try:
        names = {str(uid), pwd.getpwuid(uid).pw_name}
    except KeyError:
        names = {str(uid)}
    uids, gids = _range("/etc/subuid", names), _range("/etc/subgid", names)
    return (uids, gids) if uids and gids else None


def _range(path: str, names: set[str]) -> tuple[int, int] | None:
    try:
        with open(path, encoding="ascii") as file:
            lines = [line.strip().split(":") for line in file]
    except OSError:
        return None
    for line in lines:
        if len(line) == 3 and line[0] in names and line[1].isdecimal() and line[2].isdecimal():
            return int(line[1]), int(line[2])
    return None


def _fork_mapper(
    start: int,
    go: int,
    uid: int,
    gid: int,
    ranges: tuple[tuple[int, int], tuple[int, int]],
) -> int:
    """A child that stays outside and writes our maps, once we are inside."""
    target = str(os.getpid())
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.close(go)
        if os.read(start, 1):
            code = 0
            for tool, own, (first, count) in (
                ("newuidmap", uid, ranges[0]),
                ("newgidmap", gid, ranges[1]),
            ):
                count = min(count, _MOST_UIDS)
                argv = [tool, target, "0", str(own), "1", "1", str(first), str(count)]
                code = code or os.spawnvp(os.P_WAIT, tool, argv)
    finally:
        os._exit(1 if code else 0)
