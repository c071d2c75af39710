"""A Debian system from nothing but its archive, without privileges: the first of two stages.

The packages that every Debian needs, and ``apt``, are chosen from the suite's signed index,
fetched, checked and unpacked; ``dpkg`` finds them as unpacked, not configured. The second stage is
a script (see ``kit.recipes``) in a session that has this for its root, where programs believe they
are root: there the packages' own scripts run.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import io
import lzma
import os
import re
import subprocess
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
SUITE = re.compile(r"[a-z]{2,20}(?:-[a-z]{2,20})?")
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
WANTED = ("apt",)
MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
"""Folders that are links into ``usr``."""
PREFERRED = {"usr-is-merged"}
"""Where a package takes one of several, and none is there yet; else the first."""
LEFT_OUT = re.compile(
    rb"usr/share/(?:man|info|locale|lintian)/.|usr/share/doc/.*/(?!copyright$)[^/]*$"
)
PARALLEL = 4
MAX_INDEX = 512 * 1024 * 1024
MAX_PACKAGE = 512 * 1024 * 1024
_DPKG = b"""path-exclude=/usr/share/man/*
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*
path-exclude=/usr/share/lintian/*
path-exclude=/usr/share/doc/*
path-include=/usr/share/doc/*/copyright
force-unsafe-io
force-confold
"""
_APT = b"""Acquire::Languages "none";
APT::Install-Suggests "false";
Dpkg::Use-Pty "0";
"""
_NO_SERVICES = b"#!/bin/sh\nexit 101\n"


class DebianError(Exception):
    """In words, what can't be had."""


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    arch: str
    path: str
    sha256: str
    size: int
    fields: dict[str, str] = field(repr=False)

    @property
    def provides(self) -> list[str]:
        return [name for name, *_ in _alternatives(self.fields.get("Provides", ""))]

    @property
    def needs(self) -> Iterator[list[str]]:
        """Each one of these."""
        for kind in ("Pre-Depends", "Depends"):
            for part in filter(None, self.fields.get(kind, "").split(",")):
                yield [name for name, *_ in _alternatives(part.replace("|", ","))]


def _alternatives(text: str) -> list[tuple[str, str]]:
    found = []
    for part in filter(None, (each.strip() for each in text.split(","))):
        name, _, rest = part.partition(" ")
        found.append((name.partition(":")[0], rest))
    return found


Fetch = Callable[[str, int], bytes]
"""Address, most bytes; raises DebianError."""


def _opener() -> urllib.request.OpenerDirector:
    """For http and https, by the proxy that the environment names."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def fetch(url: str, most: int) -> bytes:
    """In at most three tries."""
    problem, opener = "", _opener()
    for _ in range(3):
        try:
            with opener.open(url, timeout=60) as answer:
                data: bytes = answer.read(most + 1)
        except urllib.error.HTTPError as exc:
            problem = f"{exc.code} {exc.reason}"
            if exc.code < 500:
                break
        except (OSError, ValueError) as exc:
            problem = str(getattr(exc, "reason", exc))
        else:
            if len(data) > most:
                raise DebianError(f"{url} is larger than {most} bytes")
            return data
    raise DebianError(f"{url} can't be fetched: {problem}")


class Archive:
    """One suite of a mirror, for one architecture."""

    def __init__(self, mirror: str, suite: str, arch: str, get: Fetch = fetch) -> None:
        if not SUITE.fullmatch(suite):
            raise DebianError(f"{suite[:40]!r} is no name of a suite: bookworm, for one")
        self._mirror, self._suite, self._arch, self._get = mirror.rstrip("/"), suite, arch, get

    def packages(self) -> list[Package]:
        """Of the index that the archive's keys have signed."""
        base = f"{self._mirror}/dists/{self._suite}"
        release = verified(self._get(f"{base}/InRelease", MAX_INDEX), self._suite)
        name = f"main/binary-{self._arch}/Packages.xz"
        listed = re.search(rf"^ ([0-9a-f]{{64}}) +(\d+) {re.escape(name)}$", release, re.MULTILINE)
        if listed is None:
            raise DebianError(f"{self._suite} has no packages for {self._arch}")
        index = self._get(f"{base}/{name}", MAX_INDEX)
        if hashlib.sha256(index).hexdigest() != listed[1]:
            raise DebianError(f"{base}/{name} is not what its index says: try again later")
        text = lzma.decompress(index).decode("utf-8", "replace")
        return [_package(stanza) for stanza in text.split("\n\n") if stanza.strip()]

    def deb(self, package: Package) -> bytes:
        data = self._get(f"{self._mirror}/{package.path}", MAX_PACKAGE)
        if hashlib.sha256(data).hexdigest() != package.sha256:
            raise DebianError(f"{package.path} is not what the index says: try again later")
        return data


