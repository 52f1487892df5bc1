"""What the gate checks, one file a kind of evidence. Pure: numpy and statistics, no torch."""
