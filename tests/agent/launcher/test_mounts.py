"""Images as sessions see them: layers over each other, the host's folders, nothing else."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from madang.testing.sessions import Launcher, Sessions, spec
from madang.wire.errors import RuntimeFailed
from madang.wire.kernel import ImageMount

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the privileged launcher")


def layer(launcher: Launcher, number: int, **files: str) -> str:
    digest = f"{number:064x}"
    folder = Path(launcher.state, "layers", digest)
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return digest


def image(*layers: str) -> ImageMount:
    return ImageMount(name="i", digest="d" * 64, kind="layers", layers=layers, env={"WHERE": "env"})


async def show(sessions: Sessions, mount: ImageMount, script: str) -> str:
    asked = spec("/bin/sh", "-c", script)
    asked = replace(asked, image=mount)
    kernel = await sessions.prepare(asked)
    await sessions.runtime.start(kernel, asked)
    done = await sessions.outcome(kernel)
    return (done.out + done.err).decode()


async def test_the_topmost_layer_wins(sessions: Sessions, launcher: Launcher) -> None:
    upper = layer(launcher, 1, a="upper", b="upper")
    lower = layer(launcher, 2, b="lower", c="lower")
    said = await show(sessions, image(upper, lower), "cd /env; cat a b c; echo $WHERE")
    assert said == "upperupperlowerenv\n"


async def test_two_versions_side_by_side(sessions: Sessions, launcher: Launcher) -> None:
    old, new = layer(launcher, 3, version="1"), layer(launcher, 4, version="2")
    base = layer(launcher, 5, base="b")
    for mine in (old, new):
        assert await show(sessions, image(mine, base), "cat /env/version") in {"1", "2"}
    assert await show(sessions, image(old, base), "cat /env/version") == "1"


async def test_one_layer_alone(sessions: Sessions, launcher: Launcher) -> None:
    assert await show(sessions, image(layer(launcher, 6, a="one")), "cat /env/a") == "one"


async def test_more_layers_than_a_page_of_names_holds(
    sessions: Sessions, launcher: Launcher
) -> None:
    """64 digits each: 300 would take 19 kB, a page of mount options has 4."""
    layers = [layer(launcher, 1000 + number, **{f"f{number}": "x"}) for number in range(300)]
    assert await show(sessions, image(*layers), "ls /env | wc -l") == "300\n"


async def test_layers_are_read_only(sessions: Sessions, launcher: Launcher) -> None:
    mine, other = layer(launcher, 7, a="a"), layer(launcher, 8, b="b")
    os.chmod(Path(launcher.state, "layers", mine), 0o777)
    said = await show(sessions, image(mine, other), "touch /env/x; mkdir /x /usr/x; touch /etc/x")
    assert said.count("Read-only file system") == 4


async def test_a_missing_layer_is_named_and_can_be_brought_later(
    sessions: Sessions, launcher: Launcher
) -> None:
    mount = image("f" * 64)
    asked = spec("/bin/cat", "/env/a")
    asked = replace(asked, image=mount)
    kernel = await sessions.prepare(asked)
    with pytest.raises(RuntimeFailed, match=r"ffffffff.*build the image again"):
        await sessions.runtime.start(kernel, asked)
    folder = Path(launcher.state, "layers", "f" * 64)
    folder.mkdir()
    (folder / "a").write_text("late")

    await sessions.runtime.start(kernel, asked)
    assert (await sessions.outcome(kernel)).out == b"late"


async def test_templates_that_nothing_uses_are_unmounted(
    sessions: Sessions, launcher: Launcher
) -> None:
    await show(sessions, image(layer(launcher, 9, a="a"), layer(launcher, 10, b="b")), "true")
    await sessions.close()
    left = list(Path(launcher.state, "mounts").glob("template-*"))
    assert [path.name for path in left if path.name != "template-host"] == []


async def test_a_build_sees_our_tools_and_others_do_not(
    sessions: Sessions, launcher: Launcher
) -> None:
    Path(launcher.state, "tools", "uv").write_text("tool")
    script = ("/bin/sh", "-c", "cat /madang/tools/uv; ls /madang/run")
    assert (await sessions.run(*script, build=True)).out == b"tool"
    assert (await sessions.run(*script)).out == b""


async def test_the_service_folder_is_the_agent_s_gift(sessions: Sessions) -> None:
    asked = spec("/bin/sh", "-c", "cat /madang/run/note; touch /madang/run/x")
    kernel = await sessions.prepare(asked)
    Path(sessions.runtime.kernel_dir(kernel), "service", "note").write_text("hi")
    await sessions.runtime.start(kernel, asked)
    done = await sessions.outcome(kernel)
    assert (done.out, done.code) == (b"hi", 1)


async def test_only_allowed_folders_of_the_host_are_seen(sessions: Sessions) -> None:
    done = await sessions.run("/bin/sh", "-c", "ls /; ls -A /root /srv /mnt /run /home")
    top = set(done.out.decode().partition("\n/")[0].split())
    assert top <= {
        *"bin dev env etc home lib lib32 lib64 libx32 madang mnt opt outputs proc root run".split(),
        *"sbin srv sys tmp usr var work".split(),
    }
    assert done.out.decode().split("/home:\n")[1].split("\n")[0] == "user"


async def test_the_session_knows_its_name_and_user(sessions: Sessions) -> None:
    script = "hostname; cat /etc/hostname; id -un; getent hosts calm-otter; stat -c %U /work; tty"
    done = await sessions.run("/bin/sh", "-c", script, hostname="calm-otter", tty=True)
    words = done.out.decode().split()
    assert words == [
        *("calm-otter", "calm-otter", "user", "127.0.0.1", "localhost", "calm-otter", "user"),
        "/dev/pts/0",
    ]


async def test_standard_files_can_be_opened_again(sessions: Sessions) -> None:
    """Scripts write to /dev/stderr; /proc/self/fd/N must let its owner in."""
    done = await sessions.run("/bin/sh", "-c", "echo a > /dev/stdout; echo b > /dev/stderr")
    assert (done.out, done.err) == (b"a\n", b"b\n")
