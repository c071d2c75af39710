"""Whole roots of images: nothing of the host's, and what a session changes stays its own."""

from __future__ import annotations

import io
import os
import tarfile
from dataclasses import replace

import pytest

from madang.agent.files import read_changes
from madang.agent.launcher.offers import find
from madang.agent.layers import LayerStore
from madang.kit.clock import SystemClock
from madang.testing.roots import BUSYBOX, busybox_layer, root_image
from madang.testing.sessions import Launcher, Outcome, Sessions, spec
from madang.wire.errors import Conflict, InvalidRequest, RuntimeNotOffered
from madang.wire.kernel import ImageMount, KernelId
from madang.wire.rootlayer import RECORD, Meta
from madang.wire.session import RootMode

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the privileged launcher"),
    pytest.mark.skipif(not os.path.exists(BUSYBOX), reason="needs the package busybox-static"),
]


@pytest.fixture
def tiny(launcher: Launcher) -> ImageMount:
    digest = f"{os.urandom(32).hex()}"
    return root_image(busybox_layer(launcher.state, digest))


async def run(
    sessions: Sessions, image: ImageMount, script: str, root: RootMode = RootMode.READ_ONLY
) -> Outcome:
    asked = replace(spec("/bin/sh", "-c", script), image=image, root=root)
    kernel = await sessions.prepare(asked)
    await sessions.runtime.start(kernel, asked)
    return await sessions.outcome(kernel)


async def said(
    sessions: Sessions, image: ImageMount, script: str, root: RootMode = RootMode.READ_ONLY
) -> str:
    done = await run(sessions, image, script, root)
    return (done.out + done.err).decode()


async def test_nothing_of_the_host_is_seen(sessions: Sessions, tiny: ImageMount) -> None:
    found = await said(sessions, tiny, "ls /; ls /bin | wc -l; ls /usr")
    assert found.split()[:11] == "bin dev etc home madang outputs proc sys tmp var work".split()
    assert "No such file" in found


async def test_its_users_are_there_and_the_session_is_one(
    sessions: Sessions, tiny: ImageMount
) -> None:
    found = await said(sessions, tiny, "whoami; cat /etc/passwd; hostname; echo $SHELL")
    lines = found.splitlines()
    assert lines[0] == "user"
    assert "www:x:33:33::/:/bin/false" in lines
    assert len([line for line in lines if line.startswith("root:")]) == 1
    assert lines[-2:] == ["session", "/bin/sh"]


async def test_folders_of_the_session_can_be_written_and_the_root_not(
    sessions: Sessions, tiny: ImageMount
) -> None:
    script = "for d in /work /outputs /tmp /var/tmp /home/user /dev/shm; do echo x > $d/f; done"
    assert await said(sessions, tiny, f"{script}; echo done") == "done\n"
    refused = await said(sessions, tiny, "touch /x /etc/y /bin/z; mkdir /var/w")
    assert refused.count("Read-only file system") == 4


async def test_files_seem_to_be_root_s(sessions: Sessions, tiny: ImageMount) -> None:
    found = await said(sessions, tiny, "stat -c %u:%g / /bin /bin/busybox /etc; cat /etc/secret")
    assert found.splitlines()[:4] == ["0:0"] * 4
    assert "Permission denied" in found


async def test_links_of_an_image_lead_none_of_our_mounts_elsewhere(
    sessions: Sessions, launcher: Launcher, tiny: ImageMount
) -> None:
    bad = launcher.state / "layers" / os.urandom(32).hex()
    bad.mkdir()
    for name in ("work", "tmp", "var", "home", "dev", "proc", "sys", "madang", "outputs"):
        os.symlink("/bin", bad / name)
    (bad / "etc").mkdir()
    for name in ("passwd", "hosts", "resolv.conf", "hostname", "group"):
        os.symlink("/bin/busybox", bad / "etc" / name)
    image = root_image(bad.name, *tiny.layers)
    found = await said(sessions, image, "touch /work/x /tmp/y; id -un; busybox | head -1; ls /work")
    assert found.splitlines()[0] == "user"
    assert "BusyBox" in found
    assert found.splitlines()[-1] == "x"


async def test_whiteouts_and_opaque_folders_hide_what_lies_below(
    sessions: Sessions, launcher: Launcher, tiny: ImageMount
) -> None:
    top = launcher.state / "layers" / os.urandom(32).hex()
    (top / "etc").mkdir(parents=True)
    os.mknod(top / "etc/secret", 0o20000, 0)
    low = launcher.state / "layers" / os.urandom(32).hex()
    (low / "data").mkdir(parents=True)
    (low / "data/old").write_text("x")
    (top / "data").mkdir()
    os.setxattr(top / "data", "user.overlay.opaque", b"y")
    image = root_image(top.name, low.name, *tiny.layers)
    assert await said(sessions, image, "ls /etc /data") == (
        "/data:\n\n/etc:\ngroup\nhostname\nhosts\npasswd\nresolv.conf\n"
    )


