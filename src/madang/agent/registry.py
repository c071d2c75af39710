"""Which package indexes builds use: the variables and files by which pip and uv are set up.

A build gets what whoever runs the server would get. Only ``http`` and ``https`` indexes count:
folders of the server are not visible in a build session.
"""

from __future__ import annotations

import base64
import configparser
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote, urlsplit

from madang.agent import debian
from madang.agent.imageregistries import ImageRegistry
from madang.kit.secret import Secret

PASSED: Final = (
    "UV_EXCLUDE_NEWER UV_HTTP_RETRIES UV_HTTP_TIMEOUT UV_INDEX_STRATEGY UV_INSECURE_HOST "
    "UV_PRERELEASE UV_TORCH_BACKEND"
).split()
"""Other variables that uv reads in the build as it would outside."""

SYSTEM_CERTIFICATES: Final = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """A site's forward proxy."""

    host: str
    port: int
    authorization: Secret | None = None
    """Value of ``Proxy-Authorization``."""
    direct: tuple[str, ...] = ()
    """Hosts and domains that are reached without it (``NO_PROXY``)."""

    def serves(self, host: str) -> bool:
        """Whether *host* is to be reached through it."""
        names = (name.lstrip(".") for name in self.direct)
        return not any(name == "*" or host == name or host.endswith("." + name) for name in names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """Where builds get packages from."""

    environment: Mapping[str, Secret] = field(default_factory=dict)
    """For uv in the build session; index addresses may hold passwords."""
    hosts: frozenset[tuple[str, int]] = frozenset()
    """Name and port of each index; reachable wherever they are."""
    secrets: tuple[Secret, ...] = ()
    """Passwords, to be left out of what a build prints."""
    upstream: Upstream | None = None
    """The site's own proxy, if indexes are reached through it."""
    certificates: str = field(default="", repr=False)
    """Authorities to trust (PEM); empty: those that uv brings."""
    places: tuple[ImageRegistry, ...] = ()
    """Image registries that were set up."""


def registry(environment: Mapping[str, str], places: tuple[ImageRegistry, ...] = ()) -> Registry:
    """From the server's own *environment* and the pip configuration that it leads to."""
    pip = _pip_config(environment)
    default = (
        environment.get("UV_DEFAULT_INDEX")
        or environment.get("UV_INDEX_URL")
        or environment.get("PIP_INDEX_URL")
        or pip.get("index-url", "")
    )
    extra = " ".join(
        filter(None, (environment.get("UV_INDEX"), environment.get("UV_EXTRA_INDEX_URL")))
    ) or (environment.get("PIP_EXTRA_INDEX_URL") or pip.get("extra-index-url", ""))
    defaults, extras = _remote(default.split()[:1]), _remote(extra.split())
    debian_mirror = environment.get(debian.VARIABLE, "")
    chosen = {
        debian.VARIABLE: debian_mirror,
        "NPM_CONFIG_REGISTRY": environment.get("NPM_CONFIG_REGISTRY", ""),
        "UV_DEFAULT_INDEX": " ".join(defaults),
        "UV_INDEX": " ".join(extras),
        **{name: value for name, value in environment.items() if _is_passed(name)},
    }
    urls = [_address(index) for index in (*defaults, *extras)]
    urls += filter(None, (debian_mirror, chosen["NPM_CONFIG_REGISTRY"]))
    return Registry(
        environment={name: Secret(value) for name, value in chosen.items() if value},
        hosts=frozenset(_host(url) for url in urls).union(*(place.hosts() for place in places)),
        secrets=tuple(_passwords(urls, environment)),
        places=places,
        upstream=_upstream(environment),
        certificates=_certificates(environment, pip),
    )


def _is_passed(name: str) -> bool:
    credentials = name.startswith("UV_INDEX_") and name.endswith(("_USERNAME", "_PASSWORD"))
    return name in PASSED or credentials


def _pip_config(environment: Mapping[str, str]) -> dict[str, str]:
    """Section ``global``; later files win, as for pip."""
    home = environment.get("HOME", "/")
    config_home = environment.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
    parser = configparser.ConfigParser(interpolation=None)
    files = (
        "/etc/pip.conf",
        os.path.join(home, ".pip", "pip.conf"),
        os.path.join(config_home, "pip", "pip.conf"),
        environment.get("PIP_CONFIG_FILE", ""),
    )
    for path in filter(None, files):
        try:
            parser.read(path, encoding="utf-8")
        except (OSError, configparser.Error, UnicodeDecodeError):
            continue  # pip itself will complain; builds go on with the rest
    return dict(parser["global"]) if parser.has_section("global") else {}


def _remote(indexes: Iterable[str]) -> list[str]:
    """``https://…`` and uv's ``name=https://…``; folders and ``file:`` are left out."""
    return [i for i in indexes if _address(i).startswith(("http://", "https://"))]


def _address(index: str) -> str:
    name, separator, url = index.partition("=")
    return url if separator and "/" not in name and ":" not in name else index


def _host(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _passwords(urls: Iterable[str], environment: Mapping[str, str]) -> list[Secret]:
    found = {name: v for name, v in environment.items() if name.endswith("_PASSWORD")}
    values = {v for name, v in found.items() if _is_passed(name)}
    for password in (urlsplit(url).password for url in urls):
        if password:
            values |= {password, unquote(password)}
    return [Secret(value) for value in sorted(values, key=len, reverse=True)]


def _upstream(environment: Mapping[str, str]) -> Upstream | None:
    def value(name: str) -> str:
        return environment.get(name.lower()) or environment.get(name, "")

    url = urlsplit(value("HTTPS_PROXY") or value("ALL_PROXY"))
    if url.scheme != "http" or not url.hostname:
        return None
    credentials = f"{unquote(url.username or '')}:{unquote(url.password or '')}"
    basic = f"Basic {base64.b64encode(credentials.encode()).decode()}"
    direct = (part.strip().lower() for part in value("NO_PROXY").split(","))
    return Upstream(
        host=url.hostname,
        port=url.port or 80,
        authorization=Secret(basic) if url.username else None,
        direct=tuple(filter(None, direct)),
    )


def _certificates(environment: Mapping[str, str], pip: Mapping[str, str]) -> str:
    """What the operator chose, else what the system trusts."""
    chosen = environment.get("SSL_CERT_FILE") or environment.get("PIP_CERT") or pip.get("cert")
    for path in (chosen,) if chosen else SYSTEM_CERTIFICATES:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                return file.read()
        except OSError:
            continue
    return ""
