"""Images from elsewhere, by the real build script: what is made of them, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest
from tests.agent.images import scripts

from madang.agent.build import Builds
from madang.agent.buildscript import rootlayer
from madang.agent.layers import LayerStore
from madang.testing import foreignimages as foreign
from madang.testing.foreignimages import entry, folder, link
from madang.wire.rootlayer import RECORD

SUCCESS, DAMAGED = 0, 68
CHARACTER, BLOCK, PIPE = tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE


async def _take(
    builds: Builds, tmp_path: Path, layers: list[bytes], **image: object
) -> tuple[int | None, str]:
    built = foreign.image(layers, **image)  # type: ignore[arg-type]
    archive = foreign.tar(foreign.layout(built))
    ended, text = await scripts.run(builds, tmp_path, "import", stdin=archive)
    return ended.exit_code, f"{text}\n{ended.text}"


def _trees(tmp_path: Path) -> list[Path]:
    """The layers' folders, topmost first."""
    made = scripts.manifest(tmp_path / "outputs")
    return [tmp_path / "layers" / layer.digest for layer in made.layers]


async def test_an_image_becomes_its_layers_and_what_it_says(builds: Builds, tmp_path: Path) -> None:
    config = {
        "Env": ["PATH=/bin", "A=1=2"],
        "Entrypoint": ["/bin/tool"],
        "Cmd": ["--help"],
        "WorkingDir": "/data",
        "User": "nobody",
        "Labels": {"org.opencontainers.image.title": "Tööl"},
    }
    low = foreign.tar([folder("bin"), entry("bin/tool", "#!", mode=0o4755)])
    high = foreign.tar([folder("etc"), entry("etc/shadow", "x", mode=0o640, owner=42)])
    code, text = await _take(builds, tmp_path, [low, high], config=config)

    assert code == SUCCESS, text
    made = scripts.manifest(tmp_path / "outputs")
    assert (made.kind, made.python, len(made.layers)) == ("root", "", 2)
    assert made.config.env == {"PATH": "/bin", "A": "1=2"}
    assert (made.config.entrypoint, made.config.cmd) == (("/bin/tool",), ("--help",))
    assert (made.config.cwd, made.config.user) == ("/data", "nobody")
    assert made.config.labels == {"org.opencontainers.image.title": "Tööl"}
    top, bottom = _trees(tmp_path)
    tool, shadow = bottom / "bin" / "tool", top / "etc" / "shadow"
    assert stat.S_IMODE(tool.stat().st_mode) == 0o755
    assert stat.S_IMODE(shadow.stat().st_mode) == 0o644
    assert os.getxattr(tool, RECORD) == b"4755 0 0"
    assert os.getxattr(shadow, RECORD) == b"640 42 42"
    assert int(tool.stat().st_mtime) == 1_500_000_000


async def test_what_a_layer_removes_is_marked_as_overlayfs_reads_it(
    builds: Builds, tmp_path: Path
) -> None:
    low = foreign.tar([folder("a"), entry("a/x"), folder("b"), entry("b/y"), entry("c")])
    high = foreign.tar(
        [entry("a/.wh.x"), folder("b"), entry("b/.wh..wh..opq"), entry("b/z"), entry(".wh.c")]
    )
    code, text = await _take(builds, tmp_path, [low, high])
    assert code == SUCCESS, text
    top = _trees(tmp_path)[0]
    for gone in (top / "a" / "x", top / "c"):
        assert stat.S_ISCHR(gone.lstat().st_mode)
        assert gone.lstat().st_rdev == 0
    assert os.getxattr(top / "b", "user.overlay.opaque") == b"y"
    assert (top / "b" / "z").is_file()


async def test_a_name_removed_and_made_anew_hides_what_was_below(
    builds: Builds, tmp_path: Path
) -> None:
    layer = foreign.tar([entry(".wh.a"), folder("a"), entry("a/n"), entry(".wh.f"), entry("f")])
    assert (await _take(builds, tmp_path, [layer]))[0] == SUCCESS
    top = _trees(tmp_path)[0]
    assert os.getxattr(top / "a", "user.overlay.opaque") == b"y"
    assert (top / "f").is_file()


