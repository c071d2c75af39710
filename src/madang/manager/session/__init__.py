"""Sessions: created, placed, watched, ended, removed.

Truth is the row. ``store.move`` changes a status, guarded by the status it was read with, together
with a history row and an event (the outbox) in one transaction::

    PENDING ──assign──▶ SCHEDULED ──▶ PREPARING ──▶ RUNNING ──▶ TERMINATING ──▶ TERMINATED
       └──────────────────stop──────────────────────────────────────────────────────▲

Desired state of a node is derived from rows: ``held_by`` names the node that shall have a kernel
for the session, the status says what it shall do with it (run, stop, keep). Each change gives the
row the node's next revision, so that a delta is «all rows above the revision sent last»; what is no
longer held stands in ``fleet.forgotten``. Agents report what is; a report counts only while node,
attempt and nonce match the row, otherwise the kernel is to be forgotten.

Frozen or not is no status: a frozen session is RUNNING, keeps its slots, its owner and its time
limit. ``frozen_at`` is what is wanted, with the revision of the order (``freeze_revision``), and
follows what the agent reports: it may wake or freeze a session by itself. Why the two never fight:
``agent.freezing``; the manager's half is ``rules.frost_news``.

Wake-ups: after each commit ``EventFeed`` reads the new events and wakes whoever waits for those
objects: streams, long polls, the scheduler. A lost wake-up costs time, never truth.
"""
