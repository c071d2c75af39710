"""Builds without a session around them: real packages, the real script, the real proxy."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.agent.images.conftest import KERNEL, SPEC, archive, reader

from madang.agent import tools
from madang.agent.build import NOT_TAKEN, Builds
from madang.agent.buildscript import tree
from madang.agent.registry import registry
from madang.kit import codec
from madang.kit.clock import SystemClock
from madang.wire.image import BuildManifest
from madang.wire.session import Ended, Reason

SUCCESS = Ended(reason=Reason.EXIT, exit_code=0)
SCRIPT = """
import sys
sys.path.insert(0, {tools!r} + "/build.pyz")
from madang.agent.buildscript import main
places = main.Places({tools!r}, {proxy!r}, {outputs!r}, {scratch!r})
sys.exit(main.run(sys.argv[1:], places))
"""


async def _build(builds: Builds, tmp_path: Path, *requirements: str) -> tuple[Ended, str]:
    """One build; how it ended and what it printed."""
    await builds.before_start(KERNEL, SPEC)
    code = SCRIPT.format(
        tools=str(tmp_path / "tools"),
        proxy=str(tmp_path / "service" / "proxy.sock"),
        outputs=str(tmp_path / "outputs"),
        scratch=str(tmp_path / "scratch"),
    )
    process = await asyncio.create_subprocess_exec(
        *("/usr/bin/python3", "-I", "-c", code, *requirements),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={"PATH": "/usr/bin:/bin"},
    )
    text, _ = await process.communicate()
    ended = Ended(reason=Reason.EXIT, exit_code=process.returncode)
    return await builds.after_end(KERNEL, SPEC, ended), text.decode()


def _manifest(outputs: Path) -> BuildManifest:
    return codec.from_json(BuildManifest, (outputs / "image.json").read_bytes())


def _parts(tmp_path: Path) -> list[str]:
    names = os.listdir(tmp_path / "layers")
    return [name for name in names if name.startswith((".part", ".trash"))]


@contextmanager
def _index(folder: Path) -> Iterator[str]:
    """A package index on the loopback over *folder*."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(folder))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """A wheel in a simple index below *folder*."""
    project = folder / name
    project.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(project / f"{name}-{version}-py3-none-any.whl", "w") as made:
        record = "".join(f"{path},,\n" for path in (*files, f"{info}/METADATA", f"{info}/WHEEL"))
        for path, content in files.items():
            made.writestr(path, content)
        made.writestr(f"{info}/METADATA", metadata)
        made.writestr(f"{info}/WHEEL", wheel)
        made.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    links = "".join(f'<a href="{p.name}">{p.name}</a>\n' for p in sorted(project.iterdir()))
    (project / "index.html").write_text(f"<!DOCTYPE html><html><body>{links}</body></html>")


def _builds(tmp_path: Path, index: str) -> Builds:
    (tmp_path / "service").mkdir(exist_ok=True)
    return Builds(
        state_dir=str(tmp_path),
        service_dir=lambda _: str(tmp_path / "service"),
        read=reader(tmp_path / "outputs"),
        registry=registry(
            {"HOME": str(tmp_path), "UV_DEFAULT_INDEX": index, "UV_HTTP_RETRIES": "0"}
        ),
        clock=SystemClock(),
    )


async def test_packages_become_layers_and_a_second_build_makes_none(
    builds: Builds, tmp_path: Path, outputs: Path
) -> None:
    ended, text = await _build(builds, tmp_path, "idna==3.10", "markupsafe==3.0.2")
    assert ended == SUCCESS, text
    first = _manifest(outputs)
    assert [layer.name for layer in first.layers] == ["idna", "markupsafe", "python"]
    assert set(builds.layers()) == {layer.digest for layer in first.layers}
    for tar in (outputs / "layers").iterdir():
        tar.unlink()

    ended, text = await _build(builds, tmp_path, "markupsafe==3.0.2", "idna==3.10")

    assert ended == SUCCESS, text
    assert text.count("at hand") == 2
    assert _manifest(outputs) == first
    assert len(list((outputs / "layers").iterdir())) == 1, "the skeleton alone"


async def test_layers_of_one_package_in_two_versions_lie_side_by_side(
    builds: Builds, tmp_path: Path, outputs: Path
) -> None:
    found = []
    for version in ("3.4", "3.10"):
        ended, text = await _build(builds, tmp_path, f"idna=={version}")
        assert ended == SUCCESS, text
        layer = _manifest(outputs).layers[0]
        (module,) = Path(tmp_path, "layers", layer.digest).glob("lib/*/site-packages/idna")
        found.append((module / "package_data.py").read_text())
        assert list((module / "__pycache__").iterdir()), "byte-compiled"
    assert "3.4" in found[0]
    assert "3.10" in found[1]


async def test_requirements_may_have_extras_markers_and_addresses(
    tmp_path: Path, outputs: Path
) -> None:
    for name in ("direct", "named", "never"):
        _wheel(tmp_path / "index", name, "1.0", {f"{name}.py": "x = 1\n"})
    with _index(tmp_path / "index") as url:
        builds = _builds(tmp_path, url)
        await builds.open()
        try:
            ended, text = await _build(
                builds,
                tmp_path,
                f"direct @ {url}/direct/direct-1.0-py3-none-any.whl",
                "named[extra]==1.0; sys_platform == 'linux'",
                'never; python_version < "3.0"',
            )
        finally:
            await builds.close()
    assert ended == SUCCESS, text
    found = [(layer.name, layer.version) for layer in _manifest(outputs).layers]
    assert found[:2] == [("direct", "1.0"), ("named", "1.0")]
    assert len(found) == 3


async def test_requirements_that_all_do_not_apply_make_an_empty_environment(
    builds: Builds, tmp_path: Path, outputs: Path
) -> None:
    ended, text = await _build(builds, tmp_path, 'tomli; python_version < "3.0"')
    assert ended == SUCCESS, text
    assert [layer.name for layer in _manifest(outputs).layers] == ["python"]


async def test_another_owner_builds_anew_but_gets_the_same_digest(
    builds: Builds, tmp_path: Path, outputs: Path
) -> None:
    await _build(builds, tmp_path, "idna==3.10")
    first = _manifest(outputs)
    bob = codec.convert(type(SPEC), codec.to_builtins(SPEC) | {"owner": "bob"})

    await builds.before_start(KERNEL, bob)
    assert json.loads(builds._proxies[KERNEL]._orders)["layers"] == {}
    await builds.after_end(KERNEL, bob, Ended(reason=Reason.USER))
    (tmp_path / "layers" / ".keys").rename(tmp_path / "keys-gone")
    ended, text = await _build(builds, tmp_path, "idna==3.10")

    assert ended == SUCCESS
    assert "at hand" not in text
    assert _manifest(outputs) == first


@pytest.mark.parametrize(
    ("requirements", "code", "words"),
    [
        (["no-such-package-zzz"], 65, "was not found"),
        (["idna==999"], 65, "no version of idna==999"),
        (["idna==3.4", "idna==3.10"], 65, "unsatisfiable"),
        (["idna @ https://127.0.0.1/idna-3.4.tar.gz"], 69, "No package index"),
    ],
)
async def test_a_build_that_fails_says_why_and_leaves_nothing(
    builds: Builds, tmp_path: Path, outputs: Path, requirements: list[str], code: int, words: str
) -> None:
    ended, text = await _build(builds, tmp_path, *requirements)
    assert ended.exit_code == code, text
    assert words in text
    assert builds.layers() == ()
    assert not (outputs / "image.json").exists()


async def test_a_private_index_on_the_machines_network_works(tmp_path: Path, outputs: Path) -> None:
    _wheel(tmp_path / "index", "private", "1.0", {"private.py": "x = 1\n"})
    with _index(tmp_path / "index") as url:
        builds = _builds(tmp_path, url)
        await builds.open()
        try:
            ended, text = await _build(builds, tmp_path, "private")
        finally:
            await builds.close()
    assert ended == SUCCESS, text
    assert [layer.name for layer in _manifest(outputs).layers] == ["private", "python"]


async def test_passwords_of_an_index_are_not_printed(tmp_path: Path, outputs: Path) -> None:
    (tmp_path / "index").mkdir()
    with _index(tmp_path / "index") as url:
        builds = _builds(tmp_path, url.replace("//", "//me:hunter2@"))
        await builds.open()
        try:
            ended, text = await _build(builds, tmp_path, "private")
        finally:
            await builds.close()
    assert ended.exit_code == 65
    assert "hunter2" not in text


async def test_an_index_that_does_not_answer_is_told(tmp_path: Path, outputs: Path) -> None:
    with _index(tmp_path) as url:
        pass  # closed again
    builds = _builds(tmp_path, url)
    await builds.open()
    try:
        ended, text = await _build(builds, tmp_path, "idna")
    finally:
        await builds.close()
    assert ended.exit_code == 69, text
    assert "No package index can be reached" in text


async def test_a_wheel_with_unusual_files_is_kept_whole(tmp_path: Path, outputs: Path) -> None:
    files = {
        "odd/__init__.py": "",
        "odd/é ü.txt": "x",
        "odd/" + "n" * 120 + "/" + "m" * 120 + ".txt": "y",
        "odd/empty": "",
        "odd-1.0.data/scripts/odd": "#!python\nprint('odd')\n",
        "odd-1.0.data/data/share/odd.txt": "z",
    }
    _wheel(tmp_path / "index", "odd", "1.0", files)
    with _index(tmp_path / "index") as url:
        builds = _builds(tmp_path, url)
        await builds.open()
        try:
            ended, text = await _build(builds, tmp_path, "odd")
        finally:
            await builds.close()
    assert ended == SUCCESS, text + ended.text
    layer = tmp_path / "layers" / _manifest(outputs).layers[0].digest
    assert (layer / "bin" / "odd").read_text().startswith("#!/env/bin/python\n")
    assert (layer / "share" / "odd.txt").read_text() == "z"
    assert next(layer.glob("lib/*/site-packages/odd/é ü.txt")).read_text() == "x"


async def test_a_source_package_whose_setup_fails_is_told_with_its_words(
    tmp_path: Path, outputs: Path
) -> None:
    project = tmp_path / "index" / "broken"
    project.mkdir(parents=True)
    source = tmp_path / "broken-1.0"
    source.mkdir()
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "b"\nbackend-path = ["."]\n'
    )
    (source / "b.py").write_text("raise RuntimeError('the compiler is missing')\n")
    (source / "PKG-INFO").write_text("Metadata-Version: 1.0\nName: broken\nVersion: 1.0\n")
    target = project / "broken-1.0.tar.gz"
    subprocess.run(["tar", "czf", target, "-C", tmp_path, "broken-1.0"], check=True)
    (project / "index.html").write_text(f'<a href="{target.name}">{target.name}</a>')
    with _index(tmp_path / "index") as url:
        builds = _builds(tmp_path, url)
        await builds.open()
        try:
            ended, text = await _build(builds, tmp_path, "broken")
        finally:
            await builds.close()
    assert ended.exit_code in {65, 66}, text
    assert "the compiler is missing" in text
    assert builds.layers() == ()


async def _hostile(builds: Builds, outputs: Path, manifest: object, keys: object = None) -> Ended:
    (outputs / "image.json").write_text(json.dumps(manifest))
    (outputs / "keys.json").write_text(json.dumps(keys or {}))
    return await builds.after_end(KERNEL, SPEC, SUCCESS)


def _claim(digest: str, **more: object) -> dict[str, object]:
    return {"digest": digest, "name": "x", "version": "1", "size_bytes": 1, **more}


@pytest.mark.parametrize(
    "manifest",
    [
        {},
        [],
        {"python": "3.11", "layers": []},
        {"python": "../../x", "layers": [_claim("0" * 64)]},
        {"python": "3.11", "layers": [_claim("../../../etc")]},
        {"python": "3.11", "layers": [_claim("0" * 63)]},
        {"python": "3.11", "layers": [_claim("0" * 64)]},
        {"python": "3.11", "layers": [_claim("0" * 64, size_bytes=-1)]},
        {"python": "3.11", "layers": [_claim("0" * 64, name="n" * 300)]},
        {"python": "3.11", "layers": [_claim(f"{n:064x}") for n in range(401)]},
    ],
)
async def test_a_manifest_that_lies_makes_no_image(
    builds: Builds, tmp_path: Path, outputs: Path, manifest: object
) -> None:
    ended = await _hostile(builds, outputs, manifest)
    assert ended.exit_code == NOT_TAKEN
    assert ended.text
    assert builds.layers() == ()
    assert _parts(tmp_path) == []


async def test_one_bad_layer_keeps_all_out(builds: Builds, tmp_path: Path, outputs: Path) -> None:
    ended, text = await _build(builds, tmp_path, "idna==3.10")
    assert ended == SUCCESS, text
    good = _manifest(outputs).layers
    for layer in good:
        os.rename(tmp_path / "layers" / layer.digest, tmp_path / f"gone-{layer.digest}")
    (outputs / "layers" / f"{'0' * 64}.tar").write_bytes(
        archive(("x", b"0", 0o644, "x")).getvalue()
    )
    claims = [codec.to_builtins(layer) for layer in good]

    ended = await _hostile(
        builds, outputs, {"python": "3.11", "layers": [*claims, _claim("0" * 64)]}
    )

    assert ended.exit_code == NOT_TAKEN
    assert builds.layers() == ()
    assert _parts(tmp_path) == []


async def test_a_build_teaches_only_what_it_brought(
    builds: Builds, tmp_path: Path, outputs: Path
) -> None:
    ended, _ = await _build(builds, tmp_path, "idna==3.10")
    assert ended == SUCCESS
    manifest = json.loads((outputs / "image.json").read_text())
    before = builds._store.known("ann")

    await _hostile(builds, outputs, manifest, {"k" * 64: "1" * 64, "../x": "0" * 64})

    assert builds._store.known("ann") == before


async def test_layers_that_a_build_counts_on_are_not_collected(
    builds: Builds, tmp_path: Path, outputs: Path
) -> None:
    await _build(builds, tmp_path, "idna==3.10")
    for digest in builds.layers():
        os.utime(tmp_path / "layers" / digest, (1, 1))
    idna = _manifest(outputs).layers[0].digest

    await builds.before_start(KERNEL, SPEC)
    await builds.collect([])
    assert builds.layers() == (idna,)
    await builds.after_end(KERNEL, SPEC, Ended(reason=Reason.USER))
    await builds.collect([])
    assert builds.layers() == ()


async def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, outputs: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    state = tmp_path / "small"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", state], check=True)
    try:
        store_builds = _builds(tmp_path, "http://unused")
        store_builds._store._root = str(state / "layers")  # type: ignore[misc]
        store_builds._store.open()
        root = tmp_path / "big"
        root.mkdir()
        (root / "file").write_bytes(os.urandom(400_000))
        digest, _ = tree.pack(str(root), str(outputs / "layers" / "x.tar"))
        (outputs / "layers" / "x.tar").rename(outputs / "layers" / f"{digest}.tar")
        ended = await _hostile(
            store_builds, outputs, {"python": "3.11", "layers": [_claim(digest)]}
        )
        assert "disk" in ended.text
        assert os.listdir(state / "layers") == []
    finally:
        subprocess.run(["umount", state], check=True)


async def test_without_tools_everything_but_builds_works(tmp_path: Path) -> None:
    (tmp_path / "tools").write_text("in the way")
    builds = _builds(tmp_path, "http://unused")
    await builds.open()
    await builds.collect([])
    await builds.close()


async def test_tools_are_replaced_only_when_they_changed(tmp_path: Path) -> None:
    folder = tmp_path / "tools"
    tools.install(str(folder))
    before = {name: (folder / name).stat().st_ino for name in os.listdir(folder)}
    tools.install(str(folder))
    assert {name: (folder / name).stat().st_ino for name in os.listdir(folder)} == before

    (folder / "build.pyz").unlink()
    (folder / "build.pyz").write_text("half")
    tools.install(str(folder))

    assert sorted(os.listdir(folder)) == ["build.pyz", "certificates.pem", "uv"]
    assert zipfile.is_zipfile(folder / "build.pyz")
    assert (folder / "uv").stat().st_mode & 0o777 == 0o555
