"""Where the rules of sandbox policies can be kept: machines, and what sessions need of them.

All that counts is compared by *need*: a kind of rules (``policy_kept``) with the runtime that shall
keep it before a colon; nothing before it means whatever the machine takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from madang.manager.fleet.types import NodeRow
from madang.manager.policy.rules import kinds_in
from madang.manager.policy.types import Demands
from madang.manager.scheduling.rules import NETWORK, OWN, kept_words, unkept
from madang.manager.scheduling.types import GroupRules, Wishes
from madang.manager.session.types import SessionRow
from madang.wire.errors import NetworkRefused, PolicyUnkept
from madang.wire.policy import IMAGE, SESSION
from madang.wire.policy_kept import accepted_as, first_places

_RUNTIME: Final = "runtime:"
_NETWORKS: Final = frozenset({"network:allow", "network:full"})


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
    if _NETWORKS.intersection(wishes.needs):
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


def refuse_unkept(
    row: SessionRow,
    wishes: Wishes,
    policy: str,
    rules: GroupRules,
    demands: Demands,
    nodes: Sequence[NodeRow],
) -> None:
    """Raises PolicyUnkept, NetworkRefused where none of *nodes* can keep a new session's rules.

    *policy*: its own layer.
    """
    runtime = runtime_of(wishes.needs)
    shared = demands.shared(row.group_name, row.project_id)
    own = [kinds_in(row.image_policy, IMAGE), kinds_in(policy, SESSION)]
    found = []
    for node in nodes:
        asked = first_places([*shared, demands.of_node(node.name), *own], rules.accepts)
        if _NETWORKS.intersection(wishes.needs):
            asked[NETWORK] = ""
        lacks = unkept(node.facts, runtime)
        found.append({kind: place for kind, place in asked.items() if kind in lacks})
    if found and all(found):
        raise _unkept(row.group_name, runtime, found)


def _unkept(
    group: str, runtime: str, found: Sequence[Mapping[str, str]]
) -> NetworkRefused | PolicyUnkept:
    """*found*: what each machine does not keep; named is what the most of them don't."""
    times = Counter(kind for missing in found for kind in missing)
    kind, count = max(times.items(), key=lambda item: item[1])  # The first of equals.
    place = next(missing[kind] for missing in found if kind in missing)
    by = f" by runtime {runtime}" if runtime else ""
    if kind == NETWORK:
        text = f"no machine of group {group} gives its sessions a network{by}."
        return NetworkRefused(f"{text} Choose another runtime, or none.", group=group)
    (words,) = kept_words([f":{kind}"])
    if count == len(found):
        text = f"policy: {place} can't be kept{by}: no machine of group {group} keeps {words}"
    else:
        text = f"policy: no machine of group {group} keeps all its rules{by}"
        text += f"; most don't keep {words} ({place})"
    mend = "Take the rule out, or choose another runtime or group"
    if accepted := accepted_as(kind):
        mend += f'; an administrator may set accept_unenforced = ["{accepted}"] for the group'
    return PolicyUnkept(f"{text}. {mend}.", place=place, kind=kind, group=group)
