"""Limits: how much a token, a user, a project or a domain may have; presets; idle sessions.

Not to be confused with the slice ``policy``, which is about what a session may *do*.

A text of limits has a name and versions, and is assigned to accounts (``project:ID``) or to all of
a kind that have none of their own (``project:*``). A session goes to up to four accounts at once,
and must keep the limits of each of them: the tightest counts, and is named.

Nothing is counted twice: what an account has is the sum over its sessions' rows, read in the very
transaction that adds to it. As there is one writer at a time (``manager.db``), two creates, or two
placements, can't both take what is left once. Where that is done::

    create   size, time limit, sessions, pending, CPU-hours    LimitService.check_create
    plan     slots at once: the session waits, and is told why  Assigned.slots_at_once
    place    slots at once, once more, in the transaction       LimitService.find_over

This slice knows no sessions: what accounts hold comes by ``types.Ledger`` from the slices above.
Whether a session is idle is decided here (``rules.idle``), looked at and acted upon there.
"""