async def test_odd_but_honest_tars_are_read_as_unpacked(builds: Builds, tmp_path: Path) -> None:
    long = "d" * 200 + "/" + "e" * 200
    layer = foreign.tar(
        [
            entry("./late/file", "1"),
            folder("late", mode=0o1777),
            entry("twice", "old"),
            entry("twice", "new"),
            folder("was"),
            entry("was/inner"),
            entry("was", "a file now"),
            link("lib", "usr/lib"),
            entry("lib/l.so", "so"),
            link("up", "../../../usr"),
            entry("up/s", "s"),
            entry("one", "same"),
            entry("two", "one", kind=tarfile.LNKTYPE),
            entry("bad\udcff", "raw"),
            entry(long, "long"),
            entry("/abs", "abs"),
            link("out", "/etc/passwd"),
            entry("dev/null", kind=CHARACTER),
            entry("dev/sda", kind=BLOCK),
            entry("pipe", kind=PIPE),
            entry(".wh..wh.plnk/1.2", ""),
        ],
        pax=False,
    )
    code, text = await _take(builds, tmp_path, [layer])
    assert code == SUCCESS, text
    assert "4 devices, pipes or marks left out" in text
    root = _trees(tmp_path)[0]
    assert os.getxattr(root / "late", RECORD) == b"1777 0 0"
    assert (root / "twice").read_text() == "new"
    assert (root / "was").read_text() == "a file now"
    assert (root / "usr" / "lib" / "l.so").read_text() == "so"
    assert (root / "usr" / "s").read_text() == "s"
    assert (root / "one").stat().st_ino == (root / "two").stat().st_ino
    assert (root / "bad\udcff").read_text() == "raw"
    assert (root / long).read_text() == "long"
    assert (root / "abs").read_text() == "abs"
    assert os.readlink(root / "out") == "/etc/passwd"
    assert not (root / "pipe").exists()
    assert not (root / "dev" / "sda").exists()


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([entry("../out", "x")], "leads out"),
        ([entry("a/../../out", "x")], "leads out"),
        ([link("a", "a"), entry("a/b", "x")], "in a circle"),
        ([entry("h", "/etc/passwd", kind=tarfile.LNKTYPE)], "not in its layer"),
        ([entry("h", "../../etc/passwd", kind=tarfile.LNKTYPE)], "leads out"),
        ([entry(".wh..", "")], "hides nothing"),
        ([entry("x" * 256, "")], "no path"),
        ([entry("/".join("d" * 300), "")], "no path"),
    ],
)
async def test_hostile_layers_are_refused_in_words(
    builds: Builds,
    tmp_path: Path,
    entries: list[tuple[tarfile.TarInfo, bytes]],
    words: str,
) -> None:
    code, text = await _take(builds, tmp_path, [foreign.tar(entries)])
    assert code == DAMAGED
    assert words in text
    assert not (tmp_path / "outputs" / "image.json").exists()
    assert [name for name in os.listdir(tmp_path / "layers") if name != ".keys"] == []


