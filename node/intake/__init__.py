"""Receiving: C-STORE listener, durable spool, assembly of series, triage."""
