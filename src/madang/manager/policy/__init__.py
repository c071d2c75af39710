"""Sandbox policies of the administrator: what is in force where, and every version there was.

Nothing is ever changed or deleted: a new version is a new row, the newest one of a target is in
force. Sessions get what is in force when they are placed, and keep it.
"""
