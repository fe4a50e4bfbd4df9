"""Small trained pipelines, so that examples, tests and benchmarks need no model hub."""
