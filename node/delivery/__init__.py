"""Sending objects to peers."""
