"""Requests about images from and to elsewhere and their versions, as values for ``client.call``.

What takes long is answered with the session that does it: follow it, or wait for its end.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final, TypeVar
from urllib.parse import quote

from madang.client.calls import Call, query, read_as
from madang.kit.codec import to_json
from madang.wire.image import (
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

T = TypeVar("T")
COMMIT_S: Final = 900.0
"""All that a session changed is read, checked and written."""
_JSON: Final = {"Content-Type": "application/json"}


def pull(request: PullRequest, key: str) -> Call[Session]:
    return _post("/v1/images/pull", Session, request, key)


def take_in(request: ImportRequest, key: str) -> Call[Session]:
    """The session's stdin takes the archive."""
    return _post("/v1/images/import", Session, request, key)


def push(name: str, request: PushRequest, key: str) -> Call[Session]:
    return _post(_path(name, "push"), Session, request, key)


def export(name: str, key: str) -> Call[Session]:
    """The session leaves ``/outputs/image.tar``."""
    return _post(_path(name, "export"), Session, None, key)


def check(key: str) -> Call[Session]:
    """The session leaves ``/outputs/check.json``."""
    return _post("/v1/images/check", Session, None, key)


def build_recipe(request: RecipeRequest, key: str) -> Call[Image]:
    """The image's ``build`` is the session of the step under way, as long as it is BUILDING."""
    return _post("/v1/images/recipes", Image, request, key)


def lock(name: str) -> Call[RecipeLock]:
    """What the steps of a recipe's image took."""
    return Call(method="GET", path=_path(name, "lock"), decode=read_as(RecipeLock))


def commit(session: str, request: CommitRequest) -> Call[Image]:
    """Save what a session changed in its root."""
    call = _post(f"/v1/sessions/{quote(session, safe='')}/commit", Image, request)
    return replace(call, timeout_s=COMMIT_S)


def tag(name: str, target: str) -> Call[Image]:
    return _post(_path(name, "tag"), Image, TagRequest(target=target))


def rollback(name: str, digest: str = "") -> Call[Image]:
    return _post(_path(name, "rollback"), Image, RollbackRequest(digest=digest))


def follow(name: str, refresh_s: float) -> Call[Image]:
    return _post(_path(name, "follow"), Image, FollowRequest(refresh_s=refresh_s))


def prune(*, dry_run: bool = False) -> Call[list[Pruned]]:
    return _post(query("/v1/images/prune", dry_run=dry_run or None), list[Pruned], None)


def versions(name: str) -> Call[list[Image]]:
    return Call(method="GET", path=_path(name, "versions"), decode=read_as(list[Image]))


def _path(name: str, what: str) -> str:
    return f"/v1/images/{quote(name, safe='')}/{what}"


def _post(path: str, kind: type[T], body: Any, key: str = "") -> Call[T]:
    headers = {} if body is None else dict(_JSON)
    if key:
        headers["Idempotency-Key"] = key
    return Call(
        method="POST",
        path=path,
        body=b"" if body is None else to_json(body),
        headers=headers,
        decode=read_as(kind),
        repeatable=bool(key),
    )
