"""Tests of stretto.plan."""
