"""All SQL of the image slice."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Final

import sqlalchemy as sa

from madang.manager.db import Reader, Transaction, one_of
from madang.manager.db.events import add_event
from madang.manager.identity.store import Viewer, fellows, viewer, visible
from madang.manager.identity.tables import projects
from madang.manager.image.tables import images
from madang.manager.image.types import LIFE, ImageRow
from madang.wire.image import ImageStatus

S = ImageStatus

_COLUMNS: Final = [images.c[field.name] for field in fields(ImageRow)]
_SELECT: Final = sa.select(*_COLUMNS)
_BY_NAME: Final = _SELECT.where(
    images.c.project_id == sa.bindparam("b_project"),
    images.c.name == sa.bindparam("b_name"),
    images.c.status != S.REMOVED.value,
)
_FELLOWS: Final = fellows(images.c.owner_id, images.c.project_id)
_FOR: Final = (
    _SELECT.join_from(images, projects, images.c.project_id == projects.c.id)
    .where(
        images.c.name == sa.bindparam("b_name"),
        images.c.status != S.REMOVED.value,
        sa.or_(
            sa.bindparam("b_project", type_=sa.Text).is_(None),
            projects.c.name == sa.bindparam("b_project", type_=sa.Text),
        ),
        _FELLOWS,
    )
    .order_by(images.c.project_id)
)
_ADMINISTERED: Final = sa.select(images.c.id).where(
    images.c.id == sa.bindparam("b_id"), visible(images.c.owner_id, images.c.project_id)
)
_BY_ID: Final = _SELECT.where(images.c.id == sa.bindparam("b_id"))
_SHOWN: Final = _SELECT.where(images.c.status != S.REMOVED.value, _FELLOWS).order_by(
    images.c.name, images.c.project_id
)
_WITH: Final = {
    status: _SELECT.where(images.c.status == status.value).order_by(images.c.id) for status in S
}
_LAYERS: Final = sa.select(images.c.layers).where(
    images.c.layers != "[]",
)
_MAKINGS: Final = sa.select(images.c.making).where(
    images.c.owner_id == sa.bindparam("b_owner"), images.c.making != ""
)
_ADVANCE: Final = sa.update(images).where(
    images.c.id == sa.bindparam("b_id"),
    images.c.status == S.BUILDING.value,
    images.c.build == sa.bindparam("b_build"),
)
_OF_DIGEST: Final = _SELECT.where(images.c.digest == sa.bindparam("b_digest"))
_REFRESHED: Final = _SELECT.where(
    images.c.status == S.READY.value, images.c.refresh_us > 0
).order_by(images.c.id)
_SET_REFRESH: Final = sa.update(images).where(
    images.c.id == sa.bindparam("b_id"), images.c.status == S.READY.value
)
_ADD: Final = sa.insert(images)
_SET_BUILD: Final = sa.update(images).where(
    images.c.id == sa.bindparam("b_id"),
    images.c.status == S.BUILDING.value,
    images.c.build == "",
)
_MOVE: Final = {
    target: sa.update(images).where(
        images.c.id == sa.bindparam("b_id"),
        one_of(images.c.status, [s for s, rule in LIFE.items() if target in rule.next]),
    )
    for target in S
}
_DELETE: Final = sa.delete(images).where(
    images.c.id == sa.bindparam("b_id"), images.c.status == S.REMOVED.value
)


def _row(record: Any) -> ImageRow:
    return ImageRow(**record._asdict())


async def of_name(tx: Reader, project_id: str, name: str) -> list[ImageRow]:
    """All rows of a project's name but the removed ones: several in KEPT, else one a status."""
    found = await tx.all(_BY_NAME, b_project=project_id, b_name=name)
    return [_row(record) for record in found]


async def list_for(tx: Reader, caller: Viewer, name: str, project: str | None) -> list[ImageRow]:
    """Rows of a name, but the removed ones, in all projects whose images *caller* may use."""
    found = await tx.all(_FOR, b_name=name, b_project=project, **viewer(caller))
    return [_row(record) for record in found]


async def may_change(tx: Reader, caller: Viewer, image_id: str) -> bool:
    """Whether it is the caller's own, or of a project that they administer."""
    return await tx.one(_ADMINISTERED, b_id=image_id, **viewer(caller)) is not None


async def find(tx: Reader, image_id: str) -> ImageRow | None:
    record = await tx.one(_BY_ID, b_id=image_id)
    return None if record is None else _row(record)


async def shown(tx: Reader, caller: Viewer) -> list[ImageRow]:
    return [_row(record) for record in await tx.all(_SHOWN, **viewer(caller))]


async def with_status(tx: Reader, status: ImageStatus) -> list[ImageRow]:
    return [_row(record) for record in await tx.all(_WITH[status])]


async def layer_lists(tx: Reader) -> list[str]:
    """JSON of the layers of each version that is there, was removed but is perhaps in use, or is
    half made: its recipe may go on with them."""
    return [record.layers for record in await tx.all(_LAYERS)]


async def makings(tx: Reader, owner_id: str) -> list[str]:
    """Of all recipes of an owner that were built, or begun."""
    return [record.making for record in await tx.all(_MAKINGS, b_owner=owner_id)]


async def of_digest(tx: Reader, digest: str) -> list[ImageRow]:
    """Whoever's, in any status."""
    return [_row(record) for record in await tx.all(_OF_DIGEST, b_digest=digest)]


async def advance(tx: Transaction, row: ImageRow, then: ImageRow) -> bool:
    """A step of a recipe is done; False if another was faster."""
    values = {name: getattr(then, name) for name in ("making", "layers", "size_bytes", "build")}
    return await tx.execute(_ADVANCE, b_id=row.id, b_build=row.build, **values) > 0


async def add(tx: Transaction, row: ImageRow) -> None:
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    await tx.execute(_ADD, **values)
    await _tell(tx, row, row.status, row.created_at, "")


async def set_build(tx: Transaction, image_id: str, session: str, name: str) -> None:
    await tx.execute(_SET_BUILD, b_id=image_id, build=session, build_name=name)


async def move(
    tx: Transaction, row: ImageRow, target: ImageStatus, now: int, **values: Any
) -> bool:
    """The only way to another status; False if another was faster or the life forbids it."""
    changed = await tx.execute(
        _MOVE[target], b_id=row.id, status=target.value, status_since=now, **values
    )
    if changed:
        await _tell(tx, row, target.value, now, str(values.get("reason", "")))
    return changed > 0


async def refreshed(tx: Reader) -> list[ImageRow]:
    """Ready images that are kept up to date."""
    return [_row(record) for record in await tx.all(_REFRESHED)]


async def set_refresh(tx: Transaction, image_id: str, **values: int) -> bool:
    """``refresh_us`` or ``refreshed_at`` of a ready image."""
    return await tx.execute(_SET_REFRESH, b_id=image_id, **values) > 0


async def delete(tx: Transaction, image_id: str) -> bool:
    """Forget a removed image."""
    return await tx.execute(_DELETE, b_id=image_id) > 0


async def _tell(tx: Transaction, row: ImageRow, status: str, now: int, reason: str) -> None:
    payload = {"name": row.name, "status": status, "build": row.build_name, "reason": reason}
    await add_event(
        tx,
        at=now,
        kind="image.moved",
        subject=row.id,
        owner_id=row.owner_id,
        project_id=row.project_id,
        payload=payload,
    )
