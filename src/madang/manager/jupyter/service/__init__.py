"""Kernels, their channels, and files as Jupyter's frontends use them."""
