"""The file worker, as a real process with the session's uid, spoken to by its asyncio client."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from madang.agent import files
from madang.agent.launcher import scratch, syscalls
from madang.agent.launcher.files import FRAME, Frame
from madang.testing.patience import PATIENCE_S
from madang.wire.api import WorkspaceFile, WorkspaceManifest
from madang.wire.errors import (
    FileFailed,
    FileMissing,
    PathInvalid,
    PlatformError,
    WorkspaceIncomplete,
)
from madang.wire.link import FileEntry, FilesWritten
from madang.wire.paths import from_wire, to_wire

UID = 2_000_060_001
WORKER = """
import os, socket, sys
from madang.agent.launcher import files
files.serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
"""
IS_ROOT = os.geteuid() == 0


class Kernel:
    """A kernel's scratch space with a way to start file workers."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.workers: list[subprocess.Popen[bytes]] = []

    def __truediv__(self, path: str) -> Path:
        return self.root / path

    def worker(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            self.workers.append(
                subprocess.Popen(
                    [sys.executable, "-c", WORKER, str(theirs.fileno()), str(self.root)],
                    pass_fds=[theirs.fileno()],
                    user=UID if IS_ROOT else None,
                    group=UID if IS_ROOT else None,
                    extra_groups=[] if IS_ROOT else None,
                    env={"PYTHONPATH": os.pathsep.join(sys.path)},
                )
            )
        return ours

    def put(self, path: str, content: bytes = b"", mode: int = 0o644) -> Path:
        """A file of the session's own."""
        target = self.root / path
        for folder in reversed(target.relative_to(self.root).parents):
            if not (self.root / folder).exists():
                self.own(self.root / folder, make=True)
        target.write_bytes(content)
        target.chmod(mode)
        self.own(target)
        return target

    @staticmethod
    def own(path: Path, *, make: bool = False) -> Path:
        if make:
            path.mkdir()
        if IS_ROOT:
            os.chown(path, UID, UID, follow_symlinks=False)
        return path


@pytest.fixture
def folder() -> Iterator[Path]:
    """Workers have another uid, and pytest closes its own folders."""
    made = Path(tempfile.mkdtemp(prefix="madang-test-"))
    made.chmod(0o755)
    yield made
    scratch.remove_tree(str(made))


@pytest.fixture
def kernel(folder: Path) -> Iterator[Kernel]:
    """Folders as in scratch space."""
    made = Kernel(folder / "scratch")
    made.root.mkdir()
    for name, mode in scratch.FOLDERS.items():
        made.own(made.root / name, make=True).chmod(mode)
    yield made
    for worker in made.workers:
        worker.wait(PATIENCE_S)
        assert worker.returncode == 0


async def listing(kernel: Kernel, path: str, *, recursive: bool = False) -> list[FileEntry]:
    async with aclosing(files.list_files(kernel.worker(), path, recursive=recursive)) as entries:
        return [entry async for entry in entries]


async def content(kernel: Kernel, path: str, **range_: int) -> bytes:
    async with aclosing(files.read_file(kernel.worker(), path, **range_)) as items:
        return b"".join([item async for item in items if isinstance(item, bytes)])


async def archive(kernel: Kernel, path: str) -> bytes:
    async with aclosing(files.read_tar(kernel.worker(), path)) as chunks:
        return b"".join([chunk async for chunk in chunks])


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def tar_of(*members: tuple[str, dict[str, object], bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(mode="w", fileobj=out, format=tarfile.PAX_FORMAT) as tar:
        for name, fields, data in members:
            info = tarfile.TarInfo(name)
            for key, value in fields.items():
                setattr(info, key, value)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


async def test_a_written_file_reads_back_and_lists(kernel: Kernel) -> None:
    data = os.urandom(700_000)

    wrote = await files.write_file(
        kernel.worker(), "model/weights.bin", stream(data[:100], data[100:]), mode=0o640
    )

    assert wrote == FilesWritten(files=1, bytes=len(data))
    assert await content(kernel, "/work/model/weights.bin") == data
    assert await content(kernel, "model/weights.bin", start=699_990, length=5) == data[-10:-5]
    assert await content(kernel, "model/weights.bin", start=10**12) == b""
    (entry,) = await listing(kernel, "model")
    assert (entry.path, entry.kind, entry.size_bytes, entry.mode) == (
        "weights.bin", "file", len(data), 0o640,
    )  # fmt: skip


async def test_paths_are_the_ones_that_a_session_sees(kernel: Kernel) -> None:
    kernel.put("home/.bashrc", b"home")
    kernel.put("var_tmp/x", b"var")

    assert await content(kernel, "/home/user/.bashrc") == b"home"
    assert await content(kernel, "/var/tmp/x") == b"var"
    assert await content(kernel, "/work/../home/user/.bashrc") == b"home"
    with pytest.raises(FileMissing, match="outside"):
        await content(kernel, "/etc/passwd")
    with pytest.raises(FileMissing):
        await content(kernel, "../../../../etc/passwd")


async def test_a_file_lists_as_itself_and_a_missing_one_says_so(kernel: Kernel) -> None:
    kernel.put("outputs/plot.png", b"png")

    (entry,) = await listing(kernel, "/outputs/plot.png")
    assert (entry.path, entry.size_bytes) == ("plot.png", 3)
    assert (await files.stat_file(kernel.worker(), "/outputs")).kind == "dir"
    for failing in (listing(kernel, "nothing"), content(kernel, "nothing/there")):
        with pytest.raises(FileMissing, match="nothing"):
            await failing


async def test_a_recursive_list_has_folders_before_their_contents(kernel: Kernel) -> None:
    kernel.put("work/b/c/deep.txt", b"x")
    kernel.put("work/a", b"yy")
    os.symlink("../outside", kernel / "work/link")

    found = await listing(kernel, "/work", recursive=True)

    assert [entry.path for entry in found] == ["a", "b", "b/c", "b/c/deep.txt", "link"]
    assert (found[-1].kind, found[-1].target) == ("link", "../outside")


@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=20, unique=True))
async def test_any_name_survives_list_tar_and_untar(kernel: Kernel, names: list[bytes]) -> None:
    safe = {name.replace(b"\0", b"0").replace(b"/", b"_") for name in names} - {b".", b".."}
    source, target = kernel.root / "work/in", kernel.root / "work/out"
    for folder in (source, target):
        if folder.exists():
            scratch.remove_tree(str(folder))
        kernel.own(folder, make=True)
    for name in safe:
        fd = os.open(os.path.join(os.fsencode(source), name), os.O_CREAT | os.O_WRONLY, 0o644)
        os.write(fd, name)
        os.close(fd)

    listed = {from_wire(entry.path) for entry in await listing(kernel, "in")}
    await files.write_tar(kernel.worker(), "out", stream(await archive(kernel, "in")))

    assert listed == safe
    assert {os.fsencode(file.name): file.read_bytes() for file in target.iterdir()} == {
        name: name for name in safe
    }


async def test_a_tar_round_trip_keeps_modes_times_links_and_empty_folders(kernel: Kernel) -> None:
    script = kernel.put("work/src/run.sh", b"#!/bin/sh\n", mode=0o755)
    os.utime(script, ns=(10**18, 10**18))
    kernel.own(kernel / "work/src/empty", make=True)
    os.symlink("run.sh", kernel / "work/src/link")

    await files.write_tar(kernel.worker(), "/outputs/copy", stream(await archive(kernel, "src")))

    copy = kernel / "outputs/copy"
    assert stat.S_IMODE((copy / "run.sh").stat().st_mode) == 0o755
    assert (copy / "run.sh").stat().st_mtime == 10**9
    assert (copy / "empty").is_dir()
    assert os.readlink(copy / "link") == "run.sh"
    if IS_ROOT:
        assert (copy / "run.sh").stat().st_uid == UID


async def test_no_link_of_the_session_leads_out(kernel: Kernel, folder: Path) -> None:
    secret = folder / "secret"
    secret.write_text("host")
    secret.chmod(0o644)
    os.symlink(str(secret), kernel / "work/absolute")
    os.symlink("../../secret", kernel / "work/relative")
    os.symlink(str(folder), kernel / "work/folder")
    os.symlink("/proc/self/cwd", kernel / "work/magic")

    for path in ("absolute", "relative", "folder/secret", "magic/secret"):
        with pytest.raises(PlatformError):
            await content(kernel, path)
    with pytest.raises(PlatformError):
        await files.write_file(kernel.worker(), "folder/new", stream(b"x"))
    await files.write_file(kernel.worker(), "absolute", stream(b"mine"))

    assert secret.read_text() == "host"
    assert not (folder / "new").exists()
    assert (kernel / "work/absolute").read_bytes() == b"mine"


async def test_a_link_inside_the_session_is_followed_for_reading(kernel: Kernel) -> None:
    kernel.put("outputs/best.pt", b"weights")
    os.symlink("/outputs/best.pt", kernel / "work/best")
    os.symlink("best", kernel / "work/again")

    assert await content(kernel, "again") == b"weights"


async def test_loops_fifos_sockets_and_devices_do_no_harm(kernel: Kernel) -> None:
    kernel.put("work/d/file", b"data")
    os.symlink("loop", kernel / "work/d/loop")
    os.symlink(".", kernel / "work/d/self")
    os.mkfifo(kernel / "work/d/fifo", 0o666)
    if IS_ROOT:
        os.mknod(kernel / "work/d/zero", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.open(kernel / "work/d", os.O_PATH)
        listening.bind(f"/proc/self/fd/{here}/sock")
        os.close(here)

        for name in ("d/fifo", "d/sock", "d/loop"):
            with pytest.raises(FileFailed):
                await content(kernel, name)
        found = await listing(kernel, "d", recursive=True)
        with tarfile.open(fileobj=io.BytesIO(await archive(kernel, "d"))) as tar:
            names = tar.getnames()

    kinds = {entry.path: entry.kind for entry in found}
    assert (kinds["fifo"], kinds["sock"], kinds["loop"]) == ("other", "other", "link")
    assert names == ["file", "loop", "self"]


async def test_what_the_session_may_not_read_is_left_out(kernel: Kernel) -> None:
    if not IS_ROOT:
        pytest.skip("needs root to make files of others")
    (kernel / "work/theirs").mkdir()
    (kernel / "work/theirs").chmod(0o700)
    (kernel / "work/theirs/file").write_bytes(b"x")
    (kernel / "work/secret").write_bytes(b"x")
    (kernel / "work/secret").chmod(0o600)

    found = await listing(kernel, "/work", recursive=True)

    assert [entry.path for entry in found] == ["secret", "theirs"]
    with pytest.raises(FileFailed, match="Permission denied"):
        await content(kernel, "secret")
    with tarfile.open(fileobj=io.BytesIO(await archive(kernel, "/work"))) as tar:
        assert tar.getnames() == ["theirs"]


async def test_an_endless_nest_of_folders_is_an_error_and_can_be_removed(kernel: Kernel) -> None:
    at = os.open(kernel / "work", os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=at)
        if IS_ROOT:
            os.chown("d", UID, UID, dir_fd=at)
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)

    with pytest.raises(FileFailed, match="deeper"):
        await listing(kernel, "/work", recursive=True)
    await files.remove(kernel.worker(), "d")

    assert os.listdir(kernel / "work") == []


async def test_a_file_that_shrinks_meanwhile_keeps_the_archive_whole(kernel: Kernel) -> None:
    big = kernel.put("work/a_big", os.urandom(8 << 20))
    kernel.put("work/b_after", b"after")
    received = bytearray()

    async with aclosing(files.read_tar(kernel.worker(), "/work")) as chunks:
        async for chunk in chunks:
            if not received:
                os.truncate(big, 1000)
            received += chunk

    with tarfile.open(fileobj=io.BytesIO(received)) as tar:
        assert tar.getnames() == ["a_big", "b_after"]
        after = tar.extractfile("b_after")
        assert after is not None
        assert after.read() == b"after"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("../escape", {}),
        ("/tmp/escape", {}),
        ("a/../../escape", {}),
        ("ok", {"type": tarfile.LNKTYPE, "linkname": "../../etc/passwd"}),
    ],
)
async def test_an_archive_cannot_write_outside(
    kernel: Kernel, name: str, fields: dict[str, object]
) -> None:
    with pytest.raises(PathInvalid, match="leads out"):
        await files.write_tar(kernel.worker(), "in", stream(tar_of((name, fields, b""))))


