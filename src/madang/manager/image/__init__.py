"""Images: built-in ``host``, and layered ones that build sessions make.

A build is a row in BUILDING and a session of kind ``build``; whoever looks next moves the row on::

    POST /v1/images ── row BUILDING ──► session (build) ──► ended well: manifest read ──► READY
                          │                                └► anything else ────────────► FAILED
                          └── no session came of it within a minute ──────────────────► FAILED

Several rows may have one name: at most one READY (what new sessions get), at most one BUILDING (a
second build of the name is refused while one runs), the last FAILED one. A new READY row makes the
one before it REMOVED in the same transaction. REMOVED rows stay as long as live sessions run from
their digest, so that their layers are kept; then the collector deletes them.
"""
