"""Groups of machines, what ended sessions teach, and the log of decisions."""

from madang.manager.scheduling.service.groups import Groups, GroupService
from madang.manager.scheduling.service.history import HistoryService
from madang.manager.scheduling.service.journal import Journal
from madang.manager.scheduling.service.memory import Memory
from madang.manager.scheduling.service.reservations import ReservationService

__all__ = ["GroupService", "Groups", "HistoryService", "Journal", "Memory", "ReservationService"]
