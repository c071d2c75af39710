"""``madang image pull|push|import|export|tag|inspect|versions|rollback|follow|outdated|prune``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from typing import Final

import click

from madang.cli.config import load
from madang.cli.context import connect, json_option, print_json, print_table
from madang.cli.imagebuild import attend, watch
from madang.cli.options import parse_labels, read_policy
from madang.cli.phases import show_end
from madang.cli.printable import printable
from madang.cli.terminal import Notes
from madang.client import images
from madang.client.requests import new_key
from madang.client.sync import Client
from madang.wire.errors import BuildFailed, InvalidRequest
from madang.wire.image import Image, ImageStatus, ImportRequest, PullRequest, PushRequest
from madang.wire.reference import parse
from madang.wire.session import Result, Session, SizeRequest
from madang.wire.size import format_bytes, format_duration, parse_bytes, parse_duration

_username = click.option("--username", metavar="NAME", help="Log in to the registry so.")
_password = click.option(
    "--password-stdin", is_flag=True, help="Read the password from our stdin, not the terminal."
)
_platform = click.option("--platform", default="", metavar="OS/ARCH", help="Like linux/arm64.")
_labels = click.option("--label", "labels", multiple=True, metavar="K=V", help="Label; repeat.")
_policy = click.option("--policy", metavar="FILE", help="Sandbox policy of all its sessions.")
_disk = click.option("--disk", metavar="SIZE", help="Disk while it is made, like 40g.")
_detach = click.option("-d", "--detach", is_flag=True, help="Print the session's name and leave.")


@click.command()
@click.argument("reference")
@click.argument("name", required=False)
@_platform
@click.option("--follow", metavar="TIME", help="Look so often whether the tag moved, like 1d.")
@_username
@_password
@_labels
@_policy
@_disk
@_detach
def pull(
    reference: str,
    name: str | None,
    platform: str,
    follow: str | None,
    username: str | None,
    password_stdin: bool,
    labels: tuple[str, ...],
    policy: str | None,
    disk: str | None,
    detach: bool,
) -> int:
    """Make an image of what a registry has.

    \b
    madang image pull python:3.12-slim
    madang image pull registry.example.org/team/tool:v2 tool --follow 1d
    """
    login = _login(username, password_stdin)
    if login and detach:
        raise InvalidRequest("a login goes through this command; leave --detach out.")
    request = PullRequest(
        name=name or _name_of(reference),
        reference=reference,
        platform=platform,
        refresh_s=None if follow is None else parse_duration(follow, field="--follow"),
        login=bool(login),
        labels=parse_labels(labels),
        policy="" if policy is None else read_policy(policy),
        size=_size(disk),
    )
    with _client() as (client, notes):
        session = client.call(images.pull(request, new_key()))
        if detach:
            print(session.name)
            return 0
        return watch(client, notes, session, request.name, say=login)


@click.command("import")
@click.argument("source")
@click.argument("name")
@click.option("--from", "reference", default="", metavar="TAG", help="Which image of several.")
@_platform
@_labels
@_policy
@_disk
def import_image(
    source: str,
    name: str,
    reference: str,
    platform: str,
    labels: tuple[str, ...],
    policy: str | None,
    disk: str | None,
) -> int:
    """Make an image of an OCI or Docker archive, an OCI layout, or a root file system's tar.

    SOURCE is a file, a folder (OCI layout), or - for our stdin.

    \b
    docker save tool | madang image import - tool
    """
    request = ImportRequest(
        name=name,
        reference=reference,
        platform=platform,
        labels=parse_labels(labels),
        policy="" if policy is None else read_policy(policy),
        size=_size(disk),
    )
    with _as_stdin(source), _client() as (client, notes):
        session = client.call(images.take_in(request, new_key()))
        return watch(client, notes, session, name, stdin=True)


@click.command()
@click.argument("name")
@click.argument("reference")
@_username
@_password
def push(name: str, reference: str, username: str | None, password_stdin: bool) -> int:
    """Copy an image into a registry."""
    login = _login(username, password_stdin)
    request = PushRequest(reference=reference, login=bool(login))
    with _client() as (client, notes):
        session = client.call(images.push(name, request, new_key()))
        code, _ = _to_end(client, notes, session, f"push of {name}", say=login)
        return code


@click.command()
@click.argument("name")
@click.argument("file")
def export(name: str, file: str) -> int:
    """Write an image as an OCI archive; the same bytes from the same image.

    \b
    madang image export tool tool.tar
    """
    folder = os.path.dirname(os.path.abspath(file))
    with _client() as (client, notes):
        session = client.call(images.export(name, new_key()))
        code, ended = _to_end(client, notes, session, f"export of {name}")
        if ended is None:
            return code
        with tempfile.TemporaryDirectory(prefix=".madang-", dir=folder) as part:
            client.get(ended.id, "/outputs/image.tar", part)
            os.replace(os.path.join(part, "image.tar"), file)
    notes.line("done", f"{file}: {format_bytes(os.path.getsize(file))}")
    return 0


@click.command()
@click.argument("name")
@click.argument("target")
def tag(name: str, target: str) -> None:
    """Give an image a further name: TARGET is NAME's content as it is now.

    \b
    madang image tag tool@1f0c2ab94c3e tool-stable
    """
    with connect() as client:
        found = client.call(images.tag(name, target))
    print(f"{found.name}@{found.digest[:12]}")


@click.command()
@click.argument("name")
def inspect(name: str) -> None:
    """Print all that is known of an image, as JSON."""
    with connect() as client:
        print_json(client.get_image(name))


@click.command()
@click.argument("name")
@json_option
def versions(name: str, as_json: bool) -> None:
    """List the versions of an image: the one in force first, then those kept."""
    with connect() as client:
        found = client.call(images.versions(name))
    if as_json:
        print_json(found)
        return
    rows = [
        (
            f"{image.name}@{image.digest[:12]}",
            "in force" if image.status is ImageStatus.READY else "kept",
            format_bytes(image.size_bytes),
            str(image.used_by),
            image.source.digest[:19] or ", ".join(image.requirements),
        )
        for image in found
    ]
    print_table(("VERSION", "STATE", "SIZE", "SESSIONS", "FROM"), rows)


@click.command()
@click.argument("name")
def rollback(name: str) -> None:
    """Go back to an older version: NAME, or NAME@DIGEST for a certain one.

    New sessions get it, running ones stay as they are. The image is no longer followed.
    """
    plain, _, digest = name.partition("@")
    with connect() as client:
        found = client.call(images.rollback(plain, digest))
    print(f"{found.name}@{found.digest[:12]}")


@click.command()
@click.argument("name")
@click.option("--every", metavar="TIME", help="Like 1d.")
@click.option("--never", is_flag=True, help="No longer.")
def follow(name: str, every: str | None, never: bool) -> None:
    """Make an image anew by schedule; new sessions get what came of it."""
    if (every is None) is not never:
        raise InvalidRequest("say --every TIME or --never.")
    with connect() as client:
        refresh_s = 0.0 if every is None else parse_duration(every, field="--every")
        found = client.call(images.follow(name, refresh_s))
    print(f"{name}: {f'every {format_duration(found.refresh_s)}' if found.refresh_s else 'never'}")


@click.command()
@json_option
def outdated(as_json: bool) -> int:
    """List pulled images whose tag stands for something newer in its registry."""
    with _client(quiet=True) as (client, notes):
        code, ended = _to_end(client, notes, client.call(images.check(new_key())), "look")
        if ended is None:
            return code
        told = json.loads(client.read_file(ended.id, "/outputs/check.json"))
        pulled = [image for image in client.list_images() if image.source.reference in told]
    rows = [_state(image, told[image.source.reference]) for image in pulled]
    if as_json:
        print_json(rows)
    else:
        heads = ("NAME", "STATE", "REFERENCE", "HERE", "THERE")
        print_table(heads, [tuple(map(printable, row.values())) for row in rows])
    return 0


def _state(image: Image, found: dict[str, str]) -> dict[str, str]:
    here, there = image.source.digest, found.get("digest", "")
    state = "current" if here == there else "outdated"
    return {
        "name": image.name,
        "state": state if there else "unknown",
        "reference": image.source.reference,
        "here": here[:19],
        "there": there[:19] or found.get("error", "")[:120],
    }


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and stop.")
@json_option
def prune(dry_run: bool, as_json: bool) -> None:
    """Remove older versions and failed builds that no session runs from."""
    with connect() as client:
        gone = client.call(images.prune(dry_run=dry_run))
    if as_json:
        print_json(gone)
        return
    for each in gone:
        print(f"{each.name}@{each.digest[:12]}" if each.digest else f"{each.name} (failed)")


MOVES: Final = (
    *(pull, import_image, push, export, tag, inspect),
    *(versions, rollback, follow, outdated, prune),
)


@contextlib.contextmanager
def _client(*, quiet: bool = False) -> Iterator[tuple[Client, Notes]]:
    config = load()
    with connect(config) as client:
        yield client, Notes(plain=config.plain, quiet=quiet)


def _to_end(
    client: Client, notes: Notes, session: Session, what: str, *, say: bytes = b""
) -> tuple[int, Session | None]:
    """The session once it ended well, or our exit code. Raises BuildFailed."""
    ended = attend(client, notes, session, what, say=say)
    if isinstance(ended, int):
        return ended, None
    if ended.result is not Result.SUCCESS:
        show_end(notes, ended)
        raise BuildFailed(f"{what} failed; madang logs {session.name} has its log.")
    return 0, ended


def _name_of(reference: str) -> str:
    """A local name where none was given: the repository's last part, and the tag unless usual."""
    try:
        found = parse(reference)
    except ValueError as exc:
        raise InvalidRequest(f"reference: {exc}.") from exc
    last = found.name.rpartition("/")[2]
    tag = "" if found.tag in {"", "latest"} else f"-{found.tag.lower()}"
    return f"{last}{tag}"[:40]


