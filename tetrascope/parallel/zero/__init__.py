"""ZeRO stage 1 (arXiv 1910.02054 §5): optimizer state divided over the data-parallel ranks."""
