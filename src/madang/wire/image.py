"""Images: named root file systems that sessions run from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from madang.wire.session import SizeRequest

WARM: Final = "warm"
"""Label of an image: modules that its sessions import, comma between them; see ``agent.launcher.
warm``."""
MAX_WARM: Final = 32
MODULE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*){0,7}", re.ASCII)
"""Name of a module."""


class ImageKind(StrEnum):
    HOST = "host"
    LAYERS = "layers"
    """The host's own system with an environment of installed wheels at ``/env``."""
    ROOT = "root"
    """A whole root file system of its own, nothing of the host's: one or more layers."""


class ImageStatus(StrEnum):
    BUILDING = "BUILDING"
    READY = "READY"
    KEPT = "KEPT"
    """An older version of a name, for ``NAME@DIGEST`` and for going back to."""
    FAILED = "FAILED"
    REMOVED = "REMOVED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One installed wheel: content-addressed, byte-compiled, read-only."""

    digest: str
    """SHA-256 (hex) over the sorted list of path, mode and content digest of its files, byte code
    left out.
    """
    name: str
    """Distribution, normalised (PEP 503)."""
    version: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """What an image says about the programs that run from it; of kind ``root`` only."""

    env: dict[str, str] = field(default_factory=dict)
    """Of all programs of its sessions."""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    """With the entrypoint before it, what ``madang run --entry`` starts."""
    cwd: str = ""
    """Where that starts."""
    user: str = ""
    """Kept and shown; sessions run as their own user."""
    labels: dict[str, str] = field(default_factory=dict)
    """As they came, beside those of the image itself."""
    architecture: str = ""
    """As OCI names it, like ``amd64``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSource:
    """Where an image's content came from."""

    reference: str = ""
    """In a registry, with its host; empty: an archive."""
    digest: str = ""
    """Of its manifest there, ``sha256:HEX``."""
    platform: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image, as the API returns it."""

    name: str
    digest: str
    """SHA-256 over the kind and the ordered layer digests; empty while building."""
    kind: ImageKind
    status: ImageStatus
    requirements: tuple[str, ...] = ()
    """As asked for (PEP 508)."""
    layers: tuple[Layer, ...] = ()
    size_bytes: int = 0
    python: str = ""
    """``3.11``"""
    owner: str = ""
    created_at: float = 0.0
    build: str | None = None
    """Name of the session that built it."""
    used_by: int = 0
    """Live sessions that run from it."""
    labels: dict[str, str] = field(default_factory=dict)
    policy: str = ""
    """Its layer of the sandbox policy of all sessions that start from it."""
    reason: str = ""
    """Why the build failed, in words."""
    config: ImageConfig = field(default_factory=ImageConfig)
    source: ImageSource = field(default_factory=ImageSource)
    refresh_s: float = 0.0
    """Seconds between two looks whether what it was made of has changed; 0: never."""
    refreshed_at: float = 0.0
    """Last look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """Build an image from PyPI requirements."""

    name: str
    requirements: tuple[str, ...]
    labels: dict[str, str] = field(default_factory=dict)
    size: SizeRequest = field(default_factory=SizeRequest)
    """Of the build session; builds have defaults of their own."""
    policy: str = ""
    """Text of a sandbox policy that sessions from this image shall have; kept with it."""


BUILD_MANIFEST: Final = "image.json"
"""What a build leaves in its outputs:

a BuildManifest as JSON, beside ``layers/DIGEST.tar`` for new layers.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildManifest:
    """The result of a build session."""

    python: str
    """Empty for images of kind ``root``."""
    layers: tuple[Layer, ...]
    """Topmost first, the environment's skeleton last."""
    kind: ImageKind = ImageKind.LAYERS
    """HOST: the session was for something else, and made no image."""
    config: ImageConfig = field(default_factory=ImageConfig)
    source: ImageSource = field(default_factory=ImageSource)


@dataclass(frozen=True, slots=True, kw_only=True)
class PullRequest:
    """Make an image of what a registry has."""

    name: str
    reference: str
    """``[HOST[:PORT]/]NAME[:TAG][@sha256:…]``"""
    platform: str = ""
    """Like ``linux/arm64``; empty: this machine's."""
    refresh_s: float | None = None
    """Look so often whether the tag has moved, and pull it then. None: as the name has it; 0:
    never."""
    login: bool = False
    """The build session waits for a line on its stdin: JSON with ``username`` and ``password``."""
    labels: dict[str, str] = field(default_factory=dict)
    size: SizeRequest = field(default_factory=SizeRequest)
    policy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportRequest:
    """Make an image of an archive that the build session reads from its stdin."""

    name: str
    reference: str = ""
    """Which of an archive's images, by its tag there; empty: the only one."""
    platform: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    size: SizeRequest = field(default_factory=SizeRequest)
    policy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushRequest:
    """Copy an image into a registry."""

    reference: str
    login: bool = False
    """As in PullRequest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TagRequest:
    """Give an image's content a further name, or make it the newest version of one."""

    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackRequest:
    """Make an older version the one that new sessions get."""

    digest: str = ""
    """Beginning of the version's digest; empty: the newest of the older ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowRequest:
    """Look for changes by schedule, or don't any more."""

    refresh_s: float
    """0: never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What ``prune`` removed, or would."""

    name: str
    digest: str
    status: ImageStatus
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LockedStep:
    """What a step of a recipe took, in the words of its package manager."""

    name: str
    lock: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeLock:
    """What makes a recipe give the same again."""

    recipe: str
    """SHA-256 of the text of the recipe that was built."""
    steps: tuple[LockedStep, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeRequest:
    """Make an image by a recipe."""

    name: str
    recipe: str
    """Its text; see ``kit.recipes``."""
    lock: tuple[LockedStep, ...] = ()
    """Take just that."""
    fresh: bool = False
    """Make steps again that were made before."""
    labels: dict[str, str] = field(default_factory=dict)
    """Beside those of the recipe."""
    size: SizeRequest = field(default_factory=SizeRequest)
    """Of the sessions that make it."""
    policy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRequest:
    """Save what a session changed in its root as an image."""

    name: str
    labels: dict[str, str] = field(default_factory=dict)
    policy: str = ""
