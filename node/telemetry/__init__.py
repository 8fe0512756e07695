"""Logs of what the node does; UIDs and our own ids only, never patient data."""
