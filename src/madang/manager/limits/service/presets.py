"""Presets: sizes with a name."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import Any, Final

from madang.kit.clock import Clock
from madang.kit.codec import from_json, to_json
from madang.manager.audit.service import AuditLog, actor_of
from madang.manager.db import Database, Transaction, micros, seconds
from madang.manager.http import Caller
from madang.manager.limits import store
from madang.manager.limits.types import PresetRow
from madang.wire.errors import (
    Forbidden,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    PresetUnknown,
)
from madang.wire.limits import Preset, PresetDraft
from madang.wire.session import SizeRequest
from madang.wire.size import Size, check

MAX_ABOUT: Final = 200
MAX_PRESETS: Final = 200
_NAME: Final = re.compile(r"[a-z][a-z0-9._-]{0,39}")
_FILLED: Final = Size(cpu=1.0, mem_bytes=1 << 30, pids=512, disk_bytes=1 << 30)


class PresetService:
    """Everybody may read; administrators change."""

    def __init__(self, database: Database, audit: AuditLog, clock: Clock) -> None:
        self._database: Final = database
        self._audit: Final = audit
        self._clock: Final = clock

    async def list(self) -> tuple[Preset, ...]:
        async with self._database.read() as tx:
            return tuple(map(_preset, await store.list_presets(tx)))

    async def get(self, name: str) -> Preset:
        """Raises PresetUnknown, which names those that there are."""
        async with self._database.read() as tx:
            row = await store.find_preset(tx, name)
            known = [] if row is not None else await store.list_presets(tx)
        if row is None:
            names = ", ".join(each.name for each in known) or "none"
            text = f"no preset {name[:40]!r}; there are: {names}."
            raise PresetUnknown(text, preset=name[:40], known=[each.name for each in known])
        return _preset(row)

    async def fill(self, name: str, size: SizeRequest) -> SizeRequest:
        """*size* with what it leaves open taken from the preset."""
        preset = (await self.get(name)).size
        given = {f: getattr(size, f) for f in SizeRequest.__slots__}
        return replace(preset, **{f: value for f, value in given.items() if value is not None})

    async def put(
        self, caller: Caller, name: str, draft: PresetDraft, version: int | None
    ) -> Preset:
        """Make it or replace it, if *version* (0: none) still is there."""
        _administers(caller)
        if not _NAME.fullmatch(name):
            text = f"{name[:60]!r} is no name of a preset: up to 40 lower-case letters, digits, ._-"
            raise InvalidRequest(text, field="name")
        _check(draft)
        at = micros(self._clock.now())
        async with self._database.begin() as tx:
            known = await store.find_preset(tx, name)
            _match(name, 0 if known is None else known.version, version)
            if known is None and len(await store.list_presets(tx)) >= MAX_PRESETS:
                raise InvalidRequest(f"there are {MAX_PRESETS} presets; remove one first.")
            row = PresetRow(
                name=name,
                size=to_json(draft.size).decode(),
                about=draft.about,
                version=1 if known is None else known.version + 1,
                author=caller.user,
                at=at,
            )
            await store.put_preset(tx, row, author_id=caller.user_id)
            await self._record(tx, caller, "preset.set", name, known, row)
        return _preset(row)

    async def remove(self, caller: Caller, name: str, version: int | None) -> None:
        _administers(caller)
        at = micros(self._clock.now())
        async with self._database.begin() as tx:
            known = await store.find_preset(tx, name)
            if known is None:
                raise NotFound(f"no preset {name[:40]!r}. `madang preset ls` lists them.")
            _match(name, known.version, version)
            await store.remove_preset(tx, name, author_id=caller.user_id, at=at)
            await self._record(tx, caller, "preset.removed", name, known, None)

    async def _record(
        self,
        tx: Transaction,
        caller: Caller,
        action: str,
        name: str,
        before: PresetRow | None,
        after: PresetRow | None,
    ) -> None:
        await self._audit.record(
            tx,
            actor=actor_of(caller),
            action=action,
            kind="preset",
            id=name,
            name=name,
            before=None if before is None else _told(before),
            after=None if after is None else _told(after),
        )


def _told(row: PresetRow) -> dict[str, Any]:
    return {"version": row.version, **asdict(from_json(SizeRequest, row.size))}


def _administers(caller: Caller) -> None:
    if not caller.administers:
        raise Forbidden("only an administrator changes presets.")


def _match(name: str, known: int, version: int | None) -> None:
    if version is not None and version != known:
        text = f"preset {name} is at version {known}, not {version}. Look at it again."
        raise PreconditionFailed(text, version=known)


def _check(draft: PresetDraft) -> None:
    """Raises SizeInvalid, InvalidRequest."""
    given = {f: getattr(draft.size, f) for f in SizeRequest.__slots__}
    given = {f: value for f, value in given.items() if value is not None}
    if not given:
        raise InvalidRequest("size: a preset names at least one size.", field="size")
    check(replace(_FILLED, **given))
    if len(draft.about) > MAX_ABOUT or not (draft.about.isprintable() or not draft.about):
        text = f"about: at most {MAX_ABOUT} printable characters on one line."
        raise InvalidRequest(text, field="about")


def _preset(row: PresetRow) -> Preset:
    return Preset(
        name=row.name,
        size=from_json(SizeRequest, row.size),
        about=row.about,
        version=row.version,
        author=row.author,
        at=seconds(row.at),
    )
