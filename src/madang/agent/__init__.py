"""One per node: makes what runs equal to what the manager wants."""
