"""What crosses a process boundary:

frozen dataclasses, enums, byte formats. Standard library only.
"""
