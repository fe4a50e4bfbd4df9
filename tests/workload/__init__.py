"""Tests of stretto.workload."""
