"""REST of limits and presets."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from madang.manager.http import Call, Reply, endpoint
from madang.manager.http.versions import version_of
from madang.manager.limits.service import LimitTexts, PresetService
from madang.wire.limits import (
    LimitsChoice,
    LimitsDraft,
    LimitsOf,
    LimitsPage,
    LimitsText,
    Preset,
    PresetDraft,
)

BODY_LIMIT: Final = 128 * 1024
"""A text of 16 KiB takes up to six times as much as JSON escapes."""


class ListQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    limit: Annotated[int, Meta(ge=1, le=500)] = 100
    cursor: Annotated[str, Meta(pattern="^[a-z0-9._-]{1,40}$")] | None = None


class LimitApi:
    def __init__(self, texts: LimitTexts) -> None:
        self._texts: Final = texts

    @endpoint("GET", "/v1/limits", query=ListQuery, returns=LimitsPage)
    async def list_limits(self, call: Call[ListQuery, Any]) -> LimitsPage:
        """Limits by name: all, for administrators and monitors; else those that count for you."""
        query = call.query
        items, following = await self._texts.page(
            call.caller, after=query.cursor, limit=query.limit
        )
        return LimitsPage(items=items, next=following)

    @endpoint("GET", "/v1/limits/{name}", returns=LimitsText)
    async def get_limits(self, call: Call[Any, Any]) -> Reply:
        """A text of limits, and whom it is assigned to."""
        return _tagged(await self._texts.get(call.caller, call.path("name")))

    @endpoint("GET", "/v1/limits/{name}/history", returns=tuple[LimitsText, ...])
    async def get_limits_history(self, call: Call[Any, Any]) -> tuple[LimitsText, ...]:
        """Its versions, newest first: text, who, when, why."""
        return await self._texts.history(call.caller, call.path("name"))

    @endpoint(
        "PUT",
        "/v1/limits/{name}",
        body=LimitsDraft,
        returns=LimitsText,
        body_limit=BODY_LIMIT,
        headers=("If-Match",),
    )
    async def apply_limits(self, call: Call[Any, LimitsDraft]) -> Reply:
        """Write limits or change them, everywhere at once; administrators only."""
        version = version_of(call.header("If-Match"))
        name = call.path("name")
        return _tagged(await self._texts.apply(call.caller, name, call.body, version))

    @endpoint("DELETE", "/v1/limits/{name}", status=204, headers=("If-Match",))
    async def remove_limits(self, call: Call[Any, Any]) -> None:
        """Remove limits that nobody has any more; administrators only."""
        version = version_of(call.header("If-Match"))
        await self._texts.remove(call.caller, call.path("name"), version)

    @endpoint("GET", "/v1/limits-of/{target}", returns=LimitsOf)
    async def get_limits_of(self, call: Call[Any, Any]) -> LimitsOf:
        """What counts for me, user:NAME, project:NAME, domain:NAME or token:ID; what is left."""
        return await self._texts.of(call.caller, call.path("target"))

    @endpoint("PUT", "/v1/limits-of/{target}", body=LimitsChoice, returns=LimitsOf)
    async def assign_limits(self, call: Call[Any, LimitsChoice]) -> LimitsOf:
        """Give limits to an account, or to KIND:* for those without; administrators only."""
        return await self._texts.assign(call.caller, call.path("target"), call.body.name)


class PresetApi:
    def __init__(self, presets: PresetService) -> None:
        self._presets: Final = presets

    @endpoint("GET", "/v1/presets", returns=tuple[Preset, ...])
    async def list_presets(self, call: Call[Any, Any]) -> tuple[Preset, ...]:
        """Sizes with a name, for `run --preset`."""
        return await self._presets.list()

    @endpoint("GET", "/v1/presets/{name}", returns=Preset)
    async def get_preset(self, call: Call[Any, Any]) -> Reply:
        """One preset."""
        return _preset(await self._presets.get(call.path("name")))

    @endpoint("PUT", "/v1/presets/{name}", body=PresetDraft, returns=Preset, headers=("If-Match",))
    async def put_preset(self, call: Call[Any, PresetDraft]) -> Reply:
        """Make or replace a preset; administrators only."""
        version = version_of(call.header("If-Match"))
        name = call.path("name")
        return _preset(await self._presets.put(call.caller, name, call.body, version))

    @endpoint("DELETE", "/v1/presets/{name}", status=204, headers=("If-Match",))
    async def remove_preset(self, call: Call[Any, Any]) -> None:
        """Remove a preset; administrators only."""
        version = version_of(call.header("If-Match"))
        await self._presets.remove(call.caller, call.path("name"), version)


def _tagged(limits: LimitsText) -> Reply:
    return Reply(limits, {"ETag": f'"{limits.version}"'})


def _preset(preset: Preset) -> Reply:
    return Reply(preset, {"ETag": f'"{preset.version}"'})