async def test_an_archive_cannot_write_through_its_own_link(kernel: Kernel, folder: Path) -> None:
    target = folder / "open"
    target.mkdir()
    target.chmod(0o777)
    data = tar_of(
        ("link", {"type": tarfile.SYMTYPE, "linkname": str(target)}, b""),
        ("link/file", {}, b"out"),
    )

    with pytest.raises(PlatformError):
        await files.write_tar(kernel.worker(), "in", stream(data))

    assert list(target.iterdir()) == []


async def test_an_archive_makes_no_devices_and_no_setuid_files(kernel: Kernel) -> None:
    data = tar_of(
        ("su", {"mode": 0o6755}, b"x"),
        ("null", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}, b""),
        ("pipe", {"type": tarfile.FIFOTYPE}, b""),
        ("twin", {"type": tarfile.LNKTYPE, "linkname": "su"}, b""),
    )

    await files.write_tar(kernel.worker(), "in", stream(data))

    assert sorted(os.listdir(kernel / "work/in")) == ["su", "twin"]
    assert stat.S_IMODE((kernel / "work/in/su").stat().st_mode) == 0o755
    assert (kernel / "work/in/twin").stat().st_nlink == 2


@pytest.mark.parametrize("cut", [100, 512, 1500, 2047])
async def test_a_damaged_archive_is_an_error(kernel: Kernel, cut: int) -> None:
    data = tar_of(("one", {}, b"1" * 2000), ("two", {}, b"2" * 2000))

    with pytest.raises(FileFailed):
        await files.write_tar(kernel.worker(), "in", stream(data[:cut]))
    with pytest.raises(FileFailed):
        await files.write_tar(kernel.worker(), "in", stream(b"\xff" * 5000))


