"""The `lungnode` command, one file for each group of commands."""
