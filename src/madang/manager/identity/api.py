"""Who the caller is."""

from __future__ import annotations

from madang.manager.http import Call, endpoint
from madang.wire.api import WhoAmI


class IdentityApi:
    @endpoint("GET", "/v1/whoami", returns=WhoAmI)
    async def whoami(self, call: Call[None, None]) -> WhoAmI:
        """Who the token belongs to."""
        caller = call.caller
        return WhoAmI(user=caller.user, role=str(caller.role), token=caller.token)
