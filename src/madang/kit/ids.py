"""Identifiers and names."""

from __future__ import annotations

import os
import re
import secrets
import time
from typing import Final

_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
_PAIRS: Final = [a + b for a in _ALPHABET for b in _ALPHABET]
"""Two characters, for ten bits."""
_SHIFTS: Final = range(120, -1, -10)
NAME: Final = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
MAX_NAME: Final = 40

_ADJECTIVES: Final = (
    "amber bold brave bright brisk calm clear clever cool cosy crisp deft eager early easy fair "
    "fast fine firm fond fresh gentle glad golden good grand happy hardy hazel honest humble ideal "
    "jolly keen kind lively loyal lucid lucky mellow merry mild neat nimble noble open patient "
    "plain polite proud quick quiet rapid ready rich rosy round royal sage sharp shiny silent "
    "silver simple smart smooth snug soft solid spry stable steady still stout strong sunny sure "
    "swift tidy trim true vivid warm wise witty young zesty"
).split()
_ANIMALS: Final = (
    "ant auk badger bear beaver bee bison boar bream carp cat civet clam cod colt coot crab crane "
    "crow deer dingo dove duck eagle eel egret elk emu ermine falcon finch fox frog gecko goat "
    "goose gull hare hawk hen heron horse ibex ibis jay kite koala koi lark lemur lion llama loon "
    "lynx magpie marten mink mole moose moth mouse mule newt okapi orca osprey otter owl ox panda "
    "perch pika plover pony puffin quail rabbit ram raven robin rook salmon seal shrew shrike "
    "skylark sloth snail snipe sparrow squid stag stoat stork swan swift tapir teal tern tiger "
    "toad trout tuna turtle viper vole walrus weasel whale wolf wombat wren yak zebra"
).split()


def new_id() -> str:
    """26 characters (ULID, lower case): sorts by time of making, 80 random bits."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10))
    return "".join([_PAIRS[value >> shift & 1023] for shift in _SHIFTS])


def new_nonce() -> str:
    """128 random bits as hex."""
    return secrets.token_hex(16)


def new_name(taken: int = 0) -> str:
    """``calm-otter``; after *taken* collisions ``calm-otter-7k2``."""
    name = f"{secrets.choice(_ADJECTIVES)}-{secrets.choice(_ANIMALS)}"
    if taken:
        name += "-" + "".join(secrets.choice(_ALPHABET) for _ in range(2 + taken))
    return name


def valid_name(name: str) -> bool:
    """Whether *name* may name a session or an image."""
    return 2 <= len(name) <= MAX_NAME and NAME.fullmatch(name) is not None
