"""Programs that believe they are root, and what the machine makes of it."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator

import pytest

from madang.agent.launcher import fakeroot, seccomp
from madang.testing.roots import FakeRootRuntime
from madang.testing.sessions import PYTHON, Launcher, Sessions, sessions
from madang.wire.policy import Sandbox, rules_of
from madang.wire.policy_base import BASE_RULES
from madang.wire.syscalls import numbers

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the privileged launcher")

LOOK = """
import ctypes, json, os
libc = ctypes.CDLL(None, use_errno=True)
def done(name, *arguments):
    return getattr(libc, name)(*arguments)
open("/mine", "w").close(); os.chmod("/mine", 0)
with open("/mine", "w") as file: file.write("x")
says = [done("setuid", 33), done("setgroups", 1, (ctypes.c_int * 1)(33))]
says.append(done("setresgid", 1, 1, 1))
says += [done("chown", b"/mine", 33, 33), done("mknod", b"/dev0", 0o20666, 0x103)]
status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines())
print(json.dumps({
    "says": says, "map": open("/proc/self/uid_map").read().split(), "setgroups":
    open("/proc/self/setgroups").read().strip(), "there": os.path.lexists("/dev0"),
    "owner": os.stat("/mine").st_uid, **{k: status[k] for k in ("Uid", "Gid", "Groups", "CapEff",
    "CapBnd", "NoNewPrivs", "Seccomp")}}))
"""


@pytest.fixture
async def rooted(launcher: Launcher) -> AsyncIterator[Sessions]:
    async with sessions(FakeRootRuntime(launcher), launcher) as found:
        yield found


@as_root
async def test_what_takes_power_is_said_to_be_done_and_is_not(rooted: Sessions) -> None:
    done = await rooted.python(LOOK)
    found = json.loads(done.out)
    assert found["says"] == [0] * 5
    assert (found["Uid"].split(), found["Gid"].split()) == (["0"] * 4, ["0"] * 4)
    assert (found["there"], found["owner"]) == (False, 0)
    assert found["map"][0] == "0" and int(found["map"][1]) > 1000 and found["map"][2] == "1"
    assert found["setgroups"] == "deny"
    assert {int(found["CapEff"], 16), int(found["CapBnd"], 16)} == {1 << 1}
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")


@as_root
async def test_its_files_belong_to_the_session_s_user_on_the_machine(rooted: Sessions) -> None:
    kernel = await rooted.start(
        *PYTHON, "open('/f', 'w'); print('on', flush=True); input()", stdin=True
    )
    await rooted.until(kernel, b"on")
    folder = rooted.runtime.kernel_dir(kernel)
    with open(f"{folder}/kernel.json") as file:
        record = json.load(file)
    assert record["uid"] > 1000
    status = await rooted.exec(kernel, "e", "/bin/cat", "/proc/self/uid_map")
    assert status.out.split()[:2] == [b"0", str(record["uid"]).encode()]


@as_root
@pytest.mark.parametrize(
    "path", ["/proc/sys/kernel/hostname", "/sys/x", "/etc/hosts", "/madang/run/x"]
)
async def test_what_is_not_its_own_stays_closed(rooted: Sessions, path: str) -> None:
    """The capability counts for its own files alone."""
    done = await rooted.python(f"open({path!r}, 'w').write('x')")
    assert done.code == 1
    assert b"Read-only file system" in done.err or b"Permission denied" in done.err


def test_no_other_call_is_answered_otherwise() -> None:
    """A fake root allows nothing that the base refuses."""
    for arch in ("x86_64", "aarch64"):
        answers = seccomp.answers(arch, (*rules_of(Sandbox(), BASE_RULES),
                                         *fakeroot.rules()))  # fmt: skip
        plain = seccomp.answers(arch)
        known = numbers(arch)
        named = {call for rule in fakeroot.rules() for call in rule.calls}
        for call, number in known.items():
            if call not in named:
                assert answers[number] == plain[number], call
        assert answers[known["setuid"]] == seccomp.ERRNO
        assert answers[known["mount"]] == plain[known["mount"]] != seccomp.ALLOW
