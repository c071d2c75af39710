"""``plan(snapshot, policy, now)``: who starts where, who waits and why. Pure.

Each group of machines is planned by itself. Asks take their turn in the order of the policy; one
that does not fit lets later ones pass (no head-of-line blocking). So that a large one is not passed
for ever, it *keeps room* once it has waited ``reserve_after_s``: on the machines where it will have
room first (by the time limits of what runs; where these are not known, on those that lack least),
what it needs counts as taken for all that come after it. Whoever ends before then may still use it
(backfill). One keeper a machine; the first in order has it.

The same snapshot, policy and time give the same plan, whatever the order of the snapshot's parts.
Nothing here reads a clock, a database or a random number; so a live pass, a question («why»,
«when», «what if»), a replay and a test are the same call.
"""

from madang.manager.scheduling.planner.plan import plan

__all__ = ["plan"]
