"""Methods: one package for each way to read a series."""
