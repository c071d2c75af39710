"""What a new session asks of its place, and what no machine can do for it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from madang.manager.db import seconds
from madang.manager.fleet.types import NodeRow, Slots
from madang.manager.policy.rules import kinds_in
from madang.manager.policy.types import Demands
from madang.manager.scheduling.rules import (
    NETWORK,
    kept_words,
    lacking,
    offers,
    show,
    slot_name,
    unkept,
)
from madang.manager.scheduling.types import GroupRules, Wishes
from madang.manager.session.service.keeping import (
    NETWORKS,
    own_kinds,
    runtime_of,
)
from madang.wire.errors import (
    GroupRefused,
    NetworkRefused,
    PolicyUnkept,
    RuntimeNotOffered,
    SizeImpossible,
)
from madang.wire.kernel import NATIVE
from madang.wire.policy import IMAGE, SESSION
from madang.wire.policy_kept import accepted_as, first_places
from madang.wire.session import SessionSpec

MAX_KIND = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """A session that is to be made, and where."""

    spec: SessionSpec
    slots: Slots
    image_policy: str
    group: str
    project: str
    """Its id."""
    at: int


def wishes_for(asking: Asking, accounts: tuple[str, ...], after: tuple[str, ...]) -> Wishes:
    """*after*: ids."""
    spec = asking.spec
    needs = [*spec.node_labels]
    if spec.runtime:
        needs.append(f"runtime:{spec.runtime}")
    if spec.network:
        needs.append(f"network:{spec.network.mode}")
    waited = spec.give_up_after_s
    return Wishes(
        after=after,
        after_any=spec.after_any,
        not_before=spec.not_before,
        give_up_at=None if waited is None else seconds(asking.at) + waited,
        needs=tuple(needs),
        arch=spec.arch,
        apart=spec.apart,
        preemptible=spec.preemptible,
        reservation=spec.reservation,
        accounts=accounts,
        kind=os.path.basename(spec.argv[0])[:MAX_KIND] if spec.argv else "",
        keeps=own_kinds(asking.image_policy, spec.policy),
    )


def refuse_impossible(
    asking: Asking, wishes: Wishes, rules: GroupRules, demands: Demands, nodes: Sequence[NodeRow]
) -> None:
    """What no machine of its group could ever do; a group without machines may get some."""
    spec, slots, group = asking.spec, asking.slots, asking.group
    if spec.runtime and rules.runtimes and spec.runtime not in rules.runtimes:
        raise RuntimeNotOffered(
            spec.runtime, offered=rules.runtimes, why=f"group {group} does not allow it"
        )
    mine = [(node, *offers(node.facts, rules.labels)) for node in nodes if node.group == group]
    if not mine:
        return
    for need in wishes.needs:
        if not any(need in offered for _, offered, _ in mine):
            raise _lacks(need, spec, group, [offered for _, offered, _ in mine])
    if wishes.arch and not any(arch in ("", wishes.arch) for *_, arch in mine):
        known = ", ".join(sorted({arch for *_, arch in mine}))
        raise GroupRefused(
            f"group {group} has no machine of architecture {wishes.arch}; there are {known}.",
            group=group,
        )
    if not any(slots.within(node.capacity) for node, *_ in mine):
        raise _too_large(slots, group, [node.capacity for node, *_ in mine])
    needs = set(wishes.needs)
    fitting = [node for node, offered, _ in mine if needs <= offered]
    _refuse_unkept(asking, wishes, rules, demands, fitting)


def _lacks(
    need: str, spec: SessionSpec, group: str, offered: Sequence[frozenset[str]]
) -> GroupRefused | NetworkRefused | RuntimeNotOffered:
    if need == f"runtime:{spec.runtime}":
        names = {o.partition(":")[2] for each in offered for o in each if _is(o, "runtime")}
        usual_first = sorted(names, key=lambda name: (name != NATIVE, name))
        return RuntimeNotOffered(spec.runtime, offered=usual_first, why="no machine offers it")
    if need == f"network:{spec.network.mode}":
        modes = sorted({o.partition(":")[2] for each in offered for o in each if _is(o, "network")})
        text = f"no machine of group {group} gives its sessions network {spec.network.mode}; "
        return NetworkRefused(f"{text}there is {', '.join(modes)} (`network.modes`).")
    labels = sorted({label for each in offered for label in each if "=" in label})
    there = f"; there are {', '.join(labels[:10])}" if labels else ""
    return GroupRefused(f"no machine of group {group} has label {need}{there}.", group=group)


def _is(offer: str, kind: str) -> bool:
    return offer.startswith(f"{kind}:") and "=" not in offer


def _too_large(slots: Slots, group: str, capacities: Sequence[Slots]) -> SizeImpossible:
    asked = slots.amounts
    slot, most = lacking(asked, [capacity.amounts for capacity in capacities])
    name = slot_name(slot)
    text = (
        f"{name}: asks {show(slot, asked[slot])}, but the largest machine has "
        f"{show(slot, most)}. Ask for less with --{name}."
    )
    return SizeImpossible(text, slot=name, asked=asked[slot], largest=most, group=group)


def _refuse_unkept(
    asking: Asking, wishes: Wishes, rules: GroupRules, demands: Demands, nodes: Sequence[NodeRow]
) -> None:
    """Where none of *nodes*, which have all else that it needs, can keep its rules."""
    runtime = runtime_of(wishes.needs)
    shared = demands.shared(asking.group, asking.project)
    own = [kinds_in(asking.image_policy, IMAGE), kinds_in(asking.spec.policy, SESSION)]
    found = []
    for node in nodes:
        asked = first_places([*shared, demands.of_node(node.name), *own], rules.accepts)
        if NETWORKS.intersection(wishes.needs):
            asked[NETWORK] = ""
        lacks = unkept(node.facts, runtime)
        found.append({kind: place for kind, place in asked.items() if kind in lacks})
    if found and all(found):
        raise _not_kept(asking.group, runtime, found)


def _not_kept(
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
