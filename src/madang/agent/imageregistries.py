"""Image registries that the operator set up: a TOML file, a table for each host.

::

    ["registry.example.org:5000"]
    http = true                  # not https
    username = "builder"
    password = "…"

    ["docker.io"]
    mirrors = ["registry.example.org:5000/hub"]

Registries with a public address need no entry. What is named here is reachable from builds wherever
it is; the logins are used for all builds, whose owners could read them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from madang.kit.secret import Secret
from madang.wire.errors import ConfigInvalid
from madang.wire.reference import parse

_KEYS: Final = {"http": bool, "username": str, "password": str, "mirrors": list}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRegistry:
    """One host."""

    host: str
    """``NAME[:PORT]``"""
    http: bool = False
    username: str = ""
    password: Secret = Secret("")  # noqa: RUF009 - it never changes
    mirrors: tuple[str, ...] = ()
    """``HOST[:PORT][/PREFIX]``, tried in this order before the host itself."""

    def told(self) -> dict[str, Any]:
        """For the build script."""
        return {
            "http": self.http,
            "username": self.username,
            "password": self.password.reveal(),
            "mirrors": list(self.mirrors),
        }

    def hosts(self) -> frozenset[tuple[str, int]]:
        """Name and port of it; its mirrors have entries of their own if they need one."""
        name, _, port = self.host.rpartition(":")
        if name and port.isdigit():
            return frozenset({(name.strip("[]"), int(port))})
        return frozenset({(self.host.strip("[]"), 80 if self.http else 443)})


def parse_file(path: str, text: str) -> tuple[ImageRegistry, ...]:
    """What the file at *path* says. Raises ConfigInvalid."""
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigInvalid(f"images.registries: {path}: {exc}") from exc
    return tuple(_registry(path, host, table) for host, table in found.items())


def _registry(path: str, host: str, table: Any) -> ImageRegistry:
    where = f"images.registries: {path}: {host}"
    if not isinstance(table, Mapping):
        raise ConfigInvalid(f'{where}: is no table; write ["{host}"] and its keys below.')
    for name, value in table.items():
        if not isinstance(value, _KEYS.get(name, ())):
            raise ConfigInvalid(f"{where}: {name} is not known, or has the wrong type.")
    mirrors = tuple(str(each) for each in table.get("mirrors", ()))
    for text in (host, *mirrors):
        try:
            good = parse(f"{text}/name").host == text.partition("/")[0]
        except ValueError:
            good = False
        if not good:
            raise ConfigInvalid(f"{where}: {text!r} is no HOST[:PORT] of a registry.")
    return ImageRegistry(
        host=host,
        http=table.get("http", False),
        username=table.get("username", ""),
        password=Secret(table.get("password", "")),
        mirrors=mirrors,
    )
