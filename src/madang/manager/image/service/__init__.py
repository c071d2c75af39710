"""Use cases of images: building, finding, removing; sessions saved; recipes."""

from madang.manager.image.service.images import ImageService

__all__ = ["ImageService"]
