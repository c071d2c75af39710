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
    layers: tuple[Layer, ...]
    """Topmost first, the environment's skeleton last."""
