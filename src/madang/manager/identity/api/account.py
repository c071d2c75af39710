"""The caller's own account: tokens, password, second factor."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta

from madang.manager.http import Call, Reply, endpoint, origin
from madang.manager.identity.api.login import NO_STORE, principal
from madang.manager.identity.api.pages import PageQuery
from madang.manager.identity.service import Accounts, Tokens
from madang.wire.people import (
    NewToken,
    PasswordChange,
    PasswordProof,
    RecoveryCodes,
    TokenDraft,
    TokenPage,
    TotpDraft,
    TotpProof,
)


class TokenQuery(PageQuery, kw_only=True, forbid_unknown_fields=True):
    user: Annotated[str, Meta(max_length=80)] | None = None
    """Whose; the caller's own, if not given."""


class AccountApi:
    def __init__(self, tokens: Tokens, accounts: Accounts) -> None:
        self._tokens: Final = tokens
        self._accounts: Final = accounts

    @endpoint("GET", "/v1/tokens", query=TokenQuery, returns=TokenPage)
    async def list_tokens(self, call: Call[TokenQuery, None]) -> TokenPage:
        """Valid tokens, key pairs and logins, newest first; never their secrets."""
        query = call.query
        found = await self._tokens.list(
            principal(call), query.user, after=query.cursor, limit=query.limit
        )
        following = found[-1].id if len(found) == query.limit else None
        return TokenPage(items=tuple(found), next=following)

    @endpoint("POST", "/v1/tokens", scope="account", body=TokenDraft, returns=NewToken, status=201)
    async def add_token(self, call: Call[None, TokenDraft]) -> Reply:
        """Make a token or a key pair, with no more than the present token may do."""
        made = await self._tokens.add(principal(call), call.body, origin.current().source)
        return Reply(made, NO_STORE)

    @endpoint("DELETE", "/v1/tokens/{token}", scope="account", status=204)
    async def revoke_token(self, call: Call[None, None]) -> None:
        """Revoke a token, a key pair or a login, at once."""
        await self._tokens.revoke(principal(call), call.path("token"))

    @endpoint("PUT", "/v1/account/password", scope="account", body=PasswordChange, status=204)
    async def change_password(self, call: Call[None, PasswordChange]) -> None:
        """Set another password; all other logins end."""
        await self._accounts.change_password(principal(call), call.body)

    @endpoint("POST", "/v1/account/totp", scope="account", body=PasswordProof, returns=TotpDraft)
    async def start_totp(self, call: Call[None, PasswordProof]) -> Reply:
        """Make a second factor; it is in force once its first code has come."""
        return Reply(await self._accounts.start_totp(principal(call), call.body.password), NO_STORE)

    @endpoint("PUT", "/v1/account/totp", scope="account", body=TotpProof, returns=RecoveryCodes)
    async def confirm_totp(self, call: Call[None, TotpProof]) -> Reply:
        """Put the second factor in force; the answer has the recovery codes."""
        return Reply(await self._accounts.confirm_totp(principal(call), call.body.otp), NO_STORE)

    @endpoint("POST", "/v1/account/totp/off", scope="account", body=PasswordProof, status=204)
    async def stop_totp(self, call: Call[None, PasswordProof]) -> None:
        """Do without the second factor again."""
        await self._accounts.stop_totp(principal(call), call.body.password)
