"""Whole roots through the real command line: a fake root, a session saved, a recipe on it."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from madang.testing.platform import Platform, start
from madang.testing.roots import APPLETS, BUSYBOX

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: whole roots are mounted"),
    pytest.mark.skipif(
        not os.path.exists(BUSYBOX), reason="busybox-static is missing: apt install busybox-static"
    ),
]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    folder = tmp_path_factory.mktemp("roots")
    folder.chmod(0o755)
    with start(folder, environment={"MADANG_NODE_CPU_OVERCOMMIT": "50"}) as made:
        yield made


def archive(path: Path) -> None:
    """The tar of a root with busybox."""
    with tarfile.open(path, "w") as tar:
        tar.add(BUSYBOX, "bin/busybox")
        for name in APPLETS:
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        text = b"root:x:0:0::/:/bin/sh\n"
        passwd = tarfile.TarInfo("etc/passwd")
        passwd.size = len(text)
        tar.addfile(passwd, io.BytesIO(text))


@pytest.mark.timeout(180)
def test_a_session_is_saved_and_a_recipe_goes_on(platform: Platform, tmp_path: Path) -> None:
    def madang(*words: str, code: int = 0) -> str:
        done = platform.madang(*words, cwd=tmp_path, timeout=120)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    archive(tmp_path / "tiny.tar")
    madang("image", "import", "tiny.tar", "tiny")
    madang("run", "--no-sync", "-d", "--name", "box", "--image", "tiny", "--root")
    changing = "id -u; chown 5:5 /etc/passwd; echo new > /etc/new; rm /bin/true"
    assert madang("exec", "box", "--", "sh", "-c", changing) == "0\n"
    assert "mine" in madang("commit", "box", "mine")
    looking = "cat /etc/new; ls /bin/true; touch /x"
    done = platform.madang("run", "--no-sync", "--image", "mine", "--", "sh", "-c", looking)
    assert done.stdout == "new\n"
    assert "No such file" in done.stderr
    assert "Read-only file system" in done.stderr

    (tmp_path / "more.toml").write_text(
        'base = "mine"\nrun = ["mkdir /opt; cat /etc/new > /opt/copy", "rm /etc/new"]\n'
        '[files]\n"/bin/hello" = """#!/bin/sh\necho hello $WHO\n"""\n[environment]\nWHO = "you"\n'
    )
    madang("image", "build", "more.toml")
    shown = madang("run", "--no-sync", "--image", "more", "--", "sh", "-c", "hello; cat /opt/copy")
    assert shown == "hello you\nnew\n"
    failing = tmp_path / "fails.toml"
    failing.write_text('base = "mine"\nrun = ["true", "echo broken >&2; exit 3"]\n')
    done = platform.madang("image", "build", "fails.toml", cwd=tmp_path, timeout=60)
    assert done.returncode != 0
    assert "step run 2 failed" in done.stderr
    assert "broken" in done.stdout + done.stderr
