"""What tests, benchmarks and the demo need: ranks, faults, tiny models."""
