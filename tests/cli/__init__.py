"""Tests of stretto.cli."""
