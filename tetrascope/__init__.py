"""tetrascope: a training engine for vision-language models on four axes of parallelism."""

__version__ = "0.1.0"
