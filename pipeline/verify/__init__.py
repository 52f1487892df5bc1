"""Verification: numeric parity rung by rung, and the evidence that the gate judges."""
