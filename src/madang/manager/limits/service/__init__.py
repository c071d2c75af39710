"""Limits kept (``LimitService``); limits and presets written."""

from madang.manager.limits.service.keeping import LimitService
from madang.manager.limits.service.presets import PresetService
from madang.manager.limits.service.texts import LimitTexts

__all__ = ["LimitService", "LimitTexts", "PresetService"]
