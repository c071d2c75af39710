"""Cells: code run piece by piece in interpreters of a session.

An interpreter is an exec of its session whose program is a *driver* (docs/reference/drivers.md): it
reads what to do from stdin and writes frames among its output. ::

    client ──▶ CellService ──▶ Hub ──stdin──▶ driver
       ▲                       │ ▲               │ stdout, stderr
       └── Follower ◀── Recent ◀─┴── Narrator ◀── log of the exec, by offset

Truth is the exec's log, with the rows of cells (their code). ``rules.narration`` makes numbered
events of both, always the same; memory holds the newest. A server that starts anew reads the log
again and knows what runs; a follower that is behind reads it for itself. A cell is written down
before the driver gets it, and the driver gets the next once one has ended.
"""
