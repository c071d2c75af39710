"""Settings of the client: the only reader of its environment and files.

Environment before file: ``MADANG_URL``, ``MADANG_TOKEN``, ``MADANG_CONFIG`` (another file), or
``MADANG_ACCESS_KEY`` and ``MADANG_SECRET_KEY`` instead of a token. The
file is ``$XDG_CONFIG_HOME/madang/client.toml`` with ``url`` and one of ``token``, ``token_file``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from madang.client.proof import KeyPair
from madang.kit.codec import to_json
from madang.kit.secret import Secret
from madang.wire.errors import ConfigInvalid

DEFAULT_URL: Final = "http://127.0.0.1:8470"
_KEYS: Final = ("url", "token", "token_file")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Where the server is, and who we are."""

    url: str = DEFAULT_URL
    token: Secret | None = None
    key: KeyPair | None = None
    """Signs requests; comes before the token of the file, not before MADANG_TOKEN."""
    borrowed: bool = False
    """The token lies in another's file."""
    path: str
    """The configuration file, whether it exists or not."""
    cache_dir: str
    jupyter_dir: str
    """Where Jupyter looks for a user's kernelspecs and more: ``JUPYTER_DATA_DIR``."""
    home: str | None
    plain: bool
    """No colours and no live lines: ``NO_COLOR`` or ``TERM=dumb``."""
    terminal: str
    """``TERM``, told to programs that get a terminal."""


def load(environ: Mapping[str, str] | None = None) -> ClientConfig:
    """Read everything. Raises ConfigInvalid that names the file and the setting."""
    env = os.environ if environ is None else environ
    path = _path(env)
    file = _read_file(path)
    home = env.get("HOME")
    cache = env.get("XDG_CACHE_HOME") or os.path.join(home or "/tmp", ".cache")
    data = env.get("XDG_DATA_HOME") or os.path.join(home or "/tmp", ".local", "share")
    return ClientConfig(
        url=env.get("MADANG_URL") or file.get("url") or DEFAULT_URL,
        token=_token(env, file, path),
        borrowed=not env.get("MADANG_TOKEN") and "token_file" in file,
        key=None if env.get("MADANG_TOKEN") else _key(env),
        path=path,
        cache_dir=os.path.join(cache, "madang"),
        jupyter_dir=env.get("JUPYTER_DATA_DIR") or os.path.join(data, "jupyter"),
        home=home,
        plain=bool(env.get("NO_COLOR")) or env.get("TERM") == "dumb",
        terminal=env.get("TERM") or "xterm",
    )


def save_server(
    url: str, *, token: Secret | None = None, token_file: str | None = None, path: str | None = None
) -> str:
    """Make *url* the server that commands talk to; returns the path of the file written.

    Give the token itself, or the file that holds it (kept by whoever owns it). The file is
    replaced as a whole, readable by its owner alone.
    """
    target = path or _path(os.environ)
    lines = [f"url = {_quoted(url)}"]
    if token is not None:
        lines.append(f"token = {_quoted(token.reveal())}")
    elif token_file is not None:
        lines.append(f"token_file = {_quoted(os.path.abspath(token_file))}")
    part = f"{target}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write("\n".join(lines) + "\n")
        os.replace(part, target)
    except OSError as exc:
        raise ConfigInvalid(f"{target} can't be written ({exc.strerror}).") from exc
    return target


def _path(env: Mapping[str, str]) -> str:
    if given := env.get("MADANG_CONFIG"):
        return given
    base = env.get("XDG_CONFIG_HOME") or os.path.join(env.get("HOME") or "/", ".config")
    return os.path.join(base, "madang", "client.toml")


def _read_file(path: str) -> dict[str, str]:
    try:
        with open(path, "rb") as file:
            text = file.read()
    except FileNotFoundError:
        return {}
    except OSError as exc:
        raise ConfigInvalid(f"{path} can't be read ({exc.strerror}).") from exc
    import tomllib  # only where there is a file

    try:
        found = tomllib.loads(text.decode())
    except ValueError as exc:
        raise ConfigInvalid(f"{path}: {exc}.") from exc
    return _checked(found, path)


def _checked(found: dict[str, Any], path: str) -> dict[str, str]:
    for key, value in found.items():
        if key not in _KEYS:
            known = ", ".join(_KEYS)
            raise ConfigInvalid(f"{path}: unknown setting {key!r}; known are {known}.")
        if not isinstance(value, str):
            raise ConfigInvalid(f"{path}: {key} must be text in quotes.")
    return found


def _token(env: Mapping[str, str], file: Mapping[str, str], path: str) -> Secret | None:
    if given := env.get("MADANG_TOKEN") or file.get("token"):
        return Secret(given.strip())
    token_file = file.get("token_file")
    if token_file is None:
        return None
    try:
        with open(token_file, encoding="ascii") as source:
            return Secret(source.read(4096).strip())
    except FileNotFoundError:
        return None  # the state folder has gone; the server, if one answers, says what it needs
    except (OSError, ValueError) as exc:
        text = f"{path}: token_file {token_file} can't be read ({exc})."
        raise ConfigInvalid(text) from exc


def _key(env: Mapping[str, str]) -> KeyPair | None:
    access, secret = env.get("MADANG_ACCESS_KEY", ""), env.get("MADANG_SECRET_KEY", "")
    if bool(access) != bool(secret):
        missing = "MADANG_SECRET_KEY" if access else "MADANG_ACCESS_KEY"
        raise ConfigInvalid(f"{missing} is not set: a key pair needs both.", setting=missing)
    return KeyPair(access.strip(), Secret(secret.strip())) if access else None


def _quoted(text: str) -> str:
    return to_json(text).decode()
