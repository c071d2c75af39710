"""What a layer is: its digest, its paths, its links."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.agent.buildscript import tree
from madang.agent.layers import LayerStore
from madang.kit.clock import SystemClock


def _make(root: Path) -> Path:
    (root / "lib" / "pkg").mkdir(parents=True)
    (root / "bin").mkdir()
    (root / "lib" / "pkg" / "a.py").write_text("x = 1\n")
    (root / "bin" / "run").write_text("#!/bin/sh\n")
    (root / "bin" / "run").chmod(0o755)
    (root / "lib64").symlink_to("lib")
    return root


def _pack(root: Path, target: Path) -> str:
    return tree.pack(str(root), str(target))[0]


def test_the_digest_is_what_the_documentation_says(tmp_path: Path) -> None:
    root = _make(tmp_path / "tree")

    def sha(data: bytes) -> bytes:
        return hashlib.sha256(data).hexdigest().encode()

    lines = (
        b"bin/run\x00755\x00" + sha(b"#!/bin/sh\n") + b"\n",
        b"lib/pkg/a.py\x00644\x00" + sha(b"x = 1\n") + b"\n",
        b"lib64\x00link\x00" + sha(b"lib") + b"\n",
    )
    assert _pack(root, tmp_path / "t.tar") == hashlib.sha256(b"".join(lines)).hexdigest()


def test_times_owners_and_byte_code_change_nothing(tmp_path: Path) -> None:
    root = _make(tmp_path / "tree")
    first = _pack(root, tmp_path / "1.tar")
    os.utime(root / "lib" / "pkg" / "a.py", (1, 1))
    (root / "lib" / "pkg" / "a.py").chmod(0o600)
    (root / "lib" / "pkg" / "__pycache__").mkdir()
    (root / "lib" / "pkg" / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"anything")
    (root / "empty").mkdir()

    assert _pack(root, tmp_path / "2.tar") == first


@pytest.mark.parametrize("change", ["content", "mode", "name", "link"])
def test_every_other_change_changes_the_digest(tmp_path: Path, change: str) -> None:
    root = _make(tmp_path / "tree")
    first = _pack(root, tmp_path / "1.tar")
    file = root / "lib" / "pkg" / "a.py"
    match change:
        case "content":
            file.write_text("x = 2\n")
        case "mode":
            file.chmod(0o755)
        case "name":
            file.rename(file.with_name("b.py"))
        case _:
            (root / "lib64").unlink()
            (root / "lib64").symlink_to("bin")

    assert _pack(root, tmp_path / "2.tar") != first


def test_what_is_packed_unpacks_to_the_same_digest(tmp_path: Path) -> None:
    root = _make(tmp_path / "tree")
    deep = root / "lib" / ("d" * 90) / ("é" * 60) / ("f" * 90)
    deep.mkdir(parents=True)
    (deep / ("ü" * 50)).write_bytes(os.urandom(3000))
    os.symlink("f" * 90 + "/" + "ü" * 50, deep.parent / "link")
    digest, size = tree.pack(str(root), str(tmp_path / "t.tar"))
    store = LayerStore(str(tmp_path / "layers"), SystemClock())
    store.open()

    with open(tmp_path / "t.tar", "rb") as archive:
        staged = store.stage(digest, archive, 10**6)

    assert staged.size_bytes == size
    assert tree.pack(staged.path, str(tmp_path / "again.tar"))[0] == digest


@given(
    st.dictionaries(
        st.lists(st.sampled_from(["a", "b", "café", "x" * 70]), min_size=1, max_size=3).map(tuple),
        st.binary(max_size=700),
        max_size=6,
    )
)
def test_any_tree_survives_its_archive(
    tmp_path_factory: pytest.TempPathFactory, files: dict[tuple[str, ...], bytes]
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for parts, content in files.items():
        path = root.joinpath(*parts[:-1], parts[-1] + ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    target = root.parent / f"{root.name}.tar"
    digest, size = tree.pack(str(root), str(target))
    store = LayerStore(str(root.parent / f"{root.name}-layers"), SystemClock())
    store.open()

    staged = store.stage(digest, io.BytesIO(target.read_bytes()), size + 10**6)

    assert (staged.digest, staged.size_bytes) == (digest, size)


@pytest.mark.parametrize(
    ("path", "target", "good"),
    [
        (b"lib64", b"lib", True),
        (b"a/b/link", b"../c", True),
        (b"a/link", b"../../etc/passwd", False),
        (b"a/link", b"..", True),
        (b"link", b"..", False),
        (b"link", b"x/../../y", False),
        (b"a/b/link", b"top/../c", False),
        (b"a/b/link", b"./../c", True),
        (b"bin/python-x", b"/etc", False),
        (b"bin/python/x", b"/etc", False),
        (b"a/b", b"/etc/passwd", False),
        (b"bin/python", b"/usr/bin/python3.11", True),
        (b"bin/python", b"/usr/../root/x", False),
        (b"bin/sh", b"/bin/sh", False),
        (b"a", b"", False),
    ],
)
def test_links_stay_in_their_layer_but_the_interpreters(
    path: bytes, target: bytes, good: bool
) -> None:
    assert tree.is_link(path, target) is good


def test_scripts_start_the_environments_interpreter_and_the_record_tells_so(
    tmp_path: Path,
) -> None:
    root, python = tmp_path / "tree", "/scratch/skeleton/bin/python"
    info = root / "lib" / "site-packages" / "x-1.dist-info"
    info.mkdir(parents=True)
    (root / "bin").mkdir()
    (root / "bin" / "x").write_text(f"#!{python}\nimport x\n")
    (root / "bin" / "x").chmod(0o755)
    (root / "bin" / "other").write_text("#!/bin/sh\n")
    (info / "RECORD").write_text(
        "../../bin/x,sha256=old,1\ngone/__pycache__/x.pyc,,\nx-1.dist-info/RECORD,,\n"
    )
    (root / ".lock").touch()
    cache = root / "lib" / "site-packages" / "__pycache__"
    cache.mkdir()
    (cache / "x.pyc").touch()

    tree.clean(str(root), python)

    content = (root / "bin" / "x").read_text()
    assert content == "#!/env/bin/python\nimport x\n"
    assert (root / "bin" / "x").stat().st_mode & 0o777 == 0o755
    assert (root / "bin" / "other").read_text() == "#!/bin/sh\n"
    rows = (info / "RECORD").read_text().splitlines()
    assert rows[0].startswith("../../bin/x,sha256=")
    assert rows[0].endswith(f",{len(content)}")
    assert "old" not in rows[0]
    assert len(rows) == 2
    assert not cache.exists()
    assert not (root / ".lock").exists()
