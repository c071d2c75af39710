"""Jupyter's REST API and channels below ``/jupyter/USER``, thin."""

from madang.manager.jupyter.api.channels import ChannelApi
from madang.manager.jupyter.api.contents import ContentsApi
from madang.manager.jupyter.api.kernels import KernelApi

__all__ = ["ChannelApi", "ContentsApi", "KernelApi"]
