"""Tests of stretto.cluster."""
