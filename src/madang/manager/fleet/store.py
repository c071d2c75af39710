"""All SQL of the fleet slice."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final

import sqlalchemy as sa

from madang.kit.codec import to_json
from madang.manager.db import Reader, Transaction
from madang.manager.db.events import add_event
from madang.manager.fleet.tables import SLOTS, forgotten, groups, nodes
from madang.manager.fleet.types import GroupRow, NodeRow, Slots
from madang.wire.kernel import Hello, KernelId

_NODE: Final = sa.select(nodes).where(nodes.c.name == sa.bindparam("b_name"))
_NODES: Final = sa.select(nodes).order_by(nodes.c.name)
_ADD: Final = sa.insert(nodes)
_HELLO: Final = sa.update(nodes).where(nodes.c.name == sa.bindparam("b_name"))
_BUMP: Final = (
    sa.update(nodes)
    .where(nodes.c.name == sa.bindparam("b_name"))
    .values(revision=nodes.c.revision + 1)
    .returning(nodes.c.revision)
)


def _amount(slot: str) -> sa.BindParameter[int]:
    return sa.bindparam(f"b_{slot}", type_=sa.BigInteger)


_ALLOCATE: Final = (
    sa.update(nodes)
    .where(
        nodes.c.name == sa.bindparam("b_name"),
        *(nodes.c[f"used_{s}"] + _amount(s) <= nodes.c[f"cap_{s}"] for s in SLOTS),
    )
    .values(
        revision=nodes.c.revision + 1,
        **{f"used_{s}": nodes.c[f"used_{s}"] + _amount(s) for s in SLOTS},
    )
    .returning(nodes.c.revision)
)


def _larger(one: sa.ColumnElement[int], other: sa.ColumnElement[int]) -> sa.Case[int]:
    return sa.case((one > other, one), else_=other)


_RELEASE: Final = (
    sa.update(nodes)
    .where(nodes.c.name == sa.bindparam("b_name"))
    .values(
        revision=nodes.c.revision + 1,
        **{f"used_{s}": nodes.c[f"used_{s}"] - _amount(s) for s in SLOTS},
        **{
            f"cap_{s}": _larger(nodes.c[f"has_{s}"], nodes.c[f"used_{s}"] - _amount(s))
            for s in SLOTS
        },
    )
    .returning(nodes.c.revision)
)  # fmt: skip
_SEEN: Final = sa.update(nodes).where(nodes.c.name == sa.bindparam("b_name"))
_FORGET: Final = sa.insert(forgotten)
_FORGOTTEN: Final = sa.select(forgotten.c.session_id, forgotten.c.attempt).where(
    forgotten.c.node == sa.bindparam("b_node"), forgotten.c.revision > sa.bindparam("b_since")
)
_IS_FORGOTTEN: Final = sa.select(forgotten.c.revision).where(
    forgotten.c.node == sa.bindparam("b_node"),
    forgotten.c.session_id == sa.bindparam("b_session"),
    forgotten.c.attempt == sa.bindparam("b_attempt"),
)
_PRUNE: Final = sa.delete(forgotten).where(
    forgotten.c.node == sa.bindparam("b_node"), forgotten.c.revision <= sa.bindparam("b_upto")
)


_GROUPS: Final = sa.select(groups).order_by(groups.c.name)
_ADD_GROUP: Final = sa.insert(groups)
_EDIT_GROUP: Final = (
    sa.update(groups)
    .where(groups.c.name == sa.bindparam("b_name"), groups.c.version == sa.bindparam("b_version"))
    .values(version=groups.c.version + 1)
)
_REMOVE_GROUP: Final = sa.delete(groups).where(
    groups.c.name == sa.bindparam("b_name"), groups.c.version == sa.bindparam("b_version")
)
_JOIN: Final = sa.update(nodes).where(nodes.c.name == sa.bindparam("b_name"))


def _node(row: Any) -> NodeRow:
    def slots(prefix: str) -> Slots:
        return Slots(*(getattr(row, f"{prefix}_{slot}") for slot in SLOTS))

    return NodeRow(
        name=row.name,
        incarnation=row.incarnation,
        revision=row.revision,
        facts=row.facts,
        seen_at=row.seen_at,
        capacity=slots("cap"),
        used=slots("used"),
        group=row.group_name,
    )


async def list_nodes(tx: Reader) -> list[NodeRow]:
    return [_node(row) for row in await tx.all(_NODES)]


async def find_node(tx: Reader, name: str) -> NodeRow | None:
    row = await tx.one(_NODE, b_name=name)
    return None if row is None else _node(row)


async def greet(tx: Transaction, hello: Hello, at: int) -> bool:
    """Take over what the agent says; False if a newer agent of that name was here before."""
    known = await find_node(tx, hello.node)
    if known is not None and known.incarnation > hello.incarnation:
        return False
    has = asdict(Slots.of(hello.capacity))
    used = dict.fromkeys(SLOTS, 0) if known is None else asdict(known.used)
    columns: dict[str, Any] = {
        "incarnation": hello.incarnation,
        "facts": to_json(hello.facts).decode(),
        "seen_at": at,
    }
    if group := hello.facts.get("group"):
        columns["group_name"] = group
    for slot in SLOTS:
        columns[f"has_{slot}"] = has[slot]
        columns[f"cap_{slot}"] = max(has[slot], used[slot])
    if known is not None:
        columns["revision"] = max(known.revision, hello.revision + 1)
        await tx.execute(_HELLO, b_name=hello.node, **columns)
        return True
    columns |= {f"used_{slot}": 0 for slot in SLOTS}
    await tx.execute(_ADD, name=hello.node, revision=hello.revision + 1, created_at=at, **columns)
    return True


def _amounts(slots: Slots) -> dict[str, int]:
    return {f"b_{slot}": getattr(slots, slot) for slot in SLOTS}


async def allocate(tx: Transaction, node: str, slots: Slots) -> int | None:
    """Take *slots* and return the node's next revision; None if they don't fit."""
    row = await tx.one(_ALLOCATE, b_name=node, **_amounts(slots))
    return None if row is None else int(row.revision)


async def release(tx: Transaction, node: str, slots: Slots) -> int:
    """Give *slots* back; returns the node's next revision."""
    row = await tx.one(_RELEASE, b_name=node, **_amounts(slots))
    assert row is not None, f"node {node} has no row"
    return int(row.revision)


