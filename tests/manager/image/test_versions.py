"""Versions of a name, images from elsewhere: on real databases, beside a stand-in for sessions."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from tests.manager.image.test_service import ADMIN, ANN, BOB, Box

from madang.manager.audit.service import AuditLog
from madang.manager.db import Database
from madang.manager.identity.store import add_user
from madang.manager.image.service import ImageService, Transfers, Versions
from madang.manager.image.types import ImageSettings
from madang.testing.clock import FakeClock
from madang.wire.errors import Conflict, Forbidden, ImageUnknown, InvalidRequest
from madang.wire.image import ImageStatus, ImportRequest, PullRequest, PushRequest
from madang.wire.session import Session

REFERENCE = "registry.example.org/team/tool:v1"
DAY_S = 86400.0


class Whole(Box):
    """With what stands beside the service."""

    versions: Versions
    transfers: Transfers

    async def pull(self, **values: Any) -> Session:
        request = PullRequest(name="tool", reference=REFERENCE, **values)
        return await self.transfers.pull(ANN, request, key=None)

    def end_root(self, session: Session, *names: str, digest: str = "1", **config: Any) -> None:
        self.sessions.end(session, *names)
        made = json.loads(self.sessions.files[session.id])
        made |= {
            "python": "",
            "kind": "root",
            "config": config,
            "source": {"reference": REFERENCE, "digest": f"sha256:{digest * 64}"},
        }
        self.sessions.files[session.id] = json.dumps(made).encode()

    async def pulled(self, *names: str, **values: Any) -> str:
        self.end_root(await self.pull(**values), *names)
        await self.service.settle_builds()
        return (await self.service.get(ANN, "tool")).digest


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def box(database: Database, clock: FakeClock) -> Whole:
    from tests.manager.image.test_service import Sessions

    changes: list[None] = []
    service = ImageService(
        database,
        AuditLog(database, clock),
        clock,
        ImageSettings(versions=2),
        layers_changed=lambda: changes.append(None),
    )
    service.sessions = sessions = Sessions(clock)
    made = Whole(service, sessions, clock, database, changes)
    made.versions = Versions(service, database, clock)
    made.transfers = Transfers(service, database, ImageSettings())
    return made


async def test_a_pulled_image_is_a_root_that_knows_where_it_came_from(box: Whole) -> None:
    session = await box.pull(platform="linux/arm64", login=True)
    assert session.argv[-5:] == ("pull", REFERENCE, "--platform", "linux/arm64", "--login")
    box.end_root(session, "a", "b", env={"PATH": "/bin"}, cmd=["/bin/tool"])
    mount = await box.service.resolve(ANN, "tool")
    assert (mount.kind, mount.env) == ("root", {"PATH": "/bin"})
    image = await box.service.get(ANN, "tool")
    assert (image.kind, image.python, image.config.cmd) == ("root", "", ("/bin/tool",))
    assert (image.source.reference, image.source.digest) == (REFERENCE, f"sha256:{'1' * 64}")


async def test_a_new_version_leaves_the_old_one_for_pins_and_for_going_back(box: Whole) -> None:
    first = await box.pulled("a")
    second = await box.pulled("b")
    assert (await box.service.resolve(ANN, "tool")).digest == second
    for pin in (f"tool@{first}", f"tool@{first[:8]}", f"tool@sha256:{first[:12]}"):
        assert (await box.service.resolve(ANN, pin)).layers == ("a" * 64,)
    assert set(await box.service.wanted_layers()) == {"a" * 64, "b" * 64}

    back = await box.versions.rollback(ANN, "tool", "")
    assert (back.digest, back.status) == (first, ImageStatus.READY)
    assert (await box.service.resolve(ANN, "tool")).digest == first
    forth = await box.versions.rollback(ANN, "tool", second[:10])
    assert forth.digest == second
    assert [image.digest for image in await box.versions.list(ANN, "tool")] == [second, first]


async def test_what_says_other_things_of_its_programs_is_another_version(box: Whole) -> None:
    first = await box.pulled("a")
    box.end_root(await box.pull(), "a", cmd=["/other"])
    assert (await box.service.resolve(ANN, "tool")).digest != first


async def test_the_same_content_again_is_no_new_version(box: Whole) -> None:
    await box.pulled("a")
    await box.pulled("a")
    assert len(await box.versions.list(ANN, "tool")) == 1


async def test_the_oldest_versions_go_by_themselves(box: Whole) -> None:
    made = []
    for name in "abcd":
        made.append(await box.pulled(name))
        await box.clock.advance(1)
    assert [i.digest for i in await box.versions.list(ANN, "tool")] == made[:0:-1]
    with pytest.raises(ImageUnknown, match="no version"):
        await box.service.resolve(ANN, f"tool@{made[0]}")


@pytest.mark.parametrize("pin", ["tool@", "tool@abc", "tool@zzzzzzzz", f"tool@{'a' * 65}"])
async def test_a_pin_must_be_a_digest(box: Whole, pin: str) -> None:
    await box.pulled("a")
    with pytest.raises(InvalidRequest, match="digest"):
        await box.service.resolve(ANN, pin)


async def test_going_back_needs_something_to_go_back_to(box: Whole) -> None:
    with pytest.raises(ImageUnknown):
        await box.versions.rollback(ANN, "tool", "")
    await box.pulled("a")
    with pytest.raises(ImageUnknown, match="no older version"):
        await box.versions.rollback(ANN, "tool", "")
    with pytest.raises(ImageUnknown, match="no version"):
        await box.versions.rollback(ANN, "tool", "00000000")


async def test_a_tag_is_the_same_content_under_a_further_name(box: Whole) -> None:
    digest = await box.pulled("a")
    tagged = await box.versions.tag(ANN, f"tool@{digest[:12]}", "stable")
    assert (tagged.name, tagged.digest) == ("stable", digest)
    assert (await box.service.resolve(ANN, "stable")).layers == ("a" * 64,)
    await box.pulled("b")
    await box.versions.tag(ANN, "tool", "stable")
    assert len(await box.versions.list(ANN, "stable")) == 2
    with pytest.raises(ImageUnknown):
        await box.versions.tag(ANN, "host", "mine")
    with pytest.raises(Conflict):
        await box.versions.tag(ANN, "tool", "host")


async def test_versions_are_their_owners(box: Whole) -> None:
    async with box.database.begin() as tx:
        for who in (ANN, BOB):
            await add_user(
                tx, user_id=who.user_id, name=who.user, role="user", project_id="default",
                created_at=0,
            )  # fmt: skip
    await box.pulled("a")
    await box.pulled("b")
    for act in (
        box.versions.rollback(BOB, "tool", ""),
        box.versions.follow(BOB, "tool", DAY_S),
        box.versions.tag(BOB, "tool", "tool"),
    ):
        with pytest.raises(Forbidden):
            await act
    assert await box.versions.prune(BOB, dry_run=False) == ()
    assert (await box.versions.rollback(ADMIN, "tool", "")).digest


async def test_prune_takes_what_nothing_runs_from(box: Whole) -> None:
    first, second = await box.pulled("a"), await box.pulled("b")
    await box.pulled("c")
    box.sessions.end(await box.build("other"), code=65)
    await box.service.settle_builds()
    box.sessions.live = {first: 1}
    said = await box.versions.prune(ANN, dry_run=True)
    assert {(each.name, each.digest) for each in said} == {("tool", second), ("other", "")}
    assert len(await box.versions.list(ANN, "tool")) == 3
    assert await box.versions.prune(ANN, dry_run=False) == said
    assert await box.versions.prune(ANN, dry_run=False) == ()
    assert [i.digest for i in await box.versions.list(ANN, "tool")][1:] == [first]


async def test_a_followed_image_is_made_anew_when_it_is_time(box: Whole) -> None:
    first = await box.pulled("a", refresh_s=DAY_S)
    count = len(box.sessions.sessions)
    await box.versions.refresh_due(box.clock.now())
    assert len(box.sessions.sessions) == count, "not yet"

    await box.clock.advance(DAY_S + 1)
    await box.versions.refresh_due(box.clock.now())
    await box.versions.refresh_due(box.clock.now())
    assert len(box.sessions.sessions) == count + 1
    session = box.sessions.sessions[f"s{count + 1}"]
    assert session.argv[-2:] == ("pull", REFERENCE)
    box.end_root(session, "b", digest="2")
    await box.service.settle_builds()
    image = await box.service.get(ANN, "tool")
    assert (image.digest != first, image.refresh_s) == (True, DAY_S)
    assert (await box.service.resolve(ANN, f"tool@{first}")).digest == first

    await box.versions.rollback(ANN, "tool", "")
    await box.clock.advance(2 * DAY_S)
    await box.versions.refresh_due(box.clock.now())
    assert len(box.sessions.sessions) == count + 1, "who goes back stays there"


async def test_a_refresh_that_fails_leaves_the_image_and_is_tried_at_the_next_time(
    box: Whole,
) -> None:
    first = await box.pulled("a", refresh_s=DAY_S)
    for number in (2, 3):
        await box.clock.advance(DAY_S + 1)
        await box.versions.refresh_due(box.clock.now())
        box.sessions.end(box.sessions.sessions[f"s{number}"], code=69)
        await box.service.settle_builds()
        assert (await box.service.get(ANN, "tool")).digest == first
    assert len(box.sessions.sessions) == 3


async def test_only_what_can_be_made_again_is_followed(box: Whole) -> None:
    session = await box.transfers.take_in(ANN, ImportRequest(name="tool"), key=None)
    assert session.argv[-1] == "import"
    box.end_root(session, "a")
    with pytest.raises(Conflict, match="came from an archive"):
        await box.versions.follow(ANN, "tool", DAY_S)
    box.end_root(await box.pull(login=True), "b")
    with pytest.raises(Conflict, match="login"):
        await box.versions.follow(ANN, "tool", DAY_S)
    pinned = PullRequest(name="tool", reference=f"team/tool@sha256:{'a' * 64}", refresh_s=DAY_S)
    with pytest.raises(Conflict, match="by digest"):
        await box.transfers.pull(ANN, pinned, key=None)
    for wrong in (1.0, -5.0, 1e9):
        with pytest.raises(InvalidRequest, match="refresh_s"):
            await box.versions.follow(ANN, "tool", wrong)


async def test_a_push_reads_the_layers_of_its_image_alone(box: Whole) -> None:
    await box.pulled("a", "b")
    request = PushRequest(reference="registry.example.org/x:1")
    session = await box.transfers.push(ANN, "tool", request, key="k")
    assert session.argv[-2:] == ("push", "registry.example.org/x:1")
    again = await box.transfers.push(ANN, "tool", request, key="k")
    assert again.id == session.id
    assert list(box.sessions.offers.values())[-1] == ("a" * 64, "b" * 64)
    with pytest.raises(InvalidRequest, match="goes to a tag"):
        await box.transfers.push(
            ANN, "tool", replace(request, reference=f"x@sha256:{'a' * 64}"), key=None
        )
    await box.ready("digits", "c")
    for name in ("digits", "host"):
        with pytest.raises(Conflict, match="no whole root"):
            await box.transfers.push(ANN, name, request, key=None)
        with pytest.raises(Conflict, match="no whole root"):
            await box.transfers.export(ANN, name, key=None)


async def test_check_asks_for_each_tag_once(box: Whole) -> None:
    with pytest.raises(Conflict, match="nothing can be outdated"):
        await box.transfers.check(ANN, key=None)
    await box.pulled("a")
    await box.versions.tag(ANN, "tool", "other")
    session = await box.transfers.check(ANN, key=None)
    assert session.argv[-2:] == ("check", REFERENCE)


@pytest.mark.parametrize(
    ("reference", "good"),
    [
        ("python", "docker.io/library/python:latest"),
        ("python:3.12-slim", "docker.io/library/python:3.12-slim"),
        ("team/tool", "docker.io/team/tool:latest"),
        ("docker://localhost/x:1", "localhost/x:1"),
        ("r.example.org:5000/a/b/c:v1", "r.example.org:5000/a/b/c:v1"),
        (f"x@sha256:{'a' * 64}", f"docker.io/library/x@sha256:{'a' * 64}"),
        ("Upper", ""),
        ("x:", "docker.io/library/x:latest"),
        ("x@sha256:12", ""),
        ("x@", ""),
        ("../x", ""),
        ("r.example.org/../x", ""),
        ("r.example.org:5000", "docker.io/library/r.example.org:5000"),
        ("a b", ""),
        ("-x", ""),
        ("x" * 600, ""),
        ("r.example.org/x --login", ""),
        ("http://r.example.org/x", ""),
    ],
)
async def test_references_are_read_as_everybody_reads_them(
    box: Whole, reference: str, good: str
) -> None:
    request = PullRequest(name="tool", reference=reference)
    if good:
        assert (await box.transfers.pull(ANN, request, key=None)).argv[-1] == good
    else:
        with pytest.raises(InvalidRequest, match="no image reference"):
            await box.transfers.pull(ANN, request, key=None)


async def test_hostile_manifests_of_roots_are_refused(box: Whole) -> None:
    hostile: tuple[dict[str, Any], ...] = (
        {"env": {"A\0": "x"}},
        {"env": {"": "x"}},
        {"env": {"A=B": "x"}},
        {"env": {"A": "x" * 100_000}},
        {"labels": {"a": "b" * 70_000}},
    )
    for config in hostile:
        box.end_root(await box.pull(), "a", **config)
        await box.service.settle_builds()
        image = await box.service.get(ANN, "tool")
        assert image.status is ImageStatus.FAILED
