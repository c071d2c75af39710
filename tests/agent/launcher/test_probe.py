"""What the machine is said to hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from madang.agent.launcher import mounts, probe, syscalls
from madang.agent.launcher.network import rules
from madang.agent.launcher.network.networks import NetworkConfig
from madang.testing import world

IS_ROOT = os.geteuid() == 0
ORDINARY = 2_000_060_003

AS_USER = """
import dataclasses, json, sys
from madang.agent.launcher import probe
print(json.dumps([dataclasses.asdict(found) for found in probe.probe(sys.argv[1])]))
"""


def test_a_probe_names_everything_and_leaves_nothing(tmp_path: Path) -> None:
    before = Path("/proc/self/mounts").read_text()

    found = {finding.name: finding for finding in probe.probe(f"{tmp_path}/not/there")}

    assert {"kernel", "user", "namespaces", "overlay", "disk limit", "seccomp"} <= found.keys()
    assert all(finding.mend for finding in found.values() if not finding.ok)
    assert all(finding.level in {"ok", "warning", "error"} for finding in found.values())
    assert list(tmp_path.iterdir()) == []
    assert Path("/proc/self/mounts").read_text() == before
    # os.walk, because groups of sessions elsewhere on the machine come and go meanwhile.
    groups = {name for _, names, _ in os.walk("/sys/fs/cgroup") for name in names}
    assert f"madang-probe-{os.getpid()}" not in groups


def test_this_machine_has_a_root_that_sessions_can_leave() -> None:
    assert mounts.root_is_mount()


@pytest.mark.skipif(not IS_ROOT, reason="chroot needs root")
def test_a_chroot_is_told_with_the_way_out(tmp_path: Path) -> None:
    def look() -> None:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, b"/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        (tmp_path / "proc").mkdir()
        syscalls.mount(b"proc", os.fsencode(tmp_path / "proc"), b"proc")
        os.chroot(tmp_path)
        raise RuntimeError("a mount" if mounts.root_is_mount() else mounts.CHROOT_TEXT)

    assert mounts.CHROOT_TEXT in (probe.attempt(look) or "")


@pytest.mark.skipif(not IS_ROOT, reason="becoming another user needs root")
def test_an_ordinary_user_gets_the_way_to_more(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AS_USER, str(tmp_path)],
        user=ORDINARY, group=ORDINARY, extra_groups=[], capture_output=True, check=True,
        cwd="/", timeout=60,
    )  # fmt: skip
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}

    assert found["user"]["mend"] == "sudo madang up"
    assert found["disk limit"]["level"] == "warning"
    assert "python" not in found


def test_a_failing_trial_says_why_and_a_dying_one_does_not_hang() -> None:
    def refuse() -> None:
        raise PermissionError(1, "not here")

    assert probe.attempt(lambda: None) is None
    assert probe.attempt(refuse) == "not here"
    assert probe.attempt(lambda: os.kill(os.getpid(), 9)) == "the trial ended with -9"


@pytest.mark.parametrize(
    ("release", "machine", "level"),
    [
        ("6.1.0-18-amd64", "x86_64", "ok"),
        ("5.12", "aarch64", "ok"),
        ("5.10.0", "x86_64", "error"),
        ("4.19.0-25", "aarch64", "error"),
        ("6.1.0", "riscv64", "error"),
        ("6.6-rc1", "aarch64", "ok"),
    ],
)
def test_old_kernels_and_foreign_machines_are_refused(
    release: str, machine: str, level: str
) -> None:
    assert probe._kernel(release, machine).level == level


def test_a_clock_in_the_past_is_noticed() -> None:
    assert probe._clock(0).level == "warning"


# -- networks ------------------------------------------------------------------------------------

ALLOWED = NetworkConfig(modes=("none", "full"))


def test_networks_that_the_settings_forbid_need_nothing() -> None:
    found = probe._network("/nowhere", NetworkConfig())

    assert found.ok and "network.modes" in found.text


@pytest.mark.skipif(bool(world.missing()), reason=world.missing() or "it can")
def test_a_machine_that_can_give_networks_says_so() -> None:
    with world.open_world() as there, there.inside(there.machine):
        found = probe._network("/nowhere", ALLOWED)

        assert found.ok, found
        assert rules.in_force() == "", "the trial left nothing"


@pytest.mark.skipif(bool(world.missing()), reason=world.missing() or "it can")
def test_what_stands_in_the_way_of_networks_is_named_with_its_mend() -> None:
    with world.open_world(forwarding=False) as there, there.inside(there.machine):
        found = probe._network("/nowhere", ALLOWED)
        assert "does not forward" in found.text and "ip_forward=1" in found.mend

    with world.open_world() as there, there.inside(there.machine):
        chain = "chain FORWARD { type filter hook forward priority 0; policy drop;\n%s }"
        rules.load("table ip filter { %s\n}" % (chain % ""))
        found = probe._network("/nowhere", ALLOWED)
        assert "`ip filter` drop" in found.text and "DOCKER-USER" in found.mend

        rules.load(
            "delete table ip filter\ntable ip filter { %s\n}" % (chain % 'iifname "md*" accept\n')
        )
        assert probe._network("/nowhere", ALLOWED).ok
