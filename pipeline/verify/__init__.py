"""Verification: numeric parity rung by rung, the evidence that the gate judges, and any file held
against any reference (`compress verify`)."""
