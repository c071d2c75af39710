"""Packing, and unpacking what nobody should trust."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from madang.client import archive
from madang.wire.errors import FileFailed, FileMissing


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def member(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, mode
    return info


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_what_is_packed_can_be_unpacked(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep/er").mkdir(parents=True)
    (source / "deep/er/big").write_bytes(os.urandom(700_001))
    (source / "link").symlink_to("deep")
    (source / "program").write_text("#!")
    (source / "program").chmod(0o755)
    os.mkfifo(source / "pipe")
    with open(os.fsencode(source) + b"/\xff" + b"n" * 150, "wb"):
        pass

    done = archive.unpack(archive.packer([str(source)])(), str(tmp_path / "target"))

    target = tmp_path / "target/source"
    assert everything(target) == everything(source) - {"pipe"}
    assert (target / "deep/er/big").read_bytes() == (source / "deep/er/big").read_bytes()
    assert (target / "program").stat().st_mode & 0o777 == 0o755
    assert os.readlink(target / "link") == "deep"
    assert done.files == 3


def test_standard_tar_reads_what_we_pack(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("hello")

    data = b"".join(archive.packer([str(tmp_path / "a")], "renamed")())

    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == ["renamed"]
        file = tar.extractfile("renamed")
        assert file is not None
        assert file.read() == b"hello"


def test_a_missing_source_is_told_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(FileMissing, match="nothing"):
        archive.packer([str(tmp_path / "nothing")])


@pytest.mark.parametrize(
    "bad",
    [
        member("../escape"),
        member("a/../../escape"),
        member("link", tarfile.SYMTYPE, "/etc"),
        member("link", tarfile.SYMTYPE, "../outside"),
        member("a/link", tarfile.SYMTYPE, "../../outside"),
        member("hard", tarfile.LNKTYPE, "/etc/passwd"),
        member("device", tarfile.CHRTYPE),
        member("pipe", tarfile.FIFOTYPE),
    ],
)
def test_what_leads_out_is_left_out_and_named(tmp_path: Path, bad: tarfile.TarInfo) -> None:
    target = tmp_path / "deep/target"
    data = tar_of((bad, b""), (member("good"), b"x"))

    done = archive.unpack(iter([data]), str(target))

    assert everything(target) == {"good"}
    assert len(done.skipped) == 1
    assert everything(tmp_path) == {"deep", "deep/target", "deep/target/good"}


def test_links_that_lead_out_together_are_left_out(tmp_path: Path) -> None:
    """Each alone looks as if it stayed; the second goes up from where the first leads."""
    target = tmp_path / "deep/target"
    (tmp_path / "secret").write_text("mine")
    data = tar_of(
        (member("a/b/c", tarfile.DIRTYPE), b""),
        (member("a/b/c/top", tarfile.SYMTYPE, "../../.."), b""),
        (member("a/b/c/out", tarfile.SYMTYPE, "top/../../secret"), b""),
        (member("beside", tarfile.SYMTYPE, "./a/b"), b""),
    )

    done = archive.unpack(iter([data]), str(target))

    assert not (target / "a/b/c/out").exists()
    assert [name.partition(" (")[0] for name in done.skipped] == ["a/b/c/out"]
    assert (target / "a/b/c/top").resolve() == target
    assert (target / "beside").resolve() == target / "a/b"


def test_an_absolute_name_lands_inside(tmp_path: Path) -> None:
    archive.unpack(iter([tar_of((member("/etc/x"), b"1"))]), str(tmp_path / "t"))

    assert (tmp_path / "t/etc/x").read_text() == "1"


def test_links_that_were_there_before_are_not_followed(tmp_path: Path) -> None:
    outside, target = tmp_path / "outside", tmp_path / "target"
    outside.mkdir()
    target.mkdir()
    (target / "folder").symlink_to(outside)
    (target / "file").symlink_to(outside / "file")

    archive.unpack(iter([tar_of((member("file"), b"new"))]), str(target))
    with pytest.raises(FileFailed, match="can't be written here"):
        archive.unpack(iter([tar_of((member("folder/x"), b"bad"))]), str(target))

    assert everything(outside) == set()
    assert (target / "file").read_text() == "new"
    assert not (target / "file").is_symlink()


def test_set_uid_bits_are_dropped(tmp_path: Path) -> None:
    archive.unpack(iter([tar_of((member("su", mode=0o6777), b""))]), str(tmp_path / "t"))

    assert (tmp_path / "t/su").stat().st_mode & 0o7777 == 0o755


def test_a_stream_that_is_cut_is_an_error(tmp_path: Path) -> None:
    data = tar_of((member("a"), b"x" * 5000))[:2000]

    with pytest.raises(FileFailed, match="damaged"):
        archive.unpack(iter([data]), str(tmp_path / "t"))
