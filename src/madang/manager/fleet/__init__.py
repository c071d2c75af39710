"""The machines: what they have, what is allocated on them, and the links to their agents."""
