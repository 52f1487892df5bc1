"""What a model does: its accuracy on a set, its latency on this machine. Imports nothing heavy."""
