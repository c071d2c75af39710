"""Make layers of ours of an image that comes from elsewhere; what pull and import share."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from madang.agent.buildscript import compression, layertar, manifest
from madang.agent.buildscript.layertar import damaged
from madang.agent.buildscript.main import Layer, Places, say, shown_size

FORMAT = "1"
"""Grows when the same foreign layer would be laid out otherwise."""
PARALLEL = 3
BUFFER = 1024 * 1024


@dataclass(frozen=True)
class Foreign:
    """One layer of somebody else's image."""

    diff: str
    """``sha256:HEX`` of its plain tar; empty: nobody said, as of a root file system's tar."""
    open: Callable[[], AbstractContextManager[BinaryIO]]
    """Its bytes as they came, digest checked; seekable."""
    name: str = ""

    def key(self) -> str:
        return hashlib.sha256(f"root {FORMAT} {self.diff}".encode()).hexdigest()


@dataclass(frozen=True)
class Source:
    """An image as it was found."""

    layers: list[Foreign]
    """The lowest first."""
    config: dict[str, Any]
    """As ``wire.image.ImageConfig``."""
    source: dict[str, Any]
    """As ``wire.image.ImageSource``."""


@dataclass(frozen=True)
class Taken:
    layer: Layer
    alone: bool = False
    """It hides all below it."""
    empty: bool = False


class Intake:
    """Turns a Source into the outputs of a build."""

    def __init__(self, places: Places, known: dict[str, Any], *, parallel: int = PARALLEL) -> None:
        self._places = places
        self._known = known
        self._parallel = parallel
        self._folder = os.path.join(places.outputs, "layers")
        self._started = time.monotonic()

    def run(self, source: Source) -> None:
        """All layers, then the manifest that makes them an image."""
        os.makedirs(self._folder, exist_ok=True)
        with concurrent.futures.ThreadPoolExecutor(self._parallel) as pool:
            work = [pool.submit(self.take, each) for each in source.layers]
            try:
                taken = [future.result() for future in work]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        layers = topmost_first(taken)
        if not layers:
            raise damaged("the image has no files at all")
        keys = {
            foreign.key(): one.layer.digest
            for foreign, one in zip(source.layers, taken, strict=True)
            if foreign.diff and not one.alone and one.layer in layers
        }
        self._finish(layers, keys, source)

    def take(self, foreign: Foreign) -> Taken:
        """One layer: at hand, or made."""
        known = self._known.get(foreign.key()) if foreign.diff else None
        if known is not None:
            layer = Layer(**known)
            say(f"layer    {layer.version}  {shown_size(layer.size_bytes)}  at hand")
            return Taken(layer)
        started = time.monotonic()
        part = os.path.join(self._folder, f".{id(foreign)}.part")
        raw = os.path.join(self._places.scratch, f"{id(foreign)}.tar")
        limit = layertar.free_bytes(self._places.outputs)
        with open(raw, "w+b", buffering=BUFFER) as tar:
            with foreign.open() as file:
                sha256 = hashlib.sha256()
                layertar.unpack_plain(_hashed(compression.plain(file), sha256), tar, limit)
            diff = f"sha256:{sha256.hexdigest()}"
            if foreign.diff not in {"", diff}:
                raise damaged(f"layer {foreign.diff[:19]} has other content than it says")
            tar.seek(0)
            with open(part, "wb", buffering=BUFFER) as target:
                digest, size, found = layertar.convert(tar, target, limit)
        os.unlink(raw)
        os.rename(part, os.path.join(self._folder, f"{digest}.tar"))
        layer = Layer(digest, foreign.name or "layer", diff[:19], size)
        took = f"{time.monotonic() - started:.1f} s"
        say(f"layer    {layer.version}  {shown_size(size)}  {took}")
        if found.left_out:
            say(f"         {found.left_out} devices, pipes or marks left out")
        empty = len(found.entries) == 1 and not found.gone
        return Taken(layer, alone=b"" in found.opaque, empty=empty)

    def _finish(self, layers: list[Layer], keys: dict[str, str], source: Source) -> None:
        made = {
            "python": "",
            "layers": [asdict(layer) for layer in layers],
            "kind": "root",
            "config": source.config,
            "source": source.source,
        }
        for name, value in (("keys.json", keys), ("image.json", made)):
            with open(os.path.join(self._places.outputs, name), "w", encoding="utf-8") as file:
                json.dump(value, file)
        size = shown_size(sum(layer.size_bytes for layer in layers))
        took = time.monotonic() - self._started
        say(f"built    {len(layers)} layers  {size}  {took:.1f} s")
        say("store    checking")  # what the agent does next


def topmost_first(taken: list[Taken]) -> list[Layer]:
    """As a root is mounted: without what hides itself again.

    Of a layer that comes twice the upper one decides all that the lower one does.
    """
    found: dict[str, Layer] = {}
    for one in reversed(taken):
        if not one.empty:
            found.setdefault(one.layer.digest, one.layer)
        if one.alone:
            break
    return list(found.values())


def _hashed(chunks: Any, sha256: Any) -> Any:
    for chunk in chunks:
        sha256.update(chunk)
        yield chunk


def made_nothing(places: Places) -> None:
    """The manifest of a build that was for something else than an image."""
    with open(os.path.join(places.outputs, "image.json"), "w", encoding="utf-8") as file:
        json.dump({"python": "", "layers": [], "kind": "host"}, file)


def names_of(config: dict[str, Any], count: int) -> list[str]:
    """What made each layer, as the history says, in a few printable words."""
    history = config.get("history")
    steps = (
        [each for each in history if isinstance(each, dict)] if isinstance(history, list) else []
    )
    made = [str(each.get("created_by", "")) for each in steps if not each.get("empty_layer")]
    texts = ["".join(c if c.isprintable() else " " for c in text)[:120] for text in made]
    return texts if len(texts) == count else [""] * count


def scratch(places: Places) -> None:
    """An empty folder for what is in the making."""
    shutil.rmtree(places.scratch, ignore_errors=True)
    os.makedirs(os.path.join(places.scratch, "blobs"))


def found_image(
    config: dict[str, Any], diffs: list[str], platform: str, what: str
) -> dict[str, Any]:
    """ImageConfig of a configuration whose layers are *diffs*."""
    assert len(diffs) == len(manifest.diff_ids(config, len(diffs), what))
    return manifest.settings(config, manifest.check_platform(config, platform, what))
