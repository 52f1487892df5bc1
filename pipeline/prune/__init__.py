"""Structured pruning: what depends on what, what matters least, and the search for what to cut."""
