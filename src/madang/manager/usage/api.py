"""REST of the usage ledger."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from madang.manager.http import Call, endpoint
from madang.manager.usage.service import UsageService
from madang.wire.usage import Bill, Correction, Interval, IntervalPage, Price, UsageReport

Name = Annotated[str, Meta(min_length=1, max_length=200)]
Time = Annotated[float, Meta(ge=0, le=1e11)]


class ReportQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    by: Annotated[str, Meta(pattern="^[a-z]+(,[a-z]+){0,6}$")] = "user"
    """Some of user, project, domain, group, month (UTC), session, node; commas between."""
    since: Time | None = None
    until: Time | None = None
    user: Name | None = None
    project: Name | None = None
    group: Name | None = None
    node: Name | None = None
    session: Name | None = None


class IntervalQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    since: Time | None = None
    until: Time | None = None
    user: Name | None = None
    project: Name | None = None
    group: Name | None = None
    node: Name | None = None
    session: Name | None = None
    corrected: bool = False
    """With rows that others have taken the place of."""
    limit: Annotated[int, Meta(ge=1, le=500)] = 100
    cursor: Annotated[str, Meta(pattern="^[0-9a-z.]{1,80}$")] | None = None


class BillQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    project: Name
    month: Annotated[str, Meta(pattern="^[0-9]{4}-[0-9]{2}$")]


class UsageApi:
    def __init__(self, usage: UsageService) -> None:
        self._usage: Final = usage

    @endpoint("GET", "/v1/usage", query=ReportQuery, returns=UsageReport)
    async def get_usage(self, call: Call[ReportQuery, None]) -> UsageReport:
        """What was allocated, measured and what it costs, summed; what goes on counts until now."""
        query = call.query
        return await self._usage.report(
            call.caller,
            by=tuple(dict.fromkeys(query.by.split(","))),
            since=query.since,
            until=query.until,
            project=query.project,
            user=query.user,
            group=query.group,
            node=query.node,
            session=query.session,
        )

    @endpoint("GET", "/v1/usage/intervals", query=IntervalQuery, returns=IntervalPage)
    async def list_intervals(self, call: Call[IntervalQuery, None]) -> IntervalPage:
        """Rows of the ledger, newest sessions first."""
        query = call.query
        return await self._usage.page(
            call.caller,
            since=query.since,
            until=query.until,
            project=query.project,
            corrected=query.corrected,
            after=query.cursor,
            limit=query.limit,
            user=query.user,
            group=query.group,
            node=query.node,
            session=query.session,
        )

    @endpoint(
        "POST", "/v1/usage/intervals/{id}/correct", body=Correction, returns=Interval, status=201
    )
    async def correct_interval(self, call: Call[None, Correction]) -> Interval:
        """Put another row in the place of one; administrators only."""
        return await self._usage.correct(call.caller, call.path("id"), call.body)

    @endpoint("GET", "/v1/usage/bill", query=BillQuery, returns=Bill)
    async def get_bill(self, call: Call[BillQuery, None]) -> Bill:
        """What a project's use of a month (UTC) costs: the part of it that the caller may see."""
        return await self._usage.bill(call.caller, call.query.project, call.query.month)

    @endpoint("GET", "/v1/usage/prices", returns=tuple[Price, ...])
    async def list_prices(self, call: Call[None, None]) -> tuple[Price, ...]:
        """All prices that were ever set; each counts from its time on."""
        return await self._usage.prices()

    @endpoint("POST", "/v1/usage/prices", body=Price, returns=Price, status=201)
    async def set_price(self, call: Call[None, Price]) -> Price:
        """Set what an hour of a slot costs in a group, from a time on; administrators only."""
        return await self._usage.set_price(call.caller, call.body)
