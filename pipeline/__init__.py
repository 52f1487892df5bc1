"""The stages and the flow that joins them."""
