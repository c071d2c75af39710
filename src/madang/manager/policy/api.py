"""REST of sandbox policies."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from madang.manager.http import Call, Reply, endpoint
from madang.manager.http.versions import version_of
from madang.manager.policy.service import PolicyService
from madang.wire.errors import Forbidden
from madang.wire.policies import (
    Policy,
    PolicyChange,
    PolicyDraft,
    PolicyQuestion,
    PolicyReview,
    PolicyVerdict,
    ReplayQuestion,
    ReplayVerdict,
)

BODY_LIMIT: Final = 512 * 1024
"""A text of 64 KiB takes up to six times as much as JSON escapes."""
REPLAY_LIMIT: Final = 8 * 1024 * 1024


class LogQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    target: Annotated[str, Meta(max_length=300)] | None = None
    """``site``, ``node:NAME`` or ``session:ID``; all, if not given."""
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100


class PolicyApi:
    def __init__(self, service: PolicyService) -> None:
        self._service: Final = service

    @endpoint("GET", "/v1/policies", returns=tuple[Policy, ...])
    async def list_policies(self, call: Call[Any, Any]) -> tuple[Policy, ...]:
        """What is in force everywhere, the base first."""
        return await self._service.list()

    @endpoint("GET", "/v1/policies/{target}", returns=Policy)
    async def get_policy(self, call: Call[Any, Any]) -> Reply:
        """The policy in force for base, site or node:NAME; version 0: there is none."""
        return _tagged(await self._service.get(call.path("target")))

    @endpoint("GET", "/v1/policies/{target}/history", returns=tuple[Policy, ...])
    async def get_policy_history(self, call: Call[Any, Any]) -> tuple[Policy, ...]:
        """Its versions, newest first: text, who, when, why."""
        return await self._service.history(call.path("target"))

    @endpoint(
        "PUT",
        "/v1/policies/{target}",
        body=PolicyDraft,
        returns=Policy,
        body_limit=BODY_LIMIT,
        headers=("If-Match",),
    )
    async def apply_policy(self, call: Call[Any, PolicyDraft]) -> Reply:
        """Put a policy in force, its live rules in running sessions too; administrators only."""
        draft = replace(call.body, target=call.path("target"))
        version = version_of(call.header("If-Match"))
        return _tagged(await self._service.apply(call.caller, draft, version))

    @endpoint("GET", "/v1/policy-log", query=LogQuery, returns=tuple[PolicyChange, ...])
    async def get_policy_log(self, call: Call[LogQuery, Any]) -> tuple[PolicyChange, ...]:
        """Every change of a policy, newest first: who, when, why, the text and the one before."""
        if not call.caller.sees_all:
            raise Forbidden("only an administrator reads the log of all policies.")
        return await self._service.log(call.query.target, call.query.limit)

    @endpoint(
        "POST",
        "/v1/policies/review",
        scope="read",
        body=PolicyDraft,
        returns=PolicyReview,
        body_limit=BODY_LIMIT,
    )
    async def review_policy(self, call: Call[Any, PolicyDraft]) -> PolicyReview:
        """Check a text and say what it would change; nothing is stored."""
        return await self._service.review(call.body)

    @endpoint(
        "POST",
        "/v1/policies/test",
        scope="read",
        body=PolicyQuestion,
        returns=PolicyVerdict,
        body_limit=BODY_LIMIT,
    )
    async def test_policy(self, call: Call[Any, PolicyQuestion]) -> PolicyVerdict:
        """Say what would happen to a system call, by which rule; nothing is stored."""
        return await self._service.ask(call.body)

    @endpoint(
        "POST",
        "/v1/policies/replay",
        scope="read",
        body=ReplayQuestion,
        returns=tuple[ReplayVerdict, ...],
        body_limit=REPLAY_LIMIT,
    )
    async def replay_policy(self, call: Call[Any, ReplayQuestion]) -> tuple[ReplayVerdict, ...]:
        """Say what a draft's live rules would say to what sessions did; nothing is stored."""
        return await self._service.replay(call.body)


def _tagged(policy: Policy) -> Reply:
    return Reply(policy, {"ETag": f'"{policy.version}"'})
