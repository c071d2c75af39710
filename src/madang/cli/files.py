"""``madang put``, ``get`` and ``ls``."""

from __future__ import annotations

import os
import posixpath
import sys
import time
from collections.abc import Sequence

import click

from madang.cli.context import connect, json_option, print_json, print_table
from madang.client.sync import Client
from madang.wire.errors import FileFailed, FileMissing, InvalidRequest
from madang.wire.kernel import WORK_DIR
from madang.wire.link import FileEntry
from madang.wire.paths import display, from_wire
from madang.wire.size import format_bytes


def parse_place(text: str) -> tuple[str, str]:
    """``NAME:PATH`` as name and absolute path; a relative path lies in the working directory.

    A ``/`` at the end stays: it says that a folder is meant.
    """
    name, colon, path = text.partition(":")
    if not colon or not name:
        raise InvalidRequest(f"{text!r} must look like NAME:PATH, for example calm-otter:model.pt.")
    folder = path.endswith("/") or not path
    clean = posixpath.normpath(posixpath.join(WORK_DIR, path))
    return name, clean.rstrip("/") + "/" if folder else clean


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="LOCAL...")
@click.argument("target", metavar="NAME:PATH")
def put(sources: tuple[str, ...], target: str) -> None:
    """Copy local files and folders into a session.

    As cp does it: into PATH if that is a folder (or ends with /), otherwise as PATH.
    """
    name, path = parse_place(target)
    with connect() as client:
        into = path.endswith("/") or len(sources) > 1 or _kind(client, name, path) == "dir"
        if into:
            client.put(name, sources, path.rstrip("/") or "/")
        else:
            client.put(name, sources, posixpath.dirname(path), name=posixpath.basename(path))


@click.command()
@click.argument("source", metavar="NAME:PATH")
@click.argument("local", default=".")
def get(source: str, local: str) -> None:
    """Copy a file or folder out of a session.

    As cp does it: into LOCAL if that is a folder, otherwise as LOCAL.
    """
    name, path = parse_place(source)
    path = path.rstrip("/") or "/"
    with connect() as client:
        if _kind(client, name, path) == "dir":
            last = posixpath.basename(path)
            where = os.path.join(local, last) if os.path.isdir(local) else local
            got = client.get(name, path, where)
        elif os.path.isdir(local):
            got = client.get(name, path, local)
        else:
            _get_as(client, name, path, local)
            return
    for skipped in got.skipped:
        sys.stderr.write(f"note   left out: {skipped}\n")


def _get_as(client: Client, name: str, path: str, local: str) -> None:
    """One file under another name: brought beside it first, so that it is there whole or not."""
    import tempfile

    folder = os.path.dirname(local) or "."
    try:
        with tempfile.TemporaryDirectory(prefix=".madang-", dir=folder) as part:
            client.get(name, path, part)
            (found,) = os.listdir(part)
            os.replace(os.path.join(part, found), local)
    except OSError as exc:
        raise FileFailed(f"{local} can't be written here ({exc.strerror}).") from exc


def _kind(client: Client, name: str, path: str) -> str | None:
    """``dir``, ``file``, or None if there is nothing.

    A listing of a file is the file itself; a folder may hold one of its own name.
    """
    try:
        entries = client.list_files(name, path)
    except FileMissing:
        return None
    last = posixpath.basename(path)
    if [entry.path for entry in entries] != [last]:
        return "dir"
    try:
        client.list_files(name, posixpath.join(path, last))
    except (FileMissing, FileFailed):
        return "file"
    return "dir"


@click.command()
@click.argument("place", metavar="NAME:PATH")
@click.option("-R", "--recursive", is_flag=True, help="All below it.")
@json_option
def ls(place: str, recursive: bool, as_json: bool) -> None:
    """List files of a session."""
    name, path = parse_place(place if ":" in place else place + ":")
    with connect() as client:
        entries = client.list_files(name, path.rstrip("/") or "/", recursive=recursive)
    if as_json:
        print_json(entries)
    else:
        _print(sorted(entries, key=lambda entry: entry.path))


def _print(entries: Sequence[FileEntry]) -> None:
    if not entries:
        return
    rows = [
        (
            f"{entry.mode:04o}",
            format_bytes(entry.size_bytes) if entry.kind == "file" else "-",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.modified_at)),
            _name(entry),
        )
        for entry in entries
    ]
    print_table(("MODE", "SIZE", "CHANGED", "NAME"), rows)


def _name(entry: FileEntry) -> str:
    name = display(from_wire(entry.path))
    if entry.kind == "dir":
        return f"{name}/"
    return f"{name} -> {display(from_wire(entry.target))}" if entry.target else name
