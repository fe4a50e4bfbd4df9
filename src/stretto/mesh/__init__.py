"""A plan made real: ranks, groups and collectives, with the bytes counted."""
