"""Versions of a name: further names, going back, what is kept up to date, what is thrown away."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from madang.kit.clock import Clock
from madang.kit.ids import new_id
from madang.manager.db import Database, Reader, micros
from madang.manager.http import Caller
from madang.manager.image import rules, store
from madang.manager.image.service.images import ImageService, check_owner
from madang.manager.image.types import Action, ImageRow, Owner
from madang.wire.errors import Conflict, ImageUnknown, PlatformError
from madang.wire.image import Image, ImageStatus, Pruned
from madang.wire.session import HOST_IMAGE

log = logging.getLogger(__name__)

S = ImageStatus


class Versions:
    """On the rows of an ImageService."""

    def __init__(self, images: ImageService, database: Database, clock: Clock) -> None:
        self._images: Final = images
        self._database: Final = database
        self._clock: Final = clock

    async def list(self, caller: Caller, name: str) -> tuple[Image, ...]:
        """The one in force, then the older ones."""
        live = await self._images.sessions.live_images()
        await self._images.find(caller, name)  # a build that has just ended counts
        async with self._database.read() as tx:
            rows = await self._rows(tx, caller, name)
        return tuple(rules.to_image(row, live.get(row.digest, 0)) for row in rows)

    async def tag(self, caller: Caller, ref: str, target: str) -> Image:
        """The same content under a further name, or as the newest version of one."""
        rules.check_name(target)
        source = await self._images.find(caller, ref)
        if ref == HOST_IMAGE or source is None or source.status not in {S.READY, S.KEPT}:
            raise rules.not_ready(ref, source)
        now = micros(self._clock.now())
        row = replace(
            source,
            id=new_id(),
            name=target,
            owner_id=caller.user_id,
            owner=caller.user,
            project_id=caller.project_id,
            status=S.READY.value,
            status_since=now,
            created_at=now,
            action=Action.TAG.value,
            refresh_us=0,
        )
        async with self._database.begin() as tx:
            for old in await store.of_name(tx, row.project_id, target):
                await check_owner(tx, caller, old)
            await self._images.replace(tx, row, row.digest, now)
            await store.add(tx, row)
            after = {"digest": row.digest, "from": source.name}
            await self._images.write(tx, caller, row, "tagged", after=after)
        return rules.to_image(row, 0)

    async def rollback(self, caller: Caller, name: str, digest: str) -> Image:
        """An older version is in force again; the name is not looked after any more."""
        await self._images.find(caller, name)
        now = micros(self._clock.now())
        async with self._database.begin() as tx:
            rows = await self._rows(tx, caller, name, change=True)
            ready = next((row for row in rows if row.status == S.READY), None)
            kept = [row for row in rows if row.status == S.KEPT]
            if digest:
                digest = rules.split(f"{name}@{digest}")[1]
                chosen = rules.version(kept, digest, f"{name}@{digest}")
            elif kept:
                chosen = kept[0]
            else:
                raise ImageUnknown(f"image {name!r} has no older version to go back to.")
            if ready is not None:
                await store.move(tx, ready, S.KEPT, now)
            await store.move(tx, chosen, S.READY, now, refresh_us=0)
            before = {"digest": "" if ready is None else ready.digest}
            after = {"digest": chosen.digest}
            await self._images.write(tx, caller, chosen, "rolled_back", before=before, after=after)
        return rules.to_image(replace(chosen, status=S.READY.value, refresh_us=0), 0)

    async def follow(self, caller: Caller, name: str, refresh_s: float) -> Image:
        """Look for changes so often from now on; 0: never."""
        rules.check_refresh(refresh_s)
        await self._images.find(caller, name)
        now = micros(self._clock.now())
        refresh_us = micros(refresh_s)
        async with self._database.begin() as tx:
            rows = await self._rows(tx, caller, name, change=True)
            row = next((row for row in rows if row.status == S.READY), None)
            if row is None:
                raise rules.not_ready(name, None)
            rules.check_followable(row, refresh_s)
            await store.set_refresh(tx, row.id, refresh_us=refresh_us, refreshed_at=now)
            before, after = {"refresh_us": row.refresh_us}, {"refresh_us": refresh_us}
            await self._images.write(tx, caller, row, "followed", before=before, after=after)
        return rules.to_image(replace(row, refresh_us=refresh_us, refreshed_at=now), 0)

    async def prune(self, caller: Caller, *, dry_run: bool) -> tuple[Pruned, ...]:
        """Remove older versions and failed builds that nothing runs from, as far as one may."""
        live = await self._images.sessions.live_images()
        now = micros(self._clock.now())
        gone: list[ImageRow] = []
        async with self._database.begin() as tx:
            for row in await store.shown(tx, caller):
                idle = row.status in {S.KEPT, S.FAILED} and not live.get(row.digest)
                if idle and await store.may_change(tx, caller, row.id):
                    gone.append(row)
            if not dry_run:
                for row in gone:
                    await store.move(tx, row, S.REMOVED, now)
                    before = {"status": row.status, "digest": row.digest}
                    await self._images.write(tx, caller, row, "pruned", before=before)
        if gone and not dry_run:
            self._images.layers_changed()
        return tuple(
            Pruned(
                name=row.name,
                digest=row.digest,
                status=S(row.status),
                size_bytes=row.size_bytes,
            )
            for row in gone
        )

    async def refresh_due(self, now: float) -> None:
        """Make anew what it is time to look after; the content decides whether it changes."""
        async with self._database.read() as tx:
            rows = rules.due(await store.refreshed(tx), micros(now))
        for row in rows:
            await self._refresh(row, micros(now))

    async def _refresh(self, row: ImageRow, now: int) -> None:
        owner = Owner(user_id=row.owner_id, user=row.owner, project_id=row.project_id)
        async with self._database.begin() as tx:
            if not await store.set_refresh(tx, row.id, refreshed_at=now):
                return
        fresh = self._images.new_row(
            owner,
            None,
            name=row.name,
            requirements=row.requirements,
            labels=row.labels,
            policy=row.policy,
            size=row.size,
            action=row.action,
            asked=row.asked,
            making=rules.renewed(row.making),
        )
        try:
            if row.action == Action.RECIPE:
                await self._images.begin(owner, fresh)
            else:
                await self._images.make(owner, fresh)
        except Conflict:
            return  # somebody is making it
        except PlatformError as exc:
            log.warning("image not refreshed", extra={"image": row.name, "error": exc.text})
            return
        log.info("image refreshed", extra={"image": row.name, "id": fresh.id})

    async def _rows(
        self, tx: Reader, caller: Caller, name: str, *, change: bool = False
    ) -> Sequence[ImageRow]:
        """All versions of a name. Raises ImageUnknown, or Forbidden if one may not *change* it."""
        found = await self._images.list_rows(tx, caller, name)
        if change and found:
            await check_owner(tx, caller, found[0])
        rows = rules.versions(found)
        if not rows:
            raise rules.not_ready(name, rules.current(found))
        return rows
