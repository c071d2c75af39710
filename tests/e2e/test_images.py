"""Images from and to elsewhere, through the real command line, from import to a running program."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.agent.images import registries

from madang.client import Client
from madang.testing import foreignimages as foreign
from madang.testing.foreignimages import Built, entry, folder, link
from madang.testing.platform import Platform, start
from madang.testing.roots import APPLETS, BUSYBOX

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: whole roots are mounted"),
    pytest.mark.skipif(
        not os.path.exists(BUSYBOX), reason="busybox-static is missing: apt install busybox-static"
    ),
]
TAG = "/v2/library/tool/manifests/latest"


def _image(version: str) -> Built:
    """Busybox, and above it a layer that removes a file and adds others."""
    with open(BUSYBOX, "rb") as file:
        busybox = file.read()
    low = [folder("bin"), entry("bin/busybox", busybox, mode=0o755), entry("old", "old")]
    low += [link(f"bin/{name}", "busybox") for name in APPLETS]
    low += [folder("etc"), entry("etc/passwd", "root:x:0:0::/:/bin/sh\n")]
    high = [entry("version", version), entry(".wh.old", ""), folder("tmp", mode=0o1777)]
    config = {
        "Env": ["PATH=/bin", "TOOL=yes"],
        "Entrypoint": ["/bin/echo", "entry"],
        "Cmd": ["usual"],
        "Labels": {"made-by": "test"},
    }
    return foreign.image([foreign.tar(low), foreign.tar(high)], config)


@pytest.fixture(scope="module")
def told() -> Iterator[registries.Told]:
    with registries.told() as made:
        yield made


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory, told: registries.Told) -> Iterator[Platform]:
    folder = tmp_path_factory.mktemp("images")
    file = folder / "registries.toml"
    file.write_text(f'["{told.address}"]\nhttp = true\n')
    folder.chmod(0o755)
    with start(folder, environment={"MADANG_IMAGES_REGISTRIES": str(file)}) as made:
        yield made


@pytest.fixture
def client(platform: Platform) -> Iterator[Client]:
    with platform.client() as client:
        yield client


def _madang(platform: Platform, *words: str, **more: object) -> str:
    done = platform.madang(*words, **more)
    assert done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"
    return done.stdout


def _shell(platform: Platform, image: str, text: str) -> str:
    words = ("run", "--no-sync", "-q", "--image", image, "--", "/bin/sh", "-c", text)
    return _madang(platform, *words).strip()


def test_an_archive_becomes_an_image_that_runs(
    platform: Platform, client: Client, tmp_path: Path
) -> None:
    archive = tmp_path / "tool.tar"
    archive.write_bytes(foreign.tar(foreign.layout(_image("1"))))
    _madang(platform, "image", "import", str(archive), "tool")
    assert _shell(
        platform, "tool", "cat /version; echo; echo $TOOL; ls /old; ls -ld /tmp"
    ).startswith("1\nyes")
    said = json.loads(_madang(platform, "image", "inspect", "tool"))
    assert said["config"]["entrypoint"] == ["/bin/echo", "entry"]
    assert said["config"]["labels"] == {"made-by": "test"}
    words = ("run", "--no-sync", "-q", "--image", "tool", "--entry")
    assert _madang(platform, *words) == "entry usual\n"
    assert _madang(platform, *words, "--", "other") == "entry other\n"


def test_a_layout_and_standard_input_are_taken_too(platform: Platform, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    for info, data in foreign.layout(_image("2")):
        path = layout / info.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    _madang(platform, "image", "import", str(layout), "from-layout")
    assert _shell(platform, "from-layout", "cat /version") == "2"
    saved = foreign.tar(foreign.saved(_image("3")))
    done = platform.madang("image", "import", "-", "from-stdin", input=saved, text=False)
    assert done.returncode == 0, done.stderr
    assert _shell(platform, "from-stdin", "cat /version") == "3"


def test_a_tag_is_pulled_followed_and_gone_back_from(
    platform: Platform, client: Client, told: registries.Told
) -> None:
    told.offer(_image("10"))
    name = f"{told.address}/library/tool"
    _madang(platform, "image", "pull", name, "pulled")
    first = client.get_image("pulled").digest
    with client.run(["/bin/sleep", "1000"], image="pulled", cpu=0.5) as idle:
        assert "current" in _madang(platform, "image", "outdated")

        told.offer(_image("11"))
        assert "outdated" in _madang(platform, "image", "outdated")
        _madang(platform, "image", "pull", name, "pulled")
        assert _shell(platform, "pulled", "cat /version") == "11"
        assert _shell(platform, f"pulled@{first[:12]}", "cat /version") == "10"
        with client.exec(idle.session.id, ["/bin/cat", "/version"]) as running:
            assert b"".join(record.data for record in running) == b"10"
        idle.stop(grace_s=0)

    assert first[:12] in _madang(platform, "image", "versions", "pulled")
    _madang(platform, "image", "rollback", "pulled")
    assert _shell(platform, "pulled", "cat /version") == "10"
    _madang(platform, "image", "tag", "pulled", "stable")
    assert _shell(platform, "stable", "cat /version") == "10"
    assert "pulled@" in _madang(platform, "image", "prune")
    assert "every 1d" in _madang(platform, "image", "follow", "pulled", "--every", "1d")


def test_an_export_is_the_same_each_time_and_imports_again(
    platform: Platform, tmp_path: Path
) -> None:
    archive = tmp_path / "in.tar"
    archive.write_bytes(foreign.tar(foreign.layout(_image("20"))))
    _madang(platform, "image", "import", str(archive), "mine")
    out = [tmp_path / "1.tar", tmp_path / "2.tar"]
    for path in out:
        _madang(platform, "image", "export", "mine", str(path))
    assert out[0].read_bytes() == out[1].read_bytes()
    _madang(platform, "image", "import", str(out[0]), "again")
    assert _shell(platform, "again", "cat /version; echo; echo $TOOL") == "20\nyes"


def test_what_is_no_image_is_told_and_leaves_nothing(platform: Platform, tmp_path: Path) -> None:
    bad = tmp_path / "bad.tar"
    bad.write_bytes(foreign.tar(foreign.layout(_image("30")))[:400_000])
    done = platform.madang("image", "import", str(bad), "bad")
    assert done.returncode != 0
    assert "ends in the middle" in done.stdout + done.stderr
    shown = platform.madang("image", "show", "bad")
    assert "failed" in shown.stdout
    assert platform.madang("run", "--image", "bad", "--", "/bin/true").returncode != 0


@pytest.mark.skipif(registries.PROGRAM is None, reason="docker-registry is missing")
def test_a_push_to_a_name_that_nobody_answers_is_told(platform: Platform, tmp_path: Path) -> None:
    archive = tmp_path / "in.tar"
    archive.write_bytes(foreign.tar(foreign.layout(_image("40"))))
    _madang(platform, "image", "import", str(archive), "lonely")
    done = platform.madang("image", "push", "lonely", "127.0.0.1:9/none")
    assert done.returncode != 0
    assert "can't be reached from builds" in done.stdout + done.stderr
