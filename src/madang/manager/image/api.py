"""REST of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from madang.manager.http.endpoint import Call, endpoint
from madang.manager.image.service import ImageService
from madang.wire.image import BuildRequest, Image
from madang.wire.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveQuery:
    force: bool = False
    """Also while sessions run from it: they go on, the name is free."""


class ImageApi:
    def __init__(self, service: ImageService) -> None:
        self._service: Final = service

    @endpoint("GET", "/v1/images", returns=tuple[Image, ...])
    async def list_images(self, call: Call[Any, Any]) -> tuple[Image, ...]:
        """All images, the built-in one first."""
        return await self._service.list(call.caller)

    @endpoint("GET", "/v1/images/{name}", returns=Image)
    async def get_image(self, call: Call[Any, Any]) -> Image:
        """One image with its layers."""
        return await self._service.get(call.caller, call.path("name"))

    @endpoint(
        "POST",
        "/v1/images",
        scope="images",
        body=BuildRequest,
        returns=Session,
        status=202,
        headers=("Idempotency-Key",),
    )
    async def build_image(self, call: Call[Any, BuildRequest]) -> Session:
        """Build an image; the answer is the session that builds it."""
        key = call.header("Idempotency-Key")
        return await self._service.build(call.caller, call.body, key=key)

    @endpoint("DELETE", "/v1/images/{name}", scope="images", query=RemoveQuery, status=204)
    async def remove_image(self, call: Call[RemoveQuery, Any]) -> None:
        """Remove an image."""
        await self._service.remove(call.caller, call.path("name"), force=call.query.force)
