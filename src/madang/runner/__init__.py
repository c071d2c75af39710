"""What runs inside sessions for people who run code rather than programs.

``languages/NAME.toml`` are manifests (``wire.languages.Language``), ``drivers/`` the interpreters'
drivers, each in its own language; see docs/reference/drivers.md.
"""
