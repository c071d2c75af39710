"""Jupyter's REST API and channels below ``/jupyter/USER``, thin."""

from madang.manager.jupyter.api.channels import KernelChannelApi
from madang.manager.jupyter.api.contents import ContentsApi
from madang.manager.jupyter.api.kernels import KernelApi

__all__ = ["ContentsApi", "KernelApi", "KernelChannelApi"]
