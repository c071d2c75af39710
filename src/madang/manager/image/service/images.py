"""Building, finding and removing images."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from madang.kit.clock import Clock
from madang.kit.codec import from_json, to_json
from madang.kit.ids import new_id
from madang.manager.audit.rules import HIDDEN
from madang.manager.audit.service import AuditLog, actor_of
from madang.manager.db import Database, Reader, Transaction, micros
from madang.manager.http import Caller
from madang.manager.image import rules, store
from madang.manager.image.types import (
    AS_BEFORE,
    MANIFEST_PATIENCE_S,
    REMOVED_S,
    Action,
    Asked,
    ImageRow,
    ImageSettings,
    Owner,
    Sessions,
)
from madang.wire.errors import (
    Conflict,
    Forbidden,
    ImageInUse,
    PlatformError,
    Retry,
)
from madang.wire.image import (
    BUILD_MANIFEST,
    BuildManifest,
    BuildRequest,
    Image,
    ImageKind,
    ImageStatus,
    Layer,
)
from madang.wire.kernel import OUTPUT_DIR, ImageMount
from madang.wire.session import HOST_IMAGE, Result, Session, SessionStatus

log = logging.getLogger(__name__)

S = ImageStatus
MAX_MANIFEST: Final = 1024 * 1024


class ImageService:
    """``sessions`` is given by the app before the first call; ``go_on`` by ``Recipes``."""

    sessions: Sessions
    go_on: Callable[[ImageRow], Awaitable[None]]
    """What makes a recipe's next step."""

    def __init__(
        self,
        database: Database,
        audit: AuditLog,
        clock: Clock,
        settings: ImageSettings,
        *,
        layers_changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._database: Final = database
        self._audit: Final = audit
        self._clock: Final = clock
        self._settings: Final = settings
        self.layers_changed: Final = layers_changed

    # --- for sessions

    async def resolve(self, caller: Caller, name: str) -> ImageMount:
        """A ready image, as a session mounts it. Raises ImageUnknown."""
        if name == HOST_IMAGE:
            return ImageMount(name=name, digest=rules.HOST.digest, kind=rules.HOST.kind.value)
        row = await self.find(caller, name)
        if row is None or row.status not in {S.READY, S.KEPT}:
            raise rules.not_ready(name, row)
        return rules.mount(row)

    async def policy_of(self, caller: Caller, name: str) -> str:
        """The text of its layer of the sandbox policy; empty: none."""
        row = None if name == HOST_IMAGE else await self.find(caller, name)
        return "" if row is None else row.policy

    async def wanted_layers(self) -> tuple[str, ...]:
        """Layers that nodes shall keep."""
        async with self._database.read() as tx:
            lists = await store.layer_lists(tx)
        found = {layer.digest for text in lists for layer in from_json(tuple[Layer, ...], text)}
        return tuple(sorted(found))

    # --- for users

    async def list(self, caller: Caller) -> tuple[Image, ...]:
        """One for each name of each project that the caller is in, the built-in first."""
        async with self._database.read() as tx:
            rows = await store.shown(tx, caller)
        live = await self.sessions.live_images()
        chosen = map(rules.current, rules.by_name(rows))
        built = [rules.to_image(row, live.get(row.digest, 0)) for row in chosen if row]
        return (_host(live.get(rules.HOST.digest, 0)), *built)

    async def get(self, caller: Caller, name: str) -> Image:
        live = await self.sessions.live_images()
        if name == HOST_IMAGE:
            return _host(live.get(rules.HOST.digest, 0))
        row = await self.find(caller, name)
        if row is None:
            raise rules.not_ready(name, None)
        return rules.to_image(row, live.get(row.digest, 0))

    async def build(
        self, caller: Caller, request: BuildRequest, *, key: str | None = None
    ) -> Session:
        """Start the build session; the same one if *key* came before with the same request.

        Raises Conflict while the name is being built.
        """
        request = rules.check_request(request)
        row = self.new_row(
            caller,
            key,
            name=request.name,
            requirements=to_json(request.requirements).decode(),
            labels=to_json(request.labels).decode(),
            policy=request.policy,
            size=to_json(request.size).decode(),
        )
        return await self.make(caller, row)

    async def make(self, caller: Caller, row: ImageRow) -> Session:
        """Accept a row that a build session makes; the same session if it came before.

        Raises Conflict while the name is being built.
        """
        known = await self._accept(caller, row)
        if known is not None:
            return await self._start(known)
        try:
            return await self._start(row)
        except PlatformError:
            await self.give_up(row)
            raise

    async def begin(self, caller: Caller, row: ImageRow) -> None:
        """The same of a row that takes several sessions, one after the other."""
        if await self._accept(caller, row) is None:
            try:
                await self.go_on(row)
            except PlatformError:
                await self.give_up(row)
                raise

    async def _accept(self, caller: Caller, row: ImageRow) -> ImageRow | None:
        """Add it, unless it came before: then as it is now."""
        await self._settled(
            row.project_id, row.name
        )  # a build that has just ended is in nobody's way
        async with self._database.begin() as tx:
            known = await store.find(tx, row.id)
            if known is None:
                await self.add(tx, caller, row)
        if known is not None:
            rules.check_repeated(known, row)
        return known

    async def remove(self, caller: Caller, name: str, *, force: bool = False) -> None:
        """Free the name; its layers go once no live session uses them."""
        if name == HOST_IMAGE:
            raise Conflict(f"{HOST_IMAGE!r} is built in and can't be removed.")
        live = await self.sessions.live_images()
        now = micros(self._clock.now())
        async with self._database.begin() as tx:
            rows = await self.list_rows(tx, caller, name)
            if not rows:
                raise rules.not_ready(name, None)
            for row in rows:
                await check_owner(tx, caller, row)
                _check_removable(row, live.get(row.digest, 0), force=force)
            for row in rows:
                await store.move(tx, row, S.REMOVED, now)
            former = rules.current(rows) or rows[0]
            before = {"status": former.status, "digest": former.digest}
            await self.write(tx, caller, former, "removed", before=before)
        self.layers_changed()

    # --- for the loops

    async def settle_builds(self) -> None:
        """Move on every build whose session has ended or was never started."""
        async with self._database.read() as tx:
            rows = await store.with_status(tx, S.BUILDING)
        for row in rows:
            await self._settle(row)

    async def forget_removed(self, now: float) -> int:
        """Delete rows of removed images that no live session uses; how many."""
        async with self._database.read() as tx:
            rows = await store.with_status(tx, S.REMOVED)
        if not rows:
            return 0
        live = await self.sessions.live_images()
        old = [row for row in rows if micros(now) - row.status_since > micros(REMOVED_S)]
        gone = [row for row in old if not (row.digest and live.get(row.digest))]
        if gone:
            async with self._database.begin() as tx:
                for row in gone:
                    await store.delete(tx, row.id)
            self.layers_changed()
        return len(gone)

    # --- inside

    async def list_rows(self, tx: Reader, caller: Caller, ref: str) -> Sequence[ImageRow]:
        """All rows of ``NAME`` or ``PROJECT/NAME`` in one project. Raises Ambiguous."""
        project, _, name = ref.rpartition("/")
        rows = await store.list_for(tx, caller, name, project or None)
        return rules.in_one_project(rows, caller.project_id, ref)

    async def find(self, caller: Caller, ref: str) -> ImageRow | None:
        """The row of ``NAME`` or ``NAME@DIGEST``; a build that has just ended is settled first."""
        name, digest = rules.split(ref)
        async with self._database.read() as tx:
            rows = await self.list_rows(tx, caller, name)
        if not rows:
            return None
        found = await self._settled(rows[0].project_id, rows[0].name)
        if not digest:
            return found
        async with self._database.read() as tx:
            rows = await store.of_name(tx, rows[0].project_id, rows[0].name)
        return rules.version(rows, digest, ref)

    async def _settled(self, project_id: str, name: str) -> ImageRow | None:
        async with self._database.read() as tx:
            rows = await store.of_name(tx, project_id, name)
        building = next((row for row in rows if row.status == S.BUILDING and row.build), None)
        if building is not None:
            await self._settle(building)
            async with self._database.read() as tx:
                rows = await store.of_name(tx, project_id, name)
        return rules.current(rows)

    async def add(self, tx: Transaction, caller: Caller, row: ImageRow) -> None:
        """A row in BUILDING. Raises Conflict while another one of its name is."""
        for old in await store.of_name(tx, row.project_id, row.name):
            await check_owner(tx, caller, old)
            if old.status == S.BUILDING:
                raise Conflict(
                    f"image {row.name!r} is being built by {old.build_name or 'a session'}: "
                    "wait for it, or stop it first.",
                    build=old.build_name,
                )
            if old.status == S.FAILED:
                await store.move(tx, old, S.REMOVED, row.created_at)
        await store.add(tx, row)
        wanted = from_json(list[str], row.requirements)
        shown = [HIDDEN if {"@", "/"} & set(text) else text for text in wanted]  # may name a key
        reference = from_json(Asked, row.asked).reference
        after = {"requirements": shown, "status": row.status}
        if reference:
            after["reference"] = reference
        await self.write(tx, caller, row, f"{row.action}_started", after=after)

    async def write(
        self, tx: Transaction, caller: Caller, row: ImageRow, action: str, **values: Any
    ) -> None:
        """To the audit log."""
        await self._audit.record(
            tx,
            actor=actor_of(caller),
            action=f"image.{action}",
            kind="image",
            id=row.id,
            name=row.name,
            **values,
        )

    def new_row(self, caller: Caller, key: str | None, *, name: str, **values: Any) -> ImageRow:
        """A row in BUILDING; *values* where it says more than that."""
        now = micros(self._clock.now())
        plain = ImageRow(
            id=new_id() if key is None else rules.id_of_key(caller.user_id, key),
            name=name,
            owner_id=caller.user_id,
            owner=caller.user,
            project_id=caller.project_id,
            kind=ImageKind.LAYERS.value,
            status=S.BUILDING.value,
            status_since=now,
            created_at=now,
            requirements="[]",
            labels="{}",
            policy="",
            size="{}",
            digest="",
            python="",
            layers="[]",
            size_bytes=0,
            build="",
            build_name="",
            reason="",
            action=Action.BUILD.value,
            asked="{}",
            source="{}",
            config="{}",
            refresh_us=AS_BEFORE,
            refreshed_at=now,
            making="",
        )
        return replace(plain, **values)

    async def _start(self, row: ImageRow) -> Session:
        """The build's session; the same one if it was started before."""
        owner = Owner(user_id=row.owner_id, user=row.owner, project_id=row.project_id)
        spec = rules.build_spec(row, self._settings)
        session = await self.sessions.start_build(owner, spec, f"image-{row.id}")
        async with self._database.begin() as tx:
            await store.set_build(tx, row.id, session.id, session.name)
        return session

    async def give_up(self, row: ImageRow) -> None:
        """A build that could not even start leaves nothing."""
        now = micros(self._clock.now())
        async with self._database.begin() as tx:
            await store.move(tx, row, S.FAILED, now, reason="its session could not be created")
            await store.move(tx, row, S.REMOVED, now)
            await store.delete(tx, row.id)

    async def _settle(self, row: ImageRow) -> None:
        if not row.build or row.action == Action.RECIPE:
            await self._start_again(row)
            return
        session = await self.sessions.find(row.build)
        if session is not None and session.status is not SessionStatus.TERMINATED:
            return
        if session is None or session.result is not Result.SUCCESS:
            await self.fail(row, rules.why_failed(session))
            return
        try:
            path = f"{OUTPUT_DIR}/{BUILD_MANIFEST}"
            data = await self.sessions.read_file(row.build, path, MAX_MANIFEST)
            manifest = rules.check_manifest(from_json(BuildManifest, data))
        except PlatformError as exc:
            ended = session.ended_at or session.status_since
            late = self._clock.now() - ended > MANIFEST_PATIENCE_S
            if exc.retry is not Retry.LATER or late:
                await self.fail(row, f"its result can't be read: {exc.text}")
            return
        await self.finish(row, manifest)

    async def _start_again(self, row: ImageRow) -> None:
        """The server died between accepting a build and starting it; or a step has ended."""
        try:
            await (self.go_on if row.action == Action.RECIPE else self._start)(row)
        except PlatformError as exc:
            if exc.retry is not Retry.LATER:
                await self.fail(row, f"its session could not be created: {exc.text}")

    async def fail(self, row: ImageRow, reason: str) -> None:
        now = micros(self._clock.now())
        async with self._database.begin() as tx:
            moved = await store.move(tx, row, S.FAILED, now, reason=reason)
        if moved:
            log.info("image failed", extra={"image": row.name, "reason": reason})

    async def finish(self, row: ImageRow, manifest: BuildManifest) -> None:
        """The new image takes the name from the one before it."""
        now = micros(self._clock.now())
        async with self._database.begin() as tx:
            fresh = await store.find(tx, row.id)
            if fresh is None or fresh.status != S.BUILDING:
                return
            await self.ready(tx, row, manifest, now)

    async def ready(
        self, tx: Transaction, row: ImageRow, manifest: BuildManifest, now: int
    ) -> None:
        """*row*, which is BUILDING, is *manifest*."""
        digests = (layer.digest for layer in manifest.layers)
        digest = rules.image_digest(manifest.kind, digests, manifest.config)
        refresh_us = await self.replace(tx, row, digest, now)
        await store.move(
            tx,
            row,
            S.READY,
            now,
            digest=digest,
            python=manifest.python,
            layers=to_json(manifest.layers).decode(),
            size_bytes=sum(layer.size_bytes for layer in manifest.layers),
            kind=manifest.kind.value,
            config=to_json(manifest.config).decode(),
            source=to_json(manifest.source).decode(),
            refresh_us=refresh_us,
            refreshed_at=now,
        )
        log.info("image ready", extra={"image": row.name, "digest": digest})

    async def replace(self, tx: Transaction, row: ImageRow, digest: str, now: int) -> int:
        """Make room for *row* to be the READY one of its name, with this digest.

        What was, is kept as an older version, the oldest of which go. Returns how often the name
        is looked after: as *row* says, else as before.
        """
        before = await store.of_name(tx, row.project_id, row.name)
        refresh_us = max(row.refresh_us, 0)
        for old in before:
            if old.status == S.READY:
                same = old.digest == digest
                await store.move(tx, old, S.REMOVED if same else S.KEPT, now)
                if row.refresh_us < 0:
                    refresh_us = old.refresh_us
            elif old.status == S.KEPT and old.digest == digest:
                await store.move(tx, old, S.REMOVED, now)
        rows = await store.of_name(tx, row.project_id, row.name)
        kept = [old for old in rules.versions(rows) if old.status == S.KEPT and old.id != row.id]
        for old in kept[self._settings.versions :]:
            await store.move(tx, old, S.REMOVED, now)
        return refresh_us


def _host(used_by: int) -> Image:
    host = rules.HOST
    return Image(
        name=host.name, digest=host.digest, kind=host.kind, status=host.status, used_by=used_by
    )


async def check_owner(tx: Reader, caller: Caller, row: ImageRow) -> None:
    if not await store.may_change(tx, caller, row.id):
        raise Forbidden(f"image {row.name!r} belongs to {row.owner}.", image=row.name)


def _check_removable(row: ImageRow, users: int, *, force: bool) -> None:
    if row.status == S.BUILDING:
        text = f"image {row.name!r} is being built by {row.build_name or 'a session'}; stop it."
        raise Conflict(text, build=row.build_name)
    if users and not force:
        text = f"image {row.name!r}: {users} live sessions run from it. Stop them, or use force: "
        raise ImageInUse(text + "they go on, the name is free.", image=row.name, used_by=users)
