"""The network of a session that asked for one.

::

    session's namespace            │ the machine's namespace
                                   │
    program ─ eth0 ════════════════╪═ mdHASH-N ─ table madang_HASH ─ forwarding ─ uplink
       │       table madang        │             (no spoofing, nothing of the machine's own, no
    127.0.0.53 (names allowed,     │              other session, nothing forbidden, nobody may
       │        targets allowed,   │              connect to sessions; addresses are translated)
       │        what was refused)  │
       └── warden ─────────────────╪─ the machine's resolvers

Two tables, because they fail apart: the session's own knows its allow-list and dies with its
namespace; the machine's is the same for all sessions and holds even if the other did not. A
session has no capability in either namespace, thus no way to change them.

A *warden* for each session makes both ends, then gives up everything but the power over the
session's namespace. It answers the session's DNS questions, opens the way to the addresses of
names that are allowed, and notes what is refused. It outlives the launcher and leaves with the
session. When it is killed, the rules stay, and the launcher makes another.

`netlink` bytes to and from the kernel · `links` interfaces, addresses, routes · `rules` both
tables · `packets` DNS messages · `names` the answers · `warden` the process · `networks` the
launcher's side.
"""
