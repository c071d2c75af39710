"""The store of content-addressed files."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from madang.storage import BlobStore
from madang.wire.api import WorkspaceFile, WorkspaceManifest
from madang.wire.errors import (
    InvalidRequest,
    PathInvalid,
    StorageFull,
    TooLarge,
    WorkspaceIncomplete,
)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


@pytest.fixture
async def store(tmp_path: Path) -> BlobStore:
    store = BlobStore(str(tmp_path / "blobs"))
    await store.open()
    return store


async def put(store: BlobStore, data: bytes, part: int = 100_000) -> str:
    pieces = [data[at : at + part] for at in range(0, len(data), part)]
    await store.put(sha(data), len(data), chunks(*pieces))
    return sha(data)


def manifest(*files: WorkspaceFile) -> WorkspaceManifest:
    return WorkspaceManifest(files=files)


def a_file(path: str, data: bytes) -> WorkspaceFile:
    return WorkspaceFile(path=path, kind="file", size_bytes=len(data), digest=sha(data))


def files_below(store: BlobStore, tmp_path: Path) -> list[str]:
    return [p.name for p in (tmp_path / "blobs").rglob("*") if p.is_file() and p.name != "boot"]


@pytest.mark.parametrize("size", [0, 1, 256 * 1024, 256 * 1024 + 1, 3_000_000])
async def test_what_is_put_can_be_fetched_read_only(store: BlobStore, size: int) -> None:
    data = os.urandom(size)

    path = Path(await store.fetch(await put(store, data)))

    assert path.read_bytes() == data
    assert path.stat().st_mode & 0o222 == 0


async def test_missing_names_each_blob_once_in_order(store: BlobStore) -> None:
    known = await put(store, b"known")
    one, two = sha(b"one"), sha(b"two")

    assert await store.missing([two, known, one, two]) == [two, one]


@pytest.mark.parametrize("size", [1000, 1_000_000])
async def test_content_that_is_not_as_announced_leaves_nothing(
    store: BlobStore, tmp_path: Path, size: int
) -> None:
    data = os.urandom(size)
    bad = (
        (sha(data), size + 1, data),
        (sha(data), size - 1, data),
        (sha(b"other"), size, data),
    )
    for digest, announced, content in bad:
        with pytest.raises(InvalidRequest):
            await store.put(digest, announced, chunks(content))

    assert files_below(store, tmp_path) == []


async def test_a_body_that_never_ends_is_given_up_at_its_announced_size(store: BlobStore) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65536

    for size in (10, 1_000_000):
        with pytest.raises(InvalidRequest):
            await store.put(sha(b"x"), size, endless())


async def test_a_sender_that_breaks_off_leaves_nothing(store: BlobStore, tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * 500_000
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        await store.put(sha(b"x" * 1_000_000), 1_000_000, broken())

    assert files_below(store, tmp_path) == []


async def test_many_may_put_the_same_blob_at_once(store: BlobStore, tmp_path: Path) -> None:
    for data in (os.urandom(1000), os.urandom(1_000_000)):
        await asyncio.gather(*(put(store, data) for _ in range(8)))
        assert Path(await store.fetch(sha(data))).read_bytes() == data

    assert len(files_below(store, tmp_path)) == 2


async def test_sizes_and_digests_are_checked_first(tmp_path: Path) -> None:
    store = BlobStore(str(tmp_path), max_blob_bytes=1000)
    await store.open()

    with pytest.raises(TooLarge):
        await store.put(sha(b""), 1001, chunks())
    for digest in ("", "x" * 64, "A" * 64, "../" + "a" * 61, "a" * 63, "a" * 64 + "\n"):
        with pytest.raises(InvalidRequest):
            await store.fetch(digest)
        with pytest.raises(InvalidRequest):
            await store.missing([digest])


async def test_a_manifest_is_the_same_whatever_the_order_of_its_files(store: BlobStore) -> None:
    one, two = a_file("a/one", b"1"), a_file("b", b"2")

    first = await store.put_manifest(manifest(one, two))

    assert await store.put_manifest(manifest(two, one)) == first
    assert (await store.get_manifest(first)).files == (one, two)


async def test_a_manifest_is_complete_once_all_its_blobs_are_here(store: BlobStore) -> None:
    digest = await store.put_manifest(manifest(a_file("x", b"x"), a_file("y", b"y")))
    await put(store, b"x")
    assert not await store.complete(digest)

    await put(store, b"y")

    assert await store.complete(digest)
    assert not await store.complete(sha(b"unknown"))


@pytest.mark.parametrize(
    "file",
    [
        a_file("/etc/passwd", b""),
        a_file("../x", b""),
        a_file("a/../../x", b""),
        a_file("a%00b", b""),
        a_file("", b""),
    ],
)
async def test_paths_that_lead_out_are_refused(store: BlobStore, file: WorkspaceFile) -> None:
    with pytest.raises(PathInvalid):
        await store.put_manifest(manifest(file))


@pytest.mark.parametrize(
    "files",
    [
        (a_file("x", b""), a_file("x", b"")),
        (a_file("x", b""), a_file("%78", b"")),
        (WorkspaceFile(path="x", kind="device"),),
        (WorkspaceFile(path="x", kind="file"),),
        (WorkspaceFile(path="x", kind="file", digest="x"),),
        (WorkspaceFile(path="x", kind="file", digest=sha(b""), size_bytes=-1),),
        (WorkspaceFile(path="x", kind="link"),),
    ],
)
async def test_manifests_that_make_no_sense_are_refused(
    store: BlobStore, files: tuple[WorkspaceFile, ...]
) -> None:
    with pytest.raises(InvalidRequest):
        await store.put_manifest(manifest(*files))


async def test_collection_takes_what_is_old_and_not_kept(store: BlobStore) -> None:
    kept, dropped = await put(store, b"kept"), await put(store, b"dropped")
    digest = await store.put_manifest(manifest(a_file("x", b"kept")))

    assert await store.collect([digest, sha(b"gone")], older_than_s=1000) == 0
    freed = await store.collect([digest, sha(b"gone")], older_than_s=-1)

    assert freed > 0
    assert await store.missing([kept, dropped, digest]) == [dropped]


async def test_asking_for_a_blob_saves_it_from_collection(store: BlobStore) -> None:
    digest = await put(store, b"old")
    path = await store.fetch(digest)
    os.utime(path, (0, 0))

    assert await store.missing([digest]) == []
    await store.collect([], older_than_s=1000)

    assert await store.missing([digest]) == []


async def test_a_blob_that_is_no_manifest_is_told_so(store: BlobStore) -> None:
    digest = await put(store, b"\xff not json")

    with pytest.raises(InvalidRequest):
        await store.get_manifest(digest)
    with pytest.raises(WorkspaceIncomplete):
        await store.get_manifest(sha(b"unknown"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.root
async def test_a_full_disk_is_said_and_leaves_nothing_half_done(small_disk: Path) -> None:
    store = BlobStore(str(small_disk))
    await store.open()
    kept = await put(store, os.urandom(1_000_000))

    with pytest.raises(StorageFull):
        await put(store, os.urandom(4_000_000))
    with pytest.raises(StorageFull):
        for _ in range(20):
            await put(store, os.urandom(200_000))

    assert list((small_disk / "tmp").iterdir()) == []
    assert await store.missing([kept]) == []


_WRITER = """
import asyncio, hashlib, os, sys
from madang.storage import BlobStore

