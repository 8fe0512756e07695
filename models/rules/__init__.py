"""Published scan-level rules."""
