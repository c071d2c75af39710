"""Build an image: resolve once, install each distribution alone, leave layers in the outputs.

``python3 -I build.pyz pip REQUIREMENT…``; exits 0, or with a code of ``Exit``. Layers that the node
has are named by their *key*, the SHA-256 over everything that decides what is installed.
"""

from __future__ import annotations

import concurrent.futures
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from madang.agent.buildscript import network, tree

FORMAT = "1"
"""Grows when the same distribution would be laid out otherwise."""
PLATFORM = (str(sysconfig.get_config_var("SOABI")), sysconfig.get_platform())
"""Looked up once: ``sysconfig`` gives threads a half-filled table while it fills it."""
PARALLEL = 4


class Exit:
    """How a build can end."""

    RESOLVE = 65
    INSTALL = 66
    NETWORK = 69
    DAMAGED = 68
    """What was taken in is no image, or not what it says."""
    DENIED = 77
    """A registry wants a login, or other rights."""
    DISK = 73
    INTERNAL = 70


NEXT_STEP = {
    Exit.RESOLVE: "Correct the requirements, then start the build again.",
    Exit.INSTALL: "The build log above has the reason; a package that must be compiled may need "
    "tools or headers that the machine lacks.",
    Exit.NETWORK: "No package index can be reached. `madang doctor` on the server checks it; a "
    "private index is set by UV_DEFAULT_INDEX or PIP_INDEX_URL where `madang up` starts.",
    Exit.DISK: "The build session's disk is full: ask for more with --disk.",
}


