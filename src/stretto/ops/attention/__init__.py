"""Attention over a sequence that is split along the mesh: exact, in ranges, on any back end."""