async def next_revision(tx: Transaction, node: str) -> int:
    row = await tx.one(_BUMP, b_name=node)
    assert row is not None, f"node {node} has no row"
    return int(row.revision)


async def mark_seen(tx: Transaction, node: str, at: int) -> None:
    await tx.execute(_SEEN, b_name=node, seen_at=at)


async def forget(tx: Transaction, node: str, kernel: KernelId, at: int) -> None:
    """Have *node* remove *kernel* with all its files; idempotent."""
    where = {"b_node": node, "b_session": kernel.session, "b_attempt": kernel.attempt}
    if await tx.one(_IS_FORGOTTEN, **where) is not None:
        return
    revision = await next_revision(tx, node)
    await tx.execute(
        _FORGET,
        node=node,
        session_id=kernel.session,
        attempt=kernel.attempt,
        revision=revision,
        at=at,
    )
    await add_event(
        tx,
        at=at,
        kind="kernel.forgotten",
        subject=str(kernel),
        owner_id="",
        payload={"node": node},
    )


async def list_forgotten(tx: Reader, node: str, since: int) -> list[KernelId]:
    rows = await tx.all(_FORGOTTEN, b_node=node, b_since=since)
    return [KernelId(row.session_id, row.attempt) for row in rows]


async def prune_forgotten(tx: Transaction, node: str, upto: int) -> None:
    """All up to this revision was told."""
    await tx.execute(_PRUNE, b_node=node, b_upto=upto)


async def list_groups(tx: Reader) -> list[GroupRow]:
    return [
        GroupRow(name=row.name, text=row.text, version=row.version) for row in await tx.all(_GROUPS)
    ]


async def add_group(tx: Transaction, name: str, text: str, at: int) -> None:
    await tx.execute(_ADD_GROUP, name=name, text=text, version=1, created_at=at, changed_at=at)


async def edit_group(tx: Transaction, name: str, text: str, *, version: int, at: int) -> bool:
    """False: it is at another version."""
    where = {"b_name": name, "b_version": version}
    return await tx.execute(_EDIT_GROUP, **where, text=text, changed_at=at) > 0


async def remove_group(tx: Transaction, name: str, version: int) -> bool:
    return await tx.execute(_REMOVE_GROUP, b_name=name, b_version=version) > 0


async def join_group(tx: Transaction, node: str, group: str) -> None:
    await tx.execute(_JOIN, b_name=node, group_name=group)
