"""Sending the working directory along with a run."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import replace

from madang.cli.config import ClientConfig
from madang.cli.terminal import Notes, count
from madang.client.sync import Client
from madang.wire.session import SessionSpec
from madang.wire.size import format_bytes, format_duration, parse_bytes


class Syncing:
    """*asked*: True and False are the user's word; None sends unless the folder is too wide."""

    def __init__(
        self, config: ClientConfig, notes: Notes, *, asked: bool | None, limit: str
    ) -> None:
        self._config = config
        self._notes = notes
        self._asked = asked
        self._limit_bytes = parse_bytes(limit, field="sync-limit")

    def apply(self, client: Client, spec: SessionSpec, *, again: bool = False) -> SessionSpec:
        """*spec* with the working directory as it is now; *again* trusts no memory of ours."""
        if self._asked is False:
            return spec
        folder = os.getcwd()
        if self._asked is None and (why := _too_wide(folder, self._config.home)):
            text = f"{folder} is {why}, so it is not sent. --sync sends it all the same."
            self._notes.line("sync", text)
            return spec
        return replace(spec, workspace=self._sync(client, folder, again=again))

    def _sync(self, client: Client, folder: str, *, again: bool) -> str | None:
        from madang.client.tree import Limits

        begun = time.monotonic()
        key = hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]
        synced = client.sync_workspace(
            folder,
            limits=Limits(size_bytes=self._limit_bytes),
            cache=os.path.join(self._config.cache_dir, "workspaces", f"{key}.json"),
            again=again,
            progress=self._progress,
        )
        for path in synced.skipped:
            name = os.fsdecode(path).encode("utf-8", "replace").decode()
            self._notes.line("note", f"{name} is neither file, folder nor link: not sent")
        if synced.digest is not None:
            took = format_duration(time.monotonic() - begun)
            text = (
                f"{count(synced.files, 'file')}, {format_bytes(synced.size_bytes)} "
                f"({synced.sent_files} sent) ✓ {took}"
            )
            self._notes.line("sync", text)
        return synced.digest

    def _progress(self, done: int, total: int) -> None:
        self._notes.live("sync", f"{format_bytes(done)} of {format_bytes(total)}")


def _too_wide(folder: str, home: str | None) -> str:
    """Why *folder* is not meant as a project; empty if it may be."""
    if os.path.realpath(folder) == "/":
        return "the root of the file system"
    if home is None:
        return ""
    here, home = os.path.realpath(folder), os.path.realpath(home)
    if here == home:
        return "your home folder"
    return "above your home folder" if home.startswith(here + "/") else ""
