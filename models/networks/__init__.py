"""Networks, one per file, as plain torch or MONAI modules."""
