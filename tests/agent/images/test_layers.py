"""The layer store: what is refused, what is kept, what goes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.agent.images.conftest import archive

from madang.agent.buildscript import tree
from madang.agent.layers import YOUNG_S, LayerStore, byte_compile, remove_tree
from madang.kit.clock import SystemClock
from madang.wire.errors import BuildFailed
from madang.wire.image import Layer

FILE, FOLDER, LINK = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE
VERSION = "{}.{}".format(*sys.version_info[:2])


class _Later(SystemClock):
    def now(self) -> float:
        return super().now() + 2 * YOUNG_S


def _layer(tmp_path: Path, text: str = "x = 1\n") -> tuple[str, bytes]:
    """Digest and tar of a small layer."""
    root = tmp_path / "made"
    (root / "lib").mkdir(parents=True)
    (root / "lib" / "m.py").write_text(text)
    (root / "run").write_text("#!/bin/sh\n")
    (root / "run").chmod(0o755)
    digest, _ = tree.pack(str(root), str(tmp_path / "made.tar"))
    data = (tmp_path / "made.tar").read_bytes()
    remove_tree(str(root))
    return digest, data


def _left(store: LayerStore, tmp_path: Path) -> list[str]:
    return [name for name in os.listdir(tmp_path / "layers") if name != ".keys"]


def test_a_layer_is_read_only_and_readable_for_everyone(store: LayerStore, tmp_path: Path) -> None:
    digest, data = _layer(tmp_path)
    store.commit([store.stage(digest, io.BytesIO(data), 10**6)])

    path = Path(store.path(digest))
    assert store.list() == (digest,)
    assert path.stat().st_mode & 0o777 == 0o555
    assert (path / "lib" / "m.py").stat().st_mode & 0o7777 == 0o444
    assert (path / "run").stat().st_mode & 0o7777 == 0o555


@pytest.mark.parametrize(
    "entries",
    [
        [("../out", FILE, 0o644, "x")],
        [("/abs", FILE, 0o644, "x")],
        [("a/../b", FILE, 0o644, "x")],
        [("a//b", FILE, 0o644, "x")],
        [("missing/file", FILE, 0o644, "x")],
        [("a", FILE, 0o644, "x"), ("a", FILE, 0o644, "y")],
        [("a", LINK, 0o777, "../../etc")],
        [("a", LINK, 0o777, "/etc")],
        [("a", LINK, 0o777, "b"), ("a/x", FILE, 0o644, "x")],
        [("a", tarfile.LNKTYPE, 0o644, "/etc/passwd")],
        [("a", tarfile.CHRTYPE, 0o644, "")],
        [("a", tarfile.FIFOTYPE, 0o644, "")],
        [("lib", FOLDER, 0o755, ""), ("lib/__pycache__", FOLDER, 0o755, "")],
        [("n" * 1200, FILE, 0o644, "x")],
        [("x\0y", FILE, 0o644, "x")][:0] or [(".", FOLDER, 0o755, "")],
    ],
)
def test_archives_that_could_do_harm_are_refused_and_leave_nothing(
    store: LayerStore, tmp_path: Path, entries: list[tuple[str, bytes, int, str]]
) -> None:
    with pytest.raises(BuildFailed):
        store.stage("0" * 64, archive(*entries), 10**6)

    assert _left(store, tmp_path) == []


def test_setuid_bits_do_not_come_through(store: LayerStore) -> None:
    content = archive(("su", FILE, 0o6755, "x"))
    line = tree.line(b"su", b"755", tree._sha256(b"x"))
    staged = store.stage(tree.digest([line]), content, 10**6)
    assert os.stat(os.path.join(staged.path, "su")).st_mode & 0o7777 == 0o755


def test_a_tampered_archive_is_refused(store: LayerStore, tmp_path: Path) -> None:
    digest, data = _layer(tmp_path)
    with pytest.raises(BuildFailed, match="other content"):
        store.stage(digest, io.BytesIO(data.replace(b"x = 1", b"x = 2")), 10**6)
    assert _left(store, tmp_path) == []


@pytest.mark.parametrize("keep", [0, 100, 700, 1024, 1600])
def test_an_archive_that_ends_early_is_refused(
    store: LayerStore, tmp_path: Path, keep: int
) -> None:
    digest, data = _layer(tmp_path)
    with pytest.raises(BuildFailed):
        store.stage(digest, io.BytesIO(data[:keep]), 10**6)
    assert _left(store, tmp_path) == []


def test_a_file_larger_than_the_builds_disk_is_refused_before_it_is_written(
    store: LayerStore, tmp_path: Path
) -> None:
    info = tarfile.TarInfo("bomb")
    info.size = 1 << 50
    with pytest.raises(BuildFailed, match="larger"):
        store.stage("0" * 64, io.BytesIO(info.tobuf(tarfile.GNU_FORMAT)), 10**6)
    assert _left(store, tmp_path) == []


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(0, 4000), st.binary(min_size=1, max_size=40))
def test_a_damaged_archive_is_refused_or_the_same(
    store: LayerStore, tmp_path: Path, at: int, noise: bytes
) -> None:
    if not (tmp_path / "made.tar").exists():
        _layer(tmp_path)
    data = (tmp_path / "made.tar").read_bytes()
    with tarfile.open(tmp_path / "made.tar") as tar:
        names = sorted(tar.getnames())
    assert names
    digest = tree.digest(
        [
            tree.line(b"lib/m.py", b"644", tree._sha256(b"x = 1\n")),
            tree.line(b"run", b"755", tree._sha256(b"#!/bin/sh\n")),
        ]
    )
    damaged = data[:at] + noise + data[at + len(noise) :]
    try:
        staged = store.stage(digest, io.BytesIO(damaged), 10**6)
    except BuildFailed:
        pass
    else:
        assert tree.pack(staged.path, str(tmp_path / "again.tar"))[0] == digest
        remove_tree(staged.path)
    assert _left(store, tmp_path) == []


def test_two_builds_of_the_same_layer_leave_one(store: LayerStore, tmp_path: Path) -> None:
    digest, data = _layer(tmp_path)
    both = [store.stage(digest, io.BytesIO(data), 10**6) for _ in range(2)]
    store.commit(both[:1])
    store.commit(both[1:])
    assert _left(store, tmp_path) == [digest]


def test_what_a_crash_left_is_swept(store: LayerStore, tmp_path: Path) -> None:
    digest, data = _layer(tmp_path)
    store.stage(digest, io.BytesIO(data), 10**6)
    (tmp_path / "layers" / f".trash-{digest}" / "lib").mkdir(parents=True)
    (tmp_path / "layers" / f".trash-{digest}").chmod(0o555)

    store.open()

    assert _left(store, tmp_path) == []


def test_the_collector_spares_named_and_young_layers(store: LayerStore, tmp_path: Path) -> None:
    digest, data = _layer(tmp_path)
    store.commit([store.stage(digest, io.BytesIO(data), 10**6)])
    later = LayerStore(str(tmp_path / "layers"), _Later())

    assert store.collect([]) == ()
    assert later.collect([digest]) == ()
    assert later.collect([]) == (digest,)
    assert _left(store, tmp_path) == []


def test_an_ordinary_user_can_remove_read_only_layers(tmp_path: Path) -> None:
    """The server is one; its folders have no write bit."""
    if os.geteuid() != 0:
        pytest.skip("changing the user needs root")
    digest, data = _layer(tmp_path)
    (tmp_path / "layers").mkdir()
    program = f"""
