"""Processes and services of an installation: supervisor and broker."""
