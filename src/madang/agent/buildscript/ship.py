"""``build.pyz push`` and ``export``: an image of ours as OCI has it, for elsewhere.

The agent gives the layers as the tars that they came as; compressed and named here, they are the
same bytes each time, so that what a registry has is not sent again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import time
import zlib
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urljoin, urlsplit

from madang.agent.buildscript import intake, manifest, network
from madang.agent.buildscript.archives import REF_NAME
from madang.agent.buildscript.intake import BUFFER
from madang.agent.buildscript.main import BuildError, Exit, Places, say, shown_size
from madang.agent.buildscript.manifest import Blob
from madang.agent.buildscript.pull import orders
from madang.agent.buildscript.registry import Registry, read_login
from madang.agent.buildscript.sites import NotThere, Site, Unreachable, again
from madang.wire.reference import LATEST, parse

LEVEL = 6
CONFIG_VARIABLE = "IMAGE_CONFIG"
_GZIP_HEAD = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
"""Without a name and a time."""


@dataclass(frozen=True)
class Packed:
    """An image's blobs, each a file."""

    layers: list[tuple[Blob, str]]
    """The lowest first, with its path."""
    config: bytes
    manifest: bytes

    @property
    def digest(self) -> str:
        return _digest(self.manifest)


def pack(places: Places, told: dict[str, Any]) -> Packed:
    """All layers that the agent offers, the topmost first."""
    intake.scratch(places)
    layers: list[tuple[Blob, str]] = []
    diffs: list[str] = []
    for number, layer in enumerate(reversed(told.get("offers", []))):
        started = time.monotonic()
        path = os.path.join(places.scratch, "blobs", str(number))
        blob, diff = _compress(places, layer, path)
        layers.append((blob, path))
        diffs.append(diff)
        took = time.monotonic() - started
        say(f"layer    {blob.digest[:19]}  {shown_size(blob.size)}  {took:.1f} s")
    config = manifest.configuration(json.loads(os.environ[CONFIG_VARIABLE]), diffs)
    described = [manifest.descriptor(manifest.LAYER, blob) for blob, _ in layers]
    made = {
        "schemaVersion": 2,
        "mediaType": manifest.MANIFEST,
        "config": manifest.descriptor(manifest.CONFIG, Blob(_digest(config), len(config))),
        "layers": described,
    }
    return Packed(layers, config, manifest.dump(made))


def _compress(places: Places, layer: str, path: str) -> tuple[Blob, str]:
    """One layer's tar, gzipped into a file; what it is, and the digest of the tar."""
    plain, packed = hashlib.sha256(), hashlib.sha256()
    deflate = zlib.compressobj(LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    checksum = size = 0
    with open(path, "wb", buffering=BUFFER) as file:

        def write(data: bytes) -> None:
            packed.update(data)
            file.write(data)

        write(_GZIP_HEAD)
        for chunk in network.fetch_layer(places.proxy, layer):
            plain.update(chunk)
            checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
            write(deflate.compress(chunk))
        write(deflate.flush())
        write(checksum.to_bytes(4, "little") + (size & 0xFFFFFFFF).to_bytes(4, "little"))
        length = file.tell()
    return Blob(f"sha256:{packed.hexdigest()}", length), f"sha256:{plain.hexdigest()}"


def export(places: Places, name: str) -> None:
    """An OCI archive at ``/outputs/image.tar``."""
    packed = pack(places, orders(places))
    path = os.path.join(places.outputs, "image.tar")
    top = manifest.descriptor(manifest.MANIFEST, Blob(packed.digest, len(packed.manifest)))
    index = {
        "schemaVersion": 2,
        "mediaType": manifest.INDEX,
        "manifests": [{**top, "annotations": {REF_NAME: name}}],
    }
    small = {_digest(data): data for data in (packed.config, packed.manifest)}
    with tarfile.open(f"{path}.part", "w", format=tarfile.GNU_FORMAT) as archive:
        _add(archive, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        _add(archive, "index.json", manifest.dump(index))
        for digest, data in small.items():
            _add(archive, f"blobs/{digest.replace(':', '/')}", data)
        for digest, blob_path in {
            blob.digest: blob_path for blob, blob_path in packed.layers
        }.items():
            info = _header(f"blobs/{digest.replace(':', '/')}", os.path.getsize(blob_path))
            with open(blob_path, "rb") as file:
                archive.addfile(info, file)
            os.unlink(blob_path)
    os.rename(f"{path}.part", path)
    intake.made_nothing(places)
    say(f"export   {name}  {packed.digest[:19]}  {shown_size(os.path.getsize(path))}")


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    archive.addfile(_header(name, len(data)), io.BytesIO(data))


def _header(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info


def push(places: Places, text: str, *, login: bool) -> None:
    told = orders(places)
    who = read_login() if login else None
    reference = parse(text)
    registry = Registry(places.proxy, reference, told, who)
    site = registry.sites[-1]
    say(f"push     {reference}")
    packed = pack(places, told)
    try:
        for blob, path in packed.layers:
            again(f"layer {blob.digest[:19]}", lambda b=blob, p=path: _send(registry, site, b, p))
        path = os.path.join(places.scratch, "config")
        with open(path, "wb") as file:
            file.write(packed.config)
        blob = Blob(_digest(packed.config), len(packed.config))
        again("configuration", lambda: _send(registry, site, blob, path))
        again("manifest", lambda: _finish(registry, site, packed, reference.tag or LATEST))
    except (Unreachable, NotThere) as exc:
        raise BuildError(Exit.NETWORK, f"push to {reference}: {exc}") from exc
    intake.made_nothing(places)
    say(f"pushed   {reference}  {packed.digest}")


def _send(registry: Registry, site: Site, blob: Blob, path: str) -> None:
    """One blob, unless the registry has it."""
    scope = registry.scope(site, "pull,push")
    try:
        with site.open("HEAD", registry.path(site, f"blobs/{blob.digest}"), scope=scope):
            say(f"there    {blob.digest[:19]}")
            return
    except NotThere:
        pass
    with site.open(
        "POST",
        registry.path(site, "blobs/uploads/"),
        scope=scope,
        headers={"Content-Length": "0"},
        good=frozenset({202}),
    ) as answer:
        location = answer.headers.get("Location", "")
    started = urljoin(site.base, registry.path(site, "blobs/uploads/"))
    target = site.next(started, location)
    if not site.is_ours(target):
        raise Unreachable(f"{site.host} wants the upload elsewhere, at {urlsplit(target).netloc}")
    mark = "&" if urlsplit(target).query else "?"
    with (
        open(path, "rb") as file,
        site.open(
            "PUT",
            f"{target}{mark}{urlencode({'digest': blob.digest})}",
            scope=scope,
            headers={
                "Content-Length": str(blob.size),
                "Content-Type": "application/octet-stream",
            },
            body=file,
            good=frozenset({201, 204}),
        ),
    ):
        say(f"sent     {blob.digest[:19]}  {shown_size(blob.size)}")


def _finish(registry: Registry, site: Site, packed: Packed, tag: str) -> None:
    with site.open(
        "PUT",
        registry.path(site, f"manifests/{tag}"),
        scope=registry.scope(site, "pull,push"),
        headers={"Content-Type": manifest.MANIFEST},
        body=packed.manifest,
        good=frozenset({201, 202}),
    ):
        pass


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
