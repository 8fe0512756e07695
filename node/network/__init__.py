"""Addresses of peers: below everything that opens or takes associations."""
