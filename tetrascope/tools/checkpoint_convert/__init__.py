"""Checkpoint conversion between formats."""
