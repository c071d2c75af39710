"""Where the rules of sandbox policies can be kept: machines, and what sessions need of them.

All that counts is compared by *need*: a kind of rules (``policy_kept``) with the runtime that shall
keep it before a colon; nothing before it means whatever the machine takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from madang.manager.fleet.types import NodeRow
from madang.manager.policy.rules import kinds_in
from madang.manager.policy.types import Demands
from madang.manager.scheduling.rules import NETWORK, OWN, unkept
from madang.manager.scheduling.types import GroupRules, Wishes
from madang.wire.policy import IMAGE, SESSION
from madang.wire.policy_kept import first_places

_RUNTIME: Final = "runtime:"
NETWORKS: Final = frozenset({"network:allow", "network:full"})


def runtime_of(needs: Iterable[str]) -> str:
    """Of a session's wishes; empty: whatever the machine takes."""
    chosen = (need for need in needs if need.startswith(_RUNTIME))
    return next(chosen, "").removeprefix(_RUNTIME)


def needs_of(
    wishes: Wishes, group: str, project: str, demands: Demands, rules: GroupRules
) -> frozenset[str]:
    """Of a session; *project*: its id."""
    layers = [*demands.shared(group, project), dict.fromkeys(wishes.keeps, "")]
    kinds = set(first_places(layers, rules.accepts))
    if NETWORKS.intersection(wishes.needs):
        kinds.add(NETWORK)
    return frozenset(f"{runtime_of(wishes.needs)}:{kind}" for kind in kinds)


def lacks_of(
    node: NodeRow, runtimes: Iterable[str], demands: Demands, rules: GroupRules
) -> frozenset[str]:
    """Needs that *node* can't meet for sessions of *runtimes*; ``OWN``: its own layer."""
    own = first_places([demands.of_node(node.name)], rules.accepts)
    found = set()
    for runtime in runtimes:
        missing = unkept(node.facts, runtime)
        found |= {f"{runtime}:{kind}" for kind in missing}
        if missing & own.keys():
            found.add(f"{runtime}:{OWN}")
    return frozenset(found)


def own_kinds(image_policy: str, policy: str) -> tuple[str, ...]:
    """Kinds of rules that a session brings with it."""
    found = kinds_in(image_policy, IMAGE).keys() | kinds_in(policy, SESSION).keys()
    return tuple(sorted(found))
