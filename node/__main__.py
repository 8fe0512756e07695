"""`python -m node` is `lungnode`."""

from node.cli.main import app

app()