def _size(disk: str | None) -> SizeRequest:
    return SizeRequest(disk_bytes=None if disk is None else parse_bytes(disk, field="--disk"))


def _login(username: str | None, password_stdin: bool) -> bytes:
    """A line for the build's stdin; empty without a login."""
    if username is None:
        if password_stdin:
            raise InvalidRequest("--password-stdin goes with --username.")
        return b""
    if password_stdin:
        password = sys.stdin.readline().rstrip("\n")
    else:
        password = click.prompt("Password", hide_input=True, err=True)
    return json.dumps({"username": username, "password": password}).encode() + b"\n"


@contextlib.contextmanager
def _as_stdin(source: str) -> Iterator[None]:
    """Make *source* what our descriptor 0 reads, as the follower feeds it."""
    if source == "-":
        yield
    elif os.path.isdir(source):
        reader, writer = os.pipe()
        os.dup2(reader, 0)
        os.close(reader)
        thread = threading.Thread(target=_pack, args=(source, writer), daemon=True)
        thread.start()
        yield
    else:
        try:
            file = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise InvalidRequest(f"{source} can't be read ({exc.strerror}).") from exc
        os.dup2(file, 0)
        os.close(file)
        yield


def _pack(folder: str, writer: int) -> None:
    """An OCI layout as one archive; one that breaks off is noticed by its digests."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return info if info.isreg() or info.isdir() else None

    with (
        contextlib.suppress(OSError),
        open(writer, "wb") as target,
        tarfile.open(fileobj=target, mode="w|") as archive,
    ):
        for name in sorted(os.listdir(folder)):
            archive.add(os.path.join(folder, name), arcname=name, filter=plain)