class BuildError(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Places:
    """Where a build session has what; tests have it elsewhere."""

    tools: str = "/madang/tools"
    proxy: str = "/madang/run/proxy.sock"
    outputs: str = "/outputs"
    scratch: str = "/home/user/build"


@dataclass(frozen=True)
class Pin:
    """One resolved distribution."""

    name: str
    version: str
    text: str
    """Its lines in the lock: the requirement and its hashes."""

    def key(self) -> str:
        return hashlib.sha256("\0".join((FORMAT, *PLATFORM, self.text)).encode()).hexdigest()


@dataclass(frozen=True)
class Layer:
    digest: str
    name: str
    version: str
    size_bytes: int


def parse_lock(lock: str) -> list[Pin]:
    """The pins of a ``uv pip compile --generate-hashes``."""
    pins = []
    for text in filter(None, re.split(r"\n(?=\S)", lock.strip())):
        head = text.split("\\")[0].split(";")[0].strip()
        match = re.match(r"([A-Za-z0-9._-]+)\s*(?:==\s*(\S+)|@\s*(\S+))", head)
        if match is None:
            raise BuildError(Exit.INTERNAL, f"the lock has a line that says no version: {head!r}")
        name = re.sub(r"[-_.]+", "-", match[1]).lower()
        pins.append(Pin(name, match[2] or _version_of(match[3]), text.strip()))
    return sorted(pins, key=lambda pin: pin.name)


def _version_of(url: str) -> str:
    """The version in the file name of a direct URL, or the URL's hash where it says none."""
    parts = urlsplit(url).path.rpartition("/")[2].split("-")
    if len(parts) > 1 and parts[1][:1].isdigit():
        return re.sub(r"\.(tar\.gz|zip|whl)$", "", parts[1])
    return "url-" + hashlib.sha256(url.encode()).hexdigest()[:8]


class Build:
    """One run of the script."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.orders: dict[str, Any] = {}
        self.environment: dict[str, str] = {}
        self.secrets: tuple[str, ...] = ()
        self.python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
        self.version = "{}.{}.{}".format(*sys.version_info[:3])
        self.skeleton = os.path.join(places.scratch, "skeleton")

    def run(self, requirements: list[str]) -> None:
        started = time.monotonic()
        shutil.rmtree(self.places.scratch, ignore_errors=True)
        os.makedirs(os.path.join(self.places.outputs, "layers"), exist_ok=True)
        tree.skeleton(self.skeleton, self.python, self.version)
        self.connect()
        pins = self.resolve(requirements)
        layers = self.layers(pins)
        layers.append(self.base())
        self.finish(pins, layers)
        size = shown_size(sum(layer.size_bytes for layer in layers))
        took = time.monotonic() - started
        say(f"built    {len(layers)} layers  {size}  python {self.version}  {took:.1f} s")
        say("store    checking, byte-compiling")  # what the agent does next

    def connect(self) -> None:
        """Open the way to the package index."""
        try:
            self.orders = network.fetch_orders(self.places.proxy)
        except (OSError, ValueError) as exc:
            text = f"the agent's registry proxy does not answer: {exc}"
            raise BuildError(Exit.NETWORK, text) from exc
        proxy = network.forward(self.places.proxy)
        scratch = self.places.scratch
        self.environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": scratch,
            "LANG": "C.UTF-8",
            "UV_CACHE_DIR": os.path.join(scratch, "cache"),
            "UV_PYTHON": os.path.join(self.skeleton, "bin", "python"),
            "UV_PYTHON_DOWNLOADS": "never",
            "UV_NO_CONFIG": "1",
            "UV_NO_PROGRESS": "1",
            "UV_LINK_MODE": "hardlink",
            "NO_COLOR": "1",
            **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), proxy),
            **dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), proxy),
            **self.orders.get("environment", {}),
        }
        self.secrets = tuple(self.orders.get("secrets", ()))
        if certificates := self.orders.get("certificates"):
            path = os.path.join(scratch, "certificates.pem")
            with open(path, "w", encoding="utf-8") as file:
                file.write(certificates)
            self.environment["SSL_CERT_FILE"] = path

    def uv(self, *arguments: str, text: str = "") -> tuple[int, str, str]:
        """Run uv; its exit code, stdout and stderr, without the index's passwords."""
        done = subprocess.run(
            [os.path.join(self.places.tools, "uv"), *arguments],
            input=text,
            env=self.environment,
            cwd=self.places.scratch,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        error = done.stderr
        for secret in self.secrets:
            error = error.replace(secret, "****")
        return done.returncode, done.stdout, error.strip()

    def resolve(self, requirements: list[str]) -> list[Pin]:
        """All versions, decided together, with the hashes of their files."""
        started = time.monotonic()
        say(f"resolve  {', '.join(requirements)}")
        code, lock, error = self.uv(
            *("pip", "compile", "-", "--generate-hashes", "--no-header", "--no-annotate"),
            *("--no-emit-index-url", "--no-emit-find-links", "--quiet"),
            text="\n".join(requirements) + "\n",
        )
        if code:
            raise self.failure(error, Exit.RESOLVE)
        pins = parse_lock(lock)
        say(f"resolved {len(pins)} packages  {time.monotonic() - started:.1f} s")
        return pins

    def failure(self, error: str, code: int) -> BuildError:
        """uv's own words, and what kind of failure they tell of."""
        lowered = error.lower()
        if "no space left" in lowered or "disk quota" in lowered:
            code = Exit.DISK
        elif any(word in lowered for word in ("failed to fetch", "dns error", "error sending req")):
            code = Exit.NETWORK
        return BuildError(code, error)

    def layers(self, pins: list[Pin]) -> list[Layer]:
        """A layer for each pin, in the pins' order."""
        with concurrent.futures.ThreadPoolExecutor(min(PARALLEL, max(1, len(pins)))) as pool:
            work = [pool.submit(self.layer, pin) for pin in pins]
            try:
                return [future.result() for future in work]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def layer(self, pin: Pin) -> Layer:
        known = self.orders.get("layers", {}).get(pin.key())
        if known is not None:
            say(f"layer    {pin.name} {pin.version}  {shown_size(known['size_bytes'])}  at hand")
            return Layer(**known)
        started = time.monotonic()
        folder = os.path.join(self.places.scratch, "layers", pin.name)
        os.makedirs(folder)
        lock, root = os.path.join(folder, "lock.txt"), os.path.join(folder, "tree")
        cache = self.cache(pin.name, folder)
        with open(lock, "w", encoding="utf-8") as file:
            file.write(pin.text + "\n")
        code, _, error = self.uv(
            *("pip", "install", "--no-deps", "--require-hashes", "--quiet"),
            *("--prefix", root, "-r", lock, "--cache-dir", cache),
        )
        if code:
            raise self.failure(f"{pin.name} {pin.version}: {error}", Exit.INSTALL)
        shutil.rmtree(os.path.join(folder, "cache"), ignore_errors=True)  # the tree has links
        tree.clean(root, os.path.join(self.skeleton, "bin", "python"))
        layer = self.pack(pin.name, pin.version, root)
        took = time.monotonic() - started
        say(f"layer    {pin.name} {pin.version}  {shown_size(layer.size_bytes)}  {took:.1f} s")
        return layer

    def cache(self, name: str, folder: str) -> str:
        """Where uv keeps a package while it is installed: in its own folder, to be deleted early.

        What was built from source while resolving lies in the common cache: it is not built twice.
        """
        common = self.environment["UV_CACHE_DIR"]
        built = (f"{common}/sdists-v*/{depth}/{name}" for depth in ("*", "*/*"))
        return common if any(map(glob.glob, built)) else os.path.join(folder, "cache")

    def base(self) -> Layer:
        return self.pack("python", self.version, self.skeleton)

    def pack(self, name: str, version: str, root: str) -> Layer:
        """Move a tree into the outputs."""
        folder = os.path.join(self.places.outputs, "layers")
        part = os.path.join(folder, f".{name}.part")
        digest, size = tree.pack(root, part, consume=True)
        os.rename(part, os.path.join(folder, f"{digest}.tar"))
        shutil.rmtree(root)
        return Layer(digest, name, version, size)

    def finish(self, pins: list[Pin], layers: list[Layer]) -> None:
        """Say what was built; the manifest comes last."""
        keys = {p.key(): layer.digest for p, layer in zip(pins, layers[:-1], strict=True)}
        manifest = {
            "python": ".".join(self.version.split(".")[:2]),
            "layers": [asdict(layer) for layer in layers],
        }
        for name, value in (("keys.json", keys), ("image.json", manifest)):
            with open(os.path.join(self.places.outputs, name), "w", encoding="utf-8") as file:
                json.dump(value, file)


def shown_size(count: int) -> str:
    return f"{count / 1024:.1f} KiB" if count < 1024 * 1024 else f"{count / 1024**2:.1f} MiB"


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def run(requirements: list[str], places: Places | None = None) -> int:
    """Build; the exit code."""
    return guarded(lambda: Build(places or Places()).run(requirements))


def guarded(work: Callable[[], None], steps: Mapping[int, str] = NEXT_STEP) -> int:
    """Do it; the exit code, and what went wrong in words on stderr."""
    try:
        work()
    except BuildError as exc:
        return _explain(exc.code, str(exc), steps)
    except OSError as exc:
        code = Exit.DISK if exc.errno in {28, 122} else Exit.INTERNAL
        text = f"{exc.strerror}: {exc.filename}" if exc.filename else str(exc)
        return _explain(code, text, steps)
    return 0


def _explain(code: int, text: str, steps: Mapping[int, str]) -> int:
    step = steps.get(code, "")
    sys.stderr.write(f"{text}\n{step}\n" if step else f"{text}\n")
    return code
