"""From what a session did to the narrowest policy under which it would have run.

A session that learns has rules that refuse everything and only write it down (``with_learning``).
Of what they wrote, ``propose`` makes a text: files one by one, folders of which many files were
used as a whole, addresses one by one, hosts of which many ports were used as a whole. Where more
was used than could be written down (an empty object), anything is let pass.
"""

from __future__ import annotations

import ipaddress
import re
import textwrap
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from madang.kit.policy_keys import quoted
from madang.wire.errors import PolicyInvalid
from madang.wire.policy import MAX_PATTERNS, Refusal
from madang.wire.policy_live import check_pattern

LEARN: Final = "learn"
"""Name of the rules that write down."""
_FIRST: Final = "version = 1\n"
_RULES: Final = f"""
[[files]]
access = ["open", "execute"]
only = []
with = "log"
name = "{LEARN}"

[[connect]]
only = []
with = "log"
name = "{LEARN}"

[[bind]]
only = []
with = "log"
name = "{LEARN}"

[[watch]]
of = "calls"
name = "{LEARN}"
"""
MANY: Final = 8
"""More files of one folder, or ports of one host, stand for all of it."""
_OWN: Final = frozenset({"/work", "/outputs", "/tmp"})
"""Folders of the first level that may stand as a whole: the session's own."""
_UNSAID: Final = re.compile(r"(?:\\x[0-9a-f]{2}|\*)+")
"""What stands in a record for bytes that are no text; and the star, which patterns have no other
word for."""
_CUT: Final = "…"
"""The end of a record that was too long."""
_NETWORK: Final = {4: 24, 6: 64}


def with_learning(text: str) -> str:
    """A session's own layer that also writes down all that the session uses."""
    return (text or _FIRST).rstrip("\n") + "\n" + _RULES


def propose(records: Iterable[Refusal], session: str) -> str:
    """The text of a policy; all of *records* pass under it."""
    used: dict[str, set[str]] = {"open": set(), "execute": set(), "connect": set(), "bind": set()}
    used["call"] = set()
    for record in records:
        if record.name == LEARN and record.what in used:
            used[record.what].add(record.object)
    parts = [f"# What session {session} used.", _FIRST.rstrip("\n")]
    for what in ("open", "execute"):
        parts += ["", "[[files]]", f'access = ["{what}"]', *_listed(_files(used[what]))]
        parts.append(f'why = "learned from {session}"')
    for what in ("connect", "bind"):
        parts += ["", f"[[{what}]]", *_listed(_targets(used[what], what))]
        parts.append(f'why = "learned from {session}"')
    return "\n".join([*parts, *_calls(used["call"], session)]) + "\n"


def _calls(names: Collection[str], session: str) -> list[str]:
    """Nothing where they were not written down, or not all."""
    if not names or "" in names:
        return [
            "",
            "# System calls were not written down: all that the base lets pass may be made.",
        ]
    listed = textwrap.wrap(", ".join(map(quoted, sorted(names))) + ",", 92)
    lines = [f"    {line}" for line in listed]
    return ["", "[[only]]", "calls = [", *lines, "]", f'why = "learned from {session}"']


def _listed(items: Sequence[str]) -> list[str]:
    if not items:
        return ["only = []"]
    return ["only = [", *(f"    {quoted(item)}," for item in items), "]"]


# --- files


@dataclass(slots=True)
class _Folder:
    used: bool = False
    """It was used itself: it is a file, or a folder that was opened."""
    whole: bool = False
    """Something in it has a name that no pattern can say."""
    entries: dict[str, _Folder] = field(default_factory=dict)


def _files(paths: Collection[str]) -> list[str]:
    """Patterns that cover *paths*, as few folders as a whole as can be."""
    root = _Folder()
    if "" in paths:
        return ["/**"]
    for path in paths:
        if path.startswith("/"):
            _put(root, path)
    for many, depth in ((MANY, 2), (4, 2), (2, 2), (1, 2), (1, 1)):
        found = _walk(root, "", 0, many, depth)
        if len(found) <= MAX_PATTERNS:
            return sorted(found)
    return ["/**"]


def _put(root: _Folder, path: str) -> None:
    at = root
    for name in path[1:].split("/"):
        said = _UNSAID.sub("*", name)
        if name.endswith(_CUT) or not _sayable(said):
            at.whole = True
            return
        at = at.entries.setdefault(said, _Folder())
    at.used = True


def _sayable(name: str) -> bool:
    try:
        check_pattern(f"/{name}")
    except PolicyInvalid:
        return False
    return True


def _walk(folder: _Folder, path: str, level: int, many: int, depth: int) -> list[str]:
    here = [path] if folder.used and path else []
    below: list[str] = []
    for name, entry in folder.entries.items():
        below += _walk(entry, f"{path}/{name}", level + 1, many, depth)
    if folder.whole or (len(below) > many and (level >= depth or path in _OWN)):
        return [*here, f"{path}/**"]
    return [*here, *below]


# --- addresses


def _targets(objects: Collection[str], what: str) -> list[str]:
    """Targets that cover addresses like ``10.0.0.5:5432`` and ``[::1]:80``."""
    if "" in objects:
        return ["0.0.0.0/0", "[::]/0"]
    ports: dict[str, set[str]] = {}
    for each in objects:
        host, _, port = each.rpartition(":")
        for judged in _judged(host, what):
            ports.setdefault(judged, set()).add(port)
    for width in (None, _NETWORK, {4: 0, 6: 0}):
        grouped: dict[str, set[str]] = {}
        for host, of_host in ports.items():
            grouped.setdefault(host if width is None else _network(host, width), set()).update(
                of_host
            )
        found = [
            target
            for host, of_host in grouped.items()
            for target in ([host] if len(of_host) > MANY else [f"{host}:{p}" for p in of_host])
        ]
        if len(found) <= MAX_PATTERNS:
            return sorted(found)
    return ["0.0.0.0/0", "[::]/0"]


def _judged(host: str, what: str) -> list[str]:
    """As what it is judged: an IPv4 address that came as IPv6, and those that mean others (see
    ``wire.addresses``)."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return [host]
    mapped = address.ipv4_mapped if address.version == 6 else None
    shown = host if mapped is None else str(mapped)
    v4, v6 = ("127.0.0.1", "[::1]") if what == "connect" else ("0.0.0.0", "[::]")
    return {"0.0.0.0": [v4], "[::]": [v6, v4]}.get(shown, [shown])


def _network(host: str, width: dict[int, int]) -> str:
    """The network around an address, as a target says it."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host
    bits = width[address.version]
    network = ipaddress.ip_network(f"{address}/{bits}", strict=False)
    if address.version == 4:
        return str(network)
    return f"[{network.network_address}]/{bits}"
