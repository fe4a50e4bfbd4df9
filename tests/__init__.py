"""Mirrors src/stretto. Packages, so that rank processes can import test bodies."""
