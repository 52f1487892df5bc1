"""How fast a file runs on a device, and why not faster."""
