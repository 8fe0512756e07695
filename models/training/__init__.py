"""Training data, the procedural phantom, training and evaluation."""
