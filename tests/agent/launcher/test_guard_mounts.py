"""Of which mounts a session can change nothing, whatever their flags say."""

from __future__ import annotations

import pytest

from madang.agent.launcher.guard_mounts import Mount, _is_still, _parsed, mount_under

ROOT = b"20 1 0:44 / / ro,nosuid - tmpfs tmpfs rw"
USR = b"21 20 254:0 /usr /usr ro,nosuid - ext4 /dev/vda rw"
WORK = b"22 20 7:0 /work /work rw,nosuid - ext4 /dev/loop0 rw"


def still(line: bytes, *others: bytes) -> bool:
    mine = _parsed(line)
    return _is_still(mine, [mine, *map(_parsed, others)])


def test_a_mount_is_still_if_nothing_of_it_is_mounted_elsewhere() -> None:
    assert still(USR, ROOT, WORK, b"23 20 254:0 /srv/usr /x rw - ext4 /dev/vda rw")
    assert not still(WORK, ROOT, USR)


@pytest.mark.parametrize("root", [b"/", b"/usr", b"/usr/share/fonts"])
@pytest.mark.parametrize("flag", [b"ro", b"rw"])
def test_what_has_a_second_name_is_not_still(root: bytes, flag: bytes) -> None:
    assert not still(USR, b"23 20 254:0 %s /x %s - ext4 /dev/vda rw" % (root, flag))


def test_names_with_spaces_are_read() -> None:
    line = rb"24 20 254:0 /a\040b /c\040d ro shared:1 master:2 - ext4 /dev/vda rw"
    assert (_parsed(line).root, _parsed(line).path) == (b"/a b", b"/c d")


def test_a_path_lies_on_the_deepest_mount() -> None:
    root, usr, local = (Mount(3, path, still=True) for path in ("/", "/usr", "/usr/local"))
    mounts = [usr, root, local]

    assert mount_under(mounts, "/usr/local/bin") is local
    assert mount_under(mounts, "/usr") is usr
    assert mount_under(mounts, "/usrlocal") is root
