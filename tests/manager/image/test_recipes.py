"""Images made by recipes and of sessions, on real databases, with a stand-in for sessions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest

from madang.kit.codec import convert
from madang.manager.audit.service import AuditLog
from madang.manager.db import Database
from madang.manager.http import Caller
from madang.manager.image.service import Commits, ImageService, Recipes
from madang.manager.image.types import ImageSettings, Owner
from madang.testing.clock import FakeClock
from madang.wire.errors import (
    Conflict,
    FileMissing,
    ImageUnknown,
    InvalidRequest,
    NodeUnavailable,
    SizeImpossible,
)
from madang.wire.image import CommitRequest, Image, ImageStatus, LockedStep, RecipeRequest
from madang.wire.kernel import ImageMount
from madang.wire.link import LayerSaved
from madang.wire.session import Result, RootMode, Session, SessionSpec, SessionStatus

ANN = Owner(user_id="u-ann", user="ann", project_id="default")
BOB = Owner(user_id="u-bob", user="bob", project_id="default")
TOOLS = 'base = "debian:bookworm"\ndebian = ["jq"]\nrun = ["make x"]\n[environment]\nX = "1"\n'


@dataclass
class Steps:
    """The session slice: sessions that end when the test says so."""

    clock: FakeClock
    sessions: dict[str, Session] = field(default_factory=dict)
    specs: list[SessionSpec] = field(default_factory=list)
    mounts: dict[str, ImageMount] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    locks: dict[str, str] = field(default_factory=dict)
    away: bool = False
    refuse: bool = False

    async def start_build(
        self,
        owner: Owner,
        spec: SessionSpec,
        key: str,
        offers: tuple[str, ...] = (),
        mount: ImageMount | None = None,
    ) -> Session:
        if self.refuse:
            raise SizeImpossible("no node is so large")
        if key not in self.keys:
            number = len(self.sessions) + 1
            plain = dict.fromkeys(Session.__dataclass_fields__)
            said = {
                "id": f"s{number}", "name": f"build-{number}", "kind": "build", "owner": owner.user,
                "status": "RUNNING", "image": spec.image, "image_digest": "", "argv": spec.argv,
                "argv_encoding": "utf-8", "env": {}, "tty": False, "stdin": False,
                "labels": spec.labels, "attempt": 1, "created_at": 0.0, "status_since": 0.0,
                "status_owner": "", "phases": (), "enforced": {}, "warnings": (), "version": 1,
                "size": {"cpu": 1, "mem_bytes": 1 << 30, "pids": 10, "disk_bytes": 1 << 30},
                "runtime": "native",
            }  # fmt: skip
            optional = {k for k in plain if k not in said and k in _NULL}
            self.sessions[f"s{number}"] = convert(Session, said | dict.fromkeys(optional))
            self.specs.append(spec)
            self.keys[key] = f"s{number}"
            if mount is not None:
                self.mounts[f"s{number}"] = mount
        return self.sessions[self.keys[key]]

    def end(self, layer: str, *, result: Result = Result.SUCCESS) -> None:
        """The newest session ends, with *layer*."""
        newest = f"s{len(self.sessions)}"
        self.saved[newest] = layer
        self.sessions[newest] = replace(
            self.sessions[newest],
            status=SessionStatus.TERMINATED,
            result=result,
            ended_at=self.clock.now(),
        )

    async def find(self, session_id: str) -> Session | None:
        return self.sessions.get(session_id)

    async def get(self, caller: Caller, ref: str) -> Session:
        return next(each for each in self.sessions.values() if each.name == ref)

    async def mount_of(self, session_id: str) -> ImageMount:
        return self.mounts[session_id]

    async def save_root(self, session_id: str) -> LayerSaved:
        if self.away:
            raise NodeUnavailable("the node is away")
        return LayerSaved(digest=self.saved[session_id] * 64, size_bytes=10)

    async def read_file(self, session_id: str, path: str, limit_bytes: int) -> bytes:
        if path.endswith("lock"):
            if session_id not in self.locks:
                raise FileMissing("there is no lock")
            return self.locks[session_id].encode()
        layer = {"digest": self.saved[session_id] * 64, "name": "x", "version": "", "size_bytes": 9}
        return json.dumps({"python": "", "kind": "root", "layers": [layer]}).encode()

    async def live_images(self) -> Mapping[str, int]:
        return {}


_NULL = frozenset({"result", "node", "started_at", "ended_at", "deadline", "pending", "ended",
                   "usage", "log_end"})  # fmt: skip


@dataclass
class Box:
    images: ImageService
    recipes: Recipes
    commits: Commits
    steps: Steps

    async def build(self, recipe: str = TOOLS, owner: Owner = ANN, **more: object) -> Image:
        return await self.recipes.build(owner, convert(RecipeRequest, {
            "name": "tools", "recipe": recipe, **more}))  # fmt: skip

    async def ends(self, *layers: str) -> None:
        for layer in layers:
            self.steps.end(layer)
            await self.images.settle_builds()

    async def image(self, name: str = "tools") -> Image:
        return await self.images.get(ANN, name)


@pytest.fixture
def box(database: Database) -> Box:
    clock = FakeClock()
    images = ImageService(database, AuditLog(database, clock), clock, ImageSettings())
    recipes = Recipes(database, images, clock, ImageSettings())
    images.sessions = steps = Steps(clock)
    return Box(images, recipes, Commits(database, images, clock), steps)


async def test_each_step_runs_in_what_was_made_before(box: Box) -> None:
    image = await box.build()
    assert (image.status, image.build) == (ImageStatus.BUILDING, "build-1")
    await box.ends("a", "b", "c", "d")

    image = await box.image()
    assert (image.status, image.kind, image.config.env) == (ImageStatus.READY, "root", {"X": "1"})
    assert [(each.name, each.digest[0]) for each in image.layers] == [
        ("run 1", "d"), ("debian", "c"), ("configure", "b"), ("base", "a"),
    ]  # fmt: skip
    seen = [[digest[0] for digest in box.steps.mounts[f"s{n}"].layers] for n in (2, 3, 4)]
    assert seen == [["a"], ["b", "a"], ["c", "b", "a"]]
    assert [spec.root for spec in box.steps.specs] == [RootMode.READ_ONLY, *[RootMode.FAKE] * 3]
    assert box.steps.specs[3].argv[-1] == "make x"
    assert box.steps.specs[0].argv[-2:] == ("debian", "bookworm")


async def test_steps_that_are_known_are_not_made_again(box: Box) -> None:
    await box.build()
    await box.ends("a", "b", "c", "d")
    again = await box.build(TOOLS.replace("make x", "make y"))
    assert (again.status, len(box.steps.sessions)) == (ImageStatus.READY, 5)
    await box.ends("e")
    assert [each.digest[0] for each in (await box.image()).layers] == ["e", "c", "b", "a"]

    assert (await box.build()).status is ImageStatus.READY  # Nothing was left to do.
    assert len(box.steps.sessions) == 5
    await box.build(fresh=True)
    assert len(box.steps.sessions) == 6


async def test_what_others_made_is_not_believed(box: Box) -> None:
    await box.build()
    await box.ends("a", "b", "c", "d")
    await box.build(owner=BOB, name="tools2")
    assert len(box.steps.sessions) == 5


async def test_a_failed_step_is_named_and_the_ones_before_it_are_kept(box: Box) -> None:
    await box.build()
    await box.ends("a", "b")
    box.steps.end("x", result=Result.FAILURE)
    await box.images.settle_builds()
    image = await box.image()
    assert image.status is ImageStatus.FAILED
    assert image.reason.startswith("step debian: ")
    assert set(await box.images.wanted_layers()) == {"a" * 64, "b" * 64}

    await box.build(TOOLS.replace("jq", "less"))
    assert len(box.steps.sessions) == 4
    assert [digest[0] for digest in box.steps.mounts["s4"].layers] == ["b", "a"]


async def test_layers_are_wanted_while_it_is_made(box: Box) -> None:
    await box.build()
    await box.ends("a", "b")
    assert set(await box.images.wanted_layers()) == {"a" * 64, "b" * 64}


async def test_a_machine_that_is_away_is_waited_for(box: Box) -> None:
    await box.build()
    await box.ends("a")
    box.steps.away = True
    await box.ends("b")
    assert (await box.image()).status is ImageStatus.BUILDING
    box.steps.away = False
    await box.images.settle_builds()
    assert len(box.steps.sessions) == 3


async def test_a_server_that_died_between_two_steps_goes_on(box: Box) -> None:
    await box.build()
    box.steps.end("a")
    box.steps.refuse = True
    await box.images.settle_builds()
    assert (await box.image()).status is ImageStatus.FAILED  # It can never be had.
    assert "no node is so large" in (await box.image()).reason


async def test_a_build_that_can_t_start_leaves_nothing(box: Box) -> None:
    box.steps.refuse = True
    with pytest.raises(SizeImpossible):
        await box.build()
    with pytest.raises(ImageUnknown):
        await box.image()


async def test_one_layer_is_stacked_once(box: Box) -> None:
    """Overlayfs takes no layer twice: two steps that change nothing give the same one."""
    await box.build('base = "debian:bookworm"\nrun = ["true", "false || true"]\n')
    await box.ends("a", "b", "c", "c")
    assert [each.digest[0] for each in (await box.image()).layers] == ["c", "b", "a"]


async def test_a_recipe_begins_with_an_image(box: Box) -> None:
    await box.build()
    await box.ends("a", "b", "c", "d")
    await box.build('base = "tools"\nrun = ["make z"]\n', name="more")
    await box.ends("e")
    more = await box.image("more")
    assert [each.digest[0] for each in more.layers] == ["e", "d", "c", "b", "a"]
    assert more.config.env == {"X": "1"}
    with pytest.raises(Conflict, match="no root of its own"):
        await box.build('base = "host"\n', name="other")


async def test_a_lock_says_what_was_taken_and_gives_it_again(box: Box) -> None:
    box.steps.locks = {"s3": "jq:amd64=1.6\nlibc6:amd64=2\n"}
    await box.build()
    await box.ends("a", "b", "c", "d")
    lock = await box.recipes.lock(ANN, "tools")
    assert lock.steps == (LockedStep(name="debian", lock="jq:amd64=1.6\nlibc6:amd64=2\n"),)

    await box.build(lock=lock.steps)
    script = box.steps.specs[-1].argv[-1]
    assert "'jq:amd64=1.6' 'libc6:amd64=2'" in script


@pytest.mark.parametrize("recipe", ["", "base = 1", 'base = "x y"\ndebian = ["a b"]'])
async def test_a_bad_recipe_is_refused_in_words(box: Box, recipe: str) -> None:
    with pytest.raises(InvalidRequest, match="recipe: "):
        await box.build(recipe)


async def test_a_session_is_saved_as_an_image(box: Box) -> None:
    await box.build()
    await box.ends("a", "b", "c", "d")
    await box.steps.start_build(
        ANN, SessionSpec(image="tools"), "mine", mount=await box.images.resolve(ANN, "tools")
    )
    box.steps.saved["s5"] = "e"
    image = await box.commits.commit(ANN, "build-5", CommitRequest(name="mine"))
    assert image.status is ImageStatus.READY
    assert [(each.name, each.digest[0]) for each in image.layers][:2] == [
        ("commit", "e"), ("run 1", "d"),
    ]  # fmt: skip
    assert image.config.env == {"X": "1"}
    mount = await box.images.resolve(ANN, "mine")
    assert mount.layers[0] == "e" * 64

    box.steps.saved["s5"] = "f"
    again = await box.commits.commit(ANN, "build-5", CommitRequest(name="mine"))
    assert [each.digest[0] for each in again.layers][:2] == ["f", "d"]


async def test_a_session_without_a_root_of_its_own_is_not_saved(box: Box) -> None:
    await box.steps.start_build(
        ANN, SessionSpec(), "mine", mount=await box.images.resolve(ANN, "host")
    )
    with pytest.raises(Conflict, match="no root of its own"):
        await box.commits.commit(ANN, "build-1", CommitRequest(name="mine"))
