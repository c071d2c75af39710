"""Bringing back what a run left in its outputs folder."""

from __future__ import annotations

import os
from typing import Final

from madang.cli.terminal import Notes, count
from madang.client.sync import Client
from madang.wire.errors import PlatformError
from madang.wire.kernel import OUTPUT_DIR
from madang.wire.session import Session
from madang.wire.size import format_bytes

RUNS: Final = "runs"


def fetch_outputs(client: Client, session: Session, target: str, notes: Notes) -> None:
    """Copy the outputs to *target*, or to ``runs/NAME`` if it is empty. Never fails the run."""
    if session.started_at is None or (session.ended and session.ended.has_outputs is False):
        return
    where = target or os.path.join(RUNS, session.name)
    try:
        if not client.list_files(session.id, OUTPUT_DIR):
            return
        if not target:
            _make_private(RUNS)
        got = client.get(session.id, OUTPUT_DIR, where)
    except (PlatformError, OSError) as exc:
        hint = f"They are kept: madang get {session.name}:{OUTPUT_DIR} DIR"
        why = exc.text if isinstance(exc, PlatformError) else f"{where}: {exc.strerror}."
        notes.error(f"the outputs could not all be brought back: {why} {hint}")
        return
    size = format_bytes(got.size_bytes)
    notes.line("saved", f"{where}/ ({count(got.files, 'file')}, {size})")
    for skipped in got.skipped:
        notes.line("note", f"left out: {skipped}")


def _make_private(folder: str) -> None:
    """A folder that is never sent along, and never committed."""
    os.makedirs(folder, exist_ok=True)
    for name in (".madangignore", ".gitignore"):
        path = os.path.join(folder, name)
        if not os.path.lexists(path):
            with open(path, "w", encoding="ascii") as file:
                file.write("*\n")
