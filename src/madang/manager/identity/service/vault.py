"""Secrets that we must be able to read again: encrypted in the database, the key beside it.

AES-256-GCM with a random nonce for each secret; what it is for and whose it is are authenticated
with it, so that no row's secret works in another's place. The key is a file of its own, so that a
copy of the database alone gives no secret away.
"""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
from typing import Final

from madang.wire.errors import ConfigInvalid

_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_VERSION: Final = "v1:"


class Vault:
    def __init__(self, path: str) -> None:
        """*path*: of the key, made when it is needed first; empty: a key of this process alone."""
        self._path: Final = path
        self._key: bytes | None = None

    def seal(self, secret: bytes, purpose: str) -> str:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = AESGCM(self._load()).encrypt(nonce, secret, purpose.encode())
        return _VERSION + base64.b64encode(nonce + sealed).decode()

    def open(self, sealed: str, purpose: str) -> bytes:
        """Raises ConfigInvalid if the key is not the one that it was sealed with."""
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        data = base64.b64decode(sealed.removeprefix(_VERSION))
        try:
            return AESGCM(self._load()).decrypt(
                data[:_NONCE_BYTES], data[_NONCE_BYTES:], purpose.encode()
            )
        except InvalidTag as exc:
            text = (
                f"a stored secret can't be read with the key {self._path}: put the key back that "
                "belongs to this database, or make new key pairs and second factors."
            )
            raise ConfigInvalid(text, setting="secret key") from exc

    def _load(self) -> bytes:
        if self._key is None:
            self._key = _read_or_make(self._path) if self._path else secrets.token_bytes(_KEY_BYTES)
        return self._key


def _read_or_make(path: str) -> bytes:
    """Several servers may come at once: the first one's key counts."""
    try:
        if not os.path.exists(path):
            _make(path)
        with open(path, "rb") as file:
            key = file.read(_KEY_BYTES + 1)
    except OSError as exc:
        raise ConfigInvalid(f"the key {path} can't be used ({exc.strerror}).") from exc
    if len(key) != _KEY_BYTES:
        raise ConfigInvalid(f"the key {path} must have {_KEY_BYTES} bytes; it has {len(key)}.")
    return key


def _make(path: str) -> None:
    part = f"{path}.{os.getpid()}.{secrets.token_hex(4)}"
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, secrets.token_bytes(_KEY_BYTES))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(part, path)  # never over another's
    finally:
        os.unlink(part)
