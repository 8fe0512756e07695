"""`python -m node` is `lungnode`."""

from node.cli import app

app()
