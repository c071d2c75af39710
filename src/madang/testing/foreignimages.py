"""Images as others make them: layers, archives, layouts; good ones and hostile ones."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

INDEX: Final = "application/vnd.oci.image.index.v1+json"
MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
CONFIG: Final = "application/vnd.oci.image.config.v1+json"
LAYER: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
HERE: Final = ARCHITECTURES.get(os.uname().machine, os.uname().machine)


def entry(
    name: str,
    content: bytes | str = b"",
    *,
    kind: bytes = tarfile.REGTYPE,
    mode: int = 0o644,
    owner: int = 0,
    modified_at: int = 1_500_000_000,
) -> tuple[tarfile.TarInfo, bytes]:
    """A member of a tar; of a link, *content* is its target."""
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.uid, info.gid, info.mtime = kind, mode, owner, owner, modified_at
    if kind in {tarfile.SYMTYPE, tarfile.LNKTYPE}:
        info.linkname = content if isinstance(content, str) else os.fsdecode(content)
        return info, b""
    data = content.encode() if isinstance(content, str) else content
    info.size = len(data)
    return info, data


def folder(name: str, mode: int = 0o755) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, kind=tarfile.DIRTYPE, mode=mode)


def link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, target, kind=tarfile.SYMTYPE)


def tar(entries: Iterable[tuple[tarfile.TarInfo, bytes]], *, pax: bool = True) -> bytes:
    made = io.BytesIO()
    kind = tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT
    with tarfile.open(fileobj=made, mode="w", format=kind, errors="surrogateescape") as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data))
    return made.getvalue()


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass(slots=True)
class Built:
    """An image's blobs, by digest."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    manifest: bytes = b""
    config: bytes = b""
    layers: list[str] = field(default_factory=list)
    """Digests as they are transported."""
    plain: list[bytes] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return sha256(self.manifest)

    def add(self, data: bytes) -> str:
        digest = sha256(data)
        self.blobs[digest] = data
        return digest


def image(
    layers: Sequence[bytes],
    config: Mapping[str, Any] | None = None,
    *,
    architecture: str = HERE,
    packed: Sequence[bytes] | None = None,
) -> Built:
    """Of plain tars; *packed*: how each is transported, gzip if not given."""
    built = Built(plain=list(layers))
    transported = packed or [gzip.compress(each, 1, mtime=0) for each in layers]
    built.layers = [built.add(each) for each in transported]
    rootfs = {"type": "layers", "diff_ids": [sha256(each) for each in layers]}
    described = {
        "architecture": architecture,
        "os": "linux",
        "config": dict(config or {}),
        "rootfs": rootfs,
        "history": [{"created_by": f"step {n}"} for n, _ in enumerate(layers)],
    }
    built.config = json.dumps(described).encode()
    descriptors = [
        {"mediaType": LAYER, "digest": digest, "size": len(data)}
        for digest, data in zip(built.layers, transported, strict=True)
    ]
    made = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {
            "mediaType": CONFIG,
            "digest": built.add(built.config),
            "size": len(built.config),
        },
        "layers": descriptors,
    }
    built.manifest = json.dumps(made).encode()
    built.add(built.manifest)
    return built


def index(images: Mapping[str, Built]) -> bytes:
    """One for several platforms (``linux/amd64``)."""
    return json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": [
                {
                    "mediaType": MANIFEST,
                    "digest": built.digest,
                    "size": len(built.manifest),
                    "platform": dict(zip(("os", "architecture"), name.split("/"), strict=True)),
                }
                for name, built in images.items()
            ],
        }
    ).encode()


def layout(built: Built, *, name: str = "latest") -> list[tuple[tarfile.TarInfo, bytes]]:
    """Members of an OCI archive."""
    top = {
        "mediaType": MANIFEST,
        "digest": built.digest,
        "size": len(built.manifest),
        "annotations": {"org.opencontainers.image.ref.name": name},
    }
    listed = json.dumps({"schemaVersion": 2, "manifests": [top]})
    return [
        entry("oci-layout", '{"imageLayoutVersion":"1.0.0"}'),
        entry("index.json", listed),
        *(entry(f"blobs/{d.replace(':', '/')}", data) for d, data in built.blobs.items()),
    ]


def saved(built: Built, tag: str = "tool:latest") -> list[tuple[tarfile.TarInfo, bytes]]:
    """Members of what ``docker save`` writes: plain layers, named by folders."""
    name = f"{hashlib.sha256(built.config).hexdigest()}.json"
    files = [f"{n}/layer.tar" for n, _ in enumerate(built.plain)]
    listed = json.dumps([{"Config": name, "RepoTags": [tag], "Layers": files}])
    return [
        *(entry(path, data) for path, data in zip(files, built.plain, strict=True)),
        entry(name, built.config),
        entry("manifest.json", listed),
    ]
