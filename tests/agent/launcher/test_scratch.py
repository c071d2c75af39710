"""Scratch disks: real loop devices and mounts, in a mount namespace of this test's own."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from madang.agent.launcher import scratch, syscalls
from madang.agent.launcher.scratch import IMAGE, MOUNT, Pool
from madang.testing.patience import PATIENCE_S
from madang.wire.errors import RuntimeFailed, StorageFull
from madang.wire.size import GIB, MIB

UID = 2_000_060_002
IS_ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not IS_ROOT, reason="loop devices and mounts need root")


def loops_on(folder: Path) -> list[str]:
    """Loop devices whose file lies, or lay, in *folder*."""
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backing = path.read_text()
        except OSError:
            continue
        if backing.startswith(str(folder)):
            found.append(backing.strip())
    return found


def mounts_under(folder: Path) -> list[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if line.split()[1].startswith(str(folder))]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Checks afterwards that neither mount nor loop device is left."""
    (tmp_path / "pool").mkdir()
    yield tmp_path
    assert mounts_under(tmp_path) == []
    late = time.monotonic() + PATIENCE_S
    while loops_on(tmp_path) and time.monotonic() < late:
        time.sleep(0.01)  # A dead process's mount namespace goes in its own time.
    assert loops_on(tmp_path) == []


@pytest.fixture
def new_kernel(folder: Path) -> Callable[[], str]:
    def make() -> str:
        path = folder / f"kernel{len(list(folder.iterdir()))}"
        path.mkdir()
        return str(path)

    return make


@pytest.fixture
def pool(folder: Path) -> Iterator[Pool]:
    """Small ones, one kept ready."""
    made = Pool(f"{folder}/pool", default_bytes=64 * MIB, ready=1)
    yield made
    for path in folder.iterdir():
        made.release(str(path))
    made.sweep()


def fill(path: str, most: int) -> int:
    """Write zeros until the disk is full or *most*; bytes written."""
    written = 0
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        while written < most:
            written += os.write(fd, bytes(MIB))
        os.fsync(fd)
    except OSError as exc:
        assert exc.errno == errno.ENOSPC, exc
    finally:
        os.close(fd)
    return written


@needs_root
def test_a_session_gets_its_folders_and_no_more_than_its_size(
    pool: Pool, new_kernel: Callable[[], str]
) -> None:
    kernel = new_kernel()

    taken = pool.take(kernel, 16 * MIB, UID)

    assert taken.enforced == "quota"
    assert sorted(os.listdir(taken.path)) == ["home", "outputs", "tmp", "var_tmp", "work"]
    for name, mode in scratch.FOLDERS.items():
        found = os.stat(f"{taken.path}/{name}")
        assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (UID, UID, mode)
    assert 16 * MIB <= fill(f"{taken.path}/work/full", 64 * MIB) <= 17 * MIB
    used, total = scratch.usage(taken.path)
    assert used > 0.95 * total
    pool.remove(kernel)
    assert os.listdir(kernel) == []


@needs_root
@pytest.mark.parametrize("size", [4 * MIB, 100 * MIB, 500 * MIB, 2 * GIB, 10 * GIB, 500 * GIB])
def test_a_disk_holds_what_was_asked_and_hardly_more(
    pool: Pool, new_kernel: Callable[[], str], size: int
) -> None:
    kernel = new_kernel()
    found = os.statvfs(pool.take(kernel, size, UID).path)
    usable = found.f_bavail * found.f_frsize
    on_disk = os.stat(f"{kernel}/{IMAGE}").st_blocks * 512
    pool.remove(kernel)

    assert size <= usable <= 1.02 * size + MIB
    assert on_disk < 2 * MIB + size // 50_000


@needs_root
def test_the_mount_is_nosuid_and_nodev(pool: Pool, new_kernel: Callable[[], str]) -> None:
    path = pool.take(new_kernel(), 8 * MIB, UID).path
    flags = os.statvfs(path).f_flag
    assert flags & os.ST_NOSUID
    assert flags & os.ST_NODEV


