"""People over HTTP: who calls, what they hold, and who they are to each other."""

from madang.manager.identity.api.account import AccountApi
from madang.manager.identity.api.login import LoginApi
from madang.manager.identity.api.people import PeopleApi

__all__ = ["AccountApi", "LoginApi", "PeopleApi"]
