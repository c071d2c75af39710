"""The command line: ``madang …`` over ``madang.client``.

What the program writes goes to stdout and stderr as it is; every word of ours goes to stderr. Each
command lives in a module of its own that is imported when the command is used.
"""
