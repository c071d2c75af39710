"""Requests about the audit log and the usage ledger; see ``calls``."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from madang.client.calls import Call, query, read_as
from madang.kit.codec import to_json
from madang.wire.audit import AuditHead, AuditPage
from madang.wire.usage import Bill, Correction, Interval, IntervalPage, Price, UsageReport

_JSON = {"Content-Type": "application/json"}


def audit(**where: object) -> Call[AuditPage]:
    """*where*: actor, action, kind, object, since, until, limit, cursor."""
    return Call(method="GET", path=query("/v1/audit", **where), decode=read_as(AuditPage))


def audit_head() -> Call[AuditHead]:
    return Call(method="GET", path="/v1/audit/head", decode=read_as(AuditHead))


def audit_export() -> Call[bytes]:
    """Lines of ``wire.audit``."""
    return Call(method="GET", path="/v1/audit/export", decode=bytes)


def usage(by: Sequence[str], **where: object) -> Call[UsageReport]:
    """*where*: since, until, user, project, group, node, session."""
    path = query("/v1/usage", by=",".join(by), **where)
    return Call(method="GET", path=path, decode=read_as(UsageReport))


def intervals(**where: object) -> Call[IntervalPage]:
    """*where*: as of ``usage``, and corrected, limit, cursor."""
    path = query("/v1/usage/intervals", **where)
    return Call(method="GET", path=path, decode=read_as(IntervalPage))


def correct(interval_id: str, correction: Correction) -> Call[Interval]:
    return Call(
        method="POST",
        path=f"/v1/usage/intervals/{quote(interval_id, safe='')}/correct",
        body=to_json(correction),
        headers=_JSON,
        decode=read_as(Interval),
        repeatable=False,
    )


def bill(project: str, month: str) -> Call[Bill]:
    path = query("/v1/usage/bill", project=project, month=month)
    return Call(method="GET", path=path, decode=read_as(Bill))


def prices() -> Call[list[Price]]:
    return Call(method="GET", path="/v1/usage/prices", decode=read_as(list[Price]))


def set_price(price: Price) -> Call[Price]:
    return Call(
        method="POST",
        path="/v1/usage/prices",
        body=to_json(price),
        headers=_JSON,
        decode=read_as(Price),
        repeatable=False,
    )