async def test_exec_and_files_work_as_everywhere(sessions: Sessions, tiny: ImageMount) -> None:
    asked = replace(spec("/bin/sh", "-c", "echo up; sleep 100"), image=tiny)
    kernel = await sessions.prepare(asked)
    await sessions.runtime.start(kernel, asked)
    await sessions.until(kernel, b"up")
    done = await sessions.exec(kernel, "e1", "sh", "-c", "pwd; ls /bin/busybox")
    assert done.out == b"/work\n/bin/busybox\n"


async def test_a_writable_root_is_the_session_s_own(sessions: Sessions, tiny: ImageMount) -> None:
    script = (
        "rm /bin/true; echo new > /etc/secret; mkdir /opt; echo x > /opt/f; mv /bin/tee /opt/;"
        "ls /opt; cat /etc/secret; id -u; stat -c %U / /etc /bin/busybox /opt/f"
    )
    found = await said(sessions, tiny, script, RootMode.WRITABLE)
    assert found.splitlines()[:3] == ["f", "tee", "new"]
    assert found.splitlines()[4:] == ["user"] * 4
    assert "true" in await said(sessions, tiny, "ls /bin; ls /opt")  # Others see the image's.


async def test_its_disk_limit_holds_for_a_writable_root(
    sessions: Sessions, tiny: ImageMount
) -> None:
    script = "i=0; while cat /bin/busybox > /f$i; do i=$((i+1)); done; df /work | tail -1"
    found = await said(sessions, tiny, script, RootMode.WRITABLE)
    assert "No space left on device" in found


async def test_a_fake_root_believes(sessions: Sessions, tiny: ImageMount) -> None:
    script = (
        "id -u; whoami; touch /f; chown 33:33 /f && stat -c %u /f; mknod /n c 1 3 && echo made;"
        "test -e /n || echo none; chmod 0 /f; echo x > /f && cat /f;"
        "echo y:x:5:5::/: >> /etc/passwd; tail -1 /etc/passwd; mkfifo /p && ls /p; echo $APT_CONFIG"
    )
    found = (await said(sessions, tiny, script, RootMode.FAKE)).splitlines()
    assert found == [
        *("0", "root", "0", "made", "none"),
        *("x", "y:x:5:5::/:", "/p", "/madang/etc/apt.conf"),
    ]


async def test_only_whole_roots_are_changed(sessions: Sessions) -> None:
    with pytest.raises(InvalidRequest, match="no image of a whole root"):
        await sessions.prepare(replace(spec("true"), root=RootMode.FAKE))


async def changes(sessions: Sessions, kernel: KernelId) -> dict[str, tarfile.TarInfo]:
    """Of one kernel, by path; what a reader of tar makes of them."""
    sock = await sessions.runtime.changes(kernel)
    data = b"".join([chunk async for chunk in read_changes(sock)])
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {member.name: member for member in archive.getmembers()}


async def changed(
    sessions: Sessions, image: ImageMount, script: str, root: RootMode
) -> dict[str, tarfile.TarInfo]:
    asked = replace(spec("/bin/sh", "-c", script), image=image, root=root)
    kernel = await sessions.prepare(asked)
    await sessions.runtime.start(kernel, asked)
    assert (await sessions.outcome(kernel)).err == b""
    return await changes(sessions, kernel)


@pytest.mark.parametrize("root", [RootMode.WRITABLE, RootMode.FAKE])
async def test_changes_are_a_layer(sessions: Sessions, tiny: ImageMount, root: RootMode) -> None:
    script = (
        "echo x > /new; chmod 0 /new; ln /new /same; ln -s /proc /link; rm /bin/true;"
        "mkdir -p /d/e; chmod 4711 /bin/busybox; mkfifo /d/p; echo y > /work/w;"
        "echo z > /tmp/t; rm -r /etc/secret"
    )
    found = await changed(sessions, tiny, script, root)
    assert sorted(found) == [
        *("bin", "bin/.wh.true", "bin/busybox", "d", "d/e", "etc", "etc/.wh.secret"),
        *("link", "new", "same"),
    ]
    assert (found["new"].mode, found["new"].size, found["same"].linkname) == (0, 2, "new")
    assert found["link"].linkname == "/proc"
    assert {(member.uid, member.gid) for member in found.values()} == {(0, 0)}


