"""Decisions about limits, pure."""
