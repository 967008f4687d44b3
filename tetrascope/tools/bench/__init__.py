"""Throughput harness."""
