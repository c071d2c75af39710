"""The launcher: the one privileged part. Standard library and ``madang.wire`` only.

::

    launcher ── zygote ──> keeper ── fork ──> init (process 1 of the session) ── spawn ──> program
       │                     │                  │
    root, one thread      server uid         root until the sandbox stands, then the session's uid

A *slot* is a keeper and an init that wait: the init is in its cgroup and in its own PID, network,
IPC and UTS namespaces already, so that a start costs mounts and an exec. See ``slots`` (launcher
side), ``zygote`` (forks them), ``keeper`` (output, stdin, the end), ``init`` (sandbox), ``main``
(socket).
"""
