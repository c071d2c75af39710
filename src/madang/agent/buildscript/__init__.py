"""What runs inside a build session, as one zip file on the host's Python.

Standard library only, and no newer Python than 3.10: the host's may be older than the server's.
``tree`` is shared with the agent, which recomputes every digest.
"""