def verified(text: bytes, suite: str, keyring: str = KEYRING) -> str:
    """What a signed message says. Raises DebianError unless all of it is signed."""
    if not os.path.exists(keyring):
        raise DebianError(f"{keyring} is missing on this machine: install debian-archive-keyring")
    try:
        done = subprocess.run(
            ["gpgv", "--keyring", keyring], input=text, capture_output=True, check=False
        )
    except FileNotFoundError as exc:
        raise DebianError("gpgv is missing on this machine: install it") from exc
    if done.returncode:
        words = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise DebianError(f"the index of {suite} is not signed by Debian: {''.join(words)}")
    head, blank, rest = text.partition(b"\n\n")
    body, mark, signature = rest.partition(b"\n-----BEGIN PGP SIGNATURE-----\n")
    lines = head.split(b"\n")
    if (
        lines[0] != b"-----BEGIN PGP SIGNED MESSAGE-----"
        or not all(line.startswith(b"Hash: ") for line in lines[1:])
        or not (blank and mark)
        or not signature.rstrip().endswith(b"-----END PGP SIGNATURE-----")
        or signature.count(b"-----") != 2
    ):
        raise DebianError(f"the index of {suite} has more in it than what is signed")
    return re.sub(rb"^- ", b"", body, flags=re.MULTILINE).decode("utf-8", "replace")


def _package(stanza: str) -> Package:
    found: dict[str, str] = {}
    key = ""
    for line in stanza.strip("\n").split("\n"):
        if line[:1] in " \t":
            found[key] += "\n" + line
        else:
            key, _, value = line.partition(":")
            found[key] = value.strip()
    try:
        return Package(
            name=found["Package"],
            version=found["Version"],
            arch=found["Architecture"],
            path=found["Filename"],
            sha256=found["SHA256"],
            size=int(found["Size"]),
            fields=found,
        )
    except (KeyError, ValueError) as exc:
        raise DebianError(f"the index has a package without {exc}") from exc


def choose(packages: Iterable[Package], wanted: Iterable[str] = WANTED) -> list[Package]:
    """All that a system needs, and *wanted*, with what they need."""
    by_name: dict[str, Package] = {}
    provided: dict[str, list[str]] = {}
    for package in packages:
        by_name[package.name] = package
        for name in package.provides:
            provided.setdefault(name, []).append(package.name)
    chosen = [
        package.name
        for package in by_name.values()
        if package.fields.get("Essential") == "yes" or package.fields.get("Priority") == "required"
    ]
    chosen += [name for name in wanted if name not in chosen]
    there = {*chosen, *(p for name in chosen if name in by_name for p in by_name[name].provides)}
    for name in chosen:  # It grows meanwhile.
        if name not in by_name:
            raise DebianError(f"the suite has no package {name}")
        for alternatives in by_name[name].needs:
            if there & set(alternatives):
                continue
            real = [a for a in alternatives if a in by_name]
            real += [p for a in alternatives for p in provided.get(a, ())]
            if not real:
                raise DebianError(f"{name} needs {' or '.join(alternatives)}, which is not there")
            pick = next((each for each in real if each in PREFERRED), real[0])
            chosen.append(pick)
            there |= {pick, *by_name[pick].provides}
    return [by_name[name] for name in chosen]


