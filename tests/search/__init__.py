"""Mirrors src/stretto/search."""
