"""Kernels, their channels, and files as Jupyter's frontends use them."""

from madang.manager.jupyter.service.contents import Contents
from madang.manager.jupyter.service.kernels import Kernels

__all__ = ["Contents", "Kernels"]
