"""Decoding pictures and videos: which library does it, what is kept of it on disk, and the processes that do it."""
