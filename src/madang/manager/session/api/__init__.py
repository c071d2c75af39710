"""Sessions over HTTP and WebSockets."""

from madang.manager.session.api.events import EventApi
from madang.manager.session.api.files import FileApi, WorkspaceApi
from madang.manager.session.api.policies import SessionPolicyApi
from madang.manager.session.api.queue import QueueApi
from madang.manager.session.api.sessions import SessionApi
from madang.manager.session.api.streams import StreamApi

__all__ = [
    "EventApi",
    "FileApi",
    "QueueApi",
    "SessionApi",
    "SessionPolicyApi",
    "StreamApi",
    "WorkspaceApi",
]
