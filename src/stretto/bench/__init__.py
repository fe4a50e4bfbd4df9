"""Measurements behind the figures: is it exact, how fast are ranks, how close at equal depth."""
