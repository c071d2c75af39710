"""Sessions saved as images: what they changed in their root, as one more layer."""

from __future__ import annotations

from typing import Final

from madang.kit.clock import Clock
from madang.kit.codec import to_json
from madang.manager.db import Database, micros
from madang.manager.http import Caller
from madang.manager.image import rules, store
from madang.manager.image.service.images import ImageService
from madang.manager.image.types import Action
from madang.wire.errors import Conflict
from madang.wire.image import (
    BuildManifest,
    CommitRequest,
    Image,
    ImageConfig,
    ImageKind,
    Layer,
)


class Commits:
    """Makes images of sessions."""

    def __init__(self, database: Database, images: ImageService, clock: Clock) -> None:
        self._database: Final = database
        self._images: Final = images
        self._clock: Final = clock

    async def commit(self, caller: Caller, ref: str, request: CommitRequest) -> Image:
        """The image; a new version of its name if that is taken. The session goes on.

        Raises Conflict where the session has no root of its own.
        """
        rules.check_name(request.name)
        rules.check_marks(request.labels, request.policy)
        sessions = self._images.sessions
        session = await sessions.get(caller, ref)
        mount = await sessions.mount_of(session.id)
        if mount.kind != ImageKind.ROOT:
            text = f"session {session.name} runs from {session.image!r}, which has no root of its "
            raise Conflict(f"{text}own that could be saved.", session=session.id)
        saved = await sessions.save_root(session.id)
        layer = Layer(
            digest=saved.digest,
            name="commit",
            version=session.name,
            size_bytes=saved.size_bytes,
        )
        async with self._database.read() as tx:
            parents = await store.of_digest(tx, mount.digest)
        known = {each.digest: each for row in parents for each in rules.layers(row)}
        below = [known.get(digest) or _nameless(digest) for digest in mount.layers]
        layers = (layer, *(each for each in below if each.digest != layer.digest))
        manifest = rules.check_manifest(
            BuildManifest(
                python="",
                layers=layers,
                kind=ImageKind.ROOT,
                config=ImageConfig(env=mount.env),
            )
        )
        row = self._images.new_row(
            caller,
            None,
            name=request.name,
            kind=ImageKind.ROOT.value,
            action=Action.COMMIT.value,
            labels=to_json(request.labels).decode(),
            policy=request.policy,
        )
        async with self._database.begin() as tx:
            await self._images.add(tx, caller, row)
            await self._images.ready(tx, row, manifest, micros(self._clock.now()))
        return await self._images.get(caller, request.name)


def _nameless(digest: str) -> Layer:
    """Of an image that was removed while the session ran."""
    return Layer(digest=digest, name="layer", version="", size_bytes=0)
