"""Files that a hostile session changes while the platform copies, lists, unpacks or removes them.

The session flips each name between a folder, a file and links to the host's files as fast as it
can; whatever the platform does meanwhile may fail in words, and never reaches the host.
"""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from madang.agent import files
from madang.agent.runtime.native import NativeRuntime
from madang.kit.clock import SystemClock
from madang.testing.sessions import PYTHON, Launcher, Sessions, open_launcher, sessions
from madang.wire.errors import PlatformError
from madang.wire.kernel import KernelId

RACE_S = 1.0
SECRET = b"precious: the host's"
FLIPPER = """
import os, sys, shutil
places = sys.argv[1:]
print("on", flush=True)
number = 0
while True:
    number += 1
    for name in ("folder", "folder/below", "file"):
        new = f"new-{number % 7}"
        try:
            kind = number % 4
            if kind == 0: os.mkdir(new)
            elif kind == 1: os.symlink(places[number // 4 % len(places)], new)
            elif kind == 2: os.symlink("../" * 12 + places[number // 4 % len(places)], new)
            else: open(new, "w").write("own")
            os.rename(name, "gone")
        except OSError: pass
        try: os.rename(new, name)
        except OSError: pass
        for old in (new, "gone"):
            try: os.unlink(old)
            except OSError: shutil.rmtree(old, ignore_errors=True)
"""


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with open_launcher() as started:
        yield started


@pytest.fixture
async def found(launcher: Launcher) -> AsyncIterator[Sessions]:
    runtime = NativeRuntime(launcher.socket, str(launcher.state), SystemClock())
    async with sessions(runtime, launcher) as opened:
        yield opened


@pytest.fixture
def host() -> Iterator[Path]:
    """A folder that everyone may read and write: nothing but the fence protects it."""
    with tempfile.TemporaryDirectory(prefix="madang-race-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "below").write_bytes(SECRET)
        (folder / "below").chmod(0o666)
        yield folder


Step = Callable[[Sessions, KernelId], Awaitable[bytes]]


async def get(found: Sessions, kernel: KernelId) -> bytes:
    data = b""
    for path in ("folder/below", "file"):
        with contextlib.suppress(PlatformError):
            sock = await found.runtime.files(kernel)
            async with aclosing(files.read_file(sock, path)) as items:
                async for item in items:
                    data += item if isinstance(item, bytes) else b""
    return data


async def get_all(found: Sessions, kernel: KernelId) -> bytes:
    data = b""
    for path in (".", "folder"):
        with contextlib.suppress(PlatformError):
            async with aclosing(files.read_tar(await found.runtime.files(kernel), path)) as chunks:
                async for chunk in chunks:
                    data += chunk
    return data


async def look(found: Sessions, kernel: KernelId) -> bytes:
    names = b""
    with contextlib.suppress(PlatformError):
        sock = await found.runtime.files(kernel)
        async with aclosing(files.list_files(sock, "folder", recursive=True)) as entries:
            async for entry in entries:
                names += SECRET if entry.size_bytes == len(SECRET) else b""
    return names


async def put(found: Sessions, kernel: KernelId) -> bytes:
    for path in ("folder/below", "file", "folder/new"):
        with contextlib.suppress(PlatformError):
            sock = await found.runtime.files(kernel)
            await files.write_file(sock, path, chunks(b"overwritten"))
    return b""


async def put_all(found: Sessions, kernel: KernelId) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("folder/below", "file", "folder/deep/new"):
            info = tarfile.TarInfo(name)
            info.size = 11
            tar.addfile(info, io.BytesIO(b"overwritten"))
    with contextlib.suppress(PlatformError):
        await files.write_tar(await found.runtime.files(kernel), ".", chunks(buffer.getvalue()))
    return b""


async def remove(found: Sessions, kernel: KernelId) -> bytes:
    for path in ("folder", "folder/below", "file"):
        with contextlib.suppress(PlatformError):
            await files.remove(await found.runtime.files(kernel), path)
    return b""


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


@pytest.mark.parametrize("step", [get, get_all, look, put, put_all, remove])
async def test_a_path_that_flips_never_leads_to_the_host(
    found: Sessions, host: Path, step: Step
) -> None:
    kernel = await found.start(*PYTHON, FLIPPER, str(host), f"{host}/below")
    await found.until(kernel, b"on")

    seen, late = b"", time.monotonic() + RACE_S
    while time.monotonic() < late:
        seen += await step(found, kernel)

    assert SECRET not in seen
    assert os.listdir(host) == ["below"]
    assert (host / "below").read_bytes() == SECRET


async def test_the_removal_of_a_session_that_flips_its_paths_spares_the_host(
    found: Sessions, host: Path
) -> None:
    for _ in range(5):
        kernel = await found.start(*PYTHON, FLIPPER, str(host), f"{host}/below")
        await found.until(kernel, b"on")
        await found.runtime.remove(kernel)

    assert (host / "below").read_bytes() == SECRET


async def test_hostile_names_stay_names(found: Sessions) -> None:
    """New lines, escape sequences and bytes that are no text, in what is listed and copied."""
    script = "import os; [open(n, 'w') for n in (b'a\\nb', b'\\x1b]0;x\\x07', b'\\xff', b'-rf')]"
    kernel = await found.start(*PYTHON, script + "; print('on', flush=True); input()", stdin=True)
    await found.until(kernel, b"on")

    sock = await found.runtime.files(kernel)
    async with aclosing(files.list_files(sock, ".")) as entries:
        listed = {entry.path async for entry in entries}

    assert listed == {"a%0Ab", "%1B]0;x%07", "%FF", "-rf"}
