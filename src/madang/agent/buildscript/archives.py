"""``build.pyz import``: an archive of an image from our stdin.

Three kinds are told apart by what they hold: OCI's layout (``index.json``), what ``docker save``
writes (``manifest.json``), and the tar of a whole root file system. Nothing is unpacked on the way:
members are found by name, and read where they are.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from madang.agent.buildscript import compression, intake, layertar, manifest
from madang.agent.buildscript.intake import BUFFER, Foreign, Intake, Source
from madang.agent.buildscript.layertar import Header, damaged
from madang.agent.buildscript.main import Places, say
from madang.agent.buildscript.manifest import Blob
from madang.agent.buildscript.pull import orders

MAX_MEMBERS = 100_000
REF_NAME = "org.opencontainers.image.ref.name"
IMAGE_NAME = "io.containerd.image.name"
_ROOT_FOLDERS = frozenset({"bin", "etc", "lib", "usr", "sbin", "home", "opt", "var", "app"})


def take_in(places: Places, reference: str, platform: str, stdin: BinaryIO | None = None) -> None:
    told = orders(places)
    intake.scratch(places)
    path = os.path.join(places.scratch, "archive.tar")
    with open(path, "wb", buffering=BUFFER) as file:
        limit = layertar.free_bytes(places.scratch)
        source = stdin or sys.stdin.buffer
        layertar.unpack_plain(iter(lambda: source.read(BUFFER), b""), file, limit)
    _decompress(path)
    with open(path, "rb", buffering=BUFFER) as file:
        found = Archive(file).find(reference, platform or manifest.this_platform())
        Intake(places, told.get("layers", {}), parallel=1).run(found)
    os.unlink(path)


def _decompress(path: str) -> None:
    """In place, if it is compressed as a whole."""
    with open(path, "rb") as file:
        head = file.read(6)
        file.seek(0)
        if not compression.kind_of(head):
            return
        limit = layertar.free_bytes(os.path.dirname(path))
        with open(f"{path}.plain", "wb", buffering=BUFFER) as plain:
            layertar.unpack_plain(compression.plain(file), plain, limit)
    os.rename(f"{path}.plain", path)


class Archive:
    """One image's archive, seekable."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        try:
            self._tar = tarfile.open(  # noqa: SIM115 - it has nothing to close but file
                fileobj=file, mode="r:", tarinfo=Header, encoding="utf-8", errors="surrogateescape"
            )
            self._members = self._index()
        except (tarfile.TarError, ValueError, OverflowError) as exc:
            text = f"what was sent is no archive of an image, or ends in the middle: {exc}"
            raise damaged(text) from exc

    def _index(self) -> dict[str, tarfile.TarInfo]:
        members: dict[str, tarfile.TarInfo] = {}
        while (info := self._tar.next()) is not None:
            name = posixpath.normpath(info.name.lstrip("/"))
            members[name] = info
            if len(members) > MAX_MEMBERS and "index.json" not in members:
                break  # a root file system, which is read otherwise
        return members

    def find(self, reference: str, platform: str) -> Source:
        """Raises BuildError: it holds no image, several, or none for the platform."""
        if "index.json" in self._members and "oci-layout" in self._members:
            return self._layout(reference, platform)
        if "manifest.json" in self._members:
            return self._saved(reference, platform)
        roots = {name.split("/")[0] for name in self._members}
        if not roots & _ROOT_FOLDERS:
            raise damaged(
                "what was sent is neither an OCI nor a Docker archive, nor the tar of a root file "
                "system: it has no index.json, no manifest.json, no /bin, /usr or /etc"
            )
        return self._root_tar(platform)

    # OCI

    def _layout(self, reference: str, platform: str) -> Source:
        found = manifest.parse(self._small("index.json"), "index.json")
        top = self._named(found, reference)
        found = manifest.parse(self._checked(top), "the archive's manifest")
        if manifest.is_index(found):
            inner = manifest.choose(found, platform, "the image in the archive")
            found = manifest.parse(self._checked(inner), "the archive's manifest")
        image = manifest.image(found, "the archive's manifest")
        config = manifest.parse(self._checked(image.config), "the image's configuration")
        return self._source(
            config,
            [(self._blob_name(blob), blob.digest) for blob in image.layers],
            {"digest": top.digest, "platform": platform},
            platform,
        )

    def _named(self, found: dict[str, Any], reference: str) -> Blob:
        """Which of the images."""
        entries = found.get("manifests")
        entries = [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []
        names = [_names(entry) for entry in entries]
        pairs = zip(entries, names, strict=True)
        chosen = [e for e, given in pairs if not reference or reference in given]
        if len(chosen) != 1:
            raise _which(reference, [name for given in names for name in given], len(chosen))
        return manifest.blob(chosen[0], "index.json")

    @staticmethod
    def _blob_name(blob: Blob) -> str:
        return f"blobs/{blob.digest.replace(':', '/')}"

    def _checked(self, blob: Blob) -> bytes:
        data = self._small(self._blob_name(blob))
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != blob.digest:
            raise damaged(f"{self._blob_name(blob)[:40]} has other content than it says")
        return data

    # Docker

    def _saved(self, reference: str, platform: str) -> Source:
        listed = manifest.parse(b'{"images":%s}' % self._small("manifest.json"), "manifest.json")
        images = listed["images"]
        images = [e for e in images if isinstance(e, dict)] if isinstance(images, list) else []
        tags = [[t for t in (e.get("RepoTags") or []) if isinstance(t, str)] for e in images]
        pairs = zip(images, tags, strict=True)
        chosen = [e for e, given in pairs if not reference or reference in given]
        if len(chosen) != 1:
            raise _which(reference, [name for given in tags for name in given], len(chosen))
        name, layers = chosen[0].get("Config"), chosen[0].get("Layers")
        if (
            not isinstance(name, str)
            or not isinstance(layers, list)
            or len(layers) > manifest.MAX_LAYERS
        ):
            raise damaged("manifest.json is damaged, or has too many layers")
        data = self._small(posixpath.normpath(name))
        config = manifest.parse(data, "the image's configuration")
        files = [(posixpath.normpath(str(each)), "") for each in layers]
        source = {"platform": platform}
        return self._source(config, files, source, platform)

    # Both

    def _source(
        self,
        config: dict[str, Any],
        files: list[tuple[str, str]],
        source: dict[str, Any],
        platform: str,
    ) -> Source:
        """*files*: name and digest of each layer; no digest where the diff id alone vouches."""
        what = "the image in the archive"
        diffs = manifest.diff_ids(config, len(files), what)
        architecture = manifest.check_platform(config, platform, what)
        for name, _ in files:
            self._member(name)  # all there, before any is read
        layers = [
            Foreign(diff, lambda n=name, d=digest: self._layer(n, d), text)  # type: ignore[misc]
            for diff, (name, digest), text in zip(
                diffs, files, intake.names_of(config, len(files)), strict=True
            )
        ]
        return Source(layers, manifest.settings(config, architecture), source)

    def _root_tar(self, platform: str) -> Source:
        say("import   the tar of a root file system")

        @contextmanager
        def whole() -> Iterator[BinaryIO]:
            self._file.seek(0)
            yield self._file

        architecture = platform.split("/")[1]
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        config = manifest.settings({"config": {"Env": [f"PATH={path}"]}}, architecture)
        return Source([Foreign("", whole, "root file system")], config, {"platform": platform})

    @contextmanager
    def _layer(self, name: str, digest: str) -> Iterator[BinaryIO]:
        with self._open(name) as file:
            if digest:
                sha256 = hashlib.sha256()
                while data := file.read(BUFFER):
                    sha256.update(data)
                if f"sha256:{sha256.hexdigest()}" != digest:
                    raise damaged(f"layer {digest[:19]} has other content than it says")
                file.seek(0)
            yield file

    def _small(self, name: str) -> bytes:
        if self._member(name).size > manifest.MAX_BYTES:
            raise damaged(f"{name[:80]} has more than {manifest.MAX_BYTES} bytes")
        with self._open(name) as file:
            return file.read()

    def _open(self, name: str) -> BinaryIO:
        file = self._tar.extractfile(self._member(name))
        assert file is not None
        return cast(BinaryIO, file)

    def _member(self, name: str) -> tarfile.TarInfo:
        """A file; Docker's older archives have links between layers."""
        info = self._members.get(name)
        for _ in range(2):
            if info is not None and info.issym():
                at = posixpath.join(posixpath.dirname(name), info.linkname)
                info = self._members.get(posixpath.normpath(at))
            elif info is not None and info.islnk():
                info = self._members.get(posixpath.normpath(info.linkname))
        if info is None or not info.isreg():
            raise damaged(f"the archive lacks {name[:80]!r}; it may end in the middle")
        return info


def _names(entry: dict[str, Any]) -> list[str]:
    marks = entry.get("annotations")
    marks = marks if isinstance(marks, dict) else {}
    return [v for v in (marks.get(REF_NAME), marks.get(IMAGE_NAME)) if isinstance(v, str)]


def _which(reference: str, names: list[str], count: int) -> Exception:
    there = ", ".join(sorted(set(names))[:10]) or "none with a name"
    if reference:
        return damaged(f"the archive has {count or 'no'} image {reference!r}; it has: {there}")
    return damaged(f"the archive has {count} images; say which with --from: {there}")
