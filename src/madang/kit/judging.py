"""What live rules say to a file or an address, without a session: for trying a policy out."""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from typing import Final

from madang.wire.addresses import PORTS, Table, look_up, table
from madang.wire.policy import Act, FileRule, NetRule, Rule, Sandbox, judge, strictest
from madang.wire.policy_live import FILES_NEEDED, names_in

_ACCESS: Final = frozenset({"open", "execute"})
_ACTS: Final = frozenset(Act)
_NO_ARGUMENTS: Final = (0,) * 6


def judge_live(
    sandbox: Sandbox, what: str, thing: str
) -> tuple[bool, Rule | FileRule | NetRule | None]:
    """Whether this can be judged, and the rule that decides about it; None: it passes.

    *what* and *thing* as in ``Refusal``. Numbers of calls can't be judged, nor names in rules:
    what they stood for then is not known. Of system calls the names alone count.
    """
    if what in _ACCESS:
        files = (r for r in strictest(sandbox.files) if _refuses_file(r, what, thing))
        return True, next(files, None)
    if what in _ACTS:
        address = _address(thing)
        if address is None:
            return False, None
        nets = tuple(rule for rule in sandbox.nets if rule.act == what)
        if names_in(nets):
            return False, None
        decides = look_up(_table(nets, Act(what)), *address)
        return True, None if decides is None else nets[decides]
    if what == "call":
        always = (rule for rule in sandbox.rules if rule.always)
        return True, judge(always, thing, _NO_ARGUMENTS)
    return False, None


# --- files


def _refuses_file(rule: FileRule, what: str, path: str) -> bool:
    if what not in rule.access:
        return False
    named = rule.patterns if not rule.others else (*rule.patterns, *FILES_NEEDED)
    return any(_pattern(each).fullmatch(path) for each in named) is not rule.others


@lru_cache(maxsize=4096)
def _pattern(text: str) -> re.Pattern[str]:
    """``*``: within a name; ``**``: any number of names, none too."""
    parts = "".join("(?:/.*)?" if p == "**" else "/" + _name(p) for p in text[1:].split("/"))
    return re.compile(parts, re.DOTALL)


def _name(part: str) -> str:
    if not part.strip("*"):
        return "[^/]+"
    return "[^/]*".join(map(re.escape, part.split("*")))


# --- addresses


def _address(text: str) -> tuple[str, int] | None:
    """``10.0.0.5:5432``, ``[::1]:80``"""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or len(port) > 5 or int(port) >= PORTS:
        return None
    try:
        return str(ipaddress.ip_address(host.strip("[]"))), int(port)
    except ValueError:
        return None


@lru_cache(maxsize=64)
def _table(rules: tuple[NetRule, ...], act: Act) -> Table:
    return table(dict(enumerate(rules)), act)