@needs_root
def test_a_ready_disk_is_taken_and_made_again(
    pool: Pool, folder: Path, new_kernel: Callable[[], str]
) -> None:
    pool.refill()
    assert pool.missing() == 0
    (ready,) = (folder / "pool").glob("ready-*")
    inode = (ready / IMAGE).stat().st_ino

    kernel = new_kernel()
    pool.take(kernel, 64 * MIB, UID)

    assert os.stat(f"{kernel}/{IMAGE}").st_ino == inode
    assert os.path.ismount(f"{kernel}/{MOUNT}")
    assert list((folder / "pool").glob("ready-*")) == []
    assert pool.missing() == 1


@needs_root
def test_disks_copied_from_one_template_are_sound_and_share_nothing(
    pool: Pool, new_kernel: Callable[[], str]
) -> None:
    """One that was made ahead, and one that was not."""
    pool.refill()
    kernels = [new_kernel(), new_kernel()]
    paths = [pool.take(kernel, pool.default_bytes, UID).path for kernel in kernels]
    for path in paths:
        assert os.listdir(f"{path}/work") == []
        Path(path, "work/own").write_bytes(os.urandom(8 * MIB))
        assert os.statvfs(path).f_bavail * os.statvfs(path).f_frsize >= pool.default_bytes - 9 * MIB

    for kernel in kernels:
        pool.release(kernel)
        image = f"{kernel}/{IMAGE}"
        assert subprocess.run(["/sbin/e2fsck", "-fn", image], capture_output=True).returncode == 0


@needs_root
def test_taking_again_changes_nothing(pool: Pool, new_kernel: Callable[[], str]) -> None:
    kernel = new_kernel()
    first = pool.take(kernel, 8 * MIB, UID)
    Path(first.path, "work/result").write_text("kept")
    os.chown(f"{first.path}/tmp", 5, 5)

    assert pool.take(kernel, 999 * MIB, UID + 1) == first

    assert Path(first.path, "work/result").read_text() == "kept"
    assert os.stat(f"{first.path}/tmp").st_uid == 5


@needs_root
def test_an_empty_folder_of_a_killed_helper_is_no_disk(
    pool: Pool, new_kernel: Callable[[], str]
) -> None:
    kernel = new_kernel()
    os.mkdir(f"{kernel}/{MOUNT}")
    assert pool.take(kernel, 8 * MIB, UID).enforced == "quota"


@needs_root
def test_files_outlive_release_until_removed(
    pool: Pool, folder: Path, new_kernel: Callable[[], str]
) -> None:
    kernel = new_kernel()
    Path(pool.take(kernel, 8 * MIB, UID).path, "outputs/model").write_bytes(b"weights")

    pool.release(kernel)
    pool.release(kernel)
    assert mounts_under(folder) == []
    assert loops_on(folder) == []

    again = pool.mount_again(kernel)
    assert Path(again.path, "outputs/model").read_bytes() == b"weights"
    pool.remove(kernel)
    pool.remove(kernel)
    with pytest.raises(RuntimeFailed, match="no scratch"):
        pool.mount_again(kernel)


@needs_root
def test_a_busy_disk_is_released_without_waiting(pool: Pool, new_kernel: Callable[[], str]) -> None:
    kernel = new_kernel()
    with open(f"{pool.take(kernel, 8 * MIB, UID).path}/work/open", "wb") as file:
        pool.release(kernel)
        file.write(b"still fine")
        assert not os.path.ismount(f"{kernel}/{MOUNT}")


LATE_WRITER = "echo in; read line; echo $line > late"


