"""Interpreters in sessions."""
