"""Tests of stretto.mesh."""
