"""Who calls: users and their tokens. A token is 256 random bits; only its SHA-256 is stored."""
