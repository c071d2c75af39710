"""``build.pyz pull REFERENCE [--platform P] [--login]`` and ``check``: images from registries."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from madang.agent.buildscript import intake, manifest, network
from madang.agent.buildscript.intake import Foreign, Intake, Source
from madang.agent.buildscript.layertar import damaged
from madang.agent.buildscript.main import BuildError, Exit, Places, say
from madang.agent.buildscript.manifest import Blob
from madang.agent.buildscript.registry import Registry, read_login
from madang.wire.reference import parse


def orders(places: Places) -> dict[str, Any]:
    """What the agent tells this build."""
    try:
        return network.fetch_orders(places.proxy)
    except (OSError, ValueError) as exc:
        text = f"the agent's registry proxy does not answer: {exc}"
        raise BuildError(Exit.NETWORK, text) from exc


def pull(places: Places, reference: str, platform: str, *, login: bool) -> None:
    told = orders(places)
    who = read_login() if login else None
    intake.scratch(places)
    registry = Registry(places.proxy, parse(reference), told, who)
    source = find(places, registry, platform or manifest.this_platform())
    Intake(places, told.get("layers", {})).run(source)


def find(places: Places, registry: Registry, platform: str) -> Source:
    """The image of a platform; its layers are fetched when they are opened."""
    what = str(registry.reference)
    data, top = registry.manifest(registry.reference.wanted)
    found = manifest.parse(data, what)
    say(f"pull     {what}  {top[:19]}  {platform}")
    for _ in range(2):
        if not manifest.is_index(found):
            break
        inner = manifest.choose(found, platform, what)
        found = manifest.parse(registry.manifest(inner.digest)[0], what)
    image = manifest.image(found, what)
    if image.config.size > manifest.MAX_BYTES:
        raise damaged(f"the configuration of {what} has more than {manifest.MAX_BYTES} bytes")
    with _blob(places, registry, image.config) as file:
        config = manifest.parse(file.read(), f"the configuration of {what}")
    diffs = manifest.diff_ids(config, len(image.layers), what)
    architecture = manifest.check_platform(config, platform, what)
    names = intake.names_of(config, len(diffs))
    layers = [
        Foreign(diff, lambda blob=blob: _blob(places, registry, blob), name)  # type: ignore[misc]
        for diff, blob, name in zip(diffs, image.layers, names, strict=True)
    ]
    source = {"reference": what, "digest": top, "platform": platform}
    return Source(layers, manifest.settings(config, architecture), source)


@contextmanager
def _blob(places: Places, registry: Registry, blob: Blob) -> Iterator[BinaryIO]:
    """Downloaded and checked; gone afterwards."""
    path = os.path.join(places.scratch, "blobs", blob.digest.replace(":", "-"))
    registry.blob(blob.digest, blob.size, path)
    with open(path, "rb") as file:
        os.unlink(path)
        yield file


def check(places: Places, references: list[str]) -> None:
    """What each tag stands for now, into ``check.json``: reference → digest, or an error's text."""
    told = orders(places)
    found: dict[str, dict[str, str]] = {}
    for text in references:
        reference = parse(text)
        try:
            registry = Registry(places.proxy, reference, told, None)
            found[text] = {"digest": registry.manifest(reference.wanted)[1]}
            say(f"found    {text}  {found[text]['digest'][:19]}")
        except BuildError as exc:
            found[text] = {"error": str(exc)}
            say(f"failed   {text}: {exc}")
    with open(os.path.join(places.outputs, "check.json"), "w", encoding="utf-8") as file:
        json.dump(found, file)
    intake.made_nothing(places)
