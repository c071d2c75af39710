"""The life of images, on real databases, with a stand-in for the session slice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest

from madang.kit.codec import convert
from madang.manager.audit.service import AuditLog
from madang.manager.db import Database, open_database
from madang.manager.db.events import list_events
from madang.manager.http import Caller
from madang.manager.identity.store import add_user
from madang.manager.image.service import ImageService
from madang.manager.image.types import MANIFEST_PATIENCE_S, REMOVED_S, ImageSettings, Owner
from madang.testing.clock import FakeClock
from madang.wire.errors import (
    Conflict,
    Forbidden,
    IdempotencyMismatch,
    ImageInUse,
    ImageUnknown,
    NodeUnavailable,
    PlatformError,
    SizeImpossible,
)
from madang.wire.image import BuildRequest, ImageStatus
from madang.wire.kernel import ImageMount
from madang.wire.link import LayerSaved
from madang.wire.session import Ended, Reason, Result, Session, SessionSpec, SessionStatus

ANN = Owner(user_id="u-ann", user="ann", project_id="default")
BOB = Owner(user_id="u-bob", user="bob", project_id="default")
ADMIN = replace(BOB, sees_all=True, administers=True)


def _session(number: int, spec: SessionSpec, owner: Owner, at: float) -> Session:
    return convert(
        Session,
        {
            "id": f"s{number}",
            "name": f"build-{number}",
            "kind": "build",
            "owner": owner.user,
            "status": "RUNNING",
            "result": None,
            "runtime": "native",
            "image": spec.image,
            "image_digest": "",
            "argv": spec.argv,
            "argv_encoding": "utf-8",
            "size": {"cpu": 1, "mem_bytes": 1 << 30, "pids": 10, "disk_bytes": 1 << 30},
            "env": {},
            "tty": False,
            "stdin": False,
            "labels": spec.labels,
            "node": "n",
            "attempt": 1,
            "created_at": at,
            "started_at": at,
            "ended_at": None,
            "status_since": at,
            "deadline": None,
            "status_owner": "",
            "pending": None,
            "ended": None,
            "phases": (),
            "enforced": {},
            "warnings": (),
            "usage": None,
            "log_end": None,
            "version": 1,
        },
    )


@dataclass
class Sessions:
    """The session slice, as far as builds see it."""

    clock: FakeClock
    sessions: dict[str, Session] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    live: dict[str, int] = field(default_factory=dict)
    offers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    refuse: PlatformError | None = None
    away: bool = False
    crash: bool = False

    async def start_build(
        self,
        owner: Owner,
        spec: SessionSpec,
        key: str,
        offers: tuple[str, ...] = (),
        mount: ImageMount | None = None,
    ) -> Session:
        self.offers[key] = offers
        if self.crash:
            raise asyncio.CancelledError
        if self.refuse is not None:
            raise self.refuse
        if key not in self.keys:
            made = _session(len(self.sessions) + 1, spec, owner, self.clock.now())
            self.sessions[made.id] = made
            self.keys[key] = made.id
        return self.sessions[self.keys[key]]

    async def find(self, session_id: str) -> Session | None:
        return self.sessions.get(session_id)

    async def read_file(self, session_id: str, path: str, limit_bytes: int) -> bytes:
        if self.away:
            raise NodeUnavailable("the node is away")
        assert path == "/outputs/image.json"
        return self.files[session_id]

    async def get(self, caller: Caller, ref: str) -> Session:
        return next(each for each in self.sessions.values() if each.name == ref)

    async def mount_of(self, session_id: str) -> ImageMount:
        raise NodeUnavailable("the node is away")

    async def save_root(self, session_id: str) -> LayerSaved:
        raise NodeUnavailable("the node is away")

    async def live_images(self) -> Mapping[str, int]:
        return self.live

    def end(
        self, session: Session, *names: str, reason: Reason = Reason.EXIT, code: int = 0
    ) -> None:
        """The build ends; with *names* of layers if well."""
        layers = [
            {"digest": name * 64, "name": f"pkg-{name}", "version": "1", "size_bytes": 10}
            for name in names
        ]
        self.files[session.id] = json.dumps({"python": "3.11", "layers": layers}).encode()
        well = reason is Reason.EXIT and code == 0
        other = Result.CANCELLED if reason is Reason.USER else Result.FAILURE
        self.sessions[session.id] = replace(
            session,
            status=SessionStatus.TERMINATED,
            result=Result.SUCCESS if well else other,
            ended=Ended(reason=reason, exit_code=code, text="in words"),
            ended_at=self.clock.now(),
        )


@dataclass
class Box:
    service: ImageService
    sessions: Sessions
    clock: FakeClock
    database: Database
    changes: list[None]

    async def build(self, name: str = "digits", *requirements: str, owner: Owner = ANN) -> Session:
        request = BuildRequest(name=name, requirements=requirements or ("numpy",))
        return await self.service.build(owner, request)

    async def ready(self, name: str, *layers: str) -> str:
        """Build *name* to its end; the digest."""
        self.sessions.end(await self.build(name), *layers)
        await self.service.settle_builds()
        return (await self.service.get(ANN, name)).digest


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def box(database: Database, clock: FakeClock) -> Box:
    changes: list[None] = []
    service = ImageService(
        database,
        AuditLog(database, clock),
        clock,
        ImageSettings(),
        layers_changed=lambda: changes.append(None),
    )
    service.sessions = sessions = Sessions(clock)
    return Box(service, sessions, clock, database, changes)


async def test_the_built_in_image_is_always_there(box: Box) -> None:
    assert [image.name for image in await box.service.list(ANN)] == ["host"]
    assert (await box.service.resolve(ANN, "host")).kind == "host"
    assert (await box.service.get(ANN, "host")).status is ImageStatus.READY


async def test_a_build_that_ends_well_is_an_image(box: Box) -> None:
    session = await box.build("digits", "numpy", "scikit-learn==1.5.2")
    assert session.argv[-2:] == ("numpy", "scikit-learn==1.5.2")
    assert (await box.service.get(ANN, "digits")).status is ImageStatus.BUILDING
    with pytest.raises(ImageUnknown, match="being built by build-1"):
        await box.service.resolve(ANN, "digits")

    box.sessions.end(session, "a", "b")
    mount = await box.service.resolve(ANN, "digits")

    assert mount.layers == ("a" * 64, "b" * 64)
    image = await box.service.get(ANN, "digits")
    assert (image.status, image.python, image.size_bytes) == (ImageStatus.READY, "3.11", 20)
    assert (image.build, image.owner, image.digest) == ("build-1", "ann", mount.digest)
    assert set(await box.service.wanted_layers()) == {"a" * 64, "b" * 64}


@pytest.mark.parametrize(
    ("reason", "code", "words"),
    [
        (Reason.EXIT, 65, "no set of versions"),
        (Reason.EXIT, 9, "in words"),
        (Reason.OOM, 137, "in words"),
        (Reason.USER, 143, "stopped"),
    ],
)
async def test_a_build_that_fails_leaves_a_reason_and_no_layers(
    box: Box, reason: Reason, code: int, words: str
) -> None:
    box.sessions.end(await box.build(), "a", reason=reason, code=code)
    image = await box.service.get(ANN, "digits")
    assert image.status is ImageStatus.FAILED
    assert words in image.reason
    assert await box.service.wanted_layers() == ()
    with pytest.raises(ImageUnknown, match=words):
        await box.service.resolve(ANN, "digits")


async def test_a_failed_name_can_be_built_again(box: Box) -> None:
    box.sessions.end(await box.build(), code=65)
    await box.service.settle_builds()
    await box.ready("digits", "a")
    assert [image.name for image in await box.service.list(ANN)] == ["host", "digits"]


async def test_two_builds_of_a_name_at_once_are_one(box: Box) -> None:
    results = await asyncio.gather(*(box.build() for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(result, Session) for result in results) == 1
    assert sum(isinstance(result, Conflict) for result in results) == 4
    assert len(box.sessions.sessions) == 1


async def test_a_repeated_key_gives_the_same_build(box: Box) -> None:
    request = BuildRequest(name="digits", requirements=("numpy",))
    first = await box.service.build(ANN, request, key="k")
    assert await box.service.build(ANN, request, key="k") == first
    with pytest.raises(IdempotencyMismatch):
        await box.service.build(ANN, replace(request, requirements=("idna",)), key="k")
    with pytest.raises(Conflict):
        await box.service.build(ANN, request, key="other")
    box.sessions.end(first, "a")
    await box.service.settle_builds()
    assert (await box.service.build(ANN, request, key="k")).id == first.id
    assert len(box.sessions.sessions) == 1


async def test_a_rebuild_takes_the_name_when_it_is_ready_and_not_before(box: Box) -> None:
    first = await box.ready("digits", "a")
    box.sessions.live = {first: 1}
    session = await box.build()
    assert (await box.service.resolve(ANN, "digits")).digest == first

    box.sessions.end(session, "b")
    second = (await box.service.resolve(ANN, "digits")).digest

    assert second != first
    assert set(await box.service.wanted_layers()) == {"a" * 64, "b" * 64}, "one is still in use"


async def test_a_rebuild_that_fails_leaves_the_image_as_it_was(box: Box) -> None:
    first = await box.ready("digits", "a")
    box.sessions.end(await box.build(), code=66)
    await box.service.settle_builds()
    image = await box.service.get(ANN, "digits")
    assert (image.status, image.digest) == (ImageStatus.READY, first)


async def test_a_removed_image_is_kept_until_its_last_session_has_ended(box: Box) -> None:
    digest = await box.ready("digits", "a")
    box.sessions.live = {digest: 2}
    with pytest.raises(ImageInUse, match="2 live sessions"):
        await box.service.remove(ANN, "digits")
    await box.service.remove(ANN, "digits", force=True)
    with pytest.raises(ImageUnknown):
        await box.service.get(ANN, "digits")

    later = box.clock.now() + REMOVED_S + 1
    assert await box.service.forget_removed(later) == 0
    assert await box.service.wanted_layers() == ("a" * 64,)
    box.sessions.live = {}
    assert await box.service.forget_removed(box.clock.now()) == 0, "a session may be coming"
    assert await box.service.forget_removed(later) == 1
    assert await box.service.wanted_layers() == ()
    assert box.changes


async def test_an_image_belongs_to_its_owner(box: Box) -> None:
    async with box.database.begin() as tx:
        for who in (ANN, BOB):
            await add_user(
                tx, user_id=who.user_id, name=who.user, role="user", project_id="default",
                created_at=0,
            )  # fmt: skip
    await box.ready("digits", "a")
    with pytest.raises(ImageUnknown):
        await box.service.remove(replace(BOB, user_id="u-else"), "digits")
    with pytest.raises(Forbidden):
        await box.service.remove(BOB, "digits")
    with pytest.raises(Forbidden):
        await box.build(owner=BOB)
    await box.service.remove(ADMIN, "digits")


async def test_what_is_not_there_or_not_ours_cannot_be_removed(box: Box) -> None:
    with pytest.raises(ImageUnknown):
        await box.service.remove(ANN, "digits")
    with pytest.raises(Conflict):
        await box.service.remove(ADMIN, "host")
    await box.build()
    with pytest.raises(Conflict, match="being built"):
        await box.service.remove(ANN, "digits", force=True)


async def test_a_build_that_cannot_start_leaves_nothing(box: Box) -> None:
    box.sessions.refuse = SizeImpossible("no machine is that large")
    request = BuildRequest(name="digits", requirements=("numpy",))
    with pytest.raises(SizeImpossible):
        await box.service.build(ANN, request, key="k")
    assert [image.name for image in await box.service.list(ANN)] == ["host"]
    box.sessions.refuse = None
    session = await box.service.build(ANN, request, key="k")
    box.sessions.end(session, code=1)
    await box.ready("digits", "a")


async def test_a_build_accepted_before_a_crash_is_started_once(box: Box) -> None:
    box.sessions.crash = True
    with pytest.raises(asyncio.CancelledError):
        await box.build()
    box.sessions.crash = False

    await box.service.settle_builds()
    await box.service.settle_builds()

    assert len(box.sessions.sessions) == 1
    assert (await box.service.get(ANN, "digits")).build == "build-1"


async def test_a_removed_build_session_ends_the_build(box: Box) -> None:
    session = await box.build()
    del box.sessions.sessions[session.id]
    await box.service.settle_builds()
    assert "removed" in (await box.service.get(ANN, "digits")).reason


async def test_a_node_that_is_away_delays_the_image_but_not_for_ever(box: Box) -> None:
    box.sessions.end(await box.build(), "a")
    box.sessions.away = True
    await box.service.settle_builds()
    assert (await box.service.get(ANN, "digits")).status is ImageStatus.BUILDING

    await box.clock.advance(MANIFEST_PATIENCE_S + 1)
    await box.service.settle_builds()

    assert (await box.service.get(ANN, "digits")).status is ImageStatus.FAILED


@pytest.mark.parametrize("data", [b"", b"{", b'{"python": "3.11", "layers": []}', b"\xff"])
async def test_a_damaged_manifest_fails_the_build(box: Box, data: bytes) -> None:
    session = await box.build()
    box.sessions.end(session, "a")
    box.sessions.files[session.id] = data
    await box.service.settle_builds()
    assert (await box.service.get(ANN, "digits")).status is ImageStatus.FAILED


async def test_settling_twice_at_once_makes_one_image_and_one_event(box: Box) -> None:
    box.sessions.end(await box.build(), "a")
    await asyncio.gather(*(box.service.settle_builds() for _ in range(4)))
    async with box.database.read() as tx:
        events = await list_events(tx, after=0)
    assert [event.payload["status"] for event in events] == ["BUILDING", "READY"]


async def test_a_restarted_server_goes_on(box: Box, database_url: str) -> None:
    box.sessions.end(await box.build(), "a")
    database = open_database(database_url)
    await database.open()
    try:
        again = ImageService(database, AuditLog(database, box.clock), box.clock, ImageSettings())
        again.sessions = box.sessions
        assert (await again.resolve(ANN, "digits")).layers == ("a" * 64,)
    finally:
        await database.close()
