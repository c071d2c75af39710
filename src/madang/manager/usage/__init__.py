"""The usage ledger: who had how much of which machine, from when to when.

One row for each run of a session (session, attempt) on a node, written in the transaction of the
session's own move: opened when the agent says that the program began, closed when it says how it
ended, with what it measured. Nothing is sampled, nothing is summed up before it is asked for::

    move to RUNNING     INSERT (id = session.attempt, started_at, slots)     ended_at NULL: so far
    move to TERMINATED  UPDATE … WHERE ended_at IS NULL                      once; then never again
    a better account    INSERT (id = session.attempt.1, corrects = session.attempt)

What is in force is every row that no other one corrects. A machine that fell silent does not close
its rows: the manager does, at the end of the patience that it has with machines; what the machine
says later about the end becomes a correction. Rows outlive their sessions.
"""
