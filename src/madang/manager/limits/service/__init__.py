"""Limits kept (``LimitService``), limits and presets written (``LimitTexts``, ``PresetService``)."""

from madang.manager.limits.service.keeping import LimitService
from madang.manager.limits.service.presets import PresetService
from madang.manager.limits.service.texts import LimitTexts

__all__ = ["LimitService", "LimitTexts", "PresetService"]
