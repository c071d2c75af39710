"""Use cases of sessions: for users, for agents, and the moves that both share."""

from madang.manager.session.service.agents import AgentService
from madang.manager.session.service.users import SessionService

__all__ = ["AgentService", "SessionService"]
