"""Batches for `bench compare`, by family."""
