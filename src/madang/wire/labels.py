"""Names of groups, and labels of machines."""

from __future__ import annotations

import re
from typing import Final

GROUP: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")
LABEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}=[A-Za-z0-9._/-]{0,62}")
