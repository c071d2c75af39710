"""Use cases of images: building, finding, removing; sessions saved; recipes."""

from madang.manager.image.service.images import ImageService
from madang.manager.image.service.transfers import Transfers
from madang.manager.image.service.versions import Versions

__all__ = ["ImageService", "Transfers", "Versions"]
