"""``madang image build FILE.toml``, ``madang image lock`` and ``madang commit``."""

from __future__ import annotations

import hashlib
import json
import os
import time
from typing import Final

import click

from madang import runner
from madang.cli.config import load
from madang.cli.context import connect, json_option, print_json, print_table
from madang.cli.imagebuild import attend
from madang.cli.options import parse_labels, read_policy, read_text
from madang.cli.phases import show_end
from madang.cli.terminal import Notes, count
from madang.client import images
from madang.client.requests import new_key
from madang.client.sync import Client
from madang.kit.codec import from_json, to_builtins
from madang.kit.recipes import parse
from madang.wire.errors import BuildFailed, InvalidRequest
from madang.wire.image import (
    CommitRequest,
    Image,
    ImageStatus,
    RecipeLock,
    RecipeRequest,
)
from madang.wire.session import Result, SizeRequest
from madang.wire.size import format_bytes, parse_bytes

SUFFIX: Final = ".toml"
_OURS: Final = os.path.join(os.path.dirname(runner.__file__), "recipes")
_POLL_S: Final = 0.05
_PATIENCE_S: Final = 120.0
"""For the server to take a step's layer over."""


def build_file(
    path: str,
    *,
    name: str | None,
    locked: bool,
    fresh: bool,
    labels: tuple[str, ...],
    policy: str | None,
    disk: str | None,
    detach: bool,
) -> int:
    """Make the image of a recipe; its steps' output comes as it is made."""
    text = read_text(path)
    size = SizeRequest(disk_bytes=None if disk is None else parse_bytes(disk, field="--disk"))
    request = RecipeRequest(
        name=name or _stem(path),
        recipe=text,
        lock=_read_lock(path, text).steps if locked else (),
        fresh=fresh,
        labels=parse_labels(labels),
        policy="" if policy is None else read_policy(policy),
        size=size,
    )
    config = load()
    notes = Notes(plain=config.plain)
    with connect(config) as client:
        image = client.call(images.build_recipe(request, new_key()))
        if detach:
            print(image.name)
            return 0
        return _watch(client, notes, image)


def _watch(client: Client, notes: Notes, image: Image) -> int:
    """Follow the sessions of its steps, one after the other."""
    seen = None
    while image.status is ImageStatus.BUILDING:
        if image.build is None or image.build == seen:
            image = _next(client, image.name, seen)
            continue
        seen = image.build
        session = client.get_session(seen)
        step = session.labels.get("step", "")
        ended = attend(client, notes, session, f"image {image.name}, step {step}")
        if isinstance(ended, int):
            return ended
        if ended.result is not Result.SUCCESS:
            show_end(notes, ended)
            text = f"image {image.name} was not built: step {step} failed"
            raise BuildFailed(f"{text}; madang logs {session.name} has its log.")
    if image.status is not ImageStatus.READY:
        raise BuildFailed(f"image {image.name} was not built: {image.reason}.")
    layers, size = count(len(image.layers), "layer"), format_bytes(image.size_bytes)
    text = f"image {image.name}: {layers}, {size}. madang run --image {image.name} …"
    notes.line("done", text)
    return 0


def _next(client: Client, name: str, seen: str | None) -> Image:
    """The image once another step is under way, or none is left."""
    give_up = time.monotonic() + _PATIENCE_S
    while True:
        image = client.get_image(name)
        if image.status is not ImageStatus.BUILDING or image.build not in {None, seen}:
            return image
        if time.monotonic() > give_up:
            raise BuildFailed(f"image {name} does not go on though its step {seen} ended.")
        time.sleep(_POLL_S)


@click.command("lock")
@click.argument("recipe", type=click.Path(dir_okay=False))
@click.option("--name", help="The image. Default: the recipe's name.")
def lock(recipe: str, name: str | None) -> None:
    """Write down what a recipe's image took, for `image build --locked`.

    \b
    madang image build tools.toml
    madang image lock tools.toml        # writes tools.lock
    """
    text = read_text(recipe)
    name = name or _stem(recipe)
    with connect() as client:
        found = client.call(images.lock(name))
    if found.recipe != _digest(text):
        raise InvalidRequest(f"image {name} was made by another {recipe}: build it first.")
    target = _lock_path(recipe)
    part = f"{target}.part"
    with open(part, "w", encoding="utf-8") as file:
        json.dump(to_builtins(found), file, indent=1)
        file.write("\n")
    os.replace(part, target)
    print(target)


@click.command()
@click.argument("session")
@click.argument("image")
@click.option("--label", "labels", multiple=True, metavar="K=V", help="Label; may be repeated.")
@click.option("--policy", metavar="FILE", help="Sandbox policy of all sessions from this image.")
@json_option
def commit(
    session: str, image: str, labels: tuple[str, ...], policy: str | None, as_json: bool
) -> None:
    """Save what a session changed in its root as an image.

    The session needs a root of its own: start it with --writable or --root. It may go on, or have
    ended. Its folders /work, /outputs, /home/user and /tmp are not part of the image.

    \b
    madang run -d --name box --image debian --root
    madang exec box -- apt-get install -y jq
    madang commit box tools
    """
    request = CommitRequest(
        name=image,
        labels=parse_labels(labels),
        policy="" if policy is None else read_policy(policy),
    )
    with connect() as client:
        found = client.call(images.commit(session, request))
    if as_json:
        print_json(found)
        return
    top = found.layers[0]
    print(
        f"{found.name}  {format_bytes(top.size_bytes)} on {count(len(found.layers) - 1, 'layer')}"
    )


@click.command("recipes")
def recipes() -> None:
    """List the recipes that come with Madang."""
    rows = [(_stem(path), parse(read_text(path)).description) for path in shipped()]
    print_table(("NAME", "MAKES"), rows)


def shipped() -> list[str]:
    """Paths of our recipes."""
    return sorted(os.path.join(_OURS, n) for n in os.listdir(_OURS) if n.endswith(SUFFIX))


def find(name: str) -> str:
    """The recipe's file: as named, or one of ours. Raises InvalidRequest."""
    if name.endswith(SUFFIX):
        return name
    if (path := os.path.join(_OURS, name + SUFFIX)) in shipped():
        return path
    raise InvalidRequest(
        f"nothing to install in {name!r}: give --pip REQUIREMENT, -r FILE, a recipe as FILE.toml, "
        "or the name of one that `madang image recipes` lists."
    )


def _read_lock(path: str, text: str) -> RecipeLock:
    target = _lock_path(path)
    found = from_json(RecipeLock, read_text(target).encode())
    if found.recipe != _digest(text):
        raise InvalidRequest(f"{target} is of another {path}: build it anew, then lock it again.")
    return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _stem(path: str) -> str:
    return os.path.basename(path).removesuffix(SUFFIX)


def _lock_path(path: str) -> str:
    return f"{path.removesuffix(SUFFIX)}.lock"
