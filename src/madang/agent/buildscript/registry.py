"""What is asked of an image registry (OCI distribution, Docker's v2)."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from madang.agent.buildscript import manifest
from madang.agent.buildscript.layertar import damaged
from madang.agent.buildscript.main import BuildError, Exit, say
from madang.agent.buildscript.sites import NotThere, Site, Unreachable, again
from madang.wire.reference import DOCKER, Reference

CHUNK = 1024 * 1024
DOCKER_HOST = "registry-1.docker.io"
_T = TypeVar("_T")


class Registry:
    """Where one reference's repository is; mirrors first, for what is read."""

    def __init__(
        self,
        proxy: str,
        reference: Reference,
        orders: dict[str, Any],
        login: tuple[str, str] | None,
    ) -> None:
        self.reference = reference
        self._proxy = proxy
        self._known: dict[str, dict[str, Any]] = orders.get("registries", {})
        self._certificates = str(orders.get("certificates", ""))
        mirrors = self._known.get(reference.host, {}).get("mirrors", ())
        self.sites = [*map(self._mirror, mirrors), self._origin(login)]

    def _site(self, host: str, name: str, prefix: str, login: tuple[str, str] | None) -> Site:
        known = self._known.get(name, {})
        if login is None and known.get("username"):
            login = known["username"], known["password"]
        return Site(
            self._proxy,
            host,
            http=bool(known.get("http")),
            prefix=prefix,
            login=login,
            certificates=self._certificates,
        )

    def _mirror(self, text: str) -> Site:
        host, _, prefix = text.strip("/").partition("/")
        return self._site(host, host, f"{prefix}/" if prefix else "", None)

    def _origin(self, login: tuple[str, str] | None) -> Site:
        host = self.reference.host
        return self._site(DOCKER_HOST if host == DOCKER else host, host, "", login)

    def manifest(self, wanted: str) -> tuple[bytes, str]:
        """Bytes and digest of a manifest or index, by tag or digest; checked if by digest."""
        return self._anywhere(f"manifest {wanted[:19]}", lambda site: self._manifest(site, wanted))

    def _manifest(self, site: Site, wanted: str) -> tuple[bytes, str]:
        with site.open(
            "GET",
            self.path(site, f"manifests/{wanted}"),
            scope=self.scope(site, "pull"),
            headers={"Accept": ", ".join(manifest.TYPES)},
        ) as answer:
            data = answer.read(manifest.MAX_BYTES + 1)
            said = answer.headers.get("Docker-Content-Digest", "")
            if answer.headers.get_content_type() in manifest.OLD_TYPES:
                raise damaged(f"{self.reference} has Docker's old manifest format (schema 1)")
        if len(data) > manifest.MAX_BYTES:
            raise damaged(
                f"the manifest of {self.reference} has more than {manifest.MAX_BYTES} bytes"
            )
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if (wanted.startswith("sha256:") and digest != wanted) or (
            said.startswith("sha256:") and said != digest
        ):
            raise damaged(f"the manifest of {self.reference} is not the one that {site.host} names")
        return data, digest

    def blob(self, digest: str, size: int, target: str) -> None:
        """Into the file *target*; an interrupted download goes on where it stopped."""
        self._anywhere(f"blob {digest[:19]}", lambda site: self._blob(site, digest, size, target))

    def _blob(self, site: Site, digest: str, size: int, target: str) -> None:
        with open(target, "ab") as file:
            have = file.tell()
            if have < size:
                self._download(site, digest, have, size, file)
        with open(target, "rb") as done:
            found = hashlib.sha256()
            while data := done.read(CHUNK):
                found.update(data)
        if f"sha256:{found.hexdigest()}" != digest:
            os.unlink(target)
            raise damaged(f"blob {digest[:19]} from {site.host} has other content than it says")

    def _download(self, site: Site, digest: str, have: int, size: int, file: Any) -> None:
        with site.open(
            "GET",
            self.path(site, f"blobs/{digest}"),
            scope=self.scope(site, "pull"),
            headers={"Range": f"bytes={have}-"} if have else {},
            good=frozenset({200, 206}),
        ) as answer:
            start = f"bytes {have}-"
            if answer.status == 200 or not answer.headers.get("Content-Range", "").startswith(
                start
            ):
                file.truncate(0)
                have = 0
            if answer.status == 206 and have == 0:
                raise Unreachable(f"{site.host} sends another part than was asked for")
            while data := answer.read(CHUNK):
                have += len(data)
                if have > size:
                    raise damaged(f"blob {digest[:19]} is larger than its manifest says")
                file.write(data)
        if have < size:
            raise Unreachable(f"{site.host} hangs up after {have} of {size} bytes")

    def path(self, site: Site, rest: str) -> str:
        return f"/v2/{site.prefix}{self.reference.name}/{rest}"

    def scope(self, site: Site, actions: str) -> str:
        return f"repository:{site.prefix}{self.reference.name}:{actions}"

    def _anywhere(self, what: str, do: Callable[[Site], _T]) -> _T:
        """At the first mirror that has it, else at the registry itself."""
        for site in self.sites[:-1]:
            try:
                return do(site)
            except (Unreachable, NotThere, BuildError) as exc:
                say(f"mirror   {what}: {exc}")
        origin = self.sites[-1]
        try:
            found: _T = again(what, lambda: do(origin))
        except Unreachable as exc:
            raise BuildError(Exit.NETWORK, f"{what}: {exc}") from exc
        except NotThere as exc:
            raise BuildError(Exit.DAMAGED, f"{self.reference} is not there: {exc}") from exc
        return found


def read_login() -> tuple[str, str]:
    """From a line of our stdin, where it leaves no trace."""
    try:
        found = json.loads(sys.stdin.readline(64 * 1024))
        login = str(found["username"]), str(found["password"])
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise BuildError(Exit.DENIED, "no login came on the build's input") from exc
    return login


def chunks(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            yield data
