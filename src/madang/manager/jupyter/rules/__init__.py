"""Decisions, pure: ids, kernelspecs, and between Jupyter's messages and the events of cells."""
