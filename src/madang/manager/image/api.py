"""REST of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from madang.manager.http.endpoint import Call, endpoint
from madang.manager.image.service import Commits, ImageService, Recipes, Transfers, Versions
from madang.wire.image import (
    BuildRequest,
    CommitRequest,
    FollowRequest,
    Image,
    ImportRequest,
    Pruned,
    PullRequest,
    PushRequest,
    RecipeLock,
    RecipeRequest,
    RollbackRequest,
    TagRequest,
)
from madang.wire.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveQuery:
    force: bool = False
    """Also while sessions run from it: they go on, the name is free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneQuery:
    dry_run: bool = False
    """Only say what would be removed."""


class ImageApi:
    def __init__(self, service: ImageService, versions: Versions, transfers: Transfers) -> None:
        self._service: Final = service
        self._versions: Final = versions
        self._transfers: Final = transfers

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

    @endpoint("GET", "/v1/images/{name}/versions", returns=tuple[Image, ...])
    async def list_versions(self, call: Call[Any, Any]) -> tuple[Image, ...]:
        """What is kept of a name: the version in force, then the older ones."""
        return await self._versions.list(call.caller, call.path("name"))

    @endpoint(
        "POST",
        "/v1/images/pull",
        scope="images",
        body=PullRequest,
        returns=Session,
        status=202,
        headers=("Idempotency-Key",),
    )
    async def pull_image(self, call: Call[Any, PullRequest]) -> Session:
        """Make an image of what a registry has; the answer is the session that does it."""
        key = call.header("Idempotency-Key")
        return await self._transfers.pull(call.caller, call.body, key=key)

    @endpoint(
        "POST",
        "/v1/images/import",
        scope="images",
        body=ImportRequest,
        returns=Session,
        status=202,
        headers=("Idempotency-Key",),
    )
    async def import_image(self, call: Call[Any, ImportRequest]) -> Session:
        """Make an image of an archive; the answer is the session whose stdin takes it."""
        key = call.header("Idempotency-Key")
        return await self._transfers.take_in(call.caller, call.body, key=key)

    @endpoint(
        "POST",
        "/v1/images/check",
        scope="images",
        returns=Session,
        status=202,
        headers=("Idempotency-Key",),
    )
    async def check_images(self, call: Call[Any, Any]) -> Session:
        """Look what the tags of pulled images stand for now.

        The session leaves ``check.json`` in its outputs: reference → digest, or an error.
        """
        return await self._transfers.check(call.caller, key=call.header("Idempotency-Key"))

    @endpoint("POST", "/v1/images/prune", scope="images", query=PruneQuery,
              returns=tuple[Pruned, ...])  # fmt: skip
    async def prune_images(self, call: Call[PruneQuery, Any]) -> tuple[Pruned, ...]:
        """Remove older versions and failed builds that no session runs from."""
        return await self._versions.prune(call.caller, dry_run=call.query.dry_run)

    @endpoint(
        "POST",
        "/v1/images/{name}/push",
        scope="images",
        body=PushRequest,
        returns=Session,
        status=202,
        headers=("Idempotency-Key",),
    )
    async def push_image(self, call: Call[Any, PushRequest]) -> Session:
        """Copy an image into a registry; the answer is the session that does it."""
        key = call.header("Idempotency-Key")
        return await self._transfers.push(call.caller, call.path("name"), call.body, key=key)

    @endpoint(
        "POST",
        "/v1/images/{name}/export",
        scope="images",
        returns=Session,
        status=202,
        headers=("Idempotency-Key",),
    )
    async def export_image(self, call: Call[Any, Any]) -> Session:
        """Write an OCI archive; the session that does it leaves ``image.tar`` in its outputs."""
        key = call.header("Idempotency-Key")
        return await self._transfers.export(call.caller, call.path("name"), key=key)

    @endpoint("POST", "/v1/images/{name}/tag", scope="images", body=TagRequest, returns=Image)
    async def tag_image(self, call: Call[Any, TagRequest]) -> Image:
        """Give the content a further name."""
        return await self._versions.tag(call.caller, call.path("name"), call.body.target)

    @endpoint(
        "POST", "/v1/images/{name}/rollback", scope="images", body=RollbackRequest, returns=Image
    )
    async def roll_back_image(self, call: Call[Any, RollbackRequest]) -> Image:
        """Make an older version the one that new sessions get; the name is no longer followed."""
        return await self._versions.rollback(call.caller, call.path("name"), call.body.digest)

    @endpoint("POST", "/v1/images/{name}/follow", scope="images", body=FollowRequest, returns=Image)
    async def follow_image(self, call: Call[Any, FollowRequest]) -> Image:
        """Make the image anew by schedule, or no longer."""
        return await self._versions.follow(call.caller, call.path("name"), call.body.refresh_s)


class RecipeApi:
    """Images that are made step after step, or of sessions."""

    def __init__(self, recipes: Recipes, commits: Commits) -> None:
        self._recipes: Final = recipes
        self._commits: Final = commits

    @endpoint(
        "POST",
        "/v1/images/recipes",
        scope="images",
        body=RecipeRequest,
        returns=Image,
        status=202,
        headers=("Idempotency-Key",),
    )
    async def build_recipe(self, call: Call[Any, RecipeRequest]) -> Image:
        """Make an image by a recipe; its ``build`` is the session of the step under way."""
        key = call.header("Idempotency-Key")
        return await self._recipes.build(call.caller, call.body, key=key)

    @endpoint("GET", "/v1/images/{name}/lock", returns=RecipeLock)
    async def get_lock(self, call: Call[Any, Any]) -> RecipeLock:
        """What the steps of a recipe's image took, to get the same again."""
        return await self._recipes.lock(call.caller, call.path("name"))

    @endpoint(
        "POST", "/v1/sessions/{ref}/commit", scope="images", body=CommitRequest, returns=Image
    )
    async def commit_session(self, call: Call[Any, CommitRequest]) -> Image:
        """Save what a session changed in its root as an image; it may have ended."""
        return await self._commits.commit(call.caller, call.path("ref"), call.body)