import io, os, sys
os.setgid(65534); os.setuid(65534)
from madang.agent.layers import LayerStore
from tests.agent.images.test_layers import _Later
store = LayerStore({str(tmp_path / "layers")!r}, _Later())
store.open()
store.commit([store.stage({digest!r}, sys.stdin.buffer, 10**6)])
os.utime(store.path({digest!r}), (1, 1))
assert store.collect([]) == ({digest!r},)
"""
    os.chown(tmp_path / "layers", 65534, 65534)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        os.chmod(folder, 0o755)
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=data,
        capture_output=True,
        check=False,
        cwd=root,
        env={"PYTHONPATH": f"{root / 'src'}:{root}", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr.decode()


def test_what_one_owner_learned_is_not_told_to_another(store: LayerStore, tmp_path: Path) -> None:
    digest, data = _layer(tmp_path)
    store.commit([store.stage(digest, io.BytesIO(data), 10**6)])
    layer = Layer(digest=digest, name="x", version="1", size_bytes=1)
    gone = Layer(digest="1" * 64, name="y", version="1", size_bytes=1)

    store.learn("ann", {"k" * 64: layer, "g" * 64: gone})

    assert store.known("ann") == {"k" * 64: layer}
    assert store.known("bob") == {}


def test_damaged_knowledge_is_forgotten(store: LayerStore, tmp_path: Path) -> None:
    store.learn("ann", {})
    (file,) = (tmp_path / "layers" / ".keys").iterdir()
    file.write_text("{")
    assert store.known("ann") == {}
    store.learn("ann", {})
    assert store.known("ann") == {}


def host_python() -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    argv = ["/usr/bin/python3", "-c", code]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


async def test_no_byte_code_is_made_of_what_a_link_leads_to(tmp_path: Path) -> None:
    """A layer may hold links of any interpreter's name, and links to those."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "settings.py").write_text("password = 'precious'\n")
    layer, other = tmp_path / "layer", tmp_path / "other"
    (layer / "lib").mkdir(parents=True)
    (layer / "bin").mkdir()
    (layer / "bin" / "python").symlink_to(secret)
    (layer / "lib" / "stolen.py").symlink_to("../bin/python/settings.py")
    other.mkdir()
    (other / "lib").symlink_to(secret)

    for root in (layer, other):
        assert await byte_compile(str(root), host_python())

    assert not list(tmp_path.rglob("*.pyc"))


async def test_byte_code_is_made_once_and_never_checked_again(tmp_path: Path) -> None:
    root = tmp_path / "layer"
    package = root / "lib" / "site"
    package.mkdir(parents=True)
    (package / "good.py").write_text("def f(): pass\n")
    (package / "bad.py").write_text("def (\n")
    assert await byte_compile(str(root), host_python())

    (compiled,) = (package / "__pycache__").iterdir()
    assert compiled.name.startswith("good.")
    assert compiled.read_bytes()[4:8] == b"\x01\0\0\0", "hash-based, not checked"
    assert b"/env/lib/site/good.py" in compiled.read_bytes()


async def test_another_interpreter_than_the_layers_compiles_nothing(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    assert not await byte_compile(str(tmp_path), "3.99")
