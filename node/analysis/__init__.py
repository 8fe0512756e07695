"""Running one analysis: the same from a worker and from the command line."""
