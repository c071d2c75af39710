"""Jupyter's model of files: the first part of a path names a session, the rest lies in its /work.

The root lists sessions; nothing can be kept there.
"""

from __future__ import annotations

import base64
import binascii
import mimetypes
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from madang.kit.codec import from_json, to_json
from madang.manager.jupyter.rules.messages import utc
from madang.wire.errors import InvalidRequest, PathInvalid
from madang.wire.kernel import WORK_DIR
from madang.wire.link import FileEntry

NOTEBOOK: Final = ".ipynb"
MAX_PATH: Final = 4096
FORMATS: Final = frozenset({"text", "base64", "json"})
_NEW: Final[dict[str, Any]] = {
    "cells": [],
    "metadata": {},
    "nbformat": 4,
    "nbformat_minor": 5,
}


@dataclass(frozen=True, slots=True)
class Place:
    """A path, taken apart."""

    session: str
    """Empty: the root."""
    inside: str
    """Below its /work, without a slash at either end; empty: /work itself."""

    @property
    def path(self) -> str:
        return "/".join(filter(None, [self.session, self.inside]))

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def absolute(self) -> str:
        """As the session sees it."""
        return posixpath.join(WORK_DIR, self.inside).rstrip("/")

    def below(self, name: str) -> Place:
        if not self.session:
            return Place(name, "")
        return Place(self.session, "/".join(filter(None, [self.inside, name])))


def place_of(path: str) -> Place:
    """Raises PathInvalid for what leads out of the session's folder."""
    parts = [part for part in path.split("/") if part not in {"", "."}]
    if ".." in parts or "\0" in path or len(path) > MAX_PATH:
        raise PathInvalid(f"{path[:80]!r} is no path of a file.")
    return Place(parts[0] if parts else "", "/".join(parts[1:]))


def model(place: Place, entry: FileEntry, *, kind: str = "") -> dict[str, Any]:
    """Without content. *kind* is what the client says that it is."""
    kind = "directory" if entry.kind == "dir" else kind or kind_of(place.name)
    at = utc(entry.modified_at)
    size = None if kind == "directory" else entry.size_bytes
    return {
        "name": place.name,
        "path": place.path,
        "type": kind,
        "format": None,
        "mimetype": None,
        "content": None,
        "size": size,
        "writable": True,
        "created": at,
        "last_modified": at,
    }


def kind_of(name: str) -> str:
    return "notebook" if name.endswith(NOTEBOOK) else "file"


def folder(place: Place, entry: FileEntry, entries: Iterable[FileEntry]) -> dict[str, Any]:
    """A folder with what lies in it; links and files alone, no devices or pipes."""
    content = [model(place.below(e.path), e) for e in entries if e.kind in {"dir", "file", "link"}]
    return model(place, entry) | {"content": content, "format": "json"}


def filled(found: dict[str, Any], data: bytes, wanted: str | None) -> dict[str, Any]:
    """*found* with its content in the format *wanted*, or as fits. Raises InvalidRequest."""
    if found["type"] == "notebook" and wanted in {None, "json"}:
        return found | {"format": "json", "content": from_json(dict[str, Any], data)}
    mime = mimetypes.guess_type(found["name"])[0]
    if wanted != "base64":
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as exc:
            if wanted == "text":
                raise InvalidRequest(f"{found['path']} is not UTF-8 text.") from exc
        else:
            return found | {"format": "text", "content": text, "mimetype": mime or "text/plain"}
    told = {"format": "base64", "mimetype": mime or "application/octet-stream"}
    return found | told | {"content": base64.b64encode(data).decode()}


def data_of(body: dict[str, Any]) -> bytes:
    """The bytes that a client saves. Raises InvalidRequest."""
    content, form = body.get("content"), body.get("format")
    if "chunk" in body:
        raise InvalidRequest("files are taken in one piece here; send no chunks.")
    if body.get("type") == "notebook":
        if not isinstance(content, dict):
            raise InvalidRequest("content: a notebook is an object.", field="content")
        return to_json(content) + b"\n"
    if not isinstance(content, str) or form not in {"text", "base64"}:
        raise InvalidRequest("a file needs its content as text or base64, and says its format.")
    if form == "text":
        return content.encode("utf-8", "surrogateescape")
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError) as exc:
        raise InvalidRequest("content: this is no base64.", field="content") from exc


def new_content(kind: str) -> bytes:
    """Of a file that a frontend asks for without a name."""
    return to_json(_NEW) + b"\n" if kind == "notebook" else b""


def free_name(stem: str, suffix: str, taken: Iterable[str]) -> str:
    """``Untitled.ipynb``, ``Untitled1.ipynb``, …"""
    names, number = set(taken), 0
    while (name := f"{stem}{number or ''}{suffix}") in names:
        number += 1
    return name