async def test_a_write_that_breaks_off_leaves_the_old_file(kernel: Kernel) -> None:
    kernel.put("work/model", b"old")

    async def breaking() -> AsyncIterator[bytes]:
        yield b"new"
        raise RuntimeError("the sender broke")

    with pytest.raises(RuntimeError):
        await files.write_file(kernel.worker(), "model", breaking())
    kernel.workers[0].wait(PATIENCE_S)

    assert (kernel / "work/model").read_bytes() == b"old"
    assert os.listdir(kernel / "work") == ["model"]


async def test_a_cancelled_reader_ends_its_worker(kernel: Kernel) -> None:
    kernel.put("work/big", bytes(32 << 20))
    started = asyncio.Event()

    async def read_slowly() -> None:
        async with aclosing(files.read_file(kernel.worker(), "big")) as items:
            async for _ in items:
                started.set()
                await asyncio.Event().wait()

    task = asyncio.create_task(read_slowly())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert kernel.workers[0].wait(PATIENCE_S) == 0


async def test_writing_where_a_folder_is_says_so(kernel: Kernel) -> None:
    kernel.put("work/folder/file")

    with pytest.raises(FileFailed, match="directory"):
        await files.write_file(kernel.worker(), "folder", stream(b"x"))
    with pytest.raises(PathInvalid):
        await files.write_file(kernel.worker(), "/work", stream(b"x"))
    with pytest.raises(PathInvalid):
        await files.remove(kernel.worker(), "/outputs")
    assert sorted(os.listdir(kernel / "work")) == ["folder"]


