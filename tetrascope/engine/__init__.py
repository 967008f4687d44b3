"""Joins models and parallelism: configuration, step plan, data, training step, checkpoints."""
