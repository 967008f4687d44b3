"""Model families in plain PyTorch. No file here knows of process groups or of parallelism."""
