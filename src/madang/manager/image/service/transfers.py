"""Images from and to elsewhere: each by a session of the build script."""

from __future__ import annotations

import hashlib
from typing import Final

from madang.kit.codec import from_json, to_json
from madang.kit.ids import new_id
from madang.manager.db import Database, micros
from madang.manager.http import Caller
from madang.manager.image import rules, store
from madang.manager.image.service.images import ImageService
from madang.manager.image.types import (
    AS_BEFORE,
    Action,
    Asked,
    ImageRow,
    ImageSettings,
    Owner,
)
from madang.wire.errors import Conflict, InvalidRequest
from madang.wire.image import (
    ImageKind,
    ImageStatus,
    ImportRequest,
    PullRequest,
    PushRequest,
)
from madang.wire.session import HOST_IMAGE, Session, SizeRequest
from madang.wire.size import GIB

S = ImageStatus
MAX_CHECKED: Final = 100
"""References in one ``check``."""


class Transfers:
    """On the rows of an ImageService."""

    def __init__(self, images: ImageService, database: Database, settings: ImageSettings) -> None:
        self._images: Final = images
        self._database: Final = database
        self._settings: Final = settings

    async def pull(self, caller: Caller, request: PullRequest, *, key: str | None) -> Session:
        request = rules.check_pull(request)
        asked = Asked(reference=request.reference, platform=request.platform, login=request.login)
        follow = request.refresh_s
        row = self._images.new_row(
            caller,
            key,
            name=request.name,
            kind=ImageKind.ROOT.value,
            action=Action.PULL.value,
            asked=to_json(asked).decode(),
            labels=to_json(request.labels).decode(),
            size=to_json(request.size).decode(),
            policy=request.policy,
            refresh_us=AS_BEFORE if follow is None else micros(follow),
        )
        if follow:
            rules.check_followable(row, follow)
        return await self._images.make(caller, row)

    async def take_in(self, caller: Caller, request: ImportRequest, *, key: str | None) -> Session:
        request = rules.check_import(request)
        asked = Asked(reference=request.reference, platform=request.platform)
        row = self._images.new_row(
            caller,
            key,
            name=request.name,
            kind=ImageKind.ROOT.value,
            action=Action.IMPORT.value,
            asked=to_json(asked).decode(),
            labels=to_json(request.labels).decode(),
            size=to_json(request.size).decode(),
            policy=request.policy,
            refresh_us=0,
        )
        return await self._images.make(caller, row)

    async def push(
        self, caller: Caller, ref: str, request: PushRequest, *, key: str | None
    ) -> Session:
        target = rules.check_reference(request.reference)
        if target.digest:
            text = "reference: a push goes to a tag; the digest comes out of it."
            raise InvalidRequest(text, field="reference")
        words = ("push", str(target), *(("--login",) if request.login else ()))
        row = await self._root(caller, ref)
        session = await self._ship(caller, row, words, key, stdin=request.login)
        async with self._database.begin() as tx:
            await self._images.write(tx, caller, row, "pushed", after={"reference": str(target)})
        return session

    async def export(self, caller: Caller, ref: str, *, key: str | None) -> Session:
        """A session that leaves ``/outputs/image.tar``, an OCI archive."""
        row = await self._root(caller, ref)
        session = await self._ship(caller, row, ("export", row.name), key, stdin=False)
        async with self._database.begin() as tx:
            await self._images.write(tx, caller, row, "exported", after={"digest": row.digest})
        return session

    async def check(self, caller: Caller, *, key: str | None) -> Session:
        """A session that leaves ``/outputs/check.json``: what the tags of all pulled images are."""
        async with self._database.read() as tx:
            rows = await store.shown(tx, caller)
        asked = [
            from_json(Asked, row.asked)
            for row in rows
            if row.status == S.READY and row.action == Action.PULL
        ]
        wanted = sorted({each.reference for each in asked if "@" not in each.reference})
        if not wanted:
            raise Conflict("no image was pulled from a registry by a tag; nothing can be outdated.")
        if len(wanted) > MAX_CHECKED:
            text = f"{len(wanted)} references; one look is for {MAX_CHECKED}. Remove some images."
            raise Conflict(text)
        spec = rules.script_spec(
            ("check", *wanted),
            rules.moved_size(SizeRequest()),
            self._settings,
            labels={"image": "check"},
        )
        return await self._images.sessions.start_build(_owner(caller), spec, _key("check", key))

    async def _root(self, caller: Caller, ref: str) -> ImageRow:
        """A whole image that can go elsewhere."""
        row = None if ref == HOST_IMAGE else await self._images.find(caller, ref)
        if ref != HOST_IMAGE and (row is None or row.status not in {S.READY, S.KEPT}):
            raise rules.not_ready(ref, row)
        if row is None or row.kind != ImageKind.ROOT:
            text = f"image {ref[:80]!r} is no whole root file system: it lives on the machine's own"
            raise Conflict(f"{text} system and can't go elsewhere.", image=ref[:80])
        return row

    async def _ship(
        self, caller: Caller, row: ImageRow, words: tuple[str, ...], key: str | None, *, stdin: bool
    ) -> Session:
        disk = max(self._settings.disk_bytes, 3 * row.size_bytes + GIB)
        spec = rules.script_spec(
            words,
            rules.moved_size(SizeRequest(disk_bytes=disk)),
            self._settings,
            labels={"image": row.name},
            stdin=stdin,
            env={"IMAGE_CONFIG": row.config},
        )
        offers = tuple(layer.digest for layer in rules.layers(row))
        return await self._images.sessions.start_build(
            _owner(caller), spec, _key(words[0], key), offers
        )


def _owner(caller: Caller) -> Owner:
    return Owner(user_id=caller.user_id, user=caller.user, project_id=caller.project_id)


def _key(word: str, key: str | None) -> str:
    """Of the session, beside those that the caller's own sessions have."""
    if key is None:
        return f"image-{word}-{new_id()}"
    return f"image-{word}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
