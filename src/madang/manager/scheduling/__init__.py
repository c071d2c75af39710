"""Where sessions run, as a pure function of what waits, what is free, and the time.

Order: priority (higher first), then time of creation. A session that does not fit lets later ones
pass (no head-of-line blocking). So that a large one is not passed for ever, it *reserves* once it
has waited ``reserve_after_s``: on the machine that is nearest to having room, what it needs counts
as taken for all that come after it in order, so each end there brings it nearer. One reservation a
machine; the first in order has it.

Each session that stays gets the one reason that matters: on the machine nearest to having room, the
slot that lacks most, with who holds most of it.
"""
