"""The axes of parallelism, one folder each. Nothing here knows of a model family."""
