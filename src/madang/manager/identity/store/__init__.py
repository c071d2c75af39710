"""All SQL of the identity slice."""

from madang.manager.identity.store.people import add_user, find_user
from madang.manager.identity.store.sight import Viewer, fellows, viewer, visible
from madang.manager.identity.store.tokens import add_token

__all__ = [
    "Viewer",
    "add_token",
    "add_user",
    "fellows",
    "find_user",
    "viewer",
    "visible",
]
