"""Networks, one a file, as plain torch or MONAI modules."""
