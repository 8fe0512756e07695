"""Networks, weights and scan-level rules. Works on arrays in HU; knows nothing of DICOM or of `node`."""