class Tree:
    """Files of packages, below a folder of ours."""

    def __init__(self, root: str) -> None:
        self._root = os.fsencode(root)
        self.status: list[str] = []
        for name in MERGED:
            os.makedirs(os.path.join(root, "usr", name))
            os.symlink(f"usr/{name}", os.path.join(root, name))
        self._info = os.path.join(root, "var/lib/dpkg/info")
        os.makedirs(self._info)

    def add(self, package: Package, deb: bytes) -> None:
        """Unpack it, and note that it is."""
        control, data = _parts(package, deb)
        info = dict(_small_files(control))
        listed = [b"/."]
        with tarfile.open(
            fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape"
        ) as tar:
            for member in tar:
                path = os.fsencode(member.name).lstrip(b"./").rstrip(b"/")
                if path:
                    listed.append(b"/" + path)
                    if not LEFT_OUT.match(path):
                        self._put(path, tar, member)
        multi = package.fields.get("Multi-Arch") == "same"
        stem = f"{package.name}:{package.arch}" if multi else package.name
        for name, (content, mode) in info.items():
            if name != "control":
                self._write(f"{stem}.{name}", content, mode)
        self._write(f"{stem}.list", b"\n".join(listed) + b"\n", 0o644)
        self.status.append(self._stanza(info))

    def _write(self, name: str, content: bytes, mode: int) -> None:
        path = os.path.join(self._info, name)
        with open(path, "wb") as file:
            file.write(content)
        os.chmod(path, mode)

    def _real(self, path: bytes) -> bytes:
        first, slash, rest = path.partition(b"/")
        merged = b"usr/" + first if slash and os.fsdecode(first) in MERGED else first
        return os.path.join(self._root, merged + slash + rest)

    def _put(self, path: bytes, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        full = self._real(path)
        if b".." in path.split(b"/"):
            raise DebianError(f"a package names {path!r}")
        if member.isdir():
            if not os.path.isdir(full):
                os.makedirs(full)
                os.chmod(full, member.mode)
            return
        os.makedirs(os.path.dirname(full), exist_ok=True)
        if os.path.lexists(full):
            if os.path.isdir(full):
                return  # trixie's base-files: the links into usr
            os.unlink(full)
        if member.issym():
            os.symlink(os.fsencode(member.linkname), full)
        elif member.islnk():
            os.link(self._real(os.fsencode(member.linkname).lstrip(b"./")), full)
        elif member.isreg():
            content = tar.extractfile(member)
            assert content is not None
            with open(full, "wb") as file:
                while piece := content.read(1 << 20):
                    file.write(piece)
            os.chmod(full, member.mode)
            os.utime(full, (member.mtime, member.mtime))

    def _stanza(self, info: dict[str, tuple[bytes, int]]) -> str:
        lines = info["control"][0].decode("utf-8", "surrogateescape").strip("\n").split("\n")
        lines.insert(1, "Status: install ok unpacked")
        if paths := info.get("conffiles", (b"", 0))[0].split():
            lines.append("Conffiles:")
            for path in paths:
                if path.startswith(b"/"):
                    lines.append(f" {os.fsdecode(path)} {self._md5(path)}")
        return "\n".join(lines) + "\n"

    def _md5(self, path: bytes) -> str:
        try:
            with open(self._real(path.lstrip(b"/")), "rb") as file:
                return hashlib.md5(file.read(), usedforsecurity=False).hexdigest()
        except OSError:
            return "newconffile"

    def finish(self, mirror: str, suite: str) -> None:
        """What lies in no package."""
        for name in MERGED:
            folder = os.path.join(os.fsdecode(self._root), "usr", name)
            if not os.listdir(folder):
                os.rmdir(folder)
                os.unlink(os.path.join(os.fsdecode(self._root), name))
        database = "var/lib/dpkg"
        files = {
            f"{database}/status": "\n".join(self.status).encode("utf-8", "surrogateescape"),
            f"{database}/available": b"",
            f"{database}/info/format": b"1\n",
            "etc/apt/sources.list": sources(mirror, suite).encode(),
            "etc/apt/apt.conf.d/01madang": _APT,
            "etc/dpkg/dpkg.cfg.d/01madang": _DPKG,
            "usr/sbin/policy-rc.d": _NO_SERVICES,
        }
        for name in ("passwd", "group"):
            with open(
                self._real(b"usr/share/base-passwd/" + name.encode() + b".master"), "rb"
            ) as f:
                files[f"etc/{name}"] = f.read()
        for path, content in files.items():
            full = self._real(path.encode())
            os.makedirs(os.path.dirname(full), exist_ok=True)
            with open(full, "wb") as file:
                file.write(content)
            os.chmod(full, 0o755 if path.startswith("usr/sbin/") else 0o644)
        for name in (f"{database}/updates", f"{database}/triggers", "var/lib/apt/lists/partial"):
            os.makedirs(self._real(name.encode()), exist_ok=True)


def sources(mirror: str, suite: str) -> str:
    """For ``apt`` in the image: with updates, and what was mended for security."""
    lines = [f"deb {mirror} {suite} main"]
    if suite not in {"sid", "forky"} and "-" not in suite:
        lines.append(f"deb {mirror} {suite}-updates main")
        lines.append(f"deb {mirror.removesuffix('/')}-security {suite}-security main")
    return "".join(f"{line}\n" for line in lines)


def _parts(package: Package, deb: bytes) -> tuple[bytes, bytes]:
    """(control, data), as tar files."""
    if not deb.startswith(b"!<arch>\n"):
        raise DebianError(f"{package.path} is no package")
    found: dict[str, bytes] = {}
    at = 8
    while at + 60 <= len(deb):
        name = deb[at : at + 16].decode("ascii", "replace").strip().rstrip("/")
        size = int(deb[at + 48 : at + 58])
        found[name] = deb[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    parts = []
    for part in ("control.tar", "data.tar"):
        name = next((each for each in found if each.startswith(part)), "")
        if not name.endswith((".tar", ".gz", ".xz")):
            raise DebianError(f"{package.path}: {name or part} can't be read here")
        parts.append(found[name])
    return parts[0], parts[1]


def _small_files(archive: bytes) -> Iterator[tuple[str, tuple[bytes, int]]]:
    """Name, content and mode."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if member.isreg() and (file := tar.extractfile(member)) is not None:
                yield member.name.removeprefix("./"), (file.read(), member.mode)


def make(
    root: str, mirror: str, suite: str, arch: str, say: Callable[[str], None]
) -> list[Package]:
    """The first stage, into the empty folder *root*; what was unpacked."""
    archive = Archive(mirror, suite, arch)
    chosen = choose(archive.packages())
    total = sum(package.size for package in chosen)
    say(f"fetch    {len(chosen)} packages of {suite}  {total / 1024**2:.1f} MiB")
    tree = Tree(root)
    with concurrent.futures.ThreadPoolExecutor(PARALLEL) as pool:
        for package, deb in zip(chosen, pool.map(archive.deb, chosen), strict=True):
            tree.add(package, deb)
    tree.finish(mirror, suite)
    return chosen
