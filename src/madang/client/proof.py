"""How a client shows who it is: a token that is sent, or a key pair that signs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from madang.kit.secret import Secret

if TYPE_CHECKING:
    from madang.client.address import Address
    from madang.client.calls import Body

_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Access key and secret key; the secret never leaves this process."""

    access_key: str
    secret_key: Secret


Proof = Secret | KeyPair | None
"""A token, a key pair, or nothing."""


def proof_of(given: str | Proof) -> Proof:
    return Secret(given) if isinstance(given, str) else given


def sent_body(method: str, body: bytes | Body) -> bytes | Body:
    """What goes out: other methods have none."""
    return body if callable(body) or method in _WITH_BODY else b""


def headers(
    proof: Proof, address: Address, method: str, path: str, body: bytes | Body = b""
) -> dict[str, str]:
    """For one sending of one request; *path* with its query, below the address's prefix."""
    if proof is None:
        return {}
    if isinstance(proof, Secret):
        return {"Authorization": f"Bearer {proof.reveal()}"}
    return {"Authorization": _signature(proof, address, method, path, body)}


def _signature(pair: KeyPair, address: Address, method: str, path: str, body: bytes | Body) -> str:
    import time

    from madang.kit.ids import new_nonce
    from madang.wire import signing

    sent = sent_body(method, body)
    return signing.signed_header(
        pair.access_key,
        pair.secret_key.reveal(),
        method=method,
        host=address.netloc,
        target=address.prefix + path,
        body=signing.UNSIGNED_BODY if callable(sent) else signing.body_hash(sent),
        date=int(time.time()),
        nonce=new_nonce(),
    )