async def test_a_folder_made_anew_hides_the_one_below(
    sessions: Sessions, launcher: Launcher, tiny: ImageMount
) -> None:
    low = launcher.state / "layers" / os.urandom(32).hex()
    (low / "data").mkdir(parents=True)
    (low / "data/old").write_text("x")
    image = root_image(low.name, *tiny.layers)
    script = "rm -r /data; mkdir /data; echo > /data/new"
    found = await changed(sessions, image, script, RootMode.WRITABLE)
    assert sorted(found) == ["data", "data/.wh..wh..opq", "data/new"]


async def test_a_layer_made_of_changes_gives_the_same_root(
    sessions: Sessions, launcher: Launcher, tiny: ImageMount
) -> None:
    script = "rm /bin/true; echo x > /etc/new; rm /etc/secret; mkdir /opt; ln -s /bin /opt/b"
    asked = replace(spec("/bin/sh", "-c", script), image=tiny, root=RootMode.FAKE)
    kernel = await sessions.prepare(asked)
    await sessions.runtime.start(kernel, asked)
    await sessions.outcome(kernel)
    data = b"".join([c async for c in read_changes(await sessions.runtime.changes(kernel))])
    store = LayerStore(str(launcher.state / "layers"), SystemClock())
    staged = store.stage_root(io.BytesIO(data), 1 << 30)
    store.commit([staged])
    look = "find /etc /opt | sort; ls /bin | wc -l; cat /etc/new"
    found = await said(sessions, root_image(staged.digest, *tiny.layers), look)
    assert found.splitlines()[-1] == "x"
    assert "/opt/b" in found
    assert "secret" not in found


async def test_a_true_mode_survives_and_a_forged_one_is_no_danger(
    sessions: Sessions, launcher: Launcher, tiny: ImageMount
) -> None:
    low = launcher.state / "layers" / os.urandom(32).hex()
    low.mkdir()
    for name, was in (
        ("suid", Meta(0o4711, 7, 8)),
        ("lie", Meta(0o4777)),
        ("fixed", Meta(0o444, 2**32 - 2, 9)),
    ):
        (low / name).write_text("x")
        (low / name).chmod(was.on_disk(folder=False))
        os.setxattr(low / name, RECORD, was.record())
    image = root_image(low.name, *tiny.layers)
    found = await changed(
        sessions, image, "touch /suid /lie /fixed; chmod 700 /lie", RootMode.WRITABLE
    )
    assert (found["suid"].mode, found["suid"].uid, found["suid"].gid) == (0o4711, 7, 8)
    assert (found["lie"].mode, found["lie"].uid) == (0o700, 0)
    fixed = found["fixed"]
    assert (fixed.mode, fixed.uid, fixed.gid) == (0o444, 2**32 - 2, 9)


async def test_without_a_root_of_its_own_nothing_was_changed(
    sessions: Sessions, tiny: ImageMount
) -> None:
    asked = replace(spec("/bin/sh", "-c", "true"), image=tiny)
    kernel = await sessions.prepare(asked)
    await sessions.runtime.start(kernel, asked)
    with pytest.raises(Conflict, match="no root of its own"):
        await sessions.runtime.changes(kernel)


@pytest.mark.parametrize("runtime", ["crun", "runc"])
async def test_other_runtimes_start_programs_in_it_too(
    sessions: Sessions, tiny: ImageMount, runtime: str
) -> None:
    if why := find(runtime)[1]:
        pytest.skip(f"{runtime}: {why}")
    script = "echo x > /new; ls /; cat /etc/passwd"
    asked = replace(spec("/bin/sh", "-c", script), image=tiny, runtime=runtime)
    kernel = await sessions.prepare(asked)
    await sessions.runtime.start(kernel, asked)
    done = await sessions.outcome(kernel)
    assert {"bin", "work", "madang", "www:x:33:33::/:/bin/false"} <= set(done.out.decode().split())
    assert "usr" not in done.out.decode().split()
    assert b"Read-only file system" in done.err


@pytest.mark.parametrize(
    ("runtime", "root"),
    [
        ("crun", RootMode.WRITABLE),
        ("runc", RootMode.FAKE),
        ("runsc", RootMode.READ_ONLY),
    ],
)
async def test_what_a_runtime_can_t_do_is_refused(
    sessions: Sessions, tiny: ImageMount, runtime: str, root: RootMode
) -> None:
    if why := find(runtime)[1]:
        pytest.skip(f"{runtime}: {why}")
    asked = replace(spec("true"), image=tiny, root=root, runtime=runtime)
    with pytest.raises(RuntimeNotOffered):
        await sessions.prepare(asked)
