"""A session's own layer of its sandbox policy, and what the whole policy refused it."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from madang.manager.http import Call, Reply, endpoint
from madang.manager.http.versions import version_of
from madang.manager.policy.api import BODY_LIMIT
from madang.manager.session.service import SessionService
from madang.manager.session.service.kernels import KernelService
from madang.manager.session.service.policies import SessionPolicies
from madang.wire.policies import Policy, PolicyDraft
from madang.wire.policy import SESSION, Refusal


class SessionPolicyApi:
    def __init__(
        self, sessions: SessionService, kernels: KernelService, policies: SessionPolicies
    ) -> None:
        self._sessions: Final = sessions
        self._kernels: Final = kernels
        self._policies: Final = policies

    @endpoint("GET", "/v1/sessions/{ref}/refusals", returns=list[Refusal])
    async def list_refusals(self, call: Call[None, None]) -> list[Refusal]:
        """What its sandbox policy refused it while it ran, each with the rule; oldest first."""
        row = await self._sessions.get(call.caller, call.path("ref"))
        return await self._kernels.refusals(row)

    @endpoint("GET", "/v1/sessions/{ref}/policy", returns=Policy)
    async def get_session_policy(self, call: Call[None, None]) -> Reply:
        """The session's own layer; version 0: it has none."""
        return _tagged(await self._policies.get(call.caller, call.path("ref")))

    @endpoint(
        "PUT",
        "/v1/sessions/{ref}/policy",
        scope="sessions",
        body=PolicyDraft,
        returns=Policy,
        body_limit=BODY_LIMIT,
        headers=("If-Match",),
    )
    async def apply_session_policy(self, call: Call[None, PolicyDraft]) -> Reply:
        """Put another own layer in force, live rules at once; with more rules only.

        Administrators may also take rules back.
        """
        draft = replace(call.body, target=SESSION)
        version = version_of(call.header("If-Match"))
        return _tagged(await self._policies.set(call.caller, call.path("ref"), draft, version))


def _tagged(policy: Policy) -> Reply:
    return Reply(policy, {"ETag": f'"{policy.version}"'})
