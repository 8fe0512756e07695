"""Segmentation of a volume: lungs first, then infection within them."""
