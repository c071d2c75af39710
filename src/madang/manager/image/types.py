"""Values of the image slice, its life table, and the face of its neighbour above."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol

from madang.manager.http import Caller
from madang.wire.image import ImageStatus, Layer, LockedStep
from madang.wire.kernel import ImageMount
from madang.wire.link import LayerSaved
from madang.wire.session import Session, SessionSpec
from madang.wire.size import GIB

S = ImageStatus


@dataclass(frozen=True, slots=True)
class Rule:
    """What may follow a status, who sees to it, and within which time."""

    next: frozenset[ImageStatus]
    owner: str
    deadline_s: float | None
    """None: a user ends it."""


MANIFEST_PATIENCE_S: Final = 600.0
"""How long the outputs of a build that ended well may be out of reach."""
REMOVED_S: Final = 60.0
"""How long a removed image's layers are kept at least: a session may be about to use them."""

LIFE: Final[Mapping[ImageStatus, Rule]] = {
    # The build session's own deadline, and then MANIFEST_PATIENCE_S.
    S.BUILDING: Rule(frozenset({S.READY, S.FAILED}), "build watcher", MANIFEST_PATIENCE_S),
    S.READY: Rule(frozenset({S.KEPT, S.REMOVED}), "", None),
    S.KEPT: Rule(frozenset({S.READY, S.REMOVED}), "", None),  # the oldest go by themselves
    S.FAILED: Rule(frozenset({S.REMOVED}), "", None),
    S.REMOVED: Rule(frozenset(), "collector", REMOVED_S),  # the row goes once nobody uses it
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSettings:
    """Sizes of build sessions where a request says nothing."""

    cpu: float = 1.0
    mem_bytes: int = 2 * GIB
    pids: int = 512
    disk_bytes: int = 10 * GIB
    time_s: float = 1800.0
    versions: int = 3
    """Older versions of a name that are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRow:
    """A row as stored; times in microseconds, JSON as text."""

    id: str
    name: str
    owner_id: str
    owner: str
    project_id: str
    kind: str
    status: str
    status_since: int
    created_at: int
    requirements: str
    labels: str
    size: str
    digest: str
    python: str
    layers: str
    size_bytes: int
    build: str
    """Id of the build session; empty until it is known."""
    build_name: str
    reason: str
    policy: str
    action: str
    """How it is made: one of ``Action``."""
    asked: str
    """What a pull or import was asked for, JSON of ``Asked``."""
    source: str
    """Where it came from, JSON of ImageSource."""
    config: str
    """JSON of ImageConfig."""
    refresh_us: int
    """Between two looks for changes; 0: never."""
    refreshed_at: int
    making: str
    """Of a recipe: JSON of Making; else empty."""


AS_BEFORE: Final = -1
"""``refresh_us`` of what is being made: the name stays looked after as it was."""


class Action(StrEnum):
    BUILD = "build"
    PULL = "pull"
    IMPORT = "import"
    RECIPE = "recipe"
    COMMIT = "commit"
    """A session was saved."""
    TAG = "tag"
    """A further name of an image that was there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Of a registry, an archive or a recipe."""

    reference: str = ""
    platform: str = ""
    login: bool = False
    recipe: str = ""
    """Digest of all that was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A step of a recipe that is done."""

    key: str
    """The same key: the same step, on the same layers."""
    layer: Layer
    lock: str = ""
    """What it took, as its script told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """An image that a recipe makes, and how far that is."""

    recipe: str = ""
    """Its text."""
    lock: tuple[LockedStep, ...] = ()
    fresh: bool = False
    """Steps that were made before are made again."""
    base: tuple[Layer, ...] = ()
    """Layers that it begins with, topmost first."""
    env: dict[str, str] = field(default_factory=dict)
    steps: tuple[Made, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Who asked for a build, as its row remembers; the caller of what is done for it later."""

    user_id: str
    user: str
    project_id: str
    domain_id: str = ""
    role: str = "user"
    token: str = ""
    token_id: str = ""
    scopes: frozenset[str] = frozenset()
    sees_all: bool = False
    administers: bool = False

    def allows(self, scope: str) -> bool:
        """It asks over no endpoint."""
        return scope in self.scopes


class Sessions(Protocol):
    """What the session slice does for builds; the app gives it."""

    async def start_build(
        self,
        owner: Owner,
        spec: SessionSpec,
        key: str,
        offers: tuple[str, ...] = (),
        mount: ImageMount | None = None,
    ) -> Session:
        """Create a session of kind ``build``; the same *key* again gives the same session.

        *offers*: layers that it may read. *mount*: what it runs from, instead of an image.
        """
        ...

    async def find(self, session_id: str) -> Session | None:
        """None once it is removed."""
        ...

    async def read_file(self, session_id: str, path: str, limit_bytes: int) -> bytes:
        """A file of a session that may have ended; *path* is absolute in it."""
        ...

    async def get(self, caller: Caller, ref: str) -> Session:
        """One that *caller* may see. Raises NotFound."""
        ...

    async def mount_of(self, session_id: str) -> ImageMount:
        """What it runs from. Raises NotFound."""
        ...

    async def save_root(self, session_id: str) -> LayerSaved:
        """What it changed in its root, kept as a layer on its node; it may have ended."""
        ...

    async def live_images(self) -> Mapping[str, int]:
        """Digest of an image → sessions that have not ended and run from it."""
        ...
