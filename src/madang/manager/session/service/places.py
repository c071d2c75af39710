"""What a new session asks of its place, and what no machine can do for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict

from madang.manager.db import seconds
from madang.manager.fleet.types import NodeRow, Slots
from madang.manager.policy.types import Demands
from madang.manager.scheduling.rules import lacking, offers, show, slot_name
from madang.manager.scheduling.types import GroupRules, Wishes
from madang.manager.session.service.keeping import own_kinds, refuse_unkept
from madang.manager.session.types import SessionRow
from madang.wire.errors import GroupRefused, NetworkRefused, RuntimeNotOffered, SizeImpossible
from madang.wire.kernel import NATIVE
from madang.wire.session import SessionSpec

MAX_KIND = 80


def wishes_for(
    spec: SessionSpec, row: SessionRow, accounts: tuple[str, ...], after: tuple[str, ...]
) -> Wishes:
    """*after*: ids."""
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
        give_up_at=None if waited is None else seconds(row.created_at) + waited,
        needs=tuple(needs),
        arch=spec.arch,
        apart=spec.apart,
        preemptible=spec.preemptible,
        reservation=spec.reservation,
        accounts=accounts,
        kind=os.path.basename(spec.argv[0])[:MAX_KIND] if spec.argv else "",
        keeps=own_kinds(row.image_policy, spec.policy),
    )


def refuse_impossible(
    row: SessionRow,
    wishes: Wishes,
    spec: SessionSpec,
    rules: GroupRules,
    demands: Demands,
    nodes: Sequence[NodeRow],
) -> None:
    """What no machine of its group could ever do; a group without machines may get some.

    *row* has its project and group.
    """
    slots, group = row.slots, row.group_name
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
    refuse_unkept(row, wishes, spec.policy, rules, demands, fitting)


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
    asked = asdict(slots)
    slot, most = lacking(asked, [asdict(capacity) for capacity in capacities])
    name = slot_name(slot)
    text = (
        f"{name}: asks {show(slot, asked[slot])}, but the largest machine has "
        f"{show(slot, most)}. Ask for less with --{name}."
    )
    return SizeImpossible(text, slot=name, asked=asked[slot], largest=most, group=group)
