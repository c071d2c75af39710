"""Madang (마당, the yard everyone shares): share machines for machine learning."""

__version__ = "0.1.0"
