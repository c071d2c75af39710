"""Cursors of lists that go by name or by id."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class PageQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    limit: Annotated[int, Meta(ge=1, le=500)] = 100
    cursor: Annotated[str, Meta(max_length=80)] | None = None
