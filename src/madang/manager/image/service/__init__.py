"""Use cases of images: building, finding, removing; sessions saved; recipes."""

from madang.manager.image.service.commits import Commits
from madang.manager.image.service.images import ImageService
from madang.manager.image.service.recipes import Recipes
from madang.manager.image.service.transfers import Transfers
from madang.manager.image.service.versions import Versions

__all__ = ["Commits", "ImageService", "Recipes", "Transfers", "Versions"]
