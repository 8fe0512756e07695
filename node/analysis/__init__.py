"""From a series on disk to findings: HU volume, networks, measurements."""
