"""From files to packed micro-batches: index (metadata and tokens), images, collation, prefetch."""
