"""How results become pages."""
