"""Operators: a specification on one device beside the same operator over a mesh."""
