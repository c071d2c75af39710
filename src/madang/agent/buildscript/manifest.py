"""Manifests, indexes and configurations of images: read from strangers, written for them."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import Any

from madang.agent.buildscript.layertar import damaged
from madang.wire.reference import is_platform

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
PLAIN_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
TYPES = (MANIFEST, INDEX, DOCKER_MANIFEST, DOCKER_LIST)
OLD_TYPES = frozenset(
    f"application/vnd.docker.distribution.manifest.v1+{kind}" for kind in ("json", "prettyjws")
)
MAX_BYTES = 4 * 1024 * 1024
MAX_LAYERS = 400
MAX_BLOB = 1 << 40
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MACHINES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm/v7",
    "armv6l": "arm/v6",
    "i686": "386",
}


@dataclass(frozen=True)
class Blob:
    """What a manifest says of something else."""

    digest: str
    size: int


@dataclass(frozen=True)
class Image:
    """One platform's image."""

    config: Blob
    layers: tuple[Blob, ...]
    """The lowest first."""


def this_platform() -> str:
    machine = os.uname().machine
    return f"linux/{_MACHINES.get(machine, machine)}"


def parse(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object that a stranger wrote."""
    if len(data) > MAX_BYTES:
        raise damaged(f"{what} has more than {MAX_BYTES} bytes")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise damaged(f"{what} is damaged: {str(exc)[:200]}") from exc
    if not isinstance(found, dict):
        raise damaged(f"{what} is damaged: it is no object")
    return found


def blob(value: Any, what: str) -> Blob:
    """A descriptor."""
    digest = value.get("digest") if isinstance(value, dict) else None
    size = value.get("size") if isinstance(value, dict) else None
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        raise damaged(f"{what} names something without a SHA-256 digest")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_BLOB:
        raise damaged(f"{what} names something of an impossible size")
    return Blob(digest, size)


def is_index(found: dict[str, Any]) -> bool:
    return isinstance(found.get("manifests"), list)


def image(found: dict[str, Any], what: str) -> Image:
    layers = found.get("layers")
    if not isinstance(layers, list):
        old = found.get("schemaVersion") == 1
        text = "has Docker's old manifest format (schema 1)" if old else "is no image's manifest"
        raise damaged(f"{what} {text}")
    if len(layers) > MAX_LAYERS:
        raise damaged(f"{what} has {len(layers)} layers; the most is {MAX_LAYERS}")
    return Image(blob(found.get("config"), what), tuple(blob(each, what) for each in layers))


def choose(found: dict[str, Any], platform: str, what: str) -> Blob:
    """The manifest of *platform* in an index; one without variant fits if nothing fits better."""
    entries = [each for each in found["manifests"] if isinstance(each, dict)]
    offers: dict[str, Any] = {}
    for entry in entries:
        offers.setdefault(_platform(entry.get("platform")), entry)
    base = "/".join(platform.split("/")[:2])
    similar = [name for name in offers if name.startswith(f"{base}/")]
    if platform == base and platform not in offers and len(similar) == 1:
        return blob(offers[similar[0]], what)  # linux/arm64/v8 for linux/arm64
    for wanted in (platform, base):
        if wanted in offers:
            return blob(offers[wanted], what)
    if len(entries) == 1 and _platform(entries[0].get("platform")) == "":
        return blob(entries[0], what)
    there = ", ".join(sorted(filter(is_platform, offers))[:12]) or "no other"
    raise damaged(f"{what} is not there for {platform}, only for: {there}")


def _platform(value: Any) -> str:
    """Empty where nothing is said."""
    if not isinstance(value, dict):
        return ""
    parts = (value.get("os"), value.get("architecture"), value.get("variant"))
    return "/".join(part for part in parts if isinstance(part, str) and part)


def check_platform(config: dict[str, Any], platform: str, what: str) -> str:
    """The image's architecture. Raises BuildError if it is not the one wanted."""
    architecture = config.get("architecture")
    system = config.get("os") or "linux"
    if not isinstance(architecture, str) or system != "linux":
        raise damaged(f"{what} is no image for Linux")
    if architecture and architecture != platform.split("/")[1]:
        raise damaged(f"{what} is for linux/{architecture[:20]}, not for {platform}")
    return architecture


def diff_ids(config: dict[str, Any], count: int, what: str) -> list[str]:
    """Digests of the unpacked layers, the lowest first."""
    rootfs = config.get("rootfs")
    found = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(found, list) or len(found) != count:
        raise damaged(f"{what}: its configuration and manifest disagree about its layers")
    if not all(isinstance(each, str) and DIGEST.fullmatch(each) for each in found):
        raise damaged(f"{what}: a layer has no SHA-256 digest")
    return found


def settings(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """What we keep of a configuration, as ``wire.image.ImageConfig``; odd parts are left out."""
    inner = config.get("config")
    inner = inner if isinstance(inner, dict) else {}
    labels = inner.get("Labels")
    pairs = (each.partition("=") for each in _texts(inner.get("Env")))
    return {
        "env": {name: value for name, _, value in pairs if name},
        "entrypoint": _texts(inner.get("Entrypoint")),
        "cmd": _texts(inner.get("Cmd")),
        "cwd": _text(inner.get("WorkingDir")),
        "user": _text(inner.get("User")),
        "labels": {
            _text(name): _text(value)
            for name, value in (labels.items() if isinstance(labels, dict) else ())
            if _text(name)
        },
        "architecture": architecture,
    }


def _texts(value: Any) -> list[str]:
    return [each for each in value if _text(each)] if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) and "\0" not in value else ""


def configuration(config: dict[str, Any], diffs: list[str]) -> bytes:
    """A configuration in OCI's form, the same bytes from the same image."""
    inner = {
        "Env": [f"{name}={value}" for name, value in sorted(config["env"].items())],
        "Entrypoint": config["entrypoint"],
        "Cmd": config["cmd"],
        "WorkingDir": config["cwd"],
        "User": config["user"],
        "Labels": config["labels"],
    }
    return dump(
        {
            "architecture": config["architecture"],
            "os": "linux",
            "config": {name: value for name, value in inner.items() if value},
            "rootfs": {"type": "layers", "diff_ids": diffs},
            "history": [{"created_by": "madang"} for _ in diffs],
        }
    )


def dump(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def descriptor(kind: str, found: Blob) -> dict[str, Any]:
    return {"mediaType": kind, "digest": found.digest, "size": found.size}