async def main():
    store = BlobStore(sys.argv[1])
    await store.open()
    data = os.urandom(8_000_000)
    async def slow():
        for at in range(0, len(data), 100_000):
            yield data[at:at + 100_000]
            if at == 4_000_000:
                print("half", flush=True)
                await asyncio.sleep(60)
    await store.put(hashlib.sha256(data).hexdigest(), len(data), slow())

asyncio.run(main())
"""


async def test_a_writer_killed_in_the_middle_leaves_no_half_blob(tmp_path: Path) -> None:
    root = tmp_path / "blobs"
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, root], stdout=subprocess.PIPE)
    with writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"half\n"
        writer.send_signal(signal.SIGKILL)
    assert list((root / "tmp").iterdir())

    store = BlobStore(str(root))
    await store.open()

    assert files_below(store, tmp_path) == []


async def test_after_a_power_cut_damaged_blobs_are_dropped(
    store: BlobStore, tmp_path: Path
) -> None:
    old, whole, torn = [await put(store, data) for data in (b"old", b"whole", b"torn")]
    for digest, content in ((torn, b""), (old, b"damaged long ago: not looked at again")):
        path = tmp_path / "blobs" / digest[:2] / digest
        path.chmod(0o600)
        path.write_bytes(content)
    os.utime(tmp_path / "blobs" / old[:2] / old, (0, time.time() - 10_000))
    (tmp_path / "blobs" / "boot").write_text("another boot")

    again = BlobStore(str(tmp_path / "blobs"))
    await again.open()

    assert await again.missing([old, whole, torn]) == [torn]