@needs_root
def test_a_disk_that_is_mounted_elsewhere_shares_its_device(
    pool: Pool, folder: Path, new_kernel: Callable[[], str]
) -> None:
    """Two loop devices over one file would destroy it: as after a launcher's restart."""
    kernel = new_kernel()
    path = pool.take(kernel, 8 * MIB, UID).path
    hold = subprocess.Popen(
        [*("unshare", "-m", "--propagation", "private", "sh", "-c"), LATE_WRITER],
        cwd=f"{path}/work",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert hold.stdout is not None
    assert hold.stdout.readline() == b"in\n"
    pool.release(kernel)
    assert len(loops_on(folder)) == 1

    again = pool.mount_again(kernel).path
    hold.communicate(b"written by the old one\n", timeout=PATIENCE_S)

    assert len(loops_on(folder)) == 1
    assert Path(again, "work/late").read_text() == "written by the old one\n"


HOLD = """
import json, os, sys
from madang.agent.launcher import scratch, syscalls
syscalls.unshare(syscalls.CLONE_NEWNS)
syscalls.mount(None, b"/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
folder = sys.argv[1]
pool = scratch.Pool(f"{folder}/pool", default_bytes=64 << 20, ready=2)
pool.refill()
os.mkdir(f"{folder}/kernel")
path = pool.take(f"{folder}/kernel", 64 << 20, 1).path
with open(f"{path}/work/result", "w") as file:
    file.write("kept")
    file.flush()
    os.fsync(file.fileno())
print("ready", flush=True)
input()
"""


@needs_root
def test_a_killed_launcher_leaves_no_device_and_a_new_one_finds_the_files(
    folder: Path, pool: Pool
) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == b"ready\n"
    assert len(loops_on(folder)) == 2
    launcher.send_signal(signal.SIGKILL)
    launcher.communicate()

    pool.sweep()
    again = pool.mount_again(f"{folder}/kernel")

    assert os.listdir(f"{folder}/pool") == []
    assert Path(again.path, "work/result").read_text() == "kept"
    assert len(loops_on(folder)) == 1


@needs_root
def test_many_helpers_at_once_get_different_disks(folder: Path, pool: Pool) -> None:
    pool.ready = 4
    pool.refill()
    code = (
        "import sys; from madang.agent.launcher.scratch import Pool\n"
        "pool = Pool(sys.argv[1] + '/pool', default_bytes=64 << 20)\n"
        "pool._mine = sys.argv[3]  # as a fork of the launcher has it\n"
        "pool.take(sys.argv[2], 64 << 20, 7)"
    )
    kernels = [folder / f"k{n}" for n in range(8)]
    for kernel in kernels:
        kernel.mkdir()
    helpers = [
        subprocess.Popen([sys.executable, "-c", code, str(folder), str(kernel), pool._mine])
        for kernel in kernels
    ]

    assert [helper.wait(60) for helper in helpers] == [0] * 8
    assert len({os.stat(kernel / MOUNT).st_dev for kernel in kernels}) == 8
    assert pool.missing() == 4


@needs_root
def test_a_full_host_disk_refuses_new_sessions_in_words(folder: Path) -> None:
    small = folder / "small"
    (small).mkdir()
    syscalls.mount(b"tmpfs", bytes(small), b"tmpfs", 0, b"size=8m")
    try:
        (small / "pool").mkdir()
        (small / "kernel").mkdir()
        pool = Pool(f"{small}/pool", default_bytes=64 * MIB, reserve_bytes=16 * MIB)

        with pytest.raises(StorageFull, match="madang rm"):
            pool.take(f"{small}/kernel", 64 * MIB, UID)
        pool.refill()

        assert os.listdir(small / "pool") == []
        assert os.listdir(small / "kernel") == []
    finally:
        syscalls.umount(bytes(small))


@needs_root
def test_a_disk_that_cannot_be_made_leaves_nothing(folder: Path) -> None:
    small = folder / "small"
    small.mkdir()
    syscalls.mount(b"tmpfs", bytes(small), b"tmpfs", 0, b"size=16k")
    try:
        (small / "pool").mkdir()
        (small / "kernel").mkdir()
        pool = Pool(f"{small}/pool", reserve_bytes=0)

        with pytest.raises((RuntimeFailed, StorageFull)):
            pool.take(f"{small}/kernel", 64 * MIB, UID)

        assert os.listdir(small / "kernel") == []
        assert loops_on(small) == []
    finally:
        syscalls.umount(bytes(small))


@needs_root
def test_a_session_on_a_full_host_sees_errors_and_its_disk_can_still_be_removed(
    folder: Path,
) -> None:
    small = folder / "small"
    small.mkdir()
    syscalls.mount(b"tmpfs", bytes(small), b"tmpfs", 0, b"size=8m")
    try:
        for name in ("pool", "kernel"):
            (small / name).mkdir()
        pool = Pool(f"{small}/pool", reserve_bytes=0)
        taken = pool.take(f"{small}/kernel", 64 * MIB, UID)
        fd = os.open(f"{taken.path}/work/file", os.O_CREAT | os.O_WRONLY)
        with pytest.raises(OSError, match=r"Input/output|No space"):
            for _ in range(32):
                os.write(fd, os.urandom(MIB))
            os.fsync(fd)
        os.close(fd)

        pool.remove(f"{small}/kernel")

        assert os.listdir(small / "kernel") == []
        assert loops_on(small) == []
    finally:
        syscalls.umount(bytes(small))


def test_a_plain_folder_stands_in_where_there_are_no_loop_devices(
    folder: Path, new_kernel: Callable[[], str]
) -> None:
    pool = Pool(f"{folder}/pool", images=False)
    kernel = new_kernel()

    taken = pool.take(kernel, 8 * MIB, os.geteuid())
    Path(taken.path, "work/file").write_text("x")
    assert taken.enforced == "watch"
    assert pool.take(kernel, 8 * MIB, os.geteuid()) == taken
    pool.release(kernel)
    assert pool.mount_again(kernel) == taken
    pool.refill()
    pool.remove(kernel)

    assert os.listdir(kernel) == []


def build(top: Path) -> None:
    """A tree as a hostile program leaves it."""
    at = os.open(top, os.O_RDONLY)
    for depth in range(2500):
        os.mkdir("d", dir_fd=at)
        os.close(os.open(f"f{depth}", os.O_CREAT, 0o000, dir_fd=at))
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)


