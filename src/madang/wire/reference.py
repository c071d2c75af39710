"""References to images in registries: ``[HOST[:PORT]/]NAME[:TAG][@sha256:HEX]``.

Standard library only, and no newer Python than 3.10: build sessions read it too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

DOCKER: Final = "docker.io"
"""The registry of references that name none."""
LATEST: Final = "latest"
MAX_REFERENCE: Final = 512
_HOST: Final = re.compile(
    r"[a-z0-9](?:[a-z0-9.-]{0,252}[a-z0-9])?(?::[0-9]{1,5})?|\[[0-9a-f:]+\](?::[0-9]{1,5})?"
)
_PART: Final = re.compile(r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*")
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_PLATFORM: Final = re.compile(r"linux/[a-z0-9_]{1,20}(?:/[a-z0-9]{1,10})?")


@dataclass(frozen=True)
class Reference:
    """A place in a registry, with all that was left out put in."""

    host: str
    name: str
    """Path of the repository, like ``library/python``."""
    tag: str = ""
    digest: str = ""
    """``sha256:HEX``; what has one never changes."""

    def __str__(self) -> str:
        tag, digest = self.tag and f":{self.tag}", self.digest and f"@{self.digest}"
        return f"{self.host}/{self.name}{tag}{digest}"

    @property
    def wanted(self) -> str:
        """Its last part in a request: the digest if there is one."""
        return self.digest or self.tag

    def at(self, digest: str) -> Reference:
        """What the tag stands for now."""
        return replace(self, tag="", digest=digest)


def parse(text: str) -> Reference:
    """Raises ValueError, in words."""
    rest, _, digest = text.removeprefix("docker://").partition("@")
    host, slash, name = rest.partition("/")
    if not slash or not ({".", ":"} & set(host) or host == "localhost"):
        host, name = DOCKER, rest
    name, _, tag = name.partition(":")
    if host == DOCKER and "/" not in name:
        name = f"library/{name}"
    good = (
        len(text) <= MAX_REFERENCE
        and _HOST.fullmatch(host)
        and all(map(_PART.fullmatch, name.split("/")))
        and (not tag or _TAG.fullmatch(tag))
        and ("@" not in text or _DIGEST.fullmatch(digest))
    )
    if not good:
        raise ValueError(
            f"{text[:80]!r} is no image reference: [HOST[:PORT]/]NAME[:TAG][@sha256:…], the name "
            "in small letters, like python:3.12 or registry.example.org/team/tool:v2"
        )
    return Reference(host, name, tag or ("" if digest else LATEST), digest)


def is_platform(text: str) -> bool:
    """Whether *text* is like ``linux/arm64`` or ``linux/arm/v7``."""
    return bool(_PLATFORM.fullmatch(text))
