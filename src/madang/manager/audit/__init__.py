"""The audit log: every login and every change, who, what, from where; append-only, chained by hash.

A change writes its record in its own transaction (``AuditLog.record``): neither exists without the
other. Writers take turns (see ``manager.db``), so the chain needs no lock of its own: the record
goes behind the head as last seen, if that still is the head, and takes its place::

    UPDATE audit_head SET count = 8, digest = … WHERE count = 7 AND digest = …  -- or look again
    INSERT INTO audit (seq = 8, previous = …, digest = …)

So there is no moment in which a record is not yet sealed. The chain has no key: who can write to
the database can write all of it anew, from any record on. A head that was kept elsewhere
(``madang audit head``, and the server's own log) is what then gives it away.
"""
