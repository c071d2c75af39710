"""Runtimes: ways to run a kernel in isolation, behind one contract."""
