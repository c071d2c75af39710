"""Our own tools, used by every part: clock, loop, identifiers, codec, logging, memory link."""
