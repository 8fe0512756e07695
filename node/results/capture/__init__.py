"""The colour capture: pages drawn as pixels."""
