"""Builds and runs the processes of one machine.

``config`` reads settings, ``supervisor`` keeps launcher and server alive, ``server`` is the server
process, ``doctor`` looks at the machine, ``commands`` are their faces on the command line.
"""
