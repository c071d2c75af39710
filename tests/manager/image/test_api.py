"""Images over HTTP, with a scripted agent that builds them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from madang.kit.link import MemoryStream
from madang.testing.manager import ManagerBox
from madang.testing.patience import PATIENCE_S
from madang.wire.kernel import Assignment
from madang.wire.link import FileEntry, ReadFile, StreamRequest
from madang.wire.session import Ended, Reason

MANIFEST = {
    "python": "3.11",
    "layers": [{"digest": "a" * 64, "name": "numpy", "version": "2.4.6", "size_bytes": 7}],
}


async def _serve(request: StreamRequest, stream: MemoryStream) -> None:
    """The outputs of a build."""
    assert isinstance(request, ReadFile)
    assert request.path == "/outputs/image.json"
    data = json.dumps(MANIFEST).encode()
    entry = FileEntry(path="", kind="file", size_bytes=len(data), mode=0o644, modified_at=0)
    await stream.send(entry)
    await stream.send(data)


async def _build(box: ManagerBox, name: str = "digits", **more: Any) -> dict[str, Any]:
    body = {"name": name, "requirements": ["numpy"], **more}
    found: dict[str, Any] = await box.call("POST", "/v1/images", body, status=202)
    return found


async def test_an_image_is_built_used_and_removed(either_box: ManagerBox) -> None:
    box, agent = either_box, await either_box.add_agent()
    agent.serve = _serve
    session = await _build(box, labels={"team": "a"}, size={"disk_bytes": 5 << 30})
    assert (session["kind"], session["labels"]) == ("build", {"image": "digits"})
    assert session["size"]["disk_bytes"] == 5 << 30
    assignment: Assignment = await agent.assigned(session["id"])
    assert assignment.spec.build
    assert assignment.spec.owner
    assert assignment.spec.argv == ("python3", "-I", "/madang/tools/build.pyz", "pip", "numpy")
    await box.call("POST", "/v1/images", {"name": "digits", "requirements": ["x"]}, status=409)

    await agent.running(assignment)
    await agent.ended(assignment)
    await box.until(session["id"], "TERMINATED")

    image = await box.call("GET", "/v1/images/digits")
    assert (image["status"], image["size_bytes"]) == ("READY", 7)
    assert (image["build"], image["labels"]) == (session["name"], {"team": "a"})
    run = await box.call("POST", "/v1/sessions", {"argv": ["true"], "image": "digits"})
    assert run["image_digest"] == image["digest"]
    mount = (await agent.assigned(run["id"])).spec.image
    assert (mount.kind, mount.layers) == ("layers", ("a" * 64,))
    listed = await box.call("GET", "/v1/images")
    assert [(i["name"], i["used_by"]) for i in listed] == [("host", 0), ("digits", 1)]
    await box.call("DELETE", "/v1/images/digits", status=409)
    await box.call("DELETE", "/v1/images/digits?force=1", status=204)
    problem = await box.call("GET", "/v1/images/digits", status=404)
    assert problem["code"] == "image.unknown"


async def test_the_policy_of_an_image_counts_in_sessions_that_start_from_it(
    either_box: ManagerBox,
) -> None:
    box, agent = either_box, await either_box.add_agent()
    agent.serve = _serve
    own = "version = 1\n\n[[connect]]\nonly = []\n"
    session = await _build(box, policy=own)
    await agent.running(assignment := await agent.assigned(session["id"]))
    assert assignment.spec.sandbox.nets == (), "it is not built under it"
    await agent.ended(assignment)
    await box.until(session["id"], "TERMINATED")
    assert (await box.call("GET", "/v1/images/digits"))["policy"] == own

    more = "version = 1\n[[bind]]\nonly = []\n"
    body = {"argv": ["true"], "image": "digits", "policy": more}
    run = await box.call("POST", "/v1/sessions", body)
    told = await agent.assigned(run["id"])
    places = [rule.place for rule in told.spec.sandbox.nets]
    assert places == ["image line 3", "session line 2"]
    assert told.spec.sandbox.label == "image, session"
    assert told.live
    other = await box.call("POST", "/v1/sessions", {"argv": ["true"]})
    assert not (await agent.assigned(other["id"])).spec.sandbox


async def test_an_image_s_policy_is_checked_and_widens_nothing(box: ManagerBox) -> None:
    for text, words in (
        ("version = 1\n[[connect]]\ndeny = ['x y']\n", "line 2"),
        ("version = 1\nwiden = ['perf']\n", "only an administrator's layer"),
    ):
        body = {"name": "digits", "requirements": ["numpy"], "policy": text}
        problem = await box.call("POST", "/v1/images", body, status=400)
        assert problem["code"] == "policy.invalid"
        assert words in problem["detail"]


async def test_an_image_is_made_though_nobody_asks(box: ManagerBox) -> None:
    agent = await box.add_agent()
    agent.serve = _serve
    session = await _build(box)
    assignment = await agent.assigned(session["id"])
    await agent.running(assignment)
    with box.manager.feed.watch() as changes:
        await agent.ended(assignment)
        async with asyncio.timeout(PATIENCE_S):
            while await box.manager.images.wanted_layers() != ("a" * 64,):
                await changes.wait()


async def test_a_failed_build_says_why(box: ManagerBox) -> None:
    agent = await box.add_agent()
    session = await _build(box)
    assignment = await agent.assigned(session["id"])
    await agent.running(assignment)
    await agent.ended(assignment, Ended(reason=Reason.EXIT, exit_code=66))
    await box.until(session["id"], "TERMINATED")

    image = await box.call("GET", "/v1/images/digits")

    assert image["status"] == "FAILED"
    assert session["name"] in image["reason"]
    problem = await box.call(
        "POST", "/v1/sessions", {"argv": ["true"], "image": "digits"}, status=404
    )
    assert "could not be installed" in problem["detail"]


async def test_bad_requests_are_refused_with_the_field(box: ManagerBox) -> None:
    for body in (
        {"name": "../x", "requirements": ["numpy"]},
        {"name": "digits", "requirements": []},
        {"name": "digits", "requirements": ["-r /etc/passwd"]},
        {"name": "digits"},
        {"name": "digits", "requirements": ["numpy"], "size": {"cpu": "many"}},
    ):
        problem = await box.call("POST", "/v1/images", body, status=400)
        assert problem["code"] == "request.invalid", body
    await box.call("DELETE", "/v1/images/nothing", status=404)
    await box.call("DELETE", "/v1/images/host", status=409)


async def test_an_impossible_size_leaves_no_image(box: ManagerBox) -> None:
    await box.add_agent()
    body = {"name": "digits", "requirements": ["numpy"], "size": {"cpu": 10_000}}
    await box.call("POST", "/v1/images", body, status=409)
    assert [image["name"] for image in await box.call("GET", "/v1/images")] == ["host"]


async def test_images_need_a_token(box: ManagerBox) -> None:
    headers = {"Authorization": ""}
    for method, path in (("GET", "/v1/images"), ("POST", "/v1/images")):
        await box.call(method, path, status=401, headers=headers)
