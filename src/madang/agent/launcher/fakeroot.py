"""Programs that believe they are root: package managers, for the most part.

A session with a *fake root* has a user namespace of its own, in which its one uid is called 0 and
there is no other. Nothing of what root may do outside comes with that name:

- Of the capabilities that the namespace gives it keeps one, CAP_DAC_OVERRIDE. The kernel lets that
  count for files whose owner *and* group exist in the namespace, which is: for the session's own,
  whose modes it could change anyway. No other namespace belongs to this one; mounts, network, host
  name and processes of the session were made before it, by somebody else.
- What would take more is answered with "done" by the system call filter, and nothing is done: to
  give files away, to become another user, to make device nodes. (Charliecloud's idea.) So every
  installed file is the session's own, which is what a layer keeps of it.

The base of the sandbox policy holds as in every session, new namespaces included.
"""

from __future__ import annotations

from typing import Final

from madang.agent.launcher import syscalls
from madang.agent.launcher.rootfs import IMAGES_ETC
from madang.wire.policy import BASE, Check, Look, Rule

CAPABILITIES: Final = (1,)
"""CAP_DAC_OVERRIDE."""
ENVIRONMENT: Final = {
    "USER": "root",
    "LOGNAME": "root",
    "APT_CONFIG": f"{IMAGES_ETC}/apt.conf",
}
_DEVICE_BIT: Final = 0o20000
"""Set in the types of character and block devices, and in no other that can be made."""
_DONE: Final = (
    "chown lchown fchown fchownat setuid setgid setreuid setregid setresuid setresgid setfsuid "
    "setfsgid setgroups capset"
)
_MADE: Final = {"mknod": 1, "mknodat": 2}
"""Call → the argument that has the file's type."""


def rules() -> tuple[Rule, ...]:
    """Calls that do nothing and answer 0."""
    done = Rule(layer=BASE, line=0, code=0, calls=tuple(_DONE.split()), why="a fake root's")
    made = (
        Rule(
            layer=BASE,
            line=0,
            code=0,
            calls=(call,),
            check=Check(argument=argument, test=Look.DENY_BITS, values=(_DEVICE_BIT,)),
            why="a fake root's",
        )
        for call, argument in _MADE.items()
    )
    return (done, *made)


def become(uid: int, *, nested: bool) -> None:
    """Be 0 in a user namespace of our own, where *uid*, ours outside, is the only one.

    *nested*: it is what we are already. Else we are root, and nobody has our new uid yet.
    """
    if not nested:
        syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 1)
        syscalls.change_user(uid)
        # Our own /proc files are closed to us until then; no program runs yet that could look.
        syscalls.keep_capabilities((syscalls.CAP_SYS_ADMIN,))
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)
    enter_user_namespace(0, uid)
    syscalls.drop_bounding_set(CAPABILITIES)
    syscalls.keep_capabilities(CAPABILITIES)


def enter_user_namespace(inside: int, uid: int) -> None:
    """*uid*, our only one, is called *inside* in a new namespace."""
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{inside} {uid} 1"),
        ("gid_map", f"{inside} {uid} 1"),
    ):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)
