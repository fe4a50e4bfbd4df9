"""Plans: the decision as frozen data, an option per axis."""
