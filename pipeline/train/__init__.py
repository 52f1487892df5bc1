"""Training: the one loop, and the parts it is made of. Knows no teacher, no data format."""