async def test_a_link_out_of_the_layer_is_never_followed(builds: Builds, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    layer = foreign.tar([link("a", str(victim)), entry("a/owned", "x")])
    assert (await _take(builds, tmp_path, [layer]))[0] == SUCCESS
    assert list(victim.iterdir()) == []
    assert (_trees(tmp_path)[0] / str(victim).lstrip("/") / "owned").read_text() == "x"


@pytest.mark.parametrize("kind", ["gzip", "two gzips", "bzip2", "xz", "zstd", "plain"])
async def test_every_compression_is_read(builds: Builds, tmp_path: Path, kind: str) -> None:
    layer = foreign.tar([entry("f", os.urandom(300_000) + bytes(3_000_000))])
    half = len(layer) // 2
    packed = {
        "gzip": gzip.compress(layer),
        "two gzips": gzip.compress(layer[:half]) + gzip.compress(layer[half:]) + bytes(100),
        "bzip2": bz2.compress(layer),
        "xz": lzma.compress(layer),
        "zstd": b"",
        "plain": layer,
    }[kind]
    if kind == "zstd":
        packed = subprocess.run(["zstd", "-c"], input=layer, capture_output=True, check=True).stdout
    code, text = await _take(builds, tmp_path, [layer], packed=[packed])
    assert code == SUCCESS, text
    assert (_trees(tmp_path)[0] / "f").stat().st_size == 3_300_000


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", "zstd"])
async def test_compressed_data_that_ends_in_the_middle_is_damaged(
    builds: Builds, tmp_path: Path, kind: str
) -> None:
    layer = foreign.tar([entry("f", os.urandom(100_000))])
    packed = {
        "gzip": gzip.compress(layer),
        "bzip2": bz2.compress(layer),
        "xz": lzma.compress(layer),
        "zstd": subprocess.run(["zstd", "-c"], input=layer, capture_output=True, check=True).stdout,
    }[kind]
    code, text = await _take(builds, tmp_path, [layer], packed=[packed[:-2000]])
    assert code == DAMAGED
    assert "damaged" in text


async def test_content_that_is_not_what_it_says_is_refused(builds: Builds, tmp_path: Path) -> None:
    layer, other = foreign.tar([entry("f", "1")]), foreign.tar([entry("f", "2")])
    built = foreign.image([layer], packed=[gzip.compress(other)])
    archive = foreign.tar(foreign.layout(built))
    ended, text = await scripts.run(builds, tmp_path, "import", stdin=archive)
    assert (ended.exit_code, "has other content than it says" in text) == (DAMAGED, True)

    built = foreign.image([layer])
    built.blobs[built.layers[0]] = gzip.compress(other)
    ended, text = await scripts.run(
        builds, tmp_path, "import", stdin=foreign.tar(foreign.layout(built))
    )
    assert (ended.exit_code, "has other content than it says" in text) == (DAMAGED, True)


async def test_an_archive_that_ends_anywhere_is_never_used(builds: Builds, tmp_path: Path) -> None:
    built = foreign.image([foreign.tar([entry("f", os.urandom(30_000))])])
    whole = foreign.tar(foreign.layout(built)).rstrip(b"\0")
    for length in range(0, len(whole) - 1000, 8000):
        ended, text = await scripts.run(builds, tmp_path, "import", stdin=whole[:length])
        assert ended.exit_code == DAMAGED, (length, text)
        assert not (tmp_path / "outputs" / "image.json").exists()


async def test_a_decompression_bomb_stops_at_the_free_disk(
    builds: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from madang.agent.buildscript import layertar

    layer = foreign.tar([entry("f", bytes(50_000_000))])
    with pytest.raises(Exception, match="unpacks to more than"):
        layertar.unpack_plain(iter([layer]), io.BytesIO(), 10_000_000)
    sparse = tarfile.TarInfo("huge")
    sparse.size = 1 << 45
    header = sparse.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(Exception, match="unpacks to more than"):
        layertar.convert(io.BytesIO(header + bytes(10240)), io.BytesIO(), 10_000_000)


async def test_sparse_files_are_read_with_their_holes(builds: Builds, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(b"begin")
        file.seek(5_000_000)
        file.write(b"end")
    for form in ("gnu", "posix"):
        tar = ["tar", "-C", str(tmp_path), f"--format={form}", "-S", "-cf", "-", "sparse"]
        layer = subprocess.run(tar, capture_output=True, check=True).stdout
        assert len(layer) < 1_000_000
        code, text = await _take(builds, tmp_path, [layer])
        assert code == SUCCESS, text
        found = _trees(tmp_path)[0] / "sparse"
        assert found.read_bytes() == path.read_bytes()
        assert found.stat().st_blocks * 512 < 3_000_000


async def test_a_thousand_layers_are_refused_and_many_are_not(
    builds: Builds, tmp_path: Path
) -> None:
    many = [foreign.tar([entry(f"f{n}", str(n))]) for n in range(1000)]
    code, text = await _take(builds, tmp_path, many)
    assert code == DAMAGED
    assert "has 1000 layers; the most is 400" in text
    code, text = await _take(builds, tmp_path, many[:150])
    assert code == SUCCESS, text
    assert len(_trees(tmp_path)) == 150


async def test_huge_and_deep_manifests_are_refused(builds: Builds, tmp_path: Path) -> None:
    for data in (b"[" * 200_000, b'{"a":"' + b"x" * 5_000_000 + b'"}', b"[1]", b"\xff"):
        archive = foreign.tar([entry("oci-layout", "{}"), entry("index.json", data)])
        ended, text = await scripts.run(builds, tmp_path, "import", stdin=archive)
        assert ended.exit_code == DAMAGED, text
        assert "Traceback" not in text


async def test_headers_of_impossible_sizes_are_not_read_into_memory(
    builds: Builds, tmp_path: Path
) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 33
    layer = info.tobuf(tarfile.GNU_FORMAT) + bytes(10240)
    code, text = await _take(builds, tmp_path, [layer])
    assert code == DAMAGED
    assert "header of an impossible size" in text


async def test_what_docker_saves_is_read_too(builds: Builds, tmp_path: Path) -> None:
    layers = [foreign.tar([folder("bin"), entry("bin/a", "a")]), foreign.tar([entry("b", "b")])]
    archive = foreign.tar(foreign.saved(foreign.image(layers, {"Cmd": ["/bin/a"]})))
    text = ""
    for stdin in (archive, gzip.compress(archive)):
        ended, text = await scripts.run(builds, tmp_path, "import", stdin=stdin)
        assert ended.exit_code == SUCCESS, text
        made = scripts.manifest(tmp_path / "outputs")
        assert (len(made.layers), made.config.cmd) == (2, ("/bin/a",))
    assert "at hand" in text  # the second time nothing is made anew


async def test_the_tar_of_a_root_file_system_is_an_image(builds: Builds, tmp_path: Path) -> None:
    archive = foreign.tar([folder("./bin"), entry("./bin/sh", "x", mode=0o755), folder("./etc")])
    ended, text = await scripts.run(builds, tmp_path, "import", stdin=archive)
    assert ended.exit_code == SUCCESS, text
    assert (_trees(tmp_path)[0] / "bin" / "sh").read_text() == "x"
    assert "PATH" in scripts.manifest(tmp_path / "outputs").config.env


async def test_an_image_of_another_machine_is_refused(builds: Builds, tmp_path: Path) -> None:
    layer = foreign.tar([entry("f", "x")])
    code, text = await _take(builds, tmp_path, [layer], architecture="s390x")
    assert code == DAMAGED
    assert f"is for linux/s390x, not for linux/{foreign.HERE}" in text


async def test_of_several_images_one_must_be_named(builds: Builds, tmp_path: Path) -> None:
    one = foreign.image([foreign.tar([entry("f", "1")])])
    two = foreign.image([foreign.tar([entry("f", "2")])])
    both = {**{e[0].name: e for e in foreign.layout(one)}, **{
        e[0].name: e for e in foreign.layout(two)}}  # fmt: skip
    tops = [json.loads(foreign.layout(built, name=name)[1][1])["manifests"][0]
            for built, name in ((one, "one"), (two, "two"))]  # fmt: skip
    both["index.json"] = entry("index.json", json.dumps({"manifests": tops}))
    archive = foreign.tar(both.values())
    ended, text = await scripts.run(builds, tmp_path, "import", stdin=archive)
    assert (ended.exit_code, "say which with --from: one, two" in text) == (DAMAGED, True)
    ended, text = await scripts.run(builds, tmp_path, "import", "--reference", "two", stdin=archive)
    assert ended.exit_code == SUCCESS, text
    assert (_trees(tmp_path)[0] / "f").read_text() == "2"


async def test_the_same_layer_twice_and_empty_ones_are_mounted_once(
    builds: Builds, tmp_path: Path
) -> None:
    a, b = foreign.tar([entry("a", "a")]), foreign.tar([entry(".wh.a"), entry("b")])
    code, text = await _take(builds, tmp_path, [a, foreign.tar([]), b, a])
    assert code == SUCCESS, text
    top, below = _trees(tmp_path)
    assert (top / "a").is_file()
    assert (below / "b").is_file()


def test_the_tar_of_a_stored_layer_makes_the_same_layer(store: LayerStore) -> None:
    layer = foreign.tar(
        [
            folder("d", mode=0o1777),
            entry("d/f", "x", mode=0o4711, owner=7),
            entry("d/g", "d/f", kind=tarfile.LNKTYPE),
            entry("d/.wh.h", ""),
            folder("o"),
            entry("o/.wh..wh..opq", ""),
            link("l", "/x"),
            entry("n\udcff", ""),
        ],
        pax=False,
    )
    first = store.stage_root(io.BytesIO(layer), 10**6)
    store.commit([first])
    once, twice = io.BytesIO(), io.BytesIO()
    rootlayer.write(store.path(first.digest), once)
    again = store.stage_root(io.BytesIO(once.getvalue()), 10**6)
    assert again.digest == first.digest
    rootlayer.write(again.path, twice)
    assert twice.getvalue() == once.getvalue()


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([entry("../x")], "no path"),
        ([entry("/x")], "no path"),
        ([entry("a/x")], "no folder"),
        ([link("a", "/etc"), entry("a/passwd")], "no folder"),
        ([entry("a"), entry("a")], "twice"),
        ([entry("n", kind=CHARACTER)], "neither"),
        ([entry("n", kind=BLOCK)], "neither"),
        ([entry("n", kind=PIPE)], "neither"),
        ([entry("h", "x", kind=tarfile.LNKTYPE)], "no file before"),
        ([link("l", "/etc/passwd"), entry("h", "l", kind=tarfile.LNKTYPE)], "no file before"),
        ([entry(".wh..wh..opq")], "no folder"),
        ([folder("d"), entry("d/.wh..wh..opq"), entry("d/.wh..wh..opq")], "twice"),
        ([entry(".wh.x", "data")], "empty file"),
        ([folder(".wh.x")], "empty file"),
        ([entry("x"), entry(".wh.x")], "twice"),
        ([entry(".wh..wh.x")], "hides nothing"),
        ([entry("x", modified_at=1 << 40)], "a time"),
    ],
)
def test_the_store_takes_nothing_that_is_not_of_the_format(
    store: LayerStore,
    tmp_path: Path,
    entries: list[tuple[tarfile.TarInfo, bytes]],
    words: str,
) -> None:
    with pytest.raises(Exception, match=words):
        store.stage_root(io.BytesIO(foreign.tar(entries, pax=False)), 10**6)
    assert os.listdir(tmp_path / "layers") == []