def test_a_hostile_tree_is_removed_and_nothing_beside_it(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # pytest's own clean-up can't remove such a tree.
    top, beside = tmp_path / "top", tmp_path / "beside"
    top.mkdir()
    beside.mkdir()
    (beside / "file").write_text("kept")
    os.symlink(beside, top / "link")
    os.symlink("loop", top / "loop")
    os.mkfifo(top / "fifo")
    (top / ".removed-1").mkdir()
    (top / ".removed-1/.removed-1").mkdir()
    (top / "closed").mkdir()
    (top / "closed/file").touch()
    (top / "closed").chmod(0)
    build(top)
    request.addfinalizer(lambda: subprocess.run(["rm", "-rf", top], check=True))

    scratch.remove_tree(str(top))
    scratch.remove_tree(str(top))

    assert not top.exists()
    assert (beside / "file").read_text() == "kept"


NAMES = st.sampled_from(["a", "b", ".removed-1", ".removed-2", "\udcff"])
TREES = st.recursive(
    st.none(), lambda below: st.dictionaries(NAMES, below, max_size=4), max_leaves=20
)


def plant(at: Path, what: object) -> None:
    if isinstance(what, dict):
        at.mkdir()
        for name, below in what.items():
            plant(at / name, below)
    else:
        at.touch()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TREES.filter(lambda tree: tree is not None))
def test_any_tree_is_removed(tmp_path: Path, tree: object) -> None:
    plant(tmp_path / "top", tree)
    scratch.remove_tree(str(tmp_path / "top"))
    assert not (tmp_path / "top").exists(), json.dumps(tree)


@needs_root
def test_a_new_launcher_sweeps_what_an_older_one_made_and_not_its_own(
    folder: Path, pool: Pool
) -> None:
    pool.refill()
    newer = Pool(f"{folder}/pool", default_bytes=64 * MIB, ready=1)
    assert newer.missing() == 1
    newer.refill()
    newer.sweep()
    assert newer.missing() == 0
    assert pool.missing() == 1
    for entry in (folder / "pool").iterdir():
        newer.release(str(entry))
