"""The only reader of the server's file, environment and flags.

Later wins: default, file (TOML), environment (``MADANG_SECTION_KEY``), flag.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import os
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import Any, Final
from urllib.parse import urlsplit

from madang.daemon import settings as definitions
from madang.daemon.settings import Settings
from madang.wire import network, size
from madang.wire.errors import ConfigInvalid, NetworkInvalid, SizeInvalid

PREFIX: Final = "MADANG_"
NOT_SET: Final = frozenset({"", "none"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One setting: where it lives and what it takes."""

    section: str
    field: str
    kinds: tuple[Any, ...]
    default: Any
    meaning: str

    @property
    def name(self) -> str:
        """``defaults.mem``"""
        plain = self.field
        for unit in ("_bytes", "_bits", "_s"):
            plain = plain.removesuffix(unit)
        return f"{self.section}.{plain}"

    @property
    def variable(self) -> str:
        """``MADANG_DEFAULTS_MEM``"""
        return PREFIX + self.name.replace(".", "_").upper()

    def parse(self, value: object, origin: str) -> Any:
        """*value* as text or as TOML has it. Raises ConfigInvalid."""
        try:
            return self._parse(value)
        except (ValueError, TypeError, SizeInvalid, NetworkInvalid) as exc:
            raise ConfigInvalid(f"{self.name} ({origin}): {exc}", key=self.name) from exc

    def _parse(self, value: object) -> Any:
        text = str(value) if isinstance(value, (str, int, float)) else None
        if self.kinds[0] is bool:
            return _truth(value)
        if isinstance(value, bool) or (text is None and not isinstance(value, list)):
            raise ValueError(f"{value!r} has the wrong type")
        if NoneType in self.kinds and text is not None and text.lower() in NOT_SET:
            return None
        if self._is_list:
            return tuple(value if isinstance(value, list) else filter(None, str(value).split(":")))
        assert text is not None
        if "\0" in text:
            raise ValueError("has a NUL byte")
        if self.field.endswith("_bytes"):
            return size.parse_bytes(text, field=self.name)
        if self.field.endswith("_bits"):
            return network.parse_rate(text)
        if self.field.endswith("_s"):
            return size.parse_duration(text, field=self.name)
        return self._plain(text)

    @property
    def _is_list(self) -> bool:
        return typing.get_origin(self.kinds[0]) is tuple

    def _plain(self, text: str) -> Any:
        kind = self.kinds[0]
        if kind is float:
            number = float(text)
            if not 0 < number < 1e6:
                raise ValueError(f"{text} is out of range")
            return number
        if kind is int:
            whole = int(text)
            if not 0 <= whole < 2**32:
                raise ValueError(f"{text} is out of range")
            return whole
        choices = typing.get_args(kind)
        if choices and text not in choices:
            raise ValueError(f"{text!r} is none of {', '.join(choices)}")
        return text

    def show(self, value: Any) -> str:
        """As one would write it in the file."""
        if value is None:
            return "none"
        if self.field.endswith("_bytes"):
            return size.format_bytes(value).replace(" ", "")
        if self.field.endswith("_bits"):
            return network.format_rate(value)
        if self.field.endswith("_s"):
            return size.format_duration(value)
        if self._is_list:
            return ":".join(value)
        if isinstance(value, bool):
            return str(value).lower()
        return f"{value:g}" if isinstance(value, float) else hide_password(str(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One line of ``madang config show``."""

    name: str
    value: str
    origin: str
    default: str
    variable: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """Settings and where each came from."""

    settings: Settings
    origins: Mapping[str, str]
    path: str
    """The file that is read if it exists."""

    def shown(self) -> list[Shown]:
        """All settings, in the order of their definition."""
        return [
            Shown(
                name=key.name,
                value=key.show(getattr(getattr(self.settings, key.section), key.field)),
                origin=self.origins.get(key.name, "default"),
                default=key.show(key.default),
                variable=key.variable,
                meaning=key.meaning,
            )
            for key in keys().values()
        ]


def load(
    *,
    path: str | None = None,
    flags: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Configuration:
    """Read everything. *flags* by name (``server.port``), None where not given.

    Raises ConfigInvalid: unknown or impossible settings, a file that can't be read.
    """
    env = os.environ if environment is None else environment
    file = path or default_path(env)
    found: dict[str, tuple[object, str]] = {}
    for name, value in _from_file(file, must_exist=path is not None).items():
        found[name] = value, file
    found.update(_from_environment(env))
    for name, given in (flags or {}).items():
        if given is not None:
            found[name] = given, "flag"
    values: dict[str, dict[str, Any]] = {}
    for name, (raw, origin) in found.items():
        key = keys()[name]
        values.setdefault(key.section, {})[key.field] = key.parse(raw, origin)
    settings = _build(values, env)
    return Configuration(
        settings=settings, origins={n: origin for n, (_, origin) in found.items()}, path=file
    )


def registries_text(settings: Settings) -> str:
    """The file of image registries; the server itself need not be able to read it."""
    path = settings.images.registries
    if not path:
        return ""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigInvalid(f"images.registries: {path} can't be read ({exc}).") from exc


def _build(values: dict[str, dict[str, Any]], env: Mapping[str, str]) -> Settings:
    server = values.setdefault("server", {})
    server["state"] = os.path.realpath(server.get("state") or default_state(env))
    if server.get("port", 0) > 65535:
        raise ConfigInvalid(f"server.port: {server['port']} is no TCP port (0 to 65535).")
    _check_widen(values.get("sandbox", {}).get("widen", ()))
    _check_network(values.get("network", {}))
    _check_place(values.get("node", {}))
    types = typing.get_type_hints(Settings)
    return Settings(**{name: types[name](**values.get(name, {})) for name in types})


def _check_widen(names: tuple[str, ...]) -> None:
    if not names:
        return
    from madang.wire.policy_base import FIXED, NAMES  # few machines name any

    allowed = [name for name in NAMES if name not in FIXED]
    for name in names:
        if name not in allowed:
            text = f"sandbox.widen: {name!r} is none of {', '.join(allowed)}."
            raise ConfigInvalid(text, key="sandbox.widen")


def _check_place(node: dict[str, Any]) -> None:
    from madang.wire.labels import GROUP, LABEL

    if (group := node.get("group", "")) and not GROUP.fullmatch(group):
        raise ConfigInvalid(f"node.group: {group!r} is no name of a group.", key="node.group")
    for label in node.get("labels", ()):
        if not LABEL.fullmatch(label):
            text = f"node.labels: {label!r} does not look like KEY=VALUE."
            raise ConfigInvalid(text, key="node.labels")


def _truth(value: object) -> bool:
    known = {"true": True, "false": False}
    text = str(value).lower()
    if text not in known:
        raise ValueError(f"{value!r} is neither true nor false")
    return known[text]


def _from_file(path: str, *, must_exist: bool) -> dict[str, object]:
    try:
        with open(path, "rb") as file:
            tables = tomllib.load(file)
    except FileNotFoundError as exc:
        if must_exist:
            raise ConfigInvalid(f"{path}: there is no such file.") from exc
        return {}
    except (OSError, ValueError) as exc:
        raise ConfigInvalid(f"{path}: can't be read: {exc}") from exc
    found: dict[str, object] = {}
    for section, table in tables.items():
        if not isinstance(table, dict):
            raise _unknown(section, path)
        for field, value in table.items():
            name = f"{section}.{field}"
            if name not in keys():
                raise _unknown(name, path)
            found[name] = value
    return found


def _from_environment(env: Mapping[str, str]) -> dict[str, tuple[object, str]]:
    sections = {key.section for key in keys().values()}
    by_variable = {key.variable: key.name for key in keys().values()}
    found: dict[str, tuple[object, str]] = {}
    for variable, text in env.items():
        if variable in by_variable:
            found[by_variable[variable]] = text, variable
        elif any(variable.startswith(f"{PREFIX}{s.upper()}_") for s in sections):
            raise _unknown(variable, "environment")
    return found


def _unknown(name: str, origin: str) -> ConfigInvalid:
    known = [key.variable if name.startswith(PREFIX) else key.name for key in keys().values()]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]}?" if near else ""
    text = f"{name} ({origin}) is no setting.{hint} `madang config show` lists all."
    return ConfigInvalid(text, key=name)


def default_path(env: Mapping[str, str]) -> str:
    """Where the file is looked for."""
    if os.geteuid() == 0:
        return "/etc/madang/madang.toml"
    home = env.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(home, "madang", "madang.toml")


def default_state(env: Mapping[str, str]) -> str:
    """The state folder of who has not chosen one."""
    if os.geteuid() == 0:
        return "/var/lib/madang"
    home = env.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return os.path.join(home, "madang")


def hide_password(text: str) -> str:
    """A URL without its password."""
    try:
        password = urlsplit(text).password
    except ValueError:
        return text
    return text.replace(f":{password}@", ":…@") if password else text


@cache
def keys() -> dict[str, Key]:
    """All settings by name."""
    found = {}
    for section in dataclasses.fields(Settings):
        kind = typing.get_type_hints(Settings)[section.name]
        hints, meanings = typing.get_type_hints(kind), _meanings(kind.__name__)
        for item in dataclasses.fields(kind):
            hint = hints[item.name]
            # `float | None` has arguments too, but Literal and tuple stay whole.
            parts = typing.get_args(hint) if NoneType in typing.get_args(hint) else (hint,)
            key = Key(
                section=section.name, field=item.name, kinds=parts, default=item.default,
                meaning=meanings[item.name],
            )  # fmt: skip
            found[key.name] = key
    return found


@cache
def _meanings(class_name: str) -> dict[str, str]:
    """The docstring below each field."""
    tree = ast.parse(inspect.getsource(definitions))
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name)
    found = {}
    for item, after in itertools.pairwise(body):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            found[item.target.id] = inspect.cleandoc(str(after.value.value)).replace("\n", " ")
    return found


def _check_network(values: Mapping[str, Any]) -> None:
    """What root says of networks must not be guessed at."""
    for name in values.get("modes", ()):
        if name not in (known := [mode.value for mode in network.NetworkMode]):
            text = f"network.modes: {name!r} is none of {', '.join(known)}."
            raise ConfigInvalid(text, key="network.modes")
    ranges = [("addresses", values["addresses"])] if "addresses" in values else []
    ranges += [("forbidden", text) for text in values.get("forbidden", ())]
    for key, text in ranges:
        try:
            net = network.Net.parse(text)
        except ValueError as exc:
            raise ConfigInvalid(f"network.{key}: {exc}.", key=f"network.{key}") from exc
        if key == "addresses" and not 8 <= net.bits <= network.MAX_POOL_BITS:
            text = f"network.addresses: {net} is no range of /8 to /{network.MAX_POOL_BITS}."
            raise ConfigInvalid(text, key="network.addresses")
    for text in values.get("resolvers", ()):
        if not network.is_address(text):
            words = f"network.resolvers: {text!r} is no address of a name server."
            raise ConfigInvalid(words, key="network.resolvers")
