"""Pixel data and geometry of DICOM images: from files to arrays in HU and millimetres."""
