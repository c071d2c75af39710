"""Sandbox policies of the administrator: what is in force where, and every version there was.

Nothing is ever changed or deleted: a new version is a new row, the newest one of a target is in
force. Sessions get what is in force when they are placed. When it changes, running ones get its
live rules too (``types.Followers``); of the others they keep those that they began with.
"""
