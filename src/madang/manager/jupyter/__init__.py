"""The Jupyter server API: notebooks and editors that know Jupyter find sessions as kernels.

::

    JupyterLab, VS Code, jupyter_client ── /jupyter/USER/api/… ── this ── cells ── interpreter

A *kernel* is a session with one interpreter in it. Nothing of it is kept here: its id is the
session's, written as a UUID; its kernelspec, path and name are labels of the session; its output
is the interpreter's events. So a server that comes back, or another one, serves the same kernels.
"""