async def test_folders_are_made_and_removed(kernel: Kernel) -> None:
    await files.make_folder(kernel.worker(), "a/b/c", mode=0o700)
    await files.make_folder(kernel.worker(), "a/b/c", mode=0o700)
    assert stat.S_IMODE((kernel / "work/a/b/c").stat().st_mode) == 0o700

    await files.remove(kernel.worker(), "a")

    assert os.listdir(kernel / "work") == []
    with pytest.raises(FileMissing):
        await files.remove(kernel.worker(), "a")


class Blobs:
    """A blob source in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        (self.folder / digest).write_bytes(data)
        return digest

    def file(self, path: bytes, data: bytes, mode: int = 0o644) -> WorkspaceFile:
        return WorkspaceFile(
            path=to_wire(path),
            kind="file",
            mode=mode,
            size_bytes=len(data),
            modified_ns=1_700_000_000_123_456_789,
            digest=self.add(data),
        )

    async def fetch(self, digest: str) -> str:
        return str(self.folder / digest)


@pytest.fixture
def blobs(folder: Path) -> Blobs:
    (folder / "blobs").mkdir()
    return Blobs(folder / "blobs")


async def test_a_working_directory_is_put_in_with_modes_times_and_links(
    kernel: Kernel, blobs: Blobs
) -> None:
    large = os.urandom(3 << 20)
    manifest = WorkspaceManifest(
        files=(
            WorkspaceFile(path="data", kind="dir", mode=0o555, modified_ns=10**18),
            blobs.file(b"data/train.py", b"print(1)\n", 0o755),
            blobs.file(b"data/large", large),
            blobs.file(b"caf\xe9", b"", 0o4644),
            WorkspaceFile(path="latest", kind="link", target="data/large"),
            *(blobs.file(f"many/{n}".encode(), f"{n}".encode()) for n in range(700)),
        )
    )

    wrote = await files.materialise(kernel.worker(), manifest, blobs.fetch)

    work = os.fsencode(kernel / "work")
    assert wrote.files == 704
    assert (kernel / "work/data/large").read_bytes() == large
    assert os.stat(work + b"/data/train.py").st_mtime_ns == 1_700_000_000_123_456_789
    assert stat.S_IMODE(os.stat(work + b"/data").st_mode) == 0o555
    assert os.stat(work + b"/data").st_mtime == 10**9
    assert stat.S_IMODE(os.stat(work + b"/caf\xe9").st_mode) == 0o644
    assert os.readlink(work + b"/latest") == b"data/large"
    assert (kernel / "work/many/699").read_bytes() == b"699"


@pytest.mark.parametrize("path", ["../escape", "/etc/escape", "a/../../escape", "a//b", "."])
async def test_a_workspace_path_that_leads_out_is_refused(kernel: Kernel, path: str) -> None:
    manifest = WorkspaceManifest(files=(WorkspaceFile(path=path, kind="file"),))

    with pytest.raises(PathInvalid):
        await files.materialise(kernel.worker(), manifest, Blobs(kernel.root).fetch)


async def test_a_damaged_blob_is_noticed(kernel: Kernel, blobs: Blobs) -> None:
    file = blobs.file(b"a", b"whole")
    (blobs.folder / str(file.digest)).write_bytes(b"cut")

    with pytest.raises(WorkspaceIncomplete):
        await files.materialise(kernel.worker(), WorkspaceManifest(files=(file,)), blobs.fetch)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\x00",
        FRAME.pack(Frame.REQUEST, 0xFFFFFFFF),
        FRAME.pack(77, 0),
        FRAME.pack(Frame.DATA, 3) + b"abc",
        FRAME.pack(Frame.REQUEST, 2) + b"{}",
        FRAME.pack(Frame.REQUEST, 1) + b"{",
        FRAME.pack(Frame.REQUEST, 2) + b"[]",
        FRAME.pack(Frame.REQUEST, 29) + b'{"op":"read","path":"%2e%00"}',
        struct.pack("<BI", 0, 33) + b'{"op":"write","path":"x","mode":[]}'[:33],
    ],
)
async def test_a_worker_survives_a_client_that_talks_garbage(
    kernel: Kernel, garbage: bytes
) -> None:
    loop = asyncio.get_running_loop()
    with kernel.worker() as sock:
        sock.setblocking(False)
        await loop.sock_sendall(sock, garbage)
        sock.shutdown(socket.SHUT_WR)
        while await loop.sock_recv(sock, 4096):
            pass

    assert kernel.workers[0].wait(PATIENCE_S) == 0
    assert os.listdir(kernel / "work") == []


@contextmanager
def mounted_tmpfs(path: Path, size: str) -> Iterator[None]:
    path.mkdir()
    syscalls.mount(b"tmpfs", bytes(path), b"tmpfs", 0, f"size={size},mode=777".encode())
    try:
        yield
    finally:
        syscalls.umount(bytes(path))


@pytest.mark.root
@pytest.mark.parametrize(
    "write",
    [
        lambda k, data: files.write_file(k.worker(), "full/new", stream(data)),
        lambda k, data: files.write_tar(k.worker(), "full", stream(tar_of(("new", {}, data)))),
    ],
    ids=["file", "tar"],
)
async def test_a_full_disk_is_said_and_leaves_nothing_half(
    kernel: Kernel, write: Callable[[Kernel, bytes], asyncio.Future[FilesWritten]]
) -> None:
    if not IS_ROOT:
        pytest.skip("needs root to mount")
    with mounted_tmpfs(kernel / "work/full", "1m"):
        with pytest.raises(FileFailed, match="disk limit"):
            await write(kernel, os.urandom(4 << 20))
        assert os.listdir(kernel / "work/full") == []
