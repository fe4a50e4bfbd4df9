"""Tests of stretto.cost."""
