"""Image builds on a node: what surrounds a build session, before it starts and after it ended.

Inside the session ``agent.buildscript`` resolves and installs; here its way to the package index is
opened, and what it leaves in its outputs is taken over. Nothing it says is trusted beyond its
owner's own images: archives are checked by ``LayerStore``, and «this requirement is that layer» is
remembered for builds of the same owner only.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
import logging
import os
import re
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Final, Protocol

from madang.agent import tools
from madang.agent.files import read_file
from madang.agent.layers import LayerStore, Staged, byte_compile, remove_tree
from madang.agent.proxy import Proxy, ProxySettings
from madang.agent.registry import Registry
from madang.agent.runtime.contract import Runtime
from madang.agent.staging import stage
from madang.kit import codec
from madang.kit.clock import Clock
from madang.wire.errors import (
    BuildFailed,
    InvalidRequest,
    LauncherUnavailable,
    PlatformError,
    RuntimeFailed,
)
from madang.wire.image import BUILD_MANIFEST, BuildManifest, ImageKind, Layer
from madang.wire.kernel import OUTPUT_DIR, PROXY_PORT, TOOLS_DIR, KernelId, KernelSpec
from madang.wire.session import Ended, Reason, RootMode

log = logging.getLogger(__name__)

PROXY_SOCKET: Final = "proxy.sock"
KEYS: Final = "keys.json"
MAX_LAYERS: Final = 400
"""More make file look-ups slow (a failed one passes through all)."""
MAX_TEXT: Final = 4 * 1024 * 1024
NOT_TAKEN: Final = 74
"""Exit code of a build whose layers could not be taken over."""
_PYTHON: Final = re.compile(r"3\.[0-9]{1,2}")
_CERTIFICATES: Final = ("SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS", "CURL_CA_BUNDLE", "PIP_CERT")
"""Variables of programs that look for authorities to trust."""
_KEY: Final = re.compile(r"[0-9a-f]{64}")

Reader = Callable[[KernelId, str], AsyncGenerator[bytes, None]]
"""The bytes of one file of a kernel, by its absolute path in the session."""


def session_files(runtime: Runtime) -> Reader:
    """Reads through the runtime's file workers, with the session's own rights."""

    async def read(kernel: KernelId, path: str) -> AsyncGenerator[bytes, None]:
        async with aclosing(read_file(await runtime.files(kernel), path)) as items:
            async for item in items:
                if isinstance(item, bytes):
                    yield item

    return read


class BuildHook(Protocol):
    """What the agent calls around kernels with ``spec.build``, and to clean the layers."""

    async def open(self) -> None:
        """Put our tools in place, sweep what a crash left. Before any other call."""
        ...

    def environment(self) -> Mapping[str, str]:
        """For programs of a build that finds no interpreter of ours to ask for its orders."""
        ...

    async def before_start(self, kernel: KernelId, spec: KernelSpec) -> None:
        """Between ``runtime.prepare`` and ``runtime.start``; opens the registry proxy.

        Also for each build kernel that still runs after a restart of the agent. Doing it again
        changes nothing.
        """
        ...

    async def after_end(self, kernel: KernelId, spec: KernelSpec, ended: Ended) -> Ended:
        """Before the end is reported: close the proxy and take the layers over.

        Returns the end to report: a build whose layers can't be stored has failed, in words. After
        a crash it may come again for the same kernel.
        """
        ...

    async def collect(self, keep_layers: Iterable[str]) -> None:
        """Delete layers not named; the caller adds those of the kernels that it has."""
        ...

    async def close(self) -> None:
        """Close all proxies; sessions go on."""
        ...


class Builds:
    """The BuildHook of a node."""

    @classmethod
    def on(cls, runtime: Runtime, state_dir: str, registry: Registry, clock: Clock) -> Builds:
        """With the places and files of *runtime*."""
        return cls(
            state_dir=state_dir,
            service_dir=lambda kernel: os.path.join(runtime.kernel_dir(kernel), "service"),
            read=session_files(runtime),
            registry=registry,
            clock=clock,
        )

    def __init__(
        self,
        *,
        state_dir: str,
        service_dir: Callable[[KernelId], str],
        read: Reader,
        registry: Registry,
        clock: Clock,
    ) -> None:
        self._tools: Final = os.path.join(state_dir, "tools")
        self._store: Final = LayerStore(os.path.join(state_dir, "layers"), clock)
        self._service_dir: Final = service_dir
        self._read: Final = read
        self._registry: Final = registry
        self._proxies: Final[dict[KernelId, Proxy]] = {}
        self._told: Final[dict[KernelId, frozenset[str]]] = {}
        """Layers that a build counts on, until it has ended."""
        self._learning: Final = asyncio.Lock()

    async def open(self) -> None:
        await asyncio.to_thread(self._store.open)
        certificates = self._registry.certificates
        try:
            await asyncio.to_thread(tools.install, self._tools, certificates)
        except OSError as exc:  # a full disk, no uv: all but builds works
            log.warning("build tools not installed", extra={"error": str(exc)})

    async def close(self) -> None:
        for kernel in list(self._proxies):
            await self._close_proxy(kernel)

    def environment(self) -> Mapping[str, str]:
        found = {name: value.reveal() for name, value in self._registry.environment.items()}
        proxy = f"http://127.0.0.1:{PROXY_PORT}"
        found |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), proxy)
        if self._registry.certificates:
            found |= dict.fromkeys(_CERTIFICATES, f"{TOOLS_DIR}/{tools.CERTIFICATES}")
        return found

    def layers(self) -> tuple[str, ...]:
        """Digests of all layers on the node, as ``Hello.layers`` tells them."""
        return self._store.list()

    async def before_start(self, kernel: KernelId, spec: KernelSpec) -> None:
        if kernel in self._proxies:
            return
        known = await asyncio.to_thread(self._store.known, spec.owner)
        self._told[kernel] = frozenset(layer.digest for layer in known.values())
        offers = spec.image.offers
        registry = self._registry
        proxy = Proxy(
            os.path.join(self._service_dir(kernel), PROXY_SOCKET),
            self._orders(known, offers),
            ProxySettings(hosts=registry.hosts, upstream=registry.upstream),
            layers={digest: self._store.path(digest) for digest in offers},
        )
        try:
            await proxy.open()
        except OSError as exc:
            raise RuntimeFailed(f"the build's registry proxy can't be opened: {exc}") from exc
        self._proxies[kernel] = proxy

    def _orders(self, known: dict[str, Layer], offers: tuple[str, ...]) -> bytes:
        """What the build script asks for first; never on disk, for its passwords."""
        registry = self._registry
        orders = {
            "environment": {name: value.reveal() for name, value in registry.environment.items()},
            "secrets": [secret.reveal() for secret in registry.secrets],
            "certificates": registry.certificates,
            "layers": codec.to_builtins(known),
            "offers": list(offers),
            "registries": {place.host: place.told() for place in registry.places},
        }
        return json.dumps(orders).encode()

    async def after_end(self, kernel: KernelId, spec: KernelSpec, ended: Ended) -> Ended:
        await self._close_proxy(kernel)
        if spec.root is not RootMode.READ_ONLY:  # The manager asks for what it changed.
            self._told.pop(kernel, None)
            return ended
        if ended.reason is not Reason.EXIT or ended.exit_code != 0:
            self._told.pop(kernel, None)
            return ended
        try:
            await self._take_over(kernel, spec)
        except LauncherUnavailable:
            raise  # the agent tries again
        except (PlatformError, OSError) as exc:
            text = _in_words(exc)
            log.warning("build not taken over", extra={"kernel": str(kernel), "error": text})
            return dataclasses.replace(
                ended, exit_code=NOT_TAKEN, text=f"The build's layers can't be kept: {text}"
            )
        self._told.pop(kernel, None)
        return ended

    async def collect(self, keep_layers: Iterable[str]) -> None:
        keep = frozenset(keep_layers).union(*self._told.values())
        gone = await asyncio.to_thread(self._store.collect, keep)
        if gone:
            log.info("layers removed", extra={"count": len(gone)})

    async def _close_proxy(self, kernel: KernelId) -> None:
        proxy = self._proxies.pop(kernel, None)
        if proxy is not None:
            await proxy.close()

    async def _take_over(self, kernel: KernelId, spec: KernelSpec) -> None:
        """Bring all layers of a build into the store; all of them, or none."""
        manifest = codec.from_json(BuildManifest, await self._text(kernel, BUILD_MANIFEST))
        if manifest.kind is ImageKind.HOST:
            return  # it was for something else: a push, an export
        _check(manifest)
        keys = codec.from_json(dict[str, str], await self._text(kernel, KEYS))
        store = self._store
        store.touch(layer.digest for layer in manifest.layers)
        staged: list[Staged] = []
        left = spec.size.disk_bytes
        try:
            for layer in manifest.layers:
                if not store.has(layer.digest):
                    one = await self._stage(kernel, layer.digest, left, manifest.kind)
                    staged.append(one)
                    left -= one.size_bytes
                    if manifest.kind is ImageKind.LAYERS:
                        await byte_compile(one.path, manifest.python)
            await asyncio.to_thread(store.commit, tuple(staged))
        finally:
            for path in (one.path for one in staged if os.path.lexists(one.path)):
                await asyncio.to_thread(remove_tree, path)
        layers = {layer.digest: layer for layer in manifest.layers}
        learned = {k: layers[d] for k, d in keys.items() if _KEY.fullmatch(k) and d in layers}
        async with self._learning:
            await asyncio.to_thread(store.learn, spec.owner, learned)

    async def _text(self, kernel: KernelId, name: str) -> bytes:
        """A small file of the outputs."""
        data = bytearray()
        async with aclosing(self._read(kernel, f"{OUTPUT_DIR}/{name}")) as chunks:
            async for chunk in chunks:
                data += chunk
                if len(data) > MAX_TEXT:
                    raise BuildFailed(f"{name} is larger than {MAX_TEXT} bytes")
        return bytes(data)

    async def _stage(
        self, kernel: KernelId, digest: str, limit_bytes: int, kind: ImageKind
    ) -> Staged:
        """Unpack one archive."""
        store = self._store
        unpack = (
            partial(store.stage_root, limit_bytes=limit_bytes, digest=digest)
            if kind is ImageKind.ROOT
            else partial(store.stage, digest, limit_bytes=limit_bytes)
        )
        return await stage(self._read(kernel, f"{OUTPUT_DIR}/layers/{digest}.tar"), unpack)


def _check(manifest: BuildManifest) -> None:
    if manifest.kind not in {ImageKind.LAYERS, ImageKind.ROOT}:
        raise BuildFailed(f"no build makes an image of kind {manifest.kind}")
    good = manifest.kind is ImageKind.ROOT or _PYTHON.fullmatch(manifest.python)
    if not good or not 0 < len(manifest.layers) <= MAX_LAYERS:
        text = f"{len(manifest.layers)} layers for Python {manifest.python[:20]!r}"
        raise BuildFailed(f"{text} are no image; it can have {MAX_LAYERS} of them")
    for layer in manifest.layers:
        if max(len(layer.name), len(layer.version)) > 200 or layer.size_bytes < 0:
            raise BuildFailed("the build's manifest is damaged")


def _in_words(exc: PlatformError | OSError) -> str:
    if isinstance(exc, InvalidRequest):
        return f"its manifest is damaged ({exc.text})"
    if isinstance(exc, PlatformError):
        return exc.text
    if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
        return "the disk under the state folder is full; free space, then build again"
    return str(exc)
