"""Pneumonia on chest CT: lungs, infection, measurements and published scan-level rules."""
