"""Images out of registries and into them: a real one, and some that behave badly."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from tests.agent.images import registries, scripts
from tests.agent.images.conftest import reader
from tests.agent.images.registries import PASSWORD, Answers

from madang.agent.build import Builds
from madang.agent.imageregistries import ImageRegistry
from madang.agent.layers import remove_tree
from madang.agent.registry import registry
from madang.kit.clock import SystemClock
from madang.kit.secret import Secret
from madang.testing import foreignimages as foreign
from madang.testing.foreignimages import Built, entry, folder
from madang.wire.session import Ended

SUCCESS, DAMAGED, NETWORK, DENIED = 0, 68, 69, 77
needs_registry = pytest.mark.skipif(
    registries.PROGRAM is None, reason="docker-registry is missing: apt install docker-registry"
)


class Node:
    """A node whose builds reach the registries that it is told of."""

    def __init__(self, tmp_path: Path, outputs: Path) -> None:
        self.path = tmp_path
        self.outputs = outputs
        self._open: list[Builds] = []

    async def run(
        self, *words: str, places: tuple[ImageRegistry, ...] = (), **options: object
    ) -> tuple[Ended, str]:
        builds = Builds(
            state_dir=str(self.path),
            service_dir=lambda _: str(self.path / "service"),
            read=reader(self.outputs),
            registry=registry({}, places),
            clock=SystemClock(),
        )
        await builds.open()
        try:
            return await scripts.run(builds, self.path, *words, **options)  # type: ignore[arg-type]
        finally:
            await builds.close()

    def top(self) -> Path:
        made = scripts.manifest(self.outputs)
        return self.path / "layers" / made.layers[0].digest

    def forget(self) -> None:
        """As a new node."""
        for name in os.listdir(self.path / "layers"):
            remove_tree(str(self.path / "layers" / name))


@pytest.fixture
async def node(tmp_path: Path, outputs: Path) -> AsyncGenerator[Node, None]:
    (tmp_path / "service").mkdir()
    yield Node(tmp_path, outputs)


def _at(address: str, **values: object) -> ImageRegistry:
    return ImageRegistry(host=address, http=True, **values)  # type: ignore[arg-type]


def _built(text: str = "x") -> Built:
    low = foreign.tar([folder("bin"), entry("bin/tool", os.urandom(200_000), mode=0o755)])
    return foreign.image([low, foreign.tar([entry("f", text)])], {"Cmd": ["/bin/tool"]})


@needs_registry
async def test_an_image_is_pulled_and_what_is_at_hand_is_not_fetched_again(
    node: Node, tmp_path: Path
) -> None:
    built = _built()
    async with registries.docker_registry(tmp_path) as address:
        digest = registries.upload(address, "team/tool", "v1", built)
        place = _at(address)
        ended, text = await node.run("pull", f"{address}/team/tool:v1", places=(place,))
        assert ended.exit_code == SUCCESS, text
        made = scripts.manifest(node.outputs)
        assert (made.source.reference, made.source.digest) == (f"{address}/team/tool:v1", digest)
        assert (node.top() / "f").read_text() == "x"
        ended, text = await node.run("pull", f"{address}/team/tool@{digest}", places=(place,))
        assert ended.exit_code == SUCCESS, text
        assert text.count("at hand") == 2


@needs_registry
async def test_of_an_index_this_machines_image_is_taken(node: Node, tmp_path: Path) -> None:
    here = _built("here")
    other = foreign.image([foreign.tar([entry("f", "other")])], architecture="s390x")
    async with registries.docker_registry(tmp_path) as address:
        index = foreign.index({"linux/s390x": other, f"linux/{foreign.HERE}": here})
        registries.upload(address, "tool", "x", other, foreign.index({"linux/s390x": other}))
        digest = registries.upload(address, "tool", "both", here, index)
        name, place = f"{address}/tool", _at(address)
        ended, text = await node.run("pull", f"{name}:both", places=(place,))
        assert ended.exit_code == SUCCESS, text
        assert (node.top() / "f").read_text() == "here"
        assert scripts.manifest(node.outputs).source.digest == digest
        ended, text = await node.run("pull", f"{name}:x", places=(place,))
        assert ended.exit_code == DAMAGED
        assert "only for: linux/s390x" in text
        ended, text = await node.run(
            "pull", f"{name}:both", "--platform", "linux/s390x", places=(place,)
        )
        assert ended.exit_code == SUCCESS, text
        assert scripts.manifest(node.outputs).config.architecture == "s390x"


@needs_registry
async def test_what_is_pushed_comes_back_the_same(node: Node, tmp_path: Path) -> None:
    layer = foreign.tar(
        [
            folder("tmp", mode=0o1777),
            entry("bin/su", "su", mode=0o4755, owner=3),
            entry("bin/.wh.gone", ""),
            entry("same", "bin/su", kind=tarfile.LNKTYPE),
        ]
    )
    archive = foreign.tar(foreign.layout(foreign.image([_built().plain[0], layer])))
    ended, text = await node.run("import", stdin=archive)
    assert ended.exit_code == SUCCESS, text
    made = scripts.manifest(node.outputs)
    offers = tuple(each.digest for each in made.layers)
    env = {"IMAGE_CONFIG": json.dumps({**_CONFIG, "env": {"A": "b"}, "cmd": ["/bin/tool"]})}
    async with registries.docker_registry(tmp_path, login="ann") as address:
        places = (_at(address, username="ann", password=Secret(PASSWORD)),)
        words = ("push", f"{address}/team/tool:v2")
        ended, text = await node.run(*words, places=places, offers=offers, env=env)
        assert ended.exit_code == SUCCESS, text
        assert text.count("sent ") == 3
        ended, text = await node.run(*words, places=places, offers=offers, env=env)
        assert (ended.exit_code, text.count("there "), text.count("sent ")) == (SUCCESS, 3, 0)

        node.forget()
        ended, text = await node.run("pull", f"{address}/team/tool:v2", places=places)
        assert ended.exit_code == SUCCESS, text
        again = scripts.manifest(node.outputs)
        assert tuple(each.digest for each in again.layers) == offers
        assert (again.config.env, again.config.cmd) == ({"A": "b"}, ("/bin/tool",))


_CONFIG = {
    "env": {},
    "entrypoint": [],
    "cmd": [],
    "cwd": "",
    "user": "",
    "labels": {},
    "architecture": foreign.HERE,
}


async def test_an_export_is_the_same_each_time_and_can_be_imported(node: Node) -> None:
    ended, text = await node.run("import", stdin=foreign.tar(foreign.layout(_built())))
    assert ended.exit_code == SUCCESS, text
    layers = scripts.manifest(node.outputs).layers
    offers = tuple(each.digest for each in layers)
    env = {"IMAGE_CONFIG": json.dumps(_CONFIG)}
    found = []
    for _ in range(2):
        ended, text = await node.run("export", "tool", offers=offers, env=env)
        assert (ended.exit_code, "export   tool" in text) == (SUCCESS, True), ended.text
        found.append((node.outputs / "image.tar").read_bytes())
    assert found[0] == found[1]
    with tarfile.open(fileobj=io.BytesIO(found[0])) as archive:
        assert "index.json" in archive.getnames()
    node.forget()
    ended, text = await node.run("import", "--reference=tool", stdin=found[0])
    assert ended.exit_code == SUCCESS, text
    assert scripts.manifest(node.outputs).layers[0].digest == layers[0].digest


async def test_a_build_reads_no_layer_that_it_is_not_offered(node: Node) -> None:
    ended, _ = await node.run("import", stdin=foreign.tar(foreign.layout(_built())))
    assert ended.exit_code == SUCCESS
    env = {"IMAGE_CONFIG": json.dumps(_CONFIG)}
    ended, text = await node.run("export", "tool", offers=("0" * 64,), env=env)
    assert ended.exit_code != SUCCESS
    assert "answers 404" in text


@needs_registry
async def test_a_login_comes_from_the_user_or_the_operator(node: Node, tmp_path: Path) -> None:
    async with registries.docker_registry(tmp_path, login="ann") as address:
        ended, text = await node.run("pull", f"{address}/tool", places=(_at(address),))
        assert ended.exit_code == DENIED
        assert "say who you are with --username" in text
        login = json.dumps({"username": "ann", "password": "wrong"}).encode() + b"\n"
        words = ("pull", f"{address}/tool", "--login")
        ended, text = await node.run(*words, places=(_at(address),), stdin=login)
        assert (ended.exit_code, "for ann" in text, "wrong" in text) == (DENIED, True, False)
        login = json.dumps({"username": "ann", "password": PASSWORD}).encode() + b"\n"
        ended, text = await node.run(*words, places=(_at(address),), stdin=login)
        assert ended.exit_code == DAMAGED  # logged in; the image is not there
        assert "is not there" in text


async def test_tokens_are_fetched_where_the_registry_says(node: Node) -> None:
    with registries.told() as told:
        told.offer(_built())
        told.need_token(("ann", "pw"))
        place = _at(told.address, username="ann", password=Secret("pw"))
        ended, text = await node.run("pull", f"{told.address}/library/tool", places=(place,))
        assert ended.exit_code == SUCCESS, text
        assert "pw" not in text
        assert sum(path.startswith("/token") for path, _ in told.asked) == 1


async def test_a_download_goes_on_where_it_stopped(node: Node) -> None:
    with registries.told() as told:
        built = _built()
        told.offer(built)
        path = f"/v2/library/tool/blobs/{built.layers[0]}"
        data, ranges = built.blobs[built.layers[0]], []

        def breaks(request: Answers) -> None:
            asked = request.headers.get("Range")
            ranges.append(asked)
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
            part = data[start : start + len(data) // 2]
            whole = f"bytes {start}-{len(data) - 1}/{len(data)}"
            request.send_response(206 if start else 200)
            request.send_header("Content-Length", str(len(data) - start))
            request.send_header("Content-Range", whole)
            request.end_headers()
            request.wfile.write(part)
            request.close_connection = True

        told.things[path] = breaks
        ended, text = await node.run(
            "pull", f"{told.address}/library/tool", places=(_at(told.address),)
        )
        assert ended.exit_code == SUCCESS, text
        assert ranges[0] is None
        assert ranges[1] == f"bytes={len(data) // 2}-"


async def test_a_registry_that_goes_away_in_the_middle_leaves_nothing(node: Node) -> None:
    with registries.told() as told:
        built = _built()
        told.offer(built)

        def down(request: Answers) -> None:
            request.say(503)

        told.things[f"/v2/library/tool/blobs/{built.layers[1]}"] = down
        ended, text = await node.run(
            "pull", f"{told.address}/library/tool", places=(_at(told.address),)
        )
    assert ended.exit_code == NETWORK
    assert "answers 503" in text
    assert "retry" in text
    assert not (node.outputs / "image.json").exists()
    assert [name for name in os.listdir(node.path / "layers") if name != ".keys"] == []


async def test_a_blob_or_manifest_that_was_tampered_with_is_refused(node: Node) -> None:
    with registries.told() as told:
        built, other = _built(), _built("other")
        told.offer(built)
        place = (_at(told.address),)
        name = f"{told.address}/library/tool"
        path = f"/v2/library/tool/blobs/{built.layers[0]}"
        told.things[path] = built.blobs[built.layers[0]][:-1] + b"!"
        ended, text = await node.run("pull", name, places=place)
        assert (ended.exit_code, "has other content" in text) == (DAMAGED, True), text

        told.things[f"/v2/library/tool/manifests/{built.digest}"] = other.manifest
        ended, text = await node.run("pull", f"{name}@{built.digest}", places=place)
        assert (ended.exit_code, "is not the one" in text) == (DAMAGED, True), text

        told.things["/v2/library/tool/manifests/latest"] = b"x" * 5_000_000
        ended, text = await node.run("pull", name, places=place)
        assert (ended.exit_code, "has more than" in text) == (DAMAGED, True), text

        told.things["/v2/library/tool/manifests/latest"] = b'{"schemaVersion": 1}'
        ended, text = await node.run("pull", name, places=place)
        assert (ended.exit_code, "schema 1" in text) == (DAMAGED, True), text


async def test_mirrors_come_first_and_the_registry_helps_out(node: Node) -> None:
    with registries.told() as origin, registries.told() as mirror:
        built = _built()
        origin.offer(built, "team/tool")
        mirror.offer(built, "hub/team/tool")
        places = (_at(origin.address, mirrors=(f"{mirror.address}/hub",)), _at(mirror.address))
        name = f"{origin.address}/team/tool"
        ended, text = await node.run("pull", name, places=places)
        assert ended.exit_code == SUCCESS, text
        assert origin.asked == []
        node.forget()
        mirror.things.clear()
        ended, text = await node.run("pull", name, places=places)
        assert ended.exit_code == SUCCESS, text
        assert origin.asked


async def test_a_login_is_not_given_to_where_a_registry_leads(node: Node) -> None:
    with registries.told() as told, registries.told() as elsewhere:
        built = _built()
        told.offer(built)
        told.need_token(("ann", "pw"))
        blob = f"/v2/library/tool/blobs/{built.layers[0]}"
        elsewhere.things["/blob"] = built.blobs[built.layers[0]]

        def leads(request: Answers) -> None:
            request.say(307, Location=f"http://{elsewhere.address}/blob")

        told.things[blob] = leads
        places = (
            _at(told.address, username="ann", password=Secret("pw")),
            _at(elsewhere.address),
        )
        ended, text = await node.run("pull", f"{told.address}/library/tool", places=places)
        assert ended.exit_code == SUCCESS, text
        assert all("Authorization" not in headers for _, headers in elsewhere.asked)


async def test_a_private_registry_that_nobody_named_is_not_reached(node: Node) -> None:
    with registries.told() as told:
        told.offer(_built())
        ended, text = await node.run("pull", f"{told.address}/library/tool")
        assert ended.exit_code == NETWORK
        assert "images.registries" in text
        assert told.asked == []


async def test_check_says_what_tags_stand_for_and_what_fails(node: Node) -> None:
    with registries.told() as told:
        built = _built()
        told.offer(built)
        good, bad = f"{told.address}/library/tool:latest", f"{told.address}/library/none:latest"
        ended, text = await node.run("check", good, bad, places=(_at(told.address),))
        assert ended.exit_code == SUCCESS, text
    found = json.loads((node.outputs / "check.json").read_bytes())
    assert found[good] == {"digest": built.digest}
    assert "is not there" in found[bad]["error"]
