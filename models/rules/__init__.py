"""Published scan-level rules, one per module; `statement` applies them all to one scan."""
